"""Θ = DDᵀ from Jacobians that are held, accumulated in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..memory import require_memory
from .definition import BLOCK_ELEMENTS, CallJacobian, product, transpose_product
from .operator import Jacobian, Parts

_LEAST_WIDTH = 1024  # columns multiplied at a time: fewer would read and write Θ too often
ROWS_ELEMENTS = 2**22  # entries of D that are written out at a time for DᵀD
TILE_ROWS = 64  # the least number of rows of a symmetric product that are computed at a time


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
    width = max(_LEAST_WIDTH, BLOCK_ELEMENTS // max(1, *theta.shape))
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


class DenseJacobian(Jacobian):
    """D held in blocks of rows, one for each call, never copied into one matrix.

    Args:
        blocks: Rows ``[R_i, K]``, in their order.
        shapes: N and Q of each.
        numels: Entries of each parameter, by name, in the order of the columns.
        description: How D came about, for the report.
    """

    def __init__(self, blocks: list[Tensor], shapes: list[tuple[int, int]], numels: dict[str, int], description: str) -> None:
        self.blocks = blocks
        self.shapes = shapes
        self.numels = numels
        self.device = blocks[0].device
        self.description = description
        self.remark: str | None = None

    @classmethod
    def of(cls, parts: list[CallJacobian], shapes: list[tuple[int, int]], numels: dict[str, int]) -> DenseJacobian:
        """That of the Jacobians of several calls."""
        description = f"jacobian ({', '.join(sorted({part.method for part in parts}))})"
        return cls([part.matrix for part in parts], shapes, numels, description)

    def mv(self, v: Parts) -> Tensor:
        """See `Jacobian`."""
        vector = torch.cat([v[name] for name in self.numels])
        return torch.cat([product(block, vector) for block in self.blocks])

    def rmv(self, u: Tensor) -> Parts:
        """See `Jacobian`."""
        parts = u.split([len(block) for block in self.blocks])
        products = [transpose_product(block, part) for block, part in zip(self.blocks, parts, strict=True)]
        return dict(zip(self.numels, summed(products).split(list(self.numels.values())), strict=True))

    def gram(self, dtype: torch.dtype = torch.float64) -> Tensor:  # noqa: ARG002
        """See `Jacobian`; in float64."""
        if len(self.blocks) == 1:
            return gram(self.blocks[0])
        rows = spans([len(block) for block in self.blocks])
        size = rows[-1].stop
        theta = torch.empty(size, size, dtype=torch.float64, device=self.blocks[0].device)
        for i, first in enumerate(rows):
            theta[first, first] = gram(self.blocks[i])
            for j, second in enumerate(rows[:i]):
                theta[first, second] = gram(self.blocks[i], self.blocks[j])
                theta[second, first] = theta[first, second].T
        return theta

    def cross(self, dtype: torch.dtype = torch.float64) -> Tensor:  # noqa: ARG002
        """See `Jacobian`; in float64."""
        return gram(*self.blocks)

    def rows(self, limit: int = ROWS_ELEMENTS) -> Iterator[Tensor]:
        """See `Jacobian`."""
        for block, (_, q) in zip(self.blocks, self.shapes, strict=True):
            yield from block.split(q * max(1, limit // max(1, q * block.shape[1])))

    def sample_blocks(self) -> list[Tensor]:
        """See `Jacobian`."""
        found = []
        for block, (n, q) in zip(self.blocks, self.shapes, strict=True):
            total = torch.zeros(n, q, q, dtype=torch.float64, device=self.device)
            add_products(total, block.view(n, q, -1), block.view(n, q, -1))
            found.append(total)
        return found

    def output_blocks(self, rotations: Sequence[Tensor], numbers: Sequence[int], out: Tensor) -> None:
        """See `Jacobian`; one combination at a time, as each takes N rows of D."""
        out.zero_()
        places = spans([len(r) for r in rotations])
        for c, block in enumerate(out):
            rows = []
            for rotation, number in zip(rotations, numbers, strict=True):
                weights = rotation[:, None, :, c].to(self.blocks[number].dtype)
                rows.append(torch.bmm(weights, self.blocks[number].view(*rotation.shape[:2], -1)).squeeze(1))
            for i, first in enumerate(rows):
                for j in range(i, len(rows)):
                    add_gram(block[places[i], places[j]], first, None if i == j else rows[j])


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
