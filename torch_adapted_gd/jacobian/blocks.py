"""A block of Θ made of the parts of its parameters, each contracted in its own way."""

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

TILE_ROWS = 320  # rows of Θ that are worked on at a time on the CPU: such a tile of float64 stays in the cache


@dataclass(frozen=True)
class Parts:
    """The parameters of module calls that share some, sorted by how they are contracted.

    Attributes:
        terms: Their Jacobians as the rules gave them.
        families: Parameters in families of outer products.
        written: Those whose Jacobian is written out, ``[N, Q, numel]``, and its counterpart on the columns' side if that is
            another one.
    """

    terms: Terms
    families: list[tuple[list[Part], Family]]
    written: dict[Part, tuple[Tensor, Tensor | None]]

    @classmethod
    def of(cls, first: Terms, second: Terms | None = None) -> "Parts":
        """Sort terms. Several uses of one parameter add up; those of one kind do by standing one after the other.

        Args:
            first: The terms on the rows' side.
            second: Those on the columns' side, or None if they are the same.
        """
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
        """The Jacobians of some samples written out in float64, ``[n, Q, numel]``, by parameter."""
        for name, (jacobian, _) in self.written.items():
            yield name, jacobian[samples].double()
        for names, family in self.families:
            for name, term in zip(names, family.first, strict=True):
                yield name, term.of_samples(samples, torch.float64).explicit()

    @property
    def nbytes(self) -> int:
        """What they take beside B."""
        rights = [t.right for terms in self.terms.values() for t in terms if isinstance(t, OuterProducts)]
        return sum(jacobian.nbytes for jacobian, _ in self.written.values()) + sum(
            right.untyped_storage().nbytes() for right in rights if isinstance(right, Tensor)
        )


def between(rows: Factors, columns: Factors) -> list[Parts]:
    """What is between some rows of D and others."""
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
    """Their sum written out, ``[N, Q, numel]``; those of one kind by one product."""
    kinds: dict[Any, list[OuterProducts]] = {}
    total: Tensor | None = None
    for term in terms:
        if isinstance(term, OuterProducts):
            kinds.setdefault(term.kind, []).append(term)
        else:
            flat = term.reshape(*term.shape[:2], -1)
            total = flat if total is None else total + flat
    for alike in kinds.values():
        part = OuterProducts.joined(alike).explicit()
        total = part if total is None else total + part
    assert total is not None
    return total


class KernelBlock:
    """A block of Θ in the making: written-out Jacobians and general contractions first, then cheap ones tile by tile.

    Args:
        theta: Where to write it, ``[N·Q, M·R]``; need not be initialized.
        shape: N, Q, M and R.
        symmetric: Rows and columns are the same.
    """

    def __init__(self, theta: Tensor, shape: tuple[int, int, int, int], symmetric: bool) -> None:
        self.theta = theta  # of a symmetric block the part below the diagonal is filled in at the end
        self.shape = shape
        self.symmetric = symmetric
        self._started = False
        self._single: list[Family] = []

    def add(self, parts: Parts) -> None:
        """Add the part of some parameters."""
        for jacobian, other in parts.written.values():
            self.add_jacobians(jacobian.flatten(0, 1), None if other is None else other.flatten(0, 1))
        for _, family in parts.families:
            if family.by_index:
                self._start()
                add_by_index(self.theta, family)
            elif family.explicit_is_cheaper():
                for jacobian, other in family.blocks(self.theta.dtype):
                    self.add_jacobians(jacobian, other)
            elif family.single:
                self._single.append(family)
            else:
                self._start()
                self._add_tiles([family])

    def add_jacobians(self, first: Tensor, second: Tensor | None) -> None:
        """Add products of rows, of ``first`` with itself where there is no second."""
        self._start()
        add_gram(self.theta, first, second)

    def finish(self) -> None:
        """Add what is left, and mirror a symmetric block."""
        if not self._single:
            self._start()
        self._add_tiles(self._single, mirror=self.symmetric)

    def _start(self) -> None:
        if not self._started:
            self.theta.zero_()
            self._started = True

    def _add_tiles(self, families: Iterable[Family], *, mirror: bool = False) -> None:
        n, q, m, r = self.shape
        # Of a small kernel smaller tiles, as what is below the diagonal in those on it is computed in vain.
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
