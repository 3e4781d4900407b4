"""Notes the operations with parameters while the user's forward pass runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import private
from .applied import applied
from .arguments import Key, changes_in_place, results_of, tensors_of
from .decomposed import decomposition
from .state import visible_modules

_QUIET = {  # called often, and never of interest
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.stride),
    *(getattr(Tensor, name).__get__ for name in ("shape", "device", "dtype", "requires_grad", "ndim", "is_cuda", "is_nested")),
    *(torch.autograd.grad, torch.autograd.backward, Tensor.backward),
}
# These take only the shape or dtype of their second operand.
_BY_EXAMPLE = {Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.expand_as, Tensor.reshape_as}
_ASKS_FOR_GRADIENTS = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]

View = tuple[str, int, tuple[int, ...], tuple[int, ...]]  # of a parameter: its name, and offset, size and stride in it


@dataclass(eq=False)
class Source:
    """A tensor that was computed from parameters and constants alone, so that it is the same for all samples.

    Attributes:
        tensor: The tensor.
        name: The name of the parameter, if it is one.
        view: The view of a parameter, if it is one.
        note: The operation that computed it.
        place: Its place among the outputs of that.
    """

    tensor: Tensor
    name: str | None = None
    view: View | None = None
    note: Note | None = None
    place: int = 0

    @property
    def names(self) -> set[str]:
        """The parameters that it depends on."""
        if self.name is not None:
            return {self.name}
        if self.view is not None:
            return {self.view[0]}
        sources = () if self.note is None else self.note.sources.values()
        return {name for source in sources for name in source.names}


@dataclass(eq=False)
class Note:
    """One operation, ``function(*args, **kwargs)``, with operands that were computed from parameters.

    Attributes:
        sources: The operands that were computed from parameters.
        mixed: Whether other operands may depend on the samples.
        edges: The edges of its outputs in the graph, by place.
        shapes: The shapes of the outputs.
        owners: Objects that keep the nodes of the edges alive.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: dict[Key, Source]
    mixed: bool
    edges: dict[int, GradientEdge] = field(default_factory=dict)
    shapes: dict[int, torch.Size] = field(default_factory=dict)
    owners: list[Any] = field(default_factory=list)
    _kept: bool = False

    def keep_data(self) -> None:
        """Hold copies of data, which the user may overwrite before the step."""
        if not self._kept:
            self.args = tuple(self._copied(number, value) for number, value in enumerate(self.args))
            self.kwargs = {name: self._copied(name, value) for name, value in self.kwargs.items()}
            self._kept = True

    def _copied(self, key: Key, value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.grad_fn is None and key not in self.sources else value


class Tape(TorchFunctionMode):
    """Notes each operation with an operand that is a parameter, or was computed from parameters alone.

    Derivatives within a forward pass use parameters again, in operations that no function mode sees. They are possible once a
    tensor that is no parameter requires a gradient. Operations are then run as `Applied`, whose backward pass is noted too.

    Args:
        parameters: The parameters to be differentiated by, by name.
        constants: Other tensors that are the same for all samples: buffers and frozen parameters.
        differentiable: Whether derivatives are possible.
        still_runs: Tells whether the forward pass is in progress.

    Attributes:
        notes: The notes, in the order of the operations.
        finished: Whether the forward pass has ended.
        retaining: Hidden tensors whose gradient the user keeps.
        without_graph: Whether a parameter was used with gradients disabled, as within `torch.utils.checkpoint`.
        derived: Whether a derivative was taken in which parameters are used.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        constants: Iterator[Tensor],
        *,
        differentiable: bool,
        still_runs: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__()
        self.finished = False
        self._operations, self._length, self._still_runs = 0, 0, still_runs
        self.notes: list[Note] = []
        self.differentiable = differentiable
        self.without_graph = self.derived = False
        self.retaining: list[weakref.ref[Tensor]] = []
        self._sources = {id(p): Source(p, name) for name, p in parameters.items()}
        self._constants = {id(t): t for t in constants}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a function that is compiled within the model is not noted
            return func(*args, **kwargs)
        self._operations += 1
        if self._operations % 256 == 0 and not self._still_runs():
            self.finish()  # an interrupted forward pass leaves its mode behind
        if self.finished or func in _QUIET or (func in _BY_EXAMPLE and (not args or id(args[0]) not in self._sources)):
            return func(*args, **kwargs)
        if func is Tensor.retain_grad:
            self.retaining.append(weakref.ref(args[0]))
        transformed = private.in_transform()
        if not torch.is_grad_enabled():
            self.without_graph = self.without_graph or bool(self._operands(args, kwargs, False)[0])
            return func(*args, **kwargs)
        sources, mixed = self._operands(args, kwargs, transformed)
        if not sources:
            if func in _ASKS_FOR_GRADIENTS:
                self.differentiable = True
            result = func(*args, **kwargs)
            if not mixed and not transformed:
                self._constants |= {id(tensor): tensor for tensor in results_of(result) if not tensor.requires_grad}
            elif (changed := _changed_in_place(func, args, kwargs)) is not None:
                self._constants.pop(id(changed), None)
            return result
        if func is F.multi_head_attention_forward:  # its operations have rules of their own
            with self:
                return private.opened(func)(*args, **kwargs)
        if (decomposed := decomposition(func, args)) is not None:
            with self:
                return decomposed(*args, **kwargs)
        if mixed and (self.differentiable or transformed):
            result = applied(func, args, kwargs, sources.keys(), self, transformed=transformed)
            if result is not None:
                return result
        if transformed and mixed:
            return func(*args, **kwargs)
        changed = _changed_in_place(func, args, kwargs)
        before = args if changed is None or not mixed else (changed.detach().clone(), *args[1:])
        note = Note(func, before, kwargs, sources, mixed)
        result = func(*args, **kwargs)
        if transformed and any(map(private.is_batched, results_of(result))):
            # An operation with it is noted at the bottom of the transforms.
            self._sources |= {id(tensor): Source(tensor) for tensor in results_of(result)}
            return result
        self._close(note, result if changed is None else changed)
        return result

    def finish(self) -> None:
        """Take no more notes, except of derivatives after the forward pass."""
        private.leave(self)
        if not self.finished:
            self.finished, self._length = True, len(self.notes)
        if not self.differentiable:
            self._sources, self._constants = {}, {}

    @property
    def derived_after(self) -> bool:
        """Whether a derivative was taken after the forward pass, in which parameters are used."""
        return len(self.notes) > self._length

    def note(self, function: Callable[..., Any], args: tuple[Any, ...], sources: dict[Key, Source], result: Tensor) -> None:
        """Note an operation that was run elsewhere."""
        self._close(Note(function, args, {}, sources, True), result)

    def source_of(self, tensor: Tensor) -> Source | None:
        """The source of a tensor that was computed from parameters alone, else None."""
        source = self._sources.get(id(tensor))
        if source is None and (view := self._view(tensor)) is not None:
            return Source(tensor, None, view)
        return None if source is None or not source.names else source

    def _operands(self, args: tuple[Any, ...], kwargs: dict[str, Any], transformed: bool) -> tuple[dict[Key, Source], bool]:
        """The operands that were computed from parameters, and whether others may depend on the samples."""
        found: dict[Key, Source] = {}
        mixed = False
        for key, tensor in tensors_of(args, kwargs):
            source = self._sources.get(id(tensor))
            if source is None and transformed:
                source = self._sources.get(id(private.unwrapped(tensor)))
            if source is not None:
                found[key] = source
            elif id(tensor) not in self._constants:
                mixed = True
        return found, mixed

    def _close(self, note: Note, result: Any) -> None:
        for place, tensor in enumerate(results_of(result)):
            if not tensor.requires_grad:
                if not note.mixed:
                    self._constants[id(tensor)] = tensor
                continue
            note.edges[place] = edge = get_gradient_edge(tensor)
            note.owners.append(private.owner_of(edge.node, tensor))
            note.shapes[place] = tensor.shape
            if not note.mixed:
                self._sources[id(tensor)] = Source(tensor, None, self._view(tensor), note, place)
            else:
                self._sources.pop(id(tensor), None)  # changed in place by something of the samples
                self._constants.pop(id(tensor), None)
        if note.edges:
            self.notes.append(note)

    def _view(self, tensor: Tensor) -> View | None:
        base = tensor._base
        source = None if base is None else self._sources.get(id(base))
        if base is None or source is None or source.name is None or not base.is_contiguous() or tensor.dtype != base.dtype:
            return None
        return source.name, int(tensor.storage_offset() - base.storage_offset()), tuple(tensor.shape), tensor.stride()


def constants_of(model: nn.Module, parameters: dict[str, Tensor]) -> Iterator[Tensor]:
    """The tensors of a model that are the same for all samples, except the parameters."""
    ours = {id(p) for p in parameters.values()}
    for module in visible_modules(model):
        held: list[Any] = [module._parameters, module._buffers, module.__dict__]
        held += [value for value in module.__dict__.values() if type(value) in (dict, list, tuple)]
        for tensors in held:
            values = tensors.values() if isinstance(tensors, dict) else tensors
            yield from (t for t in values if isinstance(t, Tensor) and id(t) not in ours)


def _changed_in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The operand that a function changes, if it changes one."""
    return args[0] if changes_in_place(func, kwargs) and args and isinstance(args[0], Tensor) else None
