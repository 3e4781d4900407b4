"""What every factorization of Θ can do: solve for any damping and any right-hand side."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

Status = Literal["full_rank", "rank_deficient", "zero", "not_finite", "not_converged"]


class Factorization(ABC):
    """Θ of revealed rank, factored once and solved for any number of shifts and right-hand sides.

    Attributes:
        size: n, the rows of Θ.
        rank: Number of singular values of D counted as nonzero.
        condition: σ_max/σ_min of D over those; NaN when the rank is 0.
        status: See `KernelSolution`; by default it follows from the rank.
        method: Which factorization it is.

    Args:
        exact_from: From this λ on, (Θ + λ1)⁻¹g is solved without leaving out any direction: rounding of Θ is far below λ.
    """

    method: str

    def __init__(
        self, size: int, rank: int, condition: float, status: Status | None = None, exact_from: float = math.inf
    ) -> None:
        self.size, self.rank, self.condition, self._exact_from = size, rank, condition, exact_from
        self.status: Status = status or ("full_rank" if rank == size else "rank_deficient" if rank else "zero")

    def solve(self, g: Tensor, shift: float = 0.0) -> Tensor:
        """ψ = (Θ + λ1)⁻¹Pg, which is in ran Θ: the one of least norm; and (Θ + λ1)⁻¹g from a λ of ``exact_from`` on.

        Entries that are not finite mean that the numbers are near the ends of float64's range.

        Args:
            g: One right-hand side ``[n]`` or several ``[n, k]``, float64.
            shift: λ ≥ 0 in the units of Θ. The factor for it is kept until another λ comes.
        """
        solve = self._solve_exactly if shift >= self._exact_from else self._solve_on_range
        return solve(g if g.ndim == 2 else g[:, None], shift).reshape(g.shape)

    def project(self, g: Tensor) -> Tensor:
        """Pg, with P the orthogonal projector onto ran Θ at this rank, of one g ``[n]`` or several ``[n, k]``."""
        return self._project(g if g.ndim == 2 else g[:, None]).reshape(g.shape)

    def projected_norm(self, g: Tensor) -> float:
        """|Pg| of one g ``[n]``."""
        return float(torch.linalg.vector_norm(self.project(g)))

    @abstractmethod
    def _solve_on_range(self, g: Tensor, shift: float) -> Tensor:
        """(Θ + λ1)⁻¹Pg for g ``[n, k]``."""

    def _solve_exactly(self, g: Tensor, shift: float) -> Tensor:
        """(Θ + λ1)⁻¹g for g ``[n, k]``."""
        return self._solve_on_range(g, shift)

    @abstractmethod
    def _project(self, g: Tensor) -> Tensor:
        """Pg for g ``[n, k]``."""


class NoFactorization(Factorization):
    """The result for a Θ that has no factorization: the status says why, and ψ is zero."""

    method = "none"

    def __init__(self, size: int, status: Status) -> None:
        super().__init__(size, 0, math.nan, status)

    def _solve_on_range(self, g: Tensor, shift: float) -> Tensor:  # noqa: ARG002
        """Zero."""
        return torch.zeros_like(g)

    def _project(self, g: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(g)
