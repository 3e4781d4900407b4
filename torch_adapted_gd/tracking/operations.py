"""Operations that are closed under differentiation: each derivative is an operation again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class SeveralResultsError(TypeError):
    """A function does not return one tensor."""


@dataclass
class Operation:
    """A function of tensors, and its derivatives in each.

    Attributes:
        tensors: Its operands.
        sources: The numbers of those that were computed from parameters.
    """

    tensors: tuple[Tensor, ...]
    sources: frozenset[int] = frozenset()

    @property
    def function(self) -> Callable[..., Any]:
        """The function for the note of the operation."""
        raise NotImplementedError

    def compute(self, *tensors: Tensor) -> Tensor:
        """Its value."""
        result: Tensor = self.function(*tensors)
        return result

    def gradient(self, number: int, tensors: tuple[Tensor, ...], g: Tensor) -> Operation:
        """The gradient by an operand, as an operation."""
        return General((*tensors, g), self.sources, _Derivative(self.compute, number, pull=True))

    def tangent(self, number: int, tensors: tuple[Tensor, ...], t: Tensor) -> Operation:
        """The tangent of the result for a tangent of an operand, as an operation."""
        return General((*tensors, t), self.sources, _Derivative(self.compute, number, pull=False))

    def batched(self, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> Operation:
        """The operation for operands of which some have a batch dimension; the result has it first."""
        return General(tensors, self.sources, _Batched(self.compute, dims))


@dataclass
class MatrixProduct(Operation):
    """x W, or x Wᵀ, for a matrix W."""

    transposed: bool = False

    @property
    def function(self) -> Callable[..., Any]:
        """See `Operation`."""
        return F.linear if self.transposed else torch.matmul

    def gradient(self, number: int, tensors: tuple[Tensor, ...], g: Tensor) -> Operation:
        """See `Operation`."""
        x, weight = tensors
        if number == 0:
            return MatrixProduct((g, weight), self.sources, not self.transposed)
        return _OuterSum((g, x) if self.transposed else (x, g), frozenset())

    def tangent(self, number: int, tensors: tuple[Tensor, ...], t: Tensor) -> Operation:
        """See `Operation`."""
        assert number == 0
        return MatrixProduct((t, tensors[1]), self.sources, self.transposed)

    def batched(self, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> Operation:
        """See `Operation`."""
        if dims[1] is not None or dims[0] is None:
            return super().batched(dims, tensors)
        return MatrixProduct((tensors[0].movedim(dims[0], 0), tensors[1]), self.sources, self.transposed)


@dataclass
class _OuterSum(Operation):
    """Σ_t a_t ⊗ b_t over all leading dimensions: the gradient of a matrix."""

    def compute(self, *tensors: Tensor) -> Tensor:
        """See `Operation`."""
        a, b = tensors
        return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


def _aligned(dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Operands to be broadcast; those with a batch dimension have it first."""
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
class Multiplication(Operation):
    """a ∘ b, broadcast."""

    @property
    def function(self) -> Callable[..., Any]:
        """See `Operation`."""
        return torch.mul

    def gradient(self, number: int, tensors: tuple[Tensor, ...], g: Tensor) -> Operation:
        """See `Operation`."""
        other = 1 - number
        pair = (g, tensors[other]) if number == 0 else (tensors[other], g)
        place = 1 if number == 0 else 0
        sources = frozenset({place} if other in self.sources else ())
        if torch.broadcast_shapes(g.shape, tensors[other].shape) == tensors[number].shape:
            return Multiplication(pair, sources)
        return General(pair, sources, _SummedProduct(tensors[number].shape))

    def tangent(self, number: int, tensors: tuple[Tensor, ...], t: Tensor) -> Operation:
        """See `Operation`."""
        pair = (t, tensors[1]) if number == 0 else (tensors[0], t)
        return Multiplication(pair, self.sources - {number})

    def batched(self, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> Operation:
        """See `Operation`."""
        if any(dims[number] is not None for number in self.sources):
            return super().batched(dims, tensors)
        return Multiplication(_aligned(dims, tensors), self.sources)


@dataclass
class Addition(Operation):
    """a + b, broadcast. It is noted only under transforms of `torch.func`, where no function mode sees it."""

    @property
    def function(self) -> Callable[..., Any]:
        """See `Operation`."""
        return torch.add

    def gradient(self, number: int, tensors: tuple[Tensor, ...], g: Tensor) -> Operation:
        """See `Operation`."""
        return General((g,), frozenset(), _Summed(tensors[number].shape))

    def tangent(self, number: int, tensors: tuple[Tensor, ...], t: Tensor) -> Operation:  # noqa: ARG002
        """See `Operation`."""
        return General((t,), frozenset(), _Expanded(torch.broadcast_shapes(*(x.shape for x in tensors))))

    def batched(self, dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> Operation:
        """See `Operation`."""
        if any(dims[number] is not None for number in self.sources):
            return super().batched(dims, tensors)
        return Addition(_aligned(dims, tensors), self.sources)


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
class General(Operation):
    """Any function of tensors with one result, differentiated by `torch.func`."""

    of: Callable[..., Any] = torch.clone

    @property
    def function(self) -> Callable[..., Any]:
        """See `Operation`."""
        return self.of

    def compute(self, *tensors: Tensor) -> Tensor:
        """See `Operation`."""
        result = self.of(*tensors)
        if not isinstance(result, Tensor):
            raise SeveralResultsError
        return result.view_as(result) if any(result is t for t in tensors) else result


@dataclass(frozen=True)
class _Derivative:
    """A function's derivative in one of its operands, applied to a vector, which is the last operand.

    Attributes:
        of: The function.
        number: The operand.
        pull: Whether it is the vector-Jacobian product; else the Jacobian-vector product.
    """

    of: Callable[..., Tensor]
    number: int
    pull: bool

    def __call__(self, *tensors: Tensor) -> Tensor:
        *operands, vector = tensors
        at = operands[self.number]

        def moving(operand: Tensor) -> Tensor:
            return self.of(*operands[: self.number], operand, *operands[self.number + 1 :])

        if self.pull:
            (result,) = torch.func.vjp(moving, at)[1](vector)
        else:
            result = torch.func.jvp(moving, (at,), (vector,))[1]
        return result  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Batched:
    """A function of operands of which some have a batch dimension."""

    of: Callable[..., Tensor]
    dims: tuple[int | None, ...]

    def __call__(self, *tensors: Tensor) -> Tensor:
        result: Tensor = torch.vmap(self.of, self.dims)(*tensors)
        return result
