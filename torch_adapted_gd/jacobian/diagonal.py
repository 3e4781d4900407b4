"""Blocks of Θ without the whole of it: between the outputs of single samples, and between all samples for single outputs."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .blocks import SortedTerms, terms_of
from .chunks import Chunk
from .gram import ROWS_ELEMENTS, add_gram, add_products, ranges
from .operator import Components
from .products import OneHot, OuterProducts, SharedLeftFactor, tiles

_TILE_ROWS = 512  # rows of a tile on the CPU: a square tile of float32 stays in the cache


def sample_blocks(chunks: Sequence[Chunk], n: int, q: int, device: torch.device) -> Tensor:
    """Θ(x_n, x_n) of all samples of one call, ``[N, Q, Q]`` in float64."""
    total = torch.zeros(n, q, q, dtype=torch.float64, device=device)
    for i, first in enumerate(chunks):
        for second in chunks[i:]:
            _add_sample_blocks(total, first, second)
    return total


def combined(chunks: Sequence[Chunk], rotation: Tensor) -> Components:
    """The terms of linear combinations of the outputs of one call, given by its chunks; weights ``rotation``, ``[N, Q, C]``."""
    components: Components = []
    by_piece: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        by_piece.setdefault(id(chunk.piece), []).append(chunk)
    for first, *others in by_piece.values():
        uses = first.rotated(rotation[:, first.outputs.start : first.outputs.stop])
        for chunk in others:
            for use, more in zip(uses, chunk.rotated(rotation[:, chunk.outputs.start : chunk.outputs.stop]), strict=True):
                for key, tensor in more.held.items():
                    use.held[key] += tensor
        whole = replace(first, outputs=range(first.first, first.first + first.piece.q), kept={})
        weights = rotation[:, whole.outputs.start : whole.outputs.stop]
        for names, members in whole.components(uses):
            terms = whole.terms(names, members, weights)
            for other, found in [c for c in components if c[0] & names]:  # from other outputs of the call
                components.remove((other, found))
                names = names | other
                for key, more_terms in found.items():
                    terms.setdefault(key, []).extend(more_terms)
            components.append((names, terms))
    return components


def add_output_blocks(out: Tensor, rows: Components, columns: Components | None) -> None:
    """Add the blocks ``[C, N, M]`` between two calls, or within one if ``columns`` is None, on and above the diagonal."""
    for names, terms in rows:
        parts = SortedTerms.of(terms) if columns is None else SortedTerms.of(terms, terms_of(names, columns))
        for first, second in parts.written.values():
            for c, block in enumerate(out):
                add_gram(block, first[:, c], None if second is None else second[:, c])
        for _, shared in parts.shared_left:
            _add_shared(out, shared, columns is None)


def _add_shared(out: Tensor, shared: SharedLeftFactor, symmetric: bool) -> None:
    """Add the part of parameters with shared left factors to the block of each combination."""
    count, n, m = out.shape
    singles = [shared.of_output(c) for c in range(count)]
    if singles[0].explicit_is_cheaper():
        for block, single in zip(out, singles, strict=True):
            for first, second in single.blocks(out.dtype):
                add_gram(block, first, second)
        return
    step = singles[0].samples_at_a_time(_TILE_ROWS if out.device.type == "cpu" else 4096)
    # The right factors are the same for all combinations.
    products = shared.right_products(slice(None), slice(None), out.dtype) if shared.single else None
    for block, single in zip(out, singles, strict=True):
        add = single.contraction(out.dtype, products)
        for i, j in tiles(n, m, step, symmetric):
            add(i, j, block[i, j])


def _add_sample_blocks(total: Tensor, first: Chunk, second: Chunk) -> None:
    """Add the products of the rows of two chunks of one call, and their transposes if the chunks differ."""
    rows, columns = (slice(c.outputs.start, c.outputs.stop) for c in (first, second))
    block = total[:, rows, columns]
    part = block if first is second else torch.zeros_like(block)
    theirs = [] if first is second else second.factors().components
    for names, parts in first.sorted():
        if first is not second:
            parts = SortedTerms.of(parts.terms, terms_of(names, theirs))
        for jacobian, other_jacobian in parts.written.values():
            add_products(part, jacobian, jacobian if other_jacobian is None else other_jacobian)
        for _, shared in parts.shared_left:
            for a, b in zip(shared.first, shared.second, strict=True):
                _add_outer_products(part, a, b)
    if first is not second:
        total[:, rows, columns] += part
        total[:, columns, rows] += part.transpose(1, 2)


def _add_outer_products(total: Tensor, first: OuterProducts, second: OuterProducts) -> None:
    """Add the products of outer products, written out or contracted, whichever needs fewer operations."""
    _, q, g, o, t = first.left.shape
    r, s = second.left.shape[1], second.left.shape[4]
    onehot = isinstance(first.right, OneHot)
    contracted = t * s * (0 if onehot else first.width) + q * o * t * s + q * r * o * t
    written = (q * t + r * s) * o * (1 if onehot else first.width) + q * r * o * first.width
    if written < contracted:
        for samples in ranges(len(total), g * o * first.width * q):
            mine = first.of_samples(samples, torch.float64)
            theirs = mine if second is first else second.of_samples(samples, torch.float64)
            for part in mine.column_blocks(ROWS_ELEMENTS):
                jacobian = mine.columns(part, torch.float64).flatten(2)
                other = jacobian if theirs is mine else theirs.columns(part, torch.float64).flatten(2)
                total[samples].baddbmm_(jacobian, other.transpose(1, 2))
        return
    for samples in ranges(len(total), g * t * (s + q * o)):
        for group in range(g):
            left = first.left[samples, :, group].double()  # [n, Q, O, T]
            other = left if second is first else second.left[samples, :, group].double()
            if isinstance(first.right, OneHot) and isinstance(second.right, OneHot):
                weights = (first.right.index[samples, :, None] == second.right.index[samples, None, :]).double()
            else:
                assert isinstance(first.right, Tensor)
                assert isinstance(second.right, Tensor)
                one, two = (right[samples, group].double() for right in (first.right, second.right))
                weights = one.transpose(1, 2) @ two  # [n, T, S]
            weighted = (left.flatten(1, 2) @ weights).view(len(left), q, -1)
            total[samples].baddbmm_(weighted, other.reshape(len(left), r, -1).transpose(1, 2))
