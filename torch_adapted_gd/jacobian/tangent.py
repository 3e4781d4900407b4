"""The empirical neural tangent kernel Θ = DDᵀ (3.14)-(3.15), and D of recorded calls."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import one_of, positive_integer
from ..tracking.calls import Call, Outputs, underlying
from ..tracking.replay import Replay, State, batch_and_outputs, precision
from ..tracking.tape import Tape, constants_of
from ..warning import warn_user
from ..world import ALONE, World
from .backward import allows_vmap
from .chunks import agreed
from .definition import call_jacobian, dtype_and_device, recorded
from .dense import DenseJacobian
from .factored import FactoredJacobian, Piece
from .gram import ROWS_ELEMENTS
from .linearized import Linearized
from .live import pieces_of
from .local import LocalJacobian
from .operator import Jacobian
from .sharded import ShardedJacobian

METHODS = ("auto", "structured", "jacobian")


def ntk(
    model: nn.Module,
    x1: Tensor | tuple[Any, ...],
    x2: Tensor | tuple[Any, ...] | None = None,
    *,
    method: str = "auto",
    chunk_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Neural tangent kernel Θ(x_i, x_j) = Df_θ(x_i) Df_θ(x_j)ᵀ, equations (3.14)-(3.15).

    Θ is a sum over all uses of parameters in the forward pass, each by the rule of its function (`register_rule`), without
    holding D = ∂x/∂θ. If samples interact, as in BatchNorm in training mode, or a use of a parameter cannot be seen, Θ is
    computed from rows of D.

    Args:
        model: The network f_θ; its trainable parameters are θ.
        x1: Input with the batch first, ``[N1, ...]``, or a tuple of positional inputs.
        x2: A second input, ``[N2, ...]``; by default ``x1``.
        method: ``"structured"`` uses rules, and raises for a model that they do not support. ``"jacobian"`` multiplies
            Jacobians, see `output_jacobian`. ``"auto"`` is structured where that is correct, which is checked with random
            vectors. An `AdaptedWarning` says where and why the Jacobian was needed.
        chunk_size: The number of samples whose rows of D (N·Q in all) are differentiated at a time. By default the working
            memory stays within a small multiple of Θ, or 512 MiB if that is more.
        dtype: Dtype of the result and of the products. Use float64 for models of any dtype, because Θ has the squared
            condition number of D. float32 takes half the time, for a well-conditioned Θ.

    Returns:
        Θ of shape ``[N1, Q, N2, Q]``: entry (i, q, j, r) is ⟨∂x_iq/∂θ, ∂x_jr/∂θ⟩. ``.reshape(N1 * Q, N2 * Q)`` is DDᵀ.

    Raises:
        TypeError: ``model`` is not a module, or ``dtype`` not a floating dtype.
        ValueError: An argument is out of range, or the outputs do not have the batch first.
        MemoryError: Θ would not fit, or D where it is needed.
        RuntimeError: The model's calls cannot be repeated, or ``method="structured"`` is not right for the model.

    Example:
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> x = torch.eye(3)
        >>> theta = ntk(model, x)  # for a linear map Θ(x, y) = (x·y) 1
        >>> theta.shape, torch.equal(theta.reshape(6, 6), torch.eye(6, dtype=torch.float64))
        (torch.Size([3, 2, 3, 2]), True)
    """
    one_of("method", method, METHODS)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"`dtype` should be a floating torch dtype, but got {dtype!r}.")
    if chunk_size is not None:
        positive_integer("chunk_size", chunk_size)
    calls = []
    with torch.inference_mode(False):
        for x in (x1,) if x2 is None else (x1, x2):
            call, names = recorded(model, x)
            calls.append(call)
        jacobian = _local_jacobian(model, calls, names, method=method, chunk_size=chunk_size)
        products = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        theta = jacobian.gram(products) if x2 is None else jacobian.cross(products)
    if jacobian.remark:
        warn_user(jacobian.remark)
    (n1, q1), (n2, q2) = jacobian.shapes[0], jacobian.shapes[-1]
    return theta.to(dtype).reshape(n1, q1, n2, q2)


def tangent_jacobian(
    model: nn.Module,
    calls: Sequence[Outputs],
    names: list[str],
    *,
    method: str = "auto",
    chunk_size: int | None = None,
    world: World = ALONE,
) -> Jacobian:
    """D of recorded calls.

    Args:
        model: The network.
        calls: Its calls, and other outputs that were linearized; their rows are stacked.
        names: The parameters θ.
        method: One of `METHODS`.
        chunk_size: See `ntk`.
        world: The processes that have other rows of D; ``calls`` may then be empty.
    """
    if world.size == 1:
        return _local_jacobian(model, calls, names, method=method, chunk_size=chunk_size)
    named = dict(underlying(model).named_parameters())
    numels = {name: named[name].numel() for name in names}
    local = None
    if calls:
        local = _local_jacobian(model, calls, names, method=method, chunk_size=chunk_size, world=world)
    else:
        agreed(world, {}, numels)
    return ShardedJacobian(local, world, numels, named[names[0]].device)


def _local_jacobian(
    model: nn.Module,
    calls: Sequence[Outputs],
    names: list[str],
    *,
    method: str,
    chunk_size: int | None,
    world: World = ALONE,
) -> LocalJacobian:
    """D of the calls of this process."""
    named = dict(underlying(model).named_parameters())
    parameters = {name: named[name] for name in names}
    dtype, _ = dtype_and_device(list(parameters.values()))
    shapes = [batch_and_outputs(call) for call in calls]
    if method != "jacobian" and not any(0 in shape for shape in shapes):
        pieces = [pieces_of(call) or _traced(model, call, names, dtype) for call in calls]
        factored = FactoredJacobian(pieces, parameters, dtype=dtype, chunk_size=chunk_size, world=world)
        if method == "structured" and factored.remarks:
            raise RuntimeError(
                f'The structured kernel is not right for this model: {"; ".join(factored.remarks[:3])}. Use "auto" or '
                '"jacobian" for the kernel.'
            )
        return factored
    blocks = [call_jacobian(model, _repeatable(call), names, chunk_size=chunk_size) for call in calls]
    numels = {name: p.numel() for name, p in parameters.items()}
    agreed(world, {name: {"written"} for name in numels}, numels)  # other processes may have factors
    matrix = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return DenseJacobian(matrix, shapes, numels, "jacobian (rows)")


def _repeatable(outputs: Outputs) -> Call:
    """The call that gave these outputs; a RuntimeError if the user's code computed them from calls."""
    if isinstance(outputs, Call) and not outputs.nested:
        return outputs
    raise RuntimeError(
        "The arguments of `criterion` were computed outside of the model or from several calls of it, so their Jacobian has to "
        "come from the training step's own backward pass. It could not: there is not enough memory, the graph is hidden by "
        'torch.utils.checkpoint with use_reentrant=True, or kernel="jacobian" was asked for. Nothing was changed. Use fewer '
        "samples at a time, or compute the arguments within the model."
    )


def _traced(model: nn.Module, outputs: Outputs, names: list[str], dtype: torch.dtype) -> list[Piece]:
    """A call repeated under a tape, and linearized by the parameters; a DisagreementError if its outputs differ."""
    call = _repeatable(outputs)
    replay = Replay(underlying(model), call, names)
    tapes: list[Tape] = []

    def tape(given: State, rest: State, differentiable: bool) -> Tape:
        constants = itertools.chain(rest.values(), constants_of(replay.model, given))
        tapes.append(Tape(given, constants, differentiable=differentiable))
        return tapes[0]

    given, found_outputs = replay.with_graph(tape)
    found = Linearized(
        found_outputs,
        given,
        tapes[0].notes,
        eps=precision(call, found_outputs[0].dtype),
        dtype=dtype,
        vectorized=allows_vmap(replay.model),
        conditions=replay.conditions,
    )
    return [Piece(found)]


def written_if_small(jacobian: Jacobian, limit: int = ROWS_ELEMENTS) -> Jacobian:
    """The same Jacobian, held as a matrix if it has at most ``limit`` entries."""
    rows, columns = jacobian.shape
    return jacobian if rows * columns > limit else written(jacobian)


def written(jacobian: Jacobian) -> DenseJacobian:
    """The same Jacobian, held as a matrix."""
    if isinstance(jacobian, DenseJacobian):
        return jacobian
    matrix = torch.cat(list(jacobian.rows(ROWS_ELEMENTS)))
    return DenseJacobian(matrix, jacobian.shapes, jacobian.numels, jacobian.description, jacobian.remark)
