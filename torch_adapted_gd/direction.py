"""The direction of a step: calls → kernel → solve → Dᵀψ. Tensors in, tensors out; nothing is changed."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .calls import Call, stacked
from .checks import all_finite
from .kernel import tangent_kernel
from .loss import Criterion, output_curvature
from .memory import require_memory
from .replay import batch_and_outputs, precision
from .report import StepReport
from .solve import KernelSolution, default_rtol, solve_symmetric


@dataclass(frozen=True)
class Direction:
    """What a step is made of; vectors over all parameters are in parts, by the parameter's name.

    Attributes:
        trained: The parameters θ by name.
        adapted: Dᵀψ in float64, flat parts.
        gradient: ∇_θC as backward delivered it, in the parameters' dtype.
        off_output: r = ∇_θC − Dᵀg in float64; None where it is rounding.
        off_output_fraction: |r|/|∇_θC|.
        curvature: c, see `output_curvature`; 1 without a criterion.
        solution: ψ and what the solve says of it.
        identity_gap: |ψᵀΘψ − |Dᵀψ|²| / |Dᵀψ|².
        num_calls: Calls stacked.
        kernel: How Θ came about.
        remark: What the user should be told of that, or None.
    """

    trained: dict[str, nn.Parameter]
    adapted: dict[str, Tensor]
    gradient: dict[str, Tensor]
    off_output: dict[str, Tensor] | None
    off_output_fraction: float
    curvature: float
    solution: KernelSolution
    identity_gap: float
    num_calls: int
    kernel: str
    remark: str | None

    def by_parameter(self) -> Iterator[tuple[str, nn.Parameter, Tensor, Tensor, Tensor | None]]:
        """Name, parameter and its parts of ``adapted``, ``gradient`` and ``off_output`` in its shape."""
        for name, p in self.trained.items():
            off_output = None if self.off_output is None else self.off_output[name].reshape(p.shape)
            yield name, p, self.adapted[name].reshape(p.shape), self.gradient[name].reshape(p.shape), off_output

    def remarks(self) -> Iterator[tuple[str, str]]:
        """What the user should be told of, once for each word that it is about."""
        if self.off_output_fraction:
            yield (
                "off-output",
                f"{self.off_output_fraction:.2g} of the loss's gradient did not come through the model's outputs: the loss has "
                "a penalty on parameters, uses derivatives of the outputs, was partly computed from a submodule's call, or a "
                "hook edits gradients. That part takes a plain gradient step, lr times itself; only the outputs' part is "
                "preconditioned. For an L2 penalty use `weight_decay`.",
            )
        if self.remark:
            yield "kernel", self.remark

    def report(self) -> StepReport:
        """The figures."""
        return StepReport(
            num_outputs=self.solution.psi.numel(),
            num_params=sum(p.numel() for p in self.trained.values()),
            rank=self.solution.rank,
            condition=self.solution.condition,
            projected_fraction=self.solution.projected_fraction,
            identity_gap=self.identity_gap,
            off_output_fraction=self.off_output_fraction,
            curvature=self.curvature,
            damping=self.solution.damping,
            num_calls=self.num_calls,
            kernel=self.kernel,
            solver=self.solution.method,
            status=self.solution.status,
        )


def step_direction(
    model: nn.Module,
    calls: list[Call],
    trained: dict[str, nn.Parameter],
    arrived: dict[str, Tensor],
    *,
    loss_scale: float,
    criterion: Criterion | None,
    damping: float,
    rtol: float | None,
    kernel_method: str,
    solver: str,
    chunk_size: int | None,
) -> Direction:
    """Solve Θψ = Pg (2.22) for the calls' outputs and carry ψ back to the parameters.

    Args:
        model: The network.
        calls: Its calls that the loss went through, at least one; their rows of D are stacked.
        trained: The parameters θ by name.
        arrived: ∇_θC of each of these, as backward delivered it.
        loss_scale: What a GradScaler multiplied the loss by.
        criterion: The loss whose output curvature is wanted.
        damping: λ relative to the mean of diag Θ.
        rtol: Relative cut on the singular values of D, or None for the default.
        kernel_method: How to come by the kernel, see `ntk`.
        solver: How to solve, see `solve_kernel`.
        chunk_size: See `ntk`.

    Raises:
        RuntimeError: Something is not finite, empty, changed since the call, or cannot be repeated.
        ValueError: The outputs do not have the batch first.
        MemoryError: The Jacobian or the kernel would not fit.
    """
    dtype = next(iter(trained.values())).dtype
    for number, call in enumerate(calls, start=1):
        call.check_unchanged(model)
        _check_finite(call, f"call {number} of {len(calls)}")
    _require_memory(calls)

    g = torch.cat([stacked([call.gradients[place] for place in call.places]) for call in calls]) / loss_scale  # [QN]
    kernel = tangent_kernel(model, calls, list(trained), method=kernel_method, chunk_size=chunk_size)
    theta = kernel.theta  # [QN, QN]
    eps = max(precision(call, dtype) for call in calls)
    cut = default_rtol(g.numel(), eps) if rtol is None else rtol
    solution = solve_symmetric(theta, g, damping=damping, rtol=cut, method=solver)
    _check_solved(solution, theta)
    gradient = arrived if loss_scale == 1 else {name: tensor / loss_scale for name, tensor in arrived.items()}
    for name, tensor in gradient.items():
        if not all_finite(tensor):
            raise RuntimeError(
                f"The loss's gradient in parameter '{name}' is not finite although that in the outputs is, so nothing was "
                "changed. Look at penalties and other terms that do not come through the outputs, and at their derivatives."
            )

    adapted = kernel.factors.transpose_product(solution.psi)  # Dᵀψ
    square = _norm(adapted.values()) ** 2
    gap = abs(float(solution.psi @ (theta @ solution.psi)) - square) / square if square else 0.0
    # Zero by (2.16) for a loss of the outputs alone. Dᵀg by the same arithmetic as the gradient's: under autocast, only
    # that leaves nothing but the rounding of sums.
    plain = kernel.factors.gradient
    off_output = {
        name: tensor - plain[name].reshape(tensor.shape) / loss_scale if name in plain else tensor
        for name, tensor in gradient.items()
    }
    size, whole = _norm(off_output.values()), _norm(gradient.values())
    # |D|_F |g| bounds the sums of products in Dᵀg. Under autocast, gradients of a weight that is used more than once add up
    # in low precision.
    rounding = 16 * torch.finfo(dtype).eps * float(theta.diagonal().sum().sqrt() * torch.linalg.vector_norm(g))
    if eps > torch.finfo(dtype).eps:
        rounding += eps * whole
    return Direction(
        trained=trained,
        adapted=adapted,
        gradient=gradient,
        off_output=None if size <= rounding else {name: tensor.double() for name, tensor in off_output.items()},
        off_output_fraction=0.0 if size <= rounding else size / max(whole, size),
        curvature=1.0 if criterion is None else _curvature(criterion, calls),
        solution=solution,
        identity_gap=gap,
        num_calls=len(calls),
        kernel=kernel.factors.description,
        remark=kernel.remark,
    )


def _norm(parts: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(part)) ** 2 for part in parts))


def _curvature(criterion: Criterion, calls: list[Call]) -> float:
    """The largest curvature over the model's outputs; one output's rows in all calls of a backward pass belong to one loss.

    Several backward passes are gradient accumulation, each loss divided by their number. Where their sizes differ, the
    smallest has the largest curvature.
    """
    passes = {call.backward_pass for call in calls}
    of_losses = [
        [call.gradients[place] for call in calls if call.backward_pass == number and place in call.gradients]
        for number in passes
        for place in {place for call in calls for place in call.places}
    ]
    share = 1 if criterion.reduction != "mean" else len(passes)
    return max(output_curvature(criterion, gradients) for gradients in of_losses if gradients) / share


def _require_memory(calls: list[Call]) -> None:
    rows = sum(n * q for n, q in map(batch_and_outputs, calls))
    if rows == 0:
        raise RuntimeError("The model's outputs that reached the loss are empty. Leave out empty batches.")
    require_memory(
        5 * 8 * rows**2,  # Θ, its eigenvectors and LAPACK's workspace
        next(iter(calls[0].outputs.values())).device,
        f"A step on {rows:,} outputs (kernel {8 * rows**2 / 1e9:.3g} GB, and its eigenvectors)",
        "Use a smaller batch.",
    )


def _check_finite(call: Call, which: str) -> None:
    """Raise a RuntimeError that names the quantity of a call that is not finite."""
    for what, tensors in (("output", call.outputs), ("gradient of the loss in output", call.gradients)):
        for place in call.places:
            bad = int((~torch.isfinite(tensors[place])).sum())
            if bad:
                advice = "Look at its inputs and the parameters" if what == "output" else "Look at the loss and its targets"
                raise RuntimeError(
                    f"In {which} of the model, the {what} {place} of shape {list(tensors[place].shape)} has {bad} entries that "
                    f"are not finite, so nothing was changed. {advice}; a smaller `lr` or more `damping` keeps outputs "
                    "bounded. zero_grad drops the call."
                )


def _check_solved(solution: KernelSolution, theta: Tensor) -> None:
    if solution.status in ("not_finite", "not_converged"):
        bad = int((~torch.isfinite(theta)).sum())
        raise RuntimeError(
            f"The kernel Θ of {theta.shape[0]} outputs could not be solved ({bad} entries are not finite), so nothing was "
            f"changed. {solution.message} A derivative that is infinite where the output is not (sqrt or norm at 0) does this."
        )
