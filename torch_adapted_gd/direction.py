"""The direction of a step: calls → kernel → solve → Dᵀψ. Tensors in, tensors out; nothing is changed."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .calls import Call, stacked
from .jacobian import call_jacobian
from .kernel import StackedJacobian
from .loss import Criterion, output_curvature
from .memory import require_memory
from .replay import batch_and_outputs, precision
from .report import StepReport
from .solve import KernelSolution, default_rtol, solve_kernel


@dataclass(frozen=True)
class Direction:
    """What a step is made of; vectors over all parameters have shape ``[K]``.

    Attributes:
        trained: The parameters θ by name, in the order of the vectors.
        adapted: Dᵀψ in float64.
        gradient: ∇_θC as backward delivered it, in the parameters' dtype.
        off_output: r = ∇_θC − Dᵀg in float64, zero where it is rounding.
        off_output_fraction: |r|/|∇_θC|.
        curvature: c, see `output_curvature`; 1 without a criterion.
        solution: ψ and what the solve says of it.
        identity_gap: |ψᵀΘψ − |Dᵀψ|²| / |Dᵀψ|².
        num_calls: Calls stacked.
        methods: How their Jacobians were computed.
    """

    trained: dict[str, nn.Parameter]
    adapted: Tensor
    gradient: Tensor
    off_output: Tensor
    off_output_fraction: float
    curvature: float
    solution: KernelSolution
    identity_gap: float
    num_calls: int
    methods: list[str]

    def by_parameter(self) -> Iterator[tuple[str, nn.Parameter, Tensor, Tensor, Tensor]]:
        """Name, parameter and its parts of ``adapted``, ``gradient`` and ``off_output`` in its shape."""
        sizes = [p.numel() for p in self.trained.values()]
        parts = zip(*(torch.split(vector, sizes) for vector in (self.adapted, self.gradient, self.off_output)), strict=True)
        for (name, p), (adapted, gradient, off_output) in zip(self.trained.items(), parts, strict=True):
            yield name, p, adapted.reshape(p.shape), gradient.reshape(p.shape), off_output.reshape(p.shape)

    def report(self) -> StepReport:
        """The figures."""
        return StepReport(
            num_outputs=self.solution.psi.numel(),
            num_params=self.adapted.numel(),
            rank=self.solution.rank,
            condition=self.solution.condition,
            projected_fraction=self.solution.projected_fraction,
            identity_gap=self.identity_gap,
            off_output_fraction=self.off_output_fraction,
            curvature=self.curvature,
            damping=self.solution.damping,
            num_calls=self.num_calls,
            kernel=f"jacobian ({', '.join(sorted(set(self.methods)))})",
            solver="eigh",
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
        chunk_size: See `output_jacobian`.

    Raises:
        RuntimeError: Something is not finite, empty, changed since the call, or cannot be repeated.
        ValueError: The outputs do not have the batch first.
        MemoryError: The Jacobian or the kernel would not fit.
    """
    k = sum(p.numel() for p in trained.values())
    dtype = next(iter(trained.values())).dtype
    for number, call in enumerate(calls, start=1):
        call.check_unchanged(model)
        _check_finite(call, f"call {number} of {len(calls)}")
    _require_memory(calls, k, dtype.itemsize)

    g = torch.cat([stacked([call.gradients[place] for place in call.places]) for call in calls]) / loss_scale  # [QN]
    parts = [call_jacobian(model, call, list(trained), chunk_size=chunk_size) for call in calls]
    jacobian = StackedJacobian([part.matrix for part in parts])
    theta = jacobian.gram()  # [QN, QN]
    eps = max(precision(call, dtype) for call in calls)
    solution = solve_kernel(theta, g, damping=damping, rtol=default_rtol(g.numel(), eps) if rtol is None else rtol)
    _check_solved(solution, theta)
    for name, tensor in arrived.items():
        if not torch.isfinite(tensor).all():
            raise RuntimeError(
                f"The loss's gradient in parameter '{name}' is not finite although that in the outputs is, so nothing was "
                "changed. Look at penalties and other terms that do not come through the outputs, and at their derivatives."
            )

    adapted = jacobian.transpose_product(solution.psi)  # Dᵀψ, [K]
    square = float(adapted @ adapted)
    gap = abs(float(solution.psi @ (theta @ solution.psi)) - square) / square if square else 0.0
    gradient = torch.cat([arrived[name].reshape(-1) for name in trained]) / loss_scale
    # Zero by (2.16) for a loss of the outputs alone. Dᵀg by the same arithmetic as the gradient's: under autocast, only
    # that leaves nothing but the rounding of sums.
    off_output = gradient.double() - torch.stack([part.gradient.double() for part in parts]).sum(0) / loss_scale
    size = float(torch.linalg.vector_norm(off_output))
    # |D|_F |g| bounds the sums of products in Dᵀg. Under autocast, gradients of a weight that is used more than once add up
    # in low precision.
    rounding = 16 * torch.finfo(dtype).eps * float(theta.diagonal().sum().sqrt() * torch.linalg.vector_norm(g))
    if eps > torch.finfo(dtype).eps:
        rounding += eps * float(torch.linalg.vector_norm(gradient.double()))
    if size <= rounding:
        off_output, size = torch.zeros_like(off_output), 0.0
    return Direction(
        trained=trained,
        adapted=adapted,
        gradient=gradient,
        off_output=off_output,
        off_output_fraction=size / max(float(torch.linalg.vector_norm(gradient.double())), size) if size else 0.0,
        curvature=1.0 if criterion is None else _curvature(criterion, calls),
        solution=solution,
        identity_gap=gap,
        num_calls=len(calls),
        methods=[part.method for part in parts],
    )


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


def _require_memory(calls: list[Call], k: int, itemsize: int) -> None:
    rows = sum(n * q for n, q in map(batch_and_outputs, calls))
    if rows == 0:
        raise RuntimeError("The model's outputs that reached the loss are empty. Leave out empty batches.")
    require_memory(
        rows * k * itemsize + 5 * 8 * rows**2,  # D; Θ, its eigenvectors and LAPACK's workspace
        next(iter(calls[0].outputs.values())).device,
        f"A step on {rows:,} outputs and {k:,} parameters (Jacobian {rows * k * itemsize / 1e9:.3g} GB, kernel "
        f"{8 * rows**2 / 1e9:.3g} GB)",
        "Use a smaller batch or step fewer parameters (`params=`).",
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
