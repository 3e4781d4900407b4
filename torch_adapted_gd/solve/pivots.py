"""Pivoted Cholesky in blocks: Θ ≈ LLᵀ with as many columns as Θ has rank, at the cost of that rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 128  # candidates per block: the products are large enough to be fast, and few columns are looked at in vain
_LEAST = 16  # as few as this after blocks of which little was of use, as where the spectrum decays fast
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


def pivoted_cholesky(matrix: Tensor, floor: float, hopeless: float) -> Pivots | None:
    """Take rows of Θ as pivots, the largest remaining diagonals first, until none is above the ``floor``.

    Each block takes candidates by their diagonal. Those that others before them in the block explain (duplicates of them,
    say) wait for a later block, those accepted are eliminated from all the rest with one matrix product. This is the order of
    textbook pivoting up to a constant factor in the size of the pivots, without its walk of one column at a time.

    Args:
        matrix: Θ ``[n, n]``, float64.
        floor: Diagonals of the remainder up to this are zero.
        hopeless: Give up when the trace of a remainder above the floor falls below this: the rank will not be unambiguous.

    Returns:
        The factor; None when it was given up.
    """
    n = len(matrix)
    order = torch.arange(n, device=matrix.device)
    left = matrix.diagonal().clone()  # the diagonal of the remainder, in this order
    rows = matrix.new_zeros(min(n, 4 * _BLOCK), n)
    rank, width = 0, _BLOCK
    while rank < n:
        largest = float(left[rank:].max())
        if largest <= floor:
            break
        if float(left[rank:].clamp_min(0).sum()) < hopeless:
            return None
        if len(rows) < min(n, rank + _BLOCK):
            rows = torch.cat([rows, rows.new_zeros(min(n - len(rows), len(rows)), n)])
        candidates = rank + left[rank:].topk(min(width, n - rank)).indices
        chosen = candidates[_independent(_remainder(matrix, order, rows[:rank], candidates), max(_RELATIVE * largest, floor))]
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
        rank, width = stop, min(_BLOCK, max(_LEAST, 4 * len(chosen)))
    return Pivots(order, rows[:rank])


def _remainder(matrix: Tensor, order: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """S at these places, ``[c, c]``."""
    taken = rows[:, places]  # [k, c]
    return matrix[order[places][:, None], order[places]] - taken.T @ taken


def _independent(block: Tensor, floor: float) -> Tensor:
    """Which rows of a block of the remainder keep a pivot above the floor, given those before them: a mask, the first is in.

    A shift of the diagonal keeps the factorization alive where a row is explained by others, and leaves it a pivot of no more
    than about twice the shift.
    """
    factor, _ = torch.linalg.cholesky_ex(block + 1e-3 * floor * torch.eye(len(block), dtype=block.dtype, device=block.device))
    keep: Tensor = factor.diagonal().square() > floor  # false for NaN, too
    keep[0] = True  # whatever overflow does, so that each block takes a step
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
