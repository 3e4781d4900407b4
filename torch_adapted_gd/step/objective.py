"""The loss as a function of the outputs: C(x) = Σ ⟨f, criterion(x, y)⟩ by the user's own criteria, and its curvature."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import HalfSquaredLoss
from ..tracking.calls import Outputs
from ..tracking.closure import Given
from ..tracking.replay import batch_and_outputs
from ..tracking.terms import Entries, RefusedError, Term
from .output_metric import LEAST, BlockMetric, DiagonalMetric, Metric
from .shares import Shares

_COLUMNS = 256  # of blocks of a Hessian that are found one after the other, by a double backward pass of the criterion each
_ENTRIES = 2**24  # of all blocks
_FEW = 32  # columns up to which they give the largest eigenvalue
_LANCZOS = 80  # steps that give it where there are more


class Objective:
    """C as a function of x, the stacked outputs that criteria were given entries of, in all processes.

    Args:
        terms: The calls of the criteria in this process, with what the loss made of their values.
        stacked: What its part of x is stacked from, in this order.
        loss_scale: What a GradScaler multiplied the loss by.
        shares: What the other processes have; None if there are none.
    """

    def __init__(self, terms: list[Term], stacked: list[Outputs], loss_scale: float, shares: Shares | None = None) -> None:
        self._terms, self._loss_scale = terms, loss_scale
        self._shares = shares or Shares.alone()
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
        for number in range(len(self._terms)):
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
        return self._shares.gathered(_gradient(self._part, x[self._shares.here]))

    def own_gradient(self, x: Tensor) -> Tensor:
        """That of `own`."""
        return _gradient(self.own, x)

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

    def _known_curvatures(self, x: Tensor) -> tuple[Tensor, dict[Any, _Curvature]]:
        """Those of this process's part by closed forms, and what is known of those of other terms."""
        total = torch.zeros_like(x)
        others: dict[Any, _Curvature] = {}
        for number, term in enumerate(self._terms):
            closed = _closed_form(term)
            if closed is None:
                others[self._shares.key(number)] = self._of_any(functools.partial(self._term, number), term, x)
                continue
            leaf, c = closed
            scale = self._weights[number] / self._loss_scale
            for part in term.entries[leaf]:
                found = c.reshape(-1)
                total.index_add_(0, self.rows(part), (found if part.at is None else found[part.at]) * scale)
        return total, others

    def _of_any(self, function: Callable[[Tensor], Tensor], term: Term, x: Tensor) -> _Curvature:
        touched = torch.cat([self.rows(part) for part in term.parts]).unique()
        hessian = Hessian(function, x, touched, self.owners)
        used = torch.zeros_like(x, dtype=torch.bool)
        used[touched] = True
        g = _gradient(function, x)
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
        return _Curvature(squares, used & ((g != 0) | hessian.touches), told)

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
            blocks = _Blocks(torch.arange(self.size, device=x.device)[:, None], diagonal[:, None, None], True)
        calls_apart = len({n for n, _ in self.sizes}) == len(self.sizes) or len(self.sizes) <= 1
        noise = 64 * torch.finfo(x.dtype).eps * self.curvatures(x, g) * torch.where(keep, x.abs(), 0.0).clamp(min=1.0)
        told = self._world.objects((blocks, calls_apart and blocks.by_sample))
        whole = _Blocks.stacked([each for each, _ in told], self._shares.lengths or [self.size])
        return BlockMetric(whole.index, whole.values, g, noise, keep, local=all(apart for _, apart in told))

    def _curved(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None, _Blocks | None]:
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
        return keep, None, _Blocks(*hessian.blocks, hessian.by_sample)


@dataclass(frozen=True)
class _Curvature:
    """What is known of the curvature of one call of a criterion without a closed form.

    Attributes:
        squares: H, if this is a square.
        touched: The rows that it looks at.
        told: What all processes have to know of it: whether it is one, the largest eigenvalue, |g|² and the value.
    """

    squares: Tensor | None
    touched: Tensor
    told: tuple[bool, float, float, float]

    def shared(self, told: list[tuple[bool, float, float, float]]) -> Tensor:
        """The curvature of each row, given what all processes know."""
        if self.squares is not None and all(square for square, *_ in told):
            return self.squares
        largest = max(eigenvalue for _, eigenvalue, *_ in told)
        if largest <= 0:
            size, value = sum(each[2] for each in told), sum(each[3] for each in told)
            largest = size / (2 * value) if value > 0 else math.sqrt(size)
        return self.touched * torch.tensor(largest, dtype=torch.float64, device=self.touched.device)


@dataclass(frozen=True)
class _Blocks:
    """Blocks of a Hessian.

    Attributes:
        index: The rows of each ``[G, m]``, −1 for none.
        values: ``[G, m, m]``.
        by_sample: Whether there is one for each sample.
    """

    index: Tensor
    values: Tensor
    by_sample: bool

    @classmethod
    def stacked(cls, parts: list[_Blocks], lengths: list[int]) -> _Blocks:
        """Those of all processes, which have so many rows each."""
        most, start = max(part.index.shape[1] for part in parts), 0
        index, values = [], []
        for part, length in zip(parts, lengths, strict=True):
            wider = most - part.index.shape[1]
            moved = torch.where(part.index >= 0, part.index + start, part.index)
            index.append(torch.nn.functional.pad(moved, (0, wider), value=-1))
            values.append(torch.nn.functional.pad(part.values, (0, wider, 0, wider)))
            start += length
        return cls(torch.cat(index), torch.cat(values), all(part.by_sample for part in parts))


class Hessian:
    """The structure of ∇² of a function at x: a diagonal, blocks of rows, or neither.

    Args:
        function: Of x ``[R]``.
        x: Where.
        rows: Which rows it is a function of.
        owners: The sample of each row ``[R]``.

    Attributes:
        diagonal: ``[R]`` if it is one, else None.
        touches: Which rows it is not zero in.
        by_sample: Whether a block for each sample is all that there is.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor, owners: Tensor) -> None:
        self._x, self._rows = x.detach().clone().requires_grad_(), rows
        with torch.enable_grad():
            value = function(self._x)
            (self._g,) = torch.autograd.grad(value, self._x, create_graph=True)
        generator = torch.Generator().manual_seed(0)
        one = torch.ones_like(x)
        s = (torch.rand(len(x), generator=generator, dtype=x.dtype) + 0.5).to(x.device)
        h, hs = self.times(one), self.times(s)
        self.touches = (h != 0) | (hs != 0)
        self.diagonal: Tensor | None = None
        self.by_sample = False
        if float((hs - s * h).norm()) <= 1e-12 * float(hs.norm()):
            self.diagonal = h
            return
        self._owners = whole = owners.unique(return_inverse=True)[1]
        t = (torch.rand(int(whole.max()) + 1, generator=generator, dtype=x.dtype) + 0.5).to(x.device)[whole]
        self.by_sample = float((self.times(t * s) - t * hs).norm()) <= 1e-12 * float(hs.norm())

    def _grouped(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows in the order of their blocks, the number of each one's block, and how many each block has."""
        group = self._owners[self._rows] if self.by_sample else torch.zeros_like(self._rows)
        order = torch.argsort(group, stable=True)
        number = group[order].unique_consecutive(return_inverse=True)[1]
        return self._rows[order], number, torch.bincount(number)

    @functools.cached_property
    def blocks(self) -> tuple[Tensor, Tensor] | None:
        """The rows of each block ``[G, m]``, −1 for none, and the blocks ``[G, m, m]``; None if there are too many."""
        rows, number, counts = self._grouped()
        most, x = int(counts.max()), self._x.detach()
        if most > _COLUMNS * (1 if self.by_sample else 16) or len(counts) * most**2 > _ENTRIES:
            return None
        rank = torch.arange(len(rows), device=x.device) - (counts.cumsum(0) - counts)[number]
        index = torch.full((len(counts), most), -1, device=x.device)
        index[number, rank] = rows
        blocks = x.new_zeros(len(counts), most, most)
        for column in range(most):
            unit = torch.zeros_like(x)
            unit[rows[rank == column]] = 1.0
            image = self.times(unit)[rows]
            blocks[number, rank, column] = image
        return index, (blocks + blocks.mT) / 2

    def times(self, v: Tensor) -> Tensor:
        """Hv."""
        if not self._g.requires_grad:
            return torch.zeros_like(v)
        try:
            (found,) = torch.autograd.grad(self._g, self._x, v, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            return torch.zeros_like(v)  # of a loss that torch does not differentiate twice, such as MultiMarginLoss
        return torch.zeros_like(v) if found is None else found.detach()

    @functools.cached_property
    def largest(self) -> float:
        """Its largest eigenvalue."""
        if self.diagonal is not None:
            return float(self.diagonal.max())
        if int(self._grouped()[2].max()) <= _FEW and self.blocks is not None:
            return float(torch.linalg.eigvalsh(self.blocks[1]).max())
        v = torch.zeros_like(self._x)
        v[self._rows] = torch.randn(len(self._rows), generator=torch.Generator().manual_seed(1), dtype=v.dtype).to(v.device)
        basis, alphas, betas = [v / v.norm()], [], []  # Lanczos's, orthogonalized against all
        for _ in range(min(_LANCZOS, len(self._rows))):
            image = self.times(basis[-1])
            alphas.append(float(basis[-1] @ image))
            known = torch.stack(basis)
            for _ in range(2):
                image = image - known.T @ (known @ image)
            betas.append(float(image.norm()))
            if not betas[-1] > 1e-12 * max(map(abs, alphas)):
                break
            basis.append(image / betas[-1])
        off = torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64)
        tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
        return float(torch.linalg.eigvalsh(tridiagonal)[-1])


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = function(x)
        if not value.requires_grad:
            return torch.zeros_like(x)
        (found,) = torch.autograd.grad(value, x, allow_unused=True)
    return torch.zeros_like(x) if found is None else found.detach()


def _at(part: Entries, whole: Tensor) -> Tensor:
    return torch.arange(len(whole), device=whole.device) if part.at is None else part.at


def _closed_form(term: Term) -> tuple[int, Tensor] | None:
    """The curvature of each entry of the first argument of a loss that has a bound of it, and that argument's number."""
    kind = type(term.criterion)
    if kind not in _FORMS or list(term.entries) != [0] or list(term.factors) != [0] or len(term.arguments) != 2:
        return None
    x, y = term.arguments
    if not isinstance(y, Tensor):
        return None
    return (0, found) if (found := _FORMS[kind](term.criterion, x, y, term.factors[0])) is not None else None


def _shared(criterion: Any, f: Tensor, weight: Tensor, total: Tensor | float) -> Tensor:
    """The weight of each of the values times f, by the reduction."""
    return f * weight / total if criterion.reduction == "mean" else f * weight


def _squares(criterion: nn.MSELoss, x: Tensor, y: Tensor, f: Tensor) -> Tensor | None:
    if x.shape != y.shape:
        return None
    return 2 * _shared(criterion, f, torch.ones_like(x, dtype=torch.float64), x.numel())


def _half_squares(criterion: HalfSquaredLoss, x: Tensor, y: Tensor, f: Tensor) -> Tensor | None:  # noqa: ARG001
    f = f.view(-1, *[1] * (x.ndim - 1)) if criterion.reduction == "none" else f
    return _shared(criterion, f, torch.ones_like(x, dtype=torch.float64), x.shape[0])


def _binary(criterion: nn.BCEWithLogitsLoss, x: Tensor, y: Tensor, f: Tensor) -> Tensor | None:
    if x.shape != y.shape:
        return None
    y = y.double()
    weight = torch.ones_like(y) if criterion.weight is None else torch.ones_like(y) * criterion.weight.double()
    if criterion.pos_weight is not None:
        weight = weight * (1 - y + y * criterion.pos_weight.double())
    return 0.25 * _shared(criterion, f, weight, x.numel())


def _classes(criterion: nn.CrossEntropyLoss, x: Tensor, y: Tensor, f: Tensor) -> Tensor | None:
    dim = min(1, x.ndim - 1)
    classes, smoothing = x.shape[dim], criterion.label_smoothing
    weight = torch.ones(classes, device=x.device) if criterion.weight is None else criterion.weight
    weight = weight.double()
    if y.is_floating_point():
        soft = y.double() * (1 - smoothing) + smoothing / classes
        samples = (soft * weight.view(-1, *[1] * (x.ndim - dim - 1))).sum(dim)
        total: Tensor | float = samples.numel()
    else:
        seen = y != criterion.ignore_index
        of_class = torch.where(seen, weight[torch.where(seen, y, 0)], 0.0)
        samples = (1 - smoothing) * of_class + smoothing / classes * float(weight.sum()) * seen
        total = of_class.sum()
        if not float(total) > 0:
            samples, total = torch.zeros_like(samples), 1.0
    return (0.5 * _shared(criterion, f, samples, total)).unsqueeze(dim).expand_as(x)


_FORMS: dict[type, Callable[[Any, Tensor, Tensor, Tensor], Tensor | None]] = {
    nn.MSELoss: _squares,
    HalfSquaredLoss: _half_squares,
    nn.BCEWithLogitsLoss: _binary,
    nn.CrossEntropyLoss: _classes,
}
