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
        condition: σ_max/σ_min of D over those; NaN when the rank is 0, and by ``"cg"``. Except by ``"eigh"`` and ``"svd"``, an
            estimate from below.
        projected_fraction: |Pg|/|g|, the part of the output gradient within reach of the parameters; by ``"cg"`` |DDᵀψ|/|g|,
            which damping makes smaller.
        identity_gap: |ψᵀΘψ − |Dᵀψ|²| / |Dᵀψ|². It is rounding if kernel and Jacobian belong together.
        off_output_fraction: |∇_θC − Dᵀg| / |∇_θC|, the part of the loss's gradient that did not come through the
            outputs; 0 when it is within rounding.
        curvature: c, the output curvature that ``lr`` was divided by; 1 if the loss is unknown.
        damping: λ added to Θ, in its units: ``relative_damping`` times the mean of diag Θ.
        relative_damping: λ as the argument ``damping`` gives it, relative to the mean of diag Θ.
        space: Where the system was solved: ``"sample"`` (Θ, QN×QN) or ``"parameter"`` (DᵀD, K×K).
        num_trials: Steps that were tried, the last one included: more than 1 with a policy.
        gain_ratio: Actual over predicted decrease of the loss; None if the loss was not computed.
        num_calls: Calls of the model whose rows were stacked.
        kernel: How Θ was computed: ``"structured"``, ``"jacobian"``, or both for different parameters, with the method of the
            Jacobian.
        solver: ``"cholesky"``, ``"pivoted_cholesky"``, ``"eigh"``, ``"svd"``, or ``"cg"`` with its preconditioner.
        status: ``"full_rank"``, ``"rank_deficient"`` or ``"zero"`` (no parameter moves any output). By ``"cg"``
            ``"converged"``, ``"rank_deficient"`` (Θ was found singular, and small singular values count as zero) or
            ``"not_converged"``, see `ConjugateGradients`. If nothing was changed: ``"stationary"`` (the predicted decrease of
            the loss is within its rounding: training is done), ``"rejected"`` (no trial lowered the loss enough) or
            ``"skipped"`` (a GradScaler found scaled gradients that are not finite).
        fraction: The part of ``lr`` that the step went: less than 1 if a policy shortened it.
        iterations: Of conjugate gradients, for all trials of the step; 0 for other solvers.
        residual: |g − (Θ + λ1)ψ|/|g| of conjugate gradients in the last trial: the predicted motion of the outputs is
            within this of the exact one, see `ConjugateGradients`; None for other solvers.
        seconds: Time spent by conjugate gradients on ``"factors"`` (of D, with the checks of it), on the ``"preconditioner"``
            and on ``"iterations"``; empty for other solvers.
    """

    num_outputs: int = 0
    num_params: int = 0
    rank: int | None = 0
    condition: float = math.nan
    projected_fraction: float = math.nan
    identity_gap: float = math.nan
    off_output_fraction: float = math.nan
    curvature: float = math.nan
    damping: float = math.nan
    relative_damping: float = math.nan
    space: str = "none"
    num_trials: int = 0
    gain_ratio: float | None = None
    num_calls: int = 0
    kernel: str = "none"
    solver: str = "none"
    status: str = "skipped"
    fraction: float = 1.0
    iterations: int = 0
    residual: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def full_rank(self) -> bool:
        """Whether rank D = QN, the assumption of Proposition 2.4; False if the rank is unknown."""
        return self.rank == self.num_outputs

    @classmethod
    def of(cls, linearization: "Linearization", outcome: "Outcome") -> "StepReport":
        """Report of a step."""
        system, iterative = linearization.system, linearization.system.iterative
        return cls(
            num_outputs=linearization.num_outputs,
            num_params=linearization.num_params,
            rank=system.factorization.rank,
            condition=system.factorization.condition,
            projected_fraction=system.projected_fraction,
            identity_gap=system.identity_gap(outcome.direction),
            off_output_fraction=linearization.off_output_fraction,
            curvature=linearization.curvature,
            damping=outcome.direction.damping,
            relative_damping=outcome.direction.damping / system.scale if system.scale else 0.0,
            space=system.space,
            num_trials=outcome.num_trials,
            gain_ratio=outcome.gain_ratio,
            num_calls=linearization.num_calls,
            kernel=system.jacobian.description,
            solver=system.factorization.method,
            status=system.status if outcome.trial else "stationary" if outcome.hidden else "rejected",
            fraction=outcome.trial.fraction if outcome.trial else 0.0,
            iterations=iterative.iterations if iterative else 0,
            residual=iterative.last.residual if iterative and iterative.last else None,
            seconds=dict(iterative.seconds) if iterative else {},
        )
