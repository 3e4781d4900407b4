"""The loss around the present parameters: calls → kernel → solve → Dᵀψ. Tensors in, tensors out; nothing is changed."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .calls import Call, stacked, underlying
from .checks import all_finite
from .curvature import OutputLoss, largest_curvature
from .iterative import KernelOperator
from .jacobian import norm
from .loss import Criterion
from .replay import Replay, batch_and_outputs, precision
from .solve import ConjugateGradients, default_rtol
from .system import Problem, choose_solver

METRICS = ("euclidean", "ggn")
Parts = dict[str, Tensor]  # a vector over all parameters: by name, flat, float64


@dataclass(frozen=True)
class Direction:
    """Where a step goes, for one damping.

    Attributes:
        adapted: φ = D⁺g, damped and with momentum: the step is −η φ at α = 1.
        weights: ψ̃ in sample space, for the identity gap; None in parameter space.
        size: |Dᵀψ|, without momentum.
        damping: λ that was added, in the units of the kernel.
    """

    adapted: Parts
    weights: Tensor | None
    size: float
    damping: float


class Linearization:
    """C(θ + δ) ≈ C + ∇_θC·δ + ½ (Dδ)ᵀH(Dδ), and the steps that minimize it, damped or not.

    Args:
        model: The network.
        calls: Its calls that the loss went through, at least one; their rows of D are stacked.
        trained: The parameters θ by name.
        arrived: ∇_θC of each of these, as backward delivered it.
        loss_scale: What a GradScaler multiplied the loss by.
        criterion: The loss whose output curvature is wanted.
        metric: One of `METRICS`.
        rtol: Relative cut on the singular values of D, or None for the default.
        space: One of `SPACES`: where to solve; ``"auto"``: in parameter space if K < QN.
        kernel_method: How to come by the kernel; like ``chunk_size``, see `ntk`.
        solver: How to solve: one of `SOLVERS`, or how to by conjugate gradients.
        chunk_size: See there.
        start: A ψ̃ for these to begin with, or None.

    Attributes:
        trained: θ.
        gradient: ∇_θC by parameter's name, in the parameters' dtype.
        off_output: r = ∇_θC − Dᵀg, flat in float64; None where it is rounding.
        off_output_fraction: |r|/|∇_θC|.
        curvature: c that η = lr/c divides by, see `output_curvature`; 1 without a criterion and in the GGN metric.
        system: What is solved.
        warm_start: Whether ψ̃ should be kept for the next one.
        num_calls, num_outputs, num_params: Calls stacked, QN and K.

    Raises:
        RuntimeError: Something is not finite, empty, changed since the call, or cannot be repeated.
        ValueError: The outputs do not have the batch first, or do not suit the criterion.
        MemoryError: The Jacobian or the kernel would not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: list[Call],
        trained: dict[str, nn.Parameter],
        arrived: dict[str, Tensor],
        *,
        loss_scale: float,
        criterion: Criterion | None,
        metric: str,
        rtol: float | None,
        space: str,
        kernel_method: str,
        solver: str | ConjugateGradients,
        chunk_size: int | None,
        start: Tensor | None = None,
    ) -> None:
        dtype = next(iter(trained.values())).dtype
        for number, call in enumerate(calls, start=1):
            call.check_unchanged(model)
            call.check_finite(f"call {number} of {len(calls)}")
        self.num_outputs = rows = sum(n * q for n, q in map(batch_and_outputs, calls))
        if rows == 0:
            raise RuntimeError("The model's outputs that reached the loss are empty. Leave out empty batches.")
        self._model, self._calls, self._criterion, self._loss_scale = model, calls, criterion, loss_scale
        self.trained = trained
        self.num_calls = len(calls)
        self._numels = {name: p.numel() for name, p in trained.items()}
        self.num_params = sum(self._numels.values())
        self._g = torch.cat([stacked([call.gradients[place] for place in call.places]) for call in calls]) / loss_scale  # [R]
        self._metric = self.output_loss if metric == "ggn" else None
        self.curvature = 1.0 if criterion is None or self._metric else largest_curvature(criterion, calls)
        self._eps = eps = max(precision(call, dtype) for call in calls)
        problem = Problem(model, calls, list(trained), self._g, self._metric, kernel_method, chunk_size)
        space, krylov = choose_solver(space, solver, rtol, self.num_params, rows, self._g.device)
        self.warm_start = krylov is not None and krylov.warm_start
        if krylov is not None:
            self.system, square = problem.without_matrix(krylov, start if krylov.warm_start else None)
        else:
            solving = {"rtol": default_rtol(rows, eps) if rtol is None else rtol, "method": solver, "firm": rtol is not None}
            build = problem.in_parameter_space if space == "parameter" else problem.in_sample_space
            self.system, square = build(solving)
        self._check_solved()
        self.gradient = arrived if loss_scale == 1 else {name: tensor / loss_scale for name, tensor in arrived.items()}
        self._find_off_output(square, dtype, eps)

    @functools.cached_property
    def _replays(self) -> list[Replay]:
        return [Replay(underlying(self._model), call, list(self.trained)) for call in self._calls]

    @functools.cached_property
    def _outputs(self) -> Tensor:
        """x, ``[R]``."""
        return torch.cat([stacked([call.outputs[place] for place in call.places]) for call in self._calls]).double()

    @functools.cached_property
    def rounding(self) -> float:
        """What rounding of the outputs can do to the loss."""
        return 4 * self._eps * float(self._g.abs() @ self._outputs.abs())

    @functools.cached_property
    def output_rounding(self) -> float:
        """What rounding of the outputs can do to a difference of them."""
        return 4 * self._eps * float(self._outputs.norm())

    @property
    def num_passes(self) -> int:
        """Backward passes that went through the calls."""
        return len({call.backward_pass for call in self._calls})

    @property
    def loss_unit(self) -> int:
        """What to divide losses by for batches of different sizes to compare."""
        return self.num_outputs if self._criterion is not None and self._criterion.reduction == "sum" else 1

    @property
    def has_criterion(self) -> bool:
        """Whether it is known which loss this is."""
        return self._criterion is not None

    @functools.cached_property
    def output_loss(self) -> OutputLoss:
        """The criterion's loss as a function of the outputs; only with a criterion."""
        assert self._criterion is not None
        return OutputLoss(self._criterion, self._calls, self._loss_scale)

    @property
    def iterative(self) -> KernelOperator | None:
        """The system, if it is solved without its matrix."""
        return self.system.matrix if isinstance(self.system.matrix, KernelOperator) else None

    @property
    def status(self) -> str:
        """What the rank of D is: ``"full_rank"`` (QN), ``"rank_deficient"`` or ``"zero"``; or whether iterations converged."""
        if self.iterative:
            return self.iterative.status
        rank = self.system.factorization.rank
        return "full_rank" if rank == self.num_outputs else "rank_deficient" if rank else "zero"

    def direction(self, damping: float, momentum: Parts | None = None, decay: float = 0.0) -> Direction:
        """φ = D⁺g, damped: φ = Dᵀ(Θ + λ1)⁻¹g = (DᵀD + λ1)⁻¹Dᵀg; with S where a metric asks for it.

        With a momentum φ₋ it is that of SPRING (Goldshlager, Abrahamsen & Lin, arXiv:2401.10190): what φ₋ leaves to be
        corrected on this batch is solved for, φ = D⁺(g − μ c Dφ₋) + μ c φ₋.

        Args:
            damping: λ relative to the mean of diag Θ.
            momentum: φ₋, divided by the curvature c of its step, or None.
            decay: μ.
        """
        shift = damping * self.system.scale
        right = self.system.right
        if momentum is not None and decay:
            momentum = {name: decay * part for name, part in momentum.items()}
            if self.system.space == "sample":
                right = right - self._weigh(self.curvature * self.system.jacobian.mv(momentum))
            else:
                right = right - self.curvature * (self.system.matrix @ self._flat(momentum))
        adapted, weights = self._solved(right, shift)
        size = norm(adapted)
        if momentum is not None and decay:
            adapted = {name: part + self.curvature * momentum[name] for name, part in adapted.items()}
        return Direction(adapted, weights, size, shift)

    def correction(self, bend: Tensor, direction: Direction) -> Parts:
        """−D⁺ of what outputs moved by beside Dδ, with the damping of a direction: the second-order part of a step.

        Args:
            bend: x(θ + δ) − x(θ) − Dδ, ``[R]``.
            direction: The direction whose damping to take.
        """
        right = self._weigh(bend)
        if self.system.space == "parameter":
            right = self._flat(self.system.jacobian.rmv(self._unweigh(right)))
        parts, _ = self._solved(right, direction.damping, beside=True)
        return {name: -part for name, part in parts.items()}

    def linear(self, change: Parts) -> Tensor:
        """Dδ, ``[R]``."""
        return self.system.jacobian.mv(change)

    def slope(self, change: Parts) -> float:
        """∇_θC·δ."""
        return sum(float(self.gradient[name].double().reshape(-1) @ part) for name, part in change.items())

    def outputs_moved(self, values: dict[str, Tensor]) -> Tensor | None:
        """x(θ') − x(θ), ``[R]``, by a replay with other values of the parameters; None if that fails or is not finite.

        Args:
            values: θ' by name.
        """
        try:
            with torch.no_grad():
                moved = torch.cat([replay.outputs_with(values) for replay in self._replays]).double() - self._outputs
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except (ArithmeticError, AssertionError, RuntimeError, ValueError):  # of a model that checks its values
            return None
        return moved if all_finite(moved) else None

    def loss_change(self, moved: Tensor, change: Parts) -> float:
        """C(θ + δ) − C(θ) for outputs that moved by Δx; what did not come through these to first order.

        Args:
            moved: Δx.
            change: δ.
        """
        beside = sum(float(part @ change[name]) for name, part in (self.off_output or {}).items())
        return self.output_loss.change(moved) + beside

    def identity_gap(self, direction: Direction) -> float:
        """|ψᵀΘψ − |Dᵀψ|²| / |Dᵀψ|², or |δᵀDᵀDδ − |Dδ|²| / |Dδ|²: zero if matrix and products belong together."""
        if (psi := direction.weights) is not None:
            size = direction.size
        else:
            psi = self._flat(direction.adapted)
            size = float(torch.linalg.vector_norm(self._weigh(self.linear(direction.adapted))))
        square = size * size
        return abs(float(psi @ (self.system.matrix @ psi)) - square) / square if square else 0.0

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
        if self.system.jacobian.remark:
            yield "kernel", self.system.jacobian.remark
        if (iterative := self.iterative) and iterative.last and not iterative.last.converged:
            yield (
                "cg",
                f"Conjugate gradients did not converge: after {iterative.last.iterations} iterations the residual is "
                f"{iterative.last.residual:.2g} of the right-hand side. The step was computed from what they had come to. "
                "Raise `damping`, or `iterations` or `tolerance` of ConjugateGradients.",
            )

    def _find_off_output(self, square: float, dtype: torch.dtype, eps: float) -> None:
        for name, tensor in self.gradient.items():
            if not all_finite(tensor):
                raise RuntimeError(
                    f"The loss's gradient in parameter '{name}' is not finite although that in the outputs is, so nothing was "
                    "changed. Look at penalties and other terms that do not come through the outputs, and at their derivatives."
                )
        # Zero by (2.16) for a loss of the outputs alone.
        plain = self.system.jacobian.rmv(self._g)
        off_output = {name: tensor.double() - plain[name].reshape(tensor.shape) for name, tensor in self.gradient.items()}
        size, whole = norm(off_output), norm(self.gradient)
        # |D|_F |g| bounds the sums of products in Dᵀg. The user's backward pass rounds them layer by layer: 54 ε of Dᵀg in a
        # U-Net. Under autocast it rounds each product.
        rounding = 128 * torch.finfo(dtype).eps * math.sqrt(square) * float(torch.linalg.vector_norm(self._g))
        if eps > torch.finfo(dtype).eps:
            rounding += 2 * eps * whole
        negligible = size <= rounding
        self.off_output = None if negligible else {name: tensor.reshape(-1) for name, tensor in off_output.items()}
        self.off_output_fraction = 0.0 if negligible else size / max(whole, size)

    def _check_solved(self) -> None:
        if self.system.factorization.status in ("not_finite", "not_converged"):
            matrix = self.system.matrix
            bad = f" ({int((~torch.isfinite(matrix)).sum())} entries are not finite)" if isinstance(matrix, Tensor) else ""
            raise RuntimeError(
                f"The kernel Θ of {len(self._g)} outputs could not be solved{bad}, so nothing was changed. A derivative that "
                "is infinite where the output is not (sqrt or norm at 0) does this; look at the inputs, then lower `lr`."
            )

    def _solved(self, right: Tensor, shift: float, *, beside: bool = False) -> tuple[Parts, Tensor | None]:
        """The step for a right-hand side of the system, or something ``beside`` it, and ψ̃ if there is one."""
        if self.iterative:
            solution = self.iterative.solve(right, shift, beside=beside)
        else:
            solution = self.system.factorization.solve(right, shift)
        if not all_finite(solution):
            raise RuntimeError(
                f"The system of {len(self._g)} outputs has no finite solution in float64, so nothing was changed. Its entries "
                "are near the ends of the range: look at the scale of outputs and inputs."
            )
        if self.system.space == "parameter":
            return dict(zip(self._numels, solution.split(list(self._numels.values())), strict=True)), None
        return self.system.jacobian.rmv(self._unweigh(solution)), solution

    def _weigh(self, v: Tensor) -> Tensor:
        """Sᵀv."""
        return v if self._metric is None else self._metric.hessian_root_transpose(v)

    def _unweigh(self, v: Tensor) -> Tensor:
        """Sv."""
        return v if self._metric is None else self._metric.hessian_root(v)

    def _flat(self, parts: Parts) -> Tensor:
        return torch.cat([parts[name] for name in self._numels])
