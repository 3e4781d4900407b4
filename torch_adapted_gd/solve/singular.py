"""The singular value decomposition of D itself, which reveals what squaring D loses."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import all_finite
from .factorization import Factorization, Status
from .spectrum import EPS

_FIRST, _THIRD = 128, 3  # columns of the first sketch: as many, or a third of the rows
_SHORT = 0.75  # share of the rows from which all of them take no longer
_WATCHED = 16  # its last columns, which tell whether anything is left


class SingularValueFactorization(Factorization):
    """D = UΣVᵀ over the singular values kept: D⁺ without Θ, so that σ counts down to ε·σ_max, not √ε·σ_max.

    A step is VΣ(Σ² + λ)⁻¹Uᵀg. It is never made as Dᵀψ: where σ is small, ψ is so large that the rounding of Dᵀψ would be
    larger than what is wanted.
    """

    method = "svd"

    def __init__(self, rows: int, left: "Factors", values: Tensor, right: "Factors", status: Status | None = None) -> None:
        rank = len(values)
        super().__init__(rows, rank, float(values[0] / values[-1]) if rank else math.nan, status)
        self._left, self._values, self._right = left, values, right

    def step(self, g: Tensor, shift: float = 0.0) -> Tensor:
        """Dᵀ(DDᵀ + λ1)⁻¹Pg, ``[K]``, or ``[K, k]`` for several g ``[R, k]``."""
        gain = (self._values / (self._values**2 + shift)).view(-1, *[1] * (g.ndim - 1))
        return self._right.combined(self._left.components(g) * gain)

    def __matmul__(self, v: Tensor) -> Tensor:
        """DᵀDv, ``[K]``."""
        return self._right.combined(self._right.components(v) * self._values**2)

    def _solve_on_range(self, g: Tensor, shift: float) -> Tensor:
        """ψ = U(Σ² + λ)⁻¹Uᵀg."""
        return self._left.combined(self._left.components(g) / (self._values**2 + shift)[:, None])

    def _project(self, g: Tensor) -> Tensor:
        """UUᵀg."""
        return self._left.combined(self._left.components(g))


@dataclass(frozen=True)
class Factors:
    """Singular vectors, the columns of a matrix with orthonormal columns: ``basis @ within``, which is not multiplied out."""

    basis: "Tensor | Reflections | None"
    within: Tensor

    def components(self, v: Tensor) -> Tensor:
        """The products of the columns with v."""
        return self.within.T @ (v if self.basis is None else self.basis.T @ v)

    def combined(self, weights: Tensor) -> Tensor:
        """Their sum with these weights."""
        inner = self.within @ weights
        return inner if self.basis is None else self.basis @ inner


@dataclass(frozen=True)
class Reflections:
    """Q ``[k, r]`` of a QR decomposition as a product of reflections: to write it out takes longer than the decomposition."""

    packed: Tensor
    scales: Tensor
    transposed: bool = False

    @property
    def T(self) -> "Reflections":  # noqa: N802
        """Qᵀ."""
        return Reflections(self.packed, self.scales, not self.transposed)

    def __matmul__(self, v: Tensor) -> Tensor:
        """Q or Qᵀ times a vector, or columns."""
        columns = v if v.ndim == 2 else v[:, None]
        if self.transposed:
            found = torch.ormqr(self.packed, self.scales, columns, transpose=True)[: len(self.scales)]
        else:
            padding = columns.new_zeros(len(self.packed) - len(columns), columns.shape[1])
            found = torch.ormqr(self.packed, self.scales, torch.cat([columns, padding]))
        return found if v.ndim == 2 else found[:, 0]


@torch.no_grad()
def by_singular_values(matrix: Tensor, rtol: float) -> SingularValueFactorization:
    """D by its singular values above ``rtol``·σ_max.

    Where these are few, a basis of their range is found from products with vectors of random signs (Halko, Martinsson & Tropp,
    arXiv:0909.4061), which costs 2RKr operations in place of 2RK·min(R, K). The last of these products tell what is left.

    Args:
        matrix: D ``[R, K]``, float64.
        rtol: Relative size below which a singular value counts as zero.

    Returns:
        The factorization; its ``status`` tells of a failure, and then nothing of it is kept.
    """
    rows = len(matrix)
    if not all_finite(matrix):
        return _none(matrix, "not_finite")
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.T
    try:
        basis = _range(short, rtol)  # [m, r]
        inner = short if basis is None else basis.T @ short
        packed, scales = torch.geqrf(inner.T)  # short.T = (reflections)(triangle)(basis.T)
        first, values, second = torch.linalg.svd(packed[: len(inner)].triu().T, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return _none(matrix, "not_converged")
    kept = values > rtol * values[0] if len(values) and values[0] > 0 else values > 0
    left, right = Factors(basis, first[:, kept]), Factors(Reflections(packed, scales), second.T[:, kept])
    return SingularValueFactorization(rows, *((left, values[kept], right) if wide else (right, values[kept], left)))


def _none(matrix: Tensor, status: Status) -> SingularValueFactorization:
    left, right = (Factors(None, matrix.new_empty(size, 0)) for size in matrix.shape)
    return SingularValueFactorization(len(matrix), left, matrix.new_empty(0), right, status)


def default_svd_rtol(shape: tuple[int, int], eps: float = 0.0) -> float:
    """Relative size below which a singular value of D is lost in the rounding of D.

    Args:
        shape: R and K.
        eps: Machine epsilon of the arithmetic that D was computed in.
    """
    return max(max(shape) * EPS, eps)


def _range(matrix: Tensor, rtol: float) -> Tensor | None:
    """A basis ``[m, r]`` of the range of a matrix ``[m, k]`` but for singular values below the cut; None if r is near m."""
    m, k = matrix.shape
    generator = torch.Generator("cpu").manual_seed(0)
    basis = matrix.new_empty(m, 0)
    width, largest = max(_FIRST, m // _THIRD), 0.0
    while basis.shape[1] + width <= _SHORT * m:
        signs = torch.randint(2, (k, width), generator=generator, dtype=torch.int8, device="cpu")  # faster than others to draw
        image = matrix @ signs.to(matrix).mul_(2).sub_(1)
        found, triangle = torch.linalg.qr(image - basis @ (basis.T @ image))
        if basis.shape[1]:  # again, for what rounding left of it
            found = torch.linalg.qr(found - basis @ (basis.T @ found)).Q
        sizes = triangle.diagonal().abs()
        largest = max(largest, float(sizes.max()))
        small = ~(sizes > rtol * largest)
        done = bool(small[-_WATCHED:].all())
        if done:  # without the columns that found nothing, but for as many as tell so
            found = found[:, : width - int(small.flip(0).cumprod(0).sum()) + _WATCHED]
        basis = torch.cat([basis, found], 1)
        if done:
            return basis
        width = max(_FIRST, basis.shape[1] // 4)
    return None
