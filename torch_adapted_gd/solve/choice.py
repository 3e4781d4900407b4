"""Which factorization serves: the cheapest one that can be trusted with the rank."""

import torch
from torch import Tensor

from ..checks import all_finite
from .cholesky import by_cholesky
from .eigen import by_eigenvalues
from .factorization import Factorization, NoFactorization

_EIGH_IS_CHEAP = 128  # up to this n the eigenvalue decomposition takes a millisecond or so


def factorize(matrix: Tensor, *, rtol: float, method: str = "auto", eps: float | None = None) -> Factorization:
    """Factor Θ with its rank revealed, for many shifts and right-hand sides.

    Args:
        matrix: Θ ``[n, n]``, symmetric and positive semi-definite, float64; kept, not copied, so it has to stay as it is.
        rtol: Singular values of D up to ``rtol``·σ_max count as zero, that is, eigenvalues of Θ up to its square.
        method: ``"auto"`` or ``"eigh"``, see `solve_kernel`.
        eps: Relative rounding of the entries of Θ; a more negative eigenvalue than that explains is an error.

    Returns:
        The factorization; its ``status`` tells of a failure.

    Raises:
        ValueError: Θ has a negative eigenvalue beyond rounding.
    """
    if not all_finite(matrix):
        return NoFactorization(len(matrix), "not_finite")
    if method == "auto" and len(matrix) > _EIGH_IS_CHEAP:
        try:
            factorization = by_cholesky(matrix, rtol)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of numbers near the ends of float64's range
            factorization = None
        if factorization is not None:
            return factorization
    return by_eigenvalues(matrix, rtol, eps)
