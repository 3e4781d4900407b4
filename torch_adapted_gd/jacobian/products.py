"""ParameterVector of Θ from layer Jacobians in factors: outer products, contracted in the cheaper order."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .gram import ranges

_TOUCH = 64  # writing and permuting an entry of an intermediate costs as much as so many multiplications
_WRITTEN_ELEMENTS = 2**20  # entries of D that are written out at a time (8 MiB in float64)
_CACHED_ELEMENTS = 2**19  # entries of factors that are cast to float64 at a time (4 MiB)
_WORK_ELEMENTS = 2**23  # entries of an intermediate result (64 MiB in float64)


@dataclass(frozen=True)
class OneHot:
    """Unit vectors of length ``size``, given by the indices of their ones, ``[N, T]``."""

    index: Tensor
    size: int


@dataclass(frozen=True)
class OuterProducts:
    """The Jacobian by one parameter as a sum of outer products, D[n, q] = Σ_t left[n, q, g, :, t] ⊗ right[n, g, :, t].

    It is the Jacobian of a layer that applies one matrix at each of T places. ``left`` has the gradients of output q with
    respect to the results of the matrix, and ``right`` has its inputs.

    Attributes:
        left: ``[N, Q, G, O, T]``, for G groups, each with a matrix of its own.
        right: ``[N, G, I, T]``, or unit vectors, for which G = 1 and I is their length.
        flipped: The parameter has the layout ``[G, I, O]`` instead of ``[G, O, I]``.
    """

    left: Tensor
    right: Tensor | OneHot
    flipped: bool = False

    @property
    def width(self) -> int:
        """I."""
        return self.right.size if isinstance(self.right, OneHot) else self.right.shape[2]

    def numel(self) -> int:
        """Entries of the Jacobian."""
        n, q, g, o, _ = self.left.shape
        return n * q * g * o * self.width

    @property
    def kind(self) -> tuple[bool, bool, int, int, int]:
        """Terms of the same kind can be added by concatenation along T."""
        return isinstance(self.right, OneHot), self.flipped, *self.left.shape[2:4], self.width

    def explicit(self) -> Tensor:
        """The Jacobian ``[N, Q, numel]``, in the parameter's layout."""
        jacobian = self.columns(slice(None), self.left.dtype)
        return (jacobian.transpose(3, 4) if self.flipped else jacobian).flatten(2)

    def columns(self, part: slice, dtype: torch.dtype, memory: Tensor | None = None) -> Tensor:
        """The columns of the Jacobian for a part of O, ``[N, Q, G, part, I]``, in ``dtype``; if possible in ``memory``."""
        left = self.left[:, :, :, part]
        n, q, g, o, t = left.shape
        if isinstance(self.right, OneHot):
            index = self.right.index[:, None, None, :].expand(n, q, o, t)
            rows = left.new_zeros(n, q, o, self.width, dtype=dtype)
            return rows.scatter_add_(3, index, left.reshape(n, q, o, t).to(dtype)).unsqueeze(2)
        right = self.right.to(dtype)
        if t == 1:
            return left.to(dtype) * right.squeeze(3)[:, None, :, None, :]
        flat = left.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).reshape(n * g, q * o, t)
        out = None if memory is None else memory[: n * q * g * o * self.width].view(n * g, q * o, -1)
        rows = torch.bmm(flat, right.reshape(n * g, -1, t).transpose(1, 2), out=out)
        return rows.view(n, g, q, o, -1).transpose(1, 2)

    def column_blocks(self, limit: int) -> Iterator[slice]:
        """Ranges of O for which `columns` and its factors have at most ``limit`` entries, or of length one."""
        n, q, g, o, t = self.left.shape
        return ranges(o, n * q * g * max(self.width, t), limit)

    def total(self, dtype: torch.dtype) -> Tensor:
        """Σ_nq D[n, q] in ``dtype``, flat in the parameter's layout."""
        return self.spread(self.left.to(dtype).sum(1), dtype)

    def contracted(self, u: Tensor) -> Tensor:
        """Σ_q u[n, q] left[n, q] in the dtype of u, ``[N, G, O, T]``."""
        n, q, g, o, t = self.left.shape
        return (u.unsqueeze(1) @ self.left.to(u.dtype).reshape(n, q, -1)).view(n, g, o, t)

    def spread(self, left: Tensor, dtype: torch.dtype) -> Tensor:
        """Σ_nt left[n, :, :, t] ⊗ right[n, :, :, t] for left ``[N, G, O, T]``, flat in the parameter's layout."""
        n, g, o, t = left.shape
        if isinstance(self.right, OneHot):
            rows = left.reshape(n, o, t).transpose(1, 2).reshape(n * t, o)
            total = rows.new_zeros(self.width, o).index_add_(0, self.right.index.reshape(-1), rows).T[None]  # [1, O, I]
        else:
            by_group = left.permute(1, 2, 0, 3).reshape(g, o, n * t)
            total = by_group @ self.right.to(dtype).permute(1, 0, 3, 2).reshape(g, n * t, -1)
        return (total.transpose(1, 2) if self.flipped else total).reshape(-1)

    def image(self, v: Tensor) -> Tensor:
        """The product of a matrix v, flat in the parameter's layout, with right: ``[N, G, O, T]`` in the dtype of v."""
        g, o = self.left.shape[2:4]
        matrix = v.reshape(g, self.width, o).transpose(1, 2) if self.flipped else v.reshape(g, o, self.width)
        if isinstance(self.right, OneHot):
            return matrix[0].T[self.right.index].transpose(1, 2).unsqueeze(1)
        if self.left.shape[4] == g == 1:  # one product instead of one for each sample
            return (self.right.to(v.dtype).flatten(1) @ matrix[0].T).view(-1, 1, o, 1)
        return matrix @ self.right.to(v.dtype)

    def against(self, image: Tensor) -> Tensor:
        """⟨left[n, q], image[n]⟩ for image ``[N, G, O, T]``: ``[N, Q]``."""
        n, q = self.left.shape[:2]
        return (self.left.to(image.dtype).reshape(n, q, -1) @ image.reshape(n, -1, 1)).squeeze(2)

    def of_samples(self, samples: slice, dtype: torch.dtype) -> "OuterProducts":
        """The outer products of some samples, in ``dtype``."""
        return OuterProducts(self.left[samples].to(dtype), _part(self.right, samples, dtype), self.flipped)

    @staticmethod
    def joined(terms: Sequence["OuterProducts"], left: Tensor | None = None) -> "OuterProducts":
        """The sum of terms of one kind; ``left`` are their left factors, if they were concatenated before."""
        if len(terms) == 1:
            return terms[0]
        rights = [term.right for term in terms]
        right: Tensor | OneHot
        if isinstance(rights[0], OneHot):
            right = OneHot(torch.cat([r.index for r in rights if isinstance(r, OneHot)], 1), rights[0].size)
        else:
            right = torch.cat([r for r in rights if isinstance(r, Tensor)], 3)
        return OuterProducts(torch.cat([term.left for term in terms], 4) if left is None else left, right, terms[0].flipped)


class SharedLeftFactor:
    """Parameters whose outer products have the same left factors, such as the weight and bias of a layer.

    Their part of Θ is Σ_ts ⟨left[n, q, t], left[m, r, s]⟩ Σ_p ⟨right_p[n, t], right_p[m, s]⟩ with a sum over the parameters p.

    Args:
        first: The terms of the rows, one for each parameter.
        second: The terms of the columns; the same list for a symmetric Θ.
    """

    def __init__(self, first: list[OuterProducts], second: list[OuterProducts]) -> None:
        self.first = first
        self.second = second
        self._left1, self._left2 = first[0].left, second[0].left

    @property
    def single(self) -> bool:
        """Whether both sides have one place, T = 1, and one group, so that the part of Θ is (BBᵀ) ∘ (AAᵀ)."""
        return all(left.shape[2] == left.shape[4] == 1 for left in (self._left1, self._left2))

    @property
    def by_index(self) -> bool:
        """Whether the right factors are unit vectors, with several for a sample."""
        return not self.single and all(isinstance(term.right, OneHot) for term in self.first)

    @property
    def columns(self) -> int:
        """The columns of D: the entries of all parameters."""
        return sum(term.left.shape[2] * term.left.shape[3] * term.width for term in self.first)

    def of_output(self, number: int) -> "SharedLeftFactor":
        """The same for one of the Q outputs."""
        part = slice(number, number + 1)
        left1 = self._left1[:, part]
        left2 = left1 if self._left2 is self._left1 else self._left2[:, part]
        first = [OuterProducts(left1, term.right, term.flipped) for term in self.first]
        if self.second is self.first:
            return SharedLeftFactor(first, first)
        return SharedLeftFactor(first, [OuterProducts(left2, term.right, term.flipped) for term in self.second])

    def explicit_is_cheaper(self) -> bool:
        """Whether it takes fewer operations to write the Jacobian out and multiply it than to contract the factors."""
        (n1, q1, g, o, t1), (n2, q2, *_, t2) = self._left1.shape, self._left2.shape
        onehot = any(isinstance(term.right, OneHot) for term in self.first)
        widths = sum(1 if isinstance(term.right, OneHot) else term.width for term in self.first)
        written = n1 * n2 * q1 * q2 * self.columns + (n1 * q1 * t1 + n2 * q2 * t2) * (o * g if onehot else self.columns)
        if t1 == t2 == 1:
            factored = n1 * n2 * (q1 * q2 * g * (o + 2) + g * widths)
        else:
            factored = n1 * n2 * t1 * (t2 * g * widths + t2 * q2 * g * o + _TOUCH * q2 * g * o + q1 * q2 * g * o)
        return written <= factored

    def right_products(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """Σ over parameters of ⟨right[n, g, :, t], right[m, g, :, s]⟩, ``[G, N·T, M·S]``."""
        return functools.reduce(
            Tensor.add_,
            (_right_products(a.right, b.right, rows, columns, dtype) for a, b in zip(self.first, self.second, strict=True)),
        )

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Columns of D of both sides, ``[N·Q, columns]``, in ``dtype``, a few at a time and in the same order on both sides.

        The second is None if both sides are the same.
        """
        mine = _side_by_side(self.first, dtype)
        theirs = mine if self.second is self.first else _side_by_side(self.second, dtype)
        for a, b in zip(mine, theirs, strict=True):
            parts = list(a.column_blocks(_WRITTEN_ELEMENTS))
            # Reused, because allocating memory for each part would take as long as filling it.
            memory = a.left.new_empty(math.prod(a.left.shape[:3]) * (parts[0].stop if parts else 0) * a.width, dtype=dtype)
            for part in parts:
                yield _rows(a.columns(part, dtype, memory)), None if b is a else _rows(b.columns(part, dtype))

    def weighted_sums(self, u: Tensor) -> list[Tensor]:
        """Σ_nq u[n, q] D[n, q] of each parameter, flat, in the dtype of u, for u ``[N, Q]``."""
        totals: list[Tensor] = []
        for samples in self._samples():
            parts = self._of_samples(samples, u.dtype)
            left = parts[0].contracted(u[samples])
            sums = [part.spread(left, u.dtype) for part in parts]
            totals = [total.add_(more) for total, more in zip(totals, sums, strict=True)] if totals else sums
        return totals

    def _of_samples(self, samples: slice, dtype: torch.dtype) -> list[OuterProducts]:
        """The terms of some samples, in ``dtype``, with the same left factors."""
        left = self._left1[samples].to(dtype)
        return [OuterProducts(left, _part(term.right, samples, dtype), term.flipped) for term in self.first]

    def _samples(self) -> Iterator[slice]:
        """Ranges of samples whose factors in float64 stay in the cache; all samples on a GPU."""
        n = len(self._left1)
        entries = self._left1[:1].numel() + sum(1 if isinstance(t.right, OneHot) else t.right[:1].numel() for t in self.first)
        return ranges(n, entries, _CACHED_ELEMENTS if self._left1.device.type == "cpu" else n * entries)

    def product(self, vectors: list[Tensor]) -> Tensor:
        """Σ over parameters of Σ_k D[n, q, k] v[k] for a flat vector v of each, ``[N, Q]`` in their dtype."""
        total = vectors[0].new_zeros(self._left1.shape[:2])
        for samples in self._samples():
            parts = self._of_samples(samples, total.dtype)
            image = functools.reduce(Tensor.add_, (part.image(v) for part, v in zip(parts, vectors, strict=True)))
            total[samples] = parts[0].against(image)
        return total

    def contraction(self, dtype: torch.dtype, products: Tensor | None = None) -> Callable[[slice, slice, Tensor], Any]:
        """A function of two ranges of samples and their tile of Θ, ``[n·Q, m·R]``, that adds their part.

        ``products`` are `right_products` for T = 1, see `single`, if they are known.
        """
        if not self.single:
            return lambda rows, columns, tile: tile.add_(self._contract(rows, columns, dtype))
        (n, q, *_), (m, r, *_) = self._left1.shape, self._left2.shape
        plain = torch.contiguous_format
        left1 = self._left1.to(dtype, memory_format=plain).reshape(n * q, -1)
        left2 = left1 if self._left2 is self._left1 else self._left2.to(dtype, memory_format=plain).reshape(m * r, -1)
        factors = (self.right_products(slice(None), slice(None), dtype) if products is None else products)[0]  # [N, M]
        memory = left1.new_empty(0)  # reused, because allocating it for each tile would take longer than filling it

        def add(rows: slice, columns: slice, tile: Tensor) -> None:
            nonlocal memory
            if memory.numel() < tile.numel():
                memory = left1.new_empty(tile.numel())
            part = memory[: tile.numel()].view(tile.shape)
            torch.mm(left1[rows.start * q : rows.stop * q], left2[columns.start * r : columns.stop * r].T, out=part)
            by_sample, target = (x.unflatten(0, (-1, q)).unflatten(2, (-1, r)) for x in (part, tile))
            target.addcmul_(by_sample, factors[rows, None, columns, None])

        return add

    def _contract(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """The part of Θ for two ranges of samples: right products times the second left factor, then times the first."""
        left1, left2 = self._left1[rows], self._left2[columns]
        (n, q, groups, o, t), (m, r, *_, s) = left1.shape, left2.shape
        products = self.right_products(rows, columns, dtype)  # [G, nT, mS]
        total = products.new_zeros(n, q, m * r)
        for g in range(groups):
            of_sample = left2[:, :, g].to(dtype).permute(0, 3, 1, 2).reshape(m, s, r * o)
            inner = products[g].view(n * t, m, s).transpose(0, 1) @ of_sample  # [m, nT, R·O]
            inner = inner.view(m, n, t, r, o).permute(1, 4, 2, 0, 3).reshape(n, o * t, m * r)
            total.baddbmm_(left1[:, :, g].to(dtype).reshape(n, q, o * t), inner)
        return total.view(n * q, m * r)

    def samples_at_a_time(self, rows_of_tile: int) -> int:
        """The number of samples of each side for which a tile has ``rows_of_tile`` rows, and intermediate results are small."""
        _, q, _, o, t = self._left1.shape
        r, s = self._left2.shape[1], self._left2.shape[4]
        samples = max(1, rows_of_tile // max(1, q, r))
        if not self.single:  # inner: [m, n, T, R, O]; products: [n, T, m, S]
            samples = min(samples, max(1, int((_WORK_ELEMENTS / max(1, t * max(r * o, s))) ** 0.5)))
        return samples


def _side_by_side(terms: list[OuterProducts], dtype: torch.dtype) -> list[OuterProducts]:
    """Terms with the same left factor, joined along I in ``dtype``; unit vectors stay apart."""
    rights = [term.right.to(dtype) for term in terms if isinstance(term.right, Tensor)]
    joined = [OuterProducts(terms[0].left, torch.cat(rights, 2) if len(rights) > 1 else rights[0])] if rights else []
    return joined + [term for term in terms if isinstance(term.right, OneHot)]


def _rows(columns: Tensor) -> Tensor:
    """``[N, Q, G, O, I]`` → ``[N·Q, G·O·I]``."""
    return columns.reshape(columns.shape[0] * columns.shape[1], -1)


def _part(right: Tensor | OneHot, samples: slice, dtype: torch.dtype) -> Tensor | OneHot:
    return OneHot(right.index[samples], right.size) if isinstance(right, OneHot) else right[samples].to(dtype)


def _right_products(first: Tensor | OneHot, second: Tensor | OneHot, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
    """⟨first[n, g, :, t], second[m, g, :, s]⟩ for ranges of n and m, ``[G, N·T, M·S]``."""
    if isinstance(first, OneHot) and isinstance(second, OneHot):
        a, b = first.index[rows].reshape(-1, 1), second.index[columns].reshape(1, -1)
        return (a == b).to(dtype)[None]
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    sides = [x.to(dtype).permute(1, 0, 3, 2).reshape(x.shape[1], -1, x.shape[2]) for x in (first[rows], second[columns])]
    return sides[0] @ sides[1].transpose(1, 2)


def tiles(rows: int, columns: int, step: int, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Ranges of samples that cover Θ, or for a symmetric one its part on and above the diagonal."""
    for i in range(0, rows, step):
        for j in range(i if symmetric else 0, columns, step):
            yield slice(i, min(i + step, rows)), slice(j, min(j + step, columns))
