"""Which calls of a model a loss went through.

The way of a call: a forward hook on the model sees it, a tensor hook on each of its outputs waits for a gradient, and a
hook on the parameters confirms that the gradient was on its way to them. Only then does anything outlive the user's own
autograd graph, so calls that never reach a loss leave nothing behind.
"""

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..checks import checksum
from . import private
from .calls import Call, Conditions, Inputs, Outputs, compiled, graph, output_leaves, replaying, underlying
from .criteria import Argument, CriterionWatch
from .hooks import remove, watch_calls
from .live import linearized_live
from .tape import Tape, constants_of
from .terms import MARK, Term

_KEPT = 256  # calls under which derivatives may be taken that are kept for a criterion to be given these


_REDIRECTED = object()  # in place of a forward pass, where the call of a model runs another method


class _Running:
    """A forward pass under way: what it started from, and the tape that notes its uses of parameters."""

    def __init__(self, inputs: Inputs, conditions: Conditions, before: list[Call]) -> None:
        self.inputs, self.conditions, self.before = inputs, conditions, before
        self.tape: Tape | None = None

    def begin(self, model: nn.Module, parameters: dict[str, Tensor], differentiable: bool) -> None:
        """Start noting."""
        inner = underlying(model)
        self.tape = Tape(
            parameters,
            constants_of(inner, parameters),
            differentiable=differentiable,
            still_runs=lambda: private.passes(model) > 0,
        )
        self.tape.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Stop it."""
        if self.tape is not None:
            self.tape.finish()
            private.leave(self.tape)


class CallRecorder:
    """Watches a model, the parameters to be stepped, and the criteria that make the loss.

    Args:
        model: The model.
        criteria: The criteria.

    Attributes:
        calls: The calls that a loss went through since the last `drop`, in the order in which they were made.
        terms: The calls of criteria that it was made of, likewise.
        gradients: ∇_θC as backward passes delivered it since the last `drop`, by ``id`` of the parameter: what ``.grad``
            would hold, before anyone clips or edits it.
        dropped_by: What emptied the recorder last, for the message of a step that finds no call.
        arguments: What criteria were given that was computed from outputs, by ``id`` of the tensor.
        kept: Calls under which derivatives may have been taken, which a criterion may be given.
        criterion_calls: How often a criterion was called.
        model: The model, as long as it lives.
        parameters: Those to be stepped, by ``id``.
        mark: What outputs of recorded calls are marked with in the graph.
        unusable_criterion: Whether a criterion was called within a transform, where it cannot be followed.
        unusable_output: Type of what the last call returned, if no gradient can reach any of it.
    """

    def __init__(self, model: nn.Module, criteria: tuple[nn.Module, ...] = ()) -> None:
        self.calls: list[Call] = []
        self.terms: list[Term] = []
        self.criterion_calls = 0
        self._criteria = criteria
        self.mark = object()  # what this recorder's outputs are known by in a graph
        self.kept: list[Call] = []
        self.arguments: weakref.WeakValueDictionary[int, Argument] = weakref.WeakValueDictionary()
        self.gradients: dict[int, Tensor] = {}
        self.dropped_by: str | None = None
        self.unusable_output: str | None = None
        self.unusable_criterion = False
        self._threads: dict[int, list[_Running | object | None]] = {}
        self._count = 0
        self._pending: list[Callable[[], None]] = []
        self._pass = -1
        self.model = weakref.ref(model)
        self.parameters: dict[int, weakref.ref[nn.Parameter]] = {}
        self._incoming: dict[int, Tensor] = {}
        self._frozen: dict[int, nn.Parameter] = {}
        self._handles = watch_calls(model, self, CallRecorder._before, CallRecorder._after)
        self._watched = [CriterionWatch(self, criterion) for criterion in criteria]
        weakref.finalize(self, _end_all, self._threads)

    @property
    def _running(self) -> "list[_Running | object | None]":
        """The forward passes under way in this thread, the outermost first."""
        return self._threads.setdefault(threading.get_ident(), [])

    def watch(self, parameter: nn.Parameter) -> None:
        """Have gradients that reach ``parameter`` confirm calls, for as long as this recorder lives.

        A frozen parameter takes no hook: it gets one in the first forward pass that finds it trainable.
        """
        self.parameters[id(parameter)] = weakref.ref(parameter)
        if not parameter.requires_grad:
            self._frozen[id(parameter)] = parameter
            return
        reference = weakref.ref(self)

        def arriving(gradient: Tensor) -> None:
            recorder = reference()
            if recorder is not None and not replaying() and not private.is_batched(gradient):
                recorder._arriving(key, gradient)

        def accumulated(parameter: Tensor) -> None:
            recorder = reference()
            if recorder is not None and not replaying():
                recorder._accumulated(parameter)

        key = id(parameter)
        for hook in (arriving, accumulated):
            torch.utils.hooks.unserializable_hook(hook)  # a saved parameter goes without it
        handles = (parameter.register_hook(arriving), parameter.register_post_accumulate_grad_hook(accumulated))
        weakref.finalize(self, remove, handles)

    def drop(self, by: str, *, spent: bool = False) -> None:
        """Forget all calls and gradients.

        Args:
            by: ``"step"`` or ``"zero_grad"``.
            spent: The parameters have moved, so that the calls can never be stepped on again.
        """
        if replaying():  # a closure that is evaluated for a trial
            return
        if self.calls or self.terms:
            self.dropped_by = by
        outputs = [*self.calls, *(part.of for term in self.terms for part in term.parts)]
        for each in outputs:  # the user's graph may still hold them, for a second backward pass
            each.gradients, each.selected = {}, set()
            if spent:
                each.release()
        for term in self.terms:
            term.factors = {}
        self.calls, self.terms = [], []
        self.kept = []
        self.gradients = {}
        self._forget_pending()

    def job(self, loss_scale: float) -> float:
        """A number for what the loss is computed from beside the parameters: the same for the same inputs, targets, weights.

        NaN where the model draws random numbers, so that the loss is no function of its parameters.
        """
        sources = [part.of for term in self.terms for part in term.parts]
        calls = dict.fromkeys(call for of in sources for call in ([of] if isinstance(of, Call) else of.calls))
        if any(call.random for call in calls):
            return math.nan
        leaves = [leaf for call in calls for leaf in call.inputs.as_given]
        given = [private.bottom(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for term in self.terms:
            given += [leaf for number, leaf in enumerate(term.arguments) if number not in term.entries]
            given += [factor / loss_scale for factor in term.factors.values() if factor.numel() > 1]
        return checksum(given)

    def factors(self, loss_scale: float) -> list[float]:
        """What the loss multiplies terms that are numbers by."""
        found = (factor for term in self.terms for factor in term.factors.values())
        return [float(factor) / loss_scale for factor in found if factor.numel() == 1]

    def loss(self, factors: Sequence[float], loss_scale: float, weights: Sequence[float] | None = None) -> float:
        """The loss, for these factors of the terms that are numbers, and weights of all terms."""
        total, given = 0.0, iter(factors)
        for term, weight in zip(self.terms, weights or [1.0] * len(self.terms), strict=True):
            for number, factor in term.factors.items():
                value = term.values[number].double()
                part = next(given) * float(value) if factor.numel() == 1 else float((factor * value).sum()) / loss_scale
                total += weight * part if weight else 0.0  # the mean of no labels is NaN
        return total

    def why_no_call(self) -> str:
        """What to tell a user whose step finds no call."""
        if self.unusable_criterion and self.gradients:
            return (
                "`criterion` was called within a transform of torch.func, such as vmap, where its terms cannot be told apart. "
                "Take derivatives within it, and call the criterion outside of it on what it returns for all samples."
            )
        if self._criteria and self.gradients:
            names = " or ".join(type(criterion).__name__ for criterion in self._criteria)
            return (
                f"`criterion` was not called on anything that was computed from the parameters, although they received "
                f"gradients. Compute the loss by the very {names} that AdaptedGD was given: loss = criterion(model(x), y). "
                "For a loss that is a function, give criterion=LossFunction(function) and call that; or leave `criterion` out."
            )
        text = "`step` found no call of the model that a loss went through"
        if self.unusable_output:
            return (
                f"{text}: it returned a {self.unusable_output} in which no real floating tensor was computed from parameters. "
                "Return tensors, alone or in tuples, lists, dicts or classes registered with torch.utils._pytree."
            )
        if self.gradients:
            return (
                f"{text}, although the parameters received gradients. The loss was computed from a submodule's call (such as "
                "model.net(x) instead of model(x)), from another wrapper of it, or from derivatives of the outputs alone. Give "
                "AdaptedGD the very module whose outputs enter the loss: for a model that was compiled and called before, the "
                "compiled one."
            )
        if self.dropped_by == "zero_grad":
            return f"{text}: zero_grad dropped it. Call zero_grad before backward or after step, not between them."
        since = " since the last step, which used up those before" if self.dropped_by == "step" else ""
        return (
            f"{text}{since}. Call model(x) with gradients enabled (not under torch.no_grad()), compute the loss from its "
            "output, and call loss.backward() before each step. As it fills `.grad`, backward counts, and torch.autograd.grad "
            "does not."
        )

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take down what the forward pass starts from."""
        private.outermost(model, *self._handles)
        for parameter in [p for p in self._frozen.values() if p.requires_grad]:
            del self._frozen[id(parameter)]
            self.watch(parameter)
        if self._running and not private.passes(model) > 1:
            _end(self._running)  # left over from a pass that was interrupted, which no hook is told of
        if _is_redirected(model):
            self._running.append(_REDIRECTED)
            return
        inner = any(each is not _REDIRECTED for each in self._running)  # a model that calls itself: the outermost call counts
        if inner or not torch.is_grad_enabled():
            self._running.append(None)
            return
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        behind = [call for leaf in leaves for call in self._calls_behind(leaf)]
        running = _Running(Inputs(args, kwargs), Conditions.now(model), behind)
        self._running.append(running)
        if not compiled(model):  # what was compiled runs as a whole, and is run again to be differentiated
            running.begin(model, self.named(model), any(leaf.requires_grad for leaf in leaves))

    def hook(self, method: Callable[..., None], of: Any, number: int) -> Callable[[Tensor | None], None]:
        """A tensor hook that hands a gradient to a method, as long as this recorder lives."""
        reference = weakref.ref(self)

        def arrived(gradient: Tensor | None) -> None:
            recorder = reference()
            # None: an output that the loss does not use, of an operation that has another one that it does.
            if recorder is not None and gradient is not None and not replaying() and not private.is_batched(gradient):
                method(recorder, of, number, gradient)

        return arrived

    @property
    def tapes_under_way(self) -> list[Tape]:
        """Those of forward passes that have not ended."""
        return [running.tape for running in self._running if isinstance(running, _Running) and running.tape is not None]

    def named(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters to be stepped, by name."""
        named = underlying(model).named_parameters()
        return {name: p for name, p in named if id(p) in self.parameters and p.requires_grad}

    def _after(self, model: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> Any:
        """Take the call down and wait for gradients of its outputs."""
        running = self._running.pop() if self._running else None
        if not isinstance(running, _Running):
            return None
        running.end()
        leaves = output_leaves(output)
        self.unusable_output = None if leaves or output is None else type(output).__name__  # None: it raised, or so
        if not leaves:
            return None
        call = Call.of(self._count, model, running.inputs, running.conditions, output)
        call.nested = bool(running.before)
        self._count += 1
        # What is returned are copies. The hooks are on them, and what is behind them can be differentiated without these being
        # called; one output may be computed from another, and the gradient that the user's loss sends to each stays apart; and
        # a view may be changed in place.
        all_leaves, structure = tree_flatten(output)
        copies = {id(leaf): leaf.clone() for leaf in leaves.values()}
        if running.tape is not None:
            call.tapes = [*dict.fromkeys(tape for each in running.before for tape in each.tapes), running.tape]
            call.behind = leaves
            if self._criteria and running.tape.differentiable:
                self.kept = [*(each for each in self.kept[-_KEPT:] if each.can_be_reached()), call]
                call.returned = [weakref.ref(copy) for copy in copies.values()]
                call.noted = len(running.tape.notes)
        own = _behind_own_loss(leaves)  # these a gradient reaches by the loss that the model returns, not by copies
        if own:
            call.outputs = {place: value for place, value in call.outputs.items() if value.ndim}
        for place in call.outputs:
            copy = copies[id(leaves[place])]
            watched = leaves[place] if place in own else copy
            watched.register_hook(self.hook(CallRecorder.arrived, call, place))
            cast(Any, copy.grad_fn).metadata[MARK] = (self.mark, call, place)
        return tree_unflatten([copies.get(id(leaf), leaf) for leaf in all_leaves], structure)

    def _calls_behind(self, tensor: Tensor) -> list[Call]:
        marks = [node.metadata[MARK] for node in graph(tensor) if MARK in node.metadata]
        return [call for recorder, call, _ in marks if recorder is self.mark]

    def _in_pass(self) -> None:
        """Something has arrived; whether it will go on to a parameter's ``.grad`` is not known yet.

        `torch.autograd.grad(output, input)`, as in physics-informed losses, comes by here too and must not count: the
        end of its backward pass takes away what no parameter has confirmed. One that raised never came to its end.
        """
        if self._pass != private.backward_pass():
            self._forget_pending()
            self._notice_new_pass()
        if not self._pending:
            private.at_end_of_backward(self._forget_pending)

    def factor_arrived(self, term: Term, number: int, factor: Tensor) -> None:
        """A criterion's value has received a gradient."""
        self._in_pass()
        if not self._will_be_filled():
            return
        for part in term.parts:
            part.of.selected.add(part.place)
        factor = factor.detach().to(torch.float64, copy=True)

        def confirmed() -> None:
            before = term.factors.get(number)
            term.factors[number] = factor if before is None else before + factor
            if term not in self.terms:
                self.terms.append(term)

        self._pending.append(confirmed)

    def arrived(self, outputs: Outputs, place: int, gradient: Tensor) -> None:
        """An output, or a criterion's argument, has received a gradient."""
        self._in_pass()
        outputs.backward_pass = self._pass
        wanted = place in outputs.selected if self._criteria else True
        model = self.model()
        # A call can be repeated instead; what was compiled allows no backward passes beside the user's own.
        followed = bool(outputs.tapes) or not (isinstance(outputs, Call) or model is None or compiled(model))
        if wanted and followed and model is not None and place not in outputs.linearized and self._will_be_filled():
            linearized_live(outputs, place, model, self.named(model))
        gradient = gradient.detach().to(torch.float64, copy=True)

        def confirmed() -> None:
            before = outputs.gradients.get(place)
            outputs.gradients[place] = gradient if before is None else before + gradient
            if isinstance(outputs, Call) and outputs not in self.calls:
                self.calls.append(outputs)
                self.calls.sort(key=lambda c: c.number)

        self._pending.append(confirmed)

    def _will_be_filled(self) -> bool:
        """Whether the backward pass under way is about to fill ``.grad`` of a parameter."""
        parameters = (reference() for reference in self.parameters.values())
        return any(
            private.will_reach(get_gradient_edge(p).node, else_=False) for p in parameters if p is not None and p.requires_grad
        )

    def _notice_new_pass(self) -> None:
        """Before anything of a backward pass is taken down: was what earlier ones left cleared by other means than ours?"""
        self._pass = private.backward_pass()
        pending, self._pending = self._pending, []
        self.notice_cleared()
        self._pending = pending

    def notice_cleared(self) -> None:
        """Drop all calls if every ``.grad`` that they filled has been cleared since, as by ``model.zero_grad()``."""
        for key, known in self.gradients.items():
            parameter = self.parameters[key]()
            if parameter is None or parameter.grad is None:
                continue
            if parameter.grad.any() or not known.any():
                return
        if self.gradients:
            self.drop("zero_grad")

    def _arriving(self, key: int, gradient: Tensor) -> None:
        """A parameter is about to receive a gradient."""
        if self._pass != private.backward_pass():
            self._notice_new_pass()
        # Never the tensor itself, which becomes `.grad` and may be clipped in place.
        self._incoming[key] = gradient.detach().to_dense().clone()

    def _accumulated(self, parameter: Tensor) -> None:
        """A parameter has received a gradient in ``.grad``: the calls that sent it on belong to the step."""
        gradient = self._incoming.pop(id(parameter), None)
        if gradient is None:
            return
        known = self.gradients.get(id(parameter))
        self.gradients[id(parameter)] = gradient if known is None else known + gradient
        for confirmed in self._pending:
            confirmed()
        self._pending.clear()

    def _forget_pending(self) -> None:
        self._pending.clear()
        self._incoming.clear()


def _behind_own_loss(leaves: dict[int, Tensor]) -> set[int]:
    """The outputs that a model's own loss, a number that it returns beside them, was computed from first."""
    others = {leaf.grad_fn: place for place, leaf in leaves.items() if leaf.ndim}
    found, seen = set(), set()
    nodes = [leaf.grad_fn for leaf in leaves.values() if not leaf.ndim] if others else []
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in others:
            found.add(others[node])
        else:
            nodes += [following for following, _ in node.next_functions]
    return found


def _is_redirected(model: nn.Module) -> bool:
    """Whether another method is run in a module's call, as Lightning's strategies run ``training_step``."""
    forward = model.__dict__.get("forward")
    return "edirection" in getattr(forward, "__qualname__", "")


def _end_all(threads: "dict[int, list[_Running | object | None]]") -> None:
    for running in list(threads.values()):
        _end(running)


def _end(running: "list[_Running | object | None]") -> None:
    for each in running:
        if isinstance(each, _Running):
            each.end()
    running.clear()
