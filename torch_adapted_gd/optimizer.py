"""AdaptedGD: the adapted gradient step as a `torch.optim.Optimizer`. Plumbing only; the mathematics is elsewhere."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import solve
from .calls import underlying
from .checks import all_finite, one_of, positive_integer, real_number
from .direction import Direction, step_direction
from .kernel import METHODS
from .loss import check_criterion
from .recorder import CallRecorder
from .report import StepReport


class AdaptedGD(Optimizer):
    """Adapted gradient descent: outputs follow Euclidean gradient descent, straight towards the targets.

    Each step solves Θψ = Pg (2.22) with the tangent kernel Θ = DDᵀ of the outputs x that the loss went through and its
    output gradient g = ∇ₓC, and moves (2.21), along the homotopy of Theorem 2.3 (2.31)-(2.32),

        θ ← θ − η [α Dᵀψ + (1−α) Dᵀg],    Dᵀψ = D⁺g = (DᵀD)⁺ ∇_θC,

    so that Δx = −η (α 1 + (1−α) Θ) Pg + O(η²) (2.41): a Gauss–Newton step of least norm at α = 1, gradient descent at 0.

    It replaces any torch optimizer in one line; the model is given instead of its parameters::

        optimizer = AdaptedGD(model, lr=1.0, criterion=criterion)

    A call ``model(x)`` belongs to the step from the moment ``backward`` sends a gradient through its output into ``.grad``,
    and what clears ``.grad`` drops it; `step` uses it up. Calls before one step stack (gradient accumulation: divide each
    loss by their number, as usual). What else a step reads and leaves:

    - The step is computed from the gradient that ``backward`` sends to the outputs. ``.grad`` is filled as usual but not
      read: clipping or editing it changes nothing, and a warning says so once.
    - A loss that also depends on the parameters directly (a penalty on weights, derivatives of the network) has a part r
      in its gradient that no output carries. It takes a plain gradient step −lr·r, and a warning says so once.
    - ``weight_decay`` is decoupled: θ ← (1 − lr·weight_decay) θ before the step.
    - The forward pass is repeated to differentiate it (once, or up to six times where the Jacobian is needed), hooks on its
      submodules included, with the same random numbers (dropout masks), autocast and modes. Buffers (BatchNorm's
      statistics), attributes that the forward pass sets on modules, and the random stream are left as they were.
    - The step is all or nothing: when anything is not finite, or the model's call cannot be repeated, it raises and
      neither parameters nor state have changed.

    It costs a forward pass, three backward passes and Q more that stop at the layers' outputs, the kernel, (N·Q)² numbers
    in float64 summed over the layers without the Jacobian (see `ntk`), and its Cholesky factorization, pivoted where the rank
    is short, or an eigenvalue decomposition where that is not clear. In every step the layers' rules are checked against a
    backward pass, and the kernel against |Dᵀu|² for a random u; a model for which either is wrong is served by its Jacobian,
    and a warning says so once.

    Args:
        model: The module whose outputs the loss is computed from.
        lr: η, at least 0. Without ``criterion`` it multiplies the gradient of the loss as it is. Default 1.
        params: What to step, as for any torch optimizer (parameters, named ones, groups with their own ``lr``, ``alpha``
            and ``weight_decay``); by default the model's trainable parameters.
        criterion: The loss in use (`MSELoss`, `HalfSquaredLoss`, `CrossEntropyLoss`, `BCEWithLogitsLoss`). Then lr is
            measured in units of its output curvature c, η = lr/c: ``lr=1`` is the full Gauss–Newton step of a squared
            loss, whatever its reduction, the batch size and Q, and for the others the longest step that is sure to
            descend if outputs followed it exactly (`output_curvature`).
        alpha: α in [0, 1]. Default 1. At 0 without ``criterion`` the step is that of `torch.optim.SGD`, to the bit.
        damping: λ of Dᵀ(Θ + λ1)⁻¹g relative to the mean of diag Θ, at least 0; Levenberg–Marquardt. Mini-batches need
            some: undamped full steps interpolate each batch and undo the last one. Default 0.
        rtol: Singular values of D up to rtol·σ_max count as zero. By default √(QN·ε) with ε of float64, or the machine
            epsilon of the forward pass (autocast's, under autocast) where that is larger.
        weight_decay: At least 0, decoupled. Default 0.
        kernel: How to come by Θ, see `ntk`: ``"structured"`` sums it over the layers and raises for a model that this does
            not fit, ``"jacobian"`` builds it from D, ``"auto"`` (default) is structured where that is right.
        solver: ``"auto"`` (default) is Cholesky where an estimate of the condition allows it, pivoted Cholesky where the rank
            is short and unambiguous, else ``"eigh"``, the eigenvalue decomposition, which may be had always, with the exact
            condition; see `solve_kernel`.
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
        >>> for _ in range(8):
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
        damping: float = 0.0,
        rtol: float | None = None,
        weight_decay: float = 0.0,
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
        defaults = {"lr": lr, "alpha": alpha, "damping": damping, "rtol": rtol, "weight_decay": weight_decay}
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model to step, with options of their own (``lr``, ``alpha``, ``weight_decay``).

        Args:
            param_group: As for any torch optimizer. ``damping`` and ``rtol`` belong to the one system that all groups
                share, and have to be those of the other groups.

        Raises:
            TypeError: An option has the wrong type.
            ValueError: An option is out of range, or a parameter is not the model's, not real or of half precision.
        """
        options = {**self.defaults, **param_group} if isinstance(param_group, dict) else self.defaults
        _check_options(options)
        for option in ("damping", "rtol") if self.param_groups else ():
            if options[option] != self.param_groups[0][option]:
                raise ValueError(
                    f"`{option}` should be the same in all parameter groups, which share one system, but got "
                    f"{options[option]!r} beside {self.param_groups[0][option]!r}."
                )
        super().add_param_group(param_group)
        try:
            names = {id(p): name for name, p in underlying(self._model).named_parameters()}
            added = [(names.get(id(p)), p) for p in self.param_groups[-1]["params"]]
            for name, p in added:
                _check_parameter(name, p)
        except ValueError:
            self.param_groups.pop()
            raise
        for _, p in added:
            self._recorder.watch(p)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad``, and drop the calls of the model whose outputs have received a gradient.

        Args:
            set_to_none: Set ``.grad`` to None instead of zero.
        """
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
            closure: Clears gradients, computes the loss, calls ``backward`` and returns the loss; evaluated once.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: No call of the model reached the loss; outputs, loss gradient, kernel or new parameters are not
                finite; or inputs or model have changed since the call. Nothing has been changed then.
            ValueError: The outputs do not have the batch first, or the parameters were cast to half precision.
            MemoryError: The Jacobian or the kernel would not fit.
        """
        try:
            return self._step(closure)
        except BaseException:
            for name in ("grad_scale", "found_inf"):  # a GradScaler takes its marks away only after a step that succeeds
                self.__dict__.pop(name, None)
            raise

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        recorder = self._recorder
        recorder.notice_cleared()
        if not recorder.calls and not recorder.gradients and closure is not None and loss is None:
            return None  # the closure chose to skip this batch, as Lightning's does when training_step returns None
        if float(getattr(self, "found_inf", 0.0)):
            self.last_step = StepReport.skipped(len(recorder.calls))
            recorder.drop("step")
            return loss
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            processes = torch.distributed.get_world_size()
            if processes > 1:
                raise RuntimeError(
                    f"AdaptedGD solves one system over the whole batch in one process, but {processes} processes are training "
                    "together, and their parameters would drift apart. Train in a single process."
                )
        scale = self._loss_scale()
        if not recorder.calls:
            self._check_membership()
            raise RuntimeError(recorder.why_no_call())
        trained = self._trained()
        arrived = {name: recorder.gradients[id(p)] for name, p in trained.items()}
        direction = step_direction(
            self._model,
            recorder.calls,
            trained,
            arrived,
            loss_scale=scale,
            criterion=self._criterion,
            damping=self._shared_option("damping"),
            rtol=self._shared_option("rtol"),
            kernel_method=self._kernel,
            solver=self._solver,
            chunk_size=self._chunk_size,
        )
        new_values = self._new_values(direction)
        self._warn(direction, trained, arrived)  # before anything changes: a warning may be made an error
        for p, value in new_values:
            p.copy_(value)
        recorder.drop("step", spent=True)
        self.last_step = direction.report()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Args:
            state_dict: State of an AdaptedGD with the same parameter groups.

        Raises:
            TypeError: An option has the wrong type.
            ValueError: It is the state of another optimizer, or an option is out of range.
        """
        for group in state_dict["param_groups"]:
            missing = [name for name in self.defaults if name not in group]
            if missing:
                raise ValueError(
                    f"`state_dict` should come from an AdaptedGD, but a parameter group has no {', '.join(missing)}."
                )
            _check_options(group)
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_model", "_criterion", "_kernel", "_solver", "_chunk_size", "_said", "last_step")
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

    def _new_values(self, direction: Direction) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters' values after a step along ``direction``; changes nothing."""
        new_values = []
        groups = self._groups()
        for name, p, adapted, gradient, off_output in direction.by_parameter():
            group = groups[id(p)]
            lr, alpha = float(group["lr"]), group["alpha"]
            eta = lr / direction.curvature
            value = p.detach()
            if group["weight_decay"]:
                value = value * (1 - lr * group["weight_decay"])
            if alpha < 1:
                value = value.add(gradient.to(p.dtype), alpha=-eta * (1 - alpha))
            change = eta * alpha * adapted
            if off_output is not None:  # what of it is in `gradient` has moved by η(1−α) already
                change = change + (lr - eta * (1 - alpha)) * off_output
            if alpha > 0 or off_output is not None:
                value = value - change.to(p.dtype)
            if not all_finite(value):
                raise RuntimeError(
                    f"The step would make parameter '{name}' not finite, so nothing was changed. Lower `lr` or raise `damping`."
                )
            new_values.append((p, value))
        return new_values

    def _groups(self) -> dict[int, dict[str, Any]]:
        return {id(p): group for group in self.param_groups for p in group["params"]}

    def _trained(self) -> dict[str, nn.Parameter]:
        """The parameters to step, by name, in the order of the model: those that received a gradient, as in torch."""
        groups = self._groups()
        named = underlying(self._model).named_parameters()
        ours = {name: p for name, p in named if id(p) in groups and p.requires_grad}
        for name, p in ours.items():
            _check_parameter(name, p)  # it may have been cast since
        trained = {name: p for name, p in ours.items() if id(p) in self._recorder.gradients}
        if not trained:
            self._check_membership()
            raise RuntimeError("No parameter of this optimizer requires a gradient any more. Unfreeze some, or do not step.")
        return trained

    def _check_membership(self) -> None:
        """Raise if parameters have been replaced in the model since they were given."""
        present = {id(p) for p in underlying(self._model).parameters()}
        lost = [list(p.shape) for group in self.param_groups for p in group["params"] if id(p) not in present]
        if lost:
            raise RuntimeError(
                f"{len(lost)} parameters of this optimizer are no longer the model's (the first has shape {lost[0]}): "
                "load_state_dict(assign=True) or a new layer replaced them. Make a new AdaptedGD after that."
            )

    def _shared_option(self, name: str) -> Any:
        values = {group[name] for group in self.param_groups}
        if len(values) > 1:
            raise ValueError(f"`{name}` should be the same in all parameter groups, but they have {sorted(map(str, values))}.")
        return values.pop()

    def _warn(self, direction: Direction, trained: dict[str, nn.Parameter], arrived: dict[str, Tensor]) -> None:
        for about, text in direction.remarks():
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


def _check_options(options: dict[str, Any]) -> None:
    real_number("lr", options["lr"], low=0.0)
    real_number("alpha", options["alpha"], low=0.0, high=1.0)
    real_number("damping", options["damping"], low=0.0)
    real_number("weight_decay", options["weight_decay"], low=0.0)
    if options["rtol"] is not None:
        real_number("rtol", options["rtol"], low=0.0, below=1.0)


def _check_parameter(name: str | None, p: Tensor) -> None:
    if name is None:
        raise ValueError(
            f"`params` should belong to `model`, but a parameter of shape {list(p.shape)} does not. Pass the module that "
            "owns it and whose outputs enter the loss."
        )
    if torch.nn.parameter.is_lazy(p):
        raise ValueError(f"Parameter '{name}' is not initialized yet. Call the model on a batch first.")
    if p.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"Parameter '{name}' should be float32 or float64, but is {p.dtype}. For low precision keep float32 parameters "
            "and run the forward pass under torch.autocast."
        )
    if p.device.type == "mps":
        raise ValueError(
            f"Parameter '{name}' is on {p.device}, which has no float64 for the kernel. Move the model to the CPU."
        )
