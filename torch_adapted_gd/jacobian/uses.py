"""One use of parameters in an operation: what a rule computes their Jacobian from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..tracking.arguments import Key
from ..tracking.tape import Note, Source

if TYPE_CHECKING:
    from .rules import Rule


@dataclass(frozen=True)
class Layout:
    """Where a tensor has the samples: dimension ``dim`` holds N of them, or N·S entries, S for each; or any places do.

    Attributes:
        dim: The dimension.
        samples: N.
        spread: Whether there are S entries for each sample, a dimension of their own once the samples come first.
        minor: The samples change fastest within the dimension.
        places: For samples in no order: of each sample the places among the first ``leading`` dimensions, counted through,
            ``[N, S]``; −1 where it has less than S.
        leading: How many dimensions these are.
    """

    dim: int
    samples: int
    spread: bool = False
    minor: bool = False
    places: Tensor | None = None
    leading: int = 0

    def samples_first(self, tensor: Tensor, offset: int = 0) -> Tensor:
        """The tensor with the samples as dimension ``offset``, after ``offset`` others; S becomes the next one."""
        if self.places is not None:
            flat = tensor.flatten(offset, offset + self.leading - 1)
            index = self.places.clamp(min=0).reshape(-1)
            chosen: Tensor = flat.index_select(offset, index).unflatten(offset, self.places.shape)
            missing = self.places < 0
            if not missing.any():
                return chosen
            shape = [1] * offset + list(self.places.shape) + [1] * (chosen.ndim - offset - 2)
            return chosen.masked_fill(missing.view(shape), 0)
        tensor = tensor.movedim(self.dim + offset, offset)
        if not self.spread:
            return tensor
        apart: Tensor = tensor.unflatten(offset, (-1, self.samples) if self.minor else (self.samples, -1))
        return apart.transpose(offset, offset + 1) if self.minor else apart

    @staticmethod
    def candidates(shape: torch.Size, samples: int, dims: range) -> Iterator[Layout]:
        """The layouts that a tensor of this shape could have, the likeliest first."""
        yield from (Layout(dim, samples) for dim in dims if shape[dim] == samples)
        for dim in dims:
            if shape[dim] > samples and shape[dim] % samples == 0:
                yield Layout(dim, samples, spread=True)
                if samples > 1:
                    yield Layout(dim, samples, spread=True, minor=True)


@dataclass(eq=False)
class Use:
    """One operation that a parameter, or something computed from parameters alone, was an operand of.

    `gradient` has the samples first, and so has what `samples_first` gives. Where the operation has S entries of each sample
    in one dimension (the patches of an image, say), that is ``[N, Q, S, ...]``, and ``leading`` is 2.

    Attributes:
        function: What was called.
        arguments: With what, by the names that the rule gave them; tensors are detached.
        sources: Operands that were computed from parameters, by number, keyword, or place in a list.
        layouts: Where each output has the samples, by place.
        gradients: B, the gradients of the model's outputs at each of these, ``[N, Q, ...]``.
        shapes: The shapes of these as they were returned.
        made: The Jacobians ``[N, Q, ...]`` by operand where they are smaller than B, which is not kept then; or None.
    """

    rule: Rule
    note: Note
    sources: dict[Key, Source]
    layouts: dict[int, Layout]
    gradients: dict[int, Tensor] = field(default_factory=dict)
    shapes: dict[int, torch.Size] = field(default_factory=dict)
    made: dict[Key, Tensor] | None = None

    @property
    def held(self) -> dict[Any, Tensor]:
        """What is kept of it, ``[N, Q, ...]`` each: B, or the Jacobians."""
        return self.gradients if self.made is None else self.made

    def holding(self, tensors: Iterable[Tensor]) -> Use:
        """The same with other tensors in place of these, in their order."""
        held = dict(zip(self.held, tensors, strict=True))
        return replace(self, gradients=held) if self.made is None else replace(self, made=held)

    @property
    def function(self) -> Callable[..., Any]:
        """What was called."""
        return self.note.function

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by the name that the rule gives it; tensors are detached."""
        key = self.key(name)
        value = self.note.kwargs.get(key, default) if isinstance(key, str) else self.note.args[key]
        return value.detach() if isinstance(value, Tensor) else value

    def key(self, name: str) -> int | str:
        """Where an argument is."""
        number = self.rule.names.index(name)
        return number if number < len(self.note.args) else name

    def wants(self, name: str) -> bool:
        """Whether the Jacobian by an argument is asked for."""
        return self.key(name) in self.sources

    @property
    def gradient(self) -> Tensor:
        """B of the only output, ``[N, Q, ...]``."""
        (gradient,) = self.gradients.values()
        return gradient

    @property
    def layout(self) -> Layout:
        """Where the only output has the samples."""
        (layout,) = self.layouts.values()
        return layout

    @property
    def shape(self) -> torch.Size:
        """That of the only output."""
        (shape,) = self.shapes.values()
        return shape

    def samples_first(self, tensor: Tensor) -> Tensor:
        """A tensor that has the samples where the output has them, ``[N, ...]``, in the gradient's dtype if it is floating."""
        return self.layout.samples_first(tensor.to(self.gradient.dtype) if tensor.is_floating_point() else tensor)

    @property
    def leading(self) -> int:
        """How many dimensions come before those that the operation knows of as a sample's own: 1, or 2 with S."""
        return 2 if self.layout.spread or self.layout.places is not None else 1

    @property
    def names(self) -> set[str]:
        """The parameters that it is about."""
        return {name for source in self.sources.values() for name in source.names}

    def __str__(self) -> str:
        name = getattr(self.function, "__qualname__", None) or repr(self.function)
        return f"{name.rpartition('.')[2]} of {', '.join(repr(name) for name in sorted(self.names))}"
