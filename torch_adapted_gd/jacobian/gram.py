"""Products of written-out rows of D, accumulated in float64: DDᵀ and DᵀD."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..memory import require_memory

_CAST_ELEMENTS = 2**20  # entries of D that are cast to float64 at a time (8 MiB)
_LEAST_WIDTH = 1024  # columns multiplied at a time; with fewer, Θ is read and written too often
ROWS_ELEMENTS = 2**22  # entries of D that are written out at a time for DᵀD
TILE_ROWS = 64  # rows of a symmetric product that are computed at a time, at least


def transpose_product(matrix: Tensor, u: Tensor) -> Tensor:
    """Dᵀu in the dtype of u, ``[R, K]`` and ``[R]`` → ``[K]``, cast block by block."""
    return torch.cat([part.to(u.dtype).T @ u for part in _columns(matrix)])


def product(matrix: Tensor, v: Tensor) -> Tensor:
    """Dv in float64, ``[R, K]`` and ``[K]`` → ``[R]``, cast block by block."""
    total = torch.zeros(matrix.shape[0], dtype=torch.float64, device=matrix.device)
    column = 0
    for part in _columns(matrix):
        total += part.double() @ v[column : column + part.shape[1]]
        column += part.shape[1]
    return total


def _columns(matrix: Tensor) -> list[Tensor]:
    """The matrix in blocks of columns that are small enough to be cast."""
    return list(matrix.split(max(1, _CAST_ELEMENTS // max(1, matrix.shape[0])), 1))


def spans(sizes: Sequence[int]) -> list[slice]:
    """Ranges of these sizes, one after the other."""
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def norm(parts: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of a vector that is in parts by parameter."""
    return float(torch.nn.utils.get_total_norm(list(parts.values())))


def gram(first: Tensor, second: Tensor | None = None) -> Tensor:
    """Products of rows in float64: ``first @ second.T``, ``[R1, K]`` and ``[R2, K]`` → ``[R1, R2]``.

    Columns are cast block by block, so no float64 copy of the whole is made. Without a ``second``, it is ``first`` itself, and
    only the tiles on and above the diagonal are computed.
    """
    other = first if second is None else second
    theta = new_kernel(len(first), len(other), first.device, torch.float64).zero_()
    add_gram(theta, first, second)
    return theta if second is not None else theta.triu_().add_(theta.triu(1).T)


def new_kernel(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Uninitialized memory for a kernel; a MemoryError if it would not fit."""
    require_memory(
        dtype.itemsize * rows * columns,
        device,
        f"A kernel of {rows:,} by {columns:,} outputs in {str(dtype).removeprefix('torch.')}",
        "Use fewer samples at a time: it grows with the square of their outputs.",
    )
    return torch.empty(rows, columns, dtype=dtype, device=device)


def add_gram(theta: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Add products of rows ``[R1, K]`` and ``[R2, K]`` to Θ ``[R1, R2]``, in its dtype.

    Without a ``second``, it is ``first`` itself, and only tiles on and above the diagonal are added to.
    """
    width = max(_LEAST_WIDTH, _CAST_ELEMENTS // max(1, *theta.shape))
    for column in range(0, first.shape[1], width):
        left = first[:, column : column + width].to(theta.dtype)
        if second is not None:
            theta.addmm_(left, second[:, column : column + width].to(theta.dtype).T)
            continue
        tile = max(TILE_ROWS, -(-theta.shape[0] // 8))
        for row in range(0, theta.shape[0], tile):
            theta[row : row + tile, row:].addmm_(left[row : row + tile], left[row:].T)


def add_products(total: Tensor, first: Tensor, second: Tensor) -> None:
    """Add products of written-out rows of each sample, ``[N, Q, numel]`` and ``[N, R, numel]``, to ``[N, Q, R]``."""
    for samples in ranges(len(first), first[:1].numel()):
        left = first[samples].double()
        right = left if second is first else second[samples].double()
        total[samples].baddbmm_(left, right.transpose(1, 2))


def ranges(count: int, elements: int, limit: int = ROWS_ELEMENTS) -> Iterator[slice]:
    """Ranges of ``count`` items of ``elements`` entries each that have at most ``limit`` entries together, or one item."""
    step = max(1, limit // max(1, elements))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
