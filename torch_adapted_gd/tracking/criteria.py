"""Watches the calls of criteria, and finds where their arguments come from."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import private
from .calls import Outputs
from .hooks import Passes, gradient_hook, watch_calls
from .terms import MARK, Entries, Graph, State, Term, entries_of

if TYPE_CHECKING:
    from .recorder import CallRecorder


class CriterionWatch:
    """Watches one criterion for a recorder.

    The criterion gets copies of outputs, and its caller gets copies of its values. So the gradients of the copies belong to
    this call alone.
    """

    def __init__(self, recorder: CallRecorder, criterion: nn.Module) -> None:
        self._recorder = weakref.ref(recorder)
        self._passes = Passes()
        self._handles = watch_calls(criterion, self._before, self._after)

    def _before(self, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        private.outermost(criterion, *self._handles)
        under_way = self._passes.under_way
        if private.passes(criterion) <= 1:
            under_way.clear()  # left over from an interrupted call
        recorder = self._recorder()
        term, given = None, None
        if recorder is not None:
            recorder.criterion_calls += 1
        if recorder is not None and torch.is_grad_enabled() and not under_way:
            term, given = _followed(recorder, criterion, args, kwargs)
        under_way.append(term)
        return given

    def _after(self, _criterion: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        under_way = self._passes.under_way
        term: Term | None = under_way.pop() if under_way else None
        recorder = self._recorder()
        if term is None or output is None or recorder is None:
            return None
        term.state.forget_unused()
        leaves, structure = tree_flatten(output)
        copies: dict[int, Tensor] = {}
        for number, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or not leaf.requires_grad or id(leaf) in copies:
                continue
            copies[id(leaf)] = copy = leaf.clone()
            term.values[number] = leaf.detach().clone()
            copy.register_hook(gradient_hook(recorder.factor_arrived, term, number))
            cast(Any, copy.grad_fn).metadata[MARK] = (recorder.mark, term, None)
        return tree_unflatten([copies.get(id(leaf), leaf) for leaf in leaves], structure) if copies else None


def _followed(
    recorder: CallRecorder, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Term | None, Any]:
    """The term, and the arguments for the criterion; None twice if the term is not to be followed."""
    leaves, structure = tree_flatten((args, kwargs))
    entries: dict[int, list[Entries]] = {}
    copies: dict[int, Tensor] = {}
    found: dict[int, list[Entries]] = {}
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not leaf.requires_grad or not leaf.is_floating_point():
            continue
        if private.is_batched(leaf):  # within torch.func.vmap, no hook sees all samples
            recorder.unusable_criterion = True
            return None, None
        if id(leaf) not in copies:
            graph = Graph(leaf, recorder.mark, recorder.parameters)
            if graph.of_a_criterion:
                return None, None  # the gradient of that criterion's value tells all
            if not graph.depends:
                continue
            parts = entries_of(leaf, graph.marked) if graph.moved else None
            if parts is not None and any(part.of.outputs[part.place].ndim == 0 for part in parts):
                parts = None
            copies[id(leaf)] = copy = leaf.clone()
            if parts is None:
                argument = _argument(recorder, leaf, graph)
                copy.register_hook(gradient_hook(recorder.arrived, argument, 0))
                parts = [Entries(argument, 0)]
            found[id(leaf)] = parts
        entries[number] = found[id(leaf)]
    if not entries:
        return None, None
    arguments = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    state = State(criterion, (leaf for leaf in arguments if isinstance(leaf, Tensor)))
    term = Term(criterion, arguments, structure, entries, state, number=recorder.criterion_calls)
    return term, tree_unflatten([copies.get(id(leaf), leaf) for leaf in leaves], structure)


def _argument(recorder: CallRecorder, leaf: Tensor, graph: Graph) -> Outputs:
    """An argument that does not consist of entries of outputs, and is differentiated itself."""
    argument = recorder.arguments.get(id(leaf))
    if argument is not None and argument.behind.get(0) is leaf:
        return argument
    calls = [call for call in recorder.kept if graph.touches(call.tapes)]
    calls = list(dict.fromkeys([*calls, *(call for _, call, _ in graph.marked.values())]))
    tapes = [*(tape for call in calls for tape in call.tapes), *recorder.tapes_under_way]
    value = leaf.detach().clone().reshape(leaf.shape or (1,))
    argument = Outputs({0: value}, tapes=list(dict.fromkeys(tapes)), behind={0: leaf}, calls=calls, eps=graph.eps)
    recorder.arguments[id(leaf)] = argument
    if (model := recorder.model()) is not None:
        argument.remember(model)
    return argument
