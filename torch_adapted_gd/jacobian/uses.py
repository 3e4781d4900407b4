"""A use of parameters in an operation: the input of a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..tracking.arguments import Key, detached
from ..tracking.tape import Note, Source

if TYPE_CHECKING:
    from .rules import Rule


@dataclass(frozen=True)
class Layout:
    """Which entries of a tensor belong to which sample.

    Attributes:
        dim: The dimension that holds the N samples, or N·S entries, S for each sample.
        samples: N.
        spread: Whether there are S entries for each sample.
        minor: With ``spread``: whether the sample changes fastest along the dimension, not the entry of a sample.
        places: For samples in no order: the places of each sample, ``[N, S]``, as indices into the flattened first ``leading``
            dimensions; −1 where a sample has fewer than S.
        leading: The number of these dimensions.
    """

    dim: int
    samples: int
    spread: bool = False
    minor: bool = False
    places: Tensor | None = None
    leading: int = 0

    def samples_first(self, tensor: Tensor, offset: int = 0) -> Tensor:
        """The tensor with the samples in dimension ``offset``, and S in the next one; ``dim`` counts from ``offset`` on."""
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
        """The layouts that a tensor of this shape can have, the most likely first."""
        yield from (Layout(dim, samples) for dim in dims if shape[dim] == samples)
        for dim in dims:
            if shape[dim] > samples and shape[dim] % samples == 0:
                yield Layout(dim, samples, spread=True)
                if samples > 1:
                    yield Layout(dim, samples, spread=True, minor=True)


@dataclass(eq=False)
class Use:
    """An operation with an operand that is a parameter, or was computed from parameters alone.

    `gradient` and the results of `samples_first` have the samples first. Where the operation has S entries of each sample in
    one dimension, such as the patches of an image, the gradient is ``[N, Q, S, ...]`` and ``leading`` is 2.

    Attributes:
        function: The function that was called.
        arguments: Its arguments by the names that the rule gave them; tensors are detached.
        sources: The operands that were computed from parameters, by number, keyword, or place in a list.
        layouts: Which entries of each output belong to which sample, by the output's place.
        gradients: B, the gradients of the model's outputs with respect to each of these outputs, ``[N, Q, ...]``.
        shapes: The shapes of these outputs as they were returned.
        made: The Jacobians ``[N, Q, ...]`` by operand, if they are kept in place of B; else None.
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
        """The tensors that are kept, ``[N, Q, ...]`` each: B, or the Jacobians."""
        return self.gradients if self.made is None else self.made

    def holding(self, tensors: Iterable[Tensor]) -> Use:
        """A copy with other tensors in place of `held`, in the same order."""
        held = dict(zip(self.held, tensors, strict=True))
        return replace(self, gradients=held) if self.made is None else replace(self, made=held)

    @property
    def function(self) -> Callable[..., Any]:
        """The function that was called."""
        return self.note.function

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that were given, by name; tensors are detached."""
        given = {**dict(zip(self.rule.names, self.note.args, strict=False)), **self.note.kwargs}
        return {name: detached(value) for name, value in given.items()}

    def argument(self, name: str, default: Any = None) -> Any:
        """The argument of a name; tensors are detached."""
        return self.operand(self.key(name), default)

    def operand(self, key: int | str, default: Any = None) -> Any:
        """The argument with a number or keyword; tensors are detached."""
        return detached(self.note.kwargs.get(key, default) if isinstance(key, str) else self.note.args[key])

    def key(self, name: str) -> int | str:
        """The number of an argument, or its name if it was given by keyword."""
        number = self.rule.names.index(name)
        return number if number < len(self.note.args) else name

    def wants(self, name: str) -> bool:
        """Whether an argument was computed from parameters, so that the Jacobian by it is needed."""
        return self.key(name) in self.sources

    @property
    def gradient(self) -> Tensor:
        """B of the only output, ``[N, Q, ...]``."""
        (gradient,) = self.gradients.values()
        return gradient

    @property
    def layout(self) -> Layout:
        """The layout of the only output."""
        (layout,) = self.layouts.values()
        return layout

    @property
    def shape(self) -> torch.Size:
        """The shape of the only output."""
        (shape,) = self.shapes.values()
        return shape

    def samples_first(self, tensor: Tensor) -> Tensor:
        """A tensor with the layout of the output as ``[N, ...]``, in the gradient's dtype if it is floating."""
        return self.layout.samples_first(tensor.to(self.gradient.dtype) if tensor.is_floating_point() else tensor)

    @property
    def leading(self) -> int:
        """The number of dimensions before a sample's own ones, once the samples come first: 1, or 2 with S."""
        return 2 if self.layout.spread or self.layout.places is not None else 1

    @property
    def names(self) -> set[str]:
        """The names of the parameters."""
        return {name for source in self.sources.values() for name in source.names}

    def __str__(self) -> str:
        name = getattr(self.function, "__qualname__", None) or repr(self.function)
        return f"{name.rpartition('.')[2]} of {', '.join(repr(name) for name in sorted(self.names))}"
