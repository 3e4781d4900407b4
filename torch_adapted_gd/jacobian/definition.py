"""The output Jacobian D = ∂x/∂θ (2.12) by its definition. Every faster computation is tested against it."""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev

from ..checks import one_of, positive_integer
from ..memory import require_memory
from ..tracking.calls import Call, record, stacked, underlying
from ..tracking.replay import DisagreementError, Replay, State
from .backward import BackwardPasses, allows_vmap

METHODS = ("rows", "jacrev")
_CHUNK_BYTES = 2**28  # memory for one chunk of D in addition to D itself, by default


def output_jacobian(
    model: nn.Module, x: Tensor | tuple[Any, ...], *, method: str = "auto", chunk_size: int | None = None
) -> Tensor:
    """Jacobian D = ∂x/∂θ of all outputs with respect to all trainable parameters, equation (2.12).

    Row i·Q + q is output q of sample i (2.9); the columns follow ``model.named_parameters()``, frozen ones left out.
    Outputs may be any pytree of floating tensors with the batch first: a sample's Q outputs are their concatenation.

    The model is called in its current mode, under autocast if that is enabled, and with the current random state, so dropout
    draws the mask that an ordinary call would draw. Buffers, modes, gradients and the random state stay as they were.

    Args:
        model: The network f_θ.
        x: Its input with the batch first, ``[N, ...]``, or a tuple of positional inputs.
        method: ``"rows"`` runs a backward pass for each output, many at a time, for any model. ``"jacrev"`` is
            `torch.func.jacrev` of all outputs, for models that `torch.func` supports. ``"auto"`` is ``"rows"``.
        chunk_size: The number of samples whose rows are differentiated at a time; by default a chunk takes about 256 MiB.

    Returns:
        D of shape ``[N·Q, K]``, in the parameters' dtype and on their device.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: No parameter is trainable, no output depends on one, or an argument is out of range.
        MemoryError: D would not fit.
        RuntimeError: The model's call cannot be repeated with the same outputs, or `torch.func` does not support it.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> output_jacobian(model, torch.ones(5, 3)).shape
        torch.Size([10, 8])
    """
    one_of("method", method, ("auto", *METHODS))
    with torch.inference_mode(False):
        call, names = recorded(model, x)
        return call_jacobian(model, call, names, method=method, chunk_size=chunk_size)


def recorded(model: nn.Module, x: Tensor | tuple[Any, ...]) -> tuple[Call, list[str]]:
    """A call of the model with ``x``, and the names of its trainable parameters."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` should be a torch.nn.Module, but got {type(model).__name__}.")
    trained = {name: p for name, p in underlying(model).named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("`model` should have trainable parameters, but none requires a gradient.")
    for name, p in trained.items():
        if not p.is_floating_point():
            raise ValueError(f"`model` should have real parameters, but '{name}' is {p.dtype}. Freeze it.")
    call = record(model, x if isinstance(x, tuple) else (x,))
    if not call.outputs:
        raise ValueError(
            "`model` should return floating tensors that depend on its parameters, alone or in tuples, lists, dicts or "
            "registered pytrees, but none does."
        )
    return call, list(trained)


def call_jacobian(
    model: nn.Module, call: Call, names: list[str], *, method: str = "auto", chunk_size: int | None = None
) -> Tensor:
    """D ``[N·Q, K]`` of the outputs of a call that the loss depends on, by the parameters ``names``; see `output_jacobian`."""
    if chunk_size is not None:
        positive_integer("chunk_size", chunk_size)
    replay = Replay(underlying(model), call, names)
    parameters = dict(replay.model.named_parameters())
    dtype, device = dtype_and_device([parameters[name] for name in names])
    shape = (replay.n * replay.q, sum(parameters[name].numel() for name in names))
    require_memory(
        2 * shape[0] * shape[1] * dtype.itemsize,
        device,
        f"A Jacobian of {shape[0]:,} outputs by {shape[1]:,} parameters in {dtype}, and its making,",
        "Use fewer samples at a time or train fewer parameters.",
    )
    matrix = torch.empty(shape, dtype=dtype, device=device)  # [NQ, K]
    if matrix.numel() == 0:
        return matrix
    rows = max(1, _CHUNK_BYTES // max(1, shape[1] * dtype.itemsize)) if chunk_size is None else chunk_size * replay.q
    try:
        (_by_jacrev if method == "jacrev" else _by_rows)(replay, matrix, min(rows, 256))
    except DisagreementError as error:
        raise RuntimeError(
            "The model's call could not be repeated with the same outputs, so its Jacobian is unknown. A forward pass may "
            "depend only on its inputs, parameters, buffers and torch's global random numbers (no numpy or Python random "
            f"numbers, generators or counters): {error}."
        ) from error
    return matrix


def _by_rows(replay: Replay, matrix: Tensor, rows: int) -> None:
    """A backward pass for each output."""
    given, outputs = replay.with_graph(lambda *_: contextlib.nullcontext())
    with replay.conditions():
        with torch.enable_grad():
            x = stacked(outputs)
        BackwardPasses(x, vectorized=allows_vmap(replay.model)).rows(list(given.values()), rows, out=matrix)


def _by_jacrev(replay: Replay, matrix: Tensor, rows: int) -> None:
    """``jacrev`` of the batch's outputs as one vector."""

    def batch(moving: State, rest: State, leaves: list[Any]) -> tuple[Tensor, Tensor]:
        x = stacked(replay.forward({**rest, **moving}, *replay.call.inputs.assembled(leaves)))  # [NQ]
        return x, x

    # Buffers and inputs are arguments because torch.func lets nothing else be updated in place.
    with replay.conditions():
        blocks, x = jacrev(batch, has_aux=True, chunk_size=rows)(*replay.copies(), replay.call.inputs.leaves)
    replay.check_outputs(x)
    matrix.copy_(torch.cat([block.reshape(len(matrix), -1) for block in blocks.values()], 1))


def dtype_and_device(parameters: list[Tensor]) -> tuple[torch.dtype, torch.device]:
    """The dtype that holds all parameters, and their one device."""
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise ValueError(
            f"The trained parameters should be on one device, but are on {sorted(map(str, devices))}. Move the model to one."
        )
    return functools.reduce(torch.promote_types, [p.dtype for p in parameters]), devices.pop()
