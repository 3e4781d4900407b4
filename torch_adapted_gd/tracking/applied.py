"""Operations whose derivatives use their parameters again, and are noted too: closed under differentiation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import private
from .arguments import Key, called, changes_in_place, replaced, tensors_of

if TYPE_CHECKING:
    from .tape import Source, Tape

# By these a sampled operand's gradient does not use the parameter: an ordinary operation does.
_LINEAR_IN_BOTH = {
    *(getattr(owner, name) for owner in (torch, Tensor) for name in ("add", "sub", "subtract") if hasattr(owner, name)),
    *(Tensor.add_, Tensor.sub_, Tensor.__rsub__, Tensor.__setitem__, Tensor.__getitem__),
    *(torch.cat, torch.concat, torch.stack, torch.hstack, torch.vstack, torch.rsub, torch.index_select, Tensor.index_select),
    *(F.embedding, torch.embedding, F.embedding_bag),
}
_ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
_MULTIPLICATIONS = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__}


class SeveralResultsError(TypeError):
    """A function does not give one tensor, as an operation has to."""


class Operation:
    """A function of tensors, and its derivatives in each.

    Attributes:
        function: What a note of it says was called.
        tensors: Its operands.
        sources: Which of them were computed from parameters, by their number.
    """

    function: Callable[..., Any]

    def __init__(self, tensors: tuple[Tensor, ...], sources: frozenset[int]) -> None:
        self.tensors = tensors
        self.sources = sources

    def compute(self, *tensors: Tensor) -> Tensor:
        """Its value."""
        result: Tensor = self.function(*tensors)
        return result

    def gradient(self, number: int, tensors: tuple[Tensor, ...], g: Tensor) -> Operation:
        """The gradient in an operand, as another operation."""
        return _General((*tensors, g), self.sources, _Pulled(self.compute, number))

    def tangent(self, number: int, tensors: tuple[Tensor, ...], t: Tensor) -> Operation:
        """What a tangent of an operand makes of it, as another operation."""
        return _General((*tensors, t), self.sources, _Pushed(self.compute, number))

    def batched(self, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> Operation:
        """The same for operands of which some have a batch, as another operation whose result has it first."""
        return _General(tensors, self.sources, _Batched(self.compute, dims))

    def run(self, tape: Tape) -> Tensor:
        """Its value, in the graph, and noted."""
        tensors, self.tensors = self.tensors, ()
        return Applied.apply(self, weakref.ref(tape), *tensors)

    def note(self, tape: Tape, tensors: tuple[Tensor, ...], result: Tensor) -> None:
        """Take it down."""
        found: dict[Key, Source] = {}
        for number in self.sources:
            source = tape.source_of(tensors[number])
            if source is not None:
                found[number] = source
        if found and result.requires_grad:
            tape.note(self.function, tensors, found, result)


class Applied(torch.autograd.Function):
    """An operation in the graph, or under a transform of `torch.func`, at whose bottom it comes to be in the graph."""

    @classmethod
    def apply(cls, operation: Operation, tape: weakref.ref[Tape], *tensors: Tensor) -> Tensor:
        """Run and note it."""
        result: Tensor = super().apply(operation, tape, *tensors)
        notes = tape()
        if notes is not None and not private.in_transform():
            operation.note(notes, tensors, result)
        return result

    @staticmethod
    def forward(operation: Operation, _tape: weakref.ref[Tape], *tensors: Tensor) -> Tensor:  # noqa: D102
        return operation.compute(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004, D102
        ctx.operation, ctx.tape, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        operation, tensors, (g,), tape = ctx.operation, ctx.saved_tensors, gradients, ctx.tape()
        found: list[Tensor | None] = [None, None]
        for number in range(len(tensors)):
            wanted = ctx.needs_input_grad[number + 2]
            if wanted and not private.in_transform():
                ahead = ctx.next_functions[number][0]
                wanted = ahead is not None and private.will_reach(ahead, else_=True)
            if not wanted:
                found.append(None)
                continue
            of = operation.gradient(number, tensors, g)
            noted = of.sources and number not in operation.sources and tape is not None and torch.is_grad_enabled()
            found.append(of.run(tape) if noted else of.compute(*of.tensors))
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:  # noqa: D102
        operation, tensors, tape = ctx.operation, ctx.saved_tensors, ctx.tape()
        total: Tensor | None = None
        for number, tangent in enumerate(tangents[2:]):
            if tangent is None or number in operation.sources:  # parameters have no tangent
                continue
            of = operation.tangent(number, tensors, tangent)
            part = of.run(tape) if of.sources and tape is not None else of.compute(*of.tensors)
            total = part if total is None else total + part
        assert total is not None
        return total

    @staticmethod
    def vmap(  # noqa: D102
        _info: Any, in_dims: tuple[int | None, ...], operation: Operation, tape: weakref.ref[Tape], *tensors: Tensor
    ) -> tuple[Tensor, int]:
        of = operation.batched(in_dims[2:], tensors)
        return Applied.apply(of, tape, *of.tensors), 0


@dataclass
class _MatrixProduct(Operation):
    """x W, or x Wᵀ, for a matrix W."""

    tensors: tuple[Tensor, ...]
    sources: frozenset[int]
    transposed: bool

    def __post_init__(self) -> None:
        self.function = F.linear if self.transposed else torch.matmul

    def gradient(self, number: int, tensors: tuple[Tensor, ...], g: Tensor) -> Operation:
        x, weight = tensors
        if number == 0:
            return _MatrixProduct((g, weight), self.sources, not self.transposed)
        return _OuterSum((g, x) if self.transposed else (x, g), frozenset())

    def tangent(self, number: int, tensors: tuple[Tensor, ...], t: Tensor) -> Operation:
        assert number == 0
        return _MatrixProduct((t, tensors[1]), self.sources, self.transposed)

    def batched(self, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> Operation:
        if dims[1] is not None or dims[0] is None:
            return super().batched(dims, tensors)
        return _MatrixProduct((tensors[0].movedim(dims[0], 0), tensors[1]), self.sources, self.transposed)


@dataclass
class _OuterSum(Operation):
    """Σ_t a_t ⊗ b_t over all leading dimensions: what a matrix's gradient is."""

    tensors: tuple[Tensor, ...]
    sources: frozenset[int] = field(default_factory=frozenset)

    def compute(self, *tensors: Tensor) -> Tensor:
        a, b = tensors
        return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


def _aligned(dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Operands to be broadcast, with the batch of those that have one first."""
    rank = max(t.ndim - (dim is not None) for dim, t in zip(dims, tensors, strict=True))
    found = []
    for dim, t in zip(dims, tensors, strict=True):
        if dim is None:
            found.append(t)
            continue
        first = t.movedim(dim, 0)
        found.append(first.reshape(first.shape[0], *[1] * (rank + 1 - first.ndim), *first.shape[1:]))
    return tuple(found)


@dataclass
class _Multiplication(Operation):
    """a ∘ b, broadcast."""

    tensors: tuple[Tensor, ...]
    sources: frozenset[int]

    function = torch.mul

    def gradient(self, number: int, tensors: tuple[Tensor, ...], g: Tensor) -> Operation:
        other = 1 - number
        pair = (g, tensors[other]) if number == 0 else (tensors[other], g)
        place = 1 if number == 0 else 0
        sources = frozenset({place} if other in self.sources else ())
        if torch.broadcast_shapes(g.shape, tensors[other].shape) == tensors[number].shape:
            return _Multiplication(pair, sources)
        return _General(pair, sources, _SummedProduct(tensors[number].shape))

    def tangent(self, number: int, tensors: tuple[Tensor, ...], t: Tensor) -> Operation:
        pair = (t, tensors[1]) if number == 0 else (tensors[0], t)
        return _Multiplication(pair, self.sources - {number})

    def batched(self, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> Operation:
        if any(dims[number] is not None for number in self.sources):
            return super().batched(dims, tensors)
        return _Multiplication(_aligned(dims, tensors), self.sources)


@dataclass
class _Addition(Operation):
    """a + b, broadcast: what transforms of `torch.func` need to be noted of, where no mode sees what comes out below them."""

    tensors: tuple[Tensor, ...]
    sources: frozenset[int]

    function = torch.add

    def gradient(self, number: int, tensors: tuple[Tensor, ...], g: Tensor) -> Operation:
        return _General((g,), frozenset(), _Summed(tensors[number].shape))

    def tangent(self, number: int, tensors: tuple[Tensor, ...], t: Tensor) -> Operation:  # noqa: ARG002
        return _General((t,), frozenset(), _Expanded(torch.broadcast_shapes(*(x.shape for x in tensors))))

    def batched(self, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> Operation:
        if any(dims[number] is not None for number in self.sources):
            return super().batched(dims, tensors)
        return _Addition(_aligned(dims, tensors), self.sources)


@dataclass(frozen=True)
class _SummedProduct:
    shape: torch.Size

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum_to_size(self.shape)


@dataclass(frozen=True)
class _Summed:
    shape: torch.Size

    def __call__(self, g: Tensor) -> Tensor:
        return g.sum_to_size(self.shape)


@dataclass(frozen=True)
class _Expanded:
    shape: torch.Size

    def __call__(self, t: Tensor) -> Tensor:
        return t.expand(self.shape)


@dataclass
class _General(Operation):
    """Any function of tensors with one result, differentiated by `torch.func`."""

    tensors: tuple[Tensor, ...]
    sources: frozenset[int]
    of: Callable[..., Tensor]

    def __post_init__(self) -> None:
        self.function = self.of

    def compute(self, *tensors: Tensor) -> Tensor:
        result = self.of(*tensors)
        if not isinstance(result, Tensor):
            raise SeveralResultsError
        return result.view_as(result) if any(result is t for t in tensors) else result


@dataclass(frozen=True)
class _Pushed:
    """The Jacobian-vector product of a function in one of its operands, the vector being the last."""

    of: Callable[..., Tensor]
    number: int

    def __call__(self, *tensors: Tensor) -> Tensor:
        *operands, t = tensors

        def moving(operand: Tensor) -> Tensor:
            return self.of(*operands[: self.number], operand, *operands[self.number + 1 :])

        result: Tensor = torch.func.jvp(moving, (operands[self.number],), (t,))[1]
        return result


@dataclass(frozen=True)
class _Batched:
    """A function of operands of which some have a batch."""

    of: Callable[..., Tensor]
    dims: tuple[int | None, ...]

    def __call__(self, *tensors: Tensor) -> Tensor:
        result: Tensor = torch.vmap(self.of, self.dims)(*tensors)
        return result


@dataclass(frozen=True)
class _Pulled:
    """The vector-Jacobian product of a function in one of its operands, the vector being the last."""

    of: Callable[..., Tensor]
    number: int

    def __call__(self, *tensors: Tensor) -> Tensor:
        *operands, g = tensors

        def moving(operand: Tensor) -> Tensor:
            return self.of(*operands[: self.number], operand, *operands[self.number + 1 :])

        (result,) = torch.func.vjp(moving, operands[self.number])[1](g)
        return result  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Bound:
    """A function of the tensors among its arguments alone."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keys: tuple[Key, ...]

    def __call__(self, *tensors: Tensor) -> Tensor:
        args, kwargs = replaced(self.args, self.kwargs, dict(zip(self.keys, tensors, strict=True)))
        return called(self.function, args, kwargs)  # type: ignore[no-any-return]


class _Affine:
    """A normalization, times a weight, plus a bias, as three operations."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._func, self._args, self._kwargs = func, args, kwargs

    def run(self, tape: Tape) -> Tensor:
        names = {F.layer_norm: 2, F.rms_norm: 2, F.group_norm: 2, F.batch_norm: 3, F.instance_norm: 3}
        first = names[self._func]
        args, kwargs = list(self._args), dict(self._kwargs)
        given: dict[str, Tensor | None] = {}
        for number, name in enumerate(("weight", "bias"), start=first):
            given[name] = kwargs.pop(name, None)
            if number < len(args):
                given[name], args[number] = args[number], None
        result: Tensor = self._func(*args, **kwargs)
        with tape:
            for name, apply in (("weight", torch.mul), ("bias", torch.add)):
                value = given[name]
                if value is not None:
                    if first == 3 or self._func is F.group_norm:
                        value = value.view(-1, *[1] * (result.ndim - 2))
                    result = apply(result, value)
        return result


class _WithBias:
    """A matrix product and the sum with a bias, as two operations."""

    def __init__(self, product: Operation, bias: Tensor) -> None:
        self._product, self._bias = product, bias

    def run(self, tape: Tape) -> Tensor:
        result = self._product.run(tape)
        with tape:
            return result + self._bias


def operation_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], keys: Collection[Key], *, all_of_them: bool
) -> Operation | _Affine | _WithBias | None:
    """A function called with some operands of parameters, as an operation; None where its derivatives need no note.

    Args:
        func: What was called.
        args: With these.
        kwargs: And these.
        keys: The operands that were computed from parameters.
        all_of_them: Have those whose derivatives need none, too.
    """
    if changes_in_place(func, kwargs):
        return None
    if all_of_them and func in _ADDITIONS and not kwargs and all(isinstance(a, Tensor) for a in args):
        return _Addition((args[0], args[1]), frozenset(int(key) for key in keys if isinstance(key, int)))
    if func in _LINEAR_IN_BOTH and not all_of_them:
        return None
    if func in (F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.instance_norm):
        return _Affine(func, args, kwargs)
    if func is F.linear and not kwargs and 1 in keys and 0 not in keys and args[1].ndim == 2:
        product = _MatrixProduct((args[0], args[1]), frozenset({1}), True)
        return product if len(args) < 3 or args[2] is None else _WithBias(product, args[2])
    if func in _PRODUCTS and not kwargs and set(keys) == {1} and args[1].ndim == 2 and args[0].ndim > 1:
        return _MatrixProduct((args[0], args[1]), frozenset({1}), False)
    if func in (torch.addmm, Tensor.addmm) and not kwargs and len(args) == 3 and set(keys) <= {0, 2} and 2 in keys:
        return _WithBias(_MatrixProduct((args[1], args[2]), frozenset({1}), False), args[0])
    if func in _MULTIPLICATIONS and not kwargs and all(isinstance(a, Tensor) for a in args):
        return _Multiplication((args[0], args[1]), frozenset(int(key) for key in keys if isinstance(key, int)))
    operands = dict(tensors_of(args, kwargs))
    floating = tuple(key for key, tensor in operands.items() if tensor.is_floating_point())
    if not all(key in floating for key in keys):
        return None
    of = _Bound(func, args, kwargs, floating)
    tensors = tuple(operands[key] for key in floating)
    return _General(tensors, frozenset(floating.index(key) for key in keys), of)
