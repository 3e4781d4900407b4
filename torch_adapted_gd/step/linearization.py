"""The linearized loss at the current parameters: calls → kernel → solve → Dᵀψ. Nothing is changed."""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import all_finite
from ..jacobian import ParameterVector, norm
from ..solve import ConjugateGradients
from ..tracking.calls import Call, underlying, without_autocast
from ..tracking.closure import Given
from ..tracking.replay import Replay, precision
from .objective import Objective
from .output_metric import DiagonalMetric, Metric
from .recorded import Recorded
from .system import Dense, Direction, Problem

METRICS = ("euclidean", "ggn")
_MODEL_ERRORS = (ArithmeticError, AssertionError, RuntimeError, ValueError)  # that a forward pass may raise


class Linearization:
    """C(θ + δ) ≈ C + ∇_θC·δ + ½ (Dδ)ᵀH(Dδ), and the steps that minimize it, damped or not.

    Args:
        recorded: What the training step left.
        objective: The loss as a function of x; None without criteria.
        metric: One of `METRICS`.
        solver: How to solve; None for a choice by size.
        unit: The output curvature that ``lr`` is measured in without criteria.
        start: A ψ̃ to start iterations with, or None.
        damping: The smallest λ that `direction` will be asked for.

    Attributes:
        loss: C, by the criteria; 0 where there are none.
        gradient: ∇_θC by parameter, in the parameters' dtype.
        off_output: r = ∇_θC − Dᵀg, flat in float64; None if it is rounding error.
        off_output_fraction: |r|/|∇_θC|.
        curvature: The divisor c of η = lr/c: the largest of `Objective.curvatures`, or 1 in the GGN metric.
        system: The linear system.
        eps: Machine epsilon of the arithmetic of x.
        repeatable: Whether repeated calls give x for other parameters.
        num_calls, num_outputs, num_params: The number of calls, QN and K.

    Raises:
        RuntimeError: Something is not finite, empty, changed since the call, or cannot be repeated.
        ValueError: The outputs do not have the batch first.
        MemoryError: The Jacobian or the kernel would not fit.
    """

    def __init__(
        self,
        recorded: Recorded,
        objective: Objective | None,
        *,
        metric: str,
        solver: Dense | ConjugateGradients | None,
        unit: float,
        start: Tensor | None,
        damping: float,
    ) -> None:
        self._recorded, self._shares = recorded, (shares := recorded.shares)
        self._world, self.trained = shares.world, recorded.trained
        self.objective, self._rounding_of_g = objective, 0.0
        for each in recorded.stacked_from:
            each.check_unchanged(recorded.model)
        for call in recorded.calls if objective is None else ():
            call.check_alone()
        if sum(shares.lengths or [recorded.rows]) == 0:
            raise RuntimeError("The outputs that reached the loss are empty. Leave out empty batches.")
        self.num_params = recorded.num_params
        dtype = next(iter(self.trained.values())).dtype
        precisions = [precision(each, dtype) for each in recorded.stacked_from]
        coarsest = max([0.0 if objective is None else objective.eps, *precisions])
        told = self._world.objects((coarsest, recorded.repeatable, len(recorded.stacked_from)))
        self.eps = max(each[0] for each in told)
        self.repeatable = all(each[1] for each in told)
        self.num_calls = sum(each[2] for each in told)
        self._own_outputs = recorded.vector(lambda each: each.outputs)  # of this process
        self._outputs = shares.gathered(self._own_outputs)  # x, [R]
        own_g = arrived_g = recorded.vector(lambda each: each.gradients) / recorded.scale
        if objective is None:
            self.loss, self._g = 0.0, shares.gathered(own_g * shares.mean)
        else:
            self.loss, self._g = objective.value_and_gradient(self._outputs)
            own_g = self._g if self._world.size == 1 else objective.own_gradient(self._own_outputs)
            self._check_explained(arrived_g, own_g)
        self._check_finite()
        root, self.curvature = self._chosen_metric(metric, unit)
        self.system = Problem(recorded, self._g, root, solver, self.eps, start, damping).system()
        self.num_outputs = self.system.rows
        self.system.check_solved()
        self.gradient = {name: g if recorded.scale == 1 else g / recorded.scale for name, g in recorded.gradients.items()}
        self._find_off_output(own_g, dtype)

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
            return None, 1.0  # the loss depends on no output
        if float(c.min()) >= (1 - 1e-14) * largest:  # the same, but for rounding of the weights of processes
            return None, largest
        return DiagonalMetric((c / largest).sqrt(), c > 0), largest

    def _check_explained(self, arrived: Tensor, own: Tensor) -> None:
        """Compare the gradient that arrived at the outputs of this process with that of the criteria, ``own``.

        Raises:
            RuntimeError: They differ by more than rounding.
        """
        apart, size, explained = (float(torch.linalg.vector_norm(v)) for v in (arrived - own, arrived, own))
        if not apart > max(1e-3, 16 * self.eps) * max(size, explained):
            self._rounding_of_g = apart
            return
        if self.objective is None or not math.isfinite(apart):
            return  # other checks raise
        # Rounding of the outputs matters where the gradient is small, as for a classifier that is certain.
        x = torch.where(torch.isfinite(self._own_outputs), self._own_outputs.abs(), 0.0).clamp(min=1.0)
        if apart <= 64 * self.eps * float(torch.linalg.vector_norm(self.objective.own_curvatures(self._own_outputs) * x)):
            self._rounding_of_g = apart
            return
        if not self._recorded.repeatable:
            return  # a part of the gradient may have come through something that was computed from a call's output
        raise RuntimeError(
            f"The loss's gradient in the model's outputs has norm {size:.6g}, of which `criterion` explains {explained:.6g}, "
            "so nothing was changed. Another term of the loss depends on the outputs, or a hook edits gradients. Give "
            "AdaptedGD all criteria of the loss, criterion=(first, second); wrap functions as LossFunction(function)."
        )

    def _check_finite(self) -> None:
        """Raise a RuntimeError if an output that the loss depends on is not finite, or the loss's gradient in an output."""
        x, g = self._own_outputs, self._g[self._shares.here]
        bad_outputs = ~torch.isfinite(x) & (g != 0) if math.isfinite(self.loss) else ~torch.isfinite(x)
        for what, bad in (("output", bad_outputs), ("gradient of the loss in output", ~torch.isfinite(g))):
            if not bool(bad.any()):
                continue
            advice = "Look at its inputs and the parameters" if what == "output" else "Look at the loss and its targets"
            number, place, part = next(each for each in self._recorded.split(bad) if bool(each[2].any()))
            stacked_from = self._recorded.stacked_from
            whose = "of the model" if isinstance(stacked_from[number], Call) else "that a criterion was given"
            shape = list(stacked_from[number].outputs[place].shape)
            raise RuntimeError(
                f"In call {number + 1} of {len(stacked_from)} {whose}, the {what} {place} of shape {shape} has "
                f"{int(part.sum())} entries that are not finite, so nothing was changed. {advice}; a smaller `lr` or more "
                "`damping` keeps outputs bounded. zero_grad drops the call."
            )

    @functools.cached_property
    def rounding(self) -> float:
        """A bound of the loss's change by rounding of the outputs."""
        seen = self._g != 0
        return 4 * self.eps * float(self._g[seen].abs() @ self._outputs[seen].abs())

    @functools.cached_property
    def output_rounding(self) -> float:
        """A bound of the rounding of a difference of outputs."""
        return 4 * self.eps * float(self._outputs[torch.isfinite(self._outputs)].norm())

    @property
    def loss_unit(self) -> int:
        """The divisor that makes losses of batches of different sizes comparable."""
        return self.num_outputs if self.objective is not None and self.objective.is_sum else 1

    def direction(self, damping: float, momentum: ParameterVector | None = None) -> Direction:
        """φ = D⁺g, damped: φ = Dᵀ(Θ + λ1)⁻¹g = (DᵀD + λ1)⁻¹Dᵀg; with S where a metric asks for it.

        With a momentum it is that of SPRING (Goldshlager, Abrahamsen & Lin, arXiv:2401.10190). The momentum counts as a part of
        the step, and the solve corrects what it leaves on this batch: φ = D⁺(g − c D(μφ₋)) + c μφ₋.

        Args:
            damping: λ relative to the mean of diag Θ.
            momentum: μφ₋, divided by the curvature c of its step, or None.
        """
        shift, right = damping * self.system.scale, self.system.right
        if momentum is not None:
            right = right - self.system.right_of(self.curvature * self.system.jacobian.mv(momentum))
        adapted, weights = self.system.solve(right, shift)
        size = norm(adapted)
        if momentum is not None:
            adapted = {name: part + self.curvature * momentum[name] for name, part in adapted.items()}
        return Direction(adapted, weights, size, shift)

    def correction(self, bend: Tensor, direction: Direction) -> ParameterVector:
        """−D⁺(x(θ + δ) − x(θ) − Dδ), with the damping of a direction: the second-order part of a step; ``bend`` is ``[R]``."""
        parts, _ = self.system.solve(self.system.right_of(bend), direction.damping, beside=True)
        return {name: -part for name, part in parts.items()}

    def linear(self, change: ParameterVector) -> Tensor:
        """Dδ, ``[R]``."""
        return self.system.jacobian.mv(change)

    def slope(self, change: ParameterVector) -> float:
        """∇_θC·δ."""
        return sum(float(self.gradient[name].double().reshape(-1) @ part) for name, part in change.items())

    def outputs_moved(self, values: dict[str, Tensor]) -> Tensor | None:
        """x(θ') − x(θ), ``[R]``, from repeated calls with values θ' by name; None if it is unknown or not finite."""
        if not self.repeatable:
            return None
        there = None
        try:
            there = self._repeated(values)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except _MODEL_ERRORS as refused:  # of a model that checks its values, if it takes the present ones
            try:
                self._repeated({})
            except _MODEL_ERRORS:
                raise RuntimeError(
                    "The model's forward pass raised an error when it was repeated for a trial, and also when it was repeated "
                    "with the present parameters. Nothing was changed. Let a second call do what the first one does, or avoid "
                    f'trials: use judge="closure" or judge="next", or give `damping` a number. The error: {refused!r}'
                ) from refused
        return self._moved_to(there)

    def _repeated(self, values: dict[str, Tensor]) -> Tensor:
        """x(θ') of this process, from repeated calls with values θ' by name."""
        model, names = underlying(self._recorded.model), list(self.trained)
        parts = [Replay(model, call, names).outputs_with(values).double() for call in self._recorded.calls]
        return torch.cat([self._outputs.new_zeros(0), *parts])

    def outputs_moved_in(self, given: Given, before: int) -> Tensor | None:
        """The same, from the arguments of criteria in a closure; see `Objective.outputs_in`."""
        there = None if self.objective is None else self.objective.outputs_in(given, before, self._own_outputs)
        return self._moved_to(there)

    def _moved_to(self, there: Tensor | None) -> Tensor | None:
        """x(θ') − x(θ) from the part of x(θ') of this process; None if it is unknown in any process."""
        if self._world.any(there is None):
            return None
        assert there is not None
        there = self._shares.gathered(there)
        # Outputs that are not finite and no part of the loss may stay so.
        moved = torch.where(there == self._outputs, 0.0, there - self._outputs)
        return moved if all_finite(moved) else None

    def loss_change(self, moved: Tensor, change: ParameterVector) -> float:
        """C(θ + δ) − C(θ) for outputs that moved by Δx; terms that do not depend on x count to first order in δ."""
        beside = sum(float(part @ change[name]) for name, part in (self.off_output or {}).items())
        return self.criteria_change(moved) + beside

    def criteria_change(self, moved: Tensor) -> float:
        """C(x + Δx) − C(x), of the criteria alone."""
        assert self.objective is not None
        return self.objective.value(self._outputs + moved) - self.loss

    def remarks(self) -> Iterator[tuple[str, str]]:
        """Warnings for the user, each with a key, for which the user is warned once."""
        if self.off_output_fraction:
            yield (
                "off-output",
                f"{self.off_output_fraction:.2g} of the loss's gradient did not come through the model's outputs: the loss has "
                "a penalty on parameters, uses derivatives of the outputs, was partly computed from a submodule's call, or a "
                "hook edits gradients. This part takes a plain gradient step of length lr; only the part that came through the "
                "outputs is preconditioned. For an L2 penalty use `weight_decay`.",
            )
        if self.system.jacobian.remark:
            yield "kernel", self.system.jacobian.remark
        if (iterative := self.system.iterative) and iterative.last and not iterative.last.converged:
            yield (
                "cg",
                f"Conjugate gradients did not converge: after {iterative.last.iterations} iterations the residual is "
                f"{iterative.last.residual:.2g} of the right-hand side. The step uses the last iterate. "
                "Raise `damping`, or `max_iter` or `rtol` of ConjugateGradients.",
            )

    def _find_off_output(self, own_g: Tensor, dtype: torch.dtype) -> None:
        """Find ∇_θC and the part of it that did not come through x; ``own_g`` is the gradient of this process's loss in x."""
        whole = norm(self.gradient)
        for name, tensor in {} if math.isfinite(whole) else self.gradient.items():
            if not all_finite(tensor):
                raise RuntimeError(
                    f"The loss's gradient in parameter '{name}' is not finite although that in the outputs is, so nothing was "
                    "changed. Check penalties and other terms that do not depend on the outputs, and their derivatives."
                )
        # Zero by (2.16) if the loss is a function of the outputs.
        if self._world.size > 1:
            plain, off_output = self.system.jacobian.rmv(self._g), self._mean_beside(own_g)
            self.gradient = {name: plain[name].view_as(part) + part for name, part in off_output.items()}
            whole = norm(self.gradient)
        else:  # in the precision of the gradient that arrived, as more digits would not help
            with without_autocast(self._g.device.type):
                plain = self.system.jacobian.rmv(self._g.to(torch.promote_types(dtype, torch.float32)))
            off_output = {
                name: torch.sub(tensor.reshape(-1), plain[name], out=plain[name]) for name, tensor in self.gradient.items()
            }
        size = norm(off_output)
        # |D|_F |g| bounds the sums of products in Dᵀg. The user's backward pass rounds them in each layer: by 54 ε of Dᵀg in
        # a U-Net. Under autocast it rounds each product.
        told = self._world.objects((float(torch.linalg.vector_norm(own_g)), self._rounding_of_g))
        length, rounding_of_g = (self._shares.mean * sum(each[i] for each in told) for i in (0, 1))
        rounding = 128 * torch.finfo(dtype).eps * math.sqrt(self.system.square) * length
        rounding += 2 * math.sqrt(self.system.square) * rounding_of_g
        if self.eps > torch.finfo(dtype).eps:
            rounding += 2 * self.eps * whole
        negligible = size <= rounding
        self.off_output = None if negligible else {name: t.reshape(-1).double() for name, t in off_output.items()}
        self.off_output_fraction = 0.0 if negligible else size / max(whole, size)

    def _mean_beside(self, own_g: Tensor) -> ParameterVector:
        """The mean over processes of the part that did not come through x, in the shapes of the parameters."""
        through = self.system.jacobian.rmv(self._shares.gathered(own_g))  # Σ over processes of theirs
        jacobian = self.system.jacobian
        arrived = self._world.sum(jacobian.flat({name: part.double().reshape(-1) for name, part in self.gradient.items()}))
        beside = jacobian.parts((arrived - jacobian.flat(through)) * self._shares.mean)
        return {name: part.view(self.gradient[name].shape) for name, part in beside.items()}

    def agreed(self, number: float) -> float:
        """A number made the same in all processes, before it decides something: rounding differs between machines."""
        return self._world.same(number)

    def total(self, loss: float) -> float:
        """The loss of all processes, from that of this one: C, plus the mean over processes of other terms, as penalties."""
        if self._world.size == 1:
            return loss
        own = 0.0 if self.objective is None else float(self.objective.own(self._own_outputs))
        return self.loss + self._mean_of(loss - own)

    def total_change(self, change: float, moved: Tensor | None) -> float:
        """The same for a change of the loss; ``moved`` is the change of x, None if unknown."""
        if self._world.size == 1:
            return change
        if self.objective is None or moved is None:
            return self._mean_of(change)
        there = self._own_outputs + moved[self._shares.here]
        own = float(self.objective.own(there)) - float(self.objective.own(self._own_outputs))
        return self.criteria_change(moved) + self._mean_of(change - own)

    def _mean_of(self, number: float) -> float:
        return self._shares.mean * math.fsum(self._world.objects(number))
