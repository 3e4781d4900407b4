"""D held as a matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .gram import ROWS_ELEMENTS, add_products, gram, product, spans, summed, transpose_product
from .local import LocalJacobian
from .operator import Components, Factors, Parts


class DenseJacobian(LocalJacobian):
    """D held in blocks of rows, one for each call; they are never copied into one matrix.

    Args:
        blocks: Rows ``[R_i, K]`` of each call.
        shapes: N and Q of each call.
        numels: Entries of each parameter, by name, in the order of the columns.
        description: How D was computed, for the report.
    """

    def __init__(self, blocks: list[Tensor], shapes: list[tuple[int, int]], numels: dict[str, int], description: str) -> None:
        self.blocks = blocks
        self.shapes = shapes
        self.numels = numels
        self.device = blocks[0].device
        self.description = description
        self.remark: str | None = None

    def mv(self, v: Parts) -> Tensor:
        """See `Jacobian`."""
        vector = self.flat(v)
        return torch.cat([product(block, vector) for block in self.blocks])

    def rmv(self, u: Tensor) -> Parts:
        """See `Jacobian`."""
        parts = u.split([len(block) for block in self.blocks])
        products = [transpose_product(block, part) for block, part in zip(self.blocks, parts, strict=True)]
        return self.parts(summed(products))

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
        """See `LocalJacobian`; in float64."""
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

    def factors(self) -> Iterator[Factors]:
        """See `LocalJacobian`."""
        start = 0
        for block, (n, q) in zip(self.blocks, self.shapes, strict=True):
            yield Factors(start, n, q, range(q), self._components(block.view(n, q, -1)))
            start += n * q

    def combined(self, number: int, rotation: Tensor) -> Components:
        """See `LocalJacobian`."""
        block = self.blocks[number].view(*rotation.shape[:2], -1)
        return self._components(torch.bmm(rotation.to(block.dtype).transpose(1, 2), block))

    def combinations_at_once(self) -> int:
        """See `LocalJacobian`. A combination takes N rows of D."""
        return max(1, ROWS_ELEMENTS // max(1, self.shape[1] * sum(n for n, _ in self.shapes)))

    def _components(self, rows: Tensor) -> Components:
        parts = rows.split(list(self.numels.values()), 2)
        return [({name}, {name: [part]}) for name, part in zip(self.numels, parts, strict=True)]
