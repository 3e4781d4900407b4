"""Positive-definiteness of the tangent kernel on the data (3.16), its blocks, and the effective kernel of a field (3.17)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import real_number
from ..jacobian import ntk
from ..solve.spectrum import default_rtol
from .local import OutputMap


@dataclass(frozen=True)
class Definiteness:
    """Whether Θ is positive-definite on the data. ``bool()`` of it is the answer.

    Attributes:
        smallest: Smallest eigenvalue of Θ; only rounding can make it negative.
        largest: Largest eigenvalue.
        rank: Rank of D, the number of eigenvalues above ``cut``.
        size: QN.
        cut: The threshold for zero, (rtol·σ_max)².
        margin: ``smallest / cut``, above 1 if Θ is definite; infinite for a cut of zero.
    """

    smallest: float
    largest: float
    rank: int
    size: int
    cut: float
    margin: float

    def __bool__(self) -> bool:
        """The answer: rank D = QN."""
        return self.rank == self.size


def is_positive_definite(model: nn.Module, x: Tensor | tuple[Any, ...], *, rtol: float | None = None) -> Definiteness:
    """Whether the tangent kernel is positive-definite on the data (3.16), that is, whether rank D = QN.

    Args:
        model: The network; its trainable parameters are θ.
        x: Input with the batch first, ``[N, ...]``, or a tuple of positional inputs.
        rtol: Singular values of D up to rtol·σ_max count as zero; by default those that rounding of Θ can cause.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``rtol`` is out of range, there are no samples, or the outputs do not have the batch first.
        RuntimeError: Θ is not finite.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> bool(is_positive_definite(model, torch.eye(3))), bool(is_positive_definite(model, torch.ones(2, 3)))
        (True, False)
    """
    theta = ntk(model, x)
    size = theta.shape[0] * theta.shape[1]
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.requires_grad)
    relative = default_rtol(size, eps) if rtol is None else real_number("rtol", rtol, low=0.0, below=1.0)
    if not size:
        raise ValueError("`x` should have samples, but has none.")
    if not torch.isfinite(theta).all():
        raise RuntimeError("The tangent kernel is not finite there: the parameters have diverged.")
    eigenvalues = torch.linalg.eigvalsh(theta.reshape(size, size))
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    cut = relative**2 * largest
    rank = int((eigenvalues > cut).sum())
    margin = smallest / cut if cut > 0 else math.inf if rank == size else 0.0
    return Definiteness(smallest, largest, rank, size, cut, margin)


def kernel_block(model: nn.Module, x: Tensor | tuple[Any, ...], i: int, j: int) -> Tensor:
    """Θ(x_i, x_j) = Df_θ(x_i) Df_θ(x_j)ᵀ, one block of the kernel (3.14), computed from these two samples.

    Args:
        model: The network. Its samples must not interact.
        x: Input with the batch first, ``[N, ...]``, or a tuple of positional inputs, of which tensors have the batch first.
        i: Index of the first sample; negative counts from the end.
        j: Index of the second.

    Returns:
        ``[Q, Q]``, float64.

    Raises:
        TypeError: ``model`` is not a module, or an index not a whole number.
        IndexError: There is no such sample.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> kernel_block(model, torch.tensor([[1.0, 0.0], [3.0, 4.0]]), 0, 1)
        tensor([[3., 0.],
                [0., 3.]], dtype=torch.float64)
    """
    inputs = x if isinstance(x, tuple) else (x,)
    first, second = (tuple(part[index(k)][None] if isinstance(part, Tensor) else part for part in inputs) for k in (i, j))
    return ntk(model, first, second)[0, :, 0, :]


def effective_kernel(
    model: nn.Module,
    x: Tensor | tuple[Any, ...],
    alpha: float = 1.0,
    *,
    step: float = 1e-4,
    rank_rtol: float | None = None,
) -> Tensor:
    """The kernel K in ∂_s x = −K ∇ₓC, measured from the motion of the outputs; δ_ij 1 for the adapted flow (3.17).

    For each unit vector e_k in place of ∇ₓC, the parameters move along the field V_α, forwards and backwards:
    K e_k = [x(θ + hv_k) − x(θ − hv_k)]/2h, v_k = α D⁺e_k + (1−α) Dᵀe_k. Up to O(h²), K is P for α = 1 (the identity at full
    rank), and Θ for α = 0.

    Args:
        model: The network; it is left as it was.
        x: Input with the batch first, or a tuple of positional inputs.
        alpha: α in [0, 1].
        step: Length of the moves relative to |θ|. A float32 network needs about 1e-2.
        rank_rtol: Singular values of D up to this times the largest count as zero.

    Returns:
        ``[N, Q, N, Q]``, float64. It takes 2·QN forward passes.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1)).double()
        >>> kernel = effective_kernel(model, torch.randn(4, 3).double()).reshape(4, 4)
        >>> torch.allclose(kernel, torch.eye(4).double(), atol=1e-5)
        True
    """
    alpha = real_number("alpha", alpha, low=0.0, high=1.0)
    real_number("step", step, low=1e-300)
    network = OutputMap(model, x, rank_rtol)
    theta = network.values()
    tangent = network.tangent()
    unit = torch.eye(network.num_outputs, dtype=torch.float64, device=theta.device)
    weights = alpha * tangent.solve(unit) + (1 - alpha) * unit if alpha else unit
    columns = []
    with network.borrowed():
        for u in weights.unbind(1):
            v = tangent.pull(u)
            h = step * float(theta.norm()) / max(float(v.norm()), 1e-300)
            columns.append((network.outputs(theta + h * v) - network.outputs(theta - h * v)) / (2 * h))
    q = network.num_outputs // network.num_samples
    return torch.stack(columns, dim=1).reshape(network.num_samples, q, network.num_samples, q)
