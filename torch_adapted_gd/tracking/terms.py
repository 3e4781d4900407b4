"""Calls of a criterion: its arguments and values, and which entries of the model's outputs the arguments are."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_unflatten

from . import private
from .calls import Outputs, graph, without_autocast
from .state import RandomNumbers, unharmed, unwatched
from .tape import Tape

MARK = "torch_adapted_gd"  # in the metadata of the graph node of a recorded output: its recorder, call and place
_BASE = 2**8  # positions are sent back through a graph in digits of this base, which bfloat16 holds exactly

# Nodes of the graph that move entries, and may add constants.
_MOVING = (
    "Alias AsStrided Cat Chunk Clone Diagonal Expand Flip Gather Index IndexSelect MaskedFill MaskedSelect Permute "
    "ReshapeAlias Roll Select Slice Split SplitWithSizes Squeeze Stack T Take ToCopy Transpose Unbind Unfold UnsafeSplit "
    "UnsafeView Unsqueeze View"
)
_MOVES = {f"{name}Backward{number}" for name in _MOVING.split() for number in range(6)}


class RefusedError(RuntimeError):
    """A criterion raised an error for its arguments."""


@dataclass(frozen=True)
class Entries:
    """Entries of a criterion's argument that are entries of output ``place`` of ``of``.

    Attributes:
        index: The entries of the output, flat, ``[S]``; None for all, in order.
        at: The entries of the argument, flat, ``[S]``; None for all, in order.
    """

    of: Outputs
    place: int
    index: Tensor | None = None
    at: Tensor | None = None


@dataclass(eq=False)
class Term:
    """One call of a criterion. Σ ⟨f, values⟩ is a term of the loss C.

    Attributes:
        criterion: The criterion.
        arguments: Its positional and keyword arguments, flat; tensors are copies.
        structure: The pytree structure of the arguments.
        entries: The part of x that an argument is, by the number of the argument.
        state: The state of the criterion before the call.
        values: The returned values, by number.
        factors: f = ∂loss/∂value from backward passes, float64, by number of the value.
        number: The number of the call among those of all criteria.
    """

    criterion: nn.Module
    arguments: list[Any]
    structure: Any
    entries: dict[int, list[Entries]]
    state: State
    values: dict[int, Tensor] = field(default_factory=dict)
    factors: dict[int, Tensor] = field(default_factory=dict)
    number: int = 0

    @property
    def parts(self) -> list[Entries]:
        """All entries of all arguments."""
        return [entries for found in self.entries.values() for entries in found]

    def called(self, arguments: dict[int, Tensor]) -> Tensor:
        """Σ ⟨f, values⟩ for other arguments, by number, in float64 if the criterion takes it.

        Raises:
            RuntimeError: Called again with its own arguments, the criterion gives other values.
            RefusedError: It raises an error for these arguments.
        """
        values = self._run(arguments, doubles=self._doubles)
        return torch.stack([(f * values[number].double()).sum() for number, f in self.factors.items()]).sum()

    def as_sum(self) -> Term:
        """The same call with ``reduction="sum"``, in float64."""
        state = copy.copy(self.state)
        state.attributes = [(m, {**own, "reduction": "sum"} if m is self.criterion else own) for m, own in state.attributes]
        term = replace(self, state=state)
        term._doubles = True
        return term

    @functools.cached_property
    def _doubles(self) -> bool:
        """Whether the criterion takes float64, and has no tensors of its own in another dtype."""
        given = {number: self.arguments[number].double() for number in self.entries}
        found: dict[int, Tensor] = {}
        size = max([1.0, *(float(x.nan_to_num(0.0, 0.0, 0.0).abs().max()) for x in given.values() if x.numel())])
        for doubles in (True, False):
            try:
                with torch.no_grad():
                    found = self._run(given, doubles=doubles)
            except RefusedError as error:
                if doubles:
                    continue
                raise RuntimeError(
                    f"`criterion`, a {type(self.criterion).__name__}, could not be called again with its arguments: {error}. "
                    "Nothing was changed. Take derivatives of its arguments outside of it, and give it the derivatives."
                ) from error
            if all(_agree(found[number], value, size) for number, value in self.values.items() if number in found):
                return doubles
        raise RuntimeError(
            f"`criterion`, a {type(self.criterion).__name__}, gave {_shown(self.values)} in the training step and "
            f"{_shown(found)} for the same arguments when it was called again, so it cannot judge steps. Its value may depend "
            "only on its arguments, its parameters and buffers, and torch's default random numbers."
        )

    def _run(self, arguments: dict[int, Tensor], *, doubles: bool) -> dict[int, Tensor]:
        leaves = list(self.arguments)
        for number, value in enumerate(leaves):
            if isinstance(value, Tensor):  # copies, because it may change them
                leaves[number] = _copied(arguments.get(number, value), value.dtype, doubles=doubles)
        args, kwargs = tree_unflatten(leaves, self.structure)
        kind = next(iter(self.values.values())).device.type
        with unwatched(), self.state.restored(), without_autocast(kind):
            held = {name: _copied(t, t.dtype, doubles=doubles) for name, t in self.state.held.items()}
            try:
                result = functional_call(self.criterion, held, args, kwargs) if held else self.criterion(*args, **kwargs)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
                raise RefusedError(str(error)) from error
        return {number: leaf for number, leaf in enumerate(tree_leaves(result)) if isinstance(leaf, Tensor)}


class State:
    """What the value of a criterion depends on besides its arguments.

    Args:
        criterion: The criterion, as it is now.
        arguments: The tensors that it is given.

    Attributes:
        held: Copies of its parameters and buffers by name.
        attributes: The attributes of its modules, with copies of lists and dicts.
    """

    def __init__(self, criterion: nn.Module, arguments: Iterable[Tensor]) -> None:
        self._criterion = criterion
        tensors = (*criterion.named_parameters(), *criterion.named_buffers())
        self.held = {name: tensor.detach().clone() for name, tensor in tensors}
        self.attributes = [(module, _attributes(module)) for module in criterion.modules()]
        self._random: RandomNumbers | None = RandomNumbers(arguments)

    def forget_unused(self) -> None:
        """Forget the random numbers if none was drawn since."""
        if self._random is not None and not self._random.drawn():
            self._random = None

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Context in which it is in force; at its end all is as before."""
        with unharmed(self._criterion), contextlib.nullcontext() if self._random is None else self._random.again():
            for module, attributes in self.attributes:
                module.__dict__.update({name: _shallow(value) for name, value in attributes.items()})
            yield


_PLAIN = nn.Module().__dict__.keys() - {"training"}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The user's attributes of a module, and its mode."""
    return {name: _shallow(value) for name, value in module.__dict__.items() if name not in _PLAIN}


def _shallow(value: Any) -> Any:
    return copy.copy(value) if type(value) in (list, dict, set) else value


def _copied(tensor: Tensor, dtype: torch.dtype, *, doubles: bool) -> Tensor:
    return tensor.to(torch.float64 if doubles and dtype.is_floating_point else dtype, copy=True)


def _agree(found: Tensor, value: Tensor, size: float) -> bool:
    """Whether two values of a criterion agree within the rounding error of arguments of this size."""
    expected = value.double()
    scale = expected.abs().mean() if expected.numel() else 0.0
    allowed = 1e-2 * (expected.abs() + scale) + 1e2 * torch.finfo(value.dtype).eps * size
    return bool(((found.double() - expected).abs() <= allowed).all()) or not bool(torch.isfinite(expected).all())


def _shown(values: dict[int, Tensor]) -> str:
    return ", ".join(
        f"{float(v):.6g}" if v.numel() == 1 else f"{float(v.double().mean()):.6g} on average" for v in values.values()
    )


class Graph:
    """What a tensor was computed from.

    Args:
        x: The tensor.
        mark: The mark of recorded outputs.
        parameters: The parameters to be stepped, by ``id``.

    Attributes:
        marked: The nodes of recorded outputs, with the call and place, by ``id`` of the call and place.
        moved: Whether all operations since these outputs only move entries.
        depends: Whether it was computed from such an output or a parameter.
        of_a_criterion: Whether it was computed from the value of a watched criterion.
        eps: Machine epsilon of the coarsest dtype that it was cast to on the way.
    """

    def __init__(self, x: Tensor, mark: object, parameters: dict[int, Any]) -> None:
        self.marked: dict[tuple[int, int], Any] = {}
        self.moved, self.depends, self.of_a_criterion = True, id(x) in parameters, False
        self.eps = 0.0
        self._seen: set[Any] = set()
        ends: set[Any] = set()
        for node in graph(x, ends=ends):
            self._seen.add(node)
            found = node.metadata.get(MARK)
            if found is not None and found[0] is mark:
                ends.add(node)
                self.depends = True
                if found[2] is None:
                    self.of_a_criterion = True
                else:
                    self.marked[id(found[1]), found[2]] = (node, found[1], found[2])
                continue
            variable = getattr(node, "variable", None)
            if variable is not None:
                self.depends = self.depends or id(variable) in parameters
                self.moved = self.moved and id(variable) not in parameters
            elif node.name() not in _MOVES:
                self.moved = False
            elif node.name() == "ToCopyBackward0" and (dtype := private.dtype_at(node)) is not None:
                self.eps = max(self.eps, torch.finfo(dtype).eps)
        self.moved = self.moved and bool(self.marked)

    def touches(self, tapes: list[Tape]) -> bool:
        """Whether it depends on operations with parameters that a tape has noted."""
        return any(edge.node in self._seen for tape in tapes for note in tape.notes for edge in note.edges.values())


def entries_of(x: Tensor, marked: dict[tuple[int, int], Any]) -> list[Entries] | None:
    """Which entries of the recorded outputs ``marked`` the entries of x are; None if one of them is there twice, or changed.

    Numbers are sent back through the graph as gradients: ones tell how often an entry of an output is there, and positions in x
    tell where.
    """
    outputs = list(marked.values())
    if len(outputs) == 1 and x.grad_fn is outputs[0][0]:
        return [Entries(outputs[0][1], outputs[0][2])]
    edges = [GradientEdge(node, 0) for node, _, _ in outputs]

    def sent_back(numbers: Tensor) -> list[Tensor]:
        with unwatched():
            given = [numbers.to(x.dtype).view(x.shape)]
            found = torch.autograd.grad([x], edges, given, retain_graph=True, materialize_grads=True)
        return [gradient.reshape(-1).long() for gradient in found]

    positions = torch.arange(x.numel(), device=x.device)
    counts = sent_back(torch.ones_like(positions))
    if any(bool((count > 1).any()) for count in counts):
        return None
    codes = [torch.zeros_like(count) for count in counts]
    weight = 1
    while weight < x.numel():
        digits = sent_back(positions // weight % _BASE)
        codes = [code + weight * digit for code, digit in zip(codes, digits, strict=True)]
        weight *= _BASE
    entries = []
    for count, code, (_, call, place) in zip(counts, codes, outputs, strict=True):
        index = count.nonzero()[:, 0]
        at = code[index]
        value = call.outputs[place].reshape(-1)
        if not torch.equal(value[index].to(x.dtype).nan_to_num(), x.detach().reshape(-1)[at].nan_to_num()):
            return None
        if len(index):
            whole = len(index) == len(value) and torch.equal(at, positions)
            entries.append(Entries(call, place) if whole else Entries(call, place, index, at))
    return entries or None
