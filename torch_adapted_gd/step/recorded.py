"""What a training step has left for the step of the optimizer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..checks import all_finite, checksum
from ..tracking.calls import Call, Outputs, stacked
from ..tracking.private import bottom
from ..tracking.replay import batch_and_outputs
from ..tracking.terms import Term
from .shares import UNSHARED, Shares


@dataclass(frozen=True)
class Recorded:
    """What the forward and backward passes of a training step left in this process."""

    model: nn.Module
    stacked_from: list[Outputs]  # the calls, and other outputs that criteria were given, that x is stacked from
    trained: dict[str, nn.Parameter] = field(default_factory=dict)  # the parameters θ to step, by name
    gradients: dict[str, Tensor] = field(default_factory=dict)  # ∇_θC of each as it arrived, multiplied by `scale`
    terms: list[Term] = field(default_factory=list)  # the calls of criteria, with the factors of their values in the loss
    scale: float = 1.0  # the factor of a GradScaler in the loss
    shares: Shares = UNSHARED  # the part of each process

    @functools.cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """N and Q of each of the outputs; a ValueError if one does not have the batch first."""
        return [batch_and_outputs(each) for each in self.stacked_from]

    @property
    def rows(self) -> int:
        """The number of rows of x in this process."""
        return sum(n * q for n, q in self.sizes)

    @property
    def num_params(self) -> int:
        """K."""
        return sum(p.numel() for p in self.trained.values())

    @functools.cached_property
    def calls(self) -> list[Call]:
        """Those of the outputs that calls returned."""
        return [each for each in self.stacked_from if isinstance(each, Call)]

    @property
    def repeatable(self) -> bool:
        """Whether repeated calls give x for other parameters."""
        return len(self.calls) == len(self.stacked_from) and not any(call.nested for call in self.calls)

    def vector(self, values: Callable[[Outputs], dict[int, Tensor]]) -> Tensor:
        """One vector ``[R]`` in float64 of values of all outputs; zero where there is none."""
        first = next(iter(self.trained.values()))
        parts = [torch.zeros(0, dtype=torch.float64, device=first.device)]
        for each in self.stacked_from:
            found = values(each)
            parts.append(stacked([found.get(place, torch.zeros_like(each.outputs[place])).double() for place in each.places]))
        return torch.cat(parts)

    def split(self, vector: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """The parts ``[N, ...]`` of a vector ``[R]``, with the number of the outputs they belong to, and the place there."""
        rows = vector.split([n * q for n, q in self.sizes])
        for number, (each, (n, _)) in enumerate(zip(self.stacked_from, self.sizes, strict=True)):
            widths = [each.outputs[place].shape[1:].numel() for place in each.places]
            for place, part in zip(each.places, rows[number].view(n, sum(widths)).split(widths, 1), strict=True):
                yield number, place, part


class TotalLoss:
    """The loss of this step by the values of criteria, of all processes together. It judges the last step.

    Attributes:
        job: A checksum of all that the loss is computed from except the parameters; NaN if random numbers were drawn.
        factors: The factors f of terms that are numbers, those of one process after those of another.
        lost: Whether an argument of a criterion is not finite.
    """

    def __init__(self, recorded: Recorded) -> None:
        self._terms, self._shares, self._loss_scale = recorded.terms, recorded.shares, recorded.scale
        found = (factor for term in self._terms for factor in term.factors.values())
        own = [float(factor) / self._loss_scale for factor in found if factor.numel() == 1]
        lost = any(not all_finite(part.of.outputs[part.place]) for term in self._terms for part in term.parts)
        told = self._shares.world.objects((self._own_job(), own, lost))
        jobs = [job for job, *_ in told]
        self.job = jobs[0] if len(jobs) == 1 else math.nan if any(map(math.isnan, jobs)) else checksum(jobs)
        self.factors = [factor for _, factors, _ in told for factor in factors]
        self.lost = any(each for *_, each in told)
        start = sum(len(factors) for _, factors, _ in told[: self._shares.world.rank])
        self._own = slice(start, start + len(own))

    def value(self, factors: Sequence[float] | None = None) -> float:
        """The loss, for its own factors or for others."""
        chosen = self.factors if factors is None else factors
        total, given = 0.0, iter(chosen[self._own])
        for term, weight in zip(self._terms, self._shares.weights or [1.0] * len(self._terms), strict=True):
            for number, factor in term.factors.items():
                value = term.values[number].double()
                part = next(given) * float(value) if factor.numel() == 1 else float((factor * value).sum()) / self._loss_scale
                total += weight * part if weight else 0.0  # the mean of no labels is NaN
        return math.fsum(self._shares.world.objects(total))

    def _own_job(self) -> float:
        """The `job` of this process: the same for the same inputs, targets and weights."""
        sources = [part.of for term in self._terms for part in term.parts]
        calls = dict.fromkeys(call for of in sources for call in ([of] if isinstance(of, Call) else of.calls))
        if any(call.random for call in calls):
            return math.nan
        leaves = [leaf for call in calls for leaf in call.inputs.as_given]
        given = [bottom(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for term in self._terms:
            given += [leaf for number, leaf in enumerate(term.arguments) if number not in term.entries]
            given += [factor / self._loss_scale for factor in term.factors.values() if factor.numel() > 1]
        return checksum(given)
