"""Which calls of a model a loss went through.

The way of a call: a forward hook on the model sees it, a tensor hook on each of its outputs waits for a gradient, and a
hook on the parameters confirms that the gradient was on its way to them. Only then does anything outlive the user's own
autograd graph, so calls that never reach a loss leave nothing behind.
"""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call, Conditions, output_leaves, replaying


class _Hook:
    """A module hook that holds its recorder weakly and stays behind when the model is copied or saved."""

    def __init__(self, recorder: "CallRecorder", method: Callable[..., None]) -> None:
        self._recorder = weakref.ref(recorder)
        self._method = method

    @torch._disable_dynamo  # type: ignore[attr-defined]  # as torch.optim does: not to be traced into a compiled model
    def __call__(self, *arguments: Any) -> None:
        recorder = self._recorder()
        if recorder is not None and not replaying():
            self._method(recorder, *arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model is not watched. nullcontext().__exit__ takes any arguments and does nothing, so that a
        # saved model loads where this package is not installed.
        return getattr, (contextlib.nullcontext(), "__exit__")


class CallRecorder:
    """Watches a model and the parameters to be stepped.

    Attributes:
        calls: The calls that a loss went through since the last `drop`, in the order in which they were made.
        gradients: ∇_θC as backward passes delivered it since the last `drop`, by parameter name: what `.grad` would
            hold, before anyone clips or edits it.
        dropped_by: What emptied the recorder last, for the message of a step that finds no call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Call] = []
        self.gradients: dict[str, Tensor] = {}
        self.dropped_by: str | None = None
        self._start: tuple[tuple[Any, ...], dict[str, Any], Conditions] | None = None
        self._count = 0
        self._pending: list[tuple[Call, int, Tensor]] = []
        self._frozen: dict[str, nn.Parameter] = {}
        handles = [
            # First of all hooks, so that a replay runs the user's pre-hooks once, on what they were given.
            model.register_forward_pre_hook(_Hook(self, CallRecorder._before), prepend=True, with_kwargs=True),
            model.register_forward_hook(_Hook(self, CallRecorder._after), with_kwargs=True),
        ]
        self._finalizer = weakref.finalize(self, _remove, handles)

    def watch(self, name: str, parameter: nn.Parameter) -> None:
        """Have gradients of ``parameter`` confirm calls, for as long as this recorder lives.

        A frozen parameter takes no hook: it gets one in the first forward pass that finds it trainable.
        """
        if not parameter.requires_grad:
            self._frozen[name] = parameter
            return
        reference = weakref.ref(self)

        def arrived(gradient: Tensor) -> None:
            recorder = reference()
            if recorder is not None and not replaying():
                recorder._confirm(name, gradient)

        torch.utils.hooks.unserializable_hook(arrived)  # a saved parameter goes without it
        handle = parameter.register_hook(arrived)
        weakref.finalize(self, handle.remove)

    def drop(self, by: str) -> None:
        """Forget all calls and gradients."""
        if self.calls:
            self.dropped_by = by
        for call in self.calls:  # the user's graph may still hold them, for a second backward pass
            call.gradients = {}
        self.calls = []
        self.gradients = {}
        self._pending.clear()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._start = (args, kwargs, Conditions.now(model)) if torch.is_grad_enabled() else None
        for name, parameter in [item for item in self._frozen.items() if item[1].requires_grad]:
            del self._frozen[name]
            self.watch(name, parameter)

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        start, self._start = self._start, None
        leaves = output_leaves(output)
        if start is None or not leaves:
            return
        args, kwargs, conditions = start  # as given, before any other pre-hook changed them
        call = Call.of(self._count, model, args, kwargs, conditions, output)
        self._count += 1
        reference = weakref.ref(self)
        for place, leaf in leaves.items():
            leaf.register_hook(_arrival(reference, call, place))

    def _arrived(self, call: Call, place: int, gradient: Tensor) -> None:
        """An output received a gradient; whether it will go on to the parameters is not known yet.

        `torch.autograd.grad(output, input)`, as in physics-informed losses, comes by here too and must not count: the
        end of its backward pass takes away what no parameter has confirmed.
        """
        if not self._pending:
            torch.autograd.Variable._execution_engine.queue_callback(self._pending.clear)
        self._pending.append((call, place, gradient.detach().to(torch.float64, copy=True)))

    def _confirm(self, name: str, gradient: Tensor) -> None:
        gradient = gradient.detach().to_dense() if gradient.layout != torch.strided else gradient.detach()
        known = self.gradients.get(name)
        # Never the tensor itself, which becomes `.grad` and may be clipped in place.
        self.gradients[name] = gradient.clone() if known is None else known + gradient
        for call, place, output_gradient in self._pending:
            before = call.gradients.get(place)
            call.gradients[place] = output_gradient if before is None else before + output_gradient
            if call not in self.calls:
                self.calls.append(call)
                self.calls.sort(key=lambda c: c.number)
        self._pending.clear()


def _arrival(reference: "weakref.ref[CallRecorder]", call: Call, place: int) -> Callable[[Tensor], None]:
    def arrived(gradient: Tensor) -> None:
        recorder = reference()
        if recorder is not None:
            recorder._arrived(call, place, gradient)

    return arrived


def _remove(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
