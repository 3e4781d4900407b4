"""Repeating a recorded call: to differentiate it, or with other parameters."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from .calls import Call, Outputs, hides_its_graph, stacked

State = dict[str, Tensor]


class DisagreementError(RuntimeError):
    """A repeated call gave other outputs."""


class Replay:
    """A call to be repeated. All that runs the model has to be within ``with replay.conditions():``.

    Attributes:
        model: The user's module, unwrapped.
        call: The call.
        names: The parameters to differentiate by.
        n: N, the batch size of the outputs that the loss depends on.
        q: Q, the number of these outputs for each sample.
    """

    def __init__(self, model: nn.Module, call: Call, names: list[str]) -> None:
        self.model = model
        self.call = call
        self.names = names
        self.n, self.q = batch_and_outputs(call)

    def forward(self, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The outputs that the loss depends on, for these parameters, buffers and inputs."""
        leaves = tree_leaves(functional_call(self.model, state, args, kwargs))
        return [leaves[place] for place in self.call.places]

    @contextlib.contextmanager
    def conditions(self) -> Iterator[None]:
        """The conditions of the call, without warnings of the model, which the user's own call gave, and of functorch."""
        with self.call.conditions.restored(self.model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    def copies(self) -> tuple[State, State]:
        """Copies of the parameters to differentiate by, and of all other tensors before the call; the model may change them."""
        parameters = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        moving = {name: parameters.pop(name) for name in self.names}
        return moving, {**parameters, **self.call.buffers(self.model)}

    def with_graph(self, mode: Callable[[State, State, bool], AbstractContextManager[Any]]) -> tuple[State, list[Tensor]]:
        """The parameters to differentiate by, and the outputs with their graph.

        Args:
            mode: Returns the context that the model runs in, given these parameters, all other parameters and buffers, and
                whether an input requires a gradient.

        Raises:
            DisagreementError: The outputs differ from those of the call, or the graph does not have all parameters.
        """
        with self.conditions(), torch.enable_grad():
            inputs = self.call.inputs.assembled()
            moving, rest = self.copies()
            # Not leaves, because a model cannot change a leaf in place.
            given = {name: value.requires_grad_().clone() for name, value in moving.items()}
            differentiable = any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(inputs))
            with mode(given, rest, differentiable):
                outputs = self.forward({**rest, **given}, *inputs)
        self.check_outputs(stacked(outputs).detach())
        if any(map(hides_its_graph, outputs)):
            raise DisagreementError("The model uses torch.utils.checkpoint, of which only use_reentrant=False works.")
        return given, outputs

    def outputs_with(self, values: State) -> Tensor:
        """Outputs ``[NQ]`` for other values of parameters, by name.

        Without a graph, unless the model asks for one, as by ``h.register_hook`` or ``h.retain_grad``.
        """
        try:
            return self._outputs_with(values, graph=False)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError):
            return self._outputs_with(values, graph=True)

    def _outputs_with(self, values: State, *, graph: bool) -> Tensor:
        with self.conditions(), torch.enable_grad():  # the grad mode of the call, for models that take derivatives
            inputs = self.call.inputs.assembled()
            given = {}
            for name, p in self.model.named_parameters():
                value = values.get(name, p).detach().requires_grad_(graph and p.requires_grad)
                given[name] = value.clone()  # no leaf: a forward pass may change it in place
            return stacked(self.forward({**given, **self.call.buffers(self.model)}, *inputs)).detach()

    def check_outputs(self, x: Tensor) -> None:
        """Raise a DisagreementError if outputs differ from those of the call."""
        reference = stacked([self.call.outputs[place] for place in self.call.places])
        x = x.reshape(-1)
        if x.shape != reference.shape:
            raise DisagreementError(f"it gave {x.numel()} outputs where the call gave {reference.numel()}")
        scale = reference.abs().max().double()
        # Some fused CUDA operations, such as weight_norm's, round float64 to float32.
        tolerance = min(max(1e3 * precision(self.call, x.dtype), 1e-7), 0.05) * scale
        difference = (x.double() - reference.double()).abs().max()
        if torch.isfinite(reference).all() and not difference <= tolerance:
            raise DisagreementError(f"its outputs differ by up to {difference:.2g}, at a size of {scale:.2g}")


def batch_and_outputs(call: Outputs) -> tuple[int, int]:
    """N and Q of outputs; a ValueError if they do not share a first dimension."""
    shapes = [call.outputs[place].shape for place in call.places]
    if any(len(shape) == 0 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            "The model's outputs should all have the batch as their first dimension, but those of the loss have "
            f"shapes {[list(shape) for shape in shapes]}. Return per-sample outputs, or reduce them outside the model."
        )
    n = shapes[0][0]
    return n, sum(shape.numel() for shape in shapes) // max(n, 1)


def precision(call: Outputs, dtype: torch.dtype) -> float:
    """Machine epsilon of the arithmetic of outputs, the coarsest of ``dtype``, their own dtypes and autocast's."""
    kinds = {x.device.type for x in call.outputs.values()}
    autocast = call.conditions.autocast if isinstance(call, Call) else []
    lowered = [low for kind, low, enabled in autocast if enabled and kind in kinds]
    found: list[float] = [piece.linearized.eps for piece in call.linearized.values()]
    return max(call.eps, *(torch.finfo(t).eps for t in (dtype, *lowered, *(x.dtype for x in call.outputs.values()))), *found)
