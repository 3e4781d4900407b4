"""What a step did, in numbers."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepReport:
    """Report of the last step of `AdaptedGD`, kept as ``optimizer.last_step``.

    Attributes:
        num_outputs: QN, the outputs of all calls that the loss went through.
        num_params: K, the parameters stepped.
        rank: Rank of D: singular values above ``rtol``·σ_max.
        condition: σ_max/σ_min of D over those, but by ``"eigh"`` an estimate from below; NaN when the rank is 0.
        projected_fraction: |Pg|/|g|, the part of the output gradient within reach of the parameters.
        identity_gap: |ψᵀΘψ − |Dᵀψ|²| / |Dᵀψ|², zero but for rounding when kernel and Jacobian belong together.
        off_output_fraction: |∇_θC − Dᵀg| / |∇_θC|, the part of the loss's gradient that did not come through the
            outputs; 0 when it is within rounding.
        curvature: c, the output curvature that ``lr`` was divided by; 1 without a ``criterion``.
        damping: λ added to Θ, in its units.
        num_calls: Calls of the model whose rows were stacked.
        kernel: How Θ came about: ``"structured"``, ``"jacobian"``, or both for different parameters, with the method of the
            Jacobian.
        solver: What solved Θψ = Pg: ``"cholesky"``, ``"pivoted_cholesky"`` or ``"eigh"``.
        status: ``"full_rank"``, ``"rank_deficient"`` or ``"zero"`` (no parameter moves any output); or ``"skipped"``, when
            a GradScaler found scaled gradients that are not finite: nothing was changed.
    """

    num_outputs: int
    num_params: int
    rank: int
    condition: float
    projected_fraction: float
    identity_gap: float
    off_output_fraction: float
    curvature: float
    damping: float
    num_calls: int
    kernel: str
    solver: str
    status: str

    @property
    def full_rank(self) -> bool:
        """Whether rank D = QN, the assumption of Proposition 2.4."""
        return self.rank == self.num_outputs

    @classmethod
    def skipped(cls, num_calls: int) -> "StepReport":
        """Report of a step that a GradScaler had skipped."""
        nan = math.nan
        return cls(0, 0, 0, nan, nan, nan, nan, nan, nan, num_calls, "none", "none", "skipped")
