"""Trial parameters, and what tells the loss there."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .closure import Closure
from .linearization import Direction, Linearization, Parts

JUDGES = ("auto", "outputs", "closure")


@dataclass(frozen=True)
class Trial:
    """Parameters that a step might lead to.

    Attributes:
        direction: Where it goes.
        fraction: How much of the step it is.
        part: What was added to that, or None.
        values: θ + δ, by name, without weight decay, which is no part of what lowers the loss.
        change: δ before rounding.
    """

    direction: Direction
    fraction: float
    part: Parts | None
    values: dict[str, Tensor]
    change: Parts


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

    def __call__(self, direction: Direction, fraction: float = 1.0, part: Parts | None = None) -> Trial:
        """The parameters after a step, but for weight decay; changes nothing.

        Args:
            direction: Where it goes.
            fraction: How much of it.
            part: What is added to δ at the largest lr, and less of it at smaller ones.
        """
        linear = self._linear
        largest = self.largest_lr
        values: dict[str, Tensor] = {}
        changes: Parts = {}
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
        """The parameters that a trial leads to, weight decay included."""
        values = dict(trial.values)
        for name, p in self._linear.trained.items():
            group = self._groups[id(p)]
            if decay := trial.fraction * float(group["lr"]) * group["weight_decay"]:
                values[name] = values[name] - decay * p.detach()
        return values


def kept_momentum(state: Mapping[Tensor, dict[str, Tensor]], trained: Mapping[str, nn.Parameter]) -> Parts | None:
    """φ of the last step from an optimizer's state, zero where a parameter has none; None if none has any."""
    kept = {name: state[p]["momentum"].double().reshape(-1) for name, p in trained.items() if "momentum" in state.get(p, {})}
    if not kept:
        return None
    return {name: kept[name] if name in kept else p.new_zeros(p.numel(), dtype=torch.float64) for name, p in trained.items()}


class Judge(Protocol):
    """Tells what trials do to the loss.

    Attributes:
        before: The loss at the present parameters.
        wants_outputs: Whether it has to be told how the outputs moved.
        curvature: The loss's curvature to assume in predictions; None where the criterion tells.
    """

    before: float
    wants_outputs: bool
    curvature: float | None

    def change(self, trial: Trial, moved: Tensor | None) -> float:
        """C(θ + δ) − C(θ), given Δx."""


class ByOutputs:
    """By the outputs there and the criterion."""

    wants_outputs = True

    def __init__(self, linearization: Linearization) -> None:
        self._linear = linearization
        self.curvature: float | None = None
        self.before = linearization.output_loss.value()

    def change(self, trial: Trial, moved: Tensor | None) -> float:
        """See `Judge`."""
        assert moved is not None
        return self._linear.loss_change(moved, trial.change)


class ByClosure:
    """By the user's closure.

    Args:
        closure: The closure, called once.
        curvature: See `Judge`.

    Raises:
        RuntimeError: It returned a loss that is not finite.
        TypeError: It did not return a number.
    """

    wants_outputs = False

    def __init__(self, closure: Closure, curvature: float | None) -> None:
        self._closure, self.curvature = closure, curvature
        self.before = closure.value
        if not math.isfinite(self.before):
            raise RuntimeError(f"`closure` should return a finite loss, but returned {self.before}. Nothing was changed.")

    def change(self, trial: Trial, moved: Tensor | None) -> float:  # noqa: ARG002
        """See `Judge`."""
        return self._closure.at(trial.values) - self.before


def choose_judge(
    trials: str, linearization: Linearization, closure: Closure | None, lrs: Sequence[float]
) -> tuple[Judge, str | None]:
    """The judge of a step's trials, and what the user should be told of that.

    Args:
        trials: One of `JUDGES`; ``"auto"`` asks the closure, which costs more and may have effects of its own, only where the
            criterion does not know the whole loss.
        linearization: The loss around the present parameters.
        closure: The user's closure, if there is one.
        lrs: The learning rates.

    Raises:
        RuntimeError: Nobody knows the loss.
    """
    known, contradiction = linearization.has_criterion, None
    if trials == "auto" and known:
        if closure is not None and linearization.off_output is None:
            contradiction = _contradiction(linearization, closure)
        by_outputs = closure is None or (linearization.off_output is None and contradiction is None)
        trials = "outputs" if by_outputs else "closure"
    if trials == "outputs" and known:
        return ByOutputs(linearization), None
    if closure is None or trials == "outputs":
        missing = "" if known else "the loss as `criterion` to AdaptedGD, or "
        raise RuntimeError(
            "A line search and LevenbergMarquardt() need the loss at trial parameters, so nothing was changed. Pass "
            f"{missing}a closure to `step` that returns it; or give `damping` a number."
        )
    # A step of length lr is the full one of a loss with curvature c/lr.
    return ByClosure(closure, None if known else 1 / max(1e-300, *lrs)), contradiction


def _contradiction(linearization: Linearization, closure: Closure) -> str | None:
    """What there is to say if the closure's loss is not that of the criterion."""
    if linearization.num_passes > 1:  # the closure returned the last one's loss
        return None
    mine, returned = linearization.output_loss.value(), closure.value
    if abs(mine - returned) <= 1e-2 * abs(returned) + linearization.rounding:
        return None
    return (
        f"The closure returned the loss {returned:.6g}, but `criterion` makes {mine:.6g} of outputs and gradients: the loss is "
        "not that of the model's outputs as they are, or not it alone. Then `lr` is not in units of it, and steps are judged "
        "by the closure. Give AdaptedGD a module that returns what the criterion is given, or leave `criterion` out."
    )
