"""Matrices D of known singular values, and what is to be found for Θ = DDᵀ of each."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def cosines(n: int) -> Tensor:
    """An orthogonal matrix that costs no factorization: the discrete cosine transform, its columns shuffled."""
    i, j = torch.arange(n)[:, None], torch.randperm(n)
    angle = ((2 * i + 1) * j % (4 * n)).double() * (math.pi / (2 * n))  # reduced in whole numbers, so that nothing is lost
    matrix = angle.cos() * math.sqrt(2 / n)
    matrix[:, j == 0] = math.sqrt(1 / n)
    return matrix


def spread(rank: int, condition: float) -> Tensor:
    """Singular values spread evenly, in log, over 1..1/condition."""
    return torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)


@dataclass(frozen=True)
class Matrix:
    """D = UΣVᵀ with V = 1 where nothing else is said."""

    d: Tensor  # [n, K]
    u: Tensor  # [n, r]
    sigma: Tensor  # [r], descending

    @classmethod
    def of(cls, d: Tensor, rank: int) -> "Matrix":
        """Of any small D, by its singular value decomposition; a float32 one is what it is, exactly."""
        d = d.double()
        u, sigma, _ = torch.linalg.svd(d, full_matrices=False)
        return cls(d, u[:, :rank], sigma[:rank])

    @classmethod
    def with_values(cls, n: int, sigma: Tensor, kept: int | None = None) -> "Matrix":
        """Of these singular values, the first ``kept`` of which count."""
        u = cosines(n)[:, : len(sigma)]
        return cls(u * sigma, u[:, :kept], sigma[:kept])

    def step(self, g: Tensor, shift: float) -> Tensor:
        """D⁺g, or Dᵀ(Θ + λ1)⁻¹Pg, in the coordinates of V: Σ(Σ² + λ)⁻¹Uᵀg."""
        return torch.diag(self.sigma / (self.sigma**2 + shift)) @ (self.u.T @ g)

    def in_coordinates(self, psi: Tensor) -> Tensor:
        """Dᵀψ in those: ΣUᵀψ. Nothing of ψ may be outside of the range; that is for another check."""
        return torch.diag(self.sigma) @ (self.u.T @ psi)


@dataclass(frozen=True)
class Expected:
    """A row of the table: how to make the matrix, and what should be found."""

    make: Callable[[], Matrix]
    rank: int
    method: str
    rtol: float | None = None
    slack: int = 0  # by how much the rank may differ, where singular values pass the cut without a gap


def duplicated(n: int, distinct: int, columns: int, dtype: torch.dtype = torch.float64) -> Matrix:
    """Rows that occur several times."""
    return Matrix.of(torch.randn(distinct, columns, dtype=dtype)[torch.arange(n) % distinct], distinct)


def rows_scaled(n: int, columns: int, scales: Tensor, rank: int, dtype: torch.dtype = torch.float64) -> Matrix:
    """Rows of very different size, in no order."""
    return Matrix.of(torch.randn(n, columns, dtype=dtype) * scales[torch.randperm(n), None].to(dtype), rank)


def noisy_copies(n: int, distinct: int) -> Matrix:
    """Float32 rows that ought to be copies and differ in the last bits, as the same sample in two places of a batch."""
    d = torch.randn(distinct, distinct)[torch.arange(n) % distinct]
    return Matrix.of(d * (1 + 3e-8 * torch.randn(n, distinct)), distinct)


def zero(n: int) -> Matrix:
    """Nothing but zeros."""
    return Matrix(torch.zeros(n, 5).double(), torch.zeros(n, 0).double(), torch.zeros(0).double())


TABLE: dict[str, Expected] = {
    "1 x 1": Expected(lambda: Matrix.of(torch.full((1, 1), 3.0), 1), 1, "eigh"),
    "1 x 1, tiny": Expected(lambda: Matrix.of(torch.full((1, 1), 1e-100, dtype=torch.float64), 1), 1, "eigh"),
    "1 x 1, zero": Expected(lambda: zero(1), 0, "eigh"),
    "600, zero": Expected(lambda: zero(600), 0, "eigh"),
    "2, κ = 1000": Expected(lambda: Matrix.with_values(2, spread(2, 1e3)), 2, "eigh"),
    "3, all rows alike": Expected(lambda: Matrix.of(torch.ones(3, 4), 1), 1, "eigh"),
    "40, κ = 1e4": Expected(lambda: Matrix.with_values(40, spread(40, 1e4)), 40, "eigh"),
    "40, rank 17": Expected(lambda: Matrix.with_values(40, spread(17, 1e2)), 17, "eigh"),
    "128": Expected(lambda: Matrix.with_values(128, spread(128, 10.0)), 128, "eigh"),
    "129": Expected(lambda: Matrix.with_values(129, spread(129, 10.0)), 129, "cholesky"),
    "129, rank 60": Expected(lambda: Matrix.with_values(129, spread(60, 10.0)), 60, "eigh"),
    "200, κ = 1e6": Expected(lambda: Matrix.with_values(200, spread(200, 1e6)), 200, "eigh"),
    "200, κ = 1e7": Expected(lambda: Matrix.with_values(200, spread(200, 1e7)), 188, "eigh", slack=3),
    "300, orthogonal": Expected(lambda: Matrix.with_values(300, spread(300, 1.0)), 300, "cholesky"),
    "300, float32": Expected(lambda: Matrix.of(torch.randn(300, 400), 300), 300, "cholesky"),
    "500, each row 4 times": Expected(lambda: duplicated(500, 125, 200), 125, "eigh"),
    "600, rank 1": Expected(lambda: Matrix.with_values(600, spread(1, 1.0)), 1, "pivoted_cholesky"),
    "600, rank 599": Expected(lambda: Matrix.with_values(600, spread(599, 10.0)), 599, "pivoted_cholesky"),
    "600, K = 540": Expected(lambda: Matrix.of(torch.randn(600, 540).double(), 540), 540, "pivoted_cholesky"),
    "600, κ = 1e4": Expected(lambda: Matrix.with_values(600, spread(600, 1e4)), 600, "cholesky"),
    "600, rank 300, κ = 1e4": Expected(lambda: Matrix.with_values(600, spread(300, 1e4)), 300, "pivoted_cholesky"),
    "600, each row 6 times": Expected(lambda: duplicated(600, 100, 300), 100, "pivoted_cholesky"),
    "600, each row 2 times, float32": Expected(lambda: duplicated(600, 300, 700, torch.float32), 300, "pivoted_cholesky"),
    "600, copies but for float32's last bits": Expected(lambda: noisy_copies(600, 200), 200, "pivoted_cholesky", rtol=3e-6),
    "600, two thirds of the rows zero": Expected(
        lambda: rows_scaled(600, 300, (torch.arange(600) < 200).double(), 200), 200, "pivoted_cholesky"
    ),
    "600, half of the rows 1e8 larger": Expected(
        lambda: rows_scaled(600, 400, torch.where(torch.arange(600) < 300, 1e4, 1e-4).double(), 300), 300, "pivoted_cholesky"
    ),
    "600, rows over 1e±2, K = 200": Expected(
        lambda: rows_scaled(600, 200, torch.logspace(-2, 2, 600).double(), 200), 200, "pivoted_cholesky"
    ),
    "600, rows over 1e±8": Expected(
        lambda: rows_scaled(600, 700, torch.logspace(-8, 8, 600).double(), 231), 231, "eigh", slack=9
    ),
    "600, decay without a gap": Expected(lambda: Matrix.with_values(600, spread(600, 1e12), 322), 322, "eigh", slack=4),
    "600, decay with a gap": Expected(
        lambda: Matrix.with_values(600, torch.cat([spread(300, 1e3), 1e-9 * spread(200, 1e2)]), 300), 300, "pivoted_cholesky"
    ),
    "600, a gap at the user's cut": Expected(
        lambda: Matrix.with_values(600, torch.cat([spread(300, 10.0), 1e-7 * spread(300, 10.0)]), 300),
        300,
        "pivoted_cholesky",
        rtol=1e-3,
    ),
    "600, a gap at the user's cut that is too narrow for the remainder": Expected(
        lambda: Matrix.with_values(600, torch.cat([spread(300, 10.0), 1e-4 * spread(300, 10.0)]), 300), 300, "eigh", rtol=1e-3
    ),
    "600, a gap at the user's cut with a remainder that the solution would show": Expected(
        lambda: Matrix.with_values(600, torch.cat([spread(300, 10.0), 1e-5 * spread(300, 10.0)]), 300), 300, "eigh", rtol=1e-3
    ),
    "600, no gap at the user's cut": Expected(
        lambda: Matrix.with_values(600, spread(600, 1e3), 400), 400, "eigh", rtol=float(spread(600, 1e3)[399:401].mean())
    ),
    "600, scale 1e100": Expected(lambda: Matrix.with_values(600, 1e50 * spread(300, 1e2)), 300, "pivoted_cholesky"),
    "600, scale 1e-100": Expected(lambda: Matrix.with_values(600, 1e-50 * spread(300, 1e2)), 300, "pivoted_cholesky"),
    "1000, κ = 1000": Expected(lambda: Matrix.with_values(1000, spread(1000, 1e3)), 1000, "cholesky"),
    "1500, rank 750, κ = 100": Expected(lambda: Matrix.with_values(1500, spread(750, 1e2)), 750, "pivoted_cholesky"),
    "2000, rank 20": Expected(lambda: Matrix.with_values(2000, spread(20, 1e3)), 20, "pivoted_cholesky"),
    "2000, rank 1999": Expected(lambda: Matrix.with_values(2000, spread(1999, 1e2)), 1999, "pivoted_cholesky"),
    "3000, κ = 100": Expected(lambda: Matrix.with_values(3000, spread(3000, 1e2)), 3000, "cholesky"),
    "3000, rank 1000, κ = 100": Expected(lambda: Matrix.with_values(3000, spread(1000, 1e2)), 1000, "pivoted_cholesky"),
}
