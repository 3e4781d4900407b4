"""What forward passes of our own leave as it was: random numbers and modules, and recorders, which do not see them."""

import contextlib
import threading
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

_thread = threading.local()


def replaying() -> bool:
    """Whether this thread runs a pass of our own, which recorders must ignore."""
    return getattr(_thread, "replaying", False)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Context for forward and backward passes of our own."""
    outer = replaying()
    _thread.replaying = True
    try:
        yield
    finally:
        _thread.replaying = outer


class RandomNumbers:
    """The present states of torch's default generators, that of the CPU and those of the GPUs that some tensors are on."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
        self._states = self._now()

    def _now(self) -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]

    def drawn(self) -> bool:
        """Whether random numbers were drawn since."""
        return not all(map(torch.equal, self._states, self._now()))

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Context in which the same numbers are drawn again; at its end, the generators are as before it."""
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._devices, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def visible_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model whose attributes are Python's: all but those that were scripted or traced."""
    return (module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule))


@contextlib.contextmanager
def unharmed(module: nn.Module, tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """Context at whose end a module has its attributes, parameters and buffers again, and some tensors have their values."""
    held = [d for each in visible_modules(module) for d in (each._parameters, each._buffers, each.__dict__)]
    kept = [(now, dict(now)) for now in held]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        for now, before in kept:
            if now.keys() != before.keys() or any(now[name] is not value for name, value in before.items()):
                now.clear()
                now.update(before)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):  # the version does not tell: batch norm does not change it
                    tensor.copy_(value)
