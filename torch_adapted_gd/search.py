"""How far to go: trials of a step, judged by the loss that they lead to."""

import math
from dataclasses import dataclass

from torch import Tensor

from .damping import LevenbergMarquardt
from .jacobian import norm
from .linearization import Direction, Linearization, Parts
from .straight import Progress, StraightLine
from .trials import Judge, Trial, TrialMaker

_SHORTEST = 40  # halvings of a step, after which float64 would not see it
_DECREASE = 1e-4  # of what the slope promises, for a step to be long enough (Armijo)
_BENDING = 0.375  # largest second-order part of a step, relative to it


@dataclass(frozen=True)
class Outcome:
    """What a search came to.

    Attributes:
        direction: The last direction.
        trial: The trial to take; None if all were rejected.
        trials: How many were made.
        gain_ratio: Actual over predicted decrease of the loss at it; None if nobody looked.
        damping: λ for the next step, relative.
        change: What the trial does to the loss; None if nobody looked.
    """

    direction: Direction
    trial: Trial | None
    trials: int
    gain_ratio: float | None
    damping: float
    change: float | None = None


class Search:
    """The trials of one step.

    Args:
        linearization: The loss around the present parameters.
        propose: Makes trials.
        judge: Tells what they do to the loss; None if nobody has to.
    """

    def __init__(self, linearization: Linearization, propose: TrialMaker, judge: Judge | None = None) -> None:
        self._linear, self._propose, self._given = linearization, propose, judge

    @property
    def _judge(self) -> Judge:
        assert self._given is not None
        return self._given

    def once(self, damping: float, momentum: Parts | None, decay: float) -> Outcome:
        """The step as it is."""
        direction = self._linear.direction(damping, momentum, decay)
        return Outcome(direction, self._propose(direction), 1, None, damping)

    def backtracking(self, damping: float, momentum: Parts | None, decay: float) -> Outcome:
        """The longest of η, η/2, η/4, … that decreases the loss by 10⁻⁴ of what its slope promises (Armijo)."""
        direction = self._linear.direction(damping, momentum, decay)
        trial = self._propose(direction)
        if momentum is not None and self._linear.slope(trial.change) >= 0:  # the momentum leads uphill here
            direction = self._linear.direction(damping)
            trial = self._propose(direction)
        for halvings in range(_SHORTEST):
            if halvings:
                trial = self._propose(direction, 0.5**halvings)
            slope = self._linear.slope(trial.change)
            decrease = -self._change(trial, self._moved(trial) if self._judge.wants_outputs else None)
            if decrease >= -_DECREASE * slope:
                predicted = self._predicted(trial, self._linear.linear(trial.change))
                ratio = decrease / -predicted if predicted < 0 else None
                return Outcome(direction, trial, halvings + 1, ratio, damping)
        return Outcome(direction, None, _SHORTEST, None, damping)

    def straight(
        self, policy: StraightLine, damping: float, momentum: Parts | None, decay: float, progress: Progress
    ) -> tuple[Outcome, Progress]:
        """The longest of ever shorter steps that the outputs follow as predicted."""
        direction = self._linear.direction(damping, momentum, decay)
        whole = self._propose(direction)
        straight = self._linear.linear(whole.change)  # Dδ at the full lr
        root = math.sqrt(straight.numel())
        distance = progress.distance
        if distance is None and self._propose.largest_lr:
            distance = float(straight.norm()) / root / self._propose.largest_lr
        fraction, trials = progress.fraction, 0
        while fraction >= policy.smallest:
            trial = whole if fraction == 1 else self._propose(direction, fraction)
            moved = self._moved(trial)
            trials += 1
            error = math.inf
            if moved is not None:
                apart = float((moved - fraction * straight).norm())
                error = max(0.0, apart - self._linear.output_rounding) / root / distance if distance else 0.0
            following = policy.next_fraction(fraction, error)
            if error <= policy.tolerance:
                return Outcome(direction, trial, trials, None, damping), Progress(distance, following)
            fraction = following
        return Outcome(direction, None, trials, None, damping), progress

    def levenberg_marquardt(
        self,
        policy: LevenbergMarquardt,
        damping: float,
        momentum: Parts | None,
        decay: float,
        share: float | None = None,
    ) -> Outcome:
        """Trials with more and more damping until one gives enough of the decrease that was predicted for it."""
        tried = damping or policy.initial
        ratio = -math.inf
        for attempt in range(1, policy.attempts + 1):
            # A momentum that does not suit the loss here is not mended by damping.
            kept = momentum if attempt <= 2 else None
            direction = self._linear.direction(tried, kept, decay)
            # What no damping shortens has to be shortened itself.
            fraction = 1.0 if self._propose.damped else 0.25 ** (attempt - 1)
            trial = self._propose(direction, fraction)
            straight = self._linear.linear(trial.change)  # Dδ
            predicted = self._predicted(trial, straight)
            trial, change = self._best(trial, straight, policy.second_order and fraction == 1)
            if predicted == 0 and change <= 0:  # a stationary point, or lr = 0
                return Outcome(direction, trial, attempt, None, damping, change)
            ratio = change / predicted if predicted < 0 else -math.inf
            if ratio > policy.accept:
                return Outcome(direction, trial, attempt, ratio, policy.after(tried, ratio, share), change)
            if self._judge.wants_outputs and abs(predicted) <= self._linear.rounding:
                return Outcome(direction, None, attempt, ratio, damping)  # no trial could be told from this point
            tried = policy.raised(tried, attempt if fraction == 1 and self._propose.damped else 1)
        return Outcome(direction, None, policy.attempts, ratio, damping)

    def _best(self, trial: Trial, straight: Tensor, second_order: bool) -> tuple[Trial, float]:
        """A trial or the same with its second-order part, whichever is better, and what it does to the loss."""
        moved = self._moved(trial) if second_order or self._judge.wants_outputs else None
        corrected = None
        if second_order and moved is not None:
            part = self._linear.correction(moved - straight, trial.direction)
            bent = self._propose(trial.direction, part=part)
            if _distance(bent.change, trial.change) <= _BENDING * norm(trial.change):
                corrected = bent
        if not self._judge.wants_outputs:  # each judgement is dear: the better one will do
            best = trial if corrected is None else corrected
            return best, self._change(best, None)
        change = self._change(trial, moved)
        if corrected is not None:
            with_part = self._change(corrected, self._moved(corrected))
            if with_part < change:
                return corrected, with_part
        return trial, change

    def _moved(self, trial: Trial) -> Tensor | None:
        return self._linear.outputs_moved(trial.values)

    def _predicted(self, trial: Trial, straight: Tensor) -> float:
        """What the trial would do to the loss if the outputs moved by Dδ."""
        if self._judge.curvature is None:
            return self._linear.loss_change(straight, trial.change)
        return self._linear.slope(trial.change) + 0.5 * self._judge.curvature * float(straight.square().sum())

    def _change(self, trial: Trial, moved: Tensor | None) -> float:
        if self._judge.wants_outputs and moved is None:
            return math.inf
        change = self._judge.change(trial, moved)
        return change if math.isfinite(change) else math.inf


def _distance(first: Parts, second: Parts) -> float:
    return norm({name: part - second[name] for name, part in first.items()})
