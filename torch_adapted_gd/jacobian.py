"""The output Jacobian D = ∂x/∂θ (2.12), by its definition: what every faster way is tested against."""

import functools
import textwrap
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from .calls import Call, record, stacked, underlying
from .checks import one_of, positive_integer
from .memory import require_memory

State = dict[str, Tensor]

METHODS = ("per_sample", "whole_batch", "row_by_row")
_CHUNK_BYTES = 2**28  # what one chunk of D may take beside D itself, unless the caller says otherwise


def output_jacobian(
    model: nn.Module, x: Tensor | tuple[Any, ...], *, method: str = "auto", chunk_size: int | None = None
) -> Tensor:
    """Jacobian D = ∂x/∂θ of all outputs with respect to all trainable parameters, equation (2.12).

    Row i·Q + q is output q of sample i (2.9); the columns follow ``model.named_parameters()``, frozen ones left out.
    Outputs may be any pytree of floating tensors with the batch first: a sample's Q outputs are their concatenation.

    The model is called as it is (training mode, autocast, random state): dropout draws the mask that a call at this
    moment would draw. Its buffers, modes and gradients and the random number stream are left as they were.

    Args:
        model: The network f_θ.
        x: Its input with the batch first, ``[N, ...]``, or a tuple of positional inputs.
        method: ``"per_sample"`` (``vmap`` over samples of ``jacrev``; right when samples do not interact),
            ``"whole_batch"`` (``jacrev`` of the batch's outputs; right for BatchNorm in training mode too, at N times the
            work), ``"row_by_row"`` (a plain backward pass for each output, for what ``torch.func`` does not support), or
            ``"auto"``: the first of them whose outputs agree with those of a plain call.
        chunk_size: Samples (``per_sample``) or outputs (``whole_batch``) differentiated at a time; by default as many as
            keep a chunk near 256 MiB.

    Returns:
        D of shape ``[N·Q, K]``, in the parameters' dtype and on their device.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: No parameter is trainable, no output depends on one, or an argument is out of range.
        MemoryError: D would not fit.
        RuntimeError: No method reproduces the model's own outputs.

    Source: Chen & Muñoz Ewald, "Gradient flow in parameter space is equivalent to linear interpolation in output space".

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> output_jacobian(model, torch.ones(5, 3)).shape
        torch.Size([10, 8])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` should be a torch.nn.Module, but got {type(model).__name__}.")
    names = [name for name, p in underlying(model).named_parameters() if p.requires_grad]
    if not names:
        raise ValueError("`model` should have trainable parameters, but none requires a gradient.")
    one_of("method", method, ("auto", *METHODS))
    call = record(model, x if isinstance(x, tuple) else (x,))
    if not call.outputs:
        raise ValueError("`model` should return floating outputs that depend on its parameters, but none does.")
    return call_jacobian(model, call, names, method=method, chunk_size=chunk_size)[0]


def call_jacobian(
    model: nn.Module, call: Call, names: list[str], *, method: str = "auto", chunk_size: int | None = None
) -> tuple[Tensor, str]:
    """D of one recorded call, and the method that served.

    Args:
        model: The network.
        call: The call whose outputs are differentiated: those that the loss saw.
        names: The parameters to differentiate by, in the order of the columns.
        method: As in `output_jacobian`.
        chunk_size: As in `output_jacobian`.

    Returns:
        D of shape ``[N·Q, K]`` and one of `METHODS`.
    """
    if chunk_size is not None:
        positive_integer("chunk_size", chunk_size)
    work = _Differentiation(underlying(model), call, names, chunk_size)
    if work.matrix.numel() == 0:
        return work.matrix, METHODS[0]
    refusals = []
    for way in METHODS if method == "auto" else (method,):
        try:
            with call.conditions.restored(work.model), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the user's own call gave the model's; functorch's help nobody here
                getattr(work, way)()
            return work.matrix, way
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # torch.func refuses with many types
            if method != "auto" and not isinstance(error, _DisagreementError):
                raise
            refusals.append(f"{way}: {textwrap.shorten(str(error).split(chr(10), 1)[0], 300)}")
    raise RuntimeError(
        "The model's call could not be repeated with the same outputs, so its Jacobian is not known. A forward pass has "
        "to depend on nothing but its inputs, parameters, buffers and torch's random numbers (no numpy or Python random "
        "numbers, no counters), and per_sample needs samples that do not interact. Tried " + "; ".join(refusals) + "."
    )


def batch_and_outputs(call: Call) -> tuple[int, int]:
    """N and Q of a call.

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


def precision(call: Call, dtype: torch.dtype) -> float:
    """Machine epsilon of the arithmetic that a call ran in: of ``dtype``, its outputs or autocast, the coarsest."""
    kinds = {x.device.type for x in call.outputs.values()}
    lowered = [low for kind, low, enabled in call.conditions.autocast if enabled and kind in kinds]
    return max(torch.finfo(t).eps for t in (dtype, *lowered, *(x.dtype for x in call.outputs.values())))


class _DisagreementError(RuntimeError):
    """A replay gave other outputs than the call."""


class _Differentiation:
    """The work of filling D for one call, with the three ways to do it. Each runs under the call's conditions."""

    def __init__(self, model: nn.Module, call: Call, names: list[str], chunk_size: int | None) -> None:
        self.model = model
        self.call = call
        self.chunk_size = chunk_size
        self.n, self.q = batch_and_outputs(call)
        parameters = dict(model.named_parameters())
        self.moving = {name: parameters[name].detach() for name in names}
        self.fixed = {name: p.detach() for name, p in parameters.items() if name not in self.moving}
        self.forward = call.function(model)
        dtype, device = _dtype_and_device(list(self.moving.values()))
        shape = (self.n * self.q, sum(p.numel() for p in self.moving.values()))
        require_memory(
            2 * shape[0] * shape[1] * dtype.itemsize,
            device,
            f"A Jacobian of {shape[0]:,} outputs by {shape[1]:,} parameters in {dtype}, and its making,",
            "Use fewer samples at a time or train fewer parameters.",
        )
        self.matrix = torch.empty(shape, dtype=dtype, device=device)  # [NQ, K]

    def per_sample(self) -> None:
        """``vmap`` over samples of ``jacrev``."""
        leaves, structure = tree_flatten((self.call.args, self.call.kwargs))
        batched = [isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == self.n for leaf in leaves]
        samples = [leaf for leaf, is_batched in zip(leaves, batched, strict=True) if is_batched]
        if not samples:
            raise _DisagreementError(f"no input tensor has the batch size {self.n} as its first dimension")

        def one(moving: State, buffers: State, *sample: Tensor) -> tuple[Tensor, Tensor]:
            rest = iter(sample)
            inputs = [next(rest).unsqueeze(0) if b else leaf for leaf, b in zip(leaves, batched, strict=True)]
            outputs = self.forward({**self.fixed, **moving, **buffers}, *tree_unflatten(inputs, structure))
            x = torch.cat([output.reshape(-1) for output in outputs])  # [Q]
            return x, x

        over_samples = (None, None, *[0] * len(samples))
        step = self.chunk_size or self._chunk(self.q)
        if self.call.random:
            # The batch drew its random numbers at once: so must all samples, and first see whether they are the same.
            step = self.n
            sampled = vmap(one, in_dims=over_samples, randomness="different")
            self._check_outputs(sampled(self.moving, self._buffers(), *samples)[1])
            self.call.conditions.rewind()
        differentiate = vmap(jacrev(one, has_aux=True), in_dims=over_samples, randomness="different")
        for start in range(0, self.n, step):
            chunk = [sample[start : start + step] for sample in samples]
            blocks, x = differentiate(self.moving, self._buffers(), *chunk)
            self._check_outputs(x, start * self.q)
            self._fill(start * self.q, x.numel(), blocks)

    def whole_batch(self) -> None:
        """``jacrev`` of the batch's outputs as one vector."""

        def batch(moving: State, buffers: State) -> tuple[Tensor, Tensor]:
            x = stacked(self.forward({**self.fixed, **moving, **buffers}, self.call.args, self.call.kwargs))  # [NQ]
            return x, x

        with torch.no_grad():  # cheap, and spares NQ backward passes for nothing
            self._check_outputs(batch(self.moving, self._buffers())[0])
        self.call.conditions.rewind()
        rows = self.chunk_size or min(64, self._chunk(1))
        # The buffers are an argument because torch.func lets nothing else be updated in place.
        blocks, x = jacrev(batch, has_aux=True, chunk_size=rows)(self.moving, self._buffers())
        self._check_outputs(x)
        self._fill(0, x.numel(), blocks)

    def row_by_row(self) -> None:
        """A plain backward pass for each output."""
        moving = {name: p.clone().requires_grad_() for name, p in self.moving.items()}
        with torch.enable_grad():
            state = {**self.fixed, **moving, **self._buffers()}
            x = stacked(self.forward(state, *self.call.differentiable_inputs()))
            outputs = x.unbind()
        self._check_outputs(x.detach())
        if _uses_reentrant_checkpoints(x):
            raise RuntimeError("the model uses torch.utils.checkpoint with use_reentrant=True; only use_reentrant=False works")
        for row, output in enumerate(outputs):
            gradients = torch.autograd.grad(output, list(moving.values()), retain_graph=True, materialize_grads=True)
            self._fill(row, 1, dict(zip(moving, gradients, strict=True)))

    def _chunk(self, rows: int) -> int:
        """How many times ``rows`` rows of D fit into a chunk."""
        return max(1, _CHUNK_BYTES // max(1, rows * self.matrix.shape[1] * self.matrix.element_size()))

    def _buffers(self) -> State:
        return self.call.buffers(self.model)

    def _fill(self, start: int, count: int, blocks: State) -> None:
        """Write blocks ``[count rows..., *parameter]`` side by side into D."""
        column = 0
        for block in blocks.values():
            flat = block.to_dense().reshape(count, -1)
            self.matrix[start : start + count, column : column + flat.shape[1]] = flat
            column += flat.shape[1]

    def _check_outputs(self, x: Tensor, start: int = 0) -> None:
        """Compare the outputs of a replay with those of the call, from row ``start`` on."""
        reference = stacked([self.call.outputs[place] for place in self.call.places])
        x = x.reshape(-1)
        expected = reference[start : start + x.numel()]
        if x.shape != expected.shape or (start == 0 and self.n * self.q < x.numel()):
            raise _DisagreementError(f"the replay gave {x.numel()} outputs where the call gave {expected.numel()}")
        scale = reference.abs().max().double()
        tolerance = min(1e3 * precision(self.call, x.dtype), 0.05) * scale
        difference = (x.double() - expected.double()).abs().max()
        if torch.isfinite(reference).all() and not difference <= tolerance:
            raise _DisagreementError(f"outputs of the replay differ by up to {difference:.2g}, at a size of {scale:.2g}")


def _dtype_and_device(parameters: list[Tensor]) -> tuple[torch.dtype, torch.device]:
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise ValueError(
            f"The trained parameters should be on one device, but are on {sorted(map(str, devices))}. Move the model to one."
        )
    return functools.reduce(torch.promote_types, [p.dtype for p in parameters]), devices.pop()


def _uses_reentrant_checkpoints(x: Tensor) -> bool:
    """Whether a checkpoint hides its parameters from `torch.autograd.grad`, which would then return zeros for them."""
    seen = set()
    nodes = [x.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False
