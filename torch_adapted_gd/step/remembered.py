"""What policies remember from step to step: plain numbers, to be kept in checkpoints."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeVar

State = dict[str, float]
_T = TypeVar("_T")

_MEMORY = 0.9  # of averages over steps
_WORST = 4.0  # most that is taken for lost, in units of the gain
_HOPELESS = -2.0  # share below which batches that differ by chance do not get: half of them lose the most, half nothing
_NOTICEABLE = 0.1  # gain of a step, relative to the loss, below which batches differ by more than steps do


def read(kind: type[_T], state: State) -> _T:
    """A dataclass with those of its fields that are in ``state``."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    found: dict[str, Any] = {name: state[name] for name in names if name in state}
    return kind(**found)


@dataclass(frozen=True)
class CarryOver:
    """How much of what steps gain on their own batch the next batch sees."""

    after: float = math.nan  # the loss of the last batch after its step; NaN before the first one
    gain: float = 0.0  # what that step gained
    lost: float = 0.0  # running sum of what was missing when the next batch arrived
    gained: float = 0.0  # running sum of gains
    total: float = 0.0  # running sum of the losses that they started from

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
