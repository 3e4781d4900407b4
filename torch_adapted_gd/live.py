"""The Jacobian of a call's outputs from the user's own graph, in the user's own backward pass."""

import dataclasses
import warnings

import torch
from torch import Tensor, nn

from .calls import Call, hides_its_graph, unwatched
from .jacobian.factored import Piece, budget_of
from .jacobian.linearized import Linearized
from .jacobian.uses import Use
from .memory import available_bytes
from .replay import precision

_ASK = 2**26  # bytes from which the system is asked how much there is


def linearized_live(call: Call, place: int, model: nn.Module | None) -> None:
    """Linearize one output of a call before the backward pass that has just reached it frees what is behind.

    Where that is not possible the call will be repeated for it: with activations that are checkpointed in the way that hides
    its graph, or where B would take more memory than there is.

    Args:
        call: The call; gets what was found.
        place: Which output.
        model: The model.
    """
    tape, x = call.tape, call.behind[place]
    if tape is None or model is None or x.ndim == 0 or x.numel() == 0:
        return
    parameters = tape.parameters
    if len({p.device for p in parameters.values()}) != 1:
        return
    dtypes = [p.dtype for p in parameters.values()]
    dtype = max(dtypes, key=lambda t: torch.finfo(t).bits)
    vectorized = not any(m._backward_hooks or m._backward_pre_hooks for m in model.modules())
    with unwatched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of functorch; the user's own pass gave the model's
        if tape.without_graph and hides_its_graph(x):
            call.tape = None
            return
        found = Linearized([x], parameters, tape.notes, eps=precision(call, x.dtype), dtype=dtype, vectorized=vectorized)
        size = dtype.itemsize * 2 * found.elements * found.q
        free = available_bytes(x.device) if size > _ASK else None  # other calls may hold theirs
        if size > budget_of(found.n * found.q, x.device) or (free is not None and size > free // 2):
            return
        found.uses = [_keeping_inputs(use) for use in found.uses]
        call.linearized[place] = Piece(found, 0, found.at(range(found.q)))
        found.release()


def _keeping_inputs(use: Use) -> Use:
    """A use with copies of what the user may refill before the step: data, which no graph keeps."""
    sources = use.sources.keys()

    def kept(key: object, value: object) -> object:
        return value.clone() if isinstance(value, Tensor) and value.grad_fn is None and key not in sources else value

    args = tuple(kept(number, value) for number, value in enumerate(use.note.args))
    kwargs = {name: kept(name, value) for name, value in use.note.kwargs.items()}
    return dataclasses.replace(use, note=dataclasses.replace(use.note, args=args, kwargs=kwargs))
