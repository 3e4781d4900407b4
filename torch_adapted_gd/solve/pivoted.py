"""Pivoted Cholesky's factorization, for a Θ whose rank is short and unambiguous."""

import math

import torch
from torch import Tensor

from .cholesky import apply_inverse, shifted_cholesky
from .factorization import Factorization
from .pivots import Pivots, pivoted_cholesky
from .spectrum import EPS, MARGIN, largest_eigenvalue, random_block

_ACCURACY = 1e-9  # what the remainder may change ψ by, relatively, where it is more than the rounding of Θ explains
_ROUNDINGS = 10.0  # that rounding, in units of n·ε·λ_max: elimination adds to it
# A shift this far above the cut and the remainder makes both of little consequence: a direction of eigenvalue σ² has the gain
# σ/λ there, at most 2√(σ²/λ) = 0.002 of the 1/(2√λ) that directions σ² = λ have.
_SMOOTH = 1e6


class PivotedFactorization(Factorization):
    """Θ[p, p] = WᵀW with W = R[1 X] ``[r, n]``, R triangular.

    ran Θ is the range of [1 X]ᵀ, and the null space that of [−X; 1]; the projector P is made with the smaller of the two. X has
    entries of moderate size by the choice of the pivots, so that P costs little accuracy, and no condition is squared: on
    ran Θ, the inverse of Θ is P E(RᵀR)⁻¹EᵀP with E the first r coordinates.
    """

    method = "pivoted_cholesky"

    def __init__(self, matrix: Tensor, pivots: Pivots, largest: float, firm: bool) -> None:
        rank, n = pivots.rows.shape
        super().__init__(n, rank, math.nan, plain_from=math.inf if firm else MARGIN * n * EPS * largest)
        self._matrix, self._order, self._largest = matrix, pivots.order, largest
        self._triangle = pivots.rows[:, :rank].contiguous()  # R [r, r]; a slice would be copied by each triangular solve
        self._rest = pivots.rows[:, rank:].contiguous()  # RX [r, n - r]
        self._mixing: Tensor = torch.linalg.solve_triangular(self._triangle, self._rest, upper=True)  # X [r, n - r]
        self._by_null_space = n - rank < rank
        gram = self._mixing.mT @ self._mixing if self._by_null_space else self._mixing @ self._mixing.mT
        gram.diagonal().add_(1)
        self._gram = torch.linalg.cholesky_ex(gram)[0]
        self._shift = 0.0
        self._shifted: Tensor | None = None  # for this shift, of Θ or of WWᵀ: which one is a matter of the shift alone
        self._small: Tensor | None = None  # WWᵀ [r, r], whose eigenvalues are those of Θ

    def _solve_on_range(self, g: Tensor, shift: float) -> Tensor:
        """ψ, refined once with Θ itself in place of its factor: a third to a sixth of the error where λ is small."""
        right = self.project(g[:, None] if g.ndim == 1 else g)
        psi = self.rough_solve(right, shift)
        residual = right - self._matrix @ psi - shift * psi
        return (psi + self.rough_solve(self.project(residual), shift)).reshape(g.shape)

    def _solve_plainly(self, g: Tensor, shift: float) -> Tensor:
        """By the Cholesky factor of Θ + λ1, which no rounding of Θ makes singular."""
        if shift != self._shift or self._shifted is None:
            self._shift, self._shifted = shift, shifted_cholesky(self._matrix, shift)
        return apply_inverse(self._shifted, g if g.ndim == 2 else g[:, None]).reshape(g.shape)

    def project(self, g: Tensor) -> Tensor:
        """Pg by least squares in the basis of ran Θ or of its complement."""
        columns = g[self._order] if g.ndim == 2 else g[self._order][:, None]
        basis, adjoint = (self._null, self._null_adjoint) if self._by_null_space else (self._range, self._range_adjoint)
        part = basis(apply_inverse(self._gram, adjoint(columns)))
        return self._restore(columns - part if self._by_null_space else part).reshape(g.shape)

    def rough_solve(self, right: Tensor, shift: float = 0.0) -> Tensor:
        """ψ for a block ``[n, k]`` in ran Θ, as the factors have it."""
        first = right[self._order[: self.rank]]  # [r, k]
        middle = torch.linalg.solve_triangular(self._triangle.mT, first, upper=False)
        if shift == 0:
            basic = torch.linalg.solve_triangular(self._triangle, middle, upper=True)
            return self.project(self._restore(torch.cat([basic, basic.new_zeros(self.size - self.rank, basic.shape[1])])))
        # (WWᵀ + λ)⁻¹ costs 2nr², (Θ + λ)⁻¹ n³/3, which needs a λ that Θ's rounding is small against.
        small = 2 * self.rank <= self.size or shift < MARGIN * self.size * EPS * self._largest
        if shift != self._shift or self._shifted is None:
            if small and self._small is None:
                self._small = self._triangle @ self._triangle.mT + self._rest @ self._rest.mT
            base = self._small if small and self._small is not None else self._matrix
            self._shift, self._shifted = shift, shifted_cholesky(base, shift)
        if small:
            return self._columns(apply_inverse(self._shifted, middle))
        return self.project(apply_inverse(self._shifted, right))

    def remainder(self, block: Tensor) -> Tensor:
        """(Θ − LLᵀ) applied to a block ``[n, k]``."""
        ordered = block[self._order]
        middle = self._triangle @ ordered[: self.rank] + self._rest @ ordered[self.rank :]
        return self._matrix @ block - self._columns(middle)

    def _columns(self, block: Tensor) -> Tensor:
        """L = Wᵀ applied to a block ``[r, k]``."""
        return self._restore(torch.cat([self._triangle.mT @ block, self._rest.mT @ block]))

    def _restore(self, block: Tensor) -> Tensor:
        """From the order of the pivots to that of Θ."""
        return torch.empty_like(block).index_copy_(0, self._order, block)

    def _range(self, block: Tensor) -> Tensor:
        return torch.cat([block, self._mixing.mT @ block])

    def _range_adjoint(self, block: Tensor) -> Tensor:
        return block[: self.rank] + self._mixing @ block[self.rank :]

    def _null(self, block: Tensor) -> Tensor:
        return torch.cat([-self._mixing @ block, block])

    def _null_adjoint(self, block: Tensor) -> Tensor:
        return block[self.rank :] - self._mixing.mT @ block[: self.rank]


def by_pivots(matrix: Tensor, rtol: float, shift: float, firm: bool) -> PivotedFactorization | None:
    """Θ by pivoted Cholesky, if its rank is unambiguous or ``shift`` makes that of little consequence; None for any other.

    With a remainder S = Θ − LLᵀ, at most r eigenvalues of Θ are above |S|, and at least r are as large as λ_min(LᵀL). Where
    the cut is between the two, and far below the latter, the rank is r.
    """
    n = len(matrix)
    start = random_block(matrix)
    largest = largest_eigenvalue(lambda block: matrix @ block, start)
    rounding = n * EPS * largest
    noise = max(rtol**2 * largest, rounding)
    plain = not firm and shift >= MARGIN * rounding  # solved by the Cholesky factor of Θ + λ1, whatever the rank
    smooth = plain or shift >= _SMOOTH * noise
    pivots = pivoted_cholesky(matrix, noise, 0.0 if smooth else MARGIN * noise)
    if pivots is None or not len(pivots.rows):
        return None
    factorization = PivotedFactorization(matrix, pivots, largest, firm)
    remainder = largest_eigenvalue(factorization.remainder, start)
    smallest = 1 / largest_eigenvalue(lambda block: factorization.rough_solve(factorization.project(block)), start)
    unambiguous = smallest >= MARGIN * noise and remainder <= max(rtol**2 * largest, _ROUNDINGS * rounding)
    accurate = remainder <= max(_ROUNDINGS * rounding, _ACCURACY * max(smallest, shift))
    if not ((unambiguous and accurate) or plain or (smooth and shift >= _SMOOTH * remainder)):
        return None
    factorization.condition = math.sqrt(largest / smallest)
    return factorization
