"""Recurrent layers and weight normalization as the operations that they are made of: torch runs each as one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]  # (h,) or (h, c)
Cell = Callable[[Tensor, State, list[Tensor]], State]


def _hidden(h: Tensor, weights: list[Tensor]) -> Tensor:
    return F.linear(h, weights[1], weights[3] if len(weights) > 3 else None)


def _lstm(projected: Tensor, state: State, weights: list[Tensor]) -> State:
    h, c = state
    i, f, g, o = (projected + _hidden(h, weights)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    if len(weights) in (3, 5):
        h = F.linear(h, weights[-1])
    return h, c


def _gru(projected: Tensor, state: State, weights: list[Tensor]) -> State:
    (h,) = state
    (ir, iz, i_n), (hr, hz, hn) = projected.chunk(3, -1), _hidden(h, weights).chunk(3, -1)
    n = torch.tanh(i_n + torch.sigmoid(ir + hr) * hn)
    return (n + torch.sigmoid(iz + hz) * (h - n),)


def _plain(activation: Callable[[Tensor], Tensor]) -> Cell:
    def cell(projected: Tensor, state: State, weights: list[Tensor]) -> State:
        return (activation(projected + _hidden(state[0], weights)),)

    return cell


_CELLS: dict[str, tuple[Cell, int]] = {  # and how many tensors a state has
    "lstm": (_lstm, 2),
    "gru": (_gru, 1),
    "rnn_tanh": (_plain(torch.tanh), 1),
    "rnn_relu": (_plain(torch.relu), 1),
}


def _projected(x: Tensor, weights: list[Tensor]) -> Tensor:
    return F.linear(x, weights[0], weights[2] if len(weights) > 3 else None)


def _over_steps(cell: Cell, x: Tensor, state: State, weights: list[Tensor], reverse: bool) -> tuple[Tensor, State]:
    """One layer in one direction on ``[T, B, I]``."""
    steps = _projected(x, weights).unbind(0)
    outputs = []
    for step in reversed(steps) if reverse else steps:
        state = cell(step, state, weights)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _over_packed(
    cell: Cell, x: Tensor, state: State, weights: list[Tensor], reverse: bool, sizes: list[int]
) -> tuple[Tensor, State]:
    """The same on packed sequences ``[ΣB_t, I]``, B_t of which go on at step t; the longest come first."""
    steps = _projected(x, weights).split(sizes)
    outputs: list[Tensor] = []
    if reverse:
        first, now = state, tuple(part[: sizes[-1]] for part in state)
        for step, size in zip(reversed(steps), reversed(sizes), strict=True):
            begun = now[0].shape[0]
            now = tuple(torch.cat([part, start[begun:size]]) for part, start in zip(now, first, strict=True))
            now = cell(step, now, weights)
            outputs.append(now[0])
        return torch.cat(outputs[::-1]), now
    ended: list[State] = []
    for step, size in zip(steps, sizes, strict=True):
        if size < state[0].shape[0]:
            ended.append(tuple(part[size:] for part in state))
            state = tuple(part[:size] for part in state)
        state = cell(step, state, weights)
        outputs.append(state[0])
    last = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    return torch.cat(outputs), last


def _layers(kind: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    cell, parts = _CELLS[kind]
    packed = isinstance(args[3], (tuple, list))  # the weights, after the batch sizes
    sizes: list[int] = []
    if packed:
        x, batch_sizes, hx, flat, _biases, num_layers, dropout, training, bidirectional = args
        sizes, batch_first = batch_sizes.tolist(), False
    else:
        x, hx, flat, _biases, num_layers, dropout, training, bidirectional, batch_first = args
    first: State = tuple(hx) if parts == 2 else (hx,)
    x = x.transpose(0, 1) if batch_first else x
    directions = 2 if bidirectional else 1
    each = len(flat) // (num_layers * directions)
    lasts: list[State] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            weights = list(flat[number * each : (number + 1) * each])
            state = tuple(part[number] for part in first)
            if packed:
                output, last = _over_packed(cell, x, state, weights, direction == 1, sizes)
            else:
                output, last = _over_steps(cell, x, state, weights, direction == 1)
            outputs.append(output)
            lasts.append(last)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if layer < num_layers - 1:
            x = F.dropout(x, dropout, training)
    states = [torch.stack(part) for part in zip(*lasts, strict=True)]
    return (x.transpose(0, 1) if batch_first else x, *states)


def _one_cell(kind: str, args: tuple[Any, ...]) -> Any:
    cell, parts = _CELLS[kind]
    x, hx, w_ih, w_hh, *biases = args
    weights = [w_ih, w_hh, *(b for b in biases if b is not None)]
    state = cell(_projected(x, weights), tuple(hx) if parts == 2 else (hx,), weights)
    return state if parts == 2 else state[0]


def _whole(kind: str) -> Callable[..., Any]:
    return lambda *args, **_kwargs: _layers(kind, args)


def _single(kind: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: _one_cell(kind, (*args, *kwargs.values()))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """What has no batching rule in torch, of what has one."""
    others = [d for d in range(v.ndim) if d != dim % v.ndim] if dim != -1 else list(range(v.ndim))
    return v * (g / v.square().sum(others, keepdim=True).sqrt())


DECOMPOSED: dict[Callable[..., Any], Callable[..., Any]] = {
    **{getattr(torch, kind): _whole(kind) for kind in _CELLS},
    **{getattr(torch, f"{kind}_cell"): _single(kind) for kind in _CELLS},
}
BATCHED: dict[Callable[..., Any], Callable[..., Any]] = {torch._weight_norm: _weight_norm}  # instead, under vmap


def decomposition(function: Callable[..., Any], args: Sequence[Any]) -> Callable[..., Any] | None:
    """What to compute instead of a function of torch, of operations that have rules; None for the function itself."""
    if function is torch._weight_norm and args[0].is_cuda and args[0].dtype == torch.float64:
        return _weight_norm  # torch's own rounds to float32 inside
    return DECOMPOSED.get(function)
