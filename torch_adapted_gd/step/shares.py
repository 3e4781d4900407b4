"""What each process has of a step: its rows of x, and the weights of its terms of the loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checks import all_finite, checksum
from ..tracking.terms import RefusedError, Term
from ..world import ALONE, World

if TYPE_CHECKING:
    from ..tracking.recorder import CallRecorder

Key = tuple[int, int]  # of a term: its criterion's number, and which of its calls


@dataclass(frozen=True)
class Shares:
    """Of the outputs of all processes, x stacked by rank, which are whose.

    The loss of all is C = Σ_r w_r C_r. A criterion that is a mean weighs each process by what its mean divides by, d_r/Σd; one
    that is a sum by 1. So C is that criterion of all outputs together, whatever the processes' shares. Without a criterion
    each has 1/W, as DistributedDataParallel averages gradients.

    Attributes:
        world: The processes.
        lengths: The rows of each; empty for one process.
        keys: Which call of which criterion each term of this process is.
        weights: w of each of these; empty for one process.
    """

    world: World = ALONE
    lengths: list[int] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

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
        """Those of all processes."""
        return self.world.gather(rows, self.lengths)

    def key(self, number: int) -> Any:
        """What a term of this process is known by in all."""
        return self.keys[number] if self.keys else number


UNSHARED = Shares()  # of a single process


def keys_of(terms: Sequence[Term], criteria: Sequence[nn.Module]) -> list[Key]:
    """Which call of which criterion each term is."""
    numbers = {id(criterion): number for number, criterion in enumerate(criteria)}
    counts: dict[int, int] = {}
    keys = {}
    for term in sorted(terms, key=lambda term: term.number):  # as they were called; backward passes come by in other orders
        number = numbers[id(term.criterion)]
        counts[number] = counts.get(number, 0) + 1
        keys[id(term)] = (number, counts[number])
    return [keys[id(term)] for term in terms]


@torch.no_grad()
def divisor(term: Term) -> float | None:
    """What the mean of a criterion divides by; None if it is a sum.

    What torch's losses divide by is how many times their sum is their mean, which counts class weights and ``ignore_index`` as
    they do. For ``reduction="none"``, and for criteria without a ``reduction``, it is the number of rows of what they were
    given: their values are taken for means, as a loss usually is one.
    """
    reduction = getattr(term.criterion, "reduction", None)
    if reduction == "sum":
        return None
    given = next(iter(term.entries))
    rows = float(len(term.arguments[given])) if term.arguments[given].ndim else 1.0
    if isinstance(term.criterion, nn.CTCLoss):  # a mean of losses divided by lengths, so no multiple of the sum
        return float(term.arguments[given].shape[1]) if term.arguments[given].ndim == 3 else 1.0
    if reduction != "mean":
        return rows
    attributes = [
        (module, {**own, "reduction": "sum"} if module is term.criterion else own) for module, own in term.state.attributes
    ]
    other = dataclasses.replace(term, state=dataclasses.replace(term.state, attributes=attributes), doubles=True)
    arguments = {number: term.arguments[number].double() for number in term.entries}
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for near, far in ((1.0, 0.0), (1.0, 1.0), (-1.0, 0.0), (0.0, 1e4), (0.0, 1e-3)):
        looked_at = {
            number: near * x.nan_to_num(0.0, 0.0, 0.0)
            + far * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            for number, x in arguments.items()
        }
        try:
            mean, total = float(term.called(looked_at)), float(other.called(looked_at))
        except RefusedError:
            return rows
        if mean and math.isfinite(mean) and math.isfinite(total):
            found = total / mean
            return float(round(found)) if abs(found - round(found)) <= 1e-9 * found else found
        # It is zero there: look beside it, then where a hinge that is satisfied is not.
    return 0.0 if not total else rows


def mean_or_sum(world: World, term: Term, loss: float) -> float:
    """The loss of all processes, each of which has one term."""
    told = world.objects((divisor(term), loss))
    if told[0][0] is None:
        return math.fsum(loss for _, loss in told)
    total = math.fsum(d for d, _ in told if d is not None)
    return math.fsum(d * loss for d, loss in told if d) / total if total else math.nan


def weights_of(keys: Sequence[Key], divisors: Sequence[dict[Key, float | None]], rank: int) -> list[float]:
    """The weight of each term of a process.

    Args:
        keys: Its terms.
        divisors: Of all processes, what the mean of each of their terms divides by.
        rank: Which process it is.
    """
    weights = []
    for key in keys:
        own = divisors[rank][key]
        total = math.fsum(d for each in divisors if (d := each.get(key)) is not None)
        weights.append(1.0 if own is None else own / total if total else 0.0)
    return weights


@dataclass(frozen=True)
class Told:
    """What each process tells the others of its step.

    Attributes:
        rows: The rows of its part of x.
        trained: The parameters that received a gradient.
        alike: What has to be the same in all, by what it is called.
        with_closure: Whether `step` got a closure.
    """

    rows: int
    trained: set[str]
    alike: dict[str, Any]
    with_closure: bool


def shared_out(world: World, mine: Told, terms: Sequence[Term], criteria: Sequence[nn.Module]) -> tuple[Shares, list[Told]]:
    """What each process has of a step.

    Args:
        world: The processes.
        mine: What this one tells.
        terms: Its terms of the loss.
        criteria: What these are calls of.

    Raises:
        RuntimeError: The processes do not train the same model in the same way.
    """
    keys = keys_of(terms, criteria)
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
    weights = weights_of(keys, [divisors for _, divisors in found], world.rank)
    return Shares(world, [each.rows for each in told], keys, weights), told


class TotalLoss:
    """The loss of the present step, of all processes together, by what criteria gave; to judge the last step by.

    Args:
        recorder: Who has taken the criteria's calls down.
        shares: What each process has of them.
        loss_scale: What a GradScaler multiplied the loss by.

    Attributes:
        job: A number for what it is computed from beside the parameters, see `CallRecorder.job`; NaN where chance is.
        factors: What the loss multiplies terms that are numbers by, those of one process after those of another.
        lost: Whether something that a criterion was given is not finite.
    """

    def __init__(self, recorder: CallRecorder, shares: Shares, loss_scale: float) -> None:
        self._recorder, self._shares, self._loss_scale = recorder, shares, loss_scale
        own = recorder.factors(loss_scale)
        lost = any(not all_finite(part.of.outputs[part.place]) for term in recorder.terms for part in term.parts)
        told = shares.world.objects((recorder.job(loss_scale), own, lost))
        jobs = [job for job, *_ in told]
        self.job = jobs[0] if len(jobs) == 1 else math.nan if any(map(math.isnan, jobs)) else checksum(jobs)
        self.factors = [factor for _, factors, _ in told for factor in factors]
        self.lost = any(each for *_, each in told)
        start = sum(len(factors) for _, factors, _ in told[: shares.world.rank])
        self._own = slice(start, start + len(own))

    def value(self, factors: Sequence[float] | None = None) -> float:
        """The loss, for the factors that there are or other ones, as many."""
        chosen = self.factors if factors is None else factors
        own = self._recorder.loss(chosen[self._own], self._loss_scale, self._shares.weights or None)
        return math.fsum(self._shares.world.objects(own))
