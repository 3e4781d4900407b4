"""Calls of a criterion: what it was given, what it gave, and which entries of the model's outputs those were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..calls import Outputs, unwatched

MARK = "torch_adapted_gd"  # in the metadata of the graph node of a recorded output: its recorder, call and place
# Of the digits of positions that are sent back through a graph: what bfloat16 holds, and float32.
_LOW, _BASE = 2**8, 2**20

# Nodes of the graph whose outputs are entries of their inputs, or constants.
_MOVING = (
    *("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "T", "Squeeze", "Unsqueeze", "Slice", "Select", "Index"),
    *("IndexSelect", "MaskedSelect", "Gather", "Take", "TakeAlongDim", "Clone", "Alias", "ToCopy", "Cat", "Stack", "Split"),
    *("SplitWithSizes", "Unbind", "UnsafeSplit", "Narrow", "Diagonal", "Flip", "Roll", "Expand", "MaskedFill", "AsStrided"),
    *("Unfold", "Movedim", "Swapaxes", "Flatten", "Unflatten", "Chunk"),
)
_MOVES = {f"{name}Backward{number}" for name in _MOVING for number in range(6)}


@dataclass(frozen=True)
class Entries:
    """Entries of a criterion's argument that are entries of something in x.

    Attributes:
        of: What they are entries of.
        place: Which output of it.
        index: Which entries of that, flat, ``[S]``; None for all, in order.
        at: Where they are in the argument, flat, ``[S]``; None for everywhere, in order.
    """

    of: Outputs
    place: int
    index: Tensor | None = None
    at: Tensor | None = None


@dataclass(eq=False)
class Term:
    """One call of a criterion, C = Σ ⟨f, values⟩ a term of the loss.

    Attributes:
        criterion: What was called.
        arguments: Its positional and keyword arguments, flat, tensors as copies.
        structure: How these belong together.
        entries: For those of its arguments that are part of x, by number: which part.
        random: The state of the random number generator before it, if it drew from it.
        values: What it gave, by number.
        factors: f by number: ∂loss/∂value as backward passes delivered it, float64.
        doubles: Whether the criterion takes float64; None as long as nobody asked.
    """

    criterion: nn.Module
    arguments: list[Any]
    structure: Any
    entries: dict[int, list[Entries]]
    random: Tensor | None = None
    values: dict[int, Tensor] = field(default_factory=dict)
    factors: dict[int, Tensor] = field(default_factory=dict)
    doubles: bool | None = None

    @property
    def parts(self) -> list[Entries]:
        """All entries of all arguments."""
        return [entries for found in self.entries.values() for entries in found]

    def value(self) -> float:
        """Σ ⟨f, values⟩, from what the criterion gave."""
        return sum(float((f * self.values[number].double()).sum()) for number, f in self.factors.items())

    def called(self, arguments: dict[int, Tensor]) -> Tensor:
        """Σ ⟨f, values⟩ for other arguments, by number, in float64 where the criterion can.

        Raises:
            RuntimeError: The criterion does not give what it gave.
        """
        if self.doubles is None:
            self._choose_dtype()
        values = self._run(arguments, doubles=bool(self.doubles))
        total: Tensor | None = None
        for number, f in self.factors.items():
            part = (f * values[number].double()).sum()
            total = part if total is None else total + part
        assert total is not None
        return total

    def _choose_dtype(self) -> None:
        """Whether the criterion takes float64; some have tensors of their own in another dtype."""
        given = {number: self.arguments[number].double() for number in self.entries}
        found: dict[int, Tensor] = {}
        for doubles in (True, False):
            try:
                with torch.no_grad():
                    found = self._run(given, doubles=doubles)
            except (RuntimeError, TypeError):
                if not doubles:
                    raise
                continue
            if all(_agree(found[number], value) for number, value in self.values.items() if number in found):
                self.doubles = doubles
                return
        raise RuntimeError(
            f"`criterion`, a {type(self.criterion).__name__}, gave {_shown(self.values)} in the training step and "
            f"{_shown(found)} for the same arguments when it was called again, so that steps cannot be judged by it. Draw its "
            "random numbers by torch, and keep nothing in it from call to call."
        )

    def _run(self, arguments: dict[int, Tensor], *, doubles: bool) -> dict[int, Tensor]:
        leaves = list(self.arguments)
        for number, value in enumerate(leaves):
            if isinstance(value, Tensor):
                value = arguments.get(number, value)
                own = self.arguments[number].dtype
                leaves[number] = value.to(torch.float64 if doubles else own) if own.is_floating_point else value
        args, kwargs = tree_unflatten(leaves, self.structure)
        # Copies: it may change them, and a class weight in float32 does not go with outputs in float64.
        held = dict(self.criterion.named_buffers()) | dict(self.criterion.named_parameters())
        held = {
            name: t.detach().double() if doubles and t.is_floating_point() else t.detach().clone() for name, t in held.items()
        }
        kind = next(iter(self.values.values())).device.type
        with unwatched(), self._same_random_numbers(), torch.autocast(kind, enabled=False):
            result = functional_call(self.criterion, held, args, kwargs) if held else self.criterion(*args, **kwargs)
        return {number: leaf for number, leaf in enumerate(tree_leaves(result)) if isinstance(leaf, Tensor)}

    @contextlib.contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        if self.random is None:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.random)
            yield


def _copied(tensor: Tensor, *, doubles: bool) -> Tensor:
    return tensor.detach().double() if doubles and tensor.is_floating_point() else tensor.detach().clone()


def _agree(found: Tensor, value: Tensor) -> bool:
    expected = value.double()
    scale = expected.abs().mean() if expected.numel() else 0.0
    return bool(((found.double() - expected).abs() <= 1e-2 * (expected.abs() + scale)).all()) or not bool(
        torch.isfinite(expected).all()
    )


def _shown(values: dict[int, Tensor]) -> str:
    return ", ".join(
        f"{float(v):.6g}" if v.numel() == 1 else f"{float(v.double().mean()):.6g} on average" for v in values.values()
    )


def found_in_graph(x: Tensor, recorder: object, parameters: dict[int, Any]) -> tuple[dict[tuple[int, int], Any], bool, bool]:
    """The recorded outputs that a tensor was computed from, and how.

    Args:
        x: The tensor.
        recorder: What the outputs that count are marked with.
        parameters: The parameters that count, by ``id``.

    Returns:
        The nodes of these outputs, by ``id`` of the call and place, with both; whether all on the way to them moves entries
        alone; whether it was computed from any of them or from one of the parameters.
    """
    marked: dict[tuple[int, int], Any] = {}
    moved, depends = True, False
    seen = set()
    nodes: list[Any] = [x.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        mark = node.metadata.get(MARK)
        if mark is not None and mark[0] is recorder:
            depends = True
            marked[id(mark[1]), mark[2]] = (node, mark[1], mark[2])
            continue
        variable = getattr(node, "variable", None)
        if variable is not None:
            depends = depends or id(variable) in parameters
            moved = moved and id(variable) not in parameters
        elif node.name() not in _MOVES:
            moved = False
        nodes += [following for following, _ in node.next_functions]
    return marked, moved and bool(marked), depends or id(x) in parameters


def entries_of(x: Tensor, marked: dict[tuple[int, int], Any]) -> list[Entries] | None:
    """Which entries of recorded outputs a tensor's entries are; None if they are others, or one of them twice.

    Each position is sent back through the graph: the gradient says where it came from.

    Args:
        x: A tensor that was made from these outputs by moving entries.
        marked: The outputs.
    """
    outputs = list(marked.values())
    if len(outputs) == 1 and x.grad_fn is outputs[0][0]:
        return [Entries(outputs[0][1], outputs[0][2])]
    size = x.numel()
    codes = torch.arange(1, size + 1, device=x.device)
    nodes, sizes = [node for node, _, _ in outputs], [call.outputs[place].element_size() for _, call, place in outputs]
    found = _sent_back(x, codes, nodes, sizes)
    numbers = torch.cat([code[code > 0] for code in found])
    if len(numbers) != len(numbers.unique()) or (len(numbers) and int(numbers.max()) > size):
        return None
    if len(numbers) < size:  # the others are constants, or there twice: another order tells
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).to(x.device)
        again = _sent_back(x, codes[order], nodes, sizes)
        for first, second in zip(found, again, strict=True):
            there = first > 0
            if not torch.equal(there, second > 0) or not torch.equal(order[first[there] - 1] + 1, second[there]):
                return None
    entries = []
    for code, (_, call, place) in zip(found, outputs, strict=True):
        index = code.nonzero()[:, 0]
        at = code[index] - 1
        value = call.outputs[place].reshape(-1)
        if not torch.equal(value[index].to(x.dtype).nan_to_num(), x.detach().reshape(-1)[at].nan_to_num()):
            return None
        if len(index):
            whole = len(index) == len(value) == size and bool((at == torch.arange(size, device=at.device)).all())
            entries.append(Entries(call, place) if whole else Entries(call, place, index, at))
    return entries or None


def _sent_back(x: Tensor, codes: Tensor, nodes: list[Any], sizes: list[int]) -> list[Tensor]:
    """Codes of entries, as they arrive at nodes of the graph, flat integers; digit by digit."""
    totals: list[Tensor | int] = [0] * len(nodes)
    weight, rest = 1, codes
    base = _BASE if all(t >= 4 for t in (x.element_size(), *sizes)) else _LOW
    edges = [GradientEdge(node, 0) for node in nodes]
    with unwatched():
        while bool((rest > 0).any()):
            digits = (rest % base).to(x.dtype).view(x.shape)
            found = torch.autograd.grad([x], edges, [digits], retain_graph=True, allow_unused=True)
            for number, gradient in enumerate(found):
                if gradient is not None:
                    totals[number] = totals[number] + weight * gradient.detach().reshape(-1).round().long()
            weight, rest = weight * base, rest // base
    return [t if isinstance(t, Tensor) else codes.new_zeros(0) for t in totals]


def flat_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Positional and keyword arguments, flat, and how they belong together."""
    return tree_flatten((args, kwargs))
