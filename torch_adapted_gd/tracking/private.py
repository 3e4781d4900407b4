"""All use of private parts of torch."""

import contextlib
import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode


def in_transform() -> bool:
    """Whether a `torch.func` transform is in progress; its tensors are wrappers that do not outlive it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor without the wrappers of differentiating transforms; the wrapper of a batched tensor stays."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def bottom(tensor: Tensor) -> Tensor:
    """The tensor without any wrappers of transforms."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def is_batched(gradient: Tensor) -> bool:
    """Whether a gradient is of many backward passes at once, as in `torch.autograd.functional.jacobian(vectorize=True)`."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(gradient) or functorch.is_functorch_wrapped_tensor(gradient)


def owner_of(node: Any, tensor: Tensor) -> Any:
    """An object that keeps the node of an edge alive, or None if the edge does.

    The graph owns the node of a Python function, an edge of torch 2.6 does not. Asking for a gradient at the node after the
    graph was freed crashes. Edges of newer torch hold a token that keeps the node alive.
    """
    if "ownership_token" in GradientEdge._fields or not isinstance(node, torch._C._FunctionBase):
        return None
    with torch.enable_grad():
        return tensor.view_as(tensor).grad_fn


def backward_pass() -> int:
    """The number of the backward pass in progress, -1 outside of one."""
    return int(torch._C._current_graph_task_id())


def will_reach(node: Any, *, else_: bool) -> bool:
    """Whether the backward pass in progress will reach a node; ``else_`` for an input of `torch.autograd.grad`."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return else_


def leave(mode: TorchFunctionMode) -> None:
    """Leave a function mode of this thread. Modes that were entered later stay, as two watchers may end in any order."""
    if not any(torch._C._get_function_stack_at(i) is mode for i in range(torch._C._len_torch_function_stack())):
        return
    above = []
    while (innermost := torch._C._pop_torch_function_stack()) is not mode:
        above.append(innermost)
    for other in reversed(above):
        torch._C._push_on_torch_function_stack(other)


def disable_compilation(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, never to be traced into a compiled model."""
    return torch._disable_dynamo(function)  # type: ignore[attr-defined]


def not_compiled_alone(function: Any) -> None:
    """Have a function not compiled where plain code calls it. What is traced may contain it."""
    from torch._dynamo.eval_frame import skip_code  # heavy; torch itself imports it in the first step

    skip_code(function.__code__)


def is_tracing() -> bool:
    """Whether `torch.jit.trace` is in progress."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined, no-any-return, no-untyped-call]


def is_exporting() -> bool:
    """Whether `torch.export` is in progress; torch 2.6 does not tell."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


@functools.cache
def opened(function: types.FunctionType) -> Callable[..., Any]:
    """A copy of a Python function of torch whose operations a function mode sees one by one.

    The original passes itself to the mode as a whole. The copy has the same code without that.
    """
    asks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    names = {**function.__globals__, **dict.fromkeys(asks, lambda *_: False)}
    inner = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    inner.__kwdefaults__ = function.__kwdefaults__
    return inner


def dtype_at(node: Any) -> torch.dtype | None:
    """The dtype of the output of a node of the graph."""
    known = getattr(node, "_input_metadata", None)
    return known[0].dtype if known else None


def see_first(parameter: Tensor, handle: torch.utils.hooks.RemovableHandle) -> None:
    """Let a hook of a parameter see gradients before hooks of the user edit them."""
    hooks = cast(OrderedDict[int, Any], parameter._backward_hooks)
    others = {key: hook for key, hook in hooks.items() if key != handle.id}
    own = hooks[handle.id]
    hooks.clear()  # torch reads the plain dict, whose order move_to_end leaves as it is
    hooks.update({handle.id: own, **others})


@contextlib.contextmanager
def without_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Context in which backward passes to parameters run none of their hooks, which may edit gradients."""
    hooked = [cast(OrderedDict[int, Any], p._backward_hooks) for p in parameters if p._backward_hooks]
    before = [dict(hooks) for hooks in hooked]
    for hooks in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, known in zip(hooked, before, strict=True):
            hooks.update(known)


def passes(module: nn.Module) -> int:
    """The number of calls of ``module`` in progress in this thread."""
    found = 0
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        found += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
        frame = frame.f_back
    return found


def outermost(module: nn.Module, before: Any, after: Any) -> None:
    """Make a pre-hook the first and a hook the last, before and after hooks of the user, which a repeated call runs too."""
    pre_hooks = cast(OrderedDict[int, Any], module._forward_pre_hooks)
    hooks = cast(OrderedDict[int, Any], module._forward_hooks)
    if before.id in pre_hooks and next(iter(pre_hooks)) != before.id:
        pre_hooks.move_to_end(before.id, last=False)
    if after.id in hooks and next(reversed(hooks)) != after.id:
        hooks.move_to_end(after.id)
