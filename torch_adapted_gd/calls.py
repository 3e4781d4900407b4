"""A call of a model: its inputs, conditions, outputs and their gradients, and its exact replay."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

_replaying = False


def replaying() -> bool:
    """Whether a call is being replayed: no recorder may take a replay for a call of the user's."""
    return _replaying


def underlying(model: nn.Module) -> nn.Module:
    """The user's own module, without what ``torch.compile`` or data parallelism wrapped around it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def _autocast_state(model: nn.Module) -> list[tuple[str, torch.dtype, bool]]:
    kinds = sorted({"cpu", *(p.device.type for p in model.parameters())})
    return [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]


@dataclass
class Conditions:
    """All that the outcome of a forward pass depends on, besides its inputs and the parameters."""

    cpu_rng: Tensor
    cuda_rng: dict[int, Tensor]
    autocast: list[tuple[str, torch.dtype, bool]]
    training: list[bool]
    buffers: dict[str, tuple[Tensor, int, Tensor]]  # name -> (buffer, its version, its value) before the pass

    @classmethod
    def now(cls, model: nn.Module) -> "Conditions":
        """Take them down from the present state of the model and of the random number generators."""
        model = underlying(model)
        return cls(
            cpu_rng=torch.get_rng_state(),
            cuda_rng={i: torch.cuda.get_rng_state(i) for i in _cuda_devices(model)},
            autocast=_autocast_state(model),
            training=[module.training for module in model.modules()],
            buffers={name: (b, _version(b), b.detach().clone()) for name, b in model.named_buffers()},
        )

    def random_numbers_drawn(self) -> bool:
        """Whether any generator has moved since."""
        return not torch.equal(self.cpu_rng, torch.get_rng_state()) or any(
            not torch.equal(state, torch.cuda.get_rng_state(i)) for i, state in self.cuda_rng.items()
        )

    def rewind(self) -> None:
        """Set the random number generators back to where they were."""
        torch.set_rng_state(self.cpu_rng)
        for i, state in self.cuda_rng.items():
            torch.cuda.set_rng_state(state, i)

    @contextlib.contextmanager
    def restored(self, model: nn.Module) -> Iterator[None]:
        """Bring them back for a replay, and leave everything as it was found."""
        global _replaying
        modules = list(model.modules())
        modes = [module.training for module in modules]
        outer = _replaying
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=list(self.cuda_rng)))
            self.rewind()
            for kind, dtype, enabled in self.autocast:
                # No cache of low-precision weights: under torch.func they are wrappers that must not outlive it.
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in modules):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            try:
                _replaying = True
                for module, mode in zip(modules, self.training, strict=True):
                    module.training = mode
                yield
            finally:
                _replaying = outer
                for module, mode in zip(modules, modes, strict=True):
                    module.training = mode


@dataclass(eq=False)
class Call:
    """One call of a model, with all that is needed to repeat it.

    Attributes:
        number: Counts the calls of a recorder.
        args: Positional inputs, tensors detached.
        kwargs: Keyword inputs, tensors detached.
        conditions: Random state, autocast, modes and buffers in force.
        outputs: The values of the floating outputs that depend on parameters, by place among the output's leaves.
        random: Whether the pass drew random numbers.
        gradients: What the loss sent back to each output, float64, by the same places. Filled by backward passes.
    """

    number: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    conditions: Conditions
    outputs: dict[int, Tensor]
    random: bool
    gradients: dict[int, Tensor] = field(default_factory=dict)
    _differentiable: list[bool] = field(default_factory=list)  # the inputs that required a gradient
    _inputs: list[tuple[Tensor, int]] = field(default_factory=list)  # with their versions at the call
    _parameters: dict[str, tuple[int, torch.dtype, torch.device]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        number: int,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        start: Conditions,
        output: Any,
    ) -> "Call":
        """Take down a call that has just returned ``output``."""
        model = underlying(model)
        differentiable = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs))]
        args, kwargs = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        start.buffers = {
            name: (buffer, version, value)
            for name, (buffer, version, value) in start.buffers.items()
            if _version(buffer) != version  # the others need no copy
        }
        return cls(
            number=number,
            args=args,
            kwargs=kwargs,
            conditions=start,
            outputs={i: leaf.detach().clone() for i, leaf in output_leaves(output).items()},
            random=start.random_numbers_drawn(),
            _differentiable=differentiable,
            _inputs=[(leaf, _version(leaf)) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)],
            _parameters={name: (p._version, p.dtype, p.device) for name, p in model.named_parameters()},
        )

    @property
    def places(self) -> list[int]:
        """The outputs that the loss saw; before any backward pass, all of them."""
        return sorted(self.gradients or self.outputs)

    def check_unchanged(self, model: nn.Module) -> None:
        """Make sure that the inputs and the model are still those of the call.

        Raises:
            RuntimeError: An input or a parameter was changed in place, or the model was moved or cast.
        """
        for tensor, version in self._inputs:
            if _version(tensor) != version:
                raise RuntimeError(
                    f"An input of shape {list(tensor.shape)} was changed in place between the model's call and `step`. "
                    "The Jacobian is taken at the inputs of the call: give the model a copy, or step first."
                )
        for name, p in underlying(model).named_parameters():
            version, dtype, device = self._parameters.get(name, (p._version, p.dtype, p.device))
            if (p.dtype, p.device) != (dtype, device):
                raise RuntimeError(
                    f"Parameter '{name}' was {dtype} on {device} when the model was called and is {p.dtype} on {p.device} "
                    "now. Move or cast the model before the forward pass whose loss you step on."
                )
            if p._version != version:
                raise RuntimeError(
                    f"Parameter '{name}' was changed between the model's call and `step`, so the loss's gradient belongs "
                    "to other parameters than the Jacobian would. Call this optimizer's `step` before anything else that "
                    "changes the model; for parts of one model use one AdaptedGD with parameter groups."
                )

    def differentiable_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword inputs, those of the leaves requiring a gradient that did so in the call."""
        leaves, structure = tree_flatten((self.args, self.kwargs))
        marks = zip(leaves, self._differentiable, strict=True)
        args, kwargs = tree_unflatten([leaf.detach().requires_grad_() if mark else leaf for leaf, mark in marks], structure)
        return args, kwargs

    def function(self, model: nn.Module) -> Callable[..., list[Tensor]]:
        """The call as a function of ``(parameters and buffers by name, args, kwargs)``; returns ``places``' outputs."""
        model = underlying(model)
        places = self.places

        def forward(state: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
            leaves = tree_leaves(functional_call(model, state, args, kwargs))
            return [leaves[i] for i in places]

        return forward

    def buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """Fresh copies of the buffers as they were before the call, so that a replay updates none of the model's."""
        then = {name: value for name, (_, _, value) in self.conditions.buffers.items()}
        return {name: then.get(name, b).detach().clone() for name, b in underlying(model).named_buffers()}


def output_leaves(output: Any) -> dict[int, Tensor]:
    """The floating tensors of a pytree that a gradient can reach, each once, by place."""
    found: dict[int, Tensor] = {}
    for i, leaf in enumerate(tree_leaves(output)):
        reachable = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.grad_fn is not None
        if reachable and not any(leaf is other for other in found.values()):
            found[i] = leaf
    return found


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Call:
    """Call the model once and take the call down; its buffers and the random stream stay as they were.

    Args:
        model: The model to call.
        args: Its positional inputs.
        kwargs: Its keyword inputs.
    """
    kwargs = kwargs or {}
    start = Conditions.now(model)
    call = Call(0, args, kwargs, start, {}, random=False)
    module = underlying(model)
    state = dict(module.named_parameters())
    with start.restored(module), torch.enable_grad():
        output = functional_call(module, {**state, **call.buffers(model)}, args, kwargs)
        return Call.of(0, model, args, kwargs, start, output)


def stacked(tensors: list[Tensor]) -> Tensor:
    """Outputs with the batch first, as one vector x in sample-major order (2.9): ``[N, ...]`` each → ``[N·Q]``."""
    n = tensors[0].shape[0]
    return torch.cat([t.reshape(n, -1) for t in tensors], dim=1).reshape(-1)
