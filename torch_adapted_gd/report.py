"""What a step did, in numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .step.decision import Outcome
    from .step.linearization import Linearization


@dataclass(frozen=True)
class StepReport:
    """Report of the last step of `AdaptedGD`, kept as ``optimizer.last_step``.

    Attributes:
        num_outputs: QN, the outputs that the loss was computed from.
        num_params: K, the parameters stepped.
        rank: Rank of D: singular values above ``rtol``·σ_max; None by ``"cg"``, which does not reveal it.
        condition: σ_max/σ_min of D over those, but by ``"eigh"`` an estimate from below; NaN when the rank is 0, and
            by ``"cg"``.
        projected_fraction: |Pg|/|g|, the part of the output gradient within reach of the parameters; by ``"cg"`` |DDᵀψ|/|g|,
            which damping makes less.
        identity_gap: |ψᵀΘψ − |Dᵀψ|²| / |Dᵀψ|², zero but for rounding when kernel and Jacobian belong together.
        off_output_fraction: |∇_θC − Dᵀg| / |∇_θC|, the part of the loss's gradient that did not come through the
            outputs; 0 when it is within rounding.
        curvature: c, the output curvature that ``lr`` was divided by; 1 where nobody knows the loss.
        damping: λ added to Θ, in its units.
        space: Where the system was solved: ``"sample"`` (Θ, QN×QN) or ``"parameter"`` (DᵀD, K×K).
        num_trials: Steps that were tried, the last one included: more than 1 with a policy.
        gain_ratio: Actual over predicted decrease of the loss; None where nobody looked.
        num_calls: Calls of the model whose rows were stacked.
        kernel: How Θ came about: ``"structured"``, ``"jacobian"``, or both for different parameters, with the method of the
            Jacobian.
        solver: What solved Θψ = Pg: ``"cholesky"``, ``"pivoted_cholesky"``, ``"eigh"``, or ``"cg"`` with its preconditioner.
        status: ``"full_rank"``, ``"rank_deficient"`` or ``"zero"`` (no parameter moves any output); by ``"cg"``
            ``"converged"``, ``"rank_deficient"`` where Θ was found singular and small singular values count as zero, or
            ``"not_converged"``, see `ConjugateGradients`. Or, nothing
            having been changed, ``"rejected"``, when no trial lowered the loss enough, and ``"skipped"``, when a GradScaler
            found scaled gradients that are not finite.
        fraction: The part of ``lr`` that the step went: less than 1 by policies, and by trials that had to be
            shortened.
        iterations: Those of conjugate gradients, for all trials of the step; 0 where others solved.
        residual: Their |g − (Θ + λ1)ψ|/|g| at the end of the last trial's solution, see `ConjugateGradients`: how far the
            outputs' predicted motion is from that of the exact ψ, at most; None where others solved.
        seconds: Time spent by conjugate gradients on ``"factors"`` (the replay, its checks and what the layers' factors are
            made from), on the ``"preconditioner"`` and on ``"iterations"``; empty where others solved.
    """

    num_outputs: int
    num_params: int
    rank: int | None
    condition: float
    projected_fraction: float
    identity_gap: float
    off_output_fraction: float
    curvature: float
    damping: float
    space: str
    num_trials: int
    gain_ratio: float | None
    num_calls: int
    kernel: str
    solver: str
    status: str
    fraction: float = 1.0
    iterations: int = 0
    residual: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def full_rank(self) -> bool:
        """Whether rank D = QN, the assumption of Proposition 2.4; False where the rank is not known."""
        return self.rank == self.num_outputs

    @classmethod
    def skipped(cls, num_calls: int) -> "StepReport":
        """Report of a step that a GradScaler had skipped."""
        nan = math.nan
        return cls(0, 0, 0, nan, nan, nan, nan, nan, nan, "none", 0, None, num_calls, "none", "none", "skipped")

    @classmethod
    def undone(cls, num_calls: int, damping: float) -> "StepReport":
        """Report of a step that took the last one back."""
        nan = math.nan
        return cls(0, 0, 0, nan, nan, nan, nan, nan, damping, "none", 0, None, num_calls, "none", "none", "rejected", 0.0)

    @classmethod
    def of(cls, linearization: "Linearization", outcome: "Outcome") -> "StepReport":
        """Report of a step."""
        system, iterative = linearization.system, linearization.iterative
        return cls(
            num_outputs=linearization.num_outputs,
            num_params=linearization.num_params,
            rank=system.factorization.rank,
            condition=system.factorization.condition,
            projected_fraction=system.projected_fraction,
            identity_gap=linearization.identity_gap(outcome.direction),
            off_output_fraction=linearization.off_output_fraction,
            curvature=linearization.curvature,
            damping=outcome.direction.damping,
            space=system.space,
            num_trials=outcome.num_trials,
            gain_ratio=outcome.gain_ratio,
            num_calls=linearization.num_calls,
            kernel=system.jacobian.description,
            solver=system.factorization.method,
            status=linearization.status if outcome.trial else "rejected",
            fraction=outcome.trial.fraction if outcome.trial else 0.0,
            iterations=iterative.iterations if iterative else 0,
            residual=iterative.last.residual if iterative and iterative.last else None,
            seconds=dict(system.seconds),
        )
