"""Products of written-out rows of D, accumulated in float64: DDᵀ and DᵀD."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..memory import require_memory

_CAST_ELEMENTS = 2**20  # entries of D that are turned to float64 (8 MiB) at a time
_LEAST_WIDTH = 1024  # columns multiplied at a time: fewer would read and write Θ too often
ROWS_ELEMENTS = 2**22  # entries of D that are written out at a time for DᵀD
TILE_ROWS = 64  # the least number of rows of a symmetric product that are computed at a time


def transpose_product(matrix: Tensor, u: Tensor) -> Tensor:
    """Dᵀu in the dtype of u, ``[R, K]`` and ``[R]`` → ``[K]``, cast block by block."""
    product = u.new_empty(matrix.shape[1])
    width = max(1, _CAST_ELEMENTS // max(1, matrix.shape[0]))
    for column in range(0, matrix.shape[1], width):
        product[column : column + width] = matrix[:, column : column + width].to(u.dtype).T @ u
    return product


def product(matrix: Tensor, v: Tensor) -> Tensor:
    """Dv in float64, ``[R, K]`` and ``[K]`` → ``[R]``, cast block by block."""
    total = torch.zeros(matrix.shape[0], dtype=torch.float64, device=matrix.device)
    width = max(1, _CAST_ELEMENTS // max(1, matrix.shape[0]))
    for column in range(0, matrix.shape[1], width):
        total += matrix[:, column : column + width].double() @ v[column : column + width]
    return total


def spans(sizes: Sequence[int]) -> list[slice]:
    """Ranges of these sizes, one after the other."""
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def summed(vectors: list[Tensor]) -> Tensor:
    """Their sum, in float64 if there are several."""
    return vectors[0] if len(vectors) == 1 else torch.stack([vector.double() for vector in vectors]).sum(0)


def norm(parts: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of a vector that is in parts by parameter."""
    return math.hypot(*(float(torch.linalg.vector_norm(part)) for part in parts.values()))


def gram(first: Tensor, second: Tensor | None = None) -> Tensor:
    """Products of rows in float64: ``first @ second.T``, ``[R1, K]`` and ``[R2, K]`` → ``[R1, R2]``.

    Columns are cast block by block, so that no float64 copy of the whole is made, and for one matrix with itself only
    the tiles on and above the diagonal are computed.

    Args:
        first: The rows on the left.
        second: The rows on the right; by default those on the left.

    Raises:
        MemoryError: The result would not fit.
    """
    other = first if second is None else second
    shape = (first.shape[0], other.shape[0])
    theta = new_kernel(*shape, first.device, torch.float64).zero_()
    add_gram(theta, first, second)
    return theta if second is not None else theta.triu_().add_(theta.triu(1).T)


def new_kernel(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Memory for a kernel, not initialized.

    Raises:
        MemoryError: It would not fit.
    """
    require_memory(
        dtype.itemsize * rows * columns,
        device,
        f"A kernel of {rows:,} by {columns:,} outputs in {str(dtype).removeprefix('torch.')}",
        "Use fewer samples at a time: it grows with the square of their outputs.",
    )
    return torch.empty(rows, columns, dtype=dtype, device=device)


def add_gram(theta: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Add products of rows to Θ, in its dtype; of one matrix with itself only the tiles on and above the diagonal.

    Args:
        theta: ``[R1, R2]``.
        first: ``[R1, K]``.
        second: ``[R2, K]``, or None for ``first``.
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


def parameter_gram(
    blocks: Iterable[Tensor], size: int, vectors: Tensor, weigh: Callable[[Tensor, int], Tensor] | None = None
) -> tuple[Tensor, Tensor, float]:
    """DᵀD, DᵀV and |D|² in float64, added up over blocks of D's rows, so that D need never be held.

    Args:
        blocks: Rows ``[r, K]``, in their order.
        size: K.
        vectors: V, ``[R, v]`` in float64.
        weigh: Makes SᵀD of rows of D, given these and the number of the first; then DᵀSSᵀD it is.

    Returns:
        DᵀD ``[K, K]``, DᵀV ``[K, v]`` and |D|².

    Raises:
        MemoryError: The result would not fit.
    """
    require_memory(
        2 * 8 * size**2,
        vectors.device,
        f"DᵀD of {size:,} parameters",
        'Use solver=Dense(space="sample"), or a smaller batch, which will choose it.',
    )
    total = torch.zeros(size, size, dtype=torch.float64, device=vectors.device)
    products = vectors.new_zeros(size, vectors.shape[1])
    start, square = 0, 0.0
    for block in blocks:
        rows = block.double()
        products.addmm_(rows.T, vectors[start : start + len(rows)])
        add_gram(total, (rows if weigh is None else weigh(rows, start)).T)
        square += float(rows.square().sum())
        start += len(rows)
    return total.triu_().add_(total.triu(1).T), products, square


def add_products(total: Tensor, first: Tensor, second: Tensor) -> None:
    """Add products of written-out rows of each sample, ``[N, Q, numel]`` and ``[N, R, numel]``, to ``[N, Q, R]``."""
    for samples in ranges_of_samples(first):
        left = first[samples].double()
        right = left if second is first else second[samples].double()
        total[samples].baddbmm_(left, right.transpose(1, 2))


def ranges_of_samples(tensor: Tensor, elements: int | None = None) -> Iterator[slice]:
    """Ranges of samples of at most 4 million entries, or one sample."""
    n = len(tensor)
    each = tensor[0].numel() if elements is None and n else elements or 1
    step = max(1, ROWS_ELEMENTS // max(1, each))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
