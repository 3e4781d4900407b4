"""The loss as a function of the outputs: C(x) = Σ ⟨f, criterion(x, y)⟩ by the user's own criteria, and its curvature."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..tracking.calls import Outputs
from ..tracking.closure import Given
from ..tracking.replay import batch_and_outputs
from ..tracking.terms import Entries, RefusedError, Term
from .curvature import Blocks, Hessian, OwnCurvature, closed_form, gradient_of
from .output_metric import LEAST, BlockMetric, DiagonalMetric, Metric
from .shares import UNSHARED, Shares


class Objective:
    """C as a function of x, the stacked outputs that criteria were given entries of, in all processes.

    Args:
        terms: The calls of the criteria in this process, with what the loss made of their values.
        stacked: What its part of x is stacked from, in this order.
        loss_scale: What a GradScaler multiplied the loss by.
        shares: What each process has.
    """

    def __init__(self, terms: list[Term], stacked: list[Outputs], loss_scale: float, shares: Shares = UNSHARED) -> None:
        self._terms, self._loss_scale = terms, loss_scale
        self._shares = shares
        self._world = self._shares.world
        self._weights = self._shares.weights or [1.0] * len(terms)
        self._rows: dict[tuple[int, int], Tensor] = {}
        start = 0
        self.sizes = [batch_and_outputs(outputs) for outputs in stacked]
        for outputs, (n, q) in zip(stacked, self.sizes, strict=True):
            device = outputs.outputs[outputs.places[0]].device
            numbers = torch.arange(start, start + n * q, device=device).view(n, q)
            column = 0
            for place in outputs.places:
                entries = outputs.outputs[place].shape[1:].numel()
                self._rows[id(outputs), place] = numbers[:, column : column + entries].reshape(-1)
                column += entries
            start += n * q
        self.size = start  # of this process's part
        self._in_order = [
            len(stacked) == 1 and len(stacked[0].places) == 1 and len(term.parts) == 1 and term.parts[0].index is None
            for term in terms
        ]

    def rows(self, part: Entries) -> Tensor:
        """Where in x some entries are, ``[S]``."""
        rows = self._rows[id(part.of), part.place]
        return rows if part.index is None else rows[part.index]

    def own(self, x: Tensor) -> Tensor:
        """The loss of this process as its loss has it, of its own part of x, in float64; differentiable."""
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for number in range(len(self._terms)):
            total = total + self._unweighted(number, x)
        return total

    def _part(self, x: Tensor) -> Tensor:
        """What this process's part of x contributes to C."""
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for number, weight in enumerate(self._weights):
            if weight:  # the mean of no labels is NaN
                total = total + self._term(number, x)
        return total

    def _term(self, number: int, x: Tensor) -> Tensor:
        return self._unweighted(number, x) * self._weights[number]

    def _unweighted(self, number: int, x: Tensor) -> Tensor:
        term = self._terms[number]
        arguments: dict[int, Tensor] = {}
        for leaf, parts in term.entries.items():
            own = term.arguments[leaf]
            if self._in_order[number]:
                arguments[leaf] = x.view(own.shape)
                continue
            whole = own.double().reshape(-1)
            if len(parts) == 1 and parts[0].at is None:
                whole = x[self.rows(parts[0])]
            else:
                at = torch.cat([_at(part, whole) for part in parts])
                whole = whole.index_put((at,), torch.cat([x[self.rows(part)] for part in parts]))
            arguments[leaf] = whole.view(own.shape)
        return term.called(arguments) / self._loss_scale

    def outputs_in(self, given: Given, before: int, x: Tensor) -> Tensor | None:
        """X of this process as criteria were given it when they were called again; None if they were not called alike.

        Args:
            given: Their calls.
            before: How many calls there had been before those of the training step.
            x: As it was then, of this process.
        """
        found = x.clone()
        for term in self._terms:
            place = term.number - before - 1
            if not 0 <= place < len(given) or given[place][0] is not term.criterion:
                return None
            for leaf, parts in term.entries.items():
                argument = given[place][1][leaf] if leaf < len(given[place][1]) else None
                if not isinstance(argument, Tensor) or argument.shape != term.arguments[leaf].shape:
                    return None
                flat = argument.double().reshape(-1)
                for part in parts:
                    found[self.rows(part)] = flat if part.at is None else flat[part.at]
        return found

    @property
    def criteria(self) -> list[nn.Module]:
        """What it is made of."""
        return list(dict.fromkeys(term.criterion for term in self._terms))

    @torch.no_grad()
    def value(self, x: Tensor) -> float:
        """C(x) for x ``[R]`` in float64; inf where a criterion refuses that x."""
        part = x[self._shares.here]
        try:
            total = self._part(part)
        except RefusedError:
            total = part.new_tensor(math.inf)
        return float(self._world.sum(total))

    def gradient(self, x: Tensor) -> Tensor:
        """∇ₓC, ``[R]``."""
        return self._shares.gathered(gradient_of(self._part, x[self._shares.here]))

    def own_gradient(self, x: Tensor) -> Tensor:
        """That of `own`."""
        return gradient_of(self.own, x)

    @property
    def eps(self) -> float:
        """Machine epsilon of what criteria were given, the coarsest."""
        given = [term.arguments[leaf] for term in self._terms for leaf in term.entries]
        return max((torch.finfo(argument.dtype).eps for argument in given), default=0.0)

    @property
    def is_sum(self) -> bool:
        """Whether criteria add up what they find, so that losses of more samples are larger."""
        return all(getattr(term.criterion, "reduction", None) == "sum" for term in self._terms)

    def curvatures(self, x: Tensor, g: Tensor) -> Tensor:
        """The curvature c of each entry of x, ``[R]``: H = ∇²ₓC for squares, an upper bound of it for losses that have one.

        | criterion | c of an entry, by what the mean divides by |
        |---|---|
        | MSELoss | 2 |
        | HalfSquaredLoss | 1 |
        | CrossEntropyLoss | ½ · weight of the sample |
        | BCEWithLogitsLoss | ¼ · weight of the entry |
        | others that are squares, Σ hᵢ(xᵢ − yᵢ)²/2 | hᵢ |
        | others | the largest eigenvalue of H at x; where H = 0, g·g/2C, that of a square with minimum 0 |

        Entries that the loss does not look at have 0.

        Raises:
            RuntimeError: The loss bends downwards in all directions, as when it is multiplied by −1.
        """
        part, own = x[self._shares.here], g[self._shares.here]
        total, others = self._known_curvatures(part)
        everywhere = self._world.objects({key: each.told for key, each in others.items()})
        for key, each in others.items():
            total += each.shared([told[key] for told in everywhere if key in told])
        total = torch.where((own == 0) & ~torch.isfinite(part), 0.0, total)  # dead
        if total.numel() and float(total.min()) < 0:
            raise RuntimeError(
                "The loss has a negative multiple of `criterion` in it, so that it is to be maximized there, and nothing was "
                "changed. AdaptedGD minimizes: leave the sign out, or give it a loss that is to be minimized."
            )
        return self._shares.gathered(total)

    def own_curvatures(self, x: Tensor) -> Tensor:
        """About those of the entries of this process's part, which is x."""
        total, others = self._known_curvatures(x)
        for each in others.values():
            total += each.shared([each.told])
        return total

    def _known_curvatures(self, x: Tensor) -> tuple[Tensor, dict[Any, OwnCurvature]]:
        """Those of this process's part by closed forms, and what is known of those of other terms."""
        total = torch.zeros_like(x)
        others: dict[Any, OwnCurvature] = {}
        for number, term in enumerate(self._terms):
            if not self._weights[number]:
                continue
            closed = closed_form(term)
            if closed is None:
                others[self._shares.key(number)] = self._of_any(functools.partial(self._term, number), term, x)
                continue
            leaf, c = closed
            scale = self._weights[number] / self._loss_scale
            for part in term.entries[leaf]:
                found = c.reshape(-1)
                total.index_add_(0, self.rows(part), (found if part.at is None else found[part.at]) * scale)
        return total, others

    def _of_any(self, function: Callable[[Tensor], Tensor], term: Term, x: Tensor) -> OwnCurvature:
        touched = torch.cat([self.rows(part) for part in term.parts]).unique()
        hessian = Hessian(function, x, touched, self.owners)
        used = torch.zeros_like(x, dtype=torch.bool)
        used[touched] = True
        g = gradient_of(function, x)
        squares: Tensor | None = None
        if hessian.diagonal is not None:
            h = hessian.diagonal
            largest = float(h.max()) if h.numel() else 0.0
            if largest > 0 and float(h.min()) >= 0 and bool(((h > 0) | (g == 0)).all()):
                other = torch.where(used & torch.isfinite(x), x - g / largest, x)
                if self._takes(other):
                    again = Hessian(function, other, touched, self.owners).diagonal
                    if again is not None and float((again - h).norm()) <= 1e-10 * float(h.norm()):
                        squares = h
        largest = math.nan if squares is not None and self._world.size == 1 else hessian.largest
        told = (squares is not None, largest, float(g.square().sum()), float(function(x).detach()))
        return OwnCurvature(squares, used & ((g != 0) | hessian.touches), told)

    def _takes(self, x: Tensor) -> bool:
        """Whether the loss of this process is finite there."""
        try:
            with torch.no_grad():
                return math.isfinite(float(self._part(x)))
        except RefusedError:
            return False

    @functools.cached_property
    def owners(self) -> Tensor:
        """The number of each row's sample, ``[R]``: the same in outputs that have as many."""
        alike = len({n for n, _ in self.sizes}) == 1
        numbers, first = [], 0
        for n, q in self.sizes:
            numbers.append(first + torch.arange(n).repeat_interleave(q))
            first += 0 if alike else n
        device = next(iter(self._rows.values())).device
        return torch.cat(numbers).to(device)  # only asked for where there are rows

    def hessian_metric(self, x: Tensor, g: Tensor) -> Metric:
        """H = SSᵀ at x, where it bends downwards cut off.

        Raises:
            RuntimeError: It is zero, or samples are coupled in it and too many.
        """
        part, own = x[self._shares.here], g[self._shares.here]
        kept, diagonal, blocks = self._curved(part, own)
        keep = self._shares.gathered(kept)
        if not bool(keep.any()):  # a stationary point
            return DiagonalMetric(torch.ones_like(x), torch.ones_like(keep))
        if not self._world.any(blocks is not None):
            assert diagonal is not None
            h = self._shares.gathered(diagonal).clamp(min=0.0)
            if not bool((h > 0).any()):
                raise RuntimeError(
                    'The loss has no curvature at these outputs, which metric="ggn" is, so nothing was changed. '
                    'Use metric="euclidean" for losses that are linear in what they are given, such as NLLLoss and L1Loss.'
                )
            return DiagonalMetric(torch.where(g != 0, h.clamp(min=LEAST * float(h.max())), h).sqrt(), keep)
        if blocks is None:  # other processes have them
            assert diagonal is not None
            blocks = Blocks(torch.arange(self.size, device=x.device)[:, None], diagonal[:, None, None], True)
        calls_apart = len({n for n, _ in self.sizes}) == len(self.sizes) or len(self.sizes) <= 1
        noise = 64 * torch.finfo(x.dtype).eps * self.curvatures(x, g) * torch.where(keep, x.abs(), 0.0).clamp(min=1.0)
        told = self._world.objects((blocks, calls_apart and blocks.by_sample))
        whole = Blocks.stacked([each for each, _ in told], self._shares.lengths or [self.size])
        return BlockMetric(whole.index, whole.values, g, noise, keep, local=all(apart for _, apart in told))

    def _curved(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None, Blocks | None]:
        """Of this process's part: which rows the loss looks at, and its Hessian, a diagonal or blocks.

        Raises:
            RuntimeError: Samples are coupled in it and too many.
        """
        if not self.size:
            return torch.zeros(0, dtype=torch.bool, device=x.device), torch.zeros_like(x), None
        hessian = Hessian(self._part, x, torch.arange(self.size, device=x.device), self.owners)
        keep = ((g != 0) | hessian.touches) & torch.isfinite(x)
        if hessian.diagonal is not None:
            return keep, hessian.diagonal, None
        if not bool(keep.any()):
            return keep, torch.zeros_like(x), None
        if hessian.blocks is None:
            raise RuntimeError(
                f"The loss couples all of its {self.size} outputs, so that its Hessian would have to be held as one, and "
                'nothing was changed. Use metric="euclidean", or fewer samples at a time.'
            )
        return keep, None, Blocks(*hessian.blocks, hessian.by_sample)


def _at(part: Entries, whole: Tensor) -> Tensor:
    return torch.arange(len(whole), device=whole.device) if part.at is None else part.at
