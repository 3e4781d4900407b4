"""What a policy decides on, and what it comes to."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..jacobian import ParameterVector, norm
from .remembered import State

if TYPE_CHECKING:
    from .linearization import Linearization
    from .system import Direction
    from .trials import Judge, Trial, TrialMaker

FIRST_RAISED, RAISE = 1e-18, 1e3  # relative λ where undamped steps are of no use, and what raises it again
_BENDING = 0.375  # largest second-order part of a step, relative to it
_LEARNING = 3.0  # most that a learned curvature changes by in a step
_LEGIBLE = 32.0  # rounding errors of the loss that its curvature has to stand out from


@dataclass(frozen=True)
class Outcome:
    """What a policy came to."""

    direction: Direction  # the last one
    trial: Trial | None  # the trial to take; None if all were rejected
    num_trials: int  # how many were made
    gain_ratio: float | None  # actual over predicted decrease of the loss at it; None if nobody looked
    state: State = dataclasses.field(default_factory=dict)  # what the policy is to remember if the trial is taken
    hidden: bool = False  # whether no trial could be told from where the parameters are, so that a rejection says nothing


@dataclass(frozen=True)
class Step:
    """What a policy decides on."""

    linear: Linearization  # the loss around the present parameters
    propose: TrialMaker  # makes trials
    judge: Judge | None  # tells what they do to the loss; None if the policy does not ask
    momentum: ParameterVector | None  # μφ₋ of the last step
    state: State  # what the policy remembers

    def direction(self, damping: float, *, with_momentum: bool = True) -> Direction:
        """Where to go."""
        return self.linear.direction(damping, self.momentum if with_momentum else None)

    def known(self) -> Judge:
        """Who tells the loss."""
        assert self.judge is not None
        return self.judge

    def predicted(self, trial: Trial, straight: Tensor) -> float:
        """What the trial would do to the loss if the outputs moved by Dδ."""
        curvature = self.known().curvature
        if curvature is None:
            return self.linear.agreed(self.linear.loss_change(straight, trial.change))
        return self.linear.agreed(self.linear.slope(trial.change) + 0.5 * curvature * float(straight.square().sum()))

    def slope(self, trial: Trial) -> float:
        """∇_θC·δ."""
        return self.linear.agreed(self.linear.slope(trial.change))

    def look(self, trial: Trial) -> tuple[float, Tensor | None]:
        """What it does to the loss, inf where that is not finite; and to the outputs, if that is known."""
        change, moved = self.known().look(trial)
        return self.linear.agreed(change) if math.isfinite(change) else math.inf, moved

    def best(self, trial: Trial, straight: Tensor, second_order: bool, *, raising: bool = False) -> tuple[Trial, float]:
        """A trial or the same with its second-order part c, whichever is better, and what it does to the loss.

        While each c halves the loss, c ← c − D⁺(x(θ + δ + c) − x(θ) − Dδ) with the same D⁺: near a solution that does what
        several steps would.

        Args:
            trial: The trial.
            straight: Dδ of it.
            second_order: Whether to look at that part.
            raising: Whether to raise λ of D⁺ if c would be too long.
        """
        change, moved = self.look(trial)
        plain, direction = trial, trial.direction
        while second_order and moved is not None:
            bent, direction = self._bent(plain, trial.part, moved - straight, direction, raising=raising)
            if bent is None:
                break
            with_part, moved = self.look(bent)
            if not with_part < change:
                break
            # A loss below 0 has another minimum, and any decrease would halve it.
            halved = 0 <= self.known().before + with_part <= 0.5 * (self.known().before + change)
            trial, change = bent, with_part
            if not halved:
                break
        return trial, change

    def _bent(
        self, plain: Trial, part: ParameterVector | None, bend: Tensor, direction: Direction, *, raising: bool
    ) -> tuple[Trial | None, Direction]:
        """The trial with what mends a bend added to its part, if all of that is short enough; and with which λ."""
        while True:
            mended = self.linear.correction(bend, direction)
            if part is not None:
                mended = {name: each + mended[name] for name, each in part.items()}
            bent = self.propose(plain.direction, plain.fraction, mended)
            apart = norm({name: change - plain.change[name] for name, change in bent.change.items()})
            if self.linear.agreed(apart) <= _BENDING * norm(plain.change):
                return bent, direction
            scale = self.linear.system.scale
            if not raising or not direction.damping < scale:
                return None, direction
            direction = dataclasses.replace(direction, damping=max(FIRST_RAISED * scale, RAISE * direction.damping))

    def shown(self, trial: Trial, change: float) -> float | None:
        """The curvature of the loss along a trial; None where a criterion tells it, or rounding hides it."""
        judge = self.known()
        if judge.curvature is None or not math.isfinite(change):
            return None
        square = float(self.linear.linear(trial.change).square().sum())
        if not judge.curvature * square > _LEGIBLE * self.linear.eps * abs(judge.before):
            return None
        return 2 * (change - self.linear.slope(trial.change)) / square

    def learned(self, trial: Trial, change: float) -> State:
        """What to remember of that."""
        curvature, shown = self.known().curvature, self.shown(trial, change)
        if curvature is None:
            return {}
        if shown is None:
            return {"curvature": curvature}
        return {"curvature": min(_LEARNING * curvature, max(curvature / _LEARNING, shown))}
