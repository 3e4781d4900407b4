"""Pivoted Cholesky's factorization, for a Θ whose rank is short and unambiguous."""

import math

import torch
from torch import Tensor

from .cholesky import apply_inverse, shifted_cholesky
from .factorization import Factorization
from .pivots import Pivots, pivoted_cholesky
from .spectrum import EPS, MARGIN, largest_eigenvalue, random_block

_ACCURACY = 1e-9  # largest relative change of ψ by a remainder that exceeds the rounding of Θ
_ROUNDINGS = 10.0  # that rounding, in units of n·ε·λ_max: elimination adds to it
# With a shift this far above the cut and the remainder, neither matters: a direction of eigenvalue σ² has the gain σ/λ
# there, at most 2√(σ²/λ) = 0.002 of the 1/(2√λ) of directions with σ² = λ.
_SMOOTH = 1e6


class PivotedFactorization(Factorization):
    """Θ[p, p] = WᵀW with W = R[1 X] ``[r, n]``, R triangular.

    ran Θ is the range of [1 X]ᵀ, and the null space that of [−X; 1]; the projector P is made with the smaller of the two. The
    choice of the pivots keeps entries of X moderate, so P costs little accuracy. No condition is squared: on ran Θ, the inverse
    of Θ is P E(RᵀR)⁻¹EᵀP with E the first r coordinates.
    """

    method = "pivoted_cholesky"

    def __init__(self, matrix: Tensor, pivots: Pivots, largest: float, truncate: bool) -> None:
        rank, n = pivots.rows.shape
        super().__init__(n, rank, math.nan, exact_from=math.inf if truncate else MARGIN * n * EPS * largest)
        self._matrix, self._order, self._largest = matrix, pivots.order, largest
        self._triangle = pivots.rows[:, :rank].contiguous()  # R [r, r]; a slice would be copied by each triangular solve
        self._rest = pivots.rows[:, rank:].contiguous()  # RX [r, n - r]
        self._mixing: Tensor = torch.linalg.solve_triangular(self._triangle, self._rest, upper=True)  # X [r, n - r]
        self._by_null_space = n - rank < rank
        gram = self._mixing.mT @ self._mixing if self._by_null_space else self._mixing @ self._mixing.mT
        gram.diagonal().add_(1)
        self._gram = torch.linalg.cholesky_ex(gram)[0]
        self._shift = 0.0
        self._shifted: Tensor | None = None  # the factor for this shift, of Θ or of WWᵀ: the shift decides which
        self._small: Tensor | None = None  # WWᵀ [r, r], whose eigenvalues are those of Θ

    def _solve_on_range(self, g: Tensor, shift: float) -> Tensor:
        """ψ, refined once with Θ itself in place of its factor: a third to a sixth of the error where λ is small."""
        right = self._project(g)
        psi = self.rough_solve(right, shift)
        residual = right - self._matrix @ psi - shift * psi
        return psi + self.rough_solve(self._project(residual), shift)

    def _solve_exactly(self, g: Tensor, shift: float) -> Tensor:
        """By the Cholesky factor of Θ + λ1, which no rounding of Θ makes singular."""
        return apply_inverse(self._factor(self._matrix, shift), g)

    def _project(self, g: Tensor) -> Tensor:
        """Pg by least squares in the basis of ran Θ or of its complement."""
        ordered = g[self._order]
        first, last = ordered[: self.rank], ordered[self.rank :]
        if self._by_null_space:
            inner = apply_inverse(self._gram, last - self._mixing.mT @ first)
            return self._restore(ordered - torch.cat([-self._mixing @ inner, inner]))
        inner = apply_inverse(self._gram, first + self._mixing @ last)
        return self._restore(torch.cat([inner, self._mixing.mT @ inner]))

    def rough_solve(self, right: Tensor, shift: float = 0.0) -> Tensor:
        """ψ for a block ``[n, k]`` in ran Θ, by the factors alone."""
        first = right[self._order[: self.rank]]  # [r, k]
        middle = torch.linalg.solve_triangular(self._triangle.mT, first, upper=False)
        if shift == 0:
            basic = torch.linalg.solve_triangular(self._triangle, middle, upper=True)
            return self._project(self._restore(torch.cat([basic, basic.new_zeros(self.size - self.rank, basic.shape[1])])))
        # (WWᵀ + λ)⁻¹ costs 2nr², (Θ + λ)⁻¹ n³/3, which needs a λ that Θ's rounding is small against.
        if 2 * self.rank > self.size and shift >= MARGIN * self.size * EPS * self._largest:
            return self._project(apply_inverse(self._factor(self._matrix, shift), right))
        if self._small is None:
            self._small = self._triangle @ self._triangle.mT + self._rest @ self._rest.mT
        return self._columns(apply_inverse(self._factor(self._small, shift), middle))

    def remainder(self, block: Tensor) -> Tensor:
        """(Θ − LLᵀ) applied to a block ``[n, k]``."""
        ordered = block[self._order]
        middle = self._triangle @ ordered[: self.rank] + self._rest @ ordered[self.rank :]
        return self._matrix @ block - self._columns(middle)

    def _factor(self, matrix: Tensor, shift: float) -> Tensor:
        """The Cholesky factor of Θ or WWᵀ with a shift, kept for the next solution."""
        if shift != self._shift or self._shifted is None:
            self._shift, self._shifted = shift, shifted_cholesky(matrix, shift)
        return self._shifted

    def _columns(self, block: Tensor) -> Tensor:
        """L = Wᵀ applied to a block ``[r, k]``."""
        return self._restore(torch.cat([self._triangle.mT @ block, self._rest.mT @ block]))

    def _restore(self, block: Tensor) -> Tensor:
        """From the order of the pivots to that of Θ."""
        return torch.empty_like(block).index_copy_(0, self._order, block)


def by_pivots(matrix: Tensor, rtol: float, shift: float, truncate: bool) -> PivotedFactorization | None:
    """Θ by pivoted Cholesky, if its rank is unambiguous or ``shift`` makes the rank irrelevant; else None.

    With a remainder S = Θ − LLᵀ, at most r eigenvalues of Θ are above |S|, and at least r are as large as λ_min(LᵀL). If
    the cut is between the two, and far below the latter, the rank is r.
    """
    n = len(matrix)
    start = random_block(matrix)
    largest = largest_eigenvalue(lambda block: matrix @ block, start)
    rounding = n * EPS * largest
    noise = max(rtol**2 * largest, rounding)
    exact = not truncate and shift >= MARGIN * rounding  # solved by the Cholesky factor of Θ + λ1, whatever the rank
    smooth = exact or shift >= _SMOOTH * noise
    pivots = pivoted_cholesky(matrix, noise)
    if pivots is None or not len(pivots.rows):
        return None
    found = PivotedFactorization(matrix, pivots, largest, truncate)
    remainder = largest_eigenvalue(found.remainder, start)
    smallest = 1 / largest_eigenvalue(lambda block: found.rough_solve(found.project(block)), start)
    unambiguous = smallest >= MARGIN * noise and remainder <= max(rtol**2 * largest, _ROUNDINGS * rounding)
    accurate = remainder <= max(_ROUNDINGS * rounding, _ACCURACY * max(smallest, shift))
    if not ((unambiguous and accurate) or exact or (smooth and shift >= _SMOOTH * remainder)):
        return None
    found.condition = math.sqrt(largest / smallest)
    return found
