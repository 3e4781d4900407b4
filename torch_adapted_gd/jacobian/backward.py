"""Backward passes through one graph, many at a time if possible."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

# Errors of vmap, or of a user's own backward pass under it. Plain passes follow.
_REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)
_FEW = 4  # vmap is slower for at most so many backward passes


def allows_vmap(model: nn.Module) -> bool:
    """Whether vmap may run backward passes through a model: not if it has backward hooks, which would see wrapped tensors."""
    return not any(m._backward_hooks or m._backward_pre_hooks for m in model.modules())


class BackwardPasses:
    """Vector-Jacobian products of a tensor whose graph is alive.

    Args:
        x: The tensor.
        vectorized: Whether vmap may run several passes as one; False after vmap failed.
    """

    def __init__(self, x: Tensor, *, vectorized: bool) -> None:
        self.x = x
        self.vectorized = vectorized

    def one(self, u: Tensor, inputs: list[Any]) -> list[Tensor | None]:
        """Gradients of u·x; None where x does not depend on an input."""
        if not inputs:
            return []
        return list(torch.autograd.grad(self.x, inputs, u.to(self.x.dtype), retain_graph=True, allow_unused=True))

    def many(self, vectors: Tensor, inputs: list[Any]) -> list[Tensor]:
        """Gradients for several u, stacked; zero where x does not depend on an input."""
        if self.vectorized and len(vectors) > _FEW:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch warns that vmap runs a loop
                    return list(vmap(lambda u: self._filled(u, inputs))(vectors))
            except _REFUSALS as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.vectorized = False
        rows = [self._filled(u, inputs) for u in vectors]
        return [parts[0][None] if len(rows) == 1 else torch.stack(parts) for parts in zip(*rows, strict=True)]

    def rows(self, inputs: list[Any], at_once: int, out: Tensor) -> None:
        """Write the Jacobian of x, flat, by all inputs side by side into ``out``, ``[numel, K]``."""
        self._write_rows(inputs, at_once, out)
        if self.vectorized and len(out) > _FEW and not self._is_sound(inputs, out):
            self.vectorized = False
            self._write_rows(inputs, at_once, out)

    def _is_sound(self, inputs: list[Any], rows: Tensor) -> bool:
        """Whether rows agree with one plain backward pass: some of torch's operations, as cdist, are wrong under vmap.

        By far; layers within may round to bfloat16, which is not known here.
        """
        u = torch.arange(1, len(rows) + 1, dtype=rows.dtype, device=rows.device).cos()  # any vector without a pattern
        plain = self._filled(u.view(self.x.shape).to(self.x.dtype), inputs)
        expected = torch.cat([part.to_dense().reshape(-1) for part in plain]).to(rows.dtype)
        rounding = 16 * torch.finfo(self.x.dtype).eps * rows.norm()
        return not (rows.T @ u - expected).norm() > 0.05 * expected.norm() + rounding  # what is not finite passes

    def _write_rows(self, inputs: list[Any], at_once: int, out: Tensor) -> None:
        total = self.x.numel()
        for start in range(0, total, at_once):
            count = min(at_once, total - start)
            vectors = torch.zeros(count, total, dtype=self.x.dtype, device=self.x.device)
            vectors[torch.arange(count), start + torch.arange(count)] = 1
            parts = self.many(vectors.view(count, *self.x.shape), inputs)
            out[start : start + count] = torch.cat([part.to_dense().reshape(count, -1) for part in parts], 1)

    def columns(self, inputs: list[Tensor]) -> list[Tensor] | None:
        """The Jacobian of x by each input, ``[*x, numel]``, by a double backward pass for each entry; None if that fails."""
        with torch.enable_grad():
            u = torch.zeros_like(self.x, requires_grad=True)
            try:
                products = torch.autograd.grad(self.x, inputs, u, create_graph=True, materialize_grads=True)
                found = [
                    torch.autograd.grad(entry, u, retain_graph=True, materialize_grads=True)[0]
                    if entry.requires_grad
                    else u * 0
                    for product in products
                    for entry in product.reshape(-1)
                ]
            except _REFUSALS as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                return None
        return list(torch.stack([column.detach() for column in found], -1).split([p.numel() for p in inputs], -1))

    def _filled(self, u: Tensor, inputs: list[Any]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.x, inputs, u, retain_graph=True, materialize_grads=True)
