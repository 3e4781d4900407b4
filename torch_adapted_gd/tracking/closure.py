"""The user's closure, evaluated at trial parameters without side effects."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .calls import Conditions, underlying
from .state import unharmed, unwatched

Given = list[tuple[nn.Module, list[Any]]]  # calls of criteria, in their order: which one, and its arguments


class Closure:
    """A closure that clears gradients, computes the loss, calls ``backward`` and returns the loss.

    Args:
        function: The user's.
        model: The network; each evaluation starts from the same random numbers and buffers.
        criterion_calls: The number of calls of criteria before.
    """

    def __init__(self, function: Callable[[], Any], model: nn.Module, criterion_calls: int) -> None:
        self._function, self._model, self.criterion_calls = function, model, criterion_calls
        self._start = Conditions.now(model)
        self.returned: Any = None

    def __call__(self) -> Any:
        """Evaluate it for the step; random numbers, buffers and ``.grad`` change as usual."""
        with torch.enable_grad():
            self.returned = self._function()
        return self.returned

    @property
    def value(self) -> float:
        """The returned loss as a number; a TypeError if it is none."""
        return _number(self.returned)

    def at(self, values: dict[str, Tensor], criteria: Iterable[nn.Module]) -> tuple[float, Given]:
        """The loss at other values of parameters, by name, and the calls of criteria; then all is as before.

        Raises:
            TypeError: The closure does not return a number.
        """
        given: Given = []

        def called(criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            leaves = tree_leaves((args, kwargs))
            given.append((criterion, [_copy(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]))

        with contextlib.ExitStack() as stack:
            for criterion in criteria:
                stack.callback(criterion.register_forward_pre_hook(called, with_kwargs=True).remove)
            with self._restored(values), torch.enable_grad():
                return _number(self._function()), given

    @contextlib.contextmanager
    def _restored(self, values: dict[str, Tensor]) -> Iterator[None]:
        model = underlying(self._model)
        parameters = dict(model.named_parameters())
        gradients = [(p, p.grad, None if p.grad is None else p.grad.detach().clone()) for p in parameters.values()]
        with unharmed(model, (*parameters.values(), *model.buffers())), self._start.random.again(), unwatched():
            try:
                with torch.no_grad():
                    for name, value in values.items():
                        parameters[name].copy_(value)
                    for name, b in model.named_buffers():
                        b.copy_(self._start.buffers.get(name, b))
                yield
            finally:
                for p, gradient, entries in gradients:
                    if gradient is not None and entries is not None:
                        gradient.detach().copy_(entries)
                    p.grad = gradient


def _copy(leaf: Tensor) -> Tensor:
    return leaf.detach().clone() if leaf.requires_grad else leaf


def _number(returned: Any) -> float:
    if isinstance(returned, Tensor) and returned.numel() == 1 and not returned.is_complex():
        return float(returned.detach())
    if isinstance(returned, Real) and returned is not True and returned is not False:
        return float(returned)
    shape = f" of shape {list(returned.shape)}" if isinstance(returned, Tensor) else ""
    raise TypeError(
        f"`closure` should return the loss as one number, but returned a {type(returned).__name__}{shape}. Parameters and "
        "state are as they were. Return what you called backward on."
    )
