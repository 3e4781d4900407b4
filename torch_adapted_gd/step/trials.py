"""Trial parameters, and what tells the loss there."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checks import all_finite
from ..jacobian import ParameterVector
from ..policies import Backtracking, LevenbergMarquardt, Policy
from ..tracking.closure import Closure
from .linearization import Linearization
from .recorded import Recorded
from .system import Direction


@dataclass(frozen=True)
class Trial:
    """Parameters that a step might lead to."""

    direction: Direction  # where it goes
    fraction: float  # how much of the step it is
    part: ParameterVector | None  # what was added to that
    values: dict[str, Tensor]  # θ + δ, by name, without weight decay, which is no part of what lowers the loss
    change: ParameterVector  # δ before rounding


class TrialMaker:
    """Makes trials of directions: θ ← (1 − lr·w) θ − η [α φ + (1−α) Dᵀg], with each group's own lr, α and decay w.

    Args:
        linearization: The loss around the present parameters.
        groups: The parameter group of each parameter, by ``id``.
    """

    def __init__(self, linearization: Linearization, groups: Mapping[int, dict[str, Any]]) -> None:
        self._linear, self._groups = linearization, groups

    @property
    def largest_lr(self) -> float:
        """The largest lr of any parameter."""
        return max(float(self._groups[id(p)]["lr"]) for p in self._linear.trained.values())

    @property
    def damped(self) -> bool:
        """Whether damping shortens all of a step: there is no part of a plain gradient in it."""
        return self._linear.off_output is None and all(self._groups[id(p)]["alpha"] == 1 for p in self._linear.trained.values())

    def __call__(self, direction: Direction, fraction: float = 1.0, part: ParameterVector | None = None) -> Trial:
        """The parameters after a step, but for weight decay; changes nothing.

        Args:
            direction: Where it goes.
            fraction: How much of it.
            part: What is added to δ at the largest lr, and less of it at smaller ones.
        """
        linear = self._linear
        largest = self.largest_lr
        values: dict[str, Tensor] = {}
        changes: ParameterVector = {}
        for name, p in linear.trained.items():
            group = self._groups[id(p)]
            lr, alpha = fraction * float(group["lr"]), group["alpha"]
            eta = lr / linear.curvature
            change = -eta * alpha * direction.adapted[name]
            if part is not None and lr:
                change = change + alpha * (float(group["lr"]) / largest) * part[name]
            if linear.off_output is not None:  # what of it is in the gradient moves by η(1−α) already
                change = change - (lr - eta * (1 - alpha)) * linear.off_output[name]
            value = p.detach()
            if alpha < 1:
                plain = linear.gradient[name].reshape(p.shape)
                value = value.add(plain.to(p.dtype), alpha=-eta * (1 - alpha))
            if alpha > 0 or linear.off_output is not None:
                value = value + change.reshape(p.shape).to(p.dtype)
            if alpha < 1:
                change = change - eta * (1 - alpha) * plain.double().reshape(-1)
            values[name], changes[name] = value, change
        return Trial(direction, fraction, part, values, changes)

    def finished(self, trial: Trial) -> dict[str, Tensor]:
        """The parameters that a trial leads to, weight decay included; a RuntimeError if they are not finite."""
        values = dict(trial.values)
        for name, p in self._linear.trained.items():
            group = self._groups[id(p)]
            if decay := trial.fraction * float(group["lr"]) * group["weight_decay"]:
                values[name] = values[name] - decay * p.detach()
            if not all_finite(values[name]):
                raise RuntimeError(
                    f"The step would make parameter '{name}' not finite, so nothing was changed. Lower `lr` or raise `damping`."
                )
        return values


class Judge(ABC):
    """Tells what trials do to the loss."""

    before: float  # the loss at the present parameters
    by_outputs = False  # whether it is told by the outputs there, whose rounding is known
    later = False  # whether only the next step tells
    curvature: float | None = None  # the loss's curvature to assume in predictions; None where the criterion tells

    @abstractmethod
    def look(self, trial: Trial) -> tuple[float, Tensor | None]:
        """C(θ + δ) − C(θ), and x(θ + δ) − x(θ) if that is known and finite."""


class ByOutputs(Judge):
    """By the outputs there and the criterion."""

    by_outputs = True

    def __init__(self, linearization: Linearization) -> None:
        self._linear = linearization
        self.before = linearization.loss

    def look(self, trial: Trial) -> tuple[float, Tensor | None]:
        """See `Judge`."""
        moved = self._linear.outputs_moved(trial.values)
        return math.inf if moved is None else self._linear.loss_change(moved, trial.change), moved


class ByClosure(Judge):
    """By the user's closure.

    Args:
        closure: The closure, called once.
        linearization: The loss around the present parameters.

    Raises:
        RuntimeError: It returned a loss that is not finite.
        TypeError: It did not return a number.
    """

    def __init__(self, closure: Closure, linearization: Linearization) -> None:
        self._closure, self._linear = closure, linearization
        self._criteria = [] if linearization.objective is None else linearization.objective.criteria
        self.curvature = linearization.curvature if linearization.objective is None else None
        self._before = closure.value
        if not math.isfinite(self._before):
            raise RuntimeError(f"`closure` should return a finite loss, but returned {self._before}. Nothing was changed.")
        self.before = linearization.total(self._before)

    def look(self, trial: Trial) -> tuple[float, Tensor | None]:
        """See `Judge`; the outputs are those that criteria are given there."""
        loss, given = self._closure.at(trial.values, self._criteria)
        moved = self._linear.outputs_moved_in(given, self._closure.criterion_calls)
        return self._linear.total_change(loss - self._before, moved), moved


class ByNext(Judge):
    """By the loss of the next step: until then what was predicted is believed."""

    later = True

    def __init__(self, linearization: Linearization) -> None:
        self._linear = linearization
        self.before = linearization.loss

    def look(self, trial: Trial) -> tuple[float, Tensor | None]:
        """What is predicted."""
        return self._linear.loss_change(self._linear.linear(trial.change), trial.change), None


def choose_judge(policy: Policy, linearization: Linearization, closure: Closure | None) -> Judge | None:
    """Who tells a policy the loss at trial parameters; None if it does not ask.

    With ``judge="auto"`` the closure, which costs more and may have effects of its own, is asked only where the criterion does
    not know the whole loss.

    Args:
        policy: The policy.
        linearization: The loss around the present parameters.
        closure: The user's closure, if there is one.

    Raises:
        RuntimeError: Nobody can tell, or who was asked for cannot.
    """
    if not isinstance(policy, LevenbergMarquardt | Backtracking):
        return None
    known, wanted = linearization.objective is not None, policy.judge
    if wanted == "auto":
        if known and linearization.repeatable and (linearization.off_output is None or closure is None):
            wanted = "outputs"
        elif closure is not None:
            wanted = "closure"
        elif known and isinstance(policy, LevenbergMarquardt):
            wanted = "next"
        else:
            raise RuntimeError(
                f"{type(policy).__name__}() needs the loss at trial parameters, so nothing was changed. Pass the loss as "
                "`criterion` to AdaptedGD, or a closure to `step` that returns it; or give `damping` a number."
            )
    if wanted == "closure":
        if closure is None:
            raise RuntimeError(
                'judge="closure" needs the loss from a closure: write optimizer.step(closure). Nothing was changed.'
            )
        return ByClosure(closure, linearization)
    if not known:
        raise RuntimeError(
            f'judge="{wanted}" needs the loss as `criterion` to AdaptedGD, and nothing was changed. Give it there, or pass a '
            "closure to `step`."
        )
    if wanted == "outputs" and not linearization.repeatable:
        raise RuntimeError(
            'judge="outputs" needs a criterion that is given the model\'s outputs, or entries of them, which a forward pass '
            'can give again, but it was given something that was computed from them. Nothing was changed. Use judge="closure" '
            'with a closure, or judge="next".'
        )
    return ByOutputs(linearization) if wanted == "outputs" else ByNext(linearization)


def learned_curvature(recorded: Recorded, loss: float) -> float:
    """The output curvature to begin with where no criterion tells: |g|²/2C, that of a square with minimum 0."""
    world = recorded.shares.world
    g, x = recorded.vector(lambda each: each.gradients) / recorded.scale, recorded.vector(lambda each: each.outputs)
    told = world.objects((float(g.square().sum()), float(x.norm()), loss))
    squares, sizes, losses = zip(*told, strict=True)
    # As DistributedDataParallel averages: C is the mean of the processes' losses.
    square, loss = math.fsum(squares) / world.size**2, math.fsum(losses) / world.size
    if square > 0 and loss > 0 and math.isfinite(square) and math.isfinite(loss):
        return square / (2 * loss)
    size = math.sqrt(square) / max(1.0, math.hypot(*sizes))  # move outputs by as much as they are
    return size if size > 0 and math.isfinite(size) else 1.0
