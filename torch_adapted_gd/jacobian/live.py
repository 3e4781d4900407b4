"""Linearizing outputs within the user's backward pass, from the user's graph."""

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..memory import fits
from ..tracking import private
from ..tracking.calls import Outputs, hides_its_graph
from ..tracking.replay import precision
from ..tracking.state import unwatched
from ..tracking.tape import Tape
from .backward import allows_vmap
from .definition import dtype_and_device
from .factored import Piece, budget_of
from .linearized import Linearized


def linearize_live(of: Outputs, place: int, model: nn.Module, parameters: dict[str, Tensor]) -> None:
    """Linearize output ``place`` of ``of`` by parameters, before the backward pass that has just reached it frees the graph.

    If checkpointing hides the graph, or if B would need more memory than there is, the call will be repeated instead.
    """
    x = of.behind[place]
    if x.shape != of.outputs[place].shape:  # a number, which is one sample
        with torch.enable_grad():
            x = x.reshape(1)
    if x.ndim == 0 or x.numel() == 0 or len({p.device for p in parameters.values()}) > 1:
        return  # the step raises the error
    dtype, _ = dtype_and_device(list(parameters.values()))
    with unwatched(), private.without_hooks(parameters.values()), _gradients_kept(of.tapes), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of functorch, and of the model, which the user's pass gave
        if any(tape.without_graph for tape in of.tapes) and hides_its_graph(x):
            of.tapes = []
            return
        notes = [note for tape in of.tapes for note in tape.notes]
        before = [(tape, len(tape.notes), tape.derived) for tape in of.tapes]
        found = Linearized([x], parameters, notes, eps=precision(of, x.dtype), dtype=dtype, vectorized=allows_vmap(model))
        for tape, count, derived in before:  # without the notes of our own second derivatives
            del tape.notes[count:]
            tape.derived = derived
        size = dtype.itemsize * 2 * found.elements * found.q
        if size > budget_of(found.n * found.q, x.device) or not fits(2 * size, x.device):  # other calls may hold B too
            return
        for note in notes:
            note.keep_data()
        of.linearized[place] = Piece(found, 0, found.at(range(found.q)))
        found.release()


def pieces_of(outputs: Outputs) -> list[Piece]:
    """The linearizations from while the graph was alive, by output; empty if one is missing."""
    if any(place not in outputs.linearized for place in outputs.places):
        return []
    pieces: list[Piece] = [outputs.linearized[place] for place in outputs.places]
    starts = itertools.accumulate((piece.linearized.q for piece in pieces), initial=0)
    return [replace(piece, first=start) for piece, start in zip(pieces, starts, strict=False)]


@contextlib.contextmanager
def _gradients_kept(tapes: list[Tape]) -> Iterator[None]:
    """Context in which passes of our own leave ``.grad`` of hidden tensors that retain it as it is."""
    tensors = [tensor for tape in tapes for reference in tape.retaining if (tensor := reference()) is not None]
    before = [None if tensor.grad is None else tensor.grad.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, gradient in zip(tensors, before, strict=True):
            tensor.grad = gradient
