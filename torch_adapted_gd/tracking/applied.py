"""Runs functions of a forward pass as operations whose derivatives are noted too, as they use parameters again."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import private
from .arguments import Key, changes_in_place, replaced, tensors_of
from .operations import Addition, MatrixProduct, Multiplication, Operation, SeveralResultsError

if TYPE_CHECKING:
    from .tape import Source, Tape

# The gradients of these by a sampled operand do not use the parameter, so they need no `Applied`.
_LINEAR_IN_BOTH = {
    *(torch.add, torch.sub, torch.subtract, Tensor.add, Tensor.sub, Tensor.subtract),
    *(Tensor.add_, Tensor.sub_, Tensor.__rsub__, Tensor.__setitem__, Tensor.__getitem__),
    *(torch.cat, torch.concat, torch.stack, torch.hstack, torch.vstack, torch.rsub, torch.index_select, Tensor.index_select),
    *(F.embedding, torch.embedding, F.embedding_bag),
}
_ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
_MULTIPLICATIONS = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__}


class Applied(torch.autograd.Function):
    """An operation in the graph; under transforms of `torch.func`, it is in the graph at their bottom."""

    @classmethod
    def apply(cls, operation: Operation, tape: weakref.ref[Tape], *tensors: Tensor) -> Tensor:
        """Run and note it."""
        result: Tensor = super().apply(operation, tape, *tensors)
        notes = tape()
        if notes is not None and result.requires_grad and not private.in_transform():
            found = {number: notes.source_of(tensors[number]) for number in operation.sources}
            sources: dict[Key, Source] = {number: source for number, source in found.items() if source is not None}
            if sources:
                notes.note(operation.function, tensors, sources, result)
        return result

    @staticmethod
    def forward(operation: Operation, _tape: weakref.ref[Tape], *tensors: Tensor) -> Tensor:
        return operation(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.operation, ctx.tape, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        operation, tensors, tape = ctx.operation, ctx.saved_tensors, ctx.tape()
        found: list[Tensor | None] = [None, None]
        for number in range(len(tensors)):
            wanted = ctx.needs_input_grad[number + 2]
            if wanted and not private.in_transform():
                ahead = ctx.next_functions[number][0]
                wanted = ahead is not None and private.will_reach(ahead, else_=True)
            if not wanted:
                found.append(None)
                continue
            of, operands = operation.gradient(number, tensors, *gradients)
            noted = of.sources and number not in operation.sources and tape is not None and torch.is_grad_enabled()
            found.append(_run_derivative(of, tape, operands) if noted else of(*operands))
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        operation, tensors, tape = ctx.operation, ctx.saved_tensors, ctx.tape()
        parts = []
        for number, tangent in enumerate(tangents[2:]):
            if tangent is None or number in operation.sources:  # parameters have no tangent
                continue
            of, operands = operation.tangent(number, tensors, tangent)
            parts.append(_run_derivative(of, tape, operands) if of.sources and tape is not None else of(*operands))
        return functools.reduce(torch.add, parts)

    @staticmethod
    def vmap(
        _info: Any, in_dims: tuple[int | None, ...], operation: Operation, tape: weakref.ref[Tape], *tensors: Tensor
    ) -> tuple[Tensor, int]:
        of, operands = operation.batched(in_dims[2:], tensors)
        return Applied.apply(of, tape, *operands), 0


def _run(operation: Operation, tape: Tape, tensors: Sequence[Tensor]) -> Tensor:
    """The value of an operation, in the graph, and noted."""
    return Applied.apply(operation, weakref.ref(tape), *tensors)


def _run_derivative(operation: Operation, tape: Tape, tensors: Sequence[Tensor]) -> Tensor:
    tape.derived = True
    return _run(operation, tape, tensors)


_NORMALIZATIONS: dict[Callable[..., Any], dict[str, int]] = {  # where these have their parameters
    F.layer_norm: {"weight": 2, "bias": 3},
    F.rms_norm: {"weight": 2},
    F.group_norm: {"weight": 2, "bias": 3},
    F.batch_norm: {"weight": 3, "bias": 4},
    F.instance_norm: {"weight": 3, "bias": 4},
}
_BY_CHANNEL = {F.group_norm, F.batch_norm, F.instance_norm}


def _normalized(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tape: Tape) -> Tensor:
    """A normalization, times a weight, plus a bias, as three operations."""
    without, by_name = list(args), dict(kwargs)
    given: dict[str, Tensor | None] = {}
    for name, number in _NORMALIZATIONS[func].items():
        given[name] = by_name.pop(name, None)
        if number < len(without):
            given[name], without[number] = without[number], None
    result: Tensor = func(*without, **by_name)
    with tape:
        for name, apply in (("weight", torch.mul), ("bias", torch.add)):
            if (value := given.get(name)) is not None:
                result = apply(result, value.view(-1, *[1] * (result.ndim - 2)) if func in _BY_CHANNEL else value)
    return result


def _with_bias(product: Operation, tensors: Sequence[Tensor], bias: Tensor | None, tape: Tape) -> Tensor:
    """A matrix product and the sum with a bias, as two operations."""
    result = _run(product, tape, tensors)
    with tape:
        return result if bias is None else result + bias


def applied(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    keys: Collection[Key],
    tape: Tape,
    *,
    transformed: bool,
) -> Tensor | None:
    """``func(*args, **kwargs)`` by operations whose derivatives are noted too; None if these need no note.

    ``keys`` are the operands that were computed from parameters. If ``transformed`` by `torch.func`, all operations are run so,
    because an operation can be noted only at the bottom of the transforms.
    """
    if changes_in_place(func, kwargs) or (func in _LINEAR_IN_BOTH and not transformed):
        return None
    if func in _NORMALIZATIONS:
        return _normalized(func, args, kwargs, tape)
    positions = frozenset(key for key in keys if isinstance(key, int))
    if not kwargs and all(isinstance(a, Tensor) or a is None for a in args):
        if func in _ADDITIONS:
            return _run(Addition(positions), tape, args)
        if func in _MULTIPLICATIONS:
            return _run(Multiplication(positions), tape, args)
        if func is F.linear and positions <= {1, 2} and 1 in positions and args[1].ndim == 2:
            return _with_bias(MatrixProduct(transposed=True), args[:2], args[2] if len(args) > 2 else None, tape)
        if func in _PRODUCTS and positions == {1} and args[1].ndim == 2 and args[0].ndim > 1:
            return _run(MatrixProduct(transposed=False), tape, args)
        if func in (torch.addmm, Tensor.addmm) and positions <= {0, 2} and 2 in positions:
            return _with_bias(MatrixProduct(transposed=False), args[1:], args[0], tape)
    operands = {key: tensor for key, tensor in tensors_of(args, kwargs) if tensor.is_floating_point()}
    if not operands.keys() >= set(keys):
        return None
    numbers = dict(zip(operands, range(len(operands)), strict=True))

    @functools.wraps(func)
    def of_tensors(*tensors: Tensor) -> Any:
        given, by_name = replaced(args, kwargs, dict(zip(operands, tensors, strict=True)))
        return func(*given, **by_name)

    try:
        return _run(Operation(of_tensors, frozenset(numbers[key] for key in keys)), tape, tuple(operands.values()))
    except SeveralResultsError:
        return None
