"""Least squares with the rank revealed, the same on every device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import all_finite, real_number
from .factorization import Status
from .spectrum import EPS, largest_eigenvalue, random_block

_MARGIN = 10.0  # how far the smallest singular value has to be from what counts as zero for R to be trusted without its SVD


@dataclass(frozen=True)
class LeastSquares:
    """What `rank_revealing_lstsq` found. A failure is a value here: ``status`` says so and ``solution`` is zero.

    Attributes:
        solution: x ``[n]`` or ``[n, k]`` in A's dtype: of all that make |Ax − b| smallest, the one of least norm.
        residual_norm: |Ax − b|, a number ``[]`` or one for each column, ``[k]``, float64; NaN after a failure.
        rank: Number of singular values of A counted as nonzero.
        condition: σ_max/σ_min over those; NaN when the rank is 0. By ``"svd"`` it is computed, by ``"qr"`` estimated, from
            below and mostly within a third.
        status: ``"full_rank"`` (rank min(m, n)), ``"rank_deficient"``, ``"zero"`` (A = 0 or empty), ``"not_finite"`` (A, b or x
            has NaN or infinite entries) or ``"not_converged"`` (the routine for singular values gave up).
        method: ``"qr"`` or ``"svd"``, what served, or ``"none"``.
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

    Singular values σ ≤ ``rtol``·σ_max count as zero. With the Householder factorization A = QR (of Aᵀ where A is wide),
    x = R⁻¹Qᵀb serves where an estimate of R's condition says that the rank is full by a wide margin; if not, the singular
    values of R reveal it. AᵀA is never formed, so that the condition number is not squared. The steps are the same on CPU and
    CUDA, where ``torch.linalg.lstsq`` assumes full rank and is wrong without it. All is computed in float64 and the solution
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
    for name, tensor in (("a", a), ("b", b)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}` should be a tensor, but got {type(tensor).__name__}. Convert it with torch.as_tensor.")
        if tensor.dtype not in (torch.float32, torch.float64) and (name == "a" or tensor.is_complex()):
            raise TypeError(f"`{name}` should be float32 or float64, but is {tensor.dtype}. Convert it first.")
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
        norm = torch.linalg.vector_norm(right, dim=0) if status == "zero" else torch.full_like(right[:1].sum(0), math.nan)
        return LeastSquares(a.new_zeros(shape), norm.reshape(b.shape[1:]), 0, math.nan, status, "none")

    if not (all_finite(matrix) and all_finite(right)):
        return failure("not_finite")
    scale = float(matrix.abs().max()) if matrix.numel() else 0.0
    if scale == 0:
        return failure("zero")
    factors = _Householder(matrix / scale)  # no square of an entry overflows
    kept, rank, method = None, min(m, n), "qr"
    try:
        condition = factors.condition()
        if not condition * _MARGIN * max(rtol, max(m, n) * EPS) < 1:  # written so that NaN fails
            method = "svd"
            u, sigma, v = torch.linalg.svd(factors.triangle)  # descending
            rank = int((sigma > rtol * sigma[0]).sum())
            condition = float(sigma[0] / sigma[rank - 1])
            kept = u[:, :rank], sigma[:rank, None], v[:rank].mT
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return failure("not_converged")
    x = factors.solve(right, kept) / scale
    solution = x.to(a.dtype)
    if not all_finite(solution):  # near the ends of the dtype's range
        return failure("not_finite")
    norm = torch.linalg.vector_norm(matrix @ x - right, dim=0)
    status: Status = "full_rank" if rank == min(m, n) else "rank_deficient"
    return LeastSquares(solution.reshape(shape), norm.reshape(b.shape[1:]), rank, condition, status, method)


class _Householder:
    """A or, where it is wide, Aᵀ as QR, with Q kept in Householder vectors."""

    def __init__(self, matrix: Tensor) -> None:
        self.wide = matrix.shape[0] < matrix.shape[1]
        self._packed, self._tau = torch.geqrf(matrix.mT if self.wide else matrix)
        self._short = self._packed.shape[1]
        self.triangle = self._packed[: self._short].triu()  # R [s, s], s = min(m, n)

    def condition(self) -> float:
        """σ_max/σ_min of R, estimated from below; NaN or infinite for one that is singular."""
        r, start = self.triangle, random_block(self.triangle)
        if not bool(r.diagonal().all()):
            return math.inf
        largest = largest_eigenvalue(lambda block: r.mT @ (r @ block), start)

        def inverse(block: Tensor) -> Tensor:  # of RᵀR
            half: Tensor = torch.linalg.solve_triangular(r.mT, block, upper=False)
            image: Tensor = torch.linalg.solve_triangular(r, half, upper=True)
            return image

        if not all_finite(inverse(start)):
            return math.inf
        return math.sqrt(largest * largest_eigenvalue(inverse, start))

    def solve(self, right: Tensor, kept: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """R⁻¹Qᵀb, or QR⁻ᵀb where A is wide, with R⁻¹ by ``kept`` parts of its singular value decomposition if given."""
        image = right if self.wide else torch.ormqr(self._packed, self._tau, right, transpose=True)[: self._short]
        if kept is not None:
            u, sigma, v = kept
            x = u @ ((v.mT @ image) / sigma) if self.wide else v @ ((u.mT @ image) / sigma)
        elif self.wide:
            x = torch.linalg.solve_triangular(self.triangle.mT, image, upper=False)
        else:
            x = torch.linalg.solve_triangular(self.triangle, image, upper=True)
        if not self.wide:
            return x
        padded = torch.cat([x, x.new_zeros(len(self._packed) - self._short, x.shape[1])])
        return torch.ormqr(self._packed, self._tau, padded)
