"""Which factorization serves: the cheapest one that can be trusted with the rank."""

import torch
from torch import Tensor

from ..checks import all_finite
from .cholesky import by_cholesky
from .eigen import by_eigenvalues
from .factorization import Factorization, NoFactorization
from .pivoted import by_pivots

# Up to these n the eigenvalue decomposition is as fast as the factorization and the estimates that make it trustworthy.
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
    firm: bool = True,
) -> Factorization:
    """Factor Θ with its rank revealed, for many shifts and right-hand sides.

    Args:
        matrix: Θ ``[n, n]``, symmetric and positive semi-definite, float64; kept, not copied, so it has to stay as it is.
        rtol: Singular values of D up to ``rtol``·σ_max count as zero, that is, eigenvalues of Θ up to its square.
        method: ``"auto"`` or ``"eigh"``, see `solve_kernel`.
        least_shift: The smallest shift that will be solved with. A large one spares the eigenvalue decomposition of a Θ whose
            rank is ambiguous; the rank is then an estimate.
        firm: Directions below the cut are left out whatever the shift. Else they are for the sake of rounding alone: where a
            shift is far above that, they count.
        eps: Relative rounding of the entries of Θ; a more negative eigenvalue than that explains is an error.

    Returns:
        The factorization; its ``status`` tells of a failure.

    Raises:
        ValueError: Θ has a negative eigenvalue beyond rounding.
    """
    if not all_finite(matrix):
        return NoFactorization(len(matrix), "not_finite")
    if method == "auto" and len(matrix) > _CHOLESKY_PAYS:
        try:
            factorization: Factorization | None = by_cholesky(matrix, rtol)
            if factorization is None and (len(matrix) > _PIVOTS_PAY or (least_shift > 0 and not firm)):
                factorization = by_pivots(matrix, rtol, least_shift, firm)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of numbers near the ends of float64's range
            factorization = None
        if factorization is not None:
            return factorization
    return by_eigenvalues(matrix, rtol, eps, firm)
