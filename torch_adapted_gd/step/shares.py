"""What each process has of a step: its rows of x, and the weights of its terms of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..tracking.terms import RefusedError, Term
from ..world import ALONE, World

Key = tuple[int, int]  # of a term: its criterion's number, and which of that criterion's calls
# Where a mean is compared with its sum: (a, b) stands for a times the arguments plus b times random numbers. At the arguments
# both may be zero, and a hinge may be satisfied there.
_PLACES = ((1.0, 0.0), (1.0, 1.0), (-1.0, 0.0), (0.0, 1e4), (0.0, 1e-3))


@dataclass(frozen=True)
class Shares:
    """The part of each process in the outputs of all processes, x stacked by rank.

    The loss of all is C = Σ_r w_r C_r. For a criterion that is a mean, w_r = d_r/Σd with d_r what the mean of process r divides
    by; for a sum, w_r = 1. So C is the criterion of all outputs together, whatever the shares. Without a criterion w_r = 1/W,
    as DistributedDataParallel averages gradients.

    """

    world: World = ALONE
    lengths: list[int] = field(default_factory=list)  # the rows of each process; empty for one process
    keys: list[Key] = field(default_factory=list)  # of the terms of this process
    weights: list[float] = field(default_factory=list)  # w of each of these; empty for one process

    @property
    def here(self) -> slice:
        """The rows of this process."""
        if not self.lengths:
            return slice(None)
        start = sum(self.lengths[: self.world.rank])
        return slice(start, start + self.lengths[self.world.rank])

    @property
    def mean(self) -> float:
        """1/W."""
        return 1 / self.world.size

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all processes."""
        return self.world.gather(rows, self.lengths)

    def key(self, number: int) -> Any:
        """The name of a term of this process that all processes use."""
        return self.keys[number] if self.keys else number


UNSHARED = Shares()  # of a single process


@dataclass(frozen=True)
class Told:
    """What each process tells the others of its step."""

    rows: int  # of its part of x
    trained: set[str]  # the parameters that received a gradient
    alike: dict[str, Any]  # what has to be the same in all, by its name in an error
    with_closure: bool  # whether `step` got a closure


def shared_out(world: World, mine: Told, terms: Sequence[Term], criteria: Sequence[nn.Module]) -> tuple[Shares, list[Told]]:
    """The shares of a step, and what each process tells of it: ``mine`` is what this one tells, ``terms`` are its terms.

    Raises:
        RuntimeError: The processes do not train the same model in the same way.
    """
    keys = _keys(terms, criteria)
    found = world.objects((mine, {key: divisor(term) for key, term in zip(keys, terms, strict=True)}))
    told = [each for each, _ in found]
    for what, expected in told[0].alike.items():
        for rank, each in enumerate(told):
            if each.alike[what] != expected:
                raise RuntimeError(
                    f"The {what} should be the same in all processes, but differ between process 0 and process {rank}: "
                    f"{expected} and {each.alike[what]}. Nothing was changed. Start from the same seed or checkpoint, as "
                    "DistributedDataParallel makes sure of; to train on your own in one process, pass a `process_group` of it "
                    "alone."
                )
    if len({each.with_closure for each in told if each.rows}) > 1:
        raise RuntimeError("`step` should get a closure in all processes or in none, but some got one. Nothing was changed.")
    weights = []
    for key in keys:
        own = found[world.rank][1][key]
        total = math.fsum(d for _, divisors in found if (d := divisors.get(key)) is not None)
        weights.append(1.0 if own is None else own / total if total else 0.0)
    return Shares(world, [each.rows for each in told], keys, weights), told


def _keys(terms: Sequence[Term], criteria: Sequence[nn.Module]) -> list[Key]:
    """The keys of terms; calls count in their order, because backward passes may come by in another one."""
    numbers = {id(criterion): number for number, criterion in enumerate(criteria)}
    counts = [0] * len(criteria)
    keys = {}
    for term in sorted(terms, key=lambda term: term.number):
        number = numbers[id(term.criterion)]
        counts[number] += 1
        keys[id(term)] = (number, counts[number])
    return [keys[id(term)] for term in terms]


@torch.no_grad()
def divisor(term: Term) -> float | None:
    """The number that the mean of a criterion divides by; None if it is a sum.

    For torch's losses it is the ratio of their sum to their mean, which counts class weights and ``ignore_index`` as they do.
    For ``reduction="none"``, and for criteria without a ``reduction``, it is the number of rows of the arguments: their values
    are taken for means, as a loss usually is one.
    """
    reduction = getattr(term.criterion, "reduction", None)
    if reduction == "sum":
        return None
    given = term.arguments[next(iter(term.entries))]
    if isinstance(term.criterion, nn.CTCLoss):  # a mean of losses divided by lengths, so no multiple of the sum
        return float(given.shape[1]) if given.ndim == 3 else 1.0
    rows = float(len(given)) if given.ndim else 1.0
    if reduction != "mean":
        return rows
    as_sum = term.as_sum()
    arguments = {number: term.arguments[number].double() for number in term.entries}
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for near, far in _PLACES:
        moved = {
            number: near * x.nan_to_num(0.0, 0.0, 0.0)
            + far * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            for number, x in arguments.items()
        }
        try:
            mean, total = float(term.called(moved)), float(as_sum.called(moved))
        except RefusedError:
            return rows
        if mean and math.isfinite(mean) and math.isfinite(total):
            found = total / mean
            return float(round(found)) if abs(found - round(found)) <= 1e-9 * found else found
    return rows if total else 0.0


def mean_or_sum(world: World, term: Term, loss: float) -> float:
    """The loss of all processes, each of which has one term."""
    told = world.objects((divisor(term), loss))
    if told[0][0] is None:
        return math.fsum(loss for _, loss in told)
    total = math.fsum(d for d, _ in told if d is not None)
    return math.fsum(d * loss for d, loss in told if d) / total if total else math.nan
