"""Policies: how far a step goes, and with how much damping. Each owns its options; the optimizer keeps its state."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from .checks import one_of, positive_integer, real_number, true_or_false
from .step.decision import FIRST_RAISED, RAISE, Outcome, Step
from .step.remembered import CarryOver, State, read

JUDGES = ("auto", "outputs", "closure", "next")

_DECREASE = 1e-4  # of what the slope promises, for a step to be long enough (Armijo)
_LONGER_AGAIN = 8.0  # times the last step's fraction is what the next one begins with
_RESERVE = 0.8  # of the length that an error growing like the square would allow
_LONGER, _SHORTER = 5.0, 0.1  # most that a step is made longer or shorter by
_BY_CHANCE = 10.0  # most that λ is raised to by losses on other inputs than those of the step
_LOSING = -1.0  # share of the gain below which damping is raised: more than twice the gain is missing on the next batch


@dataclass(frozen=True)
class Fixed:
    """The step as it is, with a damping that stays: what a number for ``damping`` means."""

    damping: float = 0.0

    def first_damping(self, state: State) -> float:  # noqa: ARG002
        """The λ of the first trial."""
        return self.damping

    def search(self, step: Step) -> Outcome:
        """The step."""
        direction = step.direction(self.damping)
        return Outcome(direction, step.propose(direction), 1, None)


@dataclass(frozen=True)
class Backtracking:
    """Shorten steps until the loss decreases: the longest of η, η/2, … that gives 10⁻⁴ of what its slope promises (Armijo).

    A step begins with eight times the fraction of ``lr`` that the last one went, at most with all of it. Each trial gets
    second-order parts, as in `LevenbergMarquardt`. If such a part is too long, a larger λ makes it shorter.

    If all lengths down to ``smallest`` fail, λ is raised a thousandfold, from 1e-18 on, for this step and the next ones, and
    lowered as much again after each step of full length. With the solver ``Dense(factorization="svd")`` this needs more trials
    and no other solution.

    With ``damping=0`` this is the damped Gauss–Newton method (Deuflhard, Newton Methods for Nonlinear Problems, 2004). On
    residuals of differential equations it is much faster than LevenbergMarquardt after its first steps, which lower the loss
    little; on regression it may not get that far. docs/pinns.md has figures.

    Args:
        damping: λ, relative to the mean of diag Θ, at least 0.
        judge: What tells the loss at trial parameters, see `LevenbergMarquardt`; ``"next"`` cannot, as it comes too late.
        smallest: Fraction of ``lr`` below which no shorter step is tried. At 1e-12 float64 hardly sees a step.
        second_order: Whether to look at the second-order part, where the criterion's arguments at a trial are known.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> Backtracking(damping=1e-3)
        Backtracking(damping=0.001, judge='auto', smallest=1e-12, second_order=True)
    """

    damping: float = 0.0
    judge: str = "auto"
    smallest: float = 1e-12
    second_order: bool = True

    def __post_init__(self) -> None:
        real_number("damping", self.damping, low=0.0)
        one_of("judge", self.judge, JUDGES[:3])
        real_number("smallest", self.smallest, low=1e-300, below=1.0)
        true_or_false("second_order", self.second_order)

    def first_damping(self, state: State) -> float:
        """The λ of the first trial."""
        return max(self.damping, state.get("raised", 0.0))

    def search(self, step: Step) -> Outcome:
        """See `Backtracking`."""
        judge, trials, ratio = step.known(), 0, None
        damping, fraction = self.first_damping(step.state), min(1.0, _LONGER_AGAIN * step.state.get("fraction", 1.0))
        while True:
            direction = step.direction(damping)
            if step.momentum is not None and step.slope(step.propose(direction)) >= 0:
                direction = step.direction(damping, with_momentum=False)  # the momentum leads uphill here
            while fraction >= self.smallest:
                trial = step.propose(direction, fraction)
                straight = step.linear.linear(trial.change)  # Dδ
                predicted, slope = step.predicted(trial, straight), step.slope(trial)
                trial, change = step.best(trial, straight, self.second_order, raising=True)
                trials += 1
                ratio = change / predicted if predicted < 0 else None
                if change <= _DECREASE * slope:
                    raised = damping / RAISE if fraction == 1 else damping
                    state = {"fraction": fraction, "raised": raised if raised >= FIRST_RAISED else 0.0}
                    return Outcome(direction, trial, trials, ratio, state | step.learned(trial, change))
                if judge.by_outputs and abs(predicted) <= step.linear.rounding:
                    return Outcome(direction, None, trials, ratio, hidden=True)
                fraction /= 2
            if damping >= 1 or judge.before + step.slope(step.propose(direction)) == judge.before:
                return Outcome(direction, None, trials, ratio)
            damping, fraction = max(FIRST_RAISED, RAISE * damping), 1.0


@dataclass(frozen=True)
class StraightLine:
    """Take steps as long as the outputs follow them: a policy that compares motions, not losses.

    A step of length η is predicted to move the outputs by Dδ = −η·DDᵀψ and moves them by Δx, which differs by O(η²). It is
    taken if

        |Δx − Dδ| ≤ tolerance · |x₀ − y|,

    with the distance |x₀ − y| that the first step's prediction had to go at η = 1 (as a root mean square over outputs, so that
    batches of other sizes compare). Otherwise η is shortened to what that error, growing like η², suggests, at most tenfold at
    a time. The next step begins with what the last error suggests, at most five times as long, and never longer than ``lr``.
    Each trial costs a forward pass and no new solution. The last steps are full Gauss–Newton steps, which end on the targets.

    Each step aims at the targets from the current outputs, so earlier deviations are corrected. What damping leaves out of the
    motion is not seen as an error: choose λ small. By default outputs stay within 5 % of the line (docs/fullbatch.md). The time
    t = 1 − Π(1 − η) advances with ``lr · last_step.fraction`` for η. Without a criterion η multiplies the loss's gradient.

    Args:
        tolerance: Largest error of a step, relative to the distance at the start.
        smallest: Fraction of ``lr`` below which no shorter step is tried: nothing changes then, and the report's status is
            ``"rejected"``.
        damping: λ, relative to the mean of diag Θ, at least 0.

    Raises:
        TypeError: An argument is not a number.
        ValueError: An argument is out of range.

    Example:
        >>> policy = StraightLine(tolerance=0.02)
        >>> round(policy.next_fraction(0.1, error=0.005), 6)  # a quarter of the error: twice the length, less a reserve
        0.16
    """

    tolerance: float = 0.02
    smallest: float = 1e-6
    damping: float = 0.0

    def __post_init__(self) -> None:
        real_number("tolerance", self.tolerance, low=1e-12, below=1e12)
        real_number("smallest", self.smallest, low=1e-300, below=1.0)
        real_number("damping", self.damping, low=0.0)

    def next_fraction(self, fraction: float, error: float) -> float:
        """The fraction of ``lr`` to try after one that had an error, relative to the distance at the start."""
        allowed = _RESERVE * math.sqrt(self.tolerance / error) if error > 0 else math.inf
        return min(1.0, fraction * min(_LONGER, max(_SHORTER, allowed)))

    def first_damping(self, state: State) -> float:  # noqa: ARG002
        """The λ of the first trial."""
        return self.damping

    def search(self, step: Step) -> Outcome:
        """The longest of ever shorter steps that the outputs follow as predicted.

        Raises:
            RuntimeError: Nobody can tell where the outputs go.
        """
        if not step.linear.repeatable:
            raise RuntimeError(
                "StraightLine() needs a criterion that is given the model's outputs, or entries of them, which a forward pass "
                "can give again, but it was given something that was computed from them. Nothing was changed. Use "
                "LevenbergMarquardt(), or let the model return what the criterion is given."
            )
        direction = step.direction(self.damping)
        whole = step.propose(direction)
        straight = step.linear.linear(whole.change)  # Dδ at the full lr
        root = math.sqrt(max(1, step.linear.num_outputs))
        distance = step.state.get("distance", 0.0)
        if not distance and step.propose.largest_lr:
            distance = step.linear.agreed(float(straight.norm())) / root / step.propose.largest_lr
        fraction, trials = step.state.get("fraction", 1.0), 0
        while fraction >= self.smallest:
            trial = whole if fraction == 1 else step.propose(direction, fraction)
            moved = step.linear.outputs_moved(trial.values)
            trials += 1
            error = math.inf
            if moved is not None:
                apart = step.linear.agreed(float((moved - fraction * straight).norm()))
                error = max(0.0, apart - step.linear.output_rounding) / root / distance if distance else 0.0
            following = self.next_fraction(fraction, error)
            if error <= self.tolerance:
                return Outcome(direction, trial, trials, None, {"distance": distance, "fraction": following})
            fraction = following
        return Outcome(direction, None, trials, None)


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Raise and lower the damping λ of (DᵀD + λ1)⁻¹∇_θC by how well the last trial was predicted.

    Each step of `AdaptedGD` tries parameters θ + δ and compares the decrease of the loss there with the one predicted if
    the outputs move by Dδ. A trial that is not finite, or gives less than ``accept`` of that, is rejected, and λ is raised,
    faster each time. One that is accepted lowers λ if it gave more than ``good`` of it, and raises λ if it gave less than
    ``poor``. If every trial of a step is rejected, nothing changes, and the report's status is ``"rejected"``. Where plain
    gradients are a part of the step, which no damping shortens (α < 1, terms of the loss that do not come through the outputs),
    a rejection shortens all of it too.

    A small batch of a large network can be fitted however large the step, which undoes what others have learned; the next batch
    then sees nothing of the gain. Therefore λ is lowered only while at least ``carry_over`` of the gain on one batch is found
    again when the next one arrives, on average over about ten steps, and raised while the next batch is missing more than twice
    the gain. This does not apply where steps gain less than a tenth of the loss, because batches differ by more than that.

    ``second_order`` adds a part c = −D⁺(x(θ + δ) − x(θ) − Dδ) with the same λ to each trial, which corrects the bending of the
    outputs, if c is at most ⅜ of δ in length and lowers the loss further: geodesic acceleration (Transtrum & Sethna,
    arXiv:1201.5885). While each c halves the loss, the same D⁺ corrects what is left (a chord method). Each c costs a forward
    pass and a solve with the factors at hand.

    Args:
        initial: λ to begin with, relative to the mean of diag Θ, like every damping.
        increase: What a first rejection multiplies λ by; the next ones by twice as much each.
        decrease: What a good step multiplies λ by.
        good: Gain ratio above which λ is lowered.
        poor: Gain ratio below which λ is raised after an accepted step.
        accept: Gain ratio below which a trial is rejected.
        carry_over: Share of the gain on one batch that the next one has to see for λ to be lowered; 0 for not asking.
        smallest: Lower bound of λ.
        num_trials: The most trials of one step.
        second_order: Whether to add the second-order part, where the judge is not ``"next"``.
        judge: What tells the loss at a trial (docs/losses.md): ``"outputs"``, the forward pass repeated and the ``criterion``;
            ``"closure"``, that of ``step(closure)``; ``"next"``, the loss of the next step, and a bad step is taken back then;
            ``"auto"``, the first of these that can.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> policy = LevenbergMarquardt(initial=1e-2)
        >>> round(policy.after(policy.initial, gain_ratio=0.95), 5)  # as good as predicted: less damping
        0.00333
    """

    initial: float = 0.1
    increase: float = 2.0
    decrease: float = 1 / 3
    good: float = 0.75
    poor: float = 0.25
    accept: float = 1e-4
    carry_over: float = 0.5
    smallest: float = 1e-15
    num_trials: int = 10
    second_order: bool = True
    judge: str = "auto"

    def __post_init__(self) -> None:
        real_number("initial", self.initial, low=1e-300)
        real_number("increase", self.increase, low=1 + 1e-12)
        real_number("decrease", self.decrease, low=1e-300, below=1.0)
        real_number("accept", self.accept, low=0.0, below=1.0)
        real_number("poor", self.poor, low=self.accept, below=1.0)
        real_number("good", self.good, low=self.poor)
        real_number("carry_over", self.carry_over, low=0.0, high=1.0)
        real_number("smallest", self.smallest, low=1e-300)
        positive_integer("num_trials", self.num_trials)
        true_or_false("second_order", self.second_order)
        one_of("judge", self.judge, JUDGES)

    def after(self, damping: float, gain_ratio: float, share: float | None = None, least: float = 1.0) -> float:
        """λ for the step after one that was accepted.

        Args:
            damping: λ of the accepted trial.
            gain_ratio: Actual over predicted decrease.
            share: How much of the gain carries over to the next batch; None if that is not known yet.
            least: What to multiply ``smallest`` by, for parameters in very different units.
        """
        if share is not None and self.carry_over and share < _LOSING:
            return damping * self.increase
        if gain_ratio > self.good:
            carried = share is None or not self.carry_over or share >= self.carry_over
            return max(self.smallest * least, damping * self.decrease) if carried else damping
        return damping * self.increase if gain_ratio < self.poor else damping

    def raised(self, damping: float, rejections: int) -> float:
        """λ for the trial after a rejection, of which there have been ``rejections`` in this step."""
        return damping * self.increase * math.ldexp(1.0, rejections - 1)

    def looked_back(self, state: State, loss: float, *, same: bool, lost: bool = False) -> tuple[State, bool]:
        """What is remembered once the next loss has come, and whether the step that led to it is to be taken back.

        Args:
            state: What is remembered, with what the step was expected to do.
            loss: The loss now.
            same: Whether it is on the same inputs. If not, chance is a part of the difference: the step stays, and λ is
                raised or lowered.
            lost: Whether outputs are not finite any more.
        """
        change, predicted = loss - state["before"], state["predicted"]
        ratio = change / predicted if predicted < 0 else math.nan
        if lost or (same and predicted < 0 and not ratio > self.accept):
            rejections = state.get("rejections", 0.0) + 1
            return {**state, "damping": self.raised(state["damping"], int(min(rejections, 40))), "rejections": rejections}, True
        following = self.after(state["damping"], ratio) if math.isfinite(ratio) else state["damping"]
        if not same:
            following = min(following, max(state["damping"], _BY_CHANCE))
        return {**state, "damping": following, "rejections": 0.0}, False

    def first_damping(self, state: State) -> float:
        """The λ of the first trial."""
        return state.get("damping", self.initial) or self.initial

    def search(self, step: Step) -> Outcome:
        """Trials with more and more damping until one gives enough of the decrease that was predicted for it."""
        judge, linear = step.known(), step.linear
        damping = step.state.get("damping", self.initial)
        carry = read(CarryOver, step.state).met(judge.before / linear.loss_unit)

        def remembered(damping: float, change: float | None) -> State:
            after = carry.stepped(judge.before / linear.loss_unit, None if change is None else change / linear.loss_unit)
            return {"damping": damping, **dataclasses.asdict(after)}

        tried, ratio, shortened = self.first_damping(step.state), -math.inf, 1.0
        for attempt in range(1, self.num_trials + 1):
            # A momentum that does not suit the loss here is not mended by damping.
            direction = step.direction(tried, with_momentum=attempt <= 2)
            # What no damping shortens has to be shortened itself.
            fraction = shortened * (1.0 if step.propose.damped else 0.25 ** (attempt - 1))
            trial = step.propose(direction, fraction)
            straight = linear.linear(trial.change)  # Dδ
            predicted = step.predicted(trial, straight)
            if judge.later and (predicted <= 0 or attempt == self.num_trials):  # else the criterion refuses that x
                expected = {"damping": tried, "predicted": predicted, "before": judge.before}
                expected["rejections"] = step.state.get("rejections", 0.0)
                return Outcome(direction, trial if predicted <= 0 else None, attempt, None, expected)
            trial, change = step.best(trial, straight, self.second_order and fraction == 1)
            if predicted == 0 and change <= 0:  # a stationary point, or lr = 0
                return Outcome(direction, trial, attempt, None, remembered(damping, change))
            ratio = change / predicted if predicted < 0 else -math.inf
            if ratio > self.accept:
                following = self.after(tried, ratio, carry.share, linear.system.least)
                return Outcome(direction, trial, attempt, ratio, remembered(following, change) | step.learned(trial, change))
            shown = step.shown(trial, change)
            if shown is not None and judge.curvature is not None and shown > judge.curvature and shortened > 0.1:
                shortened = max(0.1, shortened * judge.curvature / shown)  # the loss bends more than was known
                continue
            if judge.by_outputs and abs(predicted) <= linear.rounding:
                return Outcome(direction, None, attempt, ratio, hidden=True)
            tried = self.raised(tried, attempt if step.propose.damped else 1)
        return Outcome(direction, None, self.num_trials, ratio)


Policy = Fixed | Backtracking | StraightLine | LevenbergMarquardt
