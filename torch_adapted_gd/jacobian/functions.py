"""Rules for torch's functions: the Jacobian by their parameters, from their inputs and the gradients B at their outputs."""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .products import OneHot, OuterProducts
from .rules import Term, UnsupportedError, register_rule
from .uses import Use

_COUNT_ENTRIES = 2**23  # up to this many entries, how often each sample uses each row of a table is written out

Terms = dict[int | str, Term]


def _methods(*names: str) -> tuple[Callable[..., Any], ...]:
    """The functions of these names in `torch`, and the methods of `Tensor`."""
    found = [getattr(owner, name) for owner in (torch, Tensor) for name in names if hasattr(owner, name)]
    return tuple(dict.fromkeys(found))


def _places_last(b: Tensor, lead: int) -> Tensor:
    """``[*lead, ..., O]`` → ``[*lead, 1, O, T]``."""
    return b.reshape(*b.shape[:lead], -1, b.shape[-1]).transpose(-1, -2).unsqueeze(lead)


def _ones(left: Tensor) -> OuterProducts:
    """The Jacobian by a bias: a weight whose input is 1."""
    return OuterProducts(left, left.new_ones(()).expand(left.shape[0], left.shape[2], 1, left.shape[4]))


@register_rule(F.linear, names=("input", "weight", "bias"), sample_dims=1)
def linear(use: Use) -> Terms:
    """Weight: Σ_t B_t ⊗ A_t over the positions t of a sample. Bias: the same with A = 1."""
    if use.wants("input"):
        raise UnsupportedError("its input was computed from parameters alone")
    left = _places_last(use.gradient, 2)  # [N, Q, 1, O, T]
    terms: Terms = {}
    if use.wants("weight"):
        terms["weight"] = OuterProducts(left, _places_last(use.samples_first(use.argument("input")), 1))
    if use.wants("bias"):
        terms["bias"] = _ones(left)
    return terms


@register_rule(*_methods("matmul", "__matmul__"), names=("input", "other"), sample_dims="any")
@register_rule(*_methods("mm", "bmm"), names=("input", "mat2"), sample_dims="any")
@register_rule(*_methods("mv"), names=("input", "vec"), sample_dims="any")
def matmul(use: Use) -> Terms:
    """A product of two tensors."""
    return _product(use, *use.rule.names)


@register_rule(*_methods("addmm"), names=("input", "mat1", "mat2", "beta", "alpha"), sample_dims="any")
@register_rule(*_methods("baddbmm"), names=("input", "batch1", "batch2", "beta", "alpha"), sample_dims="any")
def added_product(use: Use) -> Terms:
    """A product of two tensors, plus a third."""
    if use.argument("beta", 1) != 1 or use.argument("alpha", 1) != 1:
        raise UnsupportedError("it has factors")
    _, first, second, *_ = use.rule.names
    terms = _product(use, first, second) if use.wants(first) or use.wants(second) else {}
    if use.wants("input"):
        terms["input"] = _summed(use, None, use.argument("input"))
    return terms


def _product(use: Use, first: str, second: str) -> Terms:
    """X W as in a linear layer; products of other shapes as sums over indices."""
    x, weight = use.argument(first), use.argument(second)
    if x.ndim > 1 and weight.ndim == 2 and use.wants(second) and not use.wants(first):
        if use.layout.places is None and use.layout.dim == x.ndim - 1:
            raise UnsupportedError("the samples are the columns of a matrix")
        right = _places_last(use.samples_first(x), 1)
        return {second: OuterProducts(_places_last(use.gradient, 2), right, flipped=True)}

    def batch(ndim: int) -> str:  # the indices before the last two; aligned at the end, as they are broadcast
        return "hgfedcba"[8 - max(0, ndim - 2) :]

    rows, columns = "i" if x.ndim > 1 else "", "k" if weight.ndim > 1 else ""
    labels = {use.key(first): batch(x.ndim) + rows + "j", use.key(second): batch(weight.ndim) + "j" + columns}
    return _sums(use, labels, batch(max(x.ndim, weight.ndim)) + rows + columns)


@register_rule(torch.einsum, names=("equation",), sample_dims="any")
def einsum(use: Use) -> Terms:
    """A sum over indices."""
    equation, *operands = use.note.args
    if not isinstance(equation, str) or "." in equation:
        raise UnsupportedError("its equation has an ellipsis")
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        raise UnsupportedError("its operands are a list")
    left, arrow, out = equation.replace(" ", "").partition("->")
    if not arrow:
        out = "".join(letter for letter in sorted(set(left) - {","}) if left.count(letter) == 1)
    return _sums(use, dict(enumerate(left.split(","), 1)), out)


def _sums(use: Use, labels: dict[int | str, str], out: str) -> Terms:
    """The rule for out = Σ Π operands, with a letter for each index.

    P is the operand that was computed from parameters, A the product of the others. Indices in P and out alone are O, in P and
    A alone I, in all three G. Those in A and out alone are the samples and the positions T. So D = Σ_t B ⊗ A.
    """
    moving = [key for key in labels if key in use.sources]
    if use.layout.places is not None or len(moving) != 1:
        raise UnsupportedError("its samples are in no order, or parameters are multiplied with each other")
    (key,) = moving
    if any(len(set(indices)) < len(indices) for indices in (*labels.values(), out)):
        raise UnsupportedError("it takes diagonals")
    sizes: dict[str, int] = {}
    for operand, indices in labels.items():
        for letter, size in zip(indices, use.operand(operand).shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise UnsupportedError("it is broadcast")
    mine, others = labels[key], {operand: indices for operand, indices in labels.items() if operand != key}
    used = set().union(*others.values())
    sample = out[use.layout.dim]
    if sample in mine or not set(mine) <= used | set(out) or not set(out) <= used | set(mine):
        raise UnsupportedError("a parameter has the samples' index or one of its own, or its input is repeated")
    groups = "".join(letter for letter in mine if letter in used and letter in out)
    left_only = "".join(letter for letter in mine if letter not in used)
    right_only = "".join(letter for letter in mine if letter not in out)
    rest = out.replace(sample, "")
    free = (letter for letter in string.ascii_letters if letter not in sizes)
    output, entry = next(free), next(free) if use.layout.spread else ""
    places = "".join(letter for letter in rest if letter not in mine) + entry
    b = use.gradient
    left = torch.einsum(f"{sample}{output}{entry}{rest}->{sample}{output}{groups}{left_only}{places}", b)
    values = []
    for operand, indices in others.items():
        value = use.operand(operand).to(b.dtype)
        if sample in indices:
            value = replace(use.layout, dim=indices.index(sample)).samples_first(value)
            others[operand] = sample + entry + indices.replace(sample, "")
        values.append(value)
    right = torch.einsum(f"{','.join(others.values())}->{sample}{groups}{right_only}{places}", *values)
    g, o, i = (math.prod(sizes[letter] for letter in letters) for letters in (groups, left_only, right_only))
    left, right = left.reshape(*b.shape[:2], g, o, -1), right.reshape(b.shape[0], g, i, -1)
    order = groups + left_only + right_only
    if mine in (order, groups + right_only + left_only):
        return {key: OuterProducts(left, right, flipped=mine != order)}
    written = OuterProducts(left, right).explicit().unflatten(2, [sizes[letter] for letter in order])
    return {key: written.permute(0, 1, *(2 + order.index(letter) for letter in mine))}


def _summed(use: Use, factor: Tensor | None, operand: Tensor, shape: torch.Size | None = None) -> Term:
    """B, times a factor of the output's shape, summed over the dimensions along which an operand of ``shape`` is broadcast."""
    shape = operand.shape if shape is None else shape
    whole, b, layout = use.shape, use.gradient, use.layout
    if factor is None and len(shape) == 1 and len(whole) > 1 and shape[0] == whole[-1] and b.ndim > 2:
        return _ones(_places_last(b, 2))
    if factor is not None:
        b = b * use.samples_first(factor.expand(whole)).unsqueeze(1)
    of_samples = range(layout.leading) if layout.places is not None else [layout.dim]
    padded = (1,) * (len(whole) - len(shape)) + tuple(shape)
    if any(padded[dim] != 1 for dim in of_samples):
        raise UnsupportedError("it has the samples' dimension itself")
    if use.leading == 2:
        b = b.sum(2)
    kept = [size for dim, size in enumerate(padded) if dim not in of_samples]
    if 1 in kept:
        b = b.sum([2 + dim for dim, size in enumerate(kept) if size == 1], keepdim=True)
    return b.reshape(*b.shape[:2], *operand.shape)


@register_rule(
    *_methods("add", "sub", "subtract", "add_", "sub_", "__iadd__", "__radd__", "__add__", "rsub", "__rsub__"),
    names=("input", "other"),
    sample_dims="any",
)
def addition(use: Use) -> Terms:
    """±B, summed over the dimensions that the operand does not have."""
    if use.note.kwargs.get("alpha", 1) != 1 or len(use.note.args) > 2:
        raise UnsupportedError("it has a factor")
    function = getattr(use.function, "__name__", "")
    subtracted = "" if "sub" not in function else "input" if "rsub" in function else "other"
    terms: Terms = {name: _summed(use, None, use.argument(name)) for name in ("input", "other") if use.wants(name)}
    if subtracted in terms:
        term = terms[subtracted]
        terms[subtracted] = replace(term, left=-term.left) if isinstance(term, OuterProducts) else -term
    return terms


@register_rule(
    *_methods("mul", "multiply", "mul_", "__mul__", "__rmul__", "__imul__"), names=("input", "other"), sample_dims="any"
)
def multiplication(use: Use) -> Terms:
    """B times the other operand, summed over the dimensions that the operand does not have."""
    return {
        name: _summed(use, use.argument(other), use.argument(name))
        for name, other in (("input", "other"), ("other", "input"))
        if use.wants(name)
    }


@register_rule(*_methods("div", "true_divide", "__truediv__"), names=("input", "other"), sample_dims="any")
def division(use: Use) -> Terms:
    """x/p: B times −x/p²."""
    if use.wants("input") or use.note.kwargs:
        raise UnsupportedError("it divides parameters")
    x, p = use.argument("input"), use.argument("other")
    return {"other": _summed(use, -x / p**2, p)}


def _patches(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """What a kernel sees at each place: ``[M, C, *spatial]`` → ``[M, C·kernel, T]``."""
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
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * k if len(values) == 1 else values


def _padding(value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[tuple[int, int]]:
    """The padding before and after each spatial dimension."""
    if value == "same":
        totals = [d * (size - 1) for size, d in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in _tuple(0 if value == "valid" else value, len(kernel))]


def _settings(use: Use) -> tuple[Tensor, Tensor, bool, tuple[int, ...], tuple[int, ...], int]:
    """Of a convolution: input with the samples first, weight, whether a sample has S images, stride, dilation, groups."""
    x, weight = use.argument("input"), use.argument("weight")
    if x.ndim != weight.ndim or use.wants("input"):
        raise UnsupportedError("it was called without a batch")
    stride, dilation = (_tuple(use.argument(name, 1), weight.ndim - 2) for name in ("stride", "dilation"))
    return use.samples_first(x), weight, use.leading == 2, stride, dilation, use.argument("groups", 1)


@register_rule(F.conv1d, F.conv2d, F.conv3d, names=("input", "weight", "bias", "stride", "padding", "dilation", "groups"))
def convolution(use: Use) -> Terms:
    """A linear layer on the patches of the padded input, for each group of channels."""
    x, weight, spread, stride, dilation, groups = _settings(use)
    kernel = tuple(weight.shape[2:])
    left = _grouped(use.gradient.flatten(-len(kernel)), 2, spread, groups)
    terms: Terms = {}
    if use.wants("weight"):
        pads = _padding(use.argument("padding", 0), kernel, dilation)
        flat = x.flatten(0, use.leading - 1)
        if any(a or b for a, b in pads):
            flat = F.pad(flat, [p for pair in reversed(pads) for p in pair])
        patches = _patches(flat, kernel, stride, dilation)
        right = _grouped(patches.unflatten(0, (x.shape[0], -1)) if spread else patches, 1, spread, groups)
        terms["weight"] = OuterProducts(left, right)
    if use.wants("bias"):
        terms["bias"] = _ones(left)
    return terms


@register_rule(
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    names=("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
)
def transposed_convolution(use: Use) -> Terms:
    """A convolution with input and output exchanged: the patches are those of the gradient."""
    x, weight, spread, stride, dilation, groups = _settings(use)
    kernel, k = tuple(weight.shape[2:]), weight.ndim - 2
    padding = _tuple(use.argument("padding", 0), k)
    terms: Terms = {}
    if use.wants("weight"):
        b = use.gradient.flatten(0, use.leading)  # [N·Q(·S), C, *spatial]
        pad: list[int] = []
        for d in reversed(range(k)):
            extent = (x.shape[d - k] - 1) * stride[d] + (kernel[d] - 1) * dilation[d] + 1
            pad += [padding[d], extent - b.shape[d - k] - padding[d]]
        patches = _patches(F.pad(b, pad), kernel, stride, dilation).unflatten(0, use.gradient.shape[: use.leading + 1])
        right = _grouped(x.flatten(-k), 1, spread, groups)
        terms["weight"] = OuterProducts(_grouped(patches, 2, spread, groups), right, flipped=True)
    if use.wants("bias"):
        terms["bias"] = _ones(_grouped(use.gradient.flatten(-k), 2, spread, 1))
    return terms


@register_rule(
    F.embedding,
    names=("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    sample_dims=1,
)
def embedding(use: Use) -> Terms:
    """A linear layer on unit vectors. The row ``padding_idx`` has no gradient."""
    if use.argument("scale_grad_by_freq", False):
        raise UnsupportedError("`scale_grad_by_freq` makes its gradient no derivative")
    padding, size = use.argument("padding_idx"), use.argument("weight").shape[0]
    left = _places_last(use.gradient, 2)
    index = use.samples_first(use.argument("input")).reshape(left.shape[0], -1).long()  # [N, T]
    there = torch.ones_like(index, dtype=torch.bool) if padding is None else index != padding % size
    if left.shape[4] > 1 and torch.equal(left[..., :1].expand_as(left), left):  # the model takes the mean over places
        return {"weight": _of_bags(left[..., 0], index, there.to(left.dtype), size)}
    if padding is not None:
        left = left * there[:, None, None, None]
    return {"weight": OuterProducts(left, OneHot(index, size), flipped=True)}


def _of_bags(left: Tensor, index: Tensor, share: Tensor, size: int) -> OuterProducts:
    """B ``[N, Q, 1, O]`` times the weighted sum of the table's rows ``index`` with weights ``share``, both ``[N, T]``."""
    if len(index) * size > _COUNT_ENTRIES:
        return OuterProducts(left.unsqueeze(4) * share[:, None, None, None], OneHot(index, size), flipped=True)
    counts = share.new_zeros(len(index), size).scatter_add_(1, index, share)
    return OuterProducts(left.unsqueeze(4), counts[:, None, :, None], flipped=True)


@register_rule(
    F.embedding_bag,
    names=(
        *("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse"),
        *("per_sample_weights", "include_last_offset", "padding_idx"),
    ),
)
def embedding_bag(use: Use) -> Terms:
    """B, times a weight, at each token of a sample's bag."""
    mode = use.argument("mode", "mean")
    if mode == "max" or use.argument("scale_grad_by_freq", False) or use.wants("per_sample_weights"):
        raise UnsupportedError("its gradient is no weighted sum of rows")
    if use.leading == 2:
        raise UnsupportedError("a sample has several bags")
    index, offsets, weights = (use.argument(name) for name in ("input", "offsets", "per_sample_weights"))
    size, n = use.argument("weight").shape[0], use.gradient.shape[0]
    there = torch.ones_like(index, dtype=torch.bool)
    if index.ndim == 1:  # bags one after the other, to [N, longest bag]
        last = [] if use.argument("include_last_offset", False) else [offsets.new_tensor([len(index)])]
        lengths = torch.cat([offsets[1:], *last]) - offsets[:n]
        places = torch.arange(max(1, int(lengths.max())), device=index.device)
        there = places < lengths[:, None]
        flat = (offsets[:n, None] + places).clamp(max=max(0, len(index) - 1))
        index, weights = index[flat], None if weights is None else weights[flat]
    padding = use.argument("padding_idx")
    if padding is not None:
        there = there & (index != padding % size)
    share = there.to(use.gradient.dtype)
    if mode == "mean":
        share = share / share.sum(1, keepdim=True).clamp(min=1)
    if weights is not None:
        share = share * weights.to(share.dtype)
    return {"weight": _of_bags(use.gradient.unsqueeze(2), index.long(), share, size)}


def _by_channel(p: Tensor, ndim: int) -> torch.Size:
    """The shape of a parameter with an entry for each channel, aligned with ``[N, C, ...]``."""
    return torch.Size((len(p), *[1] * (ndim - 2)))


def _normalized_ndim(note: Any) -> int:
    return len(note.args[1] if len(note.args) > 1 else note.kwargs["normalized_shape"])


@register_rule(F.layer_norm, names=("input", "normalized_shape", "weight", "bias", "eps"), sample_dims=_normalized_ndim)
@register_rule(F.rms_norm, names=("input", "normalized_shape", "weight", "eps"), sample_dims=_normalized_ndim)
@register_rule(F.group_norm, names=("input", "num_groups", "weight", "bias", "eps"))
@register_rule(F.batch_norm, names=("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"))
@register_rule(
    F.instance_norm, names=("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
)
def normalization(use: Use) -> Terms:
    """Weight: B times the normalized input. Bias: B. Both are summed over the dimensions that the parameters do not have."""
    given = use.arguments
    parameters = {name: p for name in ("weight", "bias") if (p := given.pop(name, None)) is not None}
    if use.wants("input"):
        raise UnsupportedError("its input was computed from parameters alone")
    for name in ("running_mean", "running_var"):
        if given.get(name) is not None:
            given[name] = given[name].clone()  # training mode updates it
    x = given["input"] = given["input"].to(next(iter(parameters.values())).dtype)
    terms: Terms = {}
    for name, p in parameters.items():
        if use.wants(name):
            shape = None if "normalized_shape" in given else _by_channel(p, x.ndim)
            terms[name] = _summed(use, use.function(**given) if name == "weight" else None, p, shape)
    return terms


@register_rule(F.prelu, torch.prelu, Tensor.prelu, names=("input", "weight"))
def prelu(use: Use) -> Terms:
    """Weight: B times the negative part of the input, summed over all dimensions but the channels."""
    x, weight = use.argument("input"), use.argument("weight")
    return {"weight": _summed(use, x.clamp(max=0), weight, _by_channel(weight, x.ndim) if len(weight) > 1 else None)}
