"""D of the calls of one process."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..world import ALONE, World
from .diagonal import add_output_blocks
from .gram import spans
from .operator import Components, Factors, Jacobian


class LocalJacobian(Jacobian):
    """A `Jacobian` whose rows are all in this process, so that it can give the terms that they are sums of."""

    @abstractmethod
    def cross(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The block of Θ between the rows of the first call and those of the second, ``[R1, R2]``."""

    @abstractmethod
    def factors(self) -> Iterator[Factors]:
        """Its rows with their terms; another process multiplies its own rows with them."""

    @abstractmethod
    def combined(self, number: int, rotation: Tensor) -> Components:
        """The terms of linear combinations of the outputs of one call, with weights ``rotation``, ``[N, Q, C]``."""

    def combinations_at_once(self) -> int:
        """The number of combinations for which there is memory to hold `combined` of all calls."""
        return sys.maxsize

    def output_blocks(self, rotations: Sequence[Tensor], numbers: Sequence[int], out: Tensor) -> None:
        write_output_blocks(self, dict(enumerate(numbers)), rotations, out)


@torch.no_grad()
def write_output_blocks(
    local: LocalJacobian | None, numbers: Mapping[int, int], rotations: Sequence[Tensor], out: Tensor, world: World = ALONE
) -> None:
    """`Jacobian.output_blocks` for one or several processes. Each process may ask for combinations of its own.

    Args:
        local: D of this process; None if it has no rows.
        numbers: For the calls of this process: place among the rotations → number in ``local``.
        rotations: The combinations that this process asks for.
        out: Receives the blocks.
        world: The processes that have rows.
    """
    step = min(world.objects(sys.maxsize if local is None else local.combinations_at_once()))
    places = spans([len(rotation) for rotation in rotations])
    out.zero_()
    for asking, wanted in enumerate(world.objects(list(rotations))):
        for start in range(0, wanted[0].shape[2], step):
            some = slice(start, min(start + step, wanted[0].shape[2]))
            made: dict[int, Components] = {}
            if local is not None:
                made = {place: local.combined(number, wanted[place][:, :, some]) for place, number in numbers.items()}
            parts = {place: part for each in world.collected(made, asking) for place, part in each.items()}
            del made
            for i, rows in parts.items():
                for j in range(i, len(rotations)):
                    add_output_blocks(out[some, places[i], places[j]], rows, None if i == j else parts[j])
            del parts
