"""What is known of eigenvalues without computing them: what counts as zero, and estimates of the extreme ones."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
MARGIN = 100.0  # how far the smallest eigenvalue has to be from what counts as zero for a factor without them to be trusted


def default_rtol(size: int, eps: float = 0.0) -> float:
    """Relative size below which a singular value of D is lost in the rounding of Θ.

    Θ's eigenvalues σ² come with absolute errors near ``size``·ε·σ_max² (ε of float64, in which Θ is formed and
    factored), so singular values of D below √(``size``·ε)·σ_max are noise; and those below ``eps``·σ_max are noise of D
    itself, when it was computed in a coarser precision.

    Args:
        size: QN, the number of rows of Θ.
        eps: Machine epsilon of the arithmetic that D was computed in.
    """
    return max(math.sqrt(size * EPS), eps)


def random_block(like: Tensor, columns: int = 4) -> Tensor:
    """A block ``[n, columns]`` to start from, the same ones every time, for a matrix of n rows."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(len(like), columns, generator=generator, dtype=torch.float64, device="cpu").to(like)


def largest_eigenvalue(apply: Callable[[Tensor], Tensor], start: Tensor) -> float:
    """The largest eigenvalue, in size, of a symmetric operator, from below: the largest Ritz value on a block Krylov space.

    Args:
        apply: The operator, on blocks ``[n, b]``.
        start: A block.
    """
    basis = torch.linalg.qr(torch.cat([start, apply(start)], 1)).Q  # [n, 2b]
    ritz = basis.T @ apply(basis)
    return float(torch.linalg.eigvalsh((ritz + ritz.T) / 2).abs().max())
