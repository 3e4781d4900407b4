"""Records the calls of a model that a loss depends on.

A forward hook on the model sees each call, and a tensor hook on each output sees the gradient of a loss. Hooks on the
parameters confirm that this gradient reaches ``.grad``. Only then is anything kept beyond the user's own autograd graph.
"""

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from . import private
from .calls import Call, Conditions, Inputs, Outputs, compiled, graph, output_leaves, underlying
from .criteria import CriterionWatch
from .hooks import Passes, gradient_hook, watch_calls
from .state import replaying
from .tape import Tape, constants_of
from .terms import MARK, Term

Linearize = Callable[[Outputs, int, nn.Module, dict[str, Tensor]], None]

_KEPT = 256  # most calls that are kept in case a criterion is given derivatives of their outputs


class CallRecorder:
    """Watches a model, the parameters to be stepped, and the criteria of the loss.

    Args:
        model: The model.
        criteria: The criteria.
        linearize: Linearizes an output, by its place, in the parameters while its graph is alive; fills ``linearized``.

    Attributes:
        calls: The calls that a loss depends on since the last `drop`, in the order of the calls.
        terms: The calls of criteria in that loss.
        gradients: ∇_θC as backward passes computed it since the last `drop`, by ``id`` of the parameter. It is what ``.grad``
            holds, unless the user clips or edits that.
        dropped_by: What emptied the recorder last, for the error of a step that finds no call.
        arguments: Arguments of criteria that were computed from outputs, by ``id`` of the tensor.
        kept: Calls whose derivatives a criterion may be given.
        criterion_calls: The number of calls of criteria.
        model: A weak reference to the model.
        parameters: Weak references to the parameters to be stepped, by ``id``.
        mark: Marks outputs of recorded calls in the graph.
        unusable_criterion: Whether a criterion was called within a transform, where it cannot be followed.
        unusable_output: The type of the last output, if no gradient can reach any of it.
    """

    def __init__(self, model: nn.Module, criteria: tuple[nn.Module, ...], linearize: Linearize) -> None:
        self._linearize = linearize
        self.calls: list[Call] = []
        self.terms: list[Term] = []
        self.criterion_calls = 0
        self._criteria = criteria
        self.mark = object()
        self.kept: list[Call] = []
        self.arguments: weakref.WeakValueDictionary[int, Outputs] = weakref.WeakValueDictionary()
        self.gradients: dict[int, Tensor] = {}
        self.dropped_by: str | None = None
        self.unusable_output: str | None = None
        self.unusable_criterion = False
        self._passes = Passes()
        self._count = 0
        self._pending: list[Callable[[], None]] = []
        self._pass = -1
        self.model = weakref.ref(model)
        self.parameters: dict[int, weakref.ref[nn.Parameter]] = {}
        self._frozen: dict[int, nn.Parameter] = {}
        self._handles = watch_calls(model, self._before, self._after)
        self._watched = [CriterionWatch(self, criterion) for criterion in criteria]
        weakref.finalize(self, _end, self._passes)

    def watch(self, parameter: nn.Parameter) -> None:
        """Let gradients of a parameter confirm calls. A frozen one gets its hooks when a forward pass finds it trainable."""
        self.parameters[id(parameter)] = weakref.ref(parameter)
        if not parameter.requires_grad:
            self._frozen[id(parameter)] = parameter
            return
        hook = gradient_hook(self._reached, weakref.ref(parameter))
        torch.utils.hooks.unserializable_hook(hook)  # a saved parameter goes without it
        handle = parameter.register_hook(hook)
        private.see_first(parameter, handle)
        weakref.finalize(self, handle.remove)

    def drop(self, by: str, *, spent: bool = False) -> None:
        """Forget all calls and gradients, because of a ``"step"`` or ``"zero_grad"``.

        With ``spent``, the parameters have moved, so that the calls can never be stepped on again.
        """
        if replaying():  # a trial evaluates the user's closure
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
        self.unusable_criterion = False
        self._pending.clear()

    def why_no_call(self) -> str:
        """The error text of a step that finds no call."""
        if self.unusable_criterion and self.gradients:
            return (
                "`criterion` was called within a transform of torch.func, such as vmap, which AdaptedGD cannot follow. Take "
                "derivatives within the transform, and call the criterion outside of it, on the result for all samples."
            )
        if self._criteria and self.gradients:
            names = " or ".join(type(criterion).__name__ for criterion in self._criteria)
            return (
                f"`criterion` was not called on anything that was computed from the parameters, although they received "
                f"gradients. Compute the loss with the same {names} object that AdaptedGD was given: "
                "loss = criterion(model(x), y). For a loss that is a function, give criterion=LossFunction(function) and call "
                "that; or leave `criterion` out."
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
                "AdaptedGD the module whose outputs enter the loss: for a model that was compiled and called before, the "
                "compiled one."
            )
        if self.dropped_by == "zero_grad":
            return f"{text}: zero_grad dropped it. Call zero_grad before backward or after step, not between them."
        since = " since the last step, which used up those before" if self.dropped_by == "step" else ""
        return (
            f"{text}{since}. Call model(x) with gradients enabled (not under torch.no_grad()), compute the loss from its "
            "output, and call loss.backward() before each step. torch.autograd.grad does not count, because it does not fill "
            "`.grad`."
        )

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the inputs and conditions of a forward pass, and start its tape."""
        private.outermost(model, *self._handles)
        if private.backward_pass() < 0:
            self._pending.clear()  # of a backward pass that raised; the next one may begin at a parameter, without outputs
        for parameter in [p for p in self._frozen.values() if p.requires_grad]:
            del self._frozen[id(parameter)]
            self.watch(parameter)
        under_way = self._passes.under_way
        if under_way and private.passes(model) <= 1:
            _end(self._passes)  # what is left over from an interrupted pass, of which no hook is told
        within = any(call is not None for call in under_way)  # a model calls itself
        if within or _is_redirected(model) or not torch.is_grad_enabled():
            under_way.append(None)
            return
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        marks = [node.metadata[MARK] for node in graph(*leaves) if MARK in node.metadata]
        before = [call for recorder, call, place in marks if recorder is self.mark and place is not None]
        call = Call(inputs=Inputs(args, kwargs), conditions=Conditions.now(model), nested=bool(before))
        under_way.append(call)
        if compiled(model):
            return  # it is called again for its Jacobian
        named = self.named(model)
        tape = Tape(
            named,
            constants_of(underlying(model), named),
            differentiable=any(leaf.requires_grad for leaf in leaves),
            still_runs=lambda: private.passes(model) > 0,
        )
        call.tapes = [*dict.fromkeys(tape for each in before for tape in each.tapes), tape]
        tape.__enter__()  # type: ignore[no-untyped-call]

    @property
    def tapes_under_way(self) -> list[Tape]:
        """The tapes of forward passes in progress."""
        return [call.tapes[-1] for call in self._passes.under_way if call is not None and call.tapes]

    def named(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters to be stepped, by name."""
        named = underlying(model).named_parameters()
        return {name: p for name, p in named if id(p) in self.parameters and p.requires_grad}

    def _after(self, model: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> Any:
        """Record the call, and wait for gradients of its outputs."""
        under_way = self._passes.under_way
        call: Call | None = under_way.pop() if under_way else None
        if call is None:
            return None
        for tape in call.tapes:
            tape.finish()
        leaves = output_leaves(output)
        self.unusable_output = None if leaves or output is None else type(output).__name__  # None: it raised an exception
        if not leaves:
            return None
        call.complete(model, output)
        call.number = self._count
        self._count += 1
        # The user gets copies. Hooks on copies are not called when we differentiate the outputs behind them. If one output is
        # computed from another, each copy still gets its own gradient. And the user may change a view in place.
        all_leaves, structure = tree_flatten(output)
        copies = {id(leaf): leaf.clone() for leaf in leaves.values()}
        if call.tapes:
            call.behind = leaves
            if self._criteria and call.tapes[-1].differentiable:
                self.kept = [*(each for each in self.kept[-_KEPT:] if each.can_be_reached()), call]
                call.returned = [weakref.ref(copy) for copy in copies.values()]
        own = _behind_own_loss(leaves)  # gradients reach these through the loss that the model returns
        if own:
            call.outputs = {place: value for place, value in call.outputs.items() if value.ndim}
        for place in call.outputs:
            copy = copies[id(leaves[place])]
            watched = leaves[place] if place in own else copy
            watched.register_hook(gradient_hook(self.arrived, call, place))
            cast(Any, copy.grad_fn).metadata[MARK] = (self.mark, call, place)
        return tree_unflatten([copies.get(id(leaf), leaf) for leaf in all_leaves], structure)

    def _pass_counts(self) -> bool:
        """Whether the backward pass in progress, in which a gradient has arrived, will fill ``.grad`` of a parameter.

        That of `torch.autograd.grad(output, input)` does not, and must not count. A pass that raised an exception may have left
        gradients behind, which the next one drops.
        """
        if self._pass != private.backward_pass():
            self._pending.clear()
            self._notice_new_pass()
        parameters = (reference() for reference in self.parameters.values())
        return any(_will_be_filled(p) for p in parameters if p is not None)

    def factor_arrived(self, term: Term, number: int, factor: Tensor) -> None:
        """The value of a criterion has received a gradient."""
        if not self._pass_counts():
            return
        for part in term.parts:
            part.of.selected.add(part.place)
        factor = factor.detach().to(torch.float64, copy=True)

        def confirmed() -> None:
            _add(term.factors, number, factor)
            if term not in self.terms:
                self.terms.append(term)

        self._pending.append(confirmed)

    def arrived(self, outputs: Outputs, place: int, gradient: Tensor) -> None:
        """An output, or the argument of a criterion, has received a gradient."""
        model = self.model()
        if not self._pass_counts() or model is None:
            return
        wanted = place not in outputs.linearized and (place in outputs.selected or not self._criteria)
        # Without tapes a call is repeated instead. A compiled graph allows no backward passes besides the user's.
        if wanted and (outputs.tapes or not (isinstance(outputs, Call) or compiled(model))):
            self._linearize(outputs, place, model, self.named(model))
        gradient = gradient.detach().to(torch.float64, copy=True)
        if not isinstance(outputs, Call):
            gradient = gradient.reshape(gradient.shape or (1,))  # a number is one sample

        def confirmed() -> None:
            _add(outputs.gradients, place, gradient)
            if isinstance(outputs, Call) and outputs not in self.calls:
                self.calls.append(outputs)
                self.calls.sort(key=lambda c: c.number)

        self._pending.append(confirmed)

    def _notice_new_pass(self) -> None:
        """At the first gradient of a backward pass, see whether the user cleared ``.grad`` since the last one."""
        self._pass = private.backward_pass()
        pending, self._pending = self._pending, []
        self.notice_cleared()
        self._pending = pending

    def notice_cleared(self) -> None:
        """Drop all calls if each ``.grad`` that they filled was cleared since, as by ``model.zero_grad()``."""
        for key, known in self.gradients.items():
            parameter = self.parameters[key]()
            if parameter is None or parameter.grad is None:
                continue
            if parameter.grad.any() or not known.any():
                return
        if self.gradients:
            self.drop("zero_grad")

    def _reached(self, reference: "weakref.ref[nn.Parameter]", gradient: Tensor) -> None:
        """A gradient has reached a parameter. If ``.grad`` will hold it, the calls that it came through belong to the step."""
        if self._pass != private.backward_pass():
            self._notice_new_pass()
        parameter = reference()
        if parameter is None or not _will_be_filled(parameter):
            return
        # A copy, because the tensor itself becomes `.grad` and may be clipped in place.
        _add(self.gradients, id(parameter), gradient.detach().to_dense().clone())
        for confirmed in self._pending:
            confirmed()
        self._pending.clear()


def _will_be_filled(parameter: nn.Parameter) -> bool:
    """Whether the backward pass in progress will fill ``.grad`` of a parameter."""
    # A gradient may reach one that was frozen after the forward pass, and torch then drops it.
    return parameter.requires_grad and private.will_reach(get_gradient_edge(parameter).node, else_=False)


def _add(totals: dict[int, Tensor], key: int, tensor: Tensor) -> None:
    totals[key] = totals[key] + tensor if key in totals else tensor


def _behind_own_loss(leaves: dict[int, Tensor]) -> set[int]:
    """The outputs from which a model computes a loss that it returns too; gradients of the loss reach these first."""
    others = {leaf.grad_fn: place for place, leaf in leaves.items() if leaf.ndim}
    losses = [leaf for leaf in leaves.values() if not leaf.ndim]
    return {others[node] for node in graph(*losses, ends=others) if node in others} if others else set()


def _is_redirected(model: nn.Module) -> bool:
    """Whether a call of the module runs another method, as Lightning's strategies run ``training_step``."""
    forward = model.__dict__.get("forward")
    return "edirection" in getattr(forward, "__qualname__", "")


def _end(passes: Passes) -> None:
    """Forget the passes of this thread."""
    for call in passes.under_way:
        for tape in [] if call is None else call.tapes:
            tape.finish()
    passes.under_way.clear()
