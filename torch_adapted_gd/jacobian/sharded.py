"""D whose rows are distributed over processes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..world import World
from .blocks import between
from .factored import fill
from .gram import ROWS_ELEMENTS, new_kernel, spans
from .local import LocalJacobian, write_output_blocks
from .operator import Jacobian, ParameterVector

T = TypeVar("T")


class ShardedJacobian(Jacobian):
    """The rows of all processes, stacked by rank.

    Vectors of R or K numbers are the same in all processes. Dv is gathered, Dᵀu is summed. For Θ, processes exchange the
    factors of their rows. Each one computes blocks between its own rows and those of others, and the blocks are summed.

    Args:
        local: D of this process; None if it has no rows.
        world: The processes.
        numels: Entries of each parameter, by name.
        device: The device of D.
    """

    def __init__(self, local: LocalJacobian | None, world: World, numels: dict[str, int], device: torch.device) -> None:
        self.local, self._world, self.numels, self.device = local, world, numels, device
        said = world.objects(([], "", None) if local is None else (local.shapes, local.description, local.remark))
        shapes_of = [shapes for shapes, _, _ in said]
        self.shapes = [shape for shapes in shapes_of for shape in shapes]
        first = sum(map(len, shapes_of[: world.rank]))
        self._calls = range(first, first + len(shapes_of[world.rank]))  # the calls of this process
        self.lengths = [sum(n * q for n, q in shapes) for shapes in shapes_of]
        self._spans = spans(self.lengths)
        self.here = self._spans[world.rank]
        self.description = "; ".join(dict.fromkeys(text for _, text, _ in said if text))
        self.remark = next((remark for *_, remark in said if remark), None)

    def mv(self, v: ParameterVector) -> Tensor:
        own = torch.zeros(0, dtype=torch.float64, device=self.device) if self.local is None else self.local.mv(v)
        return self._world.gather(own, self.lengths)

    def rmv(self, u: Tensor) -> ParameterVector:
        total = torch.zeros(sum(self.numels.values()), dtype=torch.float64, device=self.device)
        if self.local is not None:
            total = self.flat(self.local.rmv(u[self.here])).double()
        return self.parts(self._world.sum(total))

    def gram(self, dtype: torch.dtype = torch.float64) -> Tensor:
        size = self.shape[0]
        theta = new_kernel(size, size, self.device, dtype).zero_()
        if self.local is not None:
            theta[self.here, self.here] = self.local.gram(dtype)
        for rank, there in enumerate(self._spans):
            multiplies = self._multiplies(rank)
            for factors in self._from(rank, lambda local: local.factors()):
                columns = dataclasses.replace(factors, start=factors.start + there.start)
                for rows in self.local.factors() if multiplies and self.local is not None else ():
                    mine = dataclasses.replace(rows, start=rows.start + self.here.start)
                    fill(theta, mine, columns, between(mine, columns))
            if multiplies:
                theta[there, self.here] = theta[self.here, there].T
        return self._world.sum(theta)

    def _multiplies(self, rank: int) -> bool:
        """Whether this process, not the other one, computes the block between its rows and those of ``rank``."""
        apart = 2 * ((rank - self._world.rank) % self._world.size)
        return 0 < apart < self._world.size or (apart == self._world.size and self._world.rank < rank)

    def _from(self, rank: int, make: Callable[[LocalJacobian], Iterator[T]]) -> Iterator[T]:
        """What one process makes of its rows, sent to all processes one item after the other."""
        own = make(self.local) if rank == self._world.rank and self.local is not None else iter(())
        while found := self._world.from_rank([*itertools.islice(own, 1)], rank):
            yield found[0]

    def rows(self, limit: int = ROWS_ELEMENTS) -> Iterator[Tensor]:
        """See `Jacobian`; each block is sent to all processes."""
        for rank in range(self._world.size):
            yield from self._from(rank, lambda local: local.rows(limit))

    def parameter_gram(
        self, vectors: Tensor, weigh: Callable[[Tensor, int], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, float]:
        """See `Jacobian`; processes sum K² numbers instead of exchanging rows."""
        k, first = self.shape[1], self.here.start
        total = torch.zeros(k * k + k * vectors.shape[1] + 1, dtype=torch.float64, device=self.device)
        if self.local is not None:
            own = None if weigh is None else lambda rows, start: weigh(rows, first + start)
            gram, products, square = self.local.parameter_gram(vectors[self.here], own)
            total = torch.cat([gram.reshape(-1), products.reshape(-1), total.new_tensor([square])])
        gram, products, square = self._world.sum(total).split([k * k, k * vectors.shape[1], 1])
        return gram.view(k, k), products.view(k, -1), float(square)

    def sample_blocks(self) -> list[Tensor]:
        found = self._world.objects([] if self.local is None else self.local.sample_blocks())
        return [block for blocks in found for block in blocks]

    def output_blocks(self, rotations: Sequence[Tensor], numbers: Sequence[int], out: Tensor) -> None:
        own = {place: number - self._calls.start for place, number in enumerate(numbers) if number in self._calls}
        write_output_blocks(self.local, own, rotations, out, self._world)

    def check_products(self) -> None:
        if self.local is not None:
            self.local.check_products()
