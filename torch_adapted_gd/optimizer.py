"""AdaptedGD: the adapted gradient step as a `torch.optim.Optimizer`. Plumbing only; the mathematics is elsewhere."""

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable

from . import options
from .checks import checksum, one_of
from .full_batch import full_loss, repeated_samples
from .jacobian.live import linearize_live
from .losses import check_criteria
from .policies import Backtracking, Fixed, LevenbergMarquardt, StraightLine
from .report import StepReport
from .solve import ConjugateGradients
from .step.decision import Step
from .step.default import choose_policy
from .step.kept import Kept, Move, expected
from .step.linearization import METRICS, Linearization
from .step.objective import Objective
from .step.recorded import Recorded, TotalLoss
from .step.remembered import State
from .step.shares import UNSHARED, Shares, Told, mean_or_sum, shared_out
from .step.system import Dense
from .step.trials import TrialMaker, choose_judge, learned_curvature
from .tracking.calls import Call, Outputs, underlying
from .tracking.closure import Closure
from .tracking.recorder import CallRecorder
from .tracking.replay import batch_and_outputs
from .watching import WatchingOptimizer
from .world import World


class AdaptedGD(WatchingOptimizer):
    """Adapted gradient descent: outputs follow Euclidean gradient descent, straight towards the targets.

    Each step solves Θψ = Pg (2.22) with the tangent kernel Θ = DDᵀ of the outputs x that the loss went through and its
    output gradient g = ∇ₓC, and moves (2.21), along the homotopy of Theorem 2.3 (2.31)-(2.32),

        θ ← θ − η [α Dᵀψ + (1−α) Dᵀg],    Dᵀψ = D⁺g = (DᵀD)⁺ ∇_θC,

    so that Δx = −η (α 1 + (1−α) Θ) Pg + O(η²) (2.41): a Gauss–Newton step of least norm at α = 1, gradient descent at 0.

    AdaptedGD replaces any torch optimizer in one line. Pass the model instead of its parameters.

    If you pass the loss as ``criterion``, x are the entries of the tensors that the criterion was called with and that depend
    on trained parameters: the model's outputs, or anything computed from them, such as the residuals of a differential
    equation. Several calls before ``backward``, multiples, sums, ``reduction="none"`` with weights, and accumulated gradients
    are followed exactly. Without a criterion, x are the outputs of the model that received a gradient. A step uses all calls
    that ``backward`` sent a gradient through since the last `step` or `zero_grad`.

    - A step is all or nothing. If anything is not finite, it raises, and neither parameters nor state have changed.
    - The step does not read ``.grad``, which is filled as usual. Clipping or editing it changes nothing, and a warning says so
      once.
    - A loss that also depends on the parameters directly, as by a penalty on weights, has a part r in its gradient that does
      not come through x. The parameters take a plain gradient step −lr·r for it, and a warning says so once.
    - The Jacobian comes from the graph of your own ``backward``, and is checked against it. The forward pass is repeated only
      for trials of a policy, for compiled models, and if memory does not suffice. A repeated pass has the same random numbers
      (dropout masks), autocast and modes; buffers, attributes of modules and the random stream stay as they were.
    - A step costs two backward passes, Q more that stop at the uses of parameters, the kernel of (N·Q)² numbers in float64 (or
      DᵀD, K² of them), and its factorization. Parameters whose uses cannot all be seen are served by rows of the Jacobian, and
      a warning says so once.

    Args:
        model: The module to train.
        lr: η ≥ 0, in units of the output curvature c of the loss: η = lr/c. ``lr=1`` (default) is the full Gauss–Newton step
            of a squared loss, whatever its reduction, multiples and weights. For other losses it is the longest step that
            is sure to descend if the outputs follow it exactly. Without ``criterion``, c is learned from the values of a
            closure if the policy needs the loss; else c is 1, and lr multiplies the gradient of the loss.
        criterion: The loss, a module, or several in a tuple: the same objects that the training step calls. Wrap a function in
            `LossFunction`.
        params: What to step, as for any torch optimizer (parameters, named ones, or groups with their own ``lr``, ``alpha``
            and ``weight_decay``). Default: the model's trainable parameters.
        alpha: α in [0, 1]. Default 1. At 0 without ``criterion``, the step is that of `torch.optim.SGD`, to the bit.
        damping: λ ≥ 0 of Dᵀ(Θ + λ1)⁻¹g = (DᵀD + λ1)⁻¹∇_θC, relative to the mean of diag Θ. Or a policy that chooses λ or the
            length of the step: `LevenbergMarquardt`, `Backtracking`, `StraightLine`. Default: LevenbergMarquardt() if a
            ``criterion`` or a closure tells the loss; Backtracking() with Dense(factorization="svd") if the criterion gets
            derivatives of the model on points that stay the same (docs/pinns.md); else 0, the paper's step. Undamped full
            steps interpolate each mini-batch and undo the last one.
        momentum: μ in [0, 1) of SPRING: φ = D⁺(g − μDφ₋) + μφ₋ in place of D⁺g, where φ₋ is the last step's. With a number
            for ``damping`` and an lr near 1 − μ, it averages over batches. Default 0.
        weight_decay: w ≥ 0, decoupled: θ ← (1 − lr·w) θ beside the step. Trials are judged without it. Default 0.
        metric: Of the outputs. ``"euclidean"`` (default) is the paper's; where c differs between outputs, as by weights, each
            is measured by its own. ``"ggn"`` is the loss's Hessian H = SSᵀ: a step Dᵀψ with ψ = S(SᵀΘS + λ1)⁻¹S⁺g, which is
            Newton's without the network's curvature. For squared losses both are the same.
        solver: `Dense`, `ConjugateGradients`, or ``"auto"`` (default): Dense() up to 8,192 outputs or parameters if memory
            suffices, else ConjugateGradients().
        process_group: The processes that train together, each with its share of the batch (docs/distributed.md). Default:
            those of a model in DistributedDataParallel, else all that torch.distributed knows of.

    Attributes:
        last_step: The `StepReport` of the last step, or None.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, a parameter is not the model's, or nothing is trainable.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
        >>> criterion = nn.MSELoss()
        >>> optimizer = AdaptedGD(model, criterion=criterion)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 2)
        >>> for _ in range(15):
        ...     optimizer.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     loss.backward()
        ...     optimizer.step()
        >>> bool(criterion(model(x), y) < 1e-9), optimizer.last_step.rank
        (True, 16)
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        *,
        criterion: nn.Module | tuple[nn.Module, ...] | list[nn.Module] | None = None,
        params: Iterable[Any] | None = None,
        alpha: float = 1.0,
        damping: float | LevenbergMarquardt | Backtracking | StraightLine | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        metric: str = "euclidean",
        solver: str | Dense | ConjugateGradients = "auto",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        options.check_model(model)
        self._model = model
        self._criteria = check_criteria(criterion)
        self._policy = options.check_damping(damping)
        self._metric = one_of("metric", metric, METRICS)
        if metric == "ggn" and not self._criteria:
            raise ValueError('`criterion` should be given for metric="ggn", which is the Hessian of that loss, but got None.')
        self._solver = options.check_solver(solver)
        self._recorder = CallRecorder(model, self._criteria, linearize_live)
        self._process_group = process_group
        self._said: set[str] = set()
        self._rejected = 0
        self.last_step: StepReport | None = None
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError("`model` should have trainable parameters, but none requires a gradient.")
        start = self._policy or (LevenbergMarquardt() if self._criteria else Fixed())
        first = start.initial if isinstance(start, LevenbergMarquardt) else start.damping
        defaults = {"lr": lr, "alpha": alpha, "damping": first, "momentum": momentum, "weight_decay": weight_decay}
        options.check_options(defaults)
        Joinable.__init__(self)
        super().__init__(params, defaults)

    def full_batch(self, loader: Iterable[Any]) -> float:
        """Take one step on all batches of a loader as one: the exact step over the whole training set.

        Gradients are cleared first. The model is called once for each batch, moved to the network's device, then the criterion
        once for all outputs, whatever its reduction. Memory holds the layers' inputs, and the Q gradients of each sample's
        outputs at each layer's, in the parameters' dtype. Where several processes train together, each gives its own share of
        the samples, and the loss is that of all.

        Args:
            loader: Gives pairs (inputs, targets), such as a DataLoader; inputs may be a tensor, a tuple of positional inputs or
                a dict of keyword inputs. Its order may change from step to step (with it, conjugate gradients have no use for
                the last step's ψ).

        Returns:
            The loss before the step.

        Raises:
            TypeError: A batch is not such a pair, or the model returns something else than a tensor.
            ValueError: There is not one ``criterion``, it has reduction ``"none"``, or there are no batches.
            RuntimeError: As for `step`; nothing has been changed then.
        """
        if len(self._criteria) != 1 or getattr(self._criteria[0], "reduction", "mean") == "none":
            given = f"{len(self._criteria)} of them" if len(self._criteria) != 1 else 'reduction="none"'
            raise ValueError(f"`criterion` should be one loss that returns a number for `full_batch`, but got {given}.")
        self.zero_grad()
        if repeats := repeated_samples(loader):
            self._warn_once("padded", repeats)
        world = self._world()
        # DistributedDataParallel need not exchange gradients that nobody reads.
        no_sync = getattr(self._model, "no_sync", None) if world.size > 1 else None
        with world.together(), torch.enable_grad(), no_sync() if no_sync else contextlib.nullcontext():
            device = self.param_groups[0]["params"][0].device
            loss = full_loss(self._model, self._criteria[0], loader, device)
            loss.backward()
            value = loss.item() if world.size == 1 else mean_or_sum(world, self._recorder.terms[0], loss.item())
        self.step()
        return value

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step along −[α Dᵀψ + (1−α) Dᵀg] and set `last_step`.

        Args:
            closure: Clears gradients, computes the loss, calls ``backward`` and returns the loss; evaluated once, and again at
                trial parameters where a policy asks for it: with the random numbers of the first time, and without a trace.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: No call of the model reached the loss; outputs, loss gradient, kernel or new parameters are not
                finite; or inputs or model have changed since the call. Nothing has been changed then.
            TypeError: ``closure`` was asked for the loss and returned something else than a number.
            ValueError: The outputs do not have the batch first, or the parameters were cast to half precision.
            MemoryError: The Jacobian or the kernel would not fit.
        """
        try:
            return self._step(closure)
        except BaseException:
            for name in ("grad_scale", "found_inf"):  # a GradScaler takes its marks away only after a step that succeeds
                self.__dict__.pop(name, None)
            raise

    def _step(self, function: Callable[[], float] | None) -> float | None:
        recorder = self._recorder
        world = self._world()
        if world.size > 1 and not self._without_samples:
            Join.notify_join_context(self)
        closure = None if function is None else Closure(function, self._model, recorder.criterion_calls)
        earlier = [*recorder.calls, *recorder.terms]
        loss = None if closure is None else closure()
        recorder.notice_cleared()
        with world.together():
            carry_out = self._decided(world, closure, loss, earlier)
            world.agree()
        carry_out()  # in all processes or in none
        return loss

    def _decided(self, world: World, closure: Closure | None, loss: float | None, earlier: list[Any]) -> Callable[[], None]:
        """What a step comes to: a function that carries it out, until which nothing is changed."""
        if (instead := self._in_place_of_a_step(world, idle=closure is not None and loss is None)) is not None:
            return instead
        recorder = self._recorder
        scale = self._loss_scale()
        stacked_from = self._stacked_from()
        if not world.any(bool(stacked_from)):
            options.check_membership(self._model, self.param_groups)
            raise RuntimeError(recorder.why_no_call())
        shares, trained, with_closure = self._shared(world, stacked_from, closure is not None)
        if with_closure and closure is None:  # a process without samples, which has nothing to evaluate
            closure = Closure(lambda: 0.0, self._model, recorder.criterion_calls)
            closure()
        arrived = recorder.gradients
        gradients = {name: arrived[id(p)] if id(p) in arrived else torch.zeros_like(p) for name, p in trained.items()}
        recorded = Recorded(self._model, stacked_from, trained, gradients, recorder.terms, scale, shares)
        kept, total = Kept(self.state, self.param_groups), TotalLoss(recorded)
        state, bad = kept.look_back(self._policy or LevenbergMarquardt(), total, underlying(self._model))
        if bad:
            return lambda: self._undo(kept, state)
        objective = Objective(recorded) if self._criteria else None
        if closure is not None and world.any(any(each in earlier for each in (*recorder.calls, *recorder.terms))):
            closure = None  # gradients accumulate, and it tells the last loss alone
            self._warn_of_accumulation()
        told_by = {"with_criteria": bool(self._criteria), "with_closure": closure is not None}
        chosen = choose_policy(self._policy, self._solver, recorded, state, total, **told_by)
        policy, unit = chosen.policy, 1.0
        if objective is None and closure is not None and isinstance(policy, LevenbergMarquardt | Backtracking):
            unit = state.get("curvature", 0.0) or learned_curvature(recorded, closure.value)
        linearization = Linearization(
            recorded,
            objective,
            metric=self._metric,
            solver=chosen.solver,
            unit=unit,
            start=kept.psi,
            damping=policy.first_damping(state),
        )
        propose = TrialMaker(linearization, self._groups())
        decay = options.shared_option(self.param_groups, "momentum")
        judge = choose_judge(policy, linearization, closure)
        outcome = policy.search(Step(linearization, propose, judge, kept.momentum(trained, decay), state))
        later = judge is not None and judge.later
        move = None
        if outcome.trial:
            values = propose.finished(outcome.trial)
            remembered = {**outcome.state, **chosen.remembered}
            if later:
                remembered.update(expected(linearization, values, state, total))
            move = Move.of(linearization, outcome.trial, values, remembered, with_momentum=decay > 0)
        report, move = world.same((StepReport.of(linearization, outcome), move))
        self._warn(linearization, recorded)  # before anything changes: a warning may be made an error

        def carry_out() -> None:
            if move is None:
                kept.remember(chosen.if_rejected)
            else:
                kept.take(trained, move, underlying(self._model), judged_later=later)
            if not later or "predicted" in state:  # a step that nobody has judged yet is none
                self._note_rejection(rejected=move is None and not outcome.hidden)
            recorder.drop("step", spent=True)
            self.last_step = report

        return carry_out

    def _in_place_of_a_step(self, world: World, *, idle: bool) -> Callable[[], None] | None:
        """What is done if this is no step; ``idle`` if the closure returned no loss. None if it is one."""
        empty = not self._recorder.gradients
        idle = idle and empty and not self._recorder.calls
        told = world.objects((idle, float(getattr(self, "found_inf", 0.0)) > 0, empty))
        if all(each[0] for each in told):
            return lambda: None  # the closure chose to skip this batch, as Lightning's does when training_step returns None
        if any(each[1] for each in told):
            return self._skip
        if all(each[2] for each in told) and not world.any(not self._asked_for_state()):
            return lambda: None
        return None

    def _stacked_from(self) -> list[Outputs]:
        """What x is stacked from: what the criteria were given, in the order of calls; without criteria, the calls."""
        if not self._criteria:
            return list(self._recorder.calls)
        parts = {id(part.of): part.of for term in self._recorder.terms for part in term.parts}
        return sorted(parts.values(), key=lambda each: each.number if isinstance(each, Call) else math.inf)

    def _warn_of_accumulation(self) -> None:
        if self._policy is None and not self._criteria:
            self._warn_once(
                "accumulated",
                "Gradients of several backward passes make this step, and the closure tells the last one's loss alone, so that "
                "no policy can judge it: it is the paper's step, `lr` times the gradient. Give AdaptedGD the loss as "
                "`criterion`, or a number for `damping`.",
            )

    def _skip(self) -> None:
        self.last_step = StepReport(status="skipped", num_calls=len(self._recorder.calls))
        self._recorder.drop("step")

    def _shared(
        self, world: World, stacked_from: list[Outputs], with_closure: bool
    ) -> tuple[Shares, dict[str, nn.Parameter], bool]:
        """What each process has of a step; the parameters that it moves: those that received a gradient in any; with a closure?

        Raises:
            RuntimeError: The processes do not train the same.
            ValueError: A layer normalizes over all of them.
        """
        if world.size == 1:
            return UNSHARED, self._trained(), with_closure
        options.check_normalization(self._model)
        named = underlying(self._model).named_parameters()
        mine = Told(
            rows=sum(n * q for n, q in map(batch_and_outputs, stacked_from)),
            trained={name for name, p in named if id(p) in self._recorder.gradients},
            alike=self._alike(),
            with_closure=with_closure,
        )
        shares, told = shared_out(world, mine, self._recorder.terms if self._criteria else [], self._criteria)
        trained = self._trained(set().union(*(each.trained for each in told)))
        return shares, trained, any(each.with_closure for each in told)

    def _alike(self) -> dict[str, Any]:
        """What has to be the same in all processes."""
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        parameters = self._groups_parameters()
        states = [sorted(self.state.get(p, {}).items()) for p in parameters]
        return {
            "options": repr((groups, self._policy, self._metric, self._solver)),
            "criteria": [(type(each).__name__, getattr(each, "reduction", None)) for each in self._criteria],
            "shapes of parameters": [tuple(p.shape) for p in parameters],
            "numbers of trainable parameters": [number for number, p in enumerate(parameters) if p.requires_grad],
            "parameters": checksum(parameters),
            "states of optimizers": (sum(map(len, states)), checksum(value for state in states for _, value in state)),
        }

    def _undo(self, kept: Kept, state: State) -> None:
        """Take the last step back."""
        kept.undo(state)
        num_calls = len(self._recorder.terms)
        self.last_step = StepReport(status="rejected", fraction=0.0, num_calls=num_calls, relative_damping=state["damping"])
        self._recorder.drop("step", spent=True)

    def _warn(self, linearization: Linearization, recorded: Recorded) -> None:
        for about, text in linearization.remarks():
            self._warn_once(about, text)
        # DistributedDataParallel averages `.grad`.
        for name, p in recorded.trained.items() if self._world().size == 1 else ():
            arrived, scale = recorded.gradients[name], recorded.scale
            if p.grad is None or torch.equal(p.grad.to_dense(), arrived):
                continue
            if scale == 1 or not torch.equal(p.grad.to_dense(), arrived / scale):  # which a GradScaler does
                self._warn_once(
                    "edited",
                    f"`.grad` of '{name}' is not what backward delivered since the last step: it was clipped or edited, or not "
                    "cleared. AdaptedGD does not read `.grad`, so this changes nothing; to shorten steps lower `lr` or raise "
                    "`damping`.",
                )
                return
