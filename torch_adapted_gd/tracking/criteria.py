"""Watches the calls of criteria, and finds where their arguments come from."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import private
from .calls import Outputs
from .hooks import watch_calls
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
        self._under_way: dict[int, list[Term | None]] = {}
        self._handles = watch_calls(criterion, self, CriterionWatch._before, CriterionWatch._after)

    def _before(self, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        private.outermost(criterion, *self._handles)
        under_way = self._under_way.setdefault(threading.get_ident(), [])
        if private.passes(criterion) <= 1:
            under_way.clear()  # left over from an interrupted call
        recorder = self._recorder()
        term = None
        if recorder is not None:
            recorder.criterion_calls += 1
        if recorder is not None and torch.is_grad_enabled() and not under_way:
            term = _Given(recorder).term(criterion, args, kwargs)
        under_way.append(None if term is None else term[0])
        return None if term is None else term[1:]

    def _after(self, _criterion: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        under_way = self._under_way.get(threading.get_ident(), [])
        term = under_way.pop() if under_way else None
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
            copy.register_hook(recorder.hook(type(recorder).factor_arrived, term, number))
            cast(Any, copy.grad_fn).metadata[MARK] = (recorder.mark, term, None)
        return tree_unflatten([copies.get(id(leaf), leaf) for leaf in leaves], structure) if copies else None


class _Given:
    """Finds where the arguments of a criterion come from."""

    def __init__(self, recorder: CallRecorder) -> None:
        self._recorder = recorder

    def term(
        self, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Term, tuple[Any, ...], dict[str, Any]] | None:
        """The term, and the arguments for the criterion; None if the term is not to be followed."""
        recorder = self._recorder
        leaves, structure = tree_flatten((args, kwargs))
        entries: dict[int, list[Entries]] = {}
        copies: dict[int, Tensor] = {}
        found: dict[int, list[Entries]] = {}
        for number, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or not leaf.requires_grad or not leaf.is_floating_point():
                continue
            if private.is_batched(leaf):  # within torch.func.vmap, no hook sees all samples
                recorder.unusable_criterion = True
                return None
            if id(leaf) not in copies:
                graph = Graph(leaf, recorder.mark, recorder.parameters)
                if graph.of_a_criterion:
                    return None  # the gradient of that criterion's value tells all
                if not graph.depends:
                    continue
                parts = entries_of(leaf, graph.marked) if graph.moved else None
                if parts is not None and any(part.of.outputs[part.place].ndim == 0 for part in parts):
                    parts = None
                copies[id(leaf)] = leaf.clone()
                found[id(leaf)] = parts or [self._argument(leaf, copies[id(leaf)], graph)]
            entries[number] = found[id(leaf)]
        if not entries:
            return None
        arguments = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        state = State.now(criterion, (leaf for leaf in arguments if isinstance(leaf, Tensor)))
        term = Term(criterion, arguments, structure, entries, state, number=recorder.criterion_calls)
        args, kwargs = tree_unflatten([copies.get(id(leaf), leaf) for leaf in leaves], structure)
        return term, args, kwargs

    def _argument(self, leaf: Tensor, copy: Tensor, graph: Graph) -> Entries:
        """An argument that is differentiated itself."""
        recorder = self._recorder
        argument = recorder.arguments.get(id(leaf))
        if argument is None or argument.leaf() is not leaf:
            calls = [call for call in recorder.kept if graph.touches(call.tapes)]
            calls = list(dict.fromkeys([*calls, *(call for _, call, _ in graph.marked.values())]))
            tapes = [*(tape for call in calls for tape in call.tapes), *recorder.tapes_under_way]
            rows = leaf.reshape(1) if leaf.ndim == 0 else leaf
            argument = Argument({0: rows.detach().clone()}, tapes=list(dict.fromkeys(tapes)), behind={0: rows}, calls=calls)
            argument.leaf, argument.eps = weakref.ref(leaf), graph.eps
            recorder.arguments[id(leaf)] = argument
            if (model := recorder.model()) is not None:
                argument.remember(model)
        copy.register_hook(recorder.hook(type(recorder).arrived, argument, 0))
        return Entries(argument, 0)


class Argument(Outputs):
    """An argument of a criterion that does not consist of entries of outputs; ``leaf`` is the user's tensor."""

    leaf: weakref.ref[Tensor]
