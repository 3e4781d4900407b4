"""Operations that are closed under differentiation: each derivative is an operation again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Operands = tuple[Tensor, ...]
Dims = tuple[int | None, ...]  # the batch dimension of each operand, as `torch.vmap` takes it


class SeveralResultsError(TypeError):
    """A function does not return one tensor."""


class Operation:
    """A function of tensors with one result. `torch.func` differentiates it.

    Args:
        function: The function.
        sources: The numbers of the operands that were computed from parameters.
    """

    def __init__(self, function: Callable[..., Any], sources: frozenset[int] = frozenset()) -> None:
        self.function, self.sources = function, sources

    def __call__(self, *tensors: Tensor) -> Tensor:
        result = self.function(*tensors)
        if not isinstance(result, Tensor):
            raise SeveralResultsError
        return result.view_as(result) if any(result is t for t in tensors) else result

    def gradient(self, number: int, tensors: Operands, g: Tensor) -> tuple[Operation, Operands]:
        """The gradient by an operand, as an operation and its operands."""

        def pulled(*operands: Tensor) -> Tensor:
            pull = torch.func.vjp(_of_one(self, number, operands), operands[number])[1]
            return pull(operands[-1])[0]  # type: ignore[no-any-return]

        return Operation(pulled, self.sources), (*tensors, g)

    def tangent(self, number: int, tensors: Operands, t: Tensor) -> tuple[Operation, Operands]:
        """The tangent of the result for a tangent of an operand, likewise."""

        def pushed(*operands: Tensor) -> Tensor:
            return torch.func.jvp(_of_one(self, number, operands), (operands[number],), (operands[-1],))[1]  # type: ignore[no-any-return]

        return Operation(pushed, self.sources), (*tensors, t)

    def batched(self, dims: Dims, tensors: Operands) -> tuple[Operation, Operands]:
        """The operation for operands of which some have a batch dimension; the result has it first."""
        return Operation(torch.vmap(self, dims), self.sources), tensors


def _of_one(function: Callable[..., Tensor], number: int, operands: Operands) -> Callable[[Tensor], Tensor]:
    """A function of one of its operands; the last of ``operands`` is none of them, but a vector."""
    return lambda x: function(*operands[:number], x, *operands[number + 1 : -1])


class MatrixProduct(Operation):
    """x W, or x Wᵀ, for a matrix W of parameters."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__(F.linear if transposed else torch.matmul, frozenset({1}))
        self._transposed = transposed

    def gradient(self, number: int, tensors: Operands, g: Tensor) -> tuple[Operation, Operands]:
        x, weight = tensors
        if number == 0:
            return MatrixProduct(transposed=not self._transposed), (g, weight)
        return Operation(_sum_of_outer_products), (g, x) if self._transposed else (x, g)

    def tangent(self, number: int, tensors: Operands, t: Tensor) -> tuple[Operation, Operands]:
        assert number == 0
        return self, (t, tensors[1])

    def batched(self, dims: Dims, tensors: Operands) -> tuple[Operation, Operands]:
        if dims[1] is not None or dims[0] is None:
            return super().batched(dims, tensors)
        return self, (tensors[0].movedim(dims[0], 0), tensors[1])


def _sum_of_outer_products(a: Tensor, b: Tensor) -> Tensor:
    """Σ_t a_t ⊗ b_t over all leading dimensions: the gradient of a matrix."""
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


class _Elementwise(Operation):
    """A function of two operands that are broadcast."""

    def batched(self, dims: Dims, tensors: Operands) -> tuple[Operation, Operands]:
        if any(dims[number] is not None for number in self.sources):
            return super().batched(dims, tensors)
        rank = max(t.ndim - (dim is not None) for dim, t in zip(dims, tensors, strict=True))
        aligned = []
        for dim, t in zip(dims, tensors, strict=True):
            if dim is not None:
                t = t.movedim(dim, 0)
                t = t.reshape(len(t), *[1] * (rank + 1 - t.ndim), *t.shape[1:])
            aligned.append(t)
        return self, tuple(aligned)


class Multiplication(_Elementwise):
    """a ∘ b."""

    def __init__(self, sources: frozenset[int]) -> None:
        super().__init__(torch.mul, sources)

    def gradient(self, number: int, tensors: Operands, g: Tensor) -> tuple[Operation, Operands]:
        product, pair = self.tangent(number, tensors, g)
        shape = tensors[number].shape
        if torch.broadcast_shapes(*(t.shape for t in pair)) == shape:
            return product, pair
        return Operation(lambda a, b: (a * b).sum_to_size(shape), product.sources), pair

    def tangent(self, number: int, tensors: Operands, t: Tensor) -> tuple[Operation, Operands]:
        pair = (t, tensors[1]) if number == 0 else (tensors[0], t)
        return Multiplication(self.sources - {number}), pair


class Addition(_Elementwise):
    """a + b. It is noted only under transforms of `torch.func`, where no function mode sees it."""

    def __init__(self, sources: frozenset[int]) -> None:
        super().__init__(torch.add, sources)

    def gradient(self, number: int, tensors: Operands, g: Tensor) -> tuple[Operation, Operands]:
        shape = tensors[number].shape
        return Operation(lambda g: g.sum_to_size(shape)), (g,)

    def tangent(self, number: int, tensors: Operands, t: Tensor) -> tuple[Operation, Operands]:  # noqa: ARG002
        shape = torch.broadcast_shapes(*(x.shape for x in tensors))
        return Operation(lambda t: t.expand(shape)), (t,)
