"""A block of Θ as a sum over parameters, each contracted in the cheaper way."""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .gram import add_gram
from .normed import Directions
from .operator import Components, Factors, Part, Terms
from .products import OuterProducts, SharedLeftFactor, tiles
from .tokens import add_by_index

TILE_ROWS = 320  # rows of a tile of Θ on the CPU: a square tile of float64 stays in the cache


@dataclass(frozen=True)
class SortedTerms:
    """The terms of parameters that have uses in common, sorted by how they are contracted.

    Attributes:
        terms: The Jacobians that the rules returned.
        shared_left: Parameters whose Jacobians are outer products with the same left factors.
        written: Parameters whose Jacobian is written out, ``[N, Q, numel]``, and that of the columns; None if it is the same.
    """

    terms: Terms
    shared_left: list[tuple[list[Part], SharedLeftFactor]]
    written: dict[Part, tuple[Tensor, Tensor | None]]

    @classmethod
    def of(cls, first: Terms, second: Terms | None = None) -> "SortedTerms":
        """Sort the terms of rows and columns (None if they are the same). The uses of a parameter add up."""
        outer: dict[tuple[Any, ...], tuple[list[Part], list[OuterProducts], list[OuterProducts]]] = {}
        written: dict[Part, tuple[Tensor, Tensor | None]] = {}
        for name, terms in first.items():
            others = terms if second is None else second.get(name)
            if others is None:
                continue  # the other call did not use it
            if isinstance(name, Directions):
                along = _written(terms)
                written[name] = along, -(along if second is None else _written(others))
                continue
            products = [term for term in (*terms, *others) if isinstance(term, OuterProducts)]
            if len(products) < len(terms) + len(others) or len({term.kind for term in products}) > 1:
                written[name] = _written(terms), None if second is None else _written(others)
                continue
            key = tuple((term.left.data_ptr(), term.left.shape, term.left.stride()) for term in products)
            names, mine, theirs = outer.setdefault(key, ([], [], []))
            joined = OuterProducts.joined(products[: len(terms)], mine[0].left if mine else None)
            names.append(name)
            mine.append(joined)
            if second is not None:
                theirs.append(OuterProducts.joined(products[len(terms) :], theirs[0].left if theirs else None))
        shared_left = [
            (names, SharedLeftFactor(mine, mine if second is None else theirs)) for names, mine, theirs in outer.values()
        ]
        return cls(first, shared_left, written)

    def rows(self, samples: slice) -> Iterator[tuple[Part, Tensor]]:
        """The Jacobians of some samples, written out in float64, ``[n, Q, numel]``, by parameter."""
        for name, (jacobian, _) in self.written.items():
            yield name, jacobian[samples].double()
        for names, shared in self.shared_left:
            for name, term in zip(names, shared.first, strict=True):
                yield name, term.of_samples(samples, torch.float64).explicit()

    @property
    def nbytes(self) -> int:
        """The memory that they take in addition to B."""
        rights = [t.right for terms in self.terms.values() for t in terms if isinstance(t, OuterProducts)]
        return sum(jacobian.nbytes for jacobian, _ in self.written.values()) + sum(
            right.untyped_storage().nbytes() for right in rights if isinstance(right, Tensor)
        )


def between(rows: Factors, columns: Factors) -> list[SortedTerms]:
    """The sorted terms of the block of Θ between some rows of D and others."""
    return [SortedTerms.of(terms, terms_of(names, columns.components)) for names, terms in rows.components]


def terms_of(names: set[str], components: Components) -> Terms:
    """The terms of components that have parameters in common with ``names``."""
    found: Terms = {}
    for others, terms in components:
        if others & names:
            for part, more in terms.items():
                found.setdefault(part, []).extend(more)
    return found


def _written(terms: list[Tensor | OuterProducts]) -> Tensor:
    """The sum of terms, written out, ``[N, Q, numel]``; outer products of one kind are joined to one product."""
    kinds: dict[Any, list[OuterProducts]] = {}
    for term in terms:
        if isinstance(term, OuterProducts):
            kinds.setdefault(term.kind, []).append(term)
    plain = [term.reshape(*term.shape[:2], -1) for term in terms if isinstance(term, Tensor)]
    return functools.reduce(Tensor.add, [*plain, *(OuterProducts.joined(alike).explicit() for alike in kinds.values())])


def fill_block(theta: Tensor, shape: tuple[int, int, int, int], symmetric: bool, components: Iterable[SortedTerms]) -> None:
    """Write a block of Θ as the sum over components.

    Args:
        theta: Receives the block, ``[N·Q, M·R]``.
        shape: N, Q, M and R.
        symmetric: Whether rows and columns are the same.
        components: The sorted terms of groups of parameters.
    """
    theta.zero_()
    single: list[SharedLeftFactor] = []  # these are added tile by tile, all to a tile while it is in the cache
    for parts in components:
        for jacobian, other in parts.written.values():
            add_gram(theta, jacobian.flatten(0, 1), None if other is None else other.flatten(0, 1))
        for _, shared in parts.shared_left:
            if shared.by_index:
                add_by_index(theta, shared)
            elif shared.explicit_is_cheaper():
                for first, second in shared.blocks(theta.dtype):
                    add_gram(theta, first, second)
            elif shared.single:
                single.append(shared)
            else:
                _add_tiles(theta, shape, symmetric, [shared])
    _add_tiles(theta, shape, symmetric, single, mirror=symmetric)


def _add_tiles(
    theta: Tensor,
    shape: tuple[int, int, int, int],
    symmetric: bool,
    shared_left: list[SharedLeftFactor],
    *,
    mirror: bool = False,
) -> None:
    """Add their parts tile by tile, and with ``mirror`` copy each tile above the diagonal to below it."""
    n, q, m, r = shape
    # Tiles on the diagonal also compute entries below it, so a small kernel has smaller tiles.
    rows = min(TILE_ROWS, max(TILE_ROWS // 2, n * q // 4)) if theta.device.type == "cpu" else 4096
    step = min((shared.samples_at_a_time(rows) for shared in shared_left), default=max(1, rows // max(1, q, r)))
    contractions = [shared.contraction(theta.dtype) for shared in shared_left]
    for i, j in tiles(n, m, step, symmetric):
        tile = theta[i.start * q : i.stop * q, j.start * r : j.stop * r]
        for add in contractions:
            add(i, j, tile)
        if mirror and i == j:
            tile.copy_(tile.triu() + tile.triu(1).T)
        elif mirror:
            theta[j.start * r : j.stop * r, i.start * q : i.stop * q] = tile.T
