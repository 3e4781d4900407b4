"""What policies remember from step to step: plain numbers, to be kept in checkpoints."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

State = dict[str, float]

_MEMORY = 0.9  # of averages over steps
_WORST = 4.0  # most that is taken for lost, in units of the gain
_HOPELESS = -2.0  # share below which batches that differ by chance do not get: half of them lose the most, half nothing
_NOTICEABLE = 0.1  # gain of a step, relative to the loss, below which batches differ by more than steps do


@dataclass(frozen=True)
class CarryOver:
    """How much of what steps gain on their own batch the next batch sees.

    Attributes:
        after: The loss of the last batch after its step; NaN before the first one.
        gain: What that step gained.
        lost: Running sum of what was missing when the next batch arrived.
        gained: Running sum of gains.
        total: Running sum of the losses that they started from.
    """

    after: float = math.nan
    gain: float = 0.0
    lost: float = 0.0
    gained: float = 0.0
    total: float = 0.0

    @classmethod
    def read(cls, state: State) -> CarryOver:
        """From what a policy remembers."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: state[name] for name in names if name in state})

    def met(self, loss: float) -> CarryOver:
        """With the next batch, whose loss before its step is ``loss``."""
        if math.isnan(self.after):
            return self
        most = _WORST * max(self.gain, 0.0)  # whatever an outlier among batches does
        # Of either sign: batches that are easier by chance make up for those that are harder.
        lost = min(max(loss - self.after, -most), most)
        return CarryOver(
            self.after,
            self.gain,
            lost=_MEMORY * self.lost + lost,
            gained=_MEMORY * self.gained + self.gain,
            total=_MEMORY * self.total + self.after + self.gain,
        )

    def stepped(self, loss: float, change: float | None) -> CarryOver:
        """With a step that changes that loss; by None if nobody looked."""
        after = math.nan if change is None else loss + change
        return dataclasses.replace(self, after=after, gain=0.0 if change is None else -change)

    @property
    def share(self) -> float | None:
        """1 − lost/gained; None where too little was gained to tell, but for what cannot be chance."""
        if self.gained <= 0:
            return None
        share = 1 - self.lost / self.gained
        return share if self.gained > _NOTICEABLE * abs(self.total) or share < _HOPELESS else None


_SETTLED = 5.0  # steps on new points before they are taken to stay
_WINDOW = 50  # steps in which undamped ones have to halve the loss


@dataclass(frozen=True)
class SamePoints:
    """Whether an equation is solved on points that stay, and undamped steps get on with it.

    The default for residuals of differential equations is `Backtracking` without damping while they do, and else
    `LevenbergMarquardt`: docs/pinns.md has the table that this was decided by.

    Attributes:
        points: A number for the points of the last step.
        settled: Steps on them; below zero, how many are missing until they are taken to stay.
        mark: The loss when the present window of steps began; NaN before the first.
        slow: 1 if undamped steps did not get on, else 0.
        last: The loss of the last step.
        refined: How often a step of full length did not halve the loss: as often, the cut of D's singular values is lowered.
    """

    points: float = math.nan
    settled: float = 0.0
    mark: float = math.nan
    slow: float = 0.0
    last: float = math.nan
    refined: float = 0.0

    @classmethod
    def read(cls, state: State) -> SamePoints:
        """From what a policy remembers."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: state[name] for name in names if name in state})

    def met(self, points: float, loss: float, fraction: float = 0.0) -> SamePoints:
        """With the points of another step, the loss there, and how much of its full length the last undamped step went."""
        if math.isnan(self.mark):
            return SamePoints(points, -1.0, loss)  # nobody knows yet
        if points != self.points:
            return SamePoints(points, -_SETTLED, loss)
        refined = self.refined + float(self.undamped and fraction == 1 and loss > 0.5 * self.last)
        settled, mark, slow = self.settled + 1, self.mark, self.slow
        if settled > 0 and settled % _WINDOW == 0:
            slow, mark = max(slow, float(loss > 0.5 * mark)), loss
        return SamePoints(points, settled, mark, slow, loss, refined)

    @property
    def undamped(self) -> bool:
        """Whether to step without damping."""
        return self.settled >= 0 and not self.slow
