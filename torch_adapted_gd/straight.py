"""The policy of steps that keep outputs on a straight line."""

import math
from dataclasses import dataclass

from .checks import real_number


@dataclass(frozen=True)
class StraightLine:
    """Take steps as long as the outputs follow them: a ``line_search`` that compares motions, not losses.

    A step of length η is predicted to move the outputs by Dδ = −η·DDᵀψ and moves them by Δx, which differs by O(η²). It is
    taken if

        |Δx − Dδ| ≤ tolerance · |x₀ − y|,

    with the distance |x₀ − y| that the first step's prediction had to go at η = 1 (as a root mean square over outputs, so that
    batches of other sizes compare). Else η is shortened to what that error, growing like η², suggests, down to a tenth at a
    time, and the next step begins with what the last error suggests, up to five times as long; never longer than ``lr``. Each
    trial costs a forward pass and no new solution. So steps are short at the start, where small eigenvalues of Θ ask for long
    motions of the parameters, and grow until the last ones are full Gauss–Newton steps, which end on the targets.

    Each step aims at the targets from where the outputs are, which mends what they were off by as it goes. What damping leaves
    out of the motion is not seen as an error: choose λ small. How near to the line from their start to the targets that keeps
    all outputs is in docs/fullbatch.md: with the default, within 5 %.

    The time t = 1 − Π(1 − η) advances with ``lr · last_step.fraction`` for η. No criterion is needed, but without one η
    multiplies the gradient of the loss as it is.

    Args:
        tolerance: Largest error of a step, relative to the distance at the start.
        smallest: Fraction of ``lr`` below which no shorter step is tried: nothing changes then, and the report's status is
            ``"rejected"``.

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

    def __post_init__(self) -> None:
        real_number("tolerance", self.tolerance, low=1e-12, below=1e12)
        real_number("smallest", self.smallest, low=1e-300, below=1.0)

    def next_fraction(self, fraction: float, error: float) -> float:
        """The fraction of ``lr`` to try after one that had an error, relative to the distance at the start."""
        allowed = _RESERVE * math.sqrt(self.tolerance / error) if error > 0 else math.inf
        return min(1.0, fraction * min(_LONGER, max(_SHORTER, allowed)))


_RESERVE = 0.8  # of the length that an error growing like the square would allow
_LONGER, _SHORTER = 5.0, 0.1  # most that a step is made longer or shorter by


@dataclass(frozen=True)
class Progress:
    """What `StraightLine` carries from step to step. Plain numbers, to be kept in checkpoints.

    Attributes:
        distance: How far the first step had to go at η = 1, as a root mean square over outputs; None before it.
        fraction: What of ``lr`` to try first.
    """

    distance: float | None = None
    fraction: float = 1.0
