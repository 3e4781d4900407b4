"""The empirical neural tangent kernel Θ = DDᵀ (3.14)-(3.15): summed over layers where it can be, from D where it must."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..calls import Call, underlying
from ..checks import one_of, positive_integer
from ..jacobian import call_jacobian, recorded
from ..memory import keep_pages
from ..replay import DisagreementError, batch_and_outputs
from .dense import ROWS_ELEMENTS, StackedJacobian, gram, parameter_gram
from .structured import StructuredKernel

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

    It is summed over the layers, each by a rule of its own (`register_rule`), without D = ∂x/∂θ ever being held; and from
    Jacobians where samples interact, as in BatchNorm in training mode, or parameters are used in ways that no rule knows.

    Args:
        model: The network f_θ; its trainable parameters are θ.
        x1: Input with the batch first, ``[N1, ...]``, or a tuple of positional inputs.
        x2: A second input, ``[N2, ...]``; by default ``x1``.
        method: ``"structured"`` (by layer rules; raises for a model that they do not serve), ``"jacobian"`` (products of
            Jacobians, see `output_jacobian`), or ``"auto"``: structured where that is right, which is checked with random
            vectors. It warns when it had to take the Jacobian for a reason that you may not know of.
        chunk_size: Samples' worth of rows of D (N·Q in all) that are differentiated at a time. By default as many as keep
            the working memory within a small multiple of Θ, or 512 MiB where that is more.
        dtype: Dtype of the result, in which products are formed and added up. float64 whatever the model's dtype, unless you
            know Θ to be well-conditioned: forming Θ squares the condition number of D. float32 takes half the time.

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
        kernel = tangent_kernel(model, calls, names, method=method, chunk_size=chunk_size, dtype=dtype, cross=x2 is not None)
    if kernel.remark:
        warnings.warn(kernel.remark, stacklevel=2)
    (n1, q1), (n2, q2) = batch_and_outputs(calls[0]), batch_and_outputs(calls[-1])
    return kernel.theta.to(dtype).reshape(n1, q1, n2, q2)


Factors = StructuredKernel | StackedJacobian


@dataclass(frozen=True)
class TangentKernel:
    """Θ of the outputs of one or more calls.

    Attributes:
        theta: Θ, ``[R1, R2]``.
        factors: What it was made of, for Dᵀu, Dv and Dᵀg.
        remark: What the user should be told of, or None.
    """

    theta: Tensor
    factors: Factors
    remark: str | None


@dataclass(frozen=True)
class ParameterGram:
    """DᵀD of the outputs of one or more calls: the tangent kernel's counterpart in parameter space.

    Attributes:
        gram: DᵀD, ``[K, K]``, or DᵀHD if the outputs were weighed.
        products: DᵀV for the vectors V that were asked for, ``[K, v]``, not weighed.
        square: |D|², the trace of DᵀD, not weighed.
        factors: What it was made of, for Dᵀu, Dv and Dᵀg.
        remark: What the user should be told of, or None.
    """

    gram: Tensor
    products: Tensor
    square: float
    factors: Factors
    remark: str | None


def tangent_kernel(
    model: nn.Module,
    calls: list[Call],
    names: list[str],
    *,
    method: str = "auto",
    chunk_size: int | None = None,
    dtype: torch.dtype = torch.float64,
    cross: bool = False,
) -> TangentKernel:
    """Θ of recorded calls.

    Args:
        model: The network.
        calls: Its calls; their rows are stacked.
        names: The parameters θ.
        method: One of `METHODS`.
        chunk_size: See `ntk`.
        dtype: The arithmetic of products.
        cross: Only the block between the first call's rows and the second's is wanted.

    Raises:
        RuntimeError: A call cannot be repeated, or ``method="structured"`` is not right for the model.
        ValueError: The outputs do not have the batch first.
        MemoryError: Θ or what it is made of would not fit.
    """
    products = dtype if dtype in (torch.float32, torch.float64) else torch.float32

    def theta(factors: Factors) -> Tensor:
        if isinstance(factors, StructuredKernel):
            return factors.cross(products) if cross else factors.gram(products)
        return gram(*factors.blocks) if cross else factors.gram()

    return TangentKernel(*_served(theta, model, calls, names, method, chunk_size))


def tangent_gram(
    model: nn.Module,
    calls: list[Call],
    names: list[str],
    vectors: Tensor,
    *,
    weigh: Callable[[Tensor, int], Tensor] | None = None,
    method: str = "auto",
    chunk_size: int | None = None,
) -> ParameterGram:
    """DᵀD of recorded calls, added up over blocks of samples; D is kept where it is one small block.

    Args:
        model: The network.
        calls: Its calls; their rows are stacked.
        names: The parameters θ.
        vectors: V, ``[R, v]`` in float64.
        weigh: Makes SᵀD of rows of D, given these and the number of the first.
        method: One of `METHODS`.
        chunk_size: See `ntk`.

    Raises:
        RuntimeError: A call cannot be repeated, or ``method="structured"`` is not right for the model.
        ValueError: The outputs do not have the batch first.
        MemoryError: DᵀD or what it is made of would not fit.
    """
    parameters = dict(underlying(model).named_parameters())
    size = sum(parameters[name].numel() for name in names)
    outputs = tuple(q for _, q in map(batch_and_outputs, calls))

    def grams(factors: Factors) -> tuple[Tensor, Tensor, float, Factors]:
        if isinstance(factors, StructuredKernel) and len(vectors) * size <= ROWS_ELEMENTS:
            numels = {name: parameters[name].numel() for name in names}
            factors = StackedJacobian(list(factors.rows()), numels, factors.gradient, factors.description)
        blocks = factors.rows(groups=outputs) if isinstance(factors, StackedJacobian) else factors.rows()
        return *parameter_gram(blocks, size, vectors, weigh), factors

    (total, products, square, factors), _, remark = _served(grams, model, calls, names, method, chunk_size, by_rows=True)
    return ParameterGram(total, products, square, factors, remark)


def tangent_factors(
    model: nn.Module, calls: list[Call], names: list[str], *, method: str = "auto", chunk_size: int | None = None
) -> tuple[Factors, str | None]:
    """What Θ of recorded calls is made of, without Θ, and what the user should be told of that.

    Args:
        model: The network.
        calls: Its calls; their rows are stacked.
        names: The parameters θ.
        method: One of `METHODS`.
        chunk_size: See `ntk`.

    Raises:
        RuntimeError: A call cannot be repeated, or ``method="structured"`` is not right for the model.
        ValueError: The outputs do not have the batch first.
        MemoryError: It would not fit.
    """
    _, factors, remark = _served(lambda factors: factors.check_products(), model, calls, names, method, chunk_size)
    return factors, remark


_Result = TypeVar("_Result")


def _served(
    compute: Callable[[Factors], _Result],
    model: nn.Module,
    calls: list[Call],
    names: list[str],
    method: str,
    chunk_size: int | None,
    *,
    by_rows: bool = False,
) -> tuple[_Result, Factors, str | None]:
    """What ``compute`` makes of the layers' factors where these are right for the model, else of D; these; and a remark.

    With ``by_rows`` it reads all rows of D, which are held against a backward pass themselves: the rules are then checked one
    by one only if that fails.
    """
    keep_pages()
    remark = None
    empty = any(0 in batch_and_outputs(call) for call in calls)
    if method != "jacobian" and not empty:
        try:
            if by_rows:
                with contextlib.suppress(Exception):
                    return _by_rules(compute, model, calls, names, method == "structured", chunk_size, verified=False)
            return _by_rules(compute, model, calls, names, method == "structured", chunk_size)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if method == "structured":
                raise RuntimeError(
                    f'The structured kernel is not right for this model: {error}. Use "auto" or "jacobian" for the kernel.'
                ) from error
            if not isinstance(error, DisagreementError):  # a call that cannot be repeated: the Jacobian's error says more
                remark = _advice(model, calls, [str(error)])
    parameters = dict(underlying(model).named_parameters())
    parts = [call_jacobian(model, call, names, chunk_size=chunk_size) for call in calls]
    jacobian = StackedJacobian.of(parts, {name: parameters[name].numel() for name in names})
    return compute(jacobian), jacobian, remark


def _by_rules(
    compute: Callable[[Factors], _Result],
    model: nn.Module,
    calls: list[Call],
    names: list[str],
    strict: bool,
    chunk_size: int | None,
    verified: bool = True,
) -> tuple[_Result, Factors, str | None]:
    """The same by the layers' rules. A function of its own, so that nothing of a failure is held in the Jacobian's turn."""
    structured = StructuredKernel(model, calls, names, chunk_size=chunk_size, verified=verified)
    if strict:
        structured.require_rules()
    return compute(structured), structured, _advice(model, calls, structured.remarks)


def _advice(model: nn.Module, calls: list[Call], reasons: list[str]) -> str | None:
    """The text of a warning that the Jacobian had to be taken."""
    if not reasons:
        return None
    coupling = [
        f"'{name}' ({type(module).__name__})"
        for name, module in underlying(model).named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (calls[0].conditions.training.get(name) or module.running_mean is None)
    ]
    why = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    if coupling:
        others = f" and {len(coupling) - 1} more take" if len(coupling) > 1 else " takes"
        why += f" ({coupling[0]}{others} averages over the batch in training mode)"
    return (
        f"The kernel could not be summed over layers alone: {why}. The output Jacobian is used for what is left, which is "
        'exact but slower and larger. To say that this is intended, choose "jacobian" for the kernel.'
    )
