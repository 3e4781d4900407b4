"""Least squares with the rank revealed, the same on every device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import all_finite, real_number, real_tensor
from .cholesky import apply_inverse
from .factorization import Status
from .singular import Reflections, by_singular_values
from .spectrum import EPS, largest_eigenvalue, random_block

_MARGIN = 10.0  # how far above the cut the smallest singular value has to be for R to be used without its SVD


@dataclass(frozen=True)
class LeastSquares:
    """Result of `rank_revealing_lstsq`. A failure is a value: ``status`` says what failed, and ``solution`` is zero.

    Attributes:
        solution: x ``[n]`` or ``[n, k]`` in A's dtype: of all that make |Ax − b| smallest, the one of least norm.
        residual_norm: |Ax − b|, a number ``[]`` or one for each column, ``[k]``, float64; NaN after a failure.
        rank: Number of singular values of A counted as nonzero.
        condition: σ_max/σ_min over those; NaN when the rank is 0. Exact by ``"svd"``; by ``"qr"`` an estimate from below,
            mostly within a third.
        status: ``"full_rank"`` (rank min(m, n)), ``"rank_deficient"``, ``"zero"`` (A = 0 or empty), ``"not_finite"`` (A, b or x
            has NaN or infinite entries) or ``"not_converged"`` (the routine for singular values failed).
        method: ``"qr"``, ``"svd"`` or ``"none"``.
    """

    solution: Tensor
    residual_norm: Tensor
    rank: int
    condition: float
    status: Status
    method: str


@torch.no_grad()
def rank_revealing_lstsq(a: Tensor, b: Tensor, *, rtol: float | None = None) -> LeastSquares:
    """Solve min |Ax − b| for the x of least norm, x = A⁺b, for A of any shape and rank.

    Singular values σ ≤ ``rtol``·σ_max count as zero. If an estimate of the condition shows that the rank is full by a wide
    margin, x comes from the Householder factorization of A (of Aᵀ if A is wide), x = R⁻¹Qᵀb. Otherwise it comes from the
    singular values of A. AᵀA is never formed, so the condition number is not squared. CPU and CUDA take the same steps.
    (``torch.linalg.lstsq`` on CUDA assumes full rank and is wrong without it.) All is computed in float64, and the solution is
    rounded to A's dtype. Gradients are not tracked through it.

    Args:
        a: A ``[m, n]``, float32 or float64; may be empty.
        b: ``[m]``, or ``[m, k]`` for k right-hand sides; real, used in float64.
        rtol: The relative cut on the singular values; by default max(m, n)·ε with ε of A's dtype, as in ``torch.linalg.pinv``
            and ``numpy.linalg.lstsq``.

    Returns:
        The solution with its rank, condition and status.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A shape does not fit, or ``rtol`` is out of range.

    Example:
        >>> a = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])  # rank 1
        >>> found = rank_revealing_lstsq(a, torch.tensor([1.0, 3.0, 1.0]))
        >>> found.solution, found.rank, found.status
        (tensor([1., 1.]), 1, 'rank_deficient')
        >>> round(float(found.residual_norm) ** 2, 3)
        3.0
    """
    real_tensor("a", a, precise=True)
    real_tensor("b", b)
    if a.ndim != 2:
        raise ValueError(f"`a` should be a matrix [m, n], but got {list(a.shape)}. Solve a batch one matrix at a time.")
    if b.ndim not in (1, 2) or len(b) != len(a):
        raise ValueError(
            f"`b` should be [m] or [m, k] with m = {len(a)}, the rows of `a`, but got {list(b.shape)}. A column each."
        )
    m, n = a.shape
    rtol = max(m, n) * torch.finfo(a.dtype).eps if rtol is None else real_number("rtol", rtol, low=0.0, below=1.0)
    matrix, right = a.double(), (b if b.ndim == 2 else b[:, None]).to(a.device, torch.float64)
    shape = (n, *b.shape[1:])

    def failure(status: Status) -> LeastSquares:
        norm = torch.linalg.vector_norm(right, dim=0) if status == "zero" else right.new_full(right.shape[1:], math.nan)
        return LeastSquares(a.new_zeros(shape), norm.reshape(b.shape[1:]), 0, math.nan, status, "none")

    if not (all_finite(matrix) and all_finite(right)):
        return failure("not_finite")
    scale = float(matrix.abs().max()) if matrix.numel() else 0.0
    if scale == 0:
        return failure("zero")
    unit = matrix / scale  # so that no square of an entry overflows
    wide = m < n
    packed, reflections = torch.geqrf(unit.mT if wide else unit)
    q, r = Reflections(packed, reflections), packed[: min(m, n)].triu()  # A = QR, or Aᵀ = QR
    try:
        condition = _condition(r)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return failure("not_converged")
    rank, method = min(m, n), "qr"
    if not condition * _MARGIN * max(rtol, max(m, n) * EPS) < 1:  # written so that NaN fails
        svd = by_singular_values(unit, rtol)
        if svd.status == "not_converged":
            return failure("not_converged")
        x, rank, condition, method = svd.step(right), svd.rank, svd.condition, "svd"
    elif wide:
        x = q @ torch.linalg.solve_triangular(r.mT, right, upper=False)
    else:
        x = torch.linalg.solve_triangular(r, q.T @ right, upper=True)
    x = x / scale
    solution = x.to(a.dtype)
    if not all_finite(solution):  # near the ends of the dtype's range
        return failure("not_finite")
    norm = torch.linalg.vector_norm(matrix @ x - right, dim=0)
    status: Status = "full_rank" if rank == min(m, n) else "rank_deficient"
    return LeastSquares(solution.reshape(shape), norm.reshape(b.shape[1:]), rank, condition, status, method)


def _condition(r: Tensor) -> float:
    """σ_max/σ_min of a triangular R, estimated from below; NaN or infinite for a singular R."""
    if not bool(r.diagonal().all()):
        return math.inf
    start = random_block(r)
    if not all_finite(apply_inverse(r.mT, start)):  # (RᵀR)⁻¹
        return math.inf
    largest = largest_eigenvalue(lambda block: r.mT @ (r @ block), start)
    return math.sqrt(largest * largest_eigenvalue(lambda block: apply_inverse(r.mT, block), start))
