"""The rule for any function: its own vector-Jacobian products, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from ..checks import all_finite
from ..tracking.arguments import Key, called, detached, replaced, results_of, tensors_of
from .backward import BackwardPasses

if TYPE_CHECKING:
    from .uses import Use

_BYTES = 2**27  # memory for vectors of one vectorized product


def any_function(use: Use) -> dict[Any, Tensor]:
    """Jacobians ``[N, Q, *operand.shape]`` by the operands that were computed from parameters.

    If the function can be called for single samples, ``vmap`` differentiates it for all of them at once. If not, there is a
    backward pass for each sample and output, with a gradient that is zero for all other samples. Both are compared with one
    plain backward pass for random weights, because torch.func is wrong for some functions.
    """
    args, kwargs = detached(use.note.args), {name: detached(value) for name, value in use.note.kwargs.items()}

    def of(values: dict[Key, Tensor]) -> list[Tensor]:
        results = results_of(called(use.function, *replaced(args, kwargs, values)))
        return [results[place] for place in use.layouts]

    with torch.enable_grad():
        leaves = {key: source.tensor.detach().requires_grad_() for key, source in use.sources.items()}
        x = torch.cat([output.reshape(-1) for output in of(leaves)])
    if not x.requires_grad:  # a derivative that does not depend on the parameter
        size = next(iter(use.gradients.values())).shape[:2]
        return {key: leaf.new_zeros(*size, *leaf.shape) for key, leaf in leaves.items()}
    passes = BackwardPasses(x, vectorized=True)
    found = _by_sample(use, of)
    if found is None or not _agrees(use, passes, leaves, found):
        found = _by_backward(use, passes, leaves)
        if passes.vectorized and not _agrees(use, passes, leaves, found):
            passes.vectorized = False
            found = _by_backward(use, passes, leaves)
    return found


def _by_sample(use: Use, of: Callable[[dict[Key, Tensor]], list[Tensor]]) -> dict[Key, Tensor] | None:
    """``vmap`` over samples; None if the function cannot be called for a single sample."""
    layouts = use.layouts.values()
    if any(layout.spread or layout.places is not None for layout in layouts):
        return None
    (n,) = {layout.samples for layout in layouts}
    rank = max(len(shape) for shape in use.shapes.values())
    dims: dict[Key, int] = {}
    samples: dict[Key, Tensor] = {}
    for key, operand in tensors_of(use.note.args, use.note.kwargs):
        dim = _sample_dim(operand, n, [layout.dim for layout in layouts], rank)
        if key not in use.sources and dim is not None:
            dims[key], samples[key] = dim, operand.detach().movedim(dim, 0)
    if not samples:
        return None

    def one(moving: dict[Key, Tensor], sample: dict[Key, Tensor]) -> tuple[Tensor, ...]:
        found = of({**moving, **{key: part.unsqueeze(dims[key]) for key, part in sample.items()}})
        return tuple(output.squeeze(layout.dim) for output, layout in zip(found, layouts, strict=True))

    def of_sample(gradients: tuple[Tensor, ...], sample: dict[Key, Tensor]) -> dict[Key, Tensor]:
        moving = {key: source.tensor.detach() for key, source in use.sources.items()}
        pulled = vjp(lambda moving: one(moving, sample), moving)
        values, back = pulled[0], pulled[1]
        (found,) = vmap(back)(tuple(g.to(v.dtype) for g, v in zip(gradients, values, strict=True)))
        return dict(found)

    try:
        return vmap(of_sample)(tuple(use.gradients.values()), samples)
    except (RuntimeError, ValueError, TypeError, IndexError):  # from torch.func, or from the function of one sample
        return None


def _agrees(use: Use, passes: BackwardPasses, leaves: dict[Key, Tensor], found: dict[Key, Tensor]) -> bool:
    """Whether Σ v_nq D_nq agrees, for random v, with a plain backward pass."""
    like = next(iter(use.gradients.values()))
    v = torch.randn(like.shape[:2], generator=torch.Generator("cpu").manual_seed(2), device="cpu").to(like)
    vector = _flat(use, [torch.einsum("nq,nq...->n...", v, b) for b in use.gradients.values()])
    for part, expected in zip(found.values(), passes.many(vector[None], list(leaves.values())), strict=True):
        total = torch.einsum("nq,nq...->...", v, part)
        close = (total - expected[0]).norm() <= 1e3 * torch.finfo(part.dtype).eps * part.norm()
        if not bool(close) and all_finite(expected):
            return False
    return True


def _by_backward(use: Use, passes: BackwardPasses, leaves: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """A backward pass for each sample and output, many at a time."""
    n, q = next(iter(use.gradients.values())).shape[:2]
    step = max(1, _BYTES // (8 * max(1, passes.x.numel() + sum(leaf.numel() for leaf in leaves.values()))))
    numbers = [(i, j) for i in range(n) for j in range(q)]
    blocks = []
    for start in range(0, len(numbers), step):
        vectors = torch.stack([_alone(use, i, j) for i, j in numbers[start : start + step]])
        blocks.append(passes.many(vectors, list(leaves.values())))
    return {key: torch.cat(part).unflatten(0, (n, q)) for key, part in zip(leaves, zip(*blocks, strict=True), strict=True)}


def _placed(use: Use, place: int, by_sample: Tensor) -> Tensor:
    """A gradient ``[N, ...]`` in the layout of the function's output."""
    layout = use.layouts[place]
    zero = by_sample.new_zeros(use.shapes[place])
    if layout.places is not None:
        flat = zero.flatten(0, layout.leading - 1)
        there = layout.places >= 0
        flat[layout.places[there]] = by_sample[there]
        return flat.view(use.shapes[place])
    layout.samples_first(zero).copy_(by_sample)  # a view
    return zero


def _flat(use: Use, by_sample: list[Tensor]) -> Tensor:
    """Gradients ``[N, ...]`` of all outputs in their layouts, as one vector."""
    return torch.cat([_placed(use, place, b).reshape(-1) for place, b in zip(use.layouts, by_sample, strict=True)])


def _alone(use: Use, sample: int, output: int) -> Tensor:
    """B of one sample and output, zero elsewhere, as one vector."""
    gradients = [torch.zeros_like(b[:, output]) for b in use.gradients.values()]
    for alone, b in zip(gradients, use.gradients.values(), strict=True):
        alone[sample] = b[sample, output]
    return _flat(use, gradients)


def _sample_dim(tensor: Tensor, n: int, likely: list[int], rank: int) -> int | None:
    """The dimension of an operand that holds the samples: that of the outputs if it has size N, else the first of size N.

    Dimensions are first aligned at the end, as those of operands that are broadcast.
    """
    aligned = [dim - (rank - tensor.ndim) for dim in likely]
    dims = [dim for dim in (*aligned, *likely, *range(tensor.ndim)) if 0 <= dim < tensor.ndim and tensor.shape[dim] == n]
    return dims[0] if dims else None
