"""Hooks on modules that end with their watcher, and do not disturb copied, saved, scripted and exported models."""

import contextlib
import copy
import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import private
from .state import replaying

Handles = tuple[torch.utils.hooks.RemovableHandle, torch.utils.hooks.RemovableHandle]
_PREPARE = "__prepare_scriptable__"  # what torch.jit.script asks each module for


def watch_calls(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> Handles:
    """Call methods of an object before and after each forward pass while it lives, ``after`` also after an error."""
    private.not_compiled_alone(_Hook.__call__)
    handles = (
        module.register_forward_pre_hook(_Hook(before), prepend=True, with_kwargs=True),
        module.register_forward_hook(_Hook(after), with_kwargs=True, always_call=True),
    )
    vars(module)[_PREPARE] = _WithoutHooks(module)
    weakref.finalize(before.__self__, _unwatch, weakref.ref(module), handles)  # type: ignore[attr-defined]
    return handles


def gradient_hook(method: Callable[..., None], *known: Any) -> Callable[[Tensor | None], None]:
    """A tensor hook that passes what is ``known`` and a gradient of the user's to a method while its object lives."""
    reference = weakref.WeakMethod(method)

    def arrived(gradient: Tensor | None) -> None:
        told = reference()
        # None: the loss uses another output of the same operation only.
        if told is not None and gradient is not None and not replaying() and not private.is_batched(gradient):
            told(*known, gradient)

    return arrived


def _unwatch(reference: weakref.ref[nn.Module], handles: Handles) -> None:
    for handle in handles:
        handle.remove()
    module = reference()
    if module is not None and not any(isinstance(hook, _Hook) for hook in module._forward_hooks.values()):
        vars(module).pop(_PREPARE, None)


class Passes(threading.local):
    """What is known of the passes of a module that are in progress in this thread, the outermost first."""

    def __init__(self) -> None:
        self.under_way: list[Any] = []


class _Hook:
    """A module hook with a weak reference to a method. In copied and saved models it does nothing."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method: Callable[[], Any] = weakref.WeakMethod(method)

    def __call__(self, *arguments: Any) -> Any:
        """Call the watcher. Strict export traces this function, and must not trace ``_tell``."""
        return None if private.is_exporting() else self._tell(*arguments)

    @private.disable_compilation
    def _tell(self, *arguments: Any) -> Any:
        if replaying() or private.is_tracing():
            return None
        method = self._method()
        return None if method is None else method(*arguments)

    # Strict export of torch 2.6 cannot be detected. Its error for a function that must not be compiled shows this name.
    _tell.__qualname__ = "AdaptedGD's hook (delete the optimizer before exporting, or use torch.export with strict=False)"

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        inert = _Hook(self.__call__)
        inert._method = lambda: None
        return inert

    def __reduce__(self) -> tuple[Any, ...]:
        # nullcontext().__exit__ takes any arguments and does nothing, so that a saved model loads where this package is
        # not installed.
        return getattr, (contextlib.nullcontext(), "__exit__")


class _WithoutHooks:
    """Returns a watched module without our hooks, which `torch.jit.script` cannot compile."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self) -> nn.Module:
        """A module that shares everything else with the watched one."""
        module = self._module()
        assert module is not None
        bare = module.__new__(type(module))
        bare.__dict__.update(vars(module))
        del bare.__dict__[_PREPARE]
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = vars(module)[name]
            bare.__dict__[name] = OrderedDict((key, hook) for key, hook in hooks.items() if not isinstance(hook, _Hook))
        prepare = getattr(bare, _PREPARE, None)  # a method of the user's own
        return bare if prepare is None else prepare()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_WithoutHooks":
        return _WithoutHooks(memo[id(self._module())])

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (copy.copy, self._module())
