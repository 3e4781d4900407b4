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
from .products import Family, OuterProducts, tiles
from .tokens import add_by_index

TILE_ROWS = 320  # rows of a tile of Θ on the CPU: a square tile of float64 stays in the cache


@dataclass(frozen=True)
class Parts:
    """The terms of parameters that have uses in common, sorted by how they are contracted.

    Attributes:
        terms: The Jacobians that the rules returned.
        families: Parameters whose Jacobians are outer products with the same left factors.
        written: Parameters whose Jacobian is written out, ``[N, Q, numel]``, and that of the columns; None if it is the same.
    """

    terms: Terms
    families: list[tuple[list[Part], Family]]
    written: dict[Part, tuple[Tensor, Tensor | None]]

    @classmethod
    def of(cls, first: Terms, second: Terms | None = None) -> "Parts":
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
        families = [(names, Family(mine, mine if second is None else theirs)) for names, mine, theirs in outer.values()]
        return cls(first, families, written)

    def rows(self, samples: slice) -> Iterator[tuple[Part, Tensor]]:
        """The Jacobians of some samples, written out in float64, ``[n, Q, numel]``, by parameter."""
        for name, (jacobian, _) in self.written.items():
            yield name, jacobian[samples].double()
        for names, family in self.families:
            for name, term in zip(names, family.first, strict=True):
                yield name, term.of_samples(samples, torch.float64).explicit()

    @property
    def nbytes(self) -> int:
        """The memory that they take in addition to B."""
        rights = [t.right for terms in self.terms.values() for t in terms if isinstance(t, OuterProducts)]
        return sum(jacobian.nbytes for jacobian, _ in self.written.values()) + sum(
            right.untyped_storage().nbytes() for right in rights if isinstance(right, Tensor)
        )


def between(rows: Factors, columns: Factors) -> list[Parts]:
    """The sorted terms of the block of Θ between some rows of D and others."""
    return [Parts.of(terms, terms_of(names, columns.components)) for names, terms in rows.components]


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


class KernelBlock:
    """Computes a block of Θ: first written-out Jacobians and general contractions, then families of one place tile by tile.

    Args:
        theta: Receives the block, ``[N·Q, M·R]``; not initialized. `finish` mirrors a symmetric block.
        shape: N, Q, M and R.
        symmetric: Whether rows and columns are the same.
    """

    def __init__(self, theta: Tensor, shape: tuple[int, int, int, int], symmetric: bool) -> None:
        self.theta, self.shape, self.symmetric = theta, shape, symmetric
        self._started = False
        self._single: list[Family] = []

    def add(self, parts: Parts) -> None:
        """Add the terms of some parameters."""
        for jacobian, other in parts.written.values():
            self._start()
            add_gram(self.theta, jacobian.flatten(0, 1), None if other is None else other.flatten(0, 1))
        for _, family in parts.families:
            if family.by_index:
                self._start()
                add_by_index(self.theta, family)
            elif family.explicit_is_cheaper():
                for jacobian, other in family.blocks(self.theta.dtype):
                    self._start()
                    add_gram(self.theta, jacobian, other)
            elif family.single:
                self._single.append(family)
            else:
                self._start()
                self._add_tiles([family])

    def finish(self) -> None:
        """Add the families of one place, and mirror a symmetric block."""
        if not self._single:
            self._start()
        self._add_tiles(self._single, mirror=self.symmetric)

    def _start(self) -> None:
        if not self._started:
            self.theta.zero_()
            self._started = True

    def _add_tiles(self, families: Iterable[Family], *, mirror: bool = False) -> None:
        n, q, m, r = self.shape
        # Tiles on the diagonal also compute entries below it, so a small kernel has smaller tiles.
        rows = min(TILE_ROWS, max(TILE_ROWS // 2, n * q // 4)) if self.theta.device.type == "cpu" else 4096
        step = min((family.samples_at_a_time(rows) for family in families), default=max(1, rows // max(1, q, r)))
        contractions = [family.contraction(self.theta.dtype) for family in families]
        for i, j in tiles(n, m, step, self.symmetric):
            tile = self.theta[i.start * q : i.stop * q, j.start * r : j.stop * r]
            for number, contraction in enumerate(contractions):
                contraction(i, j, tile, bool(number or self._started))
            if mirror and i == j:
                tile.copy_(tile.triu() + tile.triu(1).T)
            elif mirror:
                self.theta[j.start * r : j.stop * r, i.start * q : i.stop * q] = tile.T
