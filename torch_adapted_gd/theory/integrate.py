"""Integration of ordinary differential equations by torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import one_of, real_number

_MOST_STEPS = 1000  # between two records. A smooth flow needs a few; a flow that meets a singular D would never end


@torch.no_grad()
def integrate(
    field: Callable[[float, Tensor], Tensor], start: Tensor, grid: Tensor, method: str, rtol: float, atol: float
) -> tuple[Tensor, int]:
    """Integrate ∂_t z = field(t, z) along a grid of times, which are also the steps of ``"rk4"`` and ``"euler"``.

    The field is never evaluated past the last time. On a terminal there is a progress bar.

    Returns:
        z at those times, ``[T, n]``, and the number of evaluations of the field.
    """
    one_of("method", method, ("dopri5", "rk4", "euler"))
    real_number("rtol", rtol, low=0.0, below=1.0)
    real_number("atol", atol, low=0.0)
    try:
        from torchdiffeq import odeint
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("Flows need torchdiffeq: pip install 'torch_adapted_gd[flow]'.") from error
    if len(grid) < 2:
        return start[None], 0
    evaluations = 0
    first, last = float(grid[0]), float(grid[-1])
    with tqdm(total=last - first, desc=method, leave=False, disable=None, bar_format="{l_bar}{bar}| {elapsed}") as bar:

        def right_hand_side(t: Tensor, z: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            at = min(float(t), last)  # torchdiffeq's first probe may be farther
            bar.update(max(0.0, at - first - bar.n))
            value = field(at, z)
            if not torch.isfinite(value).all():
                raise RuntimeError(f"The flow is not finite at time {at:.6g}: it diverges. Stop before, or take smaller steps.")
            return value

        options: dict[str, Any] = {}
        if method == "dopri5":  # `step_t` ends a step at the last time; otherwise it steps past it and interpolates
            limits = {"step_t": grid[-1:].to(start.device), "max_num_steps": _MOST_STEPS}
            options = {"rtol": rtol, "atol": atol, "options": limits}
        try:
            path: Tensor = odeint(right_hand_side, start, grid.to(start.device), method=method, **options)
        except AssertionError as error:
            if not str(error).startswith(("max_num_steps exceeded", "underflow in dt")):
                raise  # by the user's model or loss, and not by torchdiffeq
            raise RuntimeError(
                f"The flow could not be integrated to the tolerances: {error}. The rank may change on the way, or the path be "
                "infeasible: try larger tolerances, or `rk4`."
            ) from error
    return path, evaluations
