"""A recorded call repeated: with copies of the parameters to differentiate by, and its outputs held against the call's."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .calls import Call, Outputs, hides_its_graph, stacked

State = dict[str, Tensor]


class DisagreementError(RuntimeError):
    """A replay gave other outputs than the call."""


class Replay:
    """The repetition of one call. Everything that runs the model belongs into a ``with replay.conditions():``.

    Attributes:
        model: The user's module, unwrapped.
        call: The call.
        names: The parameters to differentiate by.
        n: N, the batch size of the outputs that the loss saw.
        q: Q, their number for each sample.
    """

    def __init__(self, model: nn.Module, call: Call, names: list[str]) -> None:
        self.model = model
        self.call = call
        self.names = names
        self.n, self.q = batch_and_outputs(call)
        self.forward = call.function(model)

    @contextlib.contextmanager
    def conditions(self) -> Iterator[None]:
        """The conditions of the call, without the warnings of the model (the user's own call gave them) and of functorch."""
        with self.call.conditions.restored(self.model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    def copies(self) -> tuple[State, State]:
        """Copies of the parameters to differentiate by, in the order of ``names``, and of all else as before the call.

        A forward pass may change them in place.
        """
        parameters = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        moving = {name: parameters.pop(name) for name in self.names}
        return moving, {**parameters, **self.call.buffers(self.model)}

    def with_graph(self, mode: Callable[[State, State, bool], AbstractContextManager[Any]]) -> tuple[State, list[Tensor]]:
        """The parameters to differentiate by, and outputs computed from them, with their graph.

        Args:
            mode: Makes the context that the model runs in, of those parameters, of all others and buffers, and of whether some
                input requires a gradient.

        Raises:
            DisagreementError: These are not the call's outputs, or gradients of parameters would be lost.
        """
        with self.conditions(), torch.enable_grad():
            inputs = self.call.inputs.assembled(self.call.inputs.differentiable_leaves())
            moving, rest = self.copies()
            # Not leaves: autograd lets nobody change one in place.
            given = {name: value.requires_grad_().clone() for name, value in moving.items()}
            differentiable = any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(inputs))
            with mode(given, rest, differentiable):
                outputs = self.forward({**rest, **given}, *inputs)
        self.check_outputs(stacked(outputs).detach())
        if any(map(hides_its_graph, outputs)):
            raise DisagreementError("The model uses torch.utils.checkpoint, of which only use_reentrant=False works.")
        return given, outputs

    def outputs_with(self, values: State) -> Tensor:
        """Outputs ``[NQ]`` for other values of parameters, by name; no graph of these is made."""
        with self.conditions(), torch.enable_grad():  # grad mode is as in the call, for models that differentiate within
            inputs = self.call.inputs.assembled(self.call.inputs.differentiable_leaves())
            # Copies: a forward pass may change them in place.
            given = {name: values.get(name, p).detach().clone() for name, p in self.model.named_parameters()}
            return stacked(self.forward({**given, **self.call.buffers(self.model)}, *inputs)).detach()

    def check_outputs(self, x: Tensor) -> None:
        """Compare the outputs of a replay with those of the call.

        Raises:
            DisagreementError: They differ.
        """
        reference = stacked([self.call.outputs[place] for place in self.call.places])
        x = x.reshape(-1)
        if x.shape != reference.shape:
            raise DisagreementError(f"it gave {x.numel()} outputs where the call gave {reference.numel()}")
        scale = reference.abs().max().double()
        # Some of CUDA's fused operations, such as weight_norm's, round numbers of float64 to float32 inside.
        tolerance = min(max(1e3 * precision(self.call, x.dtype), 1e-7), 0.05) * scale
        difference = (x.double() - reference.double()).abs().max()
        if torch.isfinite(reference).all() and not difference <= tolerance:
            raise DisagreementError(f"its outputs differ by up to {difference:.2g}, at a size of {scale:.2g}")


def batch_and_outputs(call: Outputs) -> tuple[int, int]:
    """N and Q of outputs that belong together.

    Raises:
        ValueError: The outputs do not share a first dimension.
    """
    shapes = [call.outputs[place].shape for place in call.places]
    if any(len(shape) == 0 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            "The model's outputs should all have the batch as their first dimension, but those that the loss saw have "
            f"shapes {[list(shape) for shape in shapes]}. Return per-sample outputs, or reduce them outside the model."
        )
    n = shapes[0][0]
    return n, sum(shape.numel() for shape in shapes) // max(n, 1)


def precision(call: Outputs, dtype: torch.dtype) -> float:
    """Machine epsilon of the arithmetic that outputs came from: of ``dtype``, theirs or autocast's, the coarsest."""
    kinds = {x.device.type for x in call.outputs.values()}
    autocast = call.conditions.autocast if isinstance(call, Call) else []
    lowered = [low for kind, low, enabled in autocast if enabled and kind in kinds]
    found = [piece.linearized.eps for piece in call.linearized.values()]
    return max(call.eps, *(torch.finfo(t).eps for t in (dtype, *lowered, *(x.dtype for x in call.outputs.values()))), *found)
