"""What solving Θψ = Pg found."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .factorization import Status

METHODS = ("auto", "eigh")


@dataclass(frozen=True)
class KernelSolution:
    """What `solve_kernel` found. A failure is a value here: ``status`` says so and ``psi`` is zero.

    Attributes:
        psi: ψ in float64, in the shape of g: the one of least norm, in ran Θ.
        rank: Number of singular values of D counted as nonzero; an estimate where ``"pivoted_cholesky"`` served with a damping
            that makes it of little consequence.
        condition: σ_max/σ_min of D over those (Θ's own is the square); NaN when the rank is 0. By ``"eigh"`` it is computed, by
            ``"cholesky"`` and ``"pivoted_cholesky"`` estimated, from below and mostly within a third.
        projected_fraction: |Pg|/|g|, the part of the gradient within reach of the parameters; 1 for g = 0.
        damping: The λ that was added, in the units of Θ.
        status: ``"full_rank"``, ``"rank_deficient"``, ``"zero"`` (Θ = 0), ``"not_finite"`` (Θ, g or ψ has NaN or infinite
            entries) or ``"not_converged"`` (the eigenvalue routine gave up).
        method: ``"cholesky"``, ``"pivoted_cholesky"`` or ``"eigh"``, what served.
    """

    psi: Tensor
    rank: int
    condition: float
    projected_fraction: float
    damping: float
    status: Status
    method: str = "eigh"

    @classmethod
    def failure(cls, status: Status, g: Tensor) -> "KernelSolution":
        """ψ = 0, and why."""
        return cls(torch.zeros_like(g), 0, math.nan, math.nan, math.nan, status)

    @property
    def message(self) -> str:
        """The status in words, with what to try."""
        return {
            "full_rank": "Θ has full rank: every output can be moved on its own.",
            "rank_deficient": f"Θ has rank {self.rank} of {self.psi.numel()}: {1 - self.projected_fraction**2:.1%} of "
            "|g|² is out of reach. Duplicate inputs, dead units and K < QN do this; a wider network may cure it.",
            "zero": "Θ is zero: no trainable parameter moves any output. Look for dead units and frozen layers.",
            "not_finite": "Θ, g or ψ has entries that are not finite. Look at the inputs, then lower the learning rate.",
            "not_converged": "The eigenvalue decomposition of Θ did not converge. Damping helps when entries are huge.",
        }[self.status]
