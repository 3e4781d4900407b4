"""The loss as a function of the outputs: C(x) = Σ ⟨f, criterion(x, y)⟩ by the user's own criteria, and its curvature."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..tracking.closure import Given
from ..tracking.terms import Entries, RefusedError
from ..world import ALONE, World
from .curvature import Blocks, Hessian, OwnCurvature, closed_form, value_and_gradient
from .output_metric import LEAST, BlockMetric, DiagonalMetric, Metric
from .recorded import Recorded


class Objective:
    """C as a function of x, the stacked outputs that criteria were given entries of, in all processes.

    "Own" is what belongs to this process: its part of x, and the loss of its terms without the weights of `Shares`.

    Args:
        recorded: What the training step left in this process.
    """

    def __init__(self, recorded: Recorded) -> None:
        self._terms, self._loss_scale, self._shares = recorded.terms, recorded.scale, recorded.shares
        self._world = self._shares.world
        self._weights = self._shares.weights or [1.0] * len(self._terms)
        self._rows: dict[tuple[int, int], Tensor] = {}
        self.sizes, self.size = recorded.sizes, recorded.rows  # of the own part
        for number, place, rows in recorded.split(torch.arange(self.size)):
            given = recorded.stacked_from[number]
            self._rows[id(given), place] = rows.reshape(-1).to(given.outputs[place].device)

    def rows(self, part: Entries) -> Tensor:
        """Where in x some entries are, ``[S]``."""
        rows = self._rows[id(part.of), part.place]
        return rows if part.index is None else rows[part.index]

    def own(self, x: Tensor) -> Tensor:
        """The own loss of the own part of x, in float64; differentiable."""
        return self._sum(x, [1.0] * len(self._terms))

    def _part(self, x: Tensor) -> Tensor:
        """What the own part of x contributes to C."""
        return self._sum(x, self._weights)

    def _sum(self, x: Tensor, weights: Sequence[float]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for number, weight in enumerate(weights):
            if weight:  # the mean of no labels is NaN
                total = total + weight * self._term(number, x)
        return total

    def _term(self, number: int, x: Tensor) -> Tensor:
        """The value of one call of a criterion, times its f."""
        term = self._terms[number]
        arguments: dict[int, Tensor] = {}
        for leaf, parts in term.entries.items():
            own = term.arguments[leaf]
            if len(parts) == 1 and parts[0].at is None:
                whole = x[self.rows(parts[0])]
            else:
                flat = own.double().reshape(-1)
                everywhere = torch.arange(len(flat), device=flat.device)
                at = torch.cat([everywhere if part.at is None else part.at for part in parts])
                whole = flat.index_put((at,), torch.cat([x[self.rows(part)] for part in parts]))
            arguments[leaf] = whole.view(own.shape)
        return term.called(arguments) / self._loss_scale

    def outputs_in(self, given: Given, before: int, x: Tensor) -> Tensor | None:
        """The own part of x as criteria got it when called again (``given``); None if these calls are not the training step's.

        ``before`` counts the calls before the training step, whose own part is x.
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
        """The criteria, each once."""
        return list(dict.fromkeys(term.criterion for term in self._terms))

    def value(self, x: Tensor) -> float:
        """C(x) for x ``[R]`` in float64; inf where a criterion refuses that x."""
        try:
            total = self._part(x[self._shares.here])
        except RefusedError:
            total = x.new_tensor(math.inf)
        return float(self._world.sum(total))

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """C and ∇ₓC, ``[R]``."""
        total, found = value_and_gradient(self._part, x[self._shares.here])
        return float(self._world.sum(total)), self._shares.gathered(found)

    def own_gradient(self, x: Tensor) -> Tensor:
        """The gradient of `own`."""
        return value_and_gradient(self.own, x)[1]

    @property
    def eps(self) -> float:
        """Machine epsilon of the arguments of criteria, the coarsest."""
        given = [term.arguments[leaf] for term in self._terms for leaf in term.entries]
        return max((torch.finfo(argument.dtype).eps for argument in given), default=0.0)

    @property
    def is_sum(self) -> bool:
        """Whether criteria sum over samples, so that losses of more samples are larger."""
        return all(getattr(term.criterion, "reduction", None) == "sum" for term in self._terms)

    def curvatures(self, x: Tensor, g: Tensor) -> Tensor:
        """The curvature c of each entry of x, ``[R]``: H = ∇²ₓC for squares, an upper bound of it for losses that have one.

        | criterion | c of an entry, by what the mean divides by |
        |---|---|
        | MSELoss | 2 |
        | HalfSquaredLoss | 1 |
        | CrossEntropyLoss | ½ · weight of the sample |
        | BCEWithLogitsLoss | ¼ · weight of the entry |
        | other squares, Σ hᵢ(xᵢ − yᵢ)²/2 | hᵢ |
        | others | the largest eigenvalue of H at x; where H = 0, g·g/2C, that of a square with minimum 0 |

        Entries that the loss does not depend on have 0.

        Raises:
            RuntimeError: The loss has negative curvature in all directions, as when it is multiplied by −1.
        """
        part, own = x[self._shares.here], g[self._shares.here]
        total = self._curvatures(part, self._world)
        total = torch.where((own == 0) & ~torch.isfinite(part), 0.0, total)  # dead
        if total.numel() and float(total.min()) < 0:
            raise RuntimeError(
                "The loss has a negative multiple of `criterion` in it, so that it is to be maximized there, and nothing was "
                "changed. AdaptedGD minimizes: leave the sign out, or give it a loss that is to be minimized."
            )
        return self._shares.gathered(total)

    def own_curvatures(self, x: Tensor) -> Tensor:
        """The curvatures of the own part x, without what other processes know."""
        return self._curvatures(x, ALONE)

    def _curvatures(self, x: Tensor, world: World) -> Tensor:
        """The curvatures of the own part x: closed forms, and for other terms what these processes know together."""
        total = torch.zeros_like(x)
        others: dict[Any, OwnCurvature] = {}
        for number, (term, weight) in enumerate(zip(self._terms, self._weights, strict=True)):
            if not weight:
                continue
            closed = closed_form(term)
            if closed is None:
                others[self._shares.key(number)] = self._curvature_of_any(number, x)
                continue
            c = closed.reshape(-1)
            for part in term.entries[0]:
                total.index_add_(0, self.rows(part), (c if part.at is None else c[part.at]) * (weight / self._loss_scale))
        everywhere = world.objects({key: each.told for key, each in others.items()})
        for key, each in others.items():
            total += each.shared([told[key] for told in everywhere if key in told])
        return total

    def _curvature_of_any(self, number: int, x: Tensor) -> OwnCurvature:
        """The curvature of a term by its Hessian. It is a square if its Hessian is a diagonal ≥ 0 and the same elsewhere."""

        def function(x: Tensor) -> Tensor:
            return self._weights[number] * self._term(number, x)

        touched = torch.cat([self.rows(part) for part in self._terms[number].parts]).unique()
        hessian = Hessian(function, x, touched, self.owners)
        used = torch.zeros_like(x, dtype=torch.bool)
        used[touched] = True
        g = value_and_gradient(function, x)[1]
        squares: Tensor | None = None
        if (h := hessian.diagonal) is not None and h.numel() and float(h.max()) > 0 and float(h.min()) >= 0:
            other = torch.where(used & torch.isfinite(x), x - g / float(h.max()), x)
            if bool(((h > 0) | (g == 0)).all()):
                with contextlib.suppress(RefusedError):
                    again = Hessian(function, other, touched, self.owners).diagonal
                    if again is not None and float((again - h).norm()) <= 1e-10 * float(h.norm()):
                        squares = h
        largest = math.nan if squares is not None and self._world.size == 1 else hessian.largest
        told = (squares is not None, largest, float(g.square().sum()), float(function(x).detach()))
        return OwnCurvature(squares, used & ((g != 0) | hessian.touches), told)

    @functools.cached_property
    def owners(self) -> Tensor:
        """The sample of each row, ``[R]``: outputs with the same number of samples share them."""
        alike = len({n for n, _ in self.sizes}) == 1
        numbers, first = [], 0
        for n, q in self.sizes:
            numbers.append(first + torch.arange(n).repeat_interleave(q))
            first += 0 if alike else n
        device = next(iter(self._rows.values())).device
        return torch.cat(numbers).to(device)  # only asked for where there are rows

    def hessian_metric(self, x: Tensor, g: Tensor) -> Metric:
        """H = SSᵀ at x, without its negative part; a RuntimeError if H is zero, or couples too many samples."""
        part, own = x[self._shares.here], g[self._shares.here]
        own_keep, blocks = self._curved(part, own)
        keep = self._shares.gathered(own_keep)
        if not bool(keep.any()):  # a stationary point
            return DiagonalMetric(torch.ones_like(x), torch.ones_like(keep))
        if not self._world.any(blocks.index.shape[1] > 1):
            h = self._shares.gathered(blocks.values.reshape(-1)).clamp(min=0.0)
            if not bool((h > 0).any()):
                raise RuntimeError(
                    'The loss has no curvature at these outputs, which metric="ggn" is, so nothing was changed. '
                    'Use metric="euclidean" for losses that are linear in what they are given, such as NLLLoss and L1Loss.'
                )
            return DiagonalMetric(torch.where(g != 0, h.clamp(min=LEAST * float(h.max())), h).sqrt(), keep)
        calls_apart = len({n for n, _ in self.sizes}) == len(self.sizes) or len(self.sizes) <= 1
        noise = 64 * torch.finfo(x.dtype).eps * self.curvatures(x, g) * torch.where(keep, x.abs(), 0.0).clamp(min=1.0)
        told = self._world.objects((blocks, calls_apart and blocks.by_sample))
        whole = Blocks.stacked([each for each, _ in told], self._shares.lengths or [self.size])
        return BlockMetric(whole.index, whole.values, g, noise, keep, local=all(apart for _, apart in told))

    def _curved(self, x: Tensor, g: Tensor) -> tuple[Tensor, Blocks]:
        """Which rows of the own part the loss depends on, and its Hessian in blocks; blocks of one row if it is a diagonal."""
        rows = torch.arange(self.size, device=x.device)
        if not self.size:
            return torch.zeros_like(x, dtype=torch.bool), Blocks(rows[:, None], x[:, None, None], by_sample=True)
        hessian = Hessian(self._part, x, rows, self.owners)
        if hessian.blocks is None:
            raise RuntimeError(
                f"The loss couples all of its {self.size} outputs, so that its Hessian would have to be held as one, and "
                'nothing was changed. Use metric="euclidean", or fewer samples at a time.'
            )
        return ((g != 0) | hessian.touches) & torch.isfinite(x), hessian.blocks
