"""Chooses the factorization: the cheapest whose rank can be trusted."""

import torch
from torch import Tensor

from ..checks import all_finite
from .cholesky import by_cholesky
from .eigen import by_eigenvalues
from .factorization import Factorization, NoFactorization
from .pivoted import by_pivots

# Up to these n the eigenvalue decomposition is as fast as a factorization and its condition estimates.
_CHOLESKY_PAYS = 128
_PIVOTS_PAY = 512


@torch.no_grad()
def factorize(
    matrix: Tensor,
    *,
    rtol: float,
    method: str = "auto",
    eps: float | None = None,
    least_shift: float = 0.0,
    truncate: bool = True,
) -> Factorization:
    """Factor Θ with its rank revealed, for many shifts and right-hand sides.

    Args:
        matrix: Θ ``[n, n]``, symmetric and positive semi-definite, float64. It is not copied and must not change.
        rtol: Singular values of D up to ``rtol``·σ_max count as zero: eigenvalues of Θ up to its square.
        method: ``"auto"`` or ``"eigh"``, see `solve_kernel`.
        eps: Relative rounding of the entries of Θ; an eigenvalue more negative than that is an error.
        least_shift: The smallest shift that will be solved with. If it is large, an ambiguous rank is estimated, without
            the eigenvalue decomposition.
        truncate: Leave out directions below the cut for every shift. If False, only for shifts that rounding of Θ may exceed.

    Returns:
        The factorization; its ``status`` tells of a failure.

    Raises:
        ValueError: Θ has a negative eigenvalue beyond rounding.
    """
    if not all_finite(matrix):
        return NoFactorization(len(matrix), "not_finite")
    if method == "auto" and len(matrix) > _CHOLESKY_PAYS:
        try:
            found: Factorization | None = by_cholesky(matrix, rtol)
            if found is None and (len(matrix) > _PIVOTS_PAY or (least_shift > 0 and not truncate)):
                found = by_pivots(matrix, rtol, least_shift, truncate)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of numbers near the ends of float64's range
            found = None
        if found is not None:
            return found
    return by_eigenvalues(matrix, rtol, eps, truncate)
