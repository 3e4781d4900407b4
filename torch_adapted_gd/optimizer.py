"""AdaptedGD: the adapted gradient step as a `torch.optim.Optimizer`. Plumbing only; the mathematics is elsewhere."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

from . import options
from .checks import all_finite, one_of, positive_integer
from .closure import Closure
from .damping import CarryOver, LevenbergMarquardt
from .full_batch import full_loss
from .jacobian import METHODS
from .linearization import METRICS, Linearization
from .loss import check_criterion
from .recorder import CallRecorder
from .report import StepReport
from .search import Outcome, Search
from .solve import ConjugateGradients
from .straight import Progress, StraightLine
from .system import SPACES
from .trials import JUDGES, Trial, TrialMaker, choose_judge, kept_momentum
from .watching import WatchingOptimizer


class AdaptedGD(WatchingOptimizer):
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
    - The Jacobian comes from the graph of the user's own ``backward``: uses of parameters are noted while the forward pass
      runs, and differentiated when the loss's gradient arrives at the outputs. The forward pass is repeated only for trials of
      a policy, where the model was compiled, and where memory cannot hold the gradients at all uses: with the same random
      numbers (dropout masks), autocast and modes; buffers, attributes of modules and the random stream are left as they were.
    - The step is all or nothing: when anything is not finite it raises and
      neither parameters nor state have changed.

    It costs two backward passes and Q more that stop at the uses of parameters, the kernel, (N·Q)² numbers in float64 summed
    over the uses without the Jacobian (see `ntk`), or DᵀD, K² of them, and its Cholesky factorization, pivoted where the rank
    is short, or an eigenvalue decomposition where that is not clear. In every step the uses are checked against a backward
    pass; parameters for which they are not all are served by rows of the Jacobian, and a warning says so once.

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
        line_search: Shorten steps, by halves, until the loss decreases by 10⁻⁴ of what its slope promises; or a `StraightLine`:
            until the outputs move as predicted. Default False.
        trials: What tells the loss at trial parameters: ``"outputs"``, a repeated forward pass and the criterion;
            ``"closure"``, that of `step`; ``"auto"`` (default), the closure only where the criterion does not know all of it.
        space: Where to solve: ``"sample"``, with Θ, QN×QN; ``"parameter"``, with DᵀD, K×K, added up over blocks of samples; or
            ``"auto"`` (default), whichever is smaller.
        kernel: How to come by Θ, see `ntk`: ``"structured"`` sums it over the uses of parameters and raises for a model
            that this does not fit, ``"jacobian"`` builds it from D, ``"auto"`` (default) is structured where that is right.
        solver: ``"auto"`` (default): Cholesky where an estimate of the condition allows it, pivoted Cholesky where the rank is
            short and unambiguous, else ``"eigh"``, the eigenvalue decomposition, which may be had always; see `solve_kernel`.
            Or ``"cg"`` or a `ConjugateGradients`, which never form Θ; ``"auto"`` takes them beyond 8,192 outputs (and as many
            parameters), and where memory does not suffice, unless ``rtol`` or ``space="parameter"`` are given.
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
        line_search: bool | StraightLine = False,
        trials: str = "auto",
        space: str = "auto",
        kernel: str = "auto",
        solver: str | ConjugateGradients = "auto",
        chunk_size: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"`model` should be a torch.nn.Module, but got {type(model).__name__}. Pass the model itself, not "
                "model.parameters(); to step only some of them use `params`."
            )
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise ValueError(
                f"`model` should be on one device for AdaptedGD, but is an nn.DataParallel over {len(model.device_ids)}. Pass "
                "model.module, and call that."
            )
        self._model = model
        self._criterion = check_criterion(criterion)
        self._line_search = options.check_line_search(line_search)
        damping, self._policy = options.split_damping(damping, self._criterion, self._line_search)
        self._metric = one_of("metric", metric, METRICS)
        options.check_together(self._criterion, self._metric, self._policy, self._line_search)
        self._trials = one_of("trials", trials, JUDGES)
        self._space = one_of("space", space, SPACES)
        self._kernel = one_of("kernel", kernel, METHODS)
        self._solver = options.check_solver(solver, self._space, rtol)
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
            "carry_over": (),  # of the policies, in the first group
            "progress": (),
        }
        options.check_options(defaults)
        super().__init__(params, defaults)

    def full_batch(self, loader: Iterable[Any]) -> float:
        """Take one step on all batches of a loader as one: the exact step over the whole training set.

        The model is called once for each batch, so that no forward pass is larger than one, then the criterion once for all
        outputs, whatever its reduction; the step is that of one large batch. Gradients are cleared first. Batches are moved to
        the network's device. Beside the layers' inputs, memory holds B, the Q gradients of each sample's outputs at each
        layer's, in the parameters' dtype.

        Args:
            loader: Gives pairs (inputs, targets), such as a DataLoader; inputs may be a tensor, a tuple of positional inputs or
                a dict of keyword inputs. Its order may change from step to step (with it, conjugate gradients have no use for
                the last step's ψ).

        Returns:
            The loss before the step.

        Raises:
            TypeError: A batch is not such a pair, or the model returns something else than a tensor.
            ValueError: There is no ``criterion``, it has reduction ``"none"``, or there are no batches.
            RuntimeError: As for `step`; nothing has been changed then.
        """
        if self._criterion is None or self._criterion.reduction == "none":
            given = "None" if self._criterion is None else 'reduction="none"'
            raise ValueError(f'`criterion` should be a loss of reduction "mean" or "sum" for `full_batch`, but got {given}.')
        self.zero_grad()
        with torch.enable_grad():
            device = self.param_groups[0]["params"][0].device
            loss = full_loss(self._model, self._criterion, loader, device)
            loss.backward()
        self.step()
        return loss.item()

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
            start=self._kept_psi(trained),
        )
        propose = TrialMaker(linearization, self._groups())
        outcome, carried = self._search(linearization, propose, closure)
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
            self.param_groups[0].update(carried)
        recorder.drop("step", spent=True)
        self.last_step = report
        return loss

    def _search(
        self, linearization: Linearization, propose: TrialMaker, closure: Closure | None
    ) -> tuple[Outcome, dict[str, tuple[Any, ...]]]:
        """Choose the step, and what the policies are to keep for the next one; changes nothing."""
        damping, decay = (options.shared_option(self.param_groups, name) for name in ("damping", "momentum"))
        momentum = kept_momentum(self.state, linearization.trained) if decay else None
        if not self._policy and not self._line_search:
            return Search(linearization, propose).once(damping, momentum, decay), {}
        if isinstance(self._line_search, StraightLine):
            progress = Progress(*self.param_groups[0]["progress"])
            outcome, progress = Search(linearization, propose).straight(self._line_search, damping, momentum, decay, progress)
            return outcome, {"progress": dataclasses.astuple(progress)}
        lrs = [float(group["lr"]) for group in self.param_groups]
        judge, contradiction = choose_judge(self._trials, linearization, closure, lrs)
        if contradiction:
            self._warn_once("criterion", contradiction)
        search = Search(linearization, propose, judge)
        if self._policy is None:
            return search.backtracking(damping, momentum, decay), {}
        unit = linearization.loss_unit
        carry = CarryOver(*self.param_groups[0]["carry_over"]).met(judge.before / unit)
        if carry.remark:
            self._warn_once("carry-over", carry.remark)
        outcome = search.levenberg_marquardt(self._policy, damping, momentum, decay, carry.share)
        carry = carry.stepped(judge.before / unit, None if outcome.change is None else outcome.change / unit)
        return outcome, {"carry_over": dataclasses.astuple(carry)}

    def _take(self, linearization: Linearization, trial: Trial, values: dict[str, Tensor]) -> None:
        """Move the parameters, and keep what the next step builds on."""
        decay = options.shared_option(self.param_groups, "momentum")
        for name, p in linearization.trained.items():
            p.copy_(values[name])
            if decay:
                kept = trial.direction.adapted[name] / linearization.curvature
                self.state[p]["momentum"] = kept.reshape(p.shape).to(p.dtype)
        first = next(iter(linearization.trained.values()))
        if linearization.warm_start and (psi := trial.direction.weights) is not None:
            self.state[first]["psi"] = psi.to(first.dtype)  # loading a state casts it to that

    def _kept_psi(self, trained: dict[str, nn.Parameter]) -> Tensor | None:
        """ψ of the last step, for conjugate gradients to begin with."""
        kept = self.state.get(next(iter(trained.values())), {}).get("psi")
        return None if kept is None else kept.double()

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
