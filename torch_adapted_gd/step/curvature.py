"""Curvature of a loss in its arguments: its Hessian, by the criterion's own derivatives, and closed forms of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import HalfSquaredLoss
from ..tracking.terms import Term

_COLUMNS = 256  # of blocks of a Hessian that are found one after the other, by a double backward pass of the criterion each
_ENTRIES = 2**24  # of all blocks
_FEW = 32  # columns up to which they give the largest eigenvalue
_LANCZOS = 80  # steps that give it where there are more


@dataclass(frozen=True)
class OwnCurvature:
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
class Blocks:
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
    def stacked(cls, parts: list[Blocks], lengths: list[int]) -> Blocks:
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


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∇ of a function at x; zero where it does not depend on x."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = function(x)
        if not value.requires_grad:
            return torch.zeros_like(x)
        (found,) = torch.autograd.grad(value, x, allow_unused=True)
    return torch.zeros_like(x) if found is None else found.detach()


def closed_form(term: Term) -> tuple[int, Tensor] | None:
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
