"""Recurrent layers and weight normalization as the operations that they are made of: torch runs each as one."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]  # (h,) or (h, c)
Cell = Callable[[Tensor, State, list[Tensor]], State]


def _linear(x: Tensor, weights: list[Tensor], number: int) -> Tensor:
    """The linear map of the inputs, number 0, or of the hidden state, number 1."""
    return F.linear(x, weights[number], weights[number + 2] if len(weights) > 3 else None)


def _lstm(projected: Tensor, state: State, weights: list[Tensor]) -> State:
    h, c = state
    i, f, g, o = (projected + _linear(h, weights, 1)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    if len(weights) in (3, 5):
        h = F.linear(h, weights[-1])
    return h, c


def _gru(projected: Tensor, state: State, weights: list[Tensor]) -> State:
    (h,) = state
    (ir, iz, i_n), (hr, hz, hn) = projected.chunk(3, -1), _linear(h, weights, 1).chunk(3, -1)
    n = torch.tanh(i_n + torch.sigmoid(ir + hr) * hn)
    return (n + torch.sigmoid(iz + hz) * (h - n),)


def _plain(activation: Callable[[Tensor], Tensor], projected: Tensor, state: State, weights: list[Tensor]) -> State:
    return (activation(projected + _linear(state[0], weights, 1)),)


_CELLS: dict[str, tuple[Cell, int]] = {  # and how many tensors a state has
    "lstm": (_lstm, 2),
    "gru": (_gru, 1),
    "rnn_tanh": (functools.partial(_plain, torch.tanh), 1),
    "rnn_relu": (functools.partial(_plain, torch.relu), 1),
}


def _over_steps(cell: Cell, steps: Sequence[Tensor], state: State, weights: list[Tensor]) -> tuple[list[Tensor], State]:
    """The outputs ``[B_t, H]`` of each of some steps ``[B_t, I]``, and the last state of all sequences.

    Of packed sequences, the first B_t go on at step t; the others have ended, or, from the end, have not begun.
    """
    outputs = []
    for step in steps:
        size = len(step)
        new = cell(step, tuple(part[:size] for part in state), weights)
        outputs.append(new[0])
        state = new if size == len(state[0]) else tuple(map(torch.cat, zip(new, (part[size:] for part in state), strict=True)))
    return outputs, state


def _layers(kind: str, *args: Any) -> tuple[Tensor, ...]:
    cell, parts = _CELLS[kind]
    packed = isinstance(args[3], (tuple, list))  # the weights, after the batch sizes
    if packed:
        x, sizes, hx, flat, _biases, num_layers, dropout, training, bidirectional = args
        batch_first = False
    else:
        x, hx, flat, _biases, num_layers, dropout, training, bidirectional, batch_first = args
    first: State = tuple(hx) if parts == 2 else (hx,)
    x = x.transpose(0, 1) if batch_first else x
    directions = 2 if bidirectional else 1
    each = len(flat) // (num_layers * directions)
    lasts: list[State] = []
    for layer in range(num_layers):
        both = []
        for direction in range(directions):
            number = layer * directions + direction
            weights = list(flat[number * each : (number + 1) * each])
            projected = _linear(x, weights, 0)
            steps = projected.split(sizes.tolist()) if packed else projected.unbind(0)
            order = -1 if direction else 1
            outputs, last = _over_steps(cell, steps[::order], tuple(part[number] for part in first), weights)
            both.append(torch.cat(outputs[::order]) if packed else torch.stack(outputs[::order]))
            lasts.append(last)
        x = torch.cat(both, -1)
        if layer < num_layers - 1:
            x = F.dropout(x, dropout, training)
    states = [torch.stack(part) for part in zip(*lasts, strict=True)]
    return (x.transpose(0, 1) if batch_first else x, *states)


def _one_cell(kind: str, *args: Any, **kwargs: Any) -> Any:
    cell, parts = _CELLS[kind]
    x, hx, *given = (*args, *kwargs.values())
    weights = [w for w in given if w is not None]
    state = cell(_linear(x, weights, 0), tuple(hx) if parts == 2 else (hx,), weights)
    return state if parts == 2 else state[0]


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """What has no batching rule in torch, of what has one."""
    others = [d for d in range(v.ndim) if d != dim % v.ndim] if dim != -1 else list(range(v.ndim))
    return v * (g / v.square().sum(others, keepdim=True).sqrt())


DECOMPOSED: dict[Callable[..., Any], Callable[..., Any]] = {
    **{getattr(torch, kind): functools.partial(_layers, kind) for kind in _CELLS},
    **{getattr(torch, f"{kind}_cell"): functools.partial(_one_cell, kind) for kind in _CELLS},
}
BATCHED: dict[Callable[..., Any], Callable[..., Any]] = {torch._weight_norm: _weight_norm}  # instead, under vmap


def decomposition(function: Callable[..., Any], args: Sequence[Any]) -> Callable[..., Any] | None:
    """What to compute instead of a function of torch, of operations that have rules; None for the function itself."""
    if function is torch._weight_norm and args[0].is_cuda and args[0].dtype == torch.float64:
        return _weight_norm  # torch's own rounds to float32 inside
    return DECOMPOSED.get(function)
