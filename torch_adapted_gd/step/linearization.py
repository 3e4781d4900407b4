"""The loss around the present parameters: calls → kernel → solve → Dᵀψ. Tensors in, tensors out; nothing is changed."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import all_finite
from ..jacobian import norm
from ..solve import ConjugateGradients, SingularValueFactorization, default_rtol, default_svd_rtol
from ..tracking.calls import Call, Outputs, stacked, underlying, without_autocast
from ..tracking.closure import Given
from ..tracking.replay import Replay, batch_and_outputs, precision
from .iterative import KernelOperator
from .objective import Objective
from .output_metric import DiagonalMetric, Metric
from .shares import UNSHARED, Shares
from .system import Dense, Problem, choose_solver

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
        stacked_from: What x is stacked from in this process: its calls, and what else criteria were given.
        trained: The parameters θ by name.
        arrived: ∇_θC of each of these, as backward delivered it.
        loss_scale: What a GradScaler multiplied the loss by.
        objective: The loss as a function of x, if there are criteria that tell.
        metric: One of `METRICS`.
        solver: How to solve.
        unit: The output curvature that ``lr`` is measured in where no criterion tells.
        start: A ψ̃ to begin with, or None.
        damping: The least λ that will be asked for, see `direction`.
        shares: What each process has.

    Attributes:
        trained: θ.
        objective: As given.
        gradient: ∇_θC by parameter's name, in the parameters' dtype.
        off_output: r = ∇_θC − Dᵀg, flat in float64; None where it is rounding.
        off_output_fraction: |r|/|∇_θC|.
        curvature: c that η = lr/c divides by: the largest of `Objective.curvatures`, or 1 in the GGN metric.
        system: What is solved.
        warm_start: Whether ψ̃ should be kept for the next one.
        eps: Machine epsilon of the arithmetic that x came from.
        repeatable: Whether x can be had for other parameters by repeating calls.
        num_calls, num_outputs, num_params: Calls stacked, QN and K.

    Raises:
        RuntimeError: Something is not finite, empty, changed since the call, or cannot be repeated.
        ValueError: The outputs do not have the batch first.
        MemoryError: The Jacobian or the kernel would not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        stacked_from: list[Outputs],
        trained: dict[str, nn.Parameter],
        arrived: dict[str, Tensor],
        *,
        loss_scale: float,
        objective: Objective | None,
        metric: str,
        solver: Dense | ConjugateGradients | None,
        unit: float = 1.0,
        start: Tensor | None = None,
        damping: float = 0.0,
        shares: Shares = UNSHARED,
    ) -> None:
        dtype = next(iter(trained.values())).dtype
        self._shares = shares
        self._world = shares.world
        calls = [each for each in stacked_from if isinstance(each, Call)]
        for each in stacked_from:
            each.check_unchanged(model)
        for call in calls if objective is None else ():
            call.check_alone()
        own_rows = sum(n * q for n, q in map(batch_and_outputs, stacked_from))
        rows = sum(shares.lengths) if shares.lengths else own_rows
        if rows == 0:
            raise RuntimeError("The outputs that reached the loss are empty. Leave out empty batches.")
        self._model, self._calls, self._stacked = model, calls, stacked_from
        self.trained, self.objective, self._rounding_of_g = trained, objective, 0.0
        self._numels = {name: p.numel() for name, p in trained.items()}
        self.num_params = sum(self._numels.values())
        coarsest = max([0.0 if objective is None else objective.eps, *(precision(each, dtype) for each in stacked_from)])
        repeatable = len(calls) == len(stacked_from) and not any(call.nested for call in calls)
        told = self._world.objects((coarsest, repeatable, len(stacked_from)))
        self.eps = eps = max(each[0] for each in told)
        self.repeatable = all(each[1] for each in told)
        self.num_calls = sum(each[2] for each in told)
        device = next(iter(trained.values())).device
        self._own_outputs = _stack(stacked_from, lambda each: each.outputs, device)  # of this process
        self._outputs = shares.gathered(self._own_outputs)  # x, [R]
        own_g = arrived_g = _stack(stacked_from, lambda each: each.gradients, device) / loss_scale
        if objective is None:
            self._g = shares.gathered(own_g * shares.mean)
        else:
            self._g = objective.gradient(self._outputs)
            own_g = self._g if self._world.size == 1 else objective.own_gradient(self._own_outputs)
            self._check_explained(arrived_g, own_g)
        self._check_finite()
        self._metric, self.curvature = self._chosen_metric(metric, unit)
        kept = None if self._metric is None else self._metric.kept
        self.num_outputs = rows if kept is None else len(kept)
        local = self._metric is None or self._metric.local
        space, chosen = choose_solver(solver, self.num_params, self.num_outputs, self._g.device, self._world, local=local)
        if isinstance(chosen, ConjugateGradients) and self._metric is not None:
            self._metric = self._metric.padded()
        self.warm_start = isinstance(chosen, ConjugateGradients) and chosen.warm_start
        problem = Problem(model, stacked_from, list(trained), self._g, self._metric, chosen, damping, self._world)
        if isinstance(chosen, ConjugateGradients):
            self.system, square = problem.without_matrix(chosen, start if chosen.warm_start else None)
        elif chosen.factorization == "svd":
            rtol = default_svd_rtol((self.num_outputs, self.num_params), eps) if chosen.rtol is None else chosen.rtol
            self.system, square = problem.on_jacobian(rtol)
        else:
            rtol = default_rtol(self.num_outputs, eps) if chosen.rtol is None else chosen.rtol
            solving = {"rtol": rtol, "method": chosen.factorization, "truncate": chosen.rtol is not None}
            build = problem.in_parameter_space if space == "parameter" else problem.in_sample_space
            self.system, square = build(solving)
        self._check_solved()
        self.gradient = arrived if loss_scale == 1 else {name: tensor / loss_scale for name, tensor in arrived.items()}
        self._find_off_output(own_g, square, dtype, eps)

    def _chosen_metric(self, metric: str, unit: float) -> tuple[Metric | None, float]:
        """S of the metric, None for 1, and the curvature that lr is divided by."""
        x, g = self._outputs, self._g
        if self.objective is None:
            keep = (g != 0) | torch.isfinite(x)
            return (None if bool(keep.all()) else DiagonalMetric(torch.ones_like(x), keep)), unit
        if metric == "ggn":
            return self.objective.hessian_metric(x, g), 1.0
        c = self.objective.curvatures(x, g)
        largest = float(c.max())
        if not largest > 0:
            return None, 1.0  # nothing that the loss would look at
        rounding = 1e-14 if self._world.size > 1 else 0.0  # of the processes' weights
        if float(c.min()) >= (1 - rounding) * largest:
            return None, largest
        return DiagonalMetric((c / largest).sqrt(), c > 0), largest

    def _check_explained(self, arrived: Tensor, own: Tensor) -> None:
        """Make sure that the criteria explain what gradient arrived at the outputs of this process.

        Args:
            arrived: That gradient, rounded as the user's own backward pass did it.
            own: The one by the criteria.

        Raises:
            RuntimeError: They do not.
        """
        apart, size, explained = (float(torch.linalg.vector_norm(v)) for v in (arrived - own, arrived, own))
        if not apart > max(1e-3, 16 * self.eps) * max(size, explained):
            self._rounding_of_g = apart
            return
        if self.objective is None or not math.isfinite(apart):
            return  # for others to say
        # What rounding of the outputs does to a gradient that is small, as where classes are sure.
        x = torch.where(torch.isfinite(self._own_outputs), self._own_outputs.abs(), 0.0).clamp(min=1.0)
        if apart <= 64 * self.eps * float(torch.linalg.vector_norm(self.objective.own_curvatures(self._own_outputs) * x)):
            self._rounding_of_g = apart
            return
        if len(self._calls) < len(self._stacked) or any(call.nested for call in self._calls):
            return  # of a call's gradient, a part may have come by way of what was computed from it
        raise RuntimeError(
            f"The loss's gradient in the model's outputs has norm {size:.6g}, of which `criterion` explains {explained:.6g}, "
            "so nothing was changed. Something else in the loss depends on the outputs, or a hook edits gradients. Give "
            "AdaptedGD all criteria that the loss is made of, criterion=(first, second), functions as LossFunction(function)."
        )

    def _check_finite(self) -> None:
        """Make sure that outputs and the loss's gradients in them are finite, or that the loss does not look at them.

        Raises:
            RuntimeError: One is not.
        """
        x, g = self._own_outputs, self._g[self._shares.here]
        bad_outputs = ~torch.isfinite(x) & (g != 0) if math.isfinite(self.loss) else ~torch.isfinite(x)
        for what, bad in (("output", bad_outputs), ("gradient of the loss in output", ~torch.isfinite(g))):
            if not bool(bad.any()):
                continue
            first, number, parts = int(bad.nonzero()[0]), 0, [n * q for n, q in map(batch_and_outputs, self._stacked)]
            while first >= parts[number]:
                first, number = first - parts[number], number + 1
            each = self._stacked[number]
            n, _ = batch_and_outputs(each)
            marks = bad[sum(parts[:number]) : sum(parts[: number + 1])].view(n, -1)
            widths = [each.outputs[place].shape[1:].numel() for place in each.places]
            counts = [int(part.sum()) for part in marks.split(widths, 1)]
            place, count = next((p, c) for p, c in zip(each.places, counts, strict=True) if c)
            whose = "of the model" if isinstance(each, Call) else "that a criterion was given"
            advice = "Look at its inputs and the parameters" if what == "output" else "Look at the loss and its targets"
            raise RuntimeError(
                f"In call {number + 1} of {len(self._stacked)} {whose}, the {what} {place} of shape "
                f"{list(each.outputs[place].shape)} has {count} entries that are not finite, so nothing was changed. {advice}; "
                "a smaller `lr` or more `damping` keeps outputs bounded. zero_grad drops the call."
            )

    @functools.cached_property
    def loss(self) -> float:
        """C, by the criteria; 0 where there are none."""
        return 0.0 if self.objective is None else self.objective.value(self._outputs)

    @functools.cached_property
    def _replays(self) -> list[Replay]:
        return [Replay(underlying(self._model), call, list(self.trained)) for call in self._calls]

    @functools.cached_property
    def rounding(self) -> float:
        """What rounding of the outputs can do to the loss."""
        seen = self._g != 0
        return 4 * self.eps * float(self._g[seen].abs() @ self._outputs[seen].abs())

    @functools.cached_property
    def output_rounding(self) -> float:
        """What rounding of the outputs can do to a difference of them."""
        return 4 * self.eps * float(self._outputs[torch.isfinite(self._outputs)].norm())

    @property
    def loss_unit(self) -> int:
        """What to divide losses by for batches of different sizes to compare."""
        return self.num_outputs if self.objective is not None and self.objective.is_sum else 1

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
        """x(θ') − x(θ), ``[R]``, by a replay with other values of the parameters; None if that cannot be, or is not finite.

        Args:
            values: θ' by name.
        """
        if not self.repeatable:
            return None
        there: Tensor | None = None
        try:
            with torch.no_grad():
                there = torch.cat([self._outputs.new_zeros(0), *(each.outputs_with(values).double() for each in self._replays)])
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except (ArithmeticError, AssertionError, RuntimeError, ValueError):  # of a model that checks its values
            pass
        return self._moved_to(there)

    def outputs_moved_in(self, given: Given, before: int) -> Tensor | None:
        """The same, from what criteria were given in a closure; see `Objective.outputs_in`."""
        there = None if self.objective is None else self.objective.outputs_in(given, before, self._own_outputs)
        return self._moved_to(there)

    def _moved_to(self, there: Tensor | None) -> Tensor | None:
        """How x moved, from where it has moved to in this process; None if any does not know."""
        if self._world.any(there is None):
            return None
        assert there is not None
        there = self._shares.gathered(there)
        # What is not finite here, and no part of the loss, may stay so.
        moved = torch.where(there == self._outputs, 0.0, there - self._outputs)
        return moved if all_finite(moved) else None

    def loss_change(self, moved: Tensor, change: Parts) -> float:
        """C(θ + δ) − C(θ) for outputs that moved by Δx; what did not come through these to first order.

        Args:
            moved: Δx.
            change: δ.
        """
        beside = sum(float(part @ change[name]) for name, part in (self.off_output or {}).items())
        assert self.objective is not None
        return self.objective.value(self._outputs + moved) - self.loss + beside

    def expected(self, change: Parts) -> float:
        """C(x + Dδ) − C(x), of the criteria alone.

        Args:
            change: δ by name, in the shapes of the parameters.
        """
        assert self.objective is not None
        moved = self.linear({name: part.double().reshape(-1) for name, part in change.items()})
        return self.objective.value(self._outputs + moved) - self.loss

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
                "Raise `damping`, or `max_iter` or `rtol` of ConjugateGradients.",
            )

    def _find_off_output(self, own_g: Tensor, square: float, dtype: torch.dtype, eps: float) -> None:
        """What did not come through x of the gradients that arrived, and ∇_θC.

        Args:
            own_g: The gradient of this process's loss in its part of x.
            square: |D|².
            dtype: The parameters'.
            eps: Machine epsilon of the outputs.
        """
        whole = norm(self.gradient)
        for name, tensor in {} if math.isfinite(whole) else self.gradient.items():
            if not all_finite(tensor):
                raise RuntimeError(
                    f"The loss's gradient in parameter '{name}' is not finite although that in the outputs is, so nothing was "
                    "changed. Look at penalties and other terms that do not come through the outputs, and at their derivatives."
                )
        # Zero by (2.16) for a loss of the outputs alone.
        if self._world.size > 1:
            plain, off_output = self.system.jacobian.rmv(self._g), self._mean_beside(own_g)
            self.gradient = {name: plain[name].view_as(part) + part for name, part in off_output.items()}
            whole = norm(self.gradient)
        else:  # in the arithmetic of the gradient that arrived: more digits than that has would tell nothing
            with without_autocast(self._g.device.type):
                plain = self.system.jacobian.rmv(self._g.to(torch.promote_types(dtype, torch.float32)))
            off_output = {
                name: torch.sub(tensor.reshape(-1), plain[name], out=plain[name]) for name, tensor in self.gradient.items()
            }
        size = norm(off_output)
        # |D|_F |g| bounds the sums of products in Dᵀg. The user's backward pass rounds them layer by layer: 54 ε of Dᵀg in a
        # U-Net. Under autocast it rounds each product.
        told = self._world.objects((float(torch.linalg.vector_norm(own_g)), self._rounding_of_g))
        length, rounding_of_g = (self._shares.mean * sum(each[i] for each in told) for i in (0, 1))
        rounding = 128 * torch.finfo(dtype).eps * math.sqrt(square) * length
        rounding += 2 * math.sqrt(square) * rounding_of_g
        if eps > torch.finfo(dtype).eps:
            rounding += 2 * eps * whole
        negligible = size <= rounding
        self.off_output = None if negligible else {name: t.reshape(-1).double() for name, t in off_output.items()}
        self.off_output_fraction = 0.0 if negligible else size / max(whole, size)

    def _mean_beside(self, own_g: Tensor) -> Parts:
        """The mean over processes of what did not come through x, in the shapes of the parameters."""
        through = self.system.jacobian.rmv(self._shares.gathered(own_g))  # Σ over processes of theirs
        arrived = self._world.sum(torch.cat([self.gradient[name].double().reshape(-1) for name in self._numels]))
        beside = (arrived - self._flat(through)) * self._shares.mean
        parts = zip(self._numels, beside.split(list(self._numels.values())), strict=True)
        return {name: part.view(self.gradient[name].shape) for name, part in parts}

    def agreed(self, number: float) -> float:
        """A number that something is decided by, the same in all processes: rounding may differ between machines."""
        return self._world.same(number)

    def total(self, loss: float) -> float:
        """What a loss of this process and those of the others are together.

        Terms that criteria tell are C; the rest, as penalties, is there in each process and counts as its mean.
        """
        if self._world.size == 1:
            return loss
        if self.objective is None:
            return self._mean_of(loss)
        return self.loss + self._mean_of(loss - self._own_loss(self._own_outputs))

    def total_change(self, change: float, moved: Tensor | None) -> float:
        """The same of a change of the loss, where x moved by so much, if that is known."""
        if self._world.size == 1:
            return change
        if self.objective is None or moved is None:
            return self._mean_of(change)
        there = self._own_outputs + moved[self._shares.here]
        beside = change - (self._own_loss(there) - self._own_loss(self._own_outputs))
        return self.objective.value(self._outputs + moved) - self.loss + self._mean_of(beside)

    def _own_loss(self, x: Tensor) -> float:
        """The loss of this process by its criteria, as its loss has it."""
        assert self.objective is not None
        with torch.no_grad():
            return float(self.objective.own(x))

    def _mean_of(self, number: float) -> float:
        return self._shares.mean * math.fsum(self._world.objects(number))

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
        factorization, by_parameter = self.system.factorization, self.system.space == "parameter"
        if self.iterative:
            solution = self.iterative.solve(right, shift, beside=beside)
        elif isinstance(factorization, SingularValueFactorization):
            solution, by_parameter = factorization.step(right, shift), True
        else:
            solution = factorization.solve(right, shift)
        if not all_finite(solution):
            raise RuntimeError(
                f"The system of {len(self._g)} outputs has no finite solution in float64, so nothing was changed. Its entries "
                "are near the ends of the range: look at the scale of outputs and inputs."
            )
        if by_parameter:
            return dict(zip(self._numels, solution.split(list(self._numels.values())), strict=True)), None
        return self.system.jacobian.rmv(self._unweigh(solution)), solution

    def _weigh(self, v: Tensor) -> Tensor:
        """Sᵀv."""
        return v if self._metric is None else self._metric.root_transpose(v)

    def _unweigh(self, v: Tensor) -> Tensor:
        """Sv."""
        return v if self._metric is None else self._metric.root(v)

    def _flat(self, parts: Parts) -> Tensor:
        return torch.cat([parts[name] for name in self._numels])


def _stack(outputs: list[Outputs], values: Callable[[Outputs], dict[int, Tensor]], device: torch.device) -> Tensor:
    """One vector ``[R]`` in float64 of values of all outputs; zero where there is none."""
    if not outputs:
        return torch.zeros(0, dtype=torch.float64, device=device)
    parts = []
    for each in outputs:
        found = values(each)
        parts.append(stacked([found.get(place, torch.zeros_like(each.outputs[place])).double() for place in each.places]))
    return torch.cat(parts)
