"""The rules of torch's functions, one for each kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .products import OneHot, OuterProducts
from .rules import Term, UnsupportedError, register_rule
from .uses import Use

_BAG_ENTRIES = 2**23  # of how often each row is in each sample, up to which that is written out


def _methods(*names: str) -> tuple[Callable[..., Any], ...]:
    """A function's variants in `torch` and as methods of tensors."""
    found = [getattr(owner, name) for owner in (torch, Tensor) for name in names if hasattr(owner, name)]
    return tuple(dict.fromkeys(found))


def _places_last(b: Tensor, lead: int) -> Tensor:
    """``[*lead, ..., O]`` → ``[*lead, 1, O, T]``."""
    return b.reshape(*b.shape[:lead], -1, b.shape[-1]).transpose(-1, -2).unsqueeze(lead)


@register_rule(F.linear, names=("input", "weight", "bias"), sample_dims=1)
def linear(use: Use) -> dict[str, Term]:
    """W: Σ_t B_t ⊗ A_t over all positions t of a sample; bias: the same with A = 1."""
    left = _places_last(use.gradient, 2)  # [N, Q, 1, O, T]
    terms: dict[str, Term] = {}
    if use.wants("input"):
        raise UnsupportedError("its input was computed from parameters alone")
    if use.wants("weight"):
        terms["weight"] = OuterProducts(left, _places_last(use.samples_first(use.argument("input")), 1))
    if use.wants("bias"):
        terms["bias"] = _constant(left)
    return terms


def _constant(left: Tensor) -> OuterProducts:
    """What a constant input of 1 gives."""
    return OuterProducts(left, left.new_ones(()).expand(left.shape[0], left.shape[2], 1, left.shape[4]))


@register_rule(*_methods("matmul", "mm", "__matmul__"), names=("input", "other"), sample_dims="any")
def matmul(use: Use) -> dict[str, Term]:
    """X W as a linear layer, everything else as the sum over indices that it is."""
    x, weight = use.argument("input"), use.argument("other")
    if x.ndim > 1 and weight.ndim == 2 and use.wants("other") and not use.wants("input"):
        return {"other": _weight(use, x)}
    batch = "abcdefgh"[: max(x.ndim, weight.ndim) - 2]
    first = ("ij" if x.ndim > 1 else "j") if x.ndim < 3 else batch[len(batch) - x.ndim + 2 :] + "ij"
    second = ("jk" if weight.ndim > 1 else "j") if weight.ndim < 3 else batch[len(batch) - weight.ndim + 2 :] + "jk"
    out = batch + ("i" if x.ndim > 1 else "") + ("k" if weight.ndim > 1 else "")
    return _sums(use, {"input": first, "other": second}, out)


def _weight(use: Use, x: Tensor) -> OuterProducts:
    """W in X W, as in a linear layer."""
    if use.layout.places is None and use.layout.dim == x.ndim - 1:
        raise UnsupportedError("the samples are where a matrix has its columns")
    return OuterProducts(_places_last(use.gradient, 2), _places_last(use.samples_first(x), 1), flipped=True)


@register_rule(*_methods("mv", "bmm"), names=("input", "other"), sample_dims="any")
def matrix_products(use: Use) -> dict[str, Term]:
    """The same for products of fixed dimensions."""
    if use.argument("other").ndim == 1:
        return _sums(use, {"input": "ij", "other": "j"}, "i")
    return _sums(use, {"input": "bij", "other": "bjk"}, "bik")


@register_rule(*_methods("addmm", "baddbmm"), names=("input", "mat1", "mat2", "beta", "alpha"), sample_dims="any")
def added_product(use: Use) -> dict[str, Term]:
    """A product and a sum."""
    if use.argument("beta", 1) != 1 or use.argument("alpha", 1) != 1:
        raise UnsupportedError("it has factors")
    terms: dict[str, Term] = {}
    if use.argument("mat1").ndim == 2 and use.wants("mat2") and not use.wants("mat1"):
        terms["mat2"] = _weight(use, use.argument("mat1"))
    elif use.wants("mat1") or use.wants("mat2"):
        batch = "b" if use.argument("mat1").ndim == 3 else ""
        terms = _sums(use, {"mat1": batch + "ij", "mat2": batch + "jk"}, batch + "ik")
    if use.wants("input"):
        terms["input"] = _summed(use, None, use.argument("input").shape)
    return terms


@register_rule(torch.einsum, names=("equation",), sample_dims="any")
def einsum(use: Use) -> dict[str, Term]:
    """A sum over indices."""
    equation, *operands = use.note.args
    if not isinstance(equation, str) or "." in equation:
        raise UnsupportedError("its equation has an ellipsis")
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        raise UnsupportedError("its operands are a list")
    left, arrow, out = equation.replace(" ", "").partition("->")
    if not arrow:
        letters = sorted(set(left) - {","})
        out = "".join(letter for letter in letters if left.count(letter) == 1)
    labels = dict(zip(range(1, len(operands) + 1), left.split(","), strict=True))
    return _sums(use, labels, out)  # type: ignore[arg-type]


def _sums(use: Use, labels: Mapping[str | int, str], out: str) -> dict[str, Term]:
    """The rule for out = Σ Π operands, each with its indices as letters.

    For an operand P and all others multiplied to A: the indices in P and out alone are O, in P and A alone I, in all three G,
    in A and out alone the positions T, one of which has the samples; D = Σ_t B ⊗ A.
    """
    keys = {name: use.key(name) if isinstance(name, str) else name for name in labels}
    moving = [name for name in labels if keys[name] in use.sources]
    if use.layout.places is not None or len(moving) != 1:
        raise UnsupportedError("its samples are in no order, or parameters are multiplied with each other")
    (name,) = moving
    values = {other: _at(use, keys[other]) for other in labels}
    mine, others = labels[name], [other for other in labels if other != name]
    if any(len(set(indices)) < len(indices) for indices in (*labels.values(), out)):
        raise UnsupportedError("it takes diagonals")
    used = set().union(*(set(labels[other]) for other in others))
    sample = out[use.layout.dim]
    if sample in mine or not set(mine) <= used | set(out) or (use.layout.spread and not others):
        raise UnsupportedError("a parameter has an index of its own, or the samples'")
    sizes = {letter: size for other in labels for letter, size in zip(labels[other], values[other].shape, strict=True)}
    if any(size != sizes[letter] for other in labels for letter, size in zip(labels[other], values[other].shape, strict=True)):
        raise UnsupportedError("it is broadcast")
    sizes["Z"] = 1
    if use.layout.spread:
        sizes["Z"], sizes[sample] = sizes[sample] // use.layout.samples, use.layout.samples
    groups = [letter for letter in mine if letter in used and letter in out]
    left_only = [letter for letter in mine if letter not in used]
    right_only = [letter for letter in mine if letter not in out]
    positions = [letter for letter in out if letter not in mine and letter != sample]
    if sample not in used:
        raise UnsupportedError("nothing of the samples is in it")
    lead = sample + ("Z" if use.layout.spread else "")
    rest = [letter for letter in out if letter != sample]
    b_labels = [sample, "Q", *lead[1:], *rest]
    b = use.gradient
    moved = "".join([sample, "Q", *groups, *left_only, *positions, *lead[1:]])
    left = torch.einsum(f"{''.join(b_labels)}->{moved}", b)
    prepared = []
    for other in others:
        value = values[other].detach().to(b.dtype)
        indices = labels[other]
        if sample in indices:
            dim = indices.index(sample)
            value = replace(use.layout, dim=dim).samples_first(value)
            indices = lead + indices[:dim] + indices[dim + 1 :]
        prepared.append((indices, value))
    target = "".join([sample, *groups, *right_only, *(p for p in positions if p in used), *lead[1:]])
    right = torch.einsum(",".join(i for i, _ in prepared) + "->" + target, *(v for _, v in prepared))
    apart = [p for p in positions if p not in used]
    if apart:  # a position that the input does not have: it is the same at each
        raise UnsupportedError("its input is repeated")
    g, o, i = (math.prod(sizes[letter] for letter in letters) for letters in (groups, left_only, right_only))
    n, q = b.shape[:2]
    left = left.reshape(n, q, g, o, -1)
    right = right.reshape(n, g, i, -1)
    if mine in ("".join([*groups, *left_only, *right_only]), "".join([*groups, *right_only, *left_only])):
        flipped = mine != "".join([*groups, *left_only, *right_only])
        return {name: OuterProducts(left, right, flipped=flipped)}  # type: ignore[dict-item]
    written = OuterProducts(left, right).explicit()
    ordered = [*groups, *left_only, *right_only]
    written = written.view(n, q, *(sizes[letter] for letter in ordered))
    return {name: written.permute(0, 1, *(2 + ordered.index(letter) for letter in mine))}  # type: ignore[dict-item]


def _at(use: Use, key: int | str) -> Tensor:
    value: Tensor = use.note.kwargs[key] if isinstance(key, str) else use.note.args[key]
    return value


def _summed(use: Use, factor: Tensor | None, shape: torch.Size) -> Term:
    """B, times a factor of the output's shape, summed over all that a broadcast operand of a shape does not have."""
    whole = use.shape
    b = use.gradient
    if factor is None and len(shape) == 1 and len(whole) > 1 and shape[0] == whole[-1] and b.ndim > 2:
        return _constant(_places_last(b, 2))
    if factor is not None:
        b = b * use.samples_first(factor.expand(whole)).unsqueeze(1)
    lead = use.leading
    layout = use.layout
    gone = range(layout.leading) if layout.places is not None else range(layout.dim, layout.dim + 1)
    kept = [dim for dim in range(len(whole)) if dim not in gone]
    padded = (1,) * (len(whole) - len(shape)) + tuple(shape)
    if any(padded[dim] != 1 for dim in gone):
        raise UnsupportedError("it has the samples' dimension itself")
    if lead == 2:
        b = b.sum(2)
    summed = [2 + place for place, dim in enumerate(kept) if padded[dim] == 1]
    if summed:
        b = b.sum(summed, keepdim=True)
    return b.reshape(*b.shape[:2], *shape)


@register_rule(
    *_methods("add", "sub", "subtract", "add_", "sub_", "__iadd__", "__radd__", "__add__", "rsub", "__rsub__"),
    names=("input", "other"),
    sample_dims="any",
)
def addition(use: Use) -> dict[str, Term]:
    """B, summed over all that the operand does not have."""
    if use.note.kwargs.get("alpha", 1) != 1 or len(use.note.args) > 2:
        raise UnsupportedError("it has a factor")
    terms = {}
    name_of = getattr(use.function, "__name__", "")
    for number, name in enumerate(("input", "other")):
        if use.wants(name):
            negative = ("sub" in name_of) and (number == 1) != name_of.strip("_").startswith("rsub")
            term = _summed(use, None, use.argument(name).shape)
            terms[name] = _negated(term) if negative else term
    return terms


def _negated(term: Term) -> Term:
    return OuterProducts(-term.left, term.right, term.flipped) if isinstance(term, OuterProducts) else -term


@register_rule(
    *_methods("mul", "multiply", "mul_", "__mul__", "__rmul__", "__imul__"), names=("input", "other"), sample_dims="any"
)
def multiplication(use: Use) -> dict[str, Term]:
    """B times the other operand, summed likewise."""
    return {
        name: _summed(use, use.argument(other), use.argument(name).shape)
        for name, other in (("input", "other"), ("other", "input"))
        if use.wants(name)
    }


@register_rule(*_methods("div", "true_divide", "__truediv__"), names=("input", "other"), sample_dims="any")
def division(use: Use) -> dict[str, Term]:
    """x/p: B times −x/p²."""
    if use.wants("input") or use.note.kwargs:
        raise UnsupportedError("it divides parameters")
    x, p = use.argument("input"), use.argument("other")
    return {"other": _summed(use, -x / p**2, p.shape)}


def _patches(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """All that a kernel sees at each place: ``[M, C, *spatial]`` → ``[M, C·kernel, T]``."""
    k = len(kernel)
    for d in range(k):  # each adds a dimension at the end
        x = x.unfold(2 + d, (kernel[d] - 1) * dilation[d] + 1, stride[d])[..., :: dilation[d]]
    x = x.permute(0, 1, *range(2 + k, 2 + 2 * k), *range(2, 2 + k))  # [M, C, *kernel, *places]
    return x.reshape(x.shape[0], x.shape[1] * math.prod(kernel), -1)


def _grouped(x: Tensor, lead: int, spread: bool, groups: int) -> Tensor:
    """``[*lead, (S,) C, T]`` → ``[*lead, G, C/G, (S·)T]``."""
    if spread:
        x = x.movedim(lead, -2).flatten(-2)
    return x.reshape(*x.shape[:lead], groups, -1, x.shape[-1])


def _tuple(value: Any, k: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * k
    return tuple(value) * k if len(value) == 1 else tuple(value)


def _padding(value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[tuple[int, int]]:
    if value == "valid":
        return [(0, 0)] * len(kernel)
    if value == "same":
        totals = [d * (size - 1) for size, d in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in _tuple(value, len(kernel))]


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def _settings(use: Use) -> tuple[Tensor, Tensor, bool, tuple[int, ...], tuple[int, ...], int]:
    """Of a convolution: input with the samples first, weight, whether there are S entries of each, stride, dilation, groups."""
    x, weight = use.argument("input"), use.argument("weight")
    if x.ndim != weight.ndim or use.wants("input"):
        raise UnsupportedError("it was called without a batch")
    k = weight.ndim - 2
    stride, dilation = (_tuple(use.argument(name, 1), k) for name in ("stride", "dilation"))
    return use.samples_first(x), weight, use.leading == 2, stride, dilation, use.argument("groups", 1)


@register_rule(F.conv1d, F.conv2d, F.conv3d, names=_CONVOLUTION)
def convolution(use: Use) -> dict[str, Term]:
    """A linear layer on the patches of the padded input, for each group of channels."""
    x, weight, spread, stride, dilation, groups = _settings(use)
    k = weight.ndim - 2
    left = _grouped(use.gradient.flatten(-k), 2, spread, groups)
    terms: dict[str, Term] = {}
    if use.wants("weight"):
        pads = _padding(use.argument("padding", 0), tuple(weight.shape[2:]), dilation)
        flat = x.flatten(0, use.leading - 1)
        if any(a or b for a, b in pads):
            flat = F.pad(flat, [p for pair in reversed(pads) for p in pair])
        patches = _patches(flat, tuple(weight.shape[2:]), stride, dilation)
        right = _grouped(patches.unflatten(0, (x.shape[0], -1)) if spread else patches, 1, spread, groups)
        terms["weight"] = OuterProducts(left, right)
    if use.wants("bias"):
        terms["bias"] = _constant(left)
    return terms


@register_rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, names=_TRANSPOSED)
def transposed_convolution(use: Use) -> dict[str, Term]:
    """The roles of a convolution's input and output changed: the patches are those of the gradient."""
    x, weight, spread, stride, dilation, groups = _settings(use)
    k = weight.ndim - 2
    padding = _tuple(use.argument("padding", 0), k)
    terms: dict[str, Term] = {}
    if use.wants("weight"):
        b = use.gradient.flatten(0, use.leading)  # [N·Q(·S), C, *spatial]
        pad: list[int] = []
        for d in reversed(range(k)):
            extent = (x.shape[d - k] - 1) * stride[d] + (weight.shape[2 + d] - 1) * dilation[d] + 1
            pad += [padding[d], extent - b.shape[d - k] - padding[d]]
        patches = _patches(F.pad(b, pad), tuple(weight.shape[2:]), stride, dilation)
        patches = patches.unflatten(0, use.gradient.shape[: use.leading + 1])
        right = _grouped(x.flatten(-k), 1, spread, groups)
        terms["weight"] = OuterProducts(_grouped(patches, 2, spread, groups), right, flipped=True)
    if use.wants("bias"):
        terms["bias"] = _constant(_grouped(use.gradient.flatten(-k), 2, spread, 1))
    return terms


@register_rule(
    F.embedding,
    names=("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    sample_dims=1,
)
def embedding(use: Use) -> dict[str, Term]:
    """A linear layer on unit vectors; the row of ``padding_idx`` has no gradient."""
    if use.argument("scale_grad_by_freq", False):
        raise UnsupportedError("`scale_grad_by_freq` makes its gradient no derivative")
    padding = use.argument("padding_idx")
    size = use.argument("weight").shape[0]
    left = _places_last(use.gradient, 2)
    index = use.samples_first(use.argument("input")).reshape(left.shape[0], -1).long()  # [N, T]
    there = torch.ones_like(index, dtype=torch.bool) if padding is None else index != padding % size
    if left.shape[4] > 1 and torch.equal(left[..., :1].expand_as(left), left):  # all that follows is a mean over places
        return {"weight": _of_bags(left[..., 0], index, there.to(left.dtype), size)}
    if padding is not None:
        left = left * there[:, None, None, None]
    return {"weight": OuterProducts(left, OneHot(index, size), flipped=True)}


def _of_bags(left: Tensor, index: Tensor, share: Tensor, size: int) -> OuterProducts:
    """B ``[N, Q, 1, O]`` times the sum of rows with these numbers, each with its share, ``[N, T]``."""
    if len(index) * size > _BAG_ENTRIES:
        return OuterProducts(left.unsqueeze(4) * share[:, None, None, None], OneHot(index, size), flipped=True)
    counts = share.new_zeros(len(index), size).scatter_add_(1, index, share)
    return OuterProducts(left.unsqueeze(4), counts[:, None, :, None], flipped=True)


_BAG = ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights")


@register_rule(F.embedding_bag, names=(*_BAG, "include_last_offset", "padding_idx"))
def embedding_bag(use: Use) -> dict[str, Term]:
    """Weighted sums of rows: B, times a weight, at each of a bag's tokens."""
    mode = use.argument("mode", "mean")
    if mode == "max" or use.argument("scale_grad_by_freq", False) or use.wants("per_sample_weights"):
        raise UnsupportedError("its gradient is no weighted sum of rows")
    if use.leading == 2:
        raise UnsupportedError("a sample has several bags")
    index, offsets, weights = (use.argument(name) for name in ("input", "offsets", "per_sample_weights"))
    size, n = use.argument("weight").shape[0], use.gradient.shape[0]
    if index.ndim == 1:
        ends = (
            offsets[1:]
            if use.argument("include_last_offset", False)
            else torch.cat([offsets[1:], offsets.new_tensor([len(index)])])
        )
        lengths = ends - offsets[:n]
        places = torch.arange(max(1, int(lengths.max())), device=index.device)
        there = places < lengths[:, None]
        flat = (offsets[:n, None] + places).clamp(max=max(0, len(index) - 1))
        index = index[flat]
        weights = None if weights is None else weights[flat]
    else:
        there = torch.ones_like(index, dtype=torch.bool)
    padding = use.argument("padding_idx")
    if padding is not None:
        there = there & (index != padding % size)
    share = there.to(use.gradient.dtype)
    if mode == "mean":
        share = share / share.sum(1, keepdim=True).clamp(min=1)
    if weights is not None:
        share = share * weights.to(share.dtype)
    return {"weight": _of_bags(use.gradient.unsqueeze(2), index.long(), share, size)}


def _normalization(use: Use, channels_first: bool) -> dict[str, Term]:
    """weight: B times the normalized input, bias: B; summed over all but what the parameters have."""
    x = use.argument("input")
    if use.wants("input"):
        raise UnsupportedError("its input was computed from parameters alone")
    args, kwargs = list(use.note.args), dict(use.note.kwargs)
    shapes = {}
    for name in ("weight", "bias"):
        value = use.argument(name)
        key = use.key(name)
        if isinstance(key, int):
            args[key] = None
        else:
            kwargs.pop(key, None)
        if value is not None:
            shapes[name] = torch.Size((len(value), *[1] * (x.ndim - 2))) if channels_first else value.shape
    first = next(name for name in ("weight", "bias") if name in shapes)
    args = [a.detach() if isinstance(a, Tensor) else a for a in args]
    running = {number for number in (1, 2) if channels_first and number < len(args) and isinstance(args[number], Tensor)}
    for number in running:  # which training mode updates
        args[number] = args[number].clone()
    with torch.no_grad():
        args[0] = x.to(use.argument(first).dtype)
        normalized = use.function(*args, **kwargs)
    terms = {}
    for name, shape in shapes.items():
        if use.wants(name):
            term = _summed(use, normalized if name == "weight" else None, shape)
            terms[name] = term.reshape(*term.shape[:2], *use.argument(name).shape) if isinstance(term, Tensor) else term
    return terms


@register_rule(
    F.layer_norm, names=("input", "normalized_shape", "weight", "bias", "eps"), sample_dims=lambda note: len(_shape(note))
)
def layer_normalization(use: Use) -> dict[str, Term]:
    """See `_normalization`."""
    return _normalization(use, False)


@register_rule(F.rms_norm, names=("input", "normalized_shape", "weight", "eps"), sample_dims=lambda note: len(_shape(note)))
def root_mean_square_normalization(use: Use) -> dict[str, Term]:
    """The same without a bias."""
    x = use.argument("input")
    normalized = F.rms_norm(x, use.argument("normalized_shape"), None, use.argument("eps"))
    return {"weight": _summed(use, normalized, use.argument("weight").shape)}


def _shape(note: Any) -> Any:
    return note.args[1] if len(note.args) > 1 else note.kwargs["normalized_shape"]


@register_rule(F.group_norm, names=("input", "num_groups", "weight", "bias", "eps"))
@register_rule(F.batch_norm, names=("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"))
@register_rule(
    F.instance_norm, names=("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
)
def channel_normalization(use: Use) -> dict[str, Term]:
    """See `_normalization`."""
    return _normalization(use, True)


@register_rule(F.prelu, torch.prelu, Tensor.prelu, names=("input", "weight"))
def prelu(use: Use) -> dict[str, Term]:
    """weight: B times the negative part of the input, summed over all but its channel."""
    x, weight = use.argument("input"), use.argument("weight")
    shape = torch.Size((len(weight), *[1] * (x.ndim - 2))) if len(weight) > 1 else weight.shape
    term = _summed(use, x.clamp(max=0), shape)
    assert isinstance(term, Tensor)
    return {"weight": term.reshape(*term.shape[:2], *weight.shape)}
