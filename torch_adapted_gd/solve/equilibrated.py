"""DᵀD whose columns have very different sizes, as for parameters in different units."""

from torch import Tensor

from .choice import factorize
from .cholesky import apply_inverse, shifted_cholesky
from .factorization import Factorization

_UNEVEN = 1e4  # ratio of diagonal entries from which it is tried


class EquilibratedFactorization(Factorization):
    """M = E⁻¹M̂E⁻¹ of full rank, M̂ with a diagonal of ones: its rank does not depend on the units of the parameters.

    Args:
        unit: M̂.
        found: The factorization of M̂.
        e: The diagonal of E.
    """

    def __init__(self, unit: Tensor, found: Factorization, e: Tensor) -> None:
        super().__init__(len(unit), found.rank, found.condition)
        self._unit, self._found, self._e = unit, found, e[:, None]
        self._shift, self._factor = 0.0, unit
        self.method = f"equilibrated {found.method}"

    def _solve_on_range(self, g: Tensor, shift: float) -> Tensor:
        """E(M̂ + λE²)⁻¹Eg."""
        if shift == 0:
            return self._e * self._found.solve(self._e * g)
        if shift != self._shift:
            self._shift, self._factor = shift, shifted_cholesky(self._unit, shift * self._e[:, 0] ** 2)
        return self._e * apply_inverse(self._factor, self._e * g)

    def _project(self, g: Tensor) -> Tensor:
        """The same g."""
        return g


def equilibrated(matrix: Tensor, found: Factorization, *, rtol: float, method: str, truncate: bool) -> Factorization:
    """The factorization ``found`` of DᵀD, or that of M̂ where only the units make the rank of DᵀD short.

    Args:
        matrix: DᵀD.
        found: What `factorize` made of it.
        rtol: See `factorize`.
        method: See `factorize`.
        truncate: See `factorize`.
    """
    if found.status != "rank_deficient":
        return found
    diagonal = matrix.diagonal()
    least = float(diagonal.min())
    if not least > 0 or float(diagonal.max()) <= _UNEVEN * least:
        return found
    e = diagonal.rsqrt()
    unit = matrix * e[:, None] * e
    scaled = factorize(unit, rtol=rtol, method=method, truncate=truncate)
    return EquilibratedFactorization(unit, scaled, e) if scaled.status == "full_rank" else found
