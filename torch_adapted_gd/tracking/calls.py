"""A call of a model: its inputs, conditions, outputs and their gradients, and its exact replay."""

import contextlib
import weakref
from collections.abc import Container, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .state import RandomNumbers, unharmed, unwatched

if TYPE_CHECKING:
    from .tape import Tape


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Context without autocast on a type of device. It costs nothing without autocast, because a step enters it often."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def underlying(model: nn.Module) -> nn.Module:
    """The user's own module, without what ``torch.compile`` or data parallelism wrapped around it."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def compiled(model: nn.Module) -> bool:
    """Whether any part of a model was given to ``torch.compile``."""
    return any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclass
class Conditions:
    """What the result of a forward pass depends on, besides its inputs and the parameters."""

    random: RandomNumbers
    autocast: list[tuple[str, torch.dtype, bool]]
    training: dict[str, bool]  # by the module's name
    buffers: dict[str, Tensor]  # copies of their values before the pass

    @classmethod
    def now(cls, model: nn.Module) -> "Conditions":
        """The current conditions of a model."""
        model = underlying(model)
        kinds = sorted({"cpu", *(p.device.type for p in model.parameters())})
        return cls(
            random=RandomNumbers(model.parameters()),
            autocast=[(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds],
            training={name: module.training for name, module in model.named_modules()},
            buffers={name: b.detach().clone() for name, b in model.named_buffers()},
        )

    @contextlib.contextmanager
    def restored(self, model: nn.Module) -> Iterator[None]:
        """Context in which they are in force. At its end, modules, buffers and random numbers are as before."""
        with contextlib.ExitStack() as stack:
            # A backward pass computes checkpointed parts again, with the model's own buffers.
            stack.enter_context(unharmed(model, model.buffers()))
            stack.enter_context(self.random.again())
            for kind, dtype, enabled in self.autocast:
                # No cache of low-precision weights: torch.func would leave its wrappers in it.
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            if compiled(model):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(unwatched())
            for name, module in model.named_modules():
                module.training = self.training.get(name, module.training)
            yield


@dataclass(eq=False)
class Outputs:
    """Tensors of the user's graph that the loss is a function of: a part of x.

    Attributes:
        outputs: Their values, by place.
        gradients: The gradients of the loss, float64, by the same places. Backward passes fill it.
        selected: The places of which a criterion was given entries.
        tapes: The operations with parameters that they depend on, while the graph is alive; empty if it cannot be followed.
        behind: The tensors in the graph, while it is alive.
        linearized: Their linearizations, a `Piece` of a Jacobian each, from the first backward pass that reached them.
        calls: The calls that they were computed from, unless this is a call itself.
        eps: Machine epsilon of the coarsest dtype on the way from these calls.
    """

    outputs: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    selected: set[int] = field(default_factory=set)
    tapes: "list[Tape]" = field(default_factory=list)
    behind: dict[int, Tensor] = field(default_factory=dict)
    linearized: dict[int, Any] = field(default_factory=dict)
    calls: "list[Call]" = field(default_factory=list)
    eps: float = 0.0
    _parameters: dict[str, tuple[int, torch.dtype, torch.device]] = field(default_factory=dict)

    @property
    def places(self) -> list[int]:
        """The outputs that the loss depends on; before any backward pass, all of them."""
        return sorted(self.selected or self.gradients or self.outputs)

    def remember(self, model: nn.Module) -> None:
        """Record the versions of the parameters."""
        named = underlying(model).named_parameters()
        self._parameters = {name: (_version(p), p.dtype, p.device) for name, p in named}

    def check_unchanged(self, model: nn.Module) -> None:
        """Raise a RuntimeError if a parameter was changed in place since the call, or the model was moved or cast."""
        for name, p in underlying(model).named_parameters():
            version, dtype, device = self._parameters.get(name, (_version(p), p.dtype, p.device))
            if (p.dtype, p.device) != (dtype, device):
                raise RuntimeError(
                    f"Parameter '{name}' was {dtype} on {device} when the model was called and is {p.dtype} on {p.device} "
                    "now. Move or cast the model before the forward pass whose loss you step on."
                )
            if _version(p) != version:
                raise RuntimeError(
                    f"Parameter '{name}' was changed between the model's call and `step`, so the loss's gradient and the "
                    "Jacobian belong to different parameters. Call this optimizer's `step` before anything else that changes "
                    "the model; for parts of one model use one AdaptedGD with parameter groups."
                )

    def release(self) -> None:
        """Release all that a step needed, as the user's graph may live on."""
        self.outputs, self.behind, self.linearized, self.tapes, self.calls = {}, {}, {}, [], []


@dataclass(eq=False, kw_only=True)
class Call(Outputs):
    """One call of a model, with all that is needed to repeat it.

    Attributes:
        number: The number of the call in its recorder.
        inputs: Copies of the inputs.
        conditions: The conditions of the call.
        outputs: The values of the floating outputs that depend on parameters, by place among the leaves of the output.
        random: Whether the forward pass drew random numbers.
        nested: Whether an input was computed from the output of another recorded call.
        returned: Weak references to the tensors that the user got.
    """

    inputs: "Inputs"
    conditions: Conditions
    number: int = 0
    random: bool = False
    nested: bool = False
    returned: "list[weakref.ref[Tensor]]" = field(default_factory=list)

    def complete(self, model: nn.Module, output: Any) -> None:
        """Record what the call has just returned."""
        self.outputs = {place: leaf.detach().clone() for place, leaf in output_leaves(output).items()}
        self.random = self.conditions.random.drawn()
        self.remember(model)

    def can_be_reached(self) -> bool:
        """Whether a criterion may still be given a tensor that was computed from this call."""
        return any(tape.derived_after for tape in self.tapes) or any(tensor() is not None for tensor in self.returned)

    def check_alone(self) -> None:
        """Raise a RuntimeError if the loss also went through another call, so that without a criterion x is not known."""
        if self.nested:
            raise RuntimeError(
                "A call of the model has an input that was computed from the output of another call of it, and the loss "
                "depends on both, so AdaptedGD cannot tell which outputs the loss is a function of. Give it the loss as "
                "`criterion`, or a module that makes all the calls and returns what the loss is computed from."
            )

    def release(self) -> None:
        """See `Outputs`."""
        super().release()
        self.inputs = Inputs((), {})
        self.conditions.buffers = {}

    def buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """Copies of the buffers before the call, so that a repeated call changes none of the model's."""
        then = self.conditions.buffers
        return {name: then.get(name, b).detach().clone() for name, b in underlying(model).named_buffers()}


class Inputs:
    """Copies of a call's positional and keyword inputs, made before the forward pass can change them."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self._structure = tree_flatten((args, kwargs))
        self.as_given = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._differentiable = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves]

    @property
    def leaves(self) -> list[Any]:
        """Fresh copies of the leaves, for a pass that may change them."""
        return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.as_given]

    def assembled(self, leaves: list[Any] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword inputs with these leaves; by default copies that require a gradient as in the call."""
        if leaves is None:
            marks = zip(self.leaves, self._differentiable, strict=True)
            leaves = [leaf.requires_grad_() if mark else leaf for leaf, mark in marks]
        args, kwargs = tree_unflatten(leaves, self._structure)
        return args, kwargs


def output_leaves(output: Any) -> dict[int, Tensor]:
    """The floating tensors of a pytree with a graph, each once, by place."""
    found: dict[int, Tensor] = {}
    for i, leaf in enumerate(tree_leaves(output)):
        reachable = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.grad_fn is not None
        if reachable and not any(leaf is other for other in found.values()):
            found[i] = leaf
    return found


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Call:
    """Call the model once, and record the call; buffers and random numbers stay as they were."""
    with torch.inference_mode(False), torch.enable_grad():
        call = Call(inputs=Inputs(args, kwargs or {}), conditions=Conditions.now(model))
        module = underlying(model)
        state = {**dict(module.named_parameters()), **call.buffers(model)}
        with call.conditions.restored(module):
            given, given_by_name = call.inputs.assembled()
            call.complete(model, functional_call(module, state, given, given_by_name))
        return call


def stacked(tensors: list[Tensor]) -> Tensor:
    """Outputs with the batch first, as one vector x in sample-major order (2.9): ``[N, ...]`` each → ``[N·Q]``."""
    n = tensors[0].shape[0]
    return torch.cat([t.reshape(n, t.shape[1:].numel()) for t in tensors], dim=1).reshape(-1)


def hides_its_graph(tensor: Tensor) -> bool:
    """Whether `torch.utils.checkpoint` with ``use_reentrant=True`` hides parameters from `torch.autograd.grad`."""
    return any(node.name() == "CheckpointFunctionBackward" for node in graph(tensor))


def graph(*tensors: Tensor, ends: Container[Any] = ()) -> Iterator[Any]:
    """The nodes of the autograd graph that tensors were computed by, and none that is behind one of ``ends`` alone."""
    seen = set()
    nodes = [tensor.grad_fn for tensor in tensors]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node not in ends:
            nodes += [following for following, _ in node.next_functions]
