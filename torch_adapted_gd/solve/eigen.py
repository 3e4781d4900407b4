"""The eigenvalue decomposition of Θ, which reveals any rank."""

import math

import torch
from torch import Tensor

from .factorization import Factorization, NoFactorization
from .spectrum import EPS, MARGIN


class EighFactorization(Factorization):
    """Θ = Σ σ²vvᵀ over the eigenvalues kept."""

    method = "eigh"

    def __init__(self, eigenvalues: Tensor, vectors: Tensor, rank: int, exact_from: float) -> None:
        kept = eigenvalues[len(eigenvalues) - rank :]  # [r] ascending
        condition = math.sqrt(float(kept[-1]) / float(kept[0])) if rank else math.nan
        super().__init__(len(eigenvalues), rank, condition, exact_from=exact_from)
        self._eigenvalues, self._vectors = eigenvalues, vectors
        self._kept, self._basis = kept, vectors[:, len(eigenvalues) - rank :]  # basis [n, r]

    def _solve_on_range(self, g: Tensor, shift: float) -> Tensor:
        """ψ = Σ v(vᵀg)/(σ² + λ)."""
        return self._basis @ ((self._basis.T @ g) / (self._kept + shift)[:, None])

    def _solve_exactly(self, g: Tensor, shift: float) -> Tensor:
        """The same over all eigenvalues."""
        return self._vectors @ ((self._vectors.T @ g) / (self._eigenvalues.clamp(min=0) + shift)[:, None])

    def _project(self, g: Tensor) -> Tensor:
        """Σ v(vᵀg)."""
        return self._basis @ (self._basis.T @ g)


def by_eigenvalues(matrix: Tensor, rtol: float, eps: float | None, truncate: bool) -> Factorization:
    """Θ by its eigenvalues; see `factorize` for the arguments.

    Raises:
        ValueError: Θ has a negative eigenvalue beyond rounding.
    """
    n = len(matrix)
    try:
        eigenvalues, vectors = torch.linalg.eigh(matrix)  # ascending; vectors [n, n], one a column
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return NoFactorization(n, "not_converged")
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    if smallest < -1e2 * n * (eps or EPS) * max(largest, -smallest):
        raise ValueError(f"`theta` should be positive semi-definite, but has the eigenvalue {smallest:.3g}.")
    rank = int((eigenvalues > rtol**2 * largest).sum()) if largest > 0 else 0
    exact_from = math.inf if truncate or not rank else MARGIN * n * EPS * largest
    return EighFactorization(eigenvalues, vectors, rank, exact_from)
