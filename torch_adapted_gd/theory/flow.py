"""The paper's flows in continuous time: the adapted family of Theorem 2.3, its straight line and deviation, prescribed paths.

Integrated by torchdiffeq: ``pip install 'torch_adapted_gd[flow]'``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import one_of, positive_integer, real_number
from .field import Loss, Objective, field_of_parameters
from .integrate import integrate
from .local import OutputMap
from .paths import OutputPath, motion

_LAST = 1e-4  # of the time t, before the end

__all__ = ["FlowResult", "InterpolationDeviation", "PathResult", "adapted_flow", "follow_path", "interpolation_deviation"]


@dataclass(frozen=True)
class FlowResult:
    """A flow at the times that were asked for; all float64.

    Attributes:
        s: Times of the flow itself, ``[T]``; infinite where t = 1.
        t: 1 − exp(−s/N) (2.52), ``[T]``.
        losses: C, ``[T]``.
        outputs: x, ``[T, N, ...]``.
        ranks: Rank of D, ``[T]``.
        off_range: |P⊥g|/|g|, the part of the output gradient that is out of reach, ``[T]``.
        parameters: θ, ``[T, K]``, in the order of ``named_parameters()``.
        evaluations: How often the field was evaluated.
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

    At α = 1 it is the adapted flow (2.27), whose outputs follow ∂_s x = −P∇ₓC (2.28). With targets the loss is
    C = |x − y|²/2N (2.48), and in the time t = 1 − e^(−s/N) (2.52) outputs move straight, x̃(t) = (1−t) x₀ + t y (2.57), while
    rank D = QN. At t = 1 the field, (1/(1−t)) D⁺(x − y) for α = 1, is 0/0: on the way to ``t_end=1`` the integration stops,
    ``"dopri5"`` at 1 − 1e-4 and the others one step before the end, and one step of 1 − t follows, for α = 1 the Gauss–Newton
    step θ ← θ − D⁺(x − y). It errs by O((1−t)²), as Euler's steps do; ``"rk4"`` has its order for ``t_end < 1`` alone.

    Args:
        model: The network, in the mode that it should be taken in.
        x: Input with the batch first, ``[N, ...]``, or a tuple of positional inputs.
        y_or_loss: Targets of the outputs' shape, or a function from outputs to a scalar loss.
        alpha: The homotopy of Theorem 2.3.
        time: ``"t"``, from 0 to at most 1, for targets; or ``"s"``.
        t_end: Where to stop, in that time; by default t = 1, or s = N.
        method: ``"dopri5"``, whose steps follow the tolerances, ``"rk4"`` or ``"euler"``, whose steps are ``steps``.
        rtol: Relative tolerance of ``"dopri5"``.
        atol: Absolute tolerance of ``"dopri5"``.
        steps: T: the flow is recorded at T equal steps of the time; for ``"rk4"`` and ``"euler"`` these are the steps.
        rank_rtol: Singular values of D up to this times the largest count as zero; by default what rounding makes of zero.
        load: Leave the network with the final parameters. Else it is as it was.

    Returns:
        T + 1 records, the start among them.

    Raises:
        ImportError: torchdiffeq is not installed.
        TypeError: An argument is of another type.
        ValueError: An argument is out of its range, or shapes do not fit.
        RuntimeError: The flow diverges, or the model's calls cannot be repeated.

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
    grid = torch.linspace(0.0, end, positive_integer("steps", steps) + 1, dtype=torch.float64)
    singular = time == "t" and end == 1.0
    way = grid
    if singular:  # the last time is reached by a step
        way = torch.cat([grid[:-1], 1 - grid[1:2].clamp(max=2 * _LAST) / 2]) if method == "dopri5" else grid[:-1]

    def field(at: float, theta: Tensor) -> Tensor:
        tangent = network.tangent(theta)
        pace = n / (1 - at) if time == "t" else 1.0
        return pace * field_of_parameters(tangent, objective.gradient(tangent.outputs), alpha)

    with network.borrowed():
        path, evaluations = integrate(field, network.values(), way, method, rtol, atol)
        if singular:
            tangent = network.tangent(path[-1])
            last = path[-1] + n * field_of_parameters(tangent, objective.gradient(tangent.outputs), alpha)
            path = torch.cat([path[: len(grid) - 1], last[None]])
            evaluations += 1
        records = []
        for theta in path:
            tangent = network.tangent(theta)
            g = objective.gradient(tangent.outputs)
            records.append((objective.value(tangent.outputs), tangent.rank, tangent.off_range(g), tangent.outputs))
    if load:
        network.load(path[-1])
    losses, ranks, off_range, outputs = zip(*records, strict=True)
    return FlowResult(
        s=grid if time == "s" else -n * torch.log1p(-grid),
        t=grid if time == "t" else -torch.expm1(-grid / n),
        losses=torch.tensor(losses, dtype=torch.float64),
        outputs=torch.stack(outputs).reshape(-1, *network.shape),
        ranks=torch.tensor(ranks),
        off_range=torch.tensor(off_range, dtype=torch.float64),
        parameters=path,
        evaluations=evaluations,
    )


@dataclass(frozen=True)
class InterpolationDeviation:
    """The deviation of outputs from the straight line, predicted and observed (Proposition 2.5); all float64.

    Attributes:
        t: ``[T]``.
        predicted: What (2.59), corrected, says, ``[T, N, ...]``.
        observed: x̃(t) − [(1−t) x₀ + t y], ``[T, N, ...]``.
        off_range: |P⊥_t (x₀ − y)|/|x₀ − y|, ``[T]``: how much of the way was out of reach.
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
        """Largest distance between both, in units of |x₀ − y|; where that is zero, so is the deviation."""
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
    """Measure how rank loss bends the outputs from the straight line, and predict it from the projectors met on the way.

    Proposition 2.5: along the adapted flow in the time t the deviation from the line is, (2.59)-(2.60) corrected,

        x̃(t) − [(1−t) x₀ + t y] = S(t) = ∫₀ᵗ U_{t,t'} (1−t)/(1−t') P⊥_{t'} (x₀ − y) dt',  ∂_t U_{t,t'} = (1/(1−t)) P⊥_t U_{t,t'}

    which is S = (1−t)R with (1−t) R' = P⊥(R + x₀ − y), that is S' = P⊥(x₀ − y) − (1/(1−t)) P S, S(0) = 0: integrated beside θ,
    from P alone. For constant P it is t P⊥(x₀ − y).

    Args:
        model: The network; it is left as it was.
        x: Input with the batch first, or a tuple of positional inputs.
        y: Targets, of the outputs' shape.
        t_end: Where to stop, below 1.
        method: See `adapted_flow`.
        rtol: Relative tolerance of ``"dopri5"``.
        atol: Absolute tolerance of ``"dopri5"``.
        steps: T, recorded at equal steps.
        rank_rtol: Singular values of D up to this times the largest count as zero.

    Returns:
        T + 1 records, the start among them.

    Raises:
        ImportError: torchdiffeq is not installed.
        ValueError: An argument is out of its range, or shapes do not fit.
        RuntimeError: The flow diverges, or the model's calls cannot be repeated.

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
    grid = torch.linspace(0.0, t_end, positive_integer("steps", steps) + 1, dtype=torch.float64)
    num_params = network.num_params

    def field(at: float, state: Tensor) -> Tensor:
        theta, deviation = state.split([num_params, network.num_outputs])
        tangent = network.tangent(theta)
        apart = tangent.outputs - target
        bend = way - tangent.project(way) - tangent.project(deviation) / (1 - at)
        return torch.cat([-tangent.lift(apart) / (1 - at), bend])

    with network.borrowed():
        start = network.outputs()
        way = start - target  # x₀ − y
        path, _ = integrate(field, torch.cat([network.values(), torch.zeros_like(way)]), grid, method, rtol, atol)
        tangents = [network.tangent(state[:num_params]) for state in path]
        off_range = [tangent.off_range(way) for tangent in tangents]
    outputs = torch.stack([tangent.outputs for tangent in tangents])  # [T, QN]
    line = start - grid.to(start)[:, None] * way
    return InterpolationDeviation(
        t=grid,
        predicted=path[:, num_params:].reshape(-1, *network.shape),
        observed=(outputs - line).reshape(-1, *network.shape),
        off_range=torch.tensor(off_range, dtype=torch.float64),
        ranks=torch.tensor([tangent.rank for tangent in tangents]),
        losses=(outputs - target).square().sum(1) / (2 * network.num_samples),
        distance=float(way.norm()),
    )


@dataclass(frozen=True)
class PathResult:
    """Outputs led along a prescribed path; all float64.

    Attributes:
        s: ``[T]``.
        wanted: The path, ``[T, N, ...]``.
        outputs: What the network did, ``[T, N, ...]``.
        off_range: |P⊥∂_s x|/|∂_s x|, ``[T]``: the part of the path's motion that (3.3) and (3.7) forbid.
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
    """Lead the outputs along a path of one's own: ∂_s θ = D⁺ ∂_s x (3.5), from the network's present parameters.

    What the path asks for outside ran D is left undone, and reported: a path is feasible from here where P⊥∂_s x = 0 all
    along (3.3), (3.7).

    Args:
        model: The network.
        x: Input with the batch first, or a tuple of positional inputs.
        path: From s to outputs, of the outputs' shape, differentiable; `LinearPath`, `DetourPath`, or any function of a
            scalar tensor. It should begin at the network's outputs.
        s_end: Where to stop; the path begins at s = 0.
        correction: κ ≥ 0 in ∂_s θ = D⁺[∂_s x + κ (x(s) − x(θ))], against drift; by default none.
        method: See `adapted_flow`.
        rtol: Relative tolerance of ``"dopri5"``.
        atol: Absolute tolerance of ``"dopri5"``.
        steps: T, recorded at equal steps.
        rank_rtol: Singular values of D up to this times the largest count as zero.
        load: Leave the network with the final parameters. Else it is as it was.

    Returns:
        T + 1 records, the start among them.

    Raises:
        ImportError: torchdiffeq is not installed.
        TypeError: ``path`` is no function.
        ValueError: An argument is out of its range, or the path has another shape, another start or no derivative.
        RuntimeError: The flow diverges, or the model's calls cannot be repeated.

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
    grid = torch.linspace(
        0.0, real_number("s_end", s_end, low=1e-300), positive_integer("steps", steps) + 1, dtype=torch.float64
    )

    def moving(at: float) -> tuple[Tensor, Tensor]:
        return motion(path, at, network.shape)

    def field(at: float, theta: Tensor) -> Tensor:
        tangent = network.tangent(theta)
        place, velocity = moving(at)
        return tangent.lift(velocity + correction * (place - tangent.outputs))

    with network.borrowed():
        start, first = network.outputs(), moving(0.0)[0]
        if not torch.allclose(first, start, rtol=1e-4, atol=1e-6 * float(start.abs().max())):
            raise ValueError(
                f"`path` should begin at the network's outputs, but is {float((first - start).norm()):.3g} from them at s = 0. "
                "Begin it at model(x)."
            )
        places, velocities = zip(*(moving(float(at)) for at in grid), strict=True)
        if not torch.stack(velocities).any() and not all(torch.equal(place, first) for place in places):
            raise ValueError("`path` moves but has no derivative: compute it from the tensor s itself, not from float(s).")
        thetas, _ = integrate(field, network.values(), grid, method, rtol, atol)
        tangents = [network.tangent(theta) for theta in thetas]
        off_range = [tangent.off_range(velocity) for tangent, velocity in zip(tangents, velocities, strict=True)]
    if load:
        network.load(thetas[-1])
    return PathResult(
        s=grid,
        wanted=torch.stack(places).reshape(-1, *network.shape),
        outputs=torch.stack([tangent.outputs for tangent in tangents]).reshape(-1, *network.shape),
        off_range=torch.tensor(off_range, dtype=torch.float64),
        ranks=torch.tensor([tangent.rank for tangent in tangents]),
        parameters=thetas,
    )
