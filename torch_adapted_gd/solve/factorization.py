"""What every factorization of Θ can do: solve for any damping and any right-hand side."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

Status = Literal["full_rank", "rank_deficient", "zero", "not_finite", "not_converged"]


class Factorization(ABC):
    """Θ of revealed rank, factored once and solved for as many shifts and right-hand sides as wanted.

    Attributes:
        size: n, the rows of Θ.
        rank: Number of singular values of D counted as nonzero.
        condition: σ_max/σ_min of D over those; NaN when the rank is 0.
        status: See `KernelSolution`.
        method: Which factorization it is.

    Args:
        size: n.
        rank: The rank.
        condition: The condition.
        status: The status, by default the one that the rank tells.
        plain_from: λ so far above the rounding of Θ that directions of small σ need not be left out for its sake.
    """

    method: str

    def __init__(
        self, size: int, rank: int, condition: float, status: Status | None = None, plain_from: float = math.inf
    ) -> None:
        self.size, self.rank, self.condition, self._plain_from = size, rank, condition, plain_from
        self.status: Status = status or ("full_rank" if rank == size else "rank_deficient" if rank else "zero")

    def solve(self, g: Tensor, shift: float = 0.0) -> Tensor:
        """ψ = (Θ + λ1)⁻¹Pg, which is in ran Θ: the one of least norm; and (Θ + λ1)⁻¹g from a λ of ``plain_from`` on.

        Entries that are not finite mean that the numbers are near the ends of float64's range.

        Args:
            g: One right-hand side ``[n]`` or several ``[n, k]``, float64.
            shift: λ ≥ 0 in the units of Θ. What is made for it is kept until another one comes.
        """
        return self._solve_plainly(g, shift) if shift >= self._plain_from else self._solve_on_range(g, shift)

    @abstractmethod
    def _solve_on_range(self, g: Tensor, shift: float) -> Tensor:
        """(Θ + λ1)⁻¹Pg."""

    def _solve_plainly(self, g: Tensor, shift: float) -> Tensor:
        """(Θ + λ1)⁻¹g."""
        return self._solve_on_range(g, shift)

    @abstractmethod
    def project(self, g: Tensor) -> Tensor:
        """Pg, with P the orthogonal projector onto ran Θ at this rank."""

    def projected_norm(self, g: Tensor) -> float:
        """|Pg| of one g ``[n]``."""
        return float(torch.linalg.vector_norm(self.project(g)))


class NoFactorization(Factorization):
    """What is left of a Θ that has none: the status says why, and ψ is zero."""

    method = "none"

    def __init__(self, size: int, status: Status) -> None:
        super().__init__(size, 0, math.nan, status)

    def _solve_on_range(self, g: Tensor, shift: float) -> Tensor:  # noqa: ARG002
        """Zero."""
        return torch.zeros_like(g)

    def project(self, g: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(g)
