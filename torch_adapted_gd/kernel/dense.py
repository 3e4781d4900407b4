"""Θ = DDᵀ from Jacobians that are held, accumulated in float64."""

import itertools

import torch
from torch import Tensor

from ..jacobian import BLOCK_ELEMENTS, CallJacobian, transpose_product
from ..memory import require_memory

_LEAST_WIDTH = 1024  # columns multiplied at a time: fewer would read and write Θ too often
TILE_ROWS = 128  # the least number of rows of a symmetric product that are computed at a time


def summed(vectors: list[Tensor]) -> Tensor:
    """Their sum, in float64 if there are several."""
    return vectors[0] if len(vectors) == 1 else torch.stack([vector.double() for vector in vectors]).sum(0)


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


class StackedJacobian:
    """D of several calls, one block of rows ``[R_i, K]`` a call, never copied into one matrix.

    Args:
        parts: The calls' Jacobians.
        numels: Entries of each parameter, by name, in the order of the columns.
    """

    def __init__(self, parts: list[CallJacobian], numels: dict[str, int]) -> None:
        self.parts = parts
        self.blocks = [part.matrix for part in parts]
        self.numels = numels

    @property
    def gradient(self) -> dict[str, Tensor]:
        """Dᵀg by plain backward passes, by parameter, flat."""
        return self._by_name(summed([part.gradient for part in self.parts]))

    @property
    def description(self) -> str:
        """How Θ comes about, for the report."""
        return f"jacobian ({', '.join(sorted({part.method for part in self.parts}))})"

    def gram(self) -> Tensor:
        """Θ = DDᵀ in float64, ``[QN, QN]``."""
        if len(self.blocks) == 1:
            return gram(self.blocks[0])
        spans = self._spans()
        size = spans[-1].stop
        theta = torch.empty(size, size, dtype=torch.float64, device=self.blocks[0].device)
        for i, first in enumerate(spans):
            theta[first, first] = gram(self.blocks[i])
            for j, second in enumerate(spans[:i]):
                theta[first, second] = gram(self.blocks[i], self.blocks[j])
                theta[second, first] = theta[first, second].T
        return theta

    def transpose_product(self, u: Tensor) -> dict[str, Tensor]:
        """Dᵀu in float64 for u of shape ``[QN]``, by parameter, flat."""
        return self._by_name(
            summed([transpose_product(block, u[span]) for block, span in zip(self.blocks, self._spans(), strict=True)])
        )

    def _by_name(self, vector: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.numels, vector.split(list(self.numels.values())), strict=True))

    def _spans(self) -> list[slice]:
        ends = list(itertools.accumulate(block.shape[0] for block in self.blocks))
        return [slice(end - block.shape[0], end) for end, block in zip(ends, self.blocks, strict=True)]
