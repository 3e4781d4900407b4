"""Rows of D that are computed at a time: some outputs of each sample of one call, and the terms of their Jacobian."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..tracking.tape import Source
from ..world import World
from .blocks import SortedTerms
from .linearized import Linearized
from .normed import Directions, in_factors, lengths_and_directions
from .operator import Factors, Part, Rows, Terms
from .products import OuterProducts
from .rules import Term
from .sources import Derived, entries_of, is_transposed, is_whole, turned, written
from .uses import Use

# How the Jacobian by a parameter is held: for the whole of it, in views, written out, or by lengths and directions.
Way = Literal["whole", "views", "written", "normed"]


def views_in(pieces: Iterable[Linearized], numels: dict[str, int]) -> dict[str, set[Any]]:
    """The views in which each of the parameters ``numels`` is used."""
    views: dict[str, set[Any]] = {name: set() for name in numels}
    for piece in pieces:
        for use in piece.uses:
            for source in use.sources.values():
                for name in source.names & views.keys():
                    views[name].add(_view(source))
        for name in piece.unsupported.keys() & views.keys():
            views[name].add("written")
    return views


def agreed(world: World, views: dict[str, set[Any]], numels: dict[str, int]) -> dict[str, Way]:
    """How the rows of D hold each parameter, the same in all processes; ``views`` are those of this process."""
    together = world.objects(views)
    return {name: _way(frozenset().union(*(each.get(name, ()) for each in together)), numel) for name, numel in numels.items()}


def _view(source: Source) -> Any:
    if is_whole(source) or is_transposed(source):
        return "whole"
    if source.view is not None:
        return source.view
    return "written" if lengths_and_directions(source) is None else "normed"


@functools.lru_cache(maxsize=4096)
def _way(views: frozenset[Any], numel: int) -> Way:
    """The way for a parameter that is used in these views. Views that overlap have to be written out."""
    if views <= {"whole"}:
        return "whole"
    if views == {"normed"}:
        return "normed"
    if views & {"whole", "written", "normed"}:
        return "written"
    entries = torch.cat([entries_of(view, numel) for view in views])
    return "views" if len(entries) == len(entries.unique()) else "written"


@dataclass
class Chunk(Rows):
    """Rows of D that are computed at a time.

    Attributes:
        piece: The linearized outputs.
        number: The number of the call.
        first: The first output of the piece among those of the call.
        ways: How each parameter is held.
        parameters: θ by name.
        budget: Memory for kept parts, if the uses are held.
        held: The uses with B; None if they are computed each time.
        kept: SortedTerms of held uses, by the place of the component, if they are small.
    """

    piece: Linearized
    number: int
    first: int
    ways: dict[str, Way]
    parameters: dict[str, Tensor]
    budget: int
    held: list[Use] | None = None
    kept: dict[int, SortedTerms] = field(default_factory=dict)

    @property
    def _own(self) -> range:
        """The outputs, counted from the first of the piece."""
        return range(self.outputs.start - self.first, self.outputs.stop - self.first)

    def uses(self) -> list[Use]:
        """The uses with B."""
        return self.piece.at(self._own) if self.held is None else self.held

    def factors(self) -> Factors:
        """The rows with their terms."""
        made = [(names, self.terms(names, uses)) for names, uses in self.components(self.uses())]
        return Factors(self.start, self.n, self.q, self.outputs, made)

    def sorted(self) -> Iterator[tuple[set[str], SortedTerms]]:
        """The sorted terms of each component, with the names of its parameters."""
        for place, (names, uses) in enumerate(self.components(self.uses())):
            yield names, self.parts(place, names, uses)

    def components(self, uses: list[Use]) -> list[tuple[set[str], list[Use]]]:
        """Groups of uses that have parameters in common, with the names of these; parameters with written rows, too."""
        groups: list[tuple[set[str], list[Use]]] = [({name}, []) for name in self.piece.rows if name in self.ways]
        for use in uses:
            names, members = use.names & self.ways.keys(), [use]
            if not names:
                continue
            apart = []
            for group in groups:
                if group[0] & names:
                    names, members = names | group[0], group[1] + members
                else:
                    apart.append(group)
            groups = [*apart, (names, members)]
        return groups

    def terms(self, names: set[str], uses: list[Use], rotation: Tensor | None = None) -> Terms:
        """The terms of a component with these parameters and uses; see `rotated` for ``rotation``."""
        terms: Terms = {}
        derived: dict[int, tuple[Source, Tensor]] = {}
        for use in uses:
            for key, term in self.piece.terms(use).items():
                source = use.sources.get(key)
                found = [] if source is None else self._by_part(source, term)
                for part, part_term in found or ():
                    terms.setdefault(part, []).append(part_term)
                if found is None and source is not None:
                    before, rows = derived.get(id(source)), written(term)
                    derived[id(source)] = (source, rows if before is None else before[1] + rows)
        for source, rows in derived.values():
            for name, pulled in Derived(source, self.parameters).pulled(rows.flatten(0, 1)).items():
                if name in self.ways and name not in self.piece.unsupported:
                    terms.setdefault(name, []).append(pulled.view(*rows.shape[:2], -1))
        for name in names & self.piece.rows.keys():
            rows = self.piece.rows[name][:, self._own.start : self._own.stop]
            if rotation is not None:
                rows = torch.bmm(rotation.to(rows.dtype).transpose(1, 2), rows)
            terms.setdefault(name, []).append(rows)
        return terms

    def _by_part(self, source: Source, term: Term) -> Sequence[tuple[Part, Term]] | None:
        """A term by parameters or parts of them; None if its rows have to be multiplied by the source's own Jacobian."""
        view = _view(source)
        if view == "written":
            return None
        if view == "normed":
            return self._normed(source, term)
        (name,) = source.names
        if name not in self.ways or name in self.piece.unsupported:
            return []
        if view == "whole":
            term = term if is_whole(source) else turned(term, source.tensor.shape)
            return [(name, term if self.ways[name] == "whole" else written(term))]
        if self.ways[name] == "views":
            return [((name, view), term)]
        rows = written(term)
        spread = rows.new_zeros(*rows.shape[:2], self.parameters[name].numel())
        return [(name, spread.index_add_(2, entries_of(view, spread.shape[2], rows.device), rows))]

    def _normed(self, source: Source, term: Term) -> Sequence[tuple[Part, Term]] | None:
        """The terms of a weight in lengths and directions; None if they cannot be had in factors."""
        names = lengths_and_directions(source)
        assert names is not None
        if any(self.ways.get(name) != "normed" or name in self.piece.unsupported for name in names):
            return None
        if not isinstance(term, OuterProducts) or not isinstance(term.right, Tensor) or term.flipped:
            return None
        return in_factors(names, term, self.parameters)

    def parts(self, place: int, names: set[str], uses: list[Use]) -> SortedTerms:
        """The sorted terms of a component, kept for the next time if they fit the budget."""
        if place in self.kept:
            return self.kept[place]
        parts = SortedTerms.of(self.terms(names, uses))
        if self.held is not None and parts.nbytes + sum(p.nbytes for p in self.kept.values()) <= self.budget:
            self.kept[place] = parts
        return parts

    def rotated(self, rotation: Tensor) -> list[Use]:
        """The uses with B for C linear combinations of the outputs, with weights ``rotation``, ``[N, len(outputs), C]``."""

        def turned(b: Tensor) -> Tensor:
            weights = rotation.to(b.dtype).transpose(1, 2)
            return torch.bmm(weights, b.flatten(2)).view(b.shape[0], -1, *b.shape[2:])

        return [use.holding(turned(b) for b in use.held.values()) for use in self.uses()]

    def scatter(self, part: Part, vector: Tensor, totals: dict[str, Tensor]) -> None:
        """Add a vector over a parameter or a part of it to flat sums by parameter."""
        name, index = self.place(part, vector.device)
        if isinstance(part, Directions):
            vector = part.spread(vector)
        if index is None:
            totals[name] = totals[name] + vector if name in totals else vector
            return
        if name not in totals:
            totals[name] = vector.new_zeros(self.parameters[name].numel())
        totals[name] = totals[name].index_add(0, index, vector)

    def gather(self, part: Part, vectors: dict[str, Tensor]) -> Tensor:
        """The entries of a parameter or a part of it, from flat vectors by parameter."""
        if isinstance(part, Directions):
            return part.gather(vectors[part.name])
        name, index = self.place(part, next(iter(vectors.values())).device)
        return vectors[name] if index is None else vectors[name][index]

    def place(self, part: Part, device: torch.device) -> tuple[str, Tensor | None]:
        """The parameter of a part, and the entries that the part has; None for all."""
        if isinstance(part, str | Directions):
            return part if isinstance(part, str) else part.name, None
        return part[0], entries_of(part[1], self.parameters[part[0]].numel(), device)
