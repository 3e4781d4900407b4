"""The paper's flows in continuous time: the family of Theorem 2.3, the deviation from the straight line, prescribed paths.

torchdiffeq integrates them: ``pip install 'torch_adapted_gd[flow]'``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import one_of, real_number
from .field import Loss, Objective
from .integrate import integrate
from .local import OutputMap, equal_steps
from .paths import OutputPath, motion

_LAST = 1e-4  # length of the last step of the time t by "dopri5"

__all__ = ["FlowResult", "InterpolationDeviation", "PathResult", "adapted_flow", "follow_path", "interpolation_deviation"]


@dataclass(frozen=True)
class FlowResult:
    """A flow at the recorded times; all float64.

    Attributes:
        s: Times of the flow itself, ``[T]``; infinite where t = 1.
        t: 1 − exp(−s/N) (2.52), ``[T]``.
        losses: C, ``[T]``.
        outputs: x, ``[T, N, ...]``.
        ranks: Rank of D, ``[T]``.
        off_range: |P⊥g|/|g|, the relative size of the output gradient outside ran D, ``[T]``.
        parameters: θ, ``[T, K]``, in the order of ``named_parameters()``.
        evaluations: The number of evaluations of the field.
    """

    s: Tensor
    t: Tensor
    losses: Tensor
    outputs: Tensor
    ranks: Tensor
    off_range: Tensor
    parameters: Tensor
    evaluations: int


def adapted_flow(
    model: nn.Module,
    x: Tensor | tuple[Any, ...],
    y_or_loss: Tensor | Loss,
    *,
    alpha: float = 1.0,
    time: str = "t",
    t_end: float | None = None,
    method: str = "dopri5",
    rtol: float = 1e-8,
    atol: float = 1e-10,
    steps: int = 20,
    rank_rtol: float | None = None,
    load: bool = False,
) -> FlowResult:
    """Integrate ∂_s θ = V_α = −[α (DᵀD)⁺ + (1−α) 1] ∇_θC (2.31), from the network's present parameters.

    α = 1 is the adapted flow (2.27), whose outputs follow ∂_s x = −P∇ₓC (2.28). With targets the loss is C = |x − y|²/2N
    (2.48). In the time t = 1 − e^(−s/N) (2.52) outputs then move straight, x̃(t) = (1−t) x₀ + t y (2.57), while rank D =
    QN. At t = 1 the field, (1/(1−t)) D⁺(x − y) for α = 1, is 0/0. Therefore the integration to ``t_end=1`` stops before,
    ``"dopri5"`` at 1 − 1e-4 and the others one step before the end, and one step of length 1 − t follows: for α = 1 the
    Gauss–Newton step θ ← θ − D⁺(x − y). Its error is O((1−t)²), like that of Euler's steps; ``"rk4"`` has its order only
    for ``t_end < 1``.

    Args:
        model: The network, in the mode that it should be taken in.
        x: Input with the batch first, ``[N, ...]``, or a tuple of positional inputs.
        y_or_loss: Targets of the outputs' shape, or a function from outputs to a scalar loss.
        alpha: α in [0, 1], the homotopy of Theorem 2.3.
        time: ``"t"``, from 0 to at most 1, for targets; or ``"s"``.
        t_end: The end, in that time; by default t = 1, or s = N.
        method: ``"dopri5"``, with adaptive steps, or ``"rk4"`` or ``"euler"``, with ``steps`` equal steps.
        rtol: Relative tolerance of ``"dopri5"``.
        atol: Absolute tolerance of ``"dopri5"``.
        steps: T; the flow is recorded at T equal steps of the time.
        rank_rtol: Singular values of D up to this times the largest count as zero; by default those that rounding can cause.
        load: Leave the network with the final parameters. Otherwise it is left as it was.

    Returns:
        T + 1 records, with that of the start.

    Raises:
        ImportError: torchdiffeq is not installed.
        TypeError: An argument has another type.
        ValueError: An argument is out of its range, or shapes do not fit.
        RuntimeError: The flow diverges, or a call of the model cannot be repeated.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(5, 1).double()
        >>> x, y = torch.randn(3, 5).double(), torch.randn(3, 1).double()
        >>> flow = adapted_flow(model, x, y, steps=4)
        >>> line = torch.lerp(flow.outputs[0], y, 0.5)
        >>> bool((flow.outputs[2] - line).norm() < 1e-7), flow.ranks.tolist()
        (True, [3, 3, 3, 3, 3])
    """
    one_of("time", time, ("t", "s"))
    real_number("alpha", alpha, low=0.0, high=1.0)
    network = OutputMap(model, x, rank_rtol)
    objective = Objective.of(y_or_loss, network)
    if time == "t" and objective.target is None:
        raise ValueError('`time` should be "s" where a loss is given and no targets: the change of time is that of (2.48).')
    n = network.num_samples
    end = real_number("t_end", (1.0 if time == "t" else n) if t_end is None else t_end, low=1e-300)
    if time == "t" and end > 1:
        raise ValueError(f"`t_end` should be at most 1 in the time t, but got {t_end!r}.")
    grid = equal_steps(end, steps)
    singular = time == "t" and end == 1.0
    times = grid
    if singular:
        times = torch.cat([grid[:-1], 1 - grid[1:2].clamp(max=2 * _LAST) / 2]) if method == "dopri5" else grid[:-1]

    def field(at: float, theta: Tensor) -> Tensor:
        pace = n / (1 - at) if time == "t" else 1.0
        return pace * objective.field(network.tangent(theta), alpha)

    with network.borrowed():
        path, evaluations = integrate(field, network.values(), times, method, rtol, atol)
        if singular:
            last = path[-1] + n * objective.field(network.tangent(path[-1]), alpha)
            path = torch.cat([path[: len(grid) - 1], last[None]])
            evaluations += 1
        outputs, ranks, off_range = _records(network, path, lambda _, out: objective.gradient(out))
    if load:
        network.load(path[-1])
    return FlowResult(
        s=grid if time == "s" else -n * torch.log1p(-grid),
        t=grid if time == "t" else -torch.expm1(-grid / n),
        losses=torch.tensor([objective.value(out) for out in outputs], dtype=torch.float64),
        outputs=outputs.reshape(-1, *network.shape),
        ranks=ranks,
        off_range=off_range,
        parameters=path,
        evaluations=evaluations,
    )


def _records(
    network: OutputMap, thetas: Iterable[Tensor], direction: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs ``[T, QN]``, ranks of D ``[T]`` and |P⊥u|/|u| ``[T]`` at each θ, with u from the record's number and outputs."""
    records = []
    for k, theta in enumerate(thetas):
        tangent = network.tangent(theta)
        records.append((tangent.outputs, tangent.rank, tangent.off_range(direction(k, tangent.outputs))))
    outputs, ranks, off_range = zip(*records, strict=True)
    return torch.stack(outputs), torch.tensor(ranks), torch.tensor(off_range, dtype=torch.float64)


@dataclass(frozen=True)
class InterpolationDeviation:
    """The deviation of outputs from the straight line, predicted and observed (Proposition 2.5); all float64.

    Attributes:
        t: ``[T]``.
        predicted: S(t) by (2.59), corrected, ``[T, N, ...]``.
        observed: x̃(t) − [(1−t) x₀ + t y], ``[T, N, ...]``.
        off_range: |P⊥_t (x₀ − y)|/|x₀ − y|, the relative size of the way outside ran D, ``[T]``.
        ranks: Rank of D, ``[T]``.
        losses: C = |x − y|²/2N, ``[T]``.
        distance: |x₀ − y|.
    """

    t: Tensor
    predicted: Tensor
    observed: Tensor
    off_range: Tensor
    ranks: Tensor
    losses: Tensor
    distance: float

    @property
    def error(self) -> float:
        """The largest distance between ``predicted`` and ``observed``, in units of |x₀ − y|; 0 if that is 0."""
        return float((self.predicted - self.observed).flatten(1).norm(dim=1).max()) / (self.distance or 1.0)


def interpolation_deviation(
    model: nn.Module,
    x: Tensor | tuple[Any, ...],
    y: Tensor,
    *,
    t_end: float = 0.99,
    method: str = "dopri5",
    rtol: float = 1e-8,
    atol: float = 1e-10,
    steps: int = 20,
    rank_rtol: float | None = None,
) -> InterpolationDeviation:
    """Measure how far rank loss takes the outputs from the straight line, and predict it from the projectors P_t alone.

    Proposition 2.5: along the adapted flow in the time t the deviation from the line is, (2.59)-(2.60) corrected,

        x̃(t) − [(1−t) x₀ + t y] = S(t) = ∫₀ᵗ U_{t,t'} (1−t)/(1−t') P⊥_{t'} (x₀ − y) dt',  ∂_t U_{t,t'} = (1/(1−t)) P⊥_t U_{t,t'}

    The equation S' = P⊥(x₀ − y) − (1/(1−t)) P S, S(0) = 0, has the same solution and is integrated together with θ. For
    constant P it is t P⊥(x₀ − y).

    Args:
        model: The network; it is left as it was.
        x: Input with the batch first, or a tuple of positional inputs.
        y: Targets, of the outputs' shape.
        t_end: The end, below 1.
        method: See `adapted_flow`.
        rtol: Relative tolerance of ``"dopri5"``.
        atol: Absolute tolerance of ``"dopri5"``.
        steps: T; records are at T equal steps.
        rank_rtol: Singular values of D up to this times the largest count as zero.

    Returns:
        T + 1 records, with that of the start.

    Raises:
        ImportError: torchdiffeq is not installed.
        ValueError: An argument is out of its range, or shapes do not fit.
        RuntimeError: The flow diverges, or a call of the model cannot be repeated.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False).double()  # two points that no line through 0 fits: P is constant
        >>> x, y = torch.tensor([[1.0], [1.0]]).double(), torch.tensor([[1.0], [-1.0]]).double()
        >>> found = interpolation_deviation(model, x, y, steps=2)
        >>> found.error < 1e-7, round(float(found.off_range[0]), 3) > 0, found.ranks.tolist()
        (True, True, [1, 1, 1])
    """
    real_number("t_end", t_end, low=1e-300, below=1.0)
    network = OutputMap(model, x, rank_rtol)
    target = Objective.of(y, network).target
    if target is None:
        raise TypeError(f"`y` should be a tensor of targets, but got {type(y).__name__}.")
    grid = equal_steps(t_end, steps)
    sizes = [network.num_params, network.num_outputs]

    def field(at: float, state: Tensor) -> Tensor:
        theta, deviation = state.split(sizes)
        tangent = network.tangent(theta)
        change = way - tangent.project(way) - tangent.project(deviation) / (1 - at)
        return torch.cat([-tangent.lift(tangent.outputs - target) / (1 - at), change])

    with network.borrowed():
        start = network.outputs()
        way = start - target  # x₀ − y
        path, _ = integrate(field, torch.cat([network.values(), torch.zeros_like(way)]), grid, method, rtol, atol)
        thetas, predicted = path.split(sizes, dim=1)
        outputs, ranks, off_range = _records(network, thetas, lambda *_: way)
    line = start - grid.to(start)[:, None] * way
    return InterpolationDeviation(
        t=grid,
        predicted=predicted.reshape(-1, *network.shape),
        observed=(outputs - line).reshape(-1, *network.shape),
        off_range=off_range,
        ranks=ranks,
        losses=(outputs - target).square().sum(1) / (2 * network.num_samples),
        distance=float(way.norm()),
    )


@dataclass(frozen=True)
class PathResult:
    """Outputs moved along a prescribed path; all float64.

    Attributes:
        s: ``[T]``.
        wanted: The path, ``[T, N, ...]``.
        outputs: The network's outputs, ``[T, N, ...]``.
        off_range: |P⊥∂_s x|/|∂_s x|, the relative size of the path's motion that (3.3) and (3.7) forbid, ``[T]``.
        ranks: Rank of D, ``[T]``.
        parameters: θ, ``[T, K]``.
    """

    s: Tensor
    wanted: Tensor
    outputs: Tensor
    off_range: Tensor
    ranks: Tensor
    parameters: Tensor

    @property
    def distance(self) -> Tensor:
        """|x − path| at each time, ``[T]``."""
        distance: Tensor = torch.linalg.vector_norm((self.outputs - self.wanted).flatten(1), dim=1)
        return distance


def follow_path(
    model: nn.Module,
    x: Tensor | tuple[Any, ...],
    path: OutputPath,
    *,
    s_end: float = 1.0,
    correction: float = 0.0,
    method: str = "dopri5",
    rtol: float = 1e-8,
    atol: float = 1e-10,
    steps: int = 20,
    rank_rtol: float | None = None,
    load: bool = False,
) -> PathResult:
    """Move the outputs along a prescribed path: ∂_s θ = D⁺ ∂_s x (3.5), from the network's present parameters.

    The part of ∂_s x outside ran D cannot be followed; its size is reported. From these parameters, a path is feasible if
    P⊥∂_s x = 0 everywhere (3.3), (3.7).

    Args:
        model: The network.
        x: Input with the batch first, or a tuple of positional inputs.
        path: `LinearPath`, `DetourPath`, or any differentiable function from a scalar tensor s to outputs of the outputs'
            shape. It should begin at the network's outputs.
        s_end: The end; the path begins at s = 0.
        correction: κ ≥ 0 in ∂_s θ = D⁺[∂_s x + κ (x(s) − x(θ))], which reduces drift.
        method: See `adapted_flow`.
        rtol: Relative tolerance of ``"dopri5"``.
        atol: Absolute tolerance of ``"dopri5"``.
        steps: T; records are at T equal steps.
        rank_rtol: Singular values of D up to this times the largest count as zero.
        load: Leave the network with the final parameters. Otherwise it is left as it was.

    Returns:
        T + 1 records, with that of the start.

    Raises:
        ImportError: torchdiffeq is not installed.
        TypeError: ``path`` is not a function.
        ValueError: An argument is out of its range, or the path has another shape, another start or no derivative.
        RuntimeError: The flow diverges, or a call of the model cannot be repeated.

    Example:
        >>> from torch_adapted_gd.theory.paths import DetourPath
        >>> model = torch.nn.Linear(5, 1).double()
        >>> x, y = torch.randn(3, 5).double(), torch.randn(3, 1).double()
        >>> led = follow_path(model, x, DetourPath(model(x), y, bend=torch.ones(3, 1)), steps=2)
        >>> bool((led.outputs[-1] - y).norm() < 1e-6)
        True
    """
    if not callable(path):
        raise TypeError(f"`path` should be a function from s to outputs, but got {type(path).__name__}.")
    real_number("correction", correction, low=0.0)
    network = OutputMap(model, x, rank_rtol)
    grid = equal_steps(real_number("s_end", s_end, low=1e-300), steps)

    def field(at: float, theta: Tensor) -> Tensor:
        tangent = network.tangent(theta)
        place, velocity = motion(path, at, network.shape)
        return tangent.lift(velocity + correction * (place - tangent.outputs))

    with network.borrowed():
        start, first = network.outputs(), motion(path, 0.0, network.shape)[0]
        if not torch.allclose(first, start, rtol=1e-4, atol=1e-6 * float(start.abs().max())):
            raise ValueError(
                f"`path` should begin at the network's outputs, but is {float((first - start).norm()):.3g} from them at s = 0. "
                "Begin it at model(x)."
            )
        places, velocities = zip(*(motion(path, float(at), network.shape) for at in grid), strict=True)
        if not torch.stack(velocities).any() and not all(torch.equal(place, first) for place in places):
            raise ValueError("`path` moves but has no derivative: compute it from the tensor s itself, not from float(s).")
        thetas, _ = integrate(field, network.values(), grid, method, rtol, atol)
        outputs, ranks, off_range = _records(network, thetas, lambda k, _: velocities[k])
    if load:
        network.load(thetas[-1])
    return PathResult(
        s=grid,
        wanted=torch.stack(places).reshape(-1, *network.shape),
        outputs=outputs.reshape(-1, *network.shape),
        off_range=off_range,
        ranks=ranks,
        parameters=thetas,
    )
