"""The part of Θ of embeddings: only places that use the same row of the table contribute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .gram import add_gram
from .products import OneHot, OuterProducts, SharedLeftFactor

_ELEMENTS = 2**20  # entries of factors that are gathered at a time
# Writing out the columns of one row of the table takes as long as this fraction of all pairs of samples one by one.
_MANY = 1 / 16


@dataclass(frozen=True)
class _Rows:
    """The gradients ``values`` ``[P, Q, O]`` at row ``index`` of the table from ``sample``, summed over the sample's places."""

    sample: Tensor
    index: Tensor
    values: Tensor

    @classmethod
    def of(cls, term: OuterProducts, dtype: torch.dtype) -> _Rows:
        """The rows of a term."""
        assert isinstance(term.right, OneHot)
        n, q, _, o, t = term.left.shape
        place = torch.arange(n, device=term.left.device)[:, None] * term.right.size + term.right.index
        keys, inverse = place.reshape(-1).unique(return_inverse=True)
        each = term.left.squeeze(2).permute(0, 3, 1, 2).to(dtype).reshape(n * t, q * o)
        values = each.new_zeros(len(keys), q * o).index_add_(0, inverse, each)
        return cls(keys // term.right.size, keys % term.right.size, values.view(-1, q, o))


def add_by_index(theta: Tensor, shared: SharedLeftFactor) -> None:
    """Add the part of embeddings to Θ, ``[N·Q, M·R]``; to a symmetric one on and above the diagonal.

    A row of the table that few samples use is multiplied for each pair of them. One that many use is written out.
    """
    for first, second in zip(shared.first, shared.second, strict=True):
        assert isinstance(first.right, OneHot)
        size, n, m = first.right.size, len(first.left), len(second.left)
        rows = _Rows.of(first, theta.dtype)
        columns = rows if second is first else _Rows.of(second, theta.dtype)
        of_rows, of_columns = (torch.bincount(side.index, minlength=size) for side in (rows, columns))
        many = of_rows * of_columns > _MANY * n * m
        _add_pairs(theta, rows, columns, torch.where(many, 0, of_columns))
        for block, other in _written(rows, columns, many, (n, m)):
            add_gram(theta, block, other)


def _add_pairs(theta: Tensor, rows: _Rows, columns: _Rows, counts: Tensor) -> None:
    """Add the products of all pairs with the same index; ``counts`` is the number of columns for each index, 0 to skip it."""
    (_, q, o), r = rows.values.shape, columns.values.shape[1]
    starts = torch.bincount(columns.index, minlength=len(counts)).cumsum(0)
    order = torch.argsort(columns.index)
    repeats = counts[rows.index]
    blocks = theta.unflatten(0, (-1, q)).unflatten(2, (-1, r)).transpose(1, 2)  # [N, M, Q, R]
    step = max(1, _ELEMENTS // max(1, (q + r) * o))
    several = (repeats.cumsum(0) // step).unique_consecutive(return_counts=True)[1].tolist()  # rows with about so many pairs
    for some in torch.arange(len(repeats), device=theta.device).split(several):
        times = repeats[some]
        number = torch.arange(len(some), device=theta.device).repeat_interleave(times)
        last = times.cumsum(0)[number] - 1 - torch.arange(len(number), device=theta.device)
        mine = some[number]
        theirs = order[starts[rows.index[mine]] - 1 - last]
        if columns is rows:
            above = rows.sample[mine] <= rows.sample[theirs]
            mine, theirs = mine[above], theirs[above]
        products = rows.values[mine] @ columns.values[theirs].transpose(1, 2)
        blocks.index_put_((rows.sample[mine], columns.sample[theirs]), products, accumulate=True)


def _written(rows: _Rows, columns: _Rows, many: Tensor, samples: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Columns of D, of both sides, for the rows of the table that many samples use."""
    (_, q, o) = rows.values.shape
    step = max(1, _ELEMENTS // max(1, max(samples) * max(q, columns.values.shape[1]) * o))
    for some in many.nonzero()[:, 0].split(step):
        number = torch.full_like(many, -1, dtype=torch.long)
        number[some] = torch.arange(len(some), device=some.device)
        block = _dense(rows, number, samples[0], len(some))
        yield block, None if columns is rows else _dense(columns, number, samples[1], len(some))


def _dense(side: _Rows, number: Tensor, n: int, width: int) -> Tensor:
    """Columns of D, ``[N·Q, width·O]``, for the rows of the table that have a number."""
    q, o = side.values.shape[1:]
    there = number[side.index] >= 0
    dense = side.values.new_zeros(n, width, q, o)
    dense[side.sample[there], number[side.index[there]]] = side.values[there]
    return dense.transpose(1, 2).reshape(n * q, width * o)
