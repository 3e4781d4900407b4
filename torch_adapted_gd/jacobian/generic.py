"""The rule for any function: its own vector-Jacobian products, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from ..tracking.arguments import called, detached, replaced, results_of, tensors_of

if TYPE_CHECKING:
    from .uses import Use

_BYTES = 2**27  # memory for vectors of one vectorized product


def any_function(use: Use) -> dict[Any, Tensor]:
    """Jacobians ``[N, Q, *operand.shape]`` by the operands that were computed from parameters.

    If the function can be called for single samples, ``vmap`` differentiates it for all of them at once. If not, there is a
    product for each sample and output, with a gradient that is zero for all other samples.
    """
    keys = list(use.sources)
    moving = tuple(use.sources[key].tensor.detach() for key in keys)
    of = _Function(use)
    for way in (_by_sample, _by_masks):
        found = way(use, of, keys, moving)
        if found is not None and _agrees(use, of, keys, moving, found):
            return dict(zip(keys, found, strict=True))
    return dict(zip(keys, _one_by_one(use, of, keys, moving), strict=True))


class _Function:
    """The function of some of its operands, with the others fixed."""

    def __init__(self, use: Use) -> None:
        self.use = use
        self.function = use.note.function
        self.args = [detached(a) for a in use.note.args]
        self.kwargs = {name: detached(a) for name, a in use.note.kwargs.items()}

    def __call__(self, keys: list[Any], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        args, kwargs = replaced(self.args, self.kwargs, dict(zip(keys, values, strict=True)))
        return tuple(results_of(called(self.function, args, kwargs)))

    def operands(self) -> dict[Any, Tensor]:
        """The operands that are tensors and were not computed from parameters."""
        given = dict(tensors_of(tuple(self.args), self.kwargs))
        return {key: tensor for key, tensor in given.items() if key not in self.use.sources}


def _pull(of: Callable[..., tuple[Tensor, ...]], moving: tuple[Tensor, ...], places: list[int]) -> Callable[..., Any]:
    """The vector-Jacobian product of some outputs."""
    pulled = vjp(lambda *values: tuple(of(*values)[place] for place in places), *moving)
    values, back = pulled[0], pulled[1]
    return lambda *gradients: back(tuple(g.to(v.dtype) for g, v in zip(gradients, values, strict=True)))


def _by_sample(use: Use, of: _Function, keys: list[Any], moving: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """``vmap`` over samples; None if the function of a single sample gives another result than that of the batch."""
    places = list(use.layouts)
    if any(layout.spread or layout.places is not None for layout in use.layouts.values()):
        return None
    (n,) = {layout.samples for layout in use.layouts.values()}
    operands = of.operands()
    likely = [layout.dim for layout in use.layouts.values()]
    rank = max(len(shape) for shape in use.shapes.values())
    dims = {key: _sample_dim(tensor, n, likely, rank) for key, tensor in operands.items()}
    having = [key for key, dim in dims.items() if dim is not None]
    if not having:
        return None
    samples = [operands[key].movedim(dims[key], 0) for key in having]  # type: ignore[arg-type]

    def one(moving: tuple[Tensor, ...], *sample: Tensor) -> tuple[Tensor, ...]:
        parts = tuple(part.unsqueeze(dims[key]) for key, part in zip(having, sample, strict=True))  # type: ignore[arg-type]
        found = of([*keys, *having], (*moving, *parts))
        return tuple(found[place].squeeze(layout.dim) for place, layout in use.layouts.items())

    def of_sample(gradients: tuple[Tensor, ...], *sample: Tensor) -> tuple[Tensor, ...]:
        pulled = vjp(lambda *moving: one(moving, *sample), *moving)
        values, back = pulled[0], pulled[1]
        return vmap(back)(tuple(g.to(v.dtype) for g, v in zip(gradients, values, strict=True)))  # type: ignore[no-any-return]

    try:
        values = vmap(lambda *sample: one(moving, *sample))(*samples)
    except (RuntimeError, ValueError, TypeError, IndexError):  # from torch.func, or from the function of one sample
        return None
    whole = of(keys, moving)
    for place, value in zip(places, values, strict=True):
        expected = use.layouts[place].samples_first(whole[place])
        eps = torch.finfo(expected.dtype).eps
        if value.shape != expected.shape or not torch.allclose(
            value, expected, rtol=0, atol=min(1e3 * eps, 0.05) * float(expected.abs().max() if expected.numel() else 0)
        ):
            return None
    gradients = tuple(use.gradients[place] for place in places)
    try:
        return vmap(of_sample)(gradients, *samples)
    except RuntimeError:  # an operation without a batching rule
        return None


def _agrees(use: Use, of: _Function, keys: list[Any], moving: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> bool:
    """Whether Σ v_nq D_nq agrees, for random v, with a plain backward pass: torch.func is wrong for some functions."""
    places = list(use.layouts)
    n, q = found[0].shape[:2]
    v = torch.randn(n, q, generator=torch.Generator("cpu").manual_seed(2), device="cpu").to(found[0])
    vectors = [_placed(use, place, torch.einsum("nq,nq...->n...", v, use.gradients[place])) for place in places]
    expected = _plain(of, keys, moving, places, vectors)
    for part, other in zip(found, expected, strict=True):
        total = torch.einsum("nq,nq...->...", v, part)
        size = part.norm()
        if not bool((total - other).norm() <= 1e3 * torch.finfo(part.dtype).eps * size):
            return not bool(torch.isfinite(size))
    return True


def _plain(
    of: _Function, keys: list[Any], moving: tuple[Tensor, ...], places: list[int], vectors: list[Tensor]
) -> tuple[Tensor, ...]:
    """A vector-Jacobian product by torch.autograd."""
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in moving]
        outputs = of(keys, tuple(leaves))
        pairs = [(outputs[place], v) for place, v in zip(places, vectors, strict=True) if outputs[place].requires_grad]
        if not pairs:  # a derivative that does not depend on the parameter
            return tuple(torch.zeros_like(part) for part in moving)
        some, cast = [x for x, _ in pairs], [v.to(x.dtype) for x, v in pairs]
        return torch.autograd.grad(some, leaves, cast, materialize_grads=True)


def _by_masks(use: Use, of: _Function, keys: list[Any], moving: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """A product for each sample and output, many at a time; None if vmap does not support the function."""
    places = list(use.layouts)
    n, q = next(iter(use.gradients.values())).shape[:2]
    pull = _pull(lambda *values: of(keys, values), moving, places)
    entries = sum(use.shapes[place].numel() for place in places) + sum(m.numel() for m in moving)
    step = max(1, _BYTES // (8 * max(1, entries)))
    rows: list[list[Tensor]] = [[] for _ in keys]
    numbers = [(i, j) for i in range(n) for j in range(q)]
    for start in range(0, len(numbers), step):
        some = numbers[start : start + step]
        vectors = tuple(torch.stack([_alone(use, place, i, j) for i, j in some]) for place in places)
        try:
            parts = vmap(pull)(*vectors)
        except RuntimeError as error:  # an operation without a batching rule
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return None
        for row, part in zip(rows, parts, strict=True):
            row.append(part)
    return tuple(torch.cat(row).unflatten(0, (n, q)) for row in rows)


def _one_by_one(use: Use, of: _Function, keys: list[Any], moving: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same, one at a time."""
    places = list(use.layouts)
    n, q = next(iter(use.gradients.values())).shape[:2]
    rows = [
        _plain(of, keys, moving, places, [_alone(use, place, i, j) for place in places]) for i in range(n) for j in range(q)
    ]
    return tuple(torch.stack(part).unflatten(0, (n, q)) for part in zip(*rows, strict=True))


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


def _alone(use: Use, place: int, sample: int, output: int) -> Tensor:
    """B of one sample and output in the layout of the function's output, zero elsewhere."""
    b = use.gradients[place]
    by_sample = torch.zeros_like(b[:, output])
    by_sample[sample] = b[sample, output]
    return _placed(use, place, by_sample)


def _sample_dim(tensor: Tensor, n: int, likely: list[int], rank: int) -> int | None:
    """The dimension of an operand that holds the samples: that of the outputs if it has size N, else the first of size N.

    Dimensions are first aligned at the end, as those of operands that are broadcast.
    """
    aligned = [dim - (rank - tensor.ndim) for dim in likely]
    dims = [dim for dim in (*aligned, *likely, *range(tensor.ndim)) if 0 <= dim < tensor.ndim and tensor.shape[dim] == n]
    return dims[0] if dims else None
