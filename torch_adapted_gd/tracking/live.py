"""The Jacobian of a call's outputs from the user's own graph, in the user's own backward pass."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..jacobian.backward import allows_vmap
from ..jacobian.definition import dtype_and_device
from ..jacobian.factored import Piece, budget_of
from ..jacobian.linearized import Linearized
from ..memory import available_bytes
from .arguments import Key
from .calls import Outputs, hides_its_graph, unwatched
from .replay import precision
from .tape import Note, Source, Tape

_ASK = 2**26  # bytes from which the system is asked how much there is


def linearized_live(of: Outputs, place: int, model: nn.Module | None, parameters: dict[str, Tensor]) -> None:
    """Linearize an output before the backward pass that has just reached it frees what is behind.

    Where that is not possible a call will be repeated for it: with activations that are checkpointed in the way that hides its
    graph, or where B would take more memory than there is.

    Args:
        of: Whose output; gets what was found.
        place: Which one.
        model: The model.
        parameters: What to differentiate by, by name.
    """
    x = of.behind[place]
    if model is None or x.ndim == 0 or x.numel() == 0 or len({p.device for p in parameters.values()}) > 1:
        return  # for the step to say
    dtype, _ = dtype_and_device(list(parameters.values()))
    with unwatched(), _gradients_kept(of.tapes), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of functorch; the user's own pass gave the model's
        if any(tape.without_graph for tape in of.tapes) and hides_its_graph(x):
            of.tapes = []
            return
        notes = [note for tape in of.tapes for note in tape.notes]
        before = [(tape, len(tape.notes), tape.derived) for tape in of.tapes]
        found = Linearized([x], parameters, notes, eps=precision(of, x.dtype), dtype=dtype, vectorized=allows_vmap(model))
        for tape, count, derived in before:  # without what our own second derivatives noted
            del tape.notes[count:]
            tape.derived = derived
        size = dtype.itemsize * 2 * found.elements * found.q
        free = available_bytes(x.device) if size > _ASK else None  # other calls may hold theirs
        if size > budget_of(found.n * found.q, x.device) or (free is not None and size > free // 2):
            return
        copies = _Copies()
        found.uses = [
            dataclasses.replace(use, note=copies.of(use.note), sources=copies.sources(use.sources)) for use in found.uses
        ]
        of.linearized[place] = Piece(found, 0, found.at(range(found.q)))
        found.release()


@contextlib.contextmanager
def _gradients_kept(tapes: list[Tape]) -> Iterator[None]:
    """Context in which ``.grad`` of hidden tensors that retain theirs is left as it is by passes of our own."""
    tensors = [tensor for tape in tapes for reference in tape.retaining if (tensor := reference()) is not None]
    before = [None if tensor.grad is None else tensor.grad.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, gradient in zip(tensors, before, strict=True):
            tensor.grad = gradient


class _Copies:
    """Notes with copies of what the user may refill before the step: data, which no graph keeps."""

    def __init__(self) -> None:
        self._notes: dict[int, Note] = {}
        self._sources: dict[int, Source] = {}

    def of(self, note: Note) -> Note:
        """A note, with the notes behind it."""
        if id(note) not in self._notes:
            args = tuple(self._kept(note, number, value) for number, value in enumerate(note.args))
            kwargs = {name: self._kept(note, name, value) for name, value in note.kwargs.items()}
            copied = dataclasses.replace(note, args=args, kwargs=kwargs, sources=self.sources(note.sources))
            self._notes[id(note)] = copied
        return self._notes[id(note)]

    def sources(self, sources: dict[Key, Source]) -> dict[Key, Source]:
        """What was computed from parameters, likewise."""
        return {key: self._source(source) for key, source in sources.items()}

    def _source(self, source: Source) -> Source:
        if source.note is None or source.view is not None:
            return source
        if id(source) not in self._sources:
            self._sources[id(source)] = dataclasses.replace(source, note=self.of(source.note))
        return self._sources[id(source)]

    @staticmethod
    def _kept(note: Note, key: Key, value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.grad_fn is None and key not in note.sources else value
