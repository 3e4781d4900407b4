"""D of which each process has some rows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..world import World
from .blocks import between
from .diagonal import add_output_blocks
from .factored import fill
from .gram import ROWS_ELEMENTS, new_kernel, spans
from .operator import Components, Factors, Jacobian, Parts

T = TypeVar("T")


class ShardedJacobian(Jacobian):
    """The rows of all processes, one process after the other.

    Vectors of R or K numbers are the same in all processes. Dv is gathered, Dᵀu is summed. For Θ, processes exchange the
    factors of their rows. Each one computes blocks between its own rows and those of others, and the blocks are summed.

    Args:
        local: D of this process; None if it has no rows.
        world: The processes.
        numels: Entries of each parameter, by name.
        device: Where they are.
    """

    def __init__(self, local: Jacobian | None, world: World, numels: dict[str, int], device: torch.device) -> None:
        self.local, self._world, self.numels, self.device = local, world, numels, device
        said = world.objects(([], "", None) if local is None else (local.shapes, local.description, local.remark))
        shapes_of = [shapes for shapes, _, _ in said]
        self.shapes = [shape for shapes in shapes_of for shape in shapes]
        first = sum(map(len, shapes_of[: world.rank]))
        self._calls = range(first, first + len(shapes_of[world.rank]))  # those of this process
        self.lengths = [sum(n * q for n, q in shapes) for shapes in shapes_of]
        self._spans = spans(self.lengths)
        self.here = self._spans[world.rank]
        self.description = "; ".join(dict.fromkeys(text for _, text, _ in said if text))
        self.remark = next((remark for *_, remark in said if remark), None)

    def mv(self, v: Parts) -> Tensor:
        own = torch.zeros(0, dtype=torch.float64, device=self.device) if self.local is None else self.local.mv(v)
        return self._world.gather(own, self.lengths)

    def rmv(self, u: Tensor) -> Parts:
        total = torch.zeros(sum(self.numels.values()), dtype=torch.float64, device=self.device)
        if self.local is not None:
            own = self.local.rmv(u[self.here])
            total = torch.cat([own[name].reshape(-1).double() for name in self.numels])
        return dict(zip(self.numels, self._world.sum(total).split(list(self.numels.values())), strict=True))

    def gram(self, dtype: torch.dtype = torch.float64) -> Tensor:
        size = self.shape[0]
        theta = new_kernel(size, size, self.device, dtype).zero_()
        if self.local is not None:
            theta[self.here, self.here] = self.local.gram(dtype)
        for rank in range(self._world.size):
            for columns in self._factors_of(rank):
                if self._multiplies(rank) and self.local is not None:
                    for rows in self.local.factors():
                        mine = dataclasses.replace(rows, start=rows.start + self.here.start)
                        fill(theta, mine, columns, between(mine, columns))
            if self._multiplies(rank):
                there = self._spans[rank]
                theta[there, self.here] = theta[self.here, there].T
        return self._world.sum(theta)

    def _multiplies(self, rank: int) -> bool:
        """Whether this process computes the block between its own rows and those of another one."""
        apart = 2 * ((rank - self._world.rank) % self._world.size)
        return 0 < apart < self._world.size or (apart == self._world.size and self._world.rank < rank)

    def _factors_of(self, rank: int) -> Iterator[Factors]:
        """The factors of the rows of one process, in all processes."""
        for factors in self._from(rank, lambda local: local.factors()):
            yield dataclasses.replace(factors, start=factors.start + self._spans[rank].start)

    def _from(self, rank: int, make: Callable[[Jacobian], Iterator[T]]) -> Iterator[T]:
        """Send what one process makes of its rows to all processes, one item after the other."""
        own = make(self.local) if rank == self._world.rank and self.local is not None else iter(())
        while found := self._world.from_rank([*itertools.islice(own, 1)], rank):
            yield found[0]

    def cross(self, dtype: torch.dtype = torch.float64) -> Tensor:
        rows, columns = spans([n * q for n, q in self.shapes])[:2]
        return self.gram(dtype)[rows, columns]

    def rows(self, limit: int = ROWS_ELEMENTS) -> Iterator[Tensor]:
        """Blocks of `Jacobian.rows`; each goes to all processes."""
        for rank in range(self._world.size):
            yield from self._from(rank, lambda local: local.rows(limit))

    def parameter_gram(
        self, vectors: Tensor, weigh: Callable[[Tensor, int], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, float]:
        """As in `Jacobian`, a sum of K² numbers over processes."""
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
        """As in `Jacobian`. Each process may ask for other combinations, and is sent their components."""
        own = [place for place, number in enumerate(numbers) if number in self._calls]
        step = min(self._world.objects(self.combinations_at_once(max(1, rotations[0].shape[2]))))
        places = spans([len(r) for r in rotations])
        out.zero_()
        for asking, wanted in enumerate(self._world.objects(list(rotations))):
            for start in range(0, wanted[0].shape[2], step):
                some = slice(start, min(start + step, wanted[0].shape[2]))
                with torch.no_grad():
                    made = {place: self.combined(numbers[place], wanted[place][:, :, some]) for place in own}
                    parts = {place: part for each in self._world.collected(made, asking) for place, part in each.items()}
                    del made
                    for i, rows in parts.items():
                        for j in range(i, len(rotations)):
                            add_output_blocks(out[some, places[i], places[j]], rows, None if i == j else parts[j])
                    del parts

    def combinations_at_once(self, count: int) -> int:
        return count if self.local is None else self.local.combinations_at_once(count)

    def factors(self) -> Iterator[Factors]:
        """The factors of the rows of all processes."""
        for rank in range(self._world.size):
            yield from self._factors_of(rank)

    def combined(self, number: int, rotation: Tensor) -> Components:
        """As in `Jacobian`, of a call of this process."""
        assert self.local is not None
        return self.local.combined(number - self._calls.start, rotation)

    def check_products(self) -> None:
        if self.local is not None:
            self.local.check_products()
