"""D that is held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .gram import ROWS_ELEMENTS, add_gram, add_products, gram, product, spans, summed, transpose_product
from .operator import Components, Factors, Jacobian, Parts


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

    def factors(self) -> Iterator[Factors]:
        """See `Jacobian`."""
        start = 0
        for block, (n, q) in zip(self.blocks, self.shapes, strict=True):
            yield Factors(start, n, q, range(q), self._components(block.view(n, q, -1)))
            start += n * q

    def combined(self, number: int, rotation: Tensor) -> Components:
        """See `Jacobian`."""
        block = self.blocks[number].view(*rotation.shape[:2], -1)
        return self._components(torch.bmm(rotation.to(block.dtype).transpose(1, 2), block))

    def _components(self, rows: Tensor) -> Components:
        parts = rows.split(list(self.numels.values()), 2)
        return [({name}, {name: [part]}) for name, part in zip(self.numels, parts, strict=True)]
