"""The output Jacobian D = ∂x/∂θ (2.12), by its definition: what every faster way is tested against."""

import contextlib
import functools
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from ..calls import Call, record, stacked, underlying
from ..checks import one_of, positive_integer
from ..memory import require_memory
from ..replay import DisagreementError, Replay, State, precision

METHODS = ("per_sample", "whole_batch", "row_by_row")
BLOCK_ELEMENTS = 2**20  # columns of D are turned to float64 this many entries (8 MiB) at a time
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
    one_of("method", method, ("auto", *METHODS))
    with torch.inference_mode(False):
        call, names = recorded(model, x)
        return call_jacobian(model, call, names, method=method, chunk_size=chunk_size).matrix


def recorded(model: nn.Module, x: Tensor | tuple[Any, ...]) -> tuple[Call, list[str]]:
    """A call of the model with ``x``, and the names of its trainable parameters.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: No parameter is trainable, one is complex, or no output depends on one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` should be a torch.nn.Module, but got {type(model).__name__}.")
    names = [name for name, p in underlying(model).named_parameters() if p.requires_grad]
    if not names:
        raise ValueError("`model` should have trainable parameters, but none requires a gradient.")
    parameters = dict(underlying(model).named_parameters())
    for name in names:
        if not parameters[name].is_floating_point():
            raise ValueError(f"`model` should have real parameters, but '{name}' is {parameters[name].dtype}. Freeze it.")
    call = record(model, x if isinstance(x, tuple) else (x,))
    if not call.outputs:
        raise ValueError(
            "`model` should return floating tensors that depend on its parameters, alone or in tuples, lists, dicts or "
            "registered pytrees, but none does."
        )
    return call, names


@dataclass(frozen=True)
class CallJacobian:
    """D of one call.

    Attributes:
        matrix: D, ``[N·Q, K]``.
        method: The one of `METHODS` that served.
        gradient: Dᵀg by a plain backward pass in the call's own arithmetic, ``[K]``, for the gradients g that the call's
            outputs received; zero if they received none.
    """

    matrix: Tensor
    method: str
    gradient: Tensor


def call_jacobian(
    model: nn.Module, call: Call, names: list[str], *, method: str = "auto", chunk_size: int | None = None
) -> CallJacobian:
    """D of one recorded call.

    A plain replay comes first: it has to give the call's outputs. Dᵀu of a random u by a plain backward pass is then what
    each way is held against, so that a way that is wrong for this model is found out even where its outputs are right.

    Args:
        model: The network.
        call: The call whose outputs are differentiated: those that the loss saw.
        names: The parameters to differentiate by, in the order of the columns.
        method: As in `output_jacobian`.
        chunk_size: As in `output_jacobian`.

    Raises:
        RuntimeError: The call cannot be repeated with the same outputs and derivatives.
        ValueError: The outputs do not have the batch first, the parameters are on several devices, or ``chunk_size`` is
            below 1.
        MemoryError: D would not fit.
    """
    if chunk_size is not None:
        positive_integer("chunk_size", chunk_size)
    work = _Differentiation(underlying(model), call, names, chunk_size)
    if work.matrix.numel() == 0:
        return CallJacobian(work.matrix, METHODS[0], work.matrix.new_zeros(work.matrix.shape[1]))
    refusals = []
    try:
        with work.conditions():
            work.plain()
        for way in METHODS if method == "auto" else (method,):
            try:
                with work.conditions():
                    getattr(work, way)()
                work.check_derivatives()
                return CallJacobian(work.matrix, way, work.gradient)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # torch.func refuses with many types
                if method != "auto" and not isinstance(error, DisagreementError):
                    raise
                refusals.append(f"{way}: {textwrap.shorten(str(error).split(chr(10), 1)[0], 300)}")
    except DisagreementError as error:
        refusals.append(f"a plain replay: {error}")
    finally:
        if any(module._forward_hooks for module in work.model.modules()):
            # The user's hooks may keep what they see: let them see tensors that live outside torch.func, once more.
            with contextlib.suppress(Exception), work.conditions(), torch.no_grad():
                work.forward(work.state(), *call.inputs.assembled(call.inputs.leaves))
    raise RuntimeError(
        "The model's call could not be repeated with the same outputs and derivatives, so its Jacobian is not known. A "
        "forward pass has to depend on nothing but its inputs, parameters, buffers and torch's global random numbers (no "
        "numpy or Python random numbers, generators or counters). Tried " + "; ".join(refusals) + "."
    )


class _Differentiation(Replay):
    """The work of filling D for one call, with the three ways to do it. Each runs under the call's conditions."""

    def __init__(self, model: nn.Module, call: Call, names: list[str], chunk_size: int | None) -> None:
        super().__init__(model, call, names)
        self.chunk_size = chunk_size
        parameters = dict(model.named_parameters())
        dtype, device = dtype_and_device([parameters[name] for name in names])
        shape = (self.n * self.q, sum(parameters[name].numel() for name in names))
        require_memory(
            2 * shape[0] * shape[1] * dtype.itemsize,
            device,
            f"A Jacobian of {shape[0]:,} outputs by {shape[1]:,} parameters in {dtype}, and its making,",
            "Use fewer samples at a time or train fewer parameters.",
        )
        self.matrix = torch.empty(shape, dtype=dtype, device=device)  # [NQ, K]

    def plain(self) -> None:
        """A plain replay: check the outputs, and take Dᵀu and Dᵀg by one backward pass each."""
        moving, x = self.plain_outputs()
        products = []
        for vector in (self.probe, self.output_gradients()):
            parts = torch.autograd.grad(x, list(moving.values()), vector.to(x.dtype), retain_graph=True, materialize_grads=True)
            products.append(torch.cat([part.to_dense().reshape(-1) for part in parts]))
        self.probe_product, self.gradient = products

    def check_derivatives(self) -> None:
        """Compare Dᵀu with that of the plain backward pass."""
        size = torch.linalg.matrix_norm(self.matrix).double()  # E|Dᵀu|² = |D|² in the Frobenius norm
        difference = torch.linalg.vector_norm(transpose_product(self.matrix, self.probe) - self.probe_product.double())
        tolerance = min(1e3 * precision(self.call, self.matrix.dtype), 0.05) * size
        if torch.isfinite(size) and torch.isfinite(self.probe_product).all() and not difference <= tolerance:
            raise DisagreementError(
                f"its Jacobian differs from what a backward pass gives by {difference / size:.2g} of its size"
            )

    def per_sample(self) -> None:
        """``vmap`` over samples of ``jacrev``."""
        leaves = self.call.inputs.leaves
        batched = [isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == self.n for leaf in leaves]
        if not any(batched):
            raise DisagreementError(f"no input tensor has the batch size {self.n} as its first dimension")
        moving, fixed = self.split_state()
        buffers = {name: fixed.pop(name) for name in self.call.buffers(self.model)}

        def one(moving: State, buffers: State, *sample: Tensor) -> tuple[Tensor, Tensor]:
            rest = iter(sample)
            inputs = [next(rest).unsqueeze(0) if b else leaf for leaf, b in zip(leaves, batched, strict=True)]
            outputs = self.forward({**fixed, **moving, **buffers}, *self.call.inputs.assembled(inputs))
            x = torch.cat([output.reshape(-1) for output in outputs])  # [Q]
            return x, x

        def samples() -> list[Tensor]:
            return [leaf for leaf, is_batched in zip(self.call.inputs.leaves, batched, strict=True) if is_batched]

        over_samples = (None, None, *[0] * sum(batched))
        step = self.chunk_size or self._chunk(self.q)
        if self.call.random:
            # The batch drew its random numbers at once: so must all samples, and first see whether they are the same.
            step = self.n
            self.check_outputs(vmap(one, in_dims=over_samples, randomness="different")(moving, buffers, *samples())[1])
            self.call.conditions.rewind()
        differentiate = vmap(jacrev(one, has_aux=True), in_dims=over_samples, randomness="different")
        given = samples()
        for start in range(0, self.n, step):
            blocks, x = differentiate(moving, buffers, *(sample[start : start + step] for sample in given))
            self.check_outputs(x, start * self.q)
            self._fill(start * self.q, x.numel(), blocks)

    def whole_batch(self) -> None:
        """``jacrev`` of the batch's outputs as one vector."""

        def batch(moving: State, rest: State, leaves: list[Any]) -> tuple[Tensor, Tensor]:
            x = stacked(self.forward({**rest, **moving}, *self.call.inputs.assembled(leaves)))  # [NQ]
            return x, x

        with torch.no_grad():  # cheap, and spares NQ backward passes for nothing
            self.check_outputs(batch(*self.split_state(), self.call.inputs.leaves)[0])
        self.call.conditions.rewind()
        rows = self.chunk_size or min(64, self._chunk(1))
        # Buffers and inputs are arguments because torch.func lets nothing else be updated in place.
        differentiate = jacrev(batch, has_aux=True, chunk_size=rows)
        blocks, x = differentiate(*self.split_state(), self.call.inputs.leaves)
        self.check_outputs(x)
        self._fill(0, x.numel(), blocks)

    def row_by_row(self) -> None:
        """A plain backward pass for each output."""
        moving, x = self.plain_outputs()
        with torch.enable_grad():
            outputs = x.unbind()
        for row, output in enumerate(outputs):
            gradients = torch.autograd.grad(output, list(moving.values()), retain_graph=True, materialize_grads=True)
            self._fill(row, 1, dict(zip(moving, gradients, strict=True)))

    def _chunk(self, rows: int) -> int:
        """How many times ``rows`` rows of D fit into a chunk."""
        return max(1, _CHUNK_BYTES // max(1, rows * self.matrix.shape[1] * self.matrix.element_size()))

    def _fill(self, start: int, count: int, blocks: State) -> None:
        """Write blocks ``[count rows..., *parameter]`` side by side into D."""
        column = 0
        for block in blocks.values():
            flat = block.to_dense().reshape(count, -1)
            self.matrix[start : start + count, column : column + flat.shape[1]] = flat
            column += flat.shape[1]


def transpose_product(matrix: Tensor, u: Tensor) -> Tensor:
    """Dᵀu in float64, ``[R, K]`` and ``[R]`` → ``[K]``, cast block by block."""
    product = torch.empty(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    width = max(1, BLOCK_ELEMENTS // max(1, matrix.shape[0]))
    for column in range(0, matrix.shape[1], width):
        product[column : column + width] = matrix[:, column : column + width].double().T @ u
    return product


def product(matrix: Tensor, v: Tensor) -> Tensor:
    """Dv in float64, ``[R, K]`` and ``[K]`` → ``[R]``, cast block by block."""
    total = torch.zeros(matrix.shape[0], dtype=torch.float64, device=matrix.device)
    width = max(1, BLOCK_ELEMENTS // max(1, matrix.shape[0]))
    for column in range(0, matrix.shape[1], width):
        total += matrix[:, column : column + width].double() @ v[column : column + width]
    return total


def dtype_and_device(parameters: list[Tensor]) -> tuple[torch.dtype, torch.device]:
    """The dtype that holds all parameters, and their one device.

    Raises:
        ValueError: They are on several.
    """
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise ValueError(
            f"The trained parameters should be on one device, but are on {sorted(map(str, devices))}. Move the model to one."
        )
    return functools.reduce(torch.promote_types, [p.dtype for p in parameters]), devices.pop()
