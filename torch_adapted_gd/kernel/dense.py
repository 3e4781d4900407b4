"""The empirical neural tangent kernel Θ = DDᵀ (3.14)-(3.15), accumulated in float64."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import one_of
from ..jacobian import BLOCK_ELEMENTS, jacobian_and_batch, transpose_product
from ..memory import require_memory


def ntk(
    model: nn.Module,
    x1: Tensor | tuple[Any, ...],
    x2: Tensor | tuple[Any, ...] | None = None,
    *,
    method: str = "auto",
    chunk_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Neural tangent kernel Θ(x_i, x_j) = Df_θ(x_i) Df_θ(x_j)ᵀ, equations (3.14)-(3.15).

    It is accumulated in float64 whatever the model's dtype: forming Θ squares the condition number of D.

    Args:
        model: The network f_θ; its trainable parameters are θ.
        x1: Input with the batch first, ``[N1, ...]``, or a tuple of positional inputs.
        x2: A second input, ``[N2, ...]``; by default ``x1``.
        method: ``"jacobian"`` multiplies Jacobians; ``"auto"`` takes the best way there is, which is that one so far.
        chunk_size: Samples differentiated at a time, see `output_jacobian`.
        dtype: Dtype of the result.

    Returns:
        Θ of shape ``[N1, Q, N2, Q]``: entry (i, q, j, r) is ⟨∂x_iq/∂θ, ∂x_jr/∂θ⟩. ``.reshape(N1 * Q, N2 * Q)`` is DDᵀ.

    Raises:
        TypeError: ``model`` is not a module, or ``dtype`` not a floating dtype.
        ValueError: An argument is out of range, see `output_jacobian`.
        MemoryError: D or Θ would not fit.
        RuntimeError: The model's calls cannot be repeated.

    Example:
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> x = torch.eye(3)
        >>> theta = ntk(model, x)  # for a linear map Θ(x, y) = (x·y) 1
        >>> theta.shape, torch.equal(theta.reshape(6, 6), torch.eye(6, dtype=torch.float64))
        (torch.Size([3, 2, 3, 2]), True)
    """
    one_of("method", method, ("auto", "jacobian"))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"`dtype` should be a floating torch dtype, but got {dtype!r}.")
    first, n1 = jacobian_and_batch(model, x1, chunk_size=chunk_size)
    second, n2 = (None, n1) if x2 is None else jacobian_and_batch(model, x2, chunk_size=chunk_size)
    theta = gram(first, second).to(dtype)
    return theta.reshape(n1, theta.shape[0] // max(n1, 1), n2, theta.shape[1] // max(n2, 1))


def gram(first: Tensor, second: Tensor | None = None) -> Tensor:
    """Products of rows in float64: ``first @ second.T``, ``[R1, K]`` and ``[R2, K]`` → ``[R1, R2]``.

    Columns are cast block by block, so that no float64 copy of the whole is made, and for one matrix with itself only
    the tiles on and above the diagonal are computed.

    Args:
        first: The rows on the left.
        second: The rows on the right; by default those on the left.

    Raises:
        MemoryError: The result would not fit.
    """
    other = first if second is None else second
    shape = (first.shape[0], other.shape[0])
    require_memory(
        8 * shape[0] * shape[1],
        first.device,
        f"A kernel of {shape[0]:,} by {shape[1]:,} outputs in float64",
        "Use fewer samples at a time: it grows with the square of their outputs.",
    )
    theta = torch.zeros(shape, dtype=torch.float64, device=first.device)
    width = max(1, BLOCK_ELEMENTS // max(1, *shape))
    for column in range(0, first.shape[1], width):
        left = first[:, column : column + width].double()
        if second is not None:
            theta.addmm_(left, second[:, column : column + width].double().T)
            continue
        tile = max(256, -(-shape[0] // 8))
        for row in range(0, shape[0], tile):
            theta[row : row + tile, row:].addmm_(left[row : row + tile], left[row:].T)
    return theta if second is not None else theta.triu_().add_(theta.triu(1).T)


class StackedJacobian:
    """D of several calls, one block of rows ``[R_i, K]`` a call, never copied into one matrix."""

    def __init__(self, blocks: list[Tensor]) -> None:
        self.blocks = blocks

    def gram(self) -> Tensor:
        """Θ = DDᵀ in float64, ``[QN, QN]``."""
        if len(self.blocks) == 1:
            return gram(self.blocks[0])
        spans = self._spans()
        size = spans[-1].stop
        theta = torch.empty(size, size, dtype=torch.float64, device=self.blocks[0].device)
        for i, first in enumerate(spans):
            theta[first, first] = gram(self.blocks[i])
            for j, second in enumerate(spans[:i]):
                theta[first, second] = gram(self.blocks[i], self.blocks[j])
                theta[second, first] = theta[first, second].T
        return theta

    def transpose_product(self, u: Tensor) -> Tensor:
        """Dᵀu in float64 for u of shape ``[QN]``; returns ``[K]``."""
        products = [transpose_product(block, u[span]) for block, span in zip(self.blocks, self._spans(), strict=True)]
        return torch.stack(products).sum(0)

    def _spans(self) -> list[slice]:
        ends = list(itertools.accumulate(block.shape[0] for block in self.blocks))
        return [slice(end - block.shape[0], end) for end, block in zip(ends, self.blocks, strict=True)]
