"""Θ = DDᵀ from Jacobians that are held, accumulated in float64."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..jacobian import BLOCK_ELEMENTS, CallJacobian, product, transpose_product
from ..memory import require_memory

_LEAST_WIDTH = 1024  # columns multiplied at a time: fewer would read and write Θ too often
ROWS_ELEMENTS = 2**22  # entries of D that are written out at a time for DᵀD
TILE_ROWS = 128  # the least number of rows of a symmetric product that are computed at a time


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
        'Use space="sample", or a smaller batch, which will choose it.',
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


class StackedJacobian:
    """D held in blocks of rows, never copied into one matrix.

    Args:
        blocks: Rows ``[R_i, K]``, in their order.
        numels: Entries of each parameter, by name, in the order of the columns.
        gradient: Dᵀg by plain backward passes, by parameter, flat.
        description: How D came about, for the report.
    """

    def __init__(self, blocks: list[Tensor], numels: dict[str, int], gradient: dict[str, Tensor], description: str) -> None:
        self.blocks = blocks
        self.numels = numels
        self.gradient = gradient
        self.description = description

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.blocks[0].device

    def written_of(self, number: int) -> list[Tensor]:
        """The Jacobian of one of the calls, ``[N·Q, K]``, as the only one of a list."""
        return self.blocks[number : number + 1]

    def combinations_at_once(self, count: int) -> int:  # noqa: ARG002
        """One: each takes N rows of D."""
        return 1

    def check_products(self) -> None:
        """Nothing is left to check: D is."""

    @classmethod
    def of(cls, parts: list[CallJacobian], numels: dict[str, int]) -> "StackedJacobian":
        """That of the Jacobians of several calls."""
        gradient = _by_name(summed([part.gradient for part in parts]), numels)
        description = f"jacobian ({', '.join(sorted({part.method for part in parts}))})"
        return cls([part.matrix for part in parts], numels, gradient, description)

    def gram(self) -> Tensor:
        """Θ = DDᵀ in float64, ``[R, R]``."""
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

    def rows(self, limit: int = ROWS_ELEMENTS, groups: tuple[int, ...] = ()) -> Iterator[Tensor]:
        """D in pieces of at most ``limit`` entries, or one group.

        Args:
            limit: Entries of a piece.
            groups: How many rows belong together in each block of D: Q; by default 1.
        """
        for number, block in enumerate(self.blocks):
            together = groups[number] if groups else 1
            yield from block.split(together * max(1, limit // max(1, together * block.shape[1])))

    def transpose_product(self, u: Tensor) -> dict[str, Tensor]:
        """Dᵀu in float64 for u of shape ``[R]``, by parameter, flat."""
        parts = u.split([len(block) for block in self.blocks])
        products = [transpose_product(block, part) for block, part in zip(self.blocks, parts, strict=True)]
        return _by_name(summed(products), self.numels)

    def product(self, v: dict[str, Tensor]) -> Tensor:
        """Dv in float64, ``[R]``, for v by parameter, flat."""
        vector = torch.cat([v[name] for name in self.numels])
        return torch.cat([product(block, vector) for block in self.blocks])


def _by_name(vector: Tensor, numels: dict[str, int]) -> dict[str, Tensor]:
    return dict(zip(numels, vector.split(list(numels.values())), strict=True))
