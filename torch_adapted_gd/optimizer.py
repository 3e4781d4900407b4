"""AdaptedGD: the adapted gradient step as a `torch.optim.Optimizer`. Plumbing only; the mathematics is elsewhere."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import options, solve
from .calls import underlying
from .checks import all_finite, one_of, positive_integer, true_or_false
from .closure import Closure
from .damping import CarryOver, LevenbergMarquardt
from .kernel import METHODS
from .linearization import METRICS, SPACES, Linearization
from .loss import check_criterion
from .recorder import CallRecorder
from .report import StepReport
from .search import Outcome, Search
from .trials import JUDGES, Trial, TrialMaker, choose_judge, kept_momentum

_NEW = {"momentum": 0.0, "carry_over": ()}  # options that states of earlier versions do not have


class AdaptedGD(Optimizer):
    """Adapted gradient descent: outputs follow Euclidean gradient descent, straight towards the targets.

    Each step solves Θψ = Pg (2.22) with the tangent kernel Θ = DDᵀ of the outputs x that the loss went through and its
    output gradient g = ∇ₓC, and moves (2.21), along the homotopy of Theorem 2.3 (2.31)-(2.32),

        θ ← θ − η [α Dᵀψ + (1−α) Dᵀg],    Dᵀψ = D⁺g = (DᵀD)⁺ ∇_θC,

    so that Δx = −η (α 1 + (1−α) Θ) Pg + O(η²) (2.41): a Gauss–Newton step of least norm at α = 1, gradient descent at 0.

    It replaces any torch optimizer in one line; the model is given instead of its parameters.

    A call ``model(x)`` belongs to the step from the moment ``backward`` sends a gradient through its output into ``.grad``,
    and what clears ``.grad`` drops it; `step` uses it up. Calls before one step stack (gradient accumulation: divide each
    loss by their number, as usual). What else a step reads and leaves:

    - The step is computed from the gradient that ``backward`` sends to the outputs. ``.grad`` is filled as usual but not
      read: clipping or editing it changes nothing, and a warning says so once.
    - A loss that also depends on the parameters directly (a penalty on weights, derivatives of the network) has a part r
      in its gradient that no output carries. It takes a plain gradient step −lr·r, and a warning says so once.
    - The forward pass is repeated to differentiate it (once, or up to six times where the Jacobian is needed), hooks on its
      submodules included, with the same random numbers (dropout masks), autocast and modes. Buffers (BatchNorm's
      statistics), attributes that the forward pass sets on modules, and the random stream are left as they were.
    - The step is all or nothing: when anything is not finite, or the model's call cannot be repeated, it raises and
      neither parameters nor state have changed.

    It costs a forward pass, three backward passes and Q more that stop at the layers' outputs, the kernel, (N·Q)² numbers in
    float64 summed over the layers without the Jacobian (see `ntk`), or DᵀD, K² of them, and its Cholesky factorization, pivoted
    where the rank is short, or an eigenvalue decomposition where that is not clear. In every step the layers' rules are checked
    against backward passes; a model for which they are wrong is served by its Jacobian, and a warning says so once.

    Args:
        model: The module whose outputs the loss is computed from.
        lr: η, at least 0. Without ``criterion`` it multiplies the gradient of the loss as it is. Default 1.
        params: What to step, as for any torch optimizer (parameters, named ones, groups with their own ``lr``, ``alpha``
            and ``weight_decay``); by default the model's trainable parameters.
        criterion: The loss in use (`MSELoss`, `HalfSquaredLoss`, `CrossEntropyLoss`, `BCEWithLogitsLoss`): itself, not a
            multiple, of the model's outputs as they are. Then lr is measured in units of its output curvature c, η = lr/c:
            ``lr=1`` is the full Gauss–Newton step of a squared loss, whatever its reduction, the batch size and Q, and for the
            others the longest step that is sure to descend if outputs followed it exactly (`output_curvature`).
        alpha: α in [0, 1]. Default 1. At 0 without ``criterion`` the step is that of `torch.optim.SGD`, to the bit.
        damping: λ of Dᵀ(Θ + λ1)⁻¹g = (DᵀD + λ1)⁻¹∇_θC relative to the mean of diag Θ, at least 0; or what chooses it, a
            `LevenbergMarquardt`. By default that is so where a ``criterion`` tells the loss. Else 0, which is the paper's step:
            undamped full steps interpolate each mini-batch and undo the last one.
        rtol: Singular values of D up to rtol·σ_max count as zero. By default √(QN·ε) with ε of float64, or the machine epsilon
            of the forward pass (autocast's, under autocast) where that is larger; a λ far above that rounding makes them count.
        momentum: μ in [0, 1) of SPRING: what the last step leaves to be corrected on this batch is solved for, φ = D⁺(g − μDφ₋)
            + μφ₋ in place of D⁺g. With a number for ``damping`` and an lr near 1 − μ, it averages over batches. Default 0.
        weight_decay: w ≥ 0, decoupled: θ ← (1 − lr·w) θ beside the step, and no part of what trials are judged by. Default 0.
        metric: Of the outputs: ``"euclidean"`` (default, the paper's), or ``"ggn"``, the loss's Hessian H = SSᵀ there: a step
            Dᵀψ with ψ = S(SᵀΘS + λ1)⁻¹S⁺g, Newton's but for the network's curvature. For squared losses they are the same.
        line_search: Shorten steps, by halves, until the loss decreases by 10⁻⁴ of what its slope promises. Default False.
        trials: What tells the loss at trial parameters: ``"outputs"``, a repeated forward pass and the criterion;
            ``"closure"``, that of `step`; ``"auto"`` (default), the closure only where the criterion does not know all of it.
        space: Where to solve: ``"sample"``, with Θ, QN×QN; ``"parameter"``, with DᵀD, K×K, added up over blocks of samples; or
            ``"auto"`` (default), whichever is smaller.
        kernel: How to come by Θ, see `ntk`: ``"structured"`` sums it over the layers and raises for a model that this does
            not fit, ``"jacobian"`` builds it from D, ``"auto"`` (default) is structured where that is right.
        solver: ``"auto"`` (default): Cholesky where an estimate of the condition allows it, pivoted Cholesky where the rank is
            short and unambiguous, else ``"eigh"``, the eigenvalue decomposition, which may be had always; see `solve_kernel`.
        chunk_size: Samples' worth of rows of D that are differentiated at a time, see `ntk`.

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

    _step_supports_amp_scaling = True  # GradScaler hands over its scale instead of dividing .grad, which is not read

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        *,
        params: Iterable[Any] | None = None,
        criterion: nn.Module | None = None,
        alpha: float = 1.0,
        damping: float | LevenbergMarquardt | None = None,
        rtol: float | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        metric: str = "euclidean",
        line_search: bool = False,
        trials: str = "auto",
        space: str = "auto",
        kernel: str = "auto",
        solver: str = "auto",
        chunk_size: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"`model` should be a torch.nn.Module, but got {type(model).__name__}. Pass the model itself, not "
                "model.parameters(); to step only some of them use `params`."
            )
        self._model = model
        self._criterion = check_criterion(criterion)
        self._line_search = true_or_false("line_search", line_search)
        damping, self._policy = options.split_damping(damping, self._criterion, self._line_search)
        self._metric = one_of("metric", metric, METRICS)
        options.check_together(self._criterion, self._metric, self._policy, self._line_search)
        self._trials = one_of("trials", trials, JUDGES)
        self._space = one_of("space", space, SPACES)
        self._kernel = one_of("kernel", kernel, METHODS)
        self._solver = one_of("solver", solver, solve.METHODS)
        self._chunk_size = None if chunk_size is None else positive_integer("chunk_size", chunk_size)
        self._recorder = CallRecorder(model)
        self._said: set[str] = set()
        self.last_step: StepReport | None = None
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError("`model` should have trainable parameters, but none requires a gradient.")
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "damping": damping,
            "rtol": rtol,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "carry_over": (),  # of the policy, in the first group
        }
        options.check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model to step, with options of their own (``lr``, ``alpha``, ``weight_decay``).

        Args:
            param_group: As for any torch optimizer. ``damping``, ``rtol`` and ``momentum`` belong to the one system that all
                groups share, and have to be those of the other groups.

        Raises:
            TypeError: An option has the wrong type.
            ValueError: An option is out of range, or a parameter is not the model's, not real or of half precision.
        """
        if isinstance(param_group, dict) and self.param_groups:  # λ may have moved since the start
            param_group = {**{option: self.param_groups[0][option] for option in options.SHARED}, **param_group}
        given = {**self.defaults, **param_group} if isinstance(param_group, dict) else self.defaults
        options.check_options(given)
        for option in options.SHARED if self.param_groups else ():
            if given[option] != self.param_groups[0][option]:
                raise ValueError(
                    f"`{option}` should be the same in all parameter groups, which share one system, but got "
                    f"{given[option]!r} beside {self.param_groups[0][option]!r}."
                )
        super().add_param_group(param_group)
        try:
            names = {id(p): name for name, p in underlying(self._model).named_parameters()}
            added = [(names.get(id(p)), p) for p in self.param_groups[-1]["params"]]
            for name, p in added:
                options.check_parameter(name, p)
        except ValueError:
            self.param_groups.pop()
            raise
        for _, p in added:
            self._recorder.watch(p)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` (to None or zero), and drop the calls of the model whose outputs have received a gradient."""
        super().zero_grad(set_to_none=set_to_none)
        self._recorder.drop("zero_grad")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step along −[α Dᵀψ + (1−α) Dᵀg] and set `last_step`.

        Args:
            closure: Clears gradients, computes the loss, calls ``backward`` and returns the loss; evaluated once, and again at
                trial parameters where ``trials`` says so: with the random numbers of the first time, and without a trace.

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
        closure = None if function is None else Closure(function, self._model, recorder)
        loss = None if closure is None else closure()
        recorder.notice_cleared()
        if not recorder.calls and not recorder.gradients and closure is not None and loss is None:
            return None  # the closure chose to skip this batch, as Lightning's does when training_step returns None
        if float(getattr(self, "found_inf", 0.0)):
            self.last_step = StepReport.skipped(len(recorder.calls))
            recorder.drop("step")
            return loss
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and (processes := torch.distributed.get_world_size()) > 1:
            raise RuntimeError(
                f"AdaptedGD solves one system over the whole batch in one process, but {processes} processes are training "
                "together, and their parameters would drift apart. Train in a single process."
            )
        scale = self._loss_scale()
        if not recorder.calls:
            options.check_membership(self._model, self.param_groups)
            raise RuntimeError(recorder.why_no_call())
        trained = self._trained()
        arrived = {name: recorder.gradients[id(p)] for name, p in trained.items()}
        linearization = Linearization(
            self._model,
            recorder.calls,
            trained,
            arrived,
            loss_scale=scale,
            criterion=self._criterion,
            metric=self._metric,
            rtol=options.shared_option(self.param_groups, "rtol"),
            space=self._space,
            kernel_method=self._kernel,
            solver=self._solver,
            chunk_size=self._chunk_size,
        )
        propose = TrialMaker(linearization, self._groups())
        outcome, carry = self._search(linearization, propose, closure)
        report = StepReport.of(linearization, outcome)
        values = propose.finished(outcome.trial) if outcome.trial else {}
        for name, value in values.items():
            if not all_finite(value):
                raise RuntimeError(
                    f"The step would make parameter '{name}' not finite, so nothing was changed. Lower `lr` or raise `damping`."
                )
        self._warn(linearization, trained, arrived)  # before anything changes: a warning may be made an error
        if outcome.trial:
            self._take(linearization, outcome.trial, values)
            for group in self.param_groups:
                group["damping"] = outcome.damping
            self.param_groups[0]["carry_over"] = dataclasses.astuple(carry)
        recorder.drop("step", spent=True)
        self.last_step = report
        return loss

    def _search(self, linearization: Linearization, propose: TrialMaker, closure: Closure | None) -> tuple[Outcome, CarryOver]:
        """Choose the step; changes nothing."""
        damping, decay = (options.shared_option(self.param_groups, name) for name in ("damping", "momentum"))
        momentum = kept_momentum(self.state, linearization.trained) if decay else None
        if not self._policy and not self._line_search:
            return Search(linearization, propose).once(damping, momentum, decay), CarryOver()
        lrs = [float(group["lr"]) for group in self.param_groups]
        judge, contradiction = choose_judge(self._trials, linearization, closure, lrs)
        if contradiction:
            self._warn_once("criterion", contradiction)
        search = Search(linearization, propose, judge)
        if self._policy is None:
            return search.backtracking(damping, momentum, decay), CarryOver()
        unit = linearization.loss_unit
        carry = CarryOver(*self.param_groups[0]["carry_over"]).met(judge.before / unit)
        if carry.remark:
            self._warn_once("carry-over", carry.remark)
        outcome = search.levenberg_marquardt(self._policy, damping, momentum, decay, carry.share)
        return outcome, carry.stepped(judge.before / unit, None if outcome.change is None else outcome.change / unit)

    def _take(self, linearization: Linearization, trial: Trial, values: dict[str, Tensor]) -> None:
        """Move the parameters, and keep what the next step builds on."""
        decay = options.shared_option(self.param_groups, "momentum")
        for name, p in linearization.trained.items():
            p.copy_(values[name])
            if decay:
                kept = trial.direction.adapted[name] / linearization.curvature
                self.state[p]["momentum"] = kept.reshape(p.shape).to(p.dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Args:
            state_dict: State of an AdaptedGD with the same parameter groups.

        Raises:
            TypeError: An option has the wrong type.
            ValueError: It is the state of another optimizer, or an option is out of range.
        """
        state_dict = {**state_dict, "param_groups": [{**_NEW, **group} for group in state_dict["param_groups"]]}
        for group in state_dict["param_groups"]:
            missing = [name for name in self.defaults if name not in group]
            if missing:
                raise ValueError(
                    f"`state_dict` should come from an AdaptedGD, but a parameter group has no {', '.join(missing)}."
                )
            options.check_options(group)
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        chosen = ("_policy", "_metric", "_line_search", "_trials", "_space", "_kernel", "_solver", "_chunk_size")
        kept = ("_model", "_criterion", *chosen, "_said", "last_step")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_recorder" not in self.__dict__:  # unpickled or copied: watch the model that came along
            self._recorder = CallRecorder(self._model)
            for group in self.param_groups:
                for p in group["params"]:
                    self._recorder.watch(p)

    def _loss_scale(self) -> float:
        """What a GradScaler multiplied the loss by."""
        scale = getattr(self, "grad_scale", None)
        if scale is None and hasattr(self, "found_inf"):
            raise RuntimeError(
                "GradScaler.unscale_(optimizer) divided `.grad`, which AdaptedGD does not read, and hides the scale that the "
                "outputs' gradient still carries. Leave unscale_ out: scaler.step(optimizer) hands the scale over."
            )
        return 1.0 if scale is None else float(scale)

    def _groups(self) -> dict[int, dict[str, Any]]:
        return {id(p): group for group in self.param_groups for p in group["params"]}

    def _trained(self) -> dict[str, nn.Parameter]:
        """The parameters to step, by name, in the order of the model: those that received a gradient, as in torch."""
        groups = self._groups()
        named = underlying(self._model).named_parameters()
        ours = {name: p for name, p in named if id(p) in groups and p.requires_grad}
        for name, p in ours.items():
            options.check_parameter(name, p)  # it may have been cast since
        trained = {name: p for name, p in ours.items() if id(p) in self._recorder.gradients}
        if not trained:
            options.check_membership(self._model, self.param_groups)
            raise RuntimeError("No parameter of this optimizer requires a gradient any more. Unfreeze some, or do not step.")
        return trained

    def _warn(self, linearization: Linearization, trained: dict[str, nn.Parameter], arrived: dict[str, Tensor]) -> None:
        for about, text in linearization.remarks():
            self._warn_once(about, text)
        for name, p in trained.items():
            if p.grad is not None and not torch.equal(p.grad.to_dense(), arrived[name]):
                self._warn_once(
                    "edited",
                    f"`.grad` of '{name}' is not what backward delivered since the last step: it was clipped or edited, or not "
                    "cleared. AdaptedGD does not read `.grad`, so this changes nothing; to shorten steps lower `lr` or raise "
                    "`damping`.",
                )
                return

    def _warn_once(self, about: str, text: str) -> None:
        if about not in self._said:
            self._said.add(about)
            warnings.warn(text, stacklevel=7)
