"""The policy of a step where the user gave none: what suits the loss."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import torch
from torch import nn

from ..memory import fits
from ..policies import Backtracking, Fixed, LevenbergMarquardt, Policy
from ..solve import ConjugateGradients, default_rtol, default_svd_rtol
from ..world import ALONE, World
from .recorded import Recorded, TotalLoss
from .remembered import State, read
from .system import COPIES, DENSE, Dense

_SETTLED = 5.0  # steps on new points before they are taken to stay
_WINDOW = 50  # steps in which undamped ones have to halve the loss
_LESS_DAMPING = 0.1  # after a good step: the first ones need a λ that is a thousand times that of later ones
_LEAST_UNDAMPED = 1e-3  # shorter undamped steps than that did not lead to the solution sooner
_LARGE = 2**21  # entries of D from which a step by its singular values takes half a second or more
_REFINING = 10.0  # the cut of these singular values is divided by it where steps have come to its end


@dataclass(frozen=True)
class Chosen:
    """How to step."""

    policy: Policy
    solver: Dense | ConjugateGradients | None
    remembered: State = field(default_factory=dict)  # what to remember if the step is taken
    if_rejected: State = field(default_factory=dict)  # and if it is rejected


@dataclass(frozen=True)
class SamePoints:
    """Whether an equation is solved on points that stay, and undamped steps get on with it.

    The default for residuals of differential equations is `Backtracking` without damping while they do, and else
    `LevenbergMarquardt`: docs/pinns.md has the table that this was decided by.
    """

    points: float = math.nan  # a number for the points of the last step
    settled: float = 0.0  # steps on them; below zero, how many are missing until they are taken to stay
    mark: float = math.nan  # the loss when the present window of steps began; NaN before the first
    slow: float = 0.0  # 1 if undamped steps did not get on, else 0
    last: float = math.nan  # the loss of the last step
    refined: float = 0.0  # how often a step of full length did not halve the loss: as often, the cut of D is lowered

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


def choose_policy(
    given: Policy | None,
    solver: Dense | ConjugateGradients | None,
    recorded: Recorded,
    kept: State,
    total: TotalLoss,
    *,
    with_criteria: bool,
    with_closure: bool,
) -> Chosen:
    """The policy and the solver of a step: what the user gave, or what suits the loss.

    Args:
        given: The user's policy, or None.
        solver: The user's solver, or None.
        recorded: What the training step left.
        kept: What was remembered of the last step, and λ.
        total: The loss by the criteria.
        with_criteria: Whether there are any.
        with_closure: Whether a closure tells the loss.
    """
    if isinstance(given, Fixed) or not (given or with_criteria or with_closure):
        return Chosen(Fixed(kept["damping"]), solver)  # which may have been loaded
    if given or not with_criteria:
        return Chosen(given or LevenbergMarquardt(), solver)
    derived, world = any(tape.derived for each in recorded.stacked_from for tape in each.tapes), recorded.shares.world
    told = world.objects((derived, with_closure or recorded.repeatable, recorded.rows))
    if not (any(each[0] for each in told) and all(each[1] for each in told)):
        return Chosen(LevenbergMarquardt(), solver)
    points = read(SamePoints, kept).met(total.job, total.value(), kept.get("fraction", 0.0))
    remembered = dataclasses.asdict(points)
    undamped = solver or for_undamped(
        sum(each[2] for each in told), list(recorded.trained.values()), world, int(points.refined)
    )
    if not points.undamped or undamped is None:
        return Chosen(LevenbergMarquardt(decrease=_LESS_DAMPING), solver, remembered)
    coarse = solver is None and isinstance(undamped, Dense) and undamped.rtol is not None
    if_rejected = {"refined": points.refined + 1} if coarse else {"slow": 1.0}
    return Chosen(Backtracking(smallest=_LEAST_UNDAMPED), undamped, remembered, if_rejected)


def for_undamped(rows: int, trained: list[nn.Parameter], world: World = ALONE, refined: int = 0) -> Dense | None:
    """The solver for undamped steps if the spectrum of D has no gap; None if D, of so many rows, is too large for it.

    By all singular values above rounding, the first steps move the parameters far and the loss little. If D is so large that
    a step takes long, only those that Θ would show count at first, down to √(R·ε) of the largest, and tenfold smaller ones
    each time that the cut is ``refined``. The first digits then come in fewer steps, the last ones in more. docs/pinns.md has
    figures.
    """
    params = sum(p.numel() for p in trained)
    fitting = fits(2 * COPIES * 8 * rows * params, trained[0].device)  # which leaves half of the memory
    if min(rows, params) > DENSE or world.any(not fitting):
        return None
    rtol = default_rtol(rows) / _REFINING**refined
    coarse = rows * params > _LARGE and trained[0].dtype == torch.float64 and rtol > default_svd_rtol((rows, params))
    return Dense(factorization="svd", rtol=rtol if coarse else None)
