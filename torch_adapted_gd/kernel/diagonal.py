"""Blocks of Θ that are cheap without the whole: of single samples, and of single combinations of all samples' outputs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import BLOCK_ELEMENTS, Parts, Terms
from .capture import exactly
from .chunks import Chunk
from .dense import StackedJacobian, add_gram, spans
from .products import Family, OneHot, OuterProducts, tiles
from .structured import StructuredKernel

Factors = StructuredKernel | StackedJacobian
_TILE_ROWS = 512  # of a block, worked on at a time on the CPU: such a tile of float32 stays in the cache


def sample_blocks(factors: Factors, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Θ(x_n, x_n) of all samples of each call, ``[N, Q, Q]`` in float64.

    Args:
        factors: What Θ is made of.
        shapes: N and Q of each call.
    """
    blocks = []
    with torch.no_grad():
        for number, (n, q) in enumerate(shapes):
            total = torch.zeros(n, q, q, dtype=torch.float64, device=factors.device)
            for written in factors.written_of(number):
                _add_products(total, written.view(n, q, -1), written.view(n, q, -1))
            if isinstance(factors, StructuredKernel):
                with exactly(factors.device):
                    chunks = factors.chunks_of(number)
                    for i, first in enumerate(chunks):
                        for second in chunks[i:]:
                            _add_sample_blocks(total, first, second)
            blocks.append(total)
    return blocks


def output_blocks(factors: Factors, rotations: Sequence[Tensor], numbers: Sequence[int], out: Tensor) -> None:
    """Blocks of Θ between all samples for single combinations v_c of their outputs: v_cᵀΘv_c for each c.

    Args:
        factors: What Θ is made of.
        rotations: The weights v_c of a sample's outputs, ``[N_i, Q, C]`` for each of some calls.
        numbers: Which calls these are.
        out: Where to write them, ``[C, N, N]`` with N the samples of these calls, in the dtype of the arithmetic: on and above
            the diagonal, what is below is undefined.
    """
    out.zero_()
    places = spans([len(r) for r in rotations])
    count = rotations[0].shape[2]
    step = factors.combinations_at_once(count)
    with exactly(factors.device):
        for start in range(0, count, step):
            some = slice(start, min(start + step, count))
            for i, first in enumerate(rotations):
                rows = _combined(factors, numbers[i], first[:, :, some])
                for j in range(i, len(rotations)):
                    columns = None if i == j else _combined(factors, numbers[j], rotations[j][:, :, some])
                    _add_output_blocks(out[some, places[i], places[j]], rows, columns)


@dataclass(frozen=True)
class _Combined:
    """What D of one call is made of, its outputs combined.

    Attributes:
        components: By component, its parameters' names and their terms.
        written: Jacobians of what rules do not serve, ``[N, C, numel]``.
    """

    components: list[tuple[set[str], Terms]]
    written: list[Tensor]


def _combined(factors: Factors, number: int, rotation: Tensor) -> _Combined:
    n, q, _ = rotation.shape
    written = [torch.bmm(rotation.to(w.dtype).transpose(1, 2), w.view(n, q, -1)) for w in factors.written_of(number)]
    components = []
    if isinstance(factors, StructuredKernel):
        chunks = factors.chunks_of(number)
        calls = chunks[0].rotated(rotation[:, chunks[0].outputs])
        for chunk in chunks[1:]:
            for call, more in zip(calls, chunk.rotated(rotation[:, chunk.outputs]), strict=True):
                for place, gradient in more.gradients.items():
                    call.gradients[place] += gradient
        components = [(names, chunks[0].terms(members)) for names, members in chunks[0].components(calls)]
    return _Combined(components, written)


def _add_output_blocks(out: Tensor, rows: _Combined, columns: _Combined | None) -> None:
    """Add the blocks between two calls, ``[C, N, M]``, or within one (``columns`` None, on and above the diagonal)."""
    for names, terms in rows.components:
        if columns is None:
            parts = Parts.of(terms)
        else:
            theirs = {name: t for other, found in columns.components if other & names for name, t in found.items()}
            parts = Parts.of(terms, theirs)
        for first, second in parts.written.values():
            _add_grams(out, first, second)
        for _, family in parts.families:
            _add_family(out, family, columns is None)
    for number, first in enumerate(rows.written):
        _add_grams(out, first, None if columns is None else columns.written[number])


def _add_grams(out: Tensor, first: Tensor, second: Tensor | None) -> None:
    for c, block in enumerate(out):
        add_gram(block, first[:, c], None if second is None else second[:, c])


def _add_family(out: Tensor, family: Family, symmetric: bool) -> None:
    """Add a family's part to each combination's block."""
    count, n, m = out.shape
    singles = [family.of_output(c) for c in range(count)]
    if singles[0].explicit_is_cheaper():
        for block, single in zip(out, singles, strict=True):
            for first, second in single.blocks(BLOCK_ELEMENTS):
                add_gram(block, first.flatten(0, 1), None if second is None else second.flatten(0, 1))
        return
    step = singles[0].samples_at_a_time(_TILE_ROWS if out.device.type == "cpu" else 4096)
    if not family.single:
        for block, single in zip(out, singles, strict=True):
            contraction = single.contraction(out.dtype)
            for i, j in tiles(n, m, step, symmetric):
                block[i, j] += contraction(i, j)
        return
    everything = slice(None)
    products = family.right_products(everything, everything, out.dtype)[0]  # [N, M], the same for all combinations
    memory = out.new_empty(step * step)
    for block, single in zip(out, singles, strict=True):
        left1 = single.first[0].left.reshape(n, -1).to(out.dtype).contiguous()
        left2 = left1 if symmetric else single.second[0].left.reshape(m, -1).to(out.dtype).contiguous()
        for i, j in tiles(n, m, step, symmetric):
            part = memory[: (i.stop - i.start) * (j.stop - j.start)].view(i.stop - i.start, j.stop - j.start)
            torch.mm(left1[i], left2[j].T, out=part)
            block[i, j].addcmul_(part, products[i, j])


def _add_sample_blocks(total: Tensor, first: Chunk, second: Chunk) -> None:
    """Add what two chunks of one call have in common: the rows of the first with those of the second, and the reverse."""
    rows, columns = (slice(c.outputs.start, c.outputs.stop) for c in (first, second))
    block = total[:, rows, columns]
    part = block if first is second else torch.zeros_like(block)
    theirs = [] if first is second else [(n, second.terms(c)) for n, c in second.components(second.module_calls())]
    for place, (names, calls) in enumerate(first.components(first.module_calls())):
        parts = first.parts(place, calls)
        if first is not second:
            found = {name: t for other, terms in theirs if other & names for name, t in terms.items()}
            parts = Parts.of(parts.terms, found)
        for jacobian, other in parts.written.values():
            _add_products(part, jacobian, jacobian if other is None else other)
        for _, family in parts.families:
            for a, b in zip(family.first, family.second, strict=True):
                _add_term(part, a, b)
    if first is not second:
        total[:, rows, columns] += part
        total[:, columns, rows] += part.transpose(1, 2)


def _add_products(total: Tensor, first: Tensor, second: Tensor) -> None:
    """Add products of written-out rows of each sample, ``[N, Q, numel]`` and ``[N, R, numel]``, to ``[N, Q, R]``."""
    for samples in _samples(first):
        left = first[samples].double()
        right = left if second is first else second[samples].double()
        total[samples].baddbmm_(left, right.transpose(1, 2))


def _add_term(total: Tensor, first: OuterProducts, second: OuterProducts) -> None:
    """The same for outer products."""
    _, q, g, o, t = first.left.shape
    r, s = second.left.shape[1], second.left.shape[4]
    onehot = isinstance(first.right, OneHot)
    contracted = t * s * (0 if onehot else first.width) + q * o * t * s + q * r * o * t
    written = (q * t + r * s) * o * (1 if onehot else first.width) + q * r * o * first.width
    if written < contracted:
        for samples in _samples(first.left, g * o * first.width * q):
            mine = first.of_samples(samples, torch.float64)
            theirs = mine if second is first else second.of_samples(samples, torch.float64)
            for columns in mine.column_blocks(BLOCK_ELEMENTS):
                jacobian = mine.explicit(columns)
                total[samples].baddbmm_(jacobian, (jacobian if theirs is mine else theirs.explicit(columns)).transpose(1, 2))
        return
    for samples in _samples(first.left, max(1, g * t * (s + q * o))):
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


def _samples(tensor: Tensor, elements: int | None = None) -> Iterator[slice]:
    """Ranges of samples of at most `BLOCK_ELEMENTS` entries, or one sample."""
    n = len(tensor)
    each = tensor[0].numel() if elements is None and n else elements or 1
    step = max(1, BLOCK_ELEMENTS // max(1, each))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
