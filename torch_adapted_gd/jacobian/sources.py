"""Tensors that were computed from parameters: views and functions of them, and Jacobians by the parameters themselves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..tracking.arguments import Key, called, detached, replaced, results_of
from ..tracking.decomposed import BATCHED
from ..tracking.tape import Source, View
from .backward import BackwardPasses
from .products import OuterProducts
from .rules import Term
from .uses import Use

_BYTES = 2**27  # memory for rows of one vectorized product


def entries_of(view: View, numel: int, device: torch.device | None = None) -> Tensor:
    """The index of each entry of a view in the flat parameter, which has ``numel`` entries."""
    _, offset, size, stride = view
    return torch.as_strided(torch.arange(numel, device=device), size, stride, offset).reshape(-1)


def is_whole(source: Source) -> bool:
    """Whether it is a parameter, with all entries in their order."""
    if source.view is None:
        return source.name is not None
    base = source.tensor._base
    return base is not None and source.tensor.numel() == base.numel() and source.tensor.is_contiguous()


def is_transposed(source: Source) -> bool:
    """Whether it is the transpose of a matrix that is a parameter."""
    base = source.tensor._base
    if source.view is None or base is None or base.ndim != 2:
        return False
    return source.view[1:] == (0, tuple(base.T.shape), base.T.stride())


class Derived:
    """A function of parameters ``values``, computed again to multiply rows by its Jacobian."""

    def __init__(self, source: Source, values: dict[str, Tensor]) -> None:
        self.names = sorted(source.names)
        self._leaves = {name: values[name].detach().requires_grad_() for name in self.names}
        made: dict[int, list[Tensor]] = {}
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            self._result = self._made(source, made)

    def _made(self, source: Source, made: dict[int, list[Tensor]]) -> Tensor:
        if source.name is not None:
            return self._leaves[source.name]
        note = source.note
        assert note is not None
        if id(note) not in made:
            values = {key: self._made(inner, made) for key, inner in note.sources.items()}
            plain = list(map(detached, note.args)), {name: detached(a) for name, a in note.kwargs.items()}
            made[id(note)] = results_of(called(BATCHED.get(note.function, note.function), *replaced(*plain, values)))
        return made[id(note)][source.place]

    def pulled(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows of D by the parameters, ``[R, numel]`` each, from rows by the function, ``[R, numel]``."""
        leaves = list(self._leaves.values())
        vectors = rows.reshape(len(rows), *self._result.shape).to(self._result.dtype)
        entries = self._result.numel() + sum(leaf.numel() for leaf in leaves)
        passes = BackwardPasses(self._result, vectorized=True)
        found = [passes.many(some, leaves) for some in vectors.split(max(1, _BYTES // (4 * max(1, entries))))]
        parts = [torch.cat(part).reshape(len(rows), -1).to(rows.dtype) for part in zip(*found, strict=True)]
        return dict(zip(self.names, parts, strict=True))


def accumulated(
    terms: Iterable[tuple[Use, dict[Key, Term]]],
    parameters: dict[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The sum of all terms over all rows of D, flat by parameter, in ``dtype``."""
    totals: dict[str, Tensor] = {}
    derived: dict[int, tuple[Source, Tensor]] = {}

    def add(name: str, vector: Tensor) -> None:
        totals[name] = totals[name] + vector if name in totals else vector

    for use, found in terms:
        for key, term in found.items():
            source = use.sources.get(key)
            if source is None:
                continue
            vector = term.total(dtype) if isinstance(term, OuterProducts) else term.to(dtype).sum((0, 1)).reshape(-1)
            if is_whole(source):
                add(next(iter(source.names)), vector)
            elif source.view is not None:
                name = source.view[0]
                whole = vector.new_zeros(parameters[name].numel())
                add(name, whole.index_add_(0, entries_of(source.view, len(whole), vector.device), vector))
            else:
                before = derived.get(id(source))
                derived[id(source)] = (source, vector if before is None else before[1] + vector)
    for source, vector in derived.values():
        for name, part in Derived(source, parameters).pulled(vector[None]).items():
            add(name, part[0])
    return totals


def written(term: Term) -> Tensor:
    """A term written out, ``[N, Q, numel]``."""
    return term.explicit() if isinstance(term, OuterProducts) else term.reshape(*term.shape[:2], -1)


def turned(term: Term, shape: torch.Size) -> Term:
    """The term by a matrix, from the term by its transpose, which has this shape."""
    if isinstance(term, OuterProducts) and term.left.shape[2] == 1:
        return OuterProducts(term.left, term.right, not term.flipped)
    rows = written(term)
    return rows.reshape(*rows.shape[:2], *shape).transpose(2, 3)
