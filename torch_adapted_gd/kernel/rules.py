"""The table of layer rules: module type → its parameters' Jacobian, given the layer's input and the gradients at its output."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from .generic import module_jacobian
from .module_calls import ModuleCall
from .products import OneHot, OuterProducts

RuleFunction = Callable[[ModuleCall], Mapping[str, Tensor | OuterProducts]]
SampleDims = str | int | Callable[[nn.Module], int]


@dataclass(frozen=True)
class Rule:
    """How the parameters of a type of module are served.

    Attributes:
        function: Gives each parameter's Jacobian, by its name in the module: ``[N, Q, *parameter.shape]``, or a factored one.
        sample_dims: Which dimensions of the module's output can be that of the samples: the ``"first"``, ``"any"``, or an
            int: all but that many at the end.
        whole: The rule is for all parameters in the module, its submodules' too.
        keeps_outputs: The rule wants to see `ModuleCall.outputs`.
        runs_module: The rule runs the module again, in the modes that it was in.
    """

    function: RuleFunction
    sample_dims: SampleDims = "first"
    whole: bool = False
    keeps_outputs: bool = False
    runs_module: bool = True

    def dims(self, module: nn.Module, ndim: int) -> range:
        """The dimensions of an output of ``ndim`` that may be that of the samples."""
        if self.sample_dims == "first":
            return range(min(1, ndim))
        if self.sample_dims == "any":
            return range(ndim)
        return range(ndim - (self.sample_dims(module) if callable(self.sample_dims) else int(self.sample_dims)))


_TABLE: dict[type[nn.Module], Rule] = {}
GENERIC = Rule(module_jacobian, sample_dims="any", keeps_outputs=True)
WHOLE = Rule(module_jacobian, sample_dims="any", whole=True, keeps_outputs=True)
_TABLE[nn.MultiheadAttention] = WHOLE  # it uses its output projection's parameters without calling it


def register_rule(*module_types: type[nn.Module], sample_dims: SampleDims = "first") -> Callable[[RuleFunction], RuleFunction]:
    """Register a function as the rule by which `ntk` and `AdaptedGD` serve the parameters of a module type.

    Modules of types without a rule are served by the per-sample Jacobian of the module alone, which is right but slower. A
    rule is given one `ModuleCall` and returns, for each of the module's own parameters by name, their Jacobian for all
    samples and outputs: ``[N, Q, *parameter.shape]``, or `OuterProducts` when it is a sum of outer products that need not
    be written out. It serves subclasses too, unless they have a ``forward`` of their own. What it returns is compared with a
    backward pass in every step, so that a wrong rule is found out and not stepped on.

    Args:
        module_types: The types.
        sample_dims: Which dimensions of the module's output may hold the samples: ``"first"`` (as for convolutions),
            ``"any"``, or an int: any but that many at the end (1 for a layer that, like `torch.nn.Linear`, works on the
            last dimension), or a function of the module that returns that number.

    Returns:
        A decorator, which leaves the function as it is.

    Raises:
        TypeError: A type is not a subclass of `torch.nn.Module`.
        ValueError: ``sample_dims`` is neither of these.

    Example:
        >>> class Scale(torch.nn.Module):  # y = s ∘ x
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.s = torch.nn.Parameter(torch.ones(width))
        ...     def forward(self, x):
        ...         return self.s * x
        >>> @register_rule(Scale, sample_dims=1)
        ... def scale(call):  # ∂x_iq/∂s = Σ_t B_t ∘ A_t over positions t
        ...     product = call.gradient * call.input.unsqueeze(1)  # B [N, Q, ..., width], A [N, ..., width]
        ...     return {"s": product.reshape(*product.shape[:2], -1, product.shape[-1]).sum(2)}
    """
    for module_type in module_types:
        if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
            raise TypeError(f"`module_types` should be subclasses of torch.nn.Module, but got {module_type!r}.")
    words = sample_dims in ("first", "any") if isinstance(sample_dims, str) else False
    if (
        not words
        and not callable(sample_dims)
        and (isinstance(sample_dims, bool) or not isinstance(sample_dims, int) or sample_dims < 0)
    ):
        raise ValueError(f"`sample_dims` should be 'first', 'any' or a whole number of at least 0, but got {sample_dims!r}.")

    return _adding(module_types, sample_dims, runs_module=True)


def _of_factors(*module_types: type[nn.Module], sample_dims: SampleDims = "first") -> Callable[[RuleFunction], RuleFunction]:
    """The same for a rule that needs the module's settings and the factors alone."""
    return _adding(module_types, sample_dims, runs_module=False)


def _adding(
    module_types: tuple[type[nn.Module], ...], sample_dims: SampleDims, *, runs_module: bool
) -> Callable[[RuleFunction], RuleFunction]:
    def register(function: RuleFunction) -> RuleFunction:
        _TABLE.update(dict.fromkeys(module_types, Rule(function, sample_dims, runs_module=runs_module)))
        return function

    return register


def rule_for(module: nn.Module) -> Rule:
    """The rule of a module: that of its type, or of the parent type whose ``forward`` it has; else the generic one."""
    if is_parametrized(module):
        return WHOLE
    for parent in type(module).__mro__:
        rule = _TABLE.get(parent)
        if rule is not None and type(module).forward is getattr(parent, "forward"):  # noqa: B009
            return rule
    return GENERIC


@_of_factors(nn.Linear, sample_dims=1)
def linear(call: ModuleCall) -> dict[str, OuterProducts]:
    """W: Σ_t B_t ⊗ A_t over all positions t of a sample; bias: the same with A = 1."""
    b, a = call.gradient, call.input
    left = b.reshape(*b.shape[:2], -1, b.shape[-1])  # [N, Q, T, O]
    right = a.reshape(a.shape[0], -1, a.shape[-1])  # [N, T, I]
    return _with_bias(call, left.transpose(2, 3)[:, :, None], right.transpose(1, 2)[:, None])


def _with_bias(call: ModuleCall, left: Tensor, right: Tensor) -> dict[str, OuterProducts]:
    """Terms of a layer's weight, and of its bias as what a constant input of 1 gives."""
    ones = right.new_ones(()).expand(right.shape[0], right.shape[1], 1, right.shape[3])
    terms = {"weight": OuterProducts(left, right), "bias": OuterProducts(left, ones)}
    return {name: term for name, term in terms.items() if name in call.parameters}


def _require_batch(call: ModuleCall, ndim: int) -> None:
    """Refuse a call that left the batch out, as layers with ``ndim`` dimensions otherwise allow."""
    if call.input.ndim - call.leading + 1 != ndim:
        raise NotImplementedError("it was called without a batch")


def _patches(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """All that a kernel sees at each place: ``[M, C, *spatial]`` → ``[M, C·kernel, T]``."""
    k = len(kernel)
    for d in range(k):  # each adds a dimension at the end
        x = x.unfold(2 + d, (kernel[d] - 1) * dilation[d] + 1, stride[d])[..., :: dilation[d]]
    x = x.permute(0, 1, *range(2 + k, 2 + 2 * k), *range(2, 2 + k))  # [M, C, *kernel, *places]
    return x.reshape(x.shape[0], x.shape[1] * math.prod(kernel), -1)


def _places_last(x: Tensor, lead: int, spread: bool, groups: int) -> Tensor:
    """``[*lead, (S,) C, T]`` → ``[*lead, G, C/G, (S·)T]``."""
    if spread:
        x = x.movedim(lead, -2).flatten(-2)
    return x.reshape(*x.shape[:lead], groups, -1, x.shape[-1])


@_of_factors(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(call: ModuleCall) -> dict[str, OuterProducts]:
    """A linear layer on the patches of the padded input, for each group of channels."""
    m = call.module
    assert isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    k, n, spread = len(m.kernel_size), call.input.shape[0], call.leading == 2
    _require_batch(call, k + 2)
    x = call.input.flatten(0, call.leading - 1)
    x = F.pad(x, m._reversed_padding_repeated_twice, mode="constant" if m.padding_mode == "zeros" else m.padding_mode)
    patches = _patches(x, m.kernel_size, m.stride, m.dilation)
    right = _places_last(patches.unflatten(0, (n, -1)) if spread else patches, 1, spread, m.groups)
    left = _places_last(call.gradient.flatten(-k), 2, spread, m.groups)
    return _with_bias(call, left, right)


@_of_factors(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(call: ModuleCall) -> dict[str, OuterProducts]:
    """The roles of a convolution's input and output changed: the patches are those of the gradient."""
    m = call.module
    assert isinstance(m, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    k, n, spread = len(m.kernel_size), call.input.shape[0], call.leading == 2
    _require_batch(call, k + 2)
    terms = {}
    if "weight" in call.parameters:
        b = call.gradient.flatten(0, call.leading)  # [N·Q(·S), C, *spatial]
        pad: list[int] = []
        for d in reversed(range(k)):
            extent = (call.input.shape[d - k] - 1) * m.stride[d] + (m.kernel_size[d] - 1) * m.dilation[d] + 1
            pad += [int(m.padding[d]), extent - b.shape[d - k] - int(m.padding[d])]
        patches = _patches(F.pad(b, pad), m.kernel_size, m.stride, m.dilation)
        patches = patches.unflatten(0, call.gradient.shape[: call.leading + 1])
        right = _places_last(call.input.flatten(-k), 1, spread, m.groups)
        terms["weight"] = OuterProducts(_places_last(patches, 2, spread, m.groups), right, flipped=True)
    if "bias" in call.parameters:
        left = _places_last(call.gradient.flatten(-k), 2, spread, 1)
        terms["bias"] = OuterProducts(left, call.gradient.new_ones(()).expand(n, 1, 1, left.shape[-1]))
    return terms


@_of_factors(nn.Embedding, sample_dims=1)
def embedding(call: ModuleCall) -> dict[str, OuterProducts]:
    """A linear layer on unit vectors; the row of ``padding_idx`` has no gradient."""
    m = call.module
    assert isinstance(m, nn.Embedding)
    if m.scale_grad_by_freq:
        raise NotImplementedError("`scale_grad_by_freq` makes its gradient no derivative")
    index = call.input.reshape(call.input.shape[0], -1).long()  # [N, T]
    left = call.gradient.reshape(*call.gradient.shape[:2], index.shape[1], -1).transpose(2, 3)[:, :, None]
    if m.padding_idx is not None:
        left = left * (index != m.padding_idx)[:, None, None, None]
    return {"weight": OuterProducts(left, OneHot(index, m.num_embeddings), flipped=True)}


def _normalized(call: ModuleCall) -> Tensor:
    """What the layer multiplies by its weight: its own output for the weight 1 and the bias 0, in the shape of `input`."""
    x = call.input
    values = {
        name: torch.ones_like(p) if name == "weight" else torch.zeros_like(p) for name, p in call.module.named_parameters()
    }
    buffers = {name: b.clone() for name, b in call.buffers.items()}  # which training mode updates
    flat = x.flatten(0, call.leading - 1)
    with torch.no_grad():
        given = (flat.to(next(iter(values.values())).dtype),)
        normalized: Tensor = functional_call(call.module, {**values, **buffers}, given)
    return normalized.reshape(x.shape)


@register_rule(
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d
)
def channel_normalization(call: ModuleCall) -> dict[str, Tensor]:
    """weight: B times the normalized input, bias: B; summed over all but the channel."""
    if isinstance(call.module, nn.modules.instancenorm._InstanceNorm):
        _require_batch(call, call.module._get_no_batch_dim() + 1)
    b, normalized = call.gradient.movedim(call.leading + 1, 2), _normalized(call).movedim(call.leading, 1)  # [N, (Q,) C, ...]
    b, normalized = b.reshape(*b.shape[:3], -1), normalized.reshape(*normalized.shape[:2], -1)
    return {"weight": torch.einsum("nqct,nct->nqc", b, normalized.to(b.dtype)), "bias": b.sum(3)}


def _normalized_dims(module: nn.Module) -> int:
    return len(module.normalized_shape)  # type: ignore[arg-type]


@register_rule(nn.LayerNorm, nn.RMSNorm, sample_dims=_normalized_dims)
def layer_normalization(call: ModuleCall) -> dict[str, Tensor]:
    """weight: B times the normalized input, bias: B; summed over all positions."""
    shape = cast(tuple[int, ...], call.module.normalized_shape)
    b = call.gradient.reshape(*call.gradient.shape[:2], -1, math.prod(shape))  # [N, Q, T, P]
    normalized = _normalized(call).reshape(b.shape[0], b.shape[2], b.shape[3])
    return {"weight": torch.einsum("nqtp,ntp->nqp", b, normalized.to(b.dtype)), "bias": b.sum(2)}


@_of_factors(nn.PReLU)
def prelu(call: ModuleCall) -> dict[str, Tensor]:
    """weight: B times the negative part of the input, summed over all but its channel."""
    product = call.gradient * call.input.clamp(max=0).to(call.gradient.dtype).unsqueeze(1)
    if call.module.num_parameters == 1:
        return {"weight": product.flatten(2).sum(2, keepdim=True) if product.ndim > 2 else product.unsqueeze(2)}
    product = product.movedim(call.leading + 1, 2)
    return {"weight": product.reshape(*product.shape[:3], -1).sum(3)}
