"""The eigenvalue decomposition of Θ, which reveals any rank."""

import math

import torch
from torch import Tensor

from .factorization import Factorization, NoFactorization
from .spectrum import EPS


class EighFactorization(Factorization):
    """Θ = Σ σ²vvᵀ over the eigenvalues kept."""

    method = "eigh"

    def __init__(self, size: int, kept: Tensor, basis: Tensor) -> None:
        rank = len(kept)  # kept [r] ascending, basis [n, r]
        super().__init__(size, rank, math.sqrt(float(kept[-1]) / float(kept[0])) if rank else math.nan)
        self._kept, self._basis = kept, basis

    def solve(self, g: Tensor, shift: float = 0.0) -> Tensor:
        """ψ = Σ v(vᵀg)/(σ² + λ)."""
        scale = self._kept + shift
        return self._basis @ ((self._basis.T @ g) / (scale if g.ndim == 1 else scale[:, None]))

    def project(self, g: Tensor) -> Tensor:
        """Σ v(vᵀg)."""
        return self._basis @ (self._basis.T @ g)


def by_eigenvalues(matrix: Tensor, rtol: float, eps: float | None) -> Factorization:
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
    return EighFactorization(n, eigenvalues[n - rank :], vectors[:, n - rank :])
