"""Curvature of a loss in its arguments: its Hessian, by the criterion's own derivatives, and closed forms of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..losses import HalfSquaredLoss
from ..tracking.terms import Term

_COLUMNS = 256  # most columns of blocks of a Hessian, each a double backward pass of the criterion
_ENTRIES = 2**24  # most entries of all blocks
_FEW = 32  # columns up to which blocks give the largest eigenvalue
_LANCZOS = 80  # steps that give it for more columns


@dataclass(frozen=True)
class OwnCurvature:
    """The curvature of one call of a criterion without a closed form, as far as this process knows it."""

    squares: Tensor | None  # H, if the loss is a square
    touched: Tensor  # the rows that it depends on
    told: tuple[bool, float, float, float]  # for all processes: whether it is a square, the largest eigenvalue, |g|², the value

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
class Blocks:
    """Blocks of a Hessian."""

    index: Tensor  # the rows of each, [G, m], −1 for none
    values: Tensor  # [G, m, m]
    by_sample: bool  # whether there is one for each sample

    @classmethod
    def stacked(cls, parts: list[Blocks], lengths: list[int]) -> Blocks:
        """Those of all processes, which have so many rows each."""
        most, start = max(part.index.shape[1] for part in parts), 0
        index, values = [], []
        for part, length in zip(parts, lengths, strict=True):
            wider = most - part.index.shape[1]
            index.append(pad(torch.where(part.index >= 0, part.index + start, -1), (0, wider), value=-1))
            values.append(pad(part.values, (0, wider, 0, wider)))
            start += length
        return cls(torch.cat(index), torch.cat(values), all(part.by_sample for part in parts))


class Hessian:
    """The structure of ∇² of a function at x: a diagonal, blocks of rows, or neither.

    Products with random vectors decide: Hs = s∘H1 for random s only for a diagonal, and H(t∘s) = t∘Hs for t constant within
    samples only if samples are not coupled.

    Args:
        function: Of x ``[R]``.
        x: Where.
        rows: Which rows it is a function of.
        owners: The sample of each row ``[R]``.

    Attributes:
        diagonal: ``[R]`` if it is one, else None.
        touches: Which rows it is not zero in.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor, owners: Tensor) -> None:
        self._x, self._rows = x.detach().clone().requires_grad_(), rows
        with torch.enable_grad():
            value = function(self._x)
            (self._g,) = torch.autograd.grad(value, self._x, create_graph=True)
        generator = torch.Generator().manual_seed(0)
        s = (torch.rand(len(x), generator=generator, dtype=x.dtype) + 0.5).to(x.device)
        h, hs = self.times(torch.ones_like(x)), self.times(s)
        self.touches = (h != 0) | (hs != 0)
        self.diagonal: Tensor | None = h if float((hs - s * h).norm()) <= 1e-12 * float(hs.norm()) else None
        if self.diagonal is not None:
            return
        whole = owners.unique(return_inverse=True)[1]
        t = (torch.rand(int(whole.max()) + 1, generator=generator, dtype=x.dtype) + 0.5).to(x.device)[whole]
        self._by_sample = float((self.times(t * s) - t * hs).norm()) <= 1e-12 * float(hs.norm())
        group = whole[rows] if self._by_sample else torch.zeros_like(rows)
        order = torch.argsort(group, stable=True)
        self._ordered = rows[order]  # the rows in the order of their blocks
        self._number = group[order].unique_consecutive(return_inverse=True)[1]  # the number of each one's block
        self._counts = torch.bincount(self._number)

    @functools.cached_property
    def blocks(self) -> Blocks | None:
        """The blocks, of single rows if it is a diagonal, else of samples or of all rows; None if they are too large."""
        if self.diagonal is not None:
            return Blocks(self._rows[:, None], self.diagonal[self._rows, None, None], by_sample=True)
        rows, number, counts, x = self._ordered, self._number, self._counts, self._x.detach()
        most = int(counts.max())
        if most > _COLUMNS * (1 if self._by_sample else 16) or len(counts) * most**2 > _ENTRIES:
            return None
        rank = torch.arange(len(rows), device=x.device) - (counts.cumsum(0) - counts)[number]
        index = torch.full((len(counts), most), -1, device=x.device)
        index[number, rank] = rows
        blocks = x.new_zeros(len(counts), most, most)
        for column in range(most):
            unit = torch.zeros_like(x)
            unit[rows[rank == column]] = 1.0
            blocks[number, rank, column] = self.times(unit)[rows]
        return Blocks(index, (blocks + blocks.mT) / 2, self._by_sample)

    def times(self, v: Tensor) -> Tensor:
        """Hv."""
        if not self._g.requires_grad:
            return torch.zeros_like(v)
        try:
            (found,) = torch.autograd.grad(self._g, self._x, v, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            return torch.zeros_like(v)  # torch does not differentiate it twice, such as MultiMarginLoss
        return torch.zeros_like(v) if found is None else found.detach()

    @functools.cached_property
    def largest(self) -> float:
        """Its largest eigenvalue."""
        if self.diagonal is not None:
            return float(self.diagonal.max())
        if int(self._counts.max()) <= _FEW and self.blocks is not None:
            return float(torch.linalg.eigvalsh(self.blocks.values).max())
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


def value_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """A function at x and its gradient there; zero if it does not depend on x."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = function(x)
        found = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
    return value.detach(), torch.zeros_like(x) if found is None else found.detach()


def closed_form(term: Term) -> Tensor | None:
    """The curvature of each entry of the first argument of a loss that has a closed form or bound of it; else None."""
    form = _FORMS.get(type(term.criterion))
    if form is None or list(term.entries) != [0] or list(term.factors) != [0] or len(term.arguments) != 2:
        return None
    x, y = term.arguments
    return form(term.criterion, x, y, term.factors[0]) if isinstance(y, Tensor) else None


def _reduced(criterion: Any, f: Tensor, weight: Tensor, total: Tensor | float) -> Tensor:
    """The weight of each value times f, over ``total`` if the reduction is a mean."""
    return f * weight / total if criterion.reduction == "mean" else f * weight


def _squares(criterion: nn.MSELoss, x: Tensor, y: Tensor, f: Tensor) -> Tensor | None:
    if x.shape != y.shape:
        return None
    return 2 * _reduced(criterion, f, torch.ones_like(x, dtype=torch.float64), x.numel())


def _half_squares(criterion: HalfSquaredLoss, x: Tensor, y: Tensor, f: Tensor) -> Tensor | None:  # noqa: ARG001
    f = f.view(-1, *[1] * (x.ndim - 1)) if criterion.reduction == "none" else f
    return _reduced(criterion, f, torch.ones_like(x, dtype=torch.float64), x.shape[0])


def _binary(criterion: nn.BCEWithLogitsLoss, x: Tensor, y: Tensor, f: Tensor) -> Tensor | None:
    if x.shape != y.shape:
        return None
    y = y.double()
    weight = torch.ones_like(y) if criterion.weight is None else torch.ones_like(y) * criterion.weight.double()
    if criterion.pos_weight is not None:
        weight = weight * (1 - y + y * criterion.pos_weight.double())
    return 0.25 * _reduced(criterion, f, weight, x.numel())


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
    return (0.5 * _reduced(criterion, f, samples, total)).unsqueeze(dim).expand_as(x)


_FORMS: dict[type, Callable[[Any, Tensor, Tensor, Tensor], Tensor | None]] = {
    nn.MSELoss: _squares,
    HalfSquaredLoss: _half_squares,
    nn.BCEWithLogitsLoss: _binary,
    nn.CrossEntropyLoss: _classes,
}
