"""Hooks on modules that leave no trace: of copies, saved models and what outlives its watcher."""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch

from . import private
from .calls import replaying


class Hook:
    """A module hook that holds its recorder weakly and stays behind when the model is copied or saved."""

    def __init__(self, recorder: Any, method: Callable[..., Any]) -> None:
        self._recorder = weakref.ref(recorder)
        self._method = method

    @private.disable_compilation
    def __call__(self, *arguments: Any) -> Any:
        """Tell the recorder, but not of passes of our own."""
        if replaying() or private.is_tracing():
            return None
        recorder = self._recorder()
        return None if recorder is None else self._method(recorder, *arguments)

    # Strict export refuses to trace what must not be compiled, and names it: that has to say what to do.
    __call__.__qualname__ = "AdaptedGD's hook (delete the optimizer before exporting, or use torch.export with strict=False)"

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":  # what torch.jit.script asks a hook for first
            raise AttributeError(
                "AdaptedGD watches this model by hooks, which torch.jit.script cannot compile. Delete the optimizer before "
                "(del optimizer), or use torch.jit.trace or torch.export."
            )
        raise AttributeError(name)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model is not watched. nullcontext().__exit__ takes any arguments and does nothing, so that a
        # saved model loads where this package is not installed.
        return getattr, (contextlib.nullcontext(), "__exit__")


def remove(handles: tuple[torch.utils.hooks.RemovableHandle, ...]) -> None:
    """Take hooks away."""
    for handle in handles:
        handle.remove()
