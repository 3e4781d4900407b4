"""DᵀD whose columns have very different sizes, as parameters in different units give them."""

import math

import torch
from torch import Tensor

from .choice import factorize
from .cholesky import apply_inverse
from .factorization import Factorization

_UNEVEN = 1e4  # ratio of diagonal entries from which it is tried


class EquilibratedFactorization(Factorization):
    """M = E⁻¹M̂E⁻¹ of full rank, M̂ with a diagonal of ones: its rank does not depend on the units of the parameters.

    Args:
        matrix: M.
        scaled: The factorization of M̂.
        e: The diagonal of E.
    """

    def __init__(self, matrix: Tensor, scaled: Factorization, e: Tensor) -> None:
        super().__init__(len(matrix), scaled.rank, scaled.condition)
        self._scaled, self._e = scaled, e
        self._unit = matrix * e[:, None] * e
        self._shift, self._factor = 0.0, self._unit
        self.method = f"equilibrated {scaled.method}"

    def _solve_on_range(self, g: Tensor, shift: float) -> Tensor:
        """E(M̂ + λE²)⁻¹Eg."""
        e = self._e if g.ndim == 1 else self._e[:, None]
        if shift == 0:
            return e * self._scaled.solve(e * g)
        if shift != self._shift:
            shifted = self._unit + torch.diag(shift * self._e**2)
            factor, info = torch.linalg.cholesky_ex(shifted)
            self._shift, self._factor = shift, torch.full_like(factor, math.nan) if int(info) else factor
        right = e * g
        return e * apply_inverse(self._factor, right if g.ndim == 2 else right[:, None]).reshape(g.shape)

    def project(self, g: Tensor) -> Tensor:
        """The same g."""
        return g


def equilibrated(matrix: Tensor, found: Factorization, *, rtol: float, method: str, firm: bool) -> Factorization:
    """What `factorize` found of DᵀD, or better: a rank that is short for the units' sake alone is full.

    Args:
        matrix: DᵀD.
        found: Its factorization.
        rtol: See `factorize`, like the others.
        method: See there.
        firm: See there.
    """
    diagonal = matrix.diagonal()
    if found.status != "rank_deficient" or not bool((diagonal > 0).all()):
        return found
    if float(diagonal.max()) <= _UNEVEN * float(diagonal.min()):
        return found
    e = diagonal.rsqrt()
    scaled = factorize(matrix * e[:, None] * e, rtol=rtol, method=method, firm=firm)
    return EquilibratedFactorization(matrix, scaled, e) if scaled.status == "full_rank" else found
