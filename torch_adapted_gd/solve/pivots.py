"""Pivoted Cholesky in blocks: Θ ≈ LLᵀ with as many columns as Θ has rank, at the cost of that rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 128  # candidates per block: products are large enough to be fast, and few candidates are rejected
_RELATIVE = 0.3  # pivots below this part of the largest wait; errors stay within about four times those of strict order


@dataclass(frozen=True)
class Pivots:
    """Θ[p, p] = WᵀW + S for a permutation p: W has independent rows, and S, the remainder, is zero but in the last n − r.

    Attributes:
        order: p ``[n]``, the rows of Θ taken as pivots first.
        rows: W ``[r, n]``, its first r columns upper triangular.
    """

    order: Tensor
    rows: Tensor


def pivoted_cholesky(matrix: Tensor, floor: float) -> Pivots | None:
    """Take rows of Θ as pivots, the largest remaining diagonals first, until none is above the ``floor``.

    Each block takes candidates by their diagonal. A candidate that others before it in the block explain (a duplicate, say)
    waits for a later block. The accepted ones are eliminated from the rest with one matrix product. Up to a constant factor
    in the size of the pivots, this is the order of textbook pivoting, which takes one column at a time.

    Args:
        matrix: Θ ``[n, n]``, float64.
        floor: Diagonals of the remainder up to this are zero.

    Returns:
        The pivots; None if rounding made a block of them indefinite.
    """
    n = len(matrix)
    order = torch.arange(n, device=matrix.device)
    left = matrix.diagonal().clone()  # the diagonal of the remainder, in this order
    rows = matrix.new_zeros(min(n, 4 * _BLOCK), n)
    rank = 0
    while rank < n:
        largest = float(left[rank:].max())
        if largest <= floor:
            break
        if len(rows) < min(n, rank + _BLOCK):
            rows = torch.cat([rows, rows.new_zeros(min(n - len(rows), len(rows)), n)])
        candidates = rank + left[rank:].topk(min(_BLOCK, n - rank)).indices
        taken = rows[:rank, candidates]  # [rank, c]
        remainder = matrix[order[candidates][:, None], order[candidates]] - taken.T @ taken  # S there, [c, c]
        chosen = candidates[_independent(remainder, max(_RELATIVE * largest, floor))]
        _to_front(chosen, rank, order, left, rows)
        stop = rank + len(chosen)
        part = matrix[order[rank:stop]][:, order[rank:]]  # [b, n - rank]
        part.addmm_(rows[:rank, rank:stop].T, rows[:rank, rank:], alpha=-1)
        factor, info = torch.linalg.cholesky_ex(part[:, : len(chosen)])
        if int(info):
            return None
        rows[rank:stop, rank:stop] = factor.mT
        rows[rank:stop, stop:] = torch.linalg.solve_triangular(factor, part[:, len(chosen) :], upper=False)
        left[stop:] -= rows[rank:stop, stop:].square().sum(0)
        rank = stop
    return Pivots(order, rows[:rank])


def _independent(block: Tensor, floor: float) -> Tensor:
    """Which rows of a block of the remainder keep a pivot above the floor, given those before them: a mask.

    A row that others explain gets a pivot of at most about twice the shift of the diagonal, which keeps the factor finite.
    """
    factor, _ = torch.linalg.cholesky_ex(block + 1e-3 * floor * torch.eye(len(block), dtype=block.dtype, device=block.device))
    keep: Tensor = factor.diagonal().square() > floor  # false for NaN, too
    keep[0] = True  # even after overflow, so that each block takes a step
    return keep


def _to_front(chosen: Tensor, start: int, order: Tensor, left: Tensor, rows: Tensor) -> None:
    """Exchange the places ``chosen`` with those from ``start`` on, in place, moving as few columns as that takes."""
    stop = start + len(chosen)
    front = torch.arange(start, stop, device=order.device)
    here = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    here[chosen] = True
    beyond = chosen[chosen >= stop]
    target = torch.cat([front, beyond])
    source = torch.cat([chosen, front[~here[start:stop]]])
    rows[:start, target] = rows[:start, source]
    order[target], left[target] = order[source], left[source]
