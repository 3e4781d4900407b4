"""One call of a module that owns parameters, within a call of the model: what a rule computes their Jacobian from."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

if TYPE_CHECKING:
    from .rules import Rule


@dataclass(frozen=True)
class Layout:
    """Where a tensor has the samples: dimension ``dim`` holds N of them, or N·S entries, S for each.

    Attributes:
        dim: The dimension.
        samples: N.
        spread: Whether there are S entries for each sample, a dimension of their own once the samples come first.
        minor: The samples change fastest within the dimension.
    """

    dim: int
    samples: int
    spread: bool = False
    minor: bool = False

    def samples_first(self, tensor: Tensor, offset: int = 0) -> Tensor:
        """The tensor with the samples as dimension ``offset``, after ``offset`` others; S becomes the next one."""
        tensor = tensor.movedim(self.dim + offset, offset)
        if not self.spread:
            return tensor
        apart: Tensor = tensor.unflatten(offset, (-1, self.samples) if self.minor else (self.samples, -1))
        return apart.transpose(offset, offset + 1) if self.minor else apart

    @staticmethod
    def candidates(shape: torch.Size, samples: int, dims: range) -> Iterator["Layout"]:
        """The layouts that a tensor of this shape could have, the likeliest first."""
        yield from (Layout(dim, samples) for dim in dims if shape[dim] == samples)
        for dim in dims:
            if shape[dim] > samples and shape[dim] % samples == 0:
                yield Layout(dim, samples, spread=True)
                if samples > 1:
                    yield Layout(dim, samples, spread=True, minor=True)


@dataclass(eq=False)
class ModuleCall:
    """One call of a module that owns parameters: what a rule computes their Jacobian from.

    `input` and `gradient` have the samples first. Where the module has taken S entries of each sample for a batch (the
    patches of an image, say), they are ``[N, S, ...]`` and ``[N, Q, S, ...]``, and ``leading`` is 2.

    Attributes:
        module: The module.
        name: Its name in the model.
        parameters: Its trainable parameters: their names in the module, and in the model.
        args: Positional inputs as they were given; tensors are detached copies.
        kwargs: Keyword inputs likewise.
        buffers: Its buffers as they were before the call.
        outputs: Its floating outputs by place, as they were returned; kept only for rules that ask for them.
        layouts: Where each of these has the samples.
        gradients: B, the gradients of the model's outputs at each of these, ``[N, Q, ...]``.
    """

    module: nn.Module
    name: str
    rule: "Rule"
    parameters: dict[str, str]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    buffers: dict[str, Tensor]
    outputs: dict[int, Tensor] = field(default_factory=dict)
    layouts: dict[int, Layout] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    aliases: dict[str, Tensor] = field(default_factory=dict)  # the leaf that stood for each parameter in this call
    edges: dict[int, GradientEdge] = field(default_factory=dict)  # each output in the graph, as it was returned
    shapes: dict[int, torch.Size] = field(default_factory=dict)

    @property
    def gradient(self) -> Tensor:
        """B of the only output, ``[N, Q, ...]``."""
        (gradient,) = self.gradients.values()
        return gradient

    @property
    def input(self) -> Tensor:
        """The first input, ``[N, ...]``, in the gradient's dtype if it is of floating numbers."""
        (layout,) = self.layouts.values()
        given: Tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return layout.samples_first(given.to(self.gradient.dtype) if given.is_floating_point() else given)

    @property
    def leading(self) -> int:
        """How many dimensions of `input` come before those that the module knows of as a sample's own: 1, or 2 with S."""
        (layout,) = self.layouts.values()
        return 2 if layout.spread else 1

    def __str__(self) -> str:
        return (
            f"'{self.name}' ({type(self.module).__name__})" if self.name else f"the model itself ({type(self.module).__name__})"
        )
