"""Damping that adjusts itself: the Levenberg–Marquardt policy."""

import dataclasses
import math
from dataclasses import dataclass

from .checks import positive_integer, real_number, true_or_false

_LOSING = -1.0  # share of the gain below which damping is raised: more than twice the gain is missing on the next batch


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Raise and lower the damping λ of (DᵀD + λ1)⁻¹∇_θC by how well the last trial was predicted.

    Each step of `AdaptedGD` tries parameters θ + δ and compares the decrease of the loss there with the one that would come
    about if the outputs moved by Dδ, as their linearization has it. A trial that is not finite, or gives less than ``accept``
    of that, is rejected: nothing of it stays, and λ is raised, faster each time. One that is accepted lowers λ if it gave more
    than ``good`` of it and raises λ if it gave less than ``poor``. If every attempt of a step is rejected, parameters, momentum
    and λ are as they were, and the report's status is ``"rejected"``. Where plain gradients are a part of the step, which no
    damping shortens (α < 1, terms of the loss that do not come through the outputs), a rejection shortens all of it too.

    The loss at the trial is computed from the ``criterion``, whose gradient tells all that is needed, and the forward pass of
    the very batch repeated at θ + δ: one forward pass without graph for each trial. Without a ``criterion``, or where part of
    the loss does not come through the outputs, ``step(closure)`` calls the closure at θ + δ instead: a forward and a backward
    pass. See ``trials`` of `AdaptedGD`.

    So each batch judges its own step. A small batch of a large network can be fitted however large the step, which undoes
    what others have learned; what gives this away is that the next batch sees nothing of the gain. Therefore λ is lowered
    only while at least ``carry_over`` of the gain on one batch is found again when the next one arrives, on average over ten
    steps or so; where steps gain less than a tenth of the loss, batches differ by more than that and it is not asked. And λ is
    raised while the next batch is missing more than twice the gain. For a batch that is the whole data nothing is missing.
    This costs nothing.

    ``second_order`` adds to each trial what the bending of the outputs asks for, −D⁺(x(θ + δ) − x(θ) − Dδ) with the same λ,
    where it is at most ⅜ of δ in length and lowers the loss further; known as geodesic acceleration (Transtrum & Sethna,
    arXiv:1201.5885, there from a finite difference). It costs one more forward pass and one more solve with the factors at
    hand, and pays where valleys are narrow and curved: docs/defaults.md has figures.

    Args:
        initial: λ to begin with, relative to the mean of diag Θ, like every damping.
        increase: What a first rejection multiplies λ by; the next ones by twice as much each.
        decrease: What a good step multiplies λ by.
        good: Gain ratio above which λ is lowered.
        poor: Gain ratio below which λ is raised after an accepted step.
        accept: Gain ratio below which a trial is rejected.
        carry_over: Share of the gain on one batch that the next one has to see for λ to be lowered; 0 for not asking.
        smallest: Lower bound of λ.
        attempts: Trials of one step.
        second_order: Whether to add the second-order part.

    Raises:
        TypeError: An argument is not a number.
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
    attempts: int = 10
    second_order: bool = True

    def __post_init__(self) -> None:
        real_number("initial", self.initial, low=1e-300)
        real_number("increase", self.increase, low=1 + 1e-12)
        real_number("decrease", self.decrease, low=1e-300, below=1.0)
        real_number("accept", self.accept, low=0.0, below=1.0)
        real_number("poor", self.poor, low=self.accept, below=1.0)
        real_number("good", self.good, low=self.poor)
        real_number("carry_over", self.carry_over, low=0.0, high=1.0)
        real_number("smallest", self.smallest, low=1e-300)
        positive_integer("attempts", self.attempts)
        true_or_false("second_order", self.second_order)

    def after(self, damping: float, gain_ratio: float, share: float | None = None) -> float:
        """λ for the step after one that was accepted.

        Args:
            damping: λ of the accepted trial.
            gain_ratio: Actual over predicted decrease.
            share: How much of the gain carries over to the next batch; None if that is not known yet.
        """
        if share is not None and self.carry_over and share < _LOSING:
            return damping * self.increase
        if gain_ratio > self.good:
            carried = share is None or not self.carry_over or share >= self.carry_over
            return max(self.smallest, damping * self.decrease) if carried else damping
        return damping * self.increase if gain_ratio < self.poor else damping

    def raised(self, damping: float, rejections: int) -> float:
        """λ for the trial after a rejection, of which there have been ``rejections`` in this step."""
        return damping * self.increase * math.ldexp(1.0, rejections - 1)


_MEMORY = 0.9  # of averages over steps
_WORST = 4.0  # most that is taken for lost, in units of the gain
_HOPELESS = -2.0  # share below which batches that differ by chance do not get: half of them lose the most, half nothing
_NOTICEABLE = 0.1  # gain of a step, relative to the loss, below which batches differ by more than steps do


@dataclass(frozen=True)
class CarryOver:
    """How much of what steps gain on their own batch the next batch sees. Plain numbers, to be kept in checkpoints.

    Attributes:
        after: The loss of the last batch after its step; None before the first one.
        gain: What that step gained.
        lost: Running sum of what was missing when the next batch arrived.
        gained: Running sum of gains.
        total: Running sum of the losses that they started from.
    """

    after: float | None = None
    gain: float = 0.0
    lost: float = 0.0
    gained: float = 0.0
    total: float = 0.0

    def met(self, loss: float) -> "CarryOver":
        """With the next batch, whose loss before its step is ``loss``."""
        if self.after is None:
            return self
        lost = min(max(loss - self.after, 0.0), _WORST * max(self.gain, 0.0))  # whatever an outlier among batches does
        return CarryOver(
            self.after,
            self.gain,
            lost=_MEMORY * self.lost + lost,
            gained=_MEMORY * self.gained + self.gain,
            total=_MEMORY * self.total + self.after + self.gain,
        )

    def stepped(self, loss: float, change: float | None) -> "CarryOver":
        """With a step that changes that loss; by None if nobody looked."""
        after = None if change is None else loss + change
        return dataclasses.replace(self, after=after, gain=0.0 if change is None else -change)

    @property
    def remark(self) -> str | None:
        """What the user should be told if steps lose far more than they gain."""
        if self.share is None or self.share >= _HOPELESS:
            return None
        return (
            "Batches are found much worse than steps had left the last ones, which no damping mends if the loss is not what "
            "`criterion` says: is it a multiple of it, or of something else than the model's outputs? Give AdaptedGD that very "
            "loss, or a closure to `step`; if it is right, lower `lr` or take larger batches."
        )

    @property
    def share(self) -> float | None:
        """1 − lost/gained; None where too little was gained to tell, but for what cannot be chance."""
        if self.gained <= 0:
            return None
        share = 1 - self.lost / self.gained
        return share if self.gained > _NOTICEABLE * abs(self.total) or share < _HOPELESS else None
