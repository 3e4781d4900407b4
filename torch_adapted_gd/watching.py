"""The part of AdaptedGD that is no step: parameter groups, state dicts, copies, GradScaler, joining, warnings."""

import copy
import math
import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.optim import Optimizer

from . import options
from .jacobian.live import linearize_live
from .report import StepReport
from .tracking.calls import underlying
from .tracking.recorder import CallRecorder
from .warning import warn_user
from .world import World, group_of, world_of

_OPTIONS = ("lr", "alpha", "damping", "momentum", "weight_decay")
_PATIENCE = 10  # rejected steps in a row before a warning


class _WithoutSamples(JoinHook):
    """Steps of a process that has run out of batches."""

    def __init__(self, optimizer: "WatchingOptimizer") -> None:
        self._optimizer = optimizer

    def main_hook(self) -> None:
        self._optimizer.zero_grad()
        self._optimizer._without_samples = True  # others count those that have samples
        try:
            self._optimizer.step()
        finally:
            self._optimizer._without_samples = False


class WatchingOptimizer(Optimizer, Joinable):
    """A torch optimizer that watches the calls of a model; `AdaptedGD` adds the step."""

    _model: nn.Module
    _recorder: CallRecorder
    _criteria: tuple[nn.Module, ...]
    _said: set[str]
    _rejected: int
    _without_samples = False  # whether a step is that of a process that has run out of batches
    _process_group: Any
    last_step: StepReport | None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, with options of their own (``lr``, ``alpha``, ``weight_decay``).

        Args:
            param_group: As for any torch optimizer. All groups share one system, so ``damping`` and ``momentum`` have to be
                those of the other groups.

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an AdaptedGD with the same parameter groups.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            TypeError: An option has the wrong type.
            ValueError: It is the state of another optimizer, or an option is out of range.
        """
        for group in state_dict["param_groups"]:
            missing = [name for name in _OPTIONS if name not in group]
            if missing:
                raise ValueError(
                    f"`state_dict` should come from an AdaptedGD, but a parameter group has no {', '.join(missing)}."
                )
            options.check_options(group)
        super().load_state_dict(state_dict)

    @property
    def criterion(self) -> nn.Module | tuple[nn.Module, ...] | None:
        """The loss that is watched: the training step has to call this very module, also after unpickling."""
        return self._criteria[0] if len(self._criteria) == 1 else self._criteria or None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_model", "_criteria", "_policy", "_metric", "_solver", "_said", "_rejected", "last_step")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_process_group", None)  # none can be saved
        Joinable.__init__(self)
        if "_recorder" not in self.__dict__:  # unpickled or copied: watch the model that came along
            self._recorder = CallRecorder(self._model, self._criteria, linearize_live)
            for p in self._groups_parameters():
                self._recorder.watch(p)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy watches the same criterion, unless that was copied along.
        state = {**self.__getstate__(), "_process_group": self._process_group}
        for name in ("_model", "state", "param_groups", "defaults"):
            state[name] = copy.deepcopy(state[name], memo)
        state["_criteria"] = tuple(memo.get(id(criterion), criterion) for criterion in self._criteria)
        state["_said"] = set(self._said)
        same = type(self).__new__(type(self))
        memo[id(self)] = same
        same.__setstate__(state)
        return same

    def join_hook(self, **kwargs: Any) -> JoinHook:  # noqa: ARG002
        """For `torch.distributed.algorithms.join.Join`: a process that has no more batches takes part without samples."""
        return _WithoutSamples(self)

    @property
    def join_device(self) -> torch.device:
        """For `torch.distributed.algorithms.join.Join`."""
        device: torch.device = self.param_groups[0]["params"][0].device
        return device

    @property
    def join_process_group(self) -> Any:
        """For `torch.distributed.algorithms.join.Join`."""
        return self._group()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True for torch's GradScaler, which then hands its scale over; others would stop clipping for it."""
        return str(sys._getframe(1).f_globals.get("__name__", "")).startswith("torch.")

    def _asked_for_state(self) -> bool:
        """Whether all gradients are zero and no call was made: checkpointing tools step so to have the state created."""
        parameters = self._groups_parameters()
        if not all(p.grad is not None and not p.grad.any() for p in parameters if p.requires_grad):
            return False
        if self._recorder.dropped_by == "zero_grad" and any(float(group["lr"]) for group in self.param_groups):
            return False  # zero_grad came between backward and step
        for p in parameters:
            if p.requires_grad and options.shared_option(self.param_groups, "momentum"):
                self.state[p].setdefault("momentum", p.new_zeros(p.shape))
        return True

    def _note_rejection(self, *, rejected: bool) -> None:
        """Count rejected steps in a row, and warn when they are many."""
        self._rejected = self._rejected + 1 if rejected else 0
        if self._rejected == _PATIENCE:
            self._warn_once(
                "rejected",
                f"The last {_PATIENCE} steps were rejected: no trial lowered the loss as predicted, and parameters did not "
                "change. If the loss is as low as it gets, training is done. Otherwise use float64, scale parameters and "
                "inputs to sizes near 1, give the damping a larger `initial` or more `num_trials`, and check that the forward "
                "pass repeats itself for the same parameters.",
            )

    def _loss_scale(self) -> float:
        """What a GradScaler multiplied the loss by."""
        scale = getattr(self, "grad_scale", None)
        if scale is not None or not hasattr(self, "found_inf"):
            return 1.0 if scale is None else float(scale)
        # Lightning lets the scaler divide `.grad` first: the gradients that backward delivered tell by how much.
        arrived = self._recorder.gradients
        pairs = [(arrived[id(p)], p.grad) for p in self._groups_parameters() if id(p) in arrived and p.grad is not None]
        square = sum(float(g.double().square().sum()) for _, g in pairs)
        product = sum(float((a.double() * g.double()).sum()) for a, g in pairs)
        apart = sum(float((a.double() - product / max(square, 1e-300) * g.double()).square().sum()) for a, g in pairs)
        if square > 0 and apart <= 1e-8 * product**2 / square and math.frexp(product / square)[0] == 0.5:
            return product / square
        raise RuntimeError(
            "GradScaler.unscale_(optimizer) divided `.grad`, which AdaptedGD does not read, and hides the scale that the "
            "outputs' gradient still carries. Leave out unscale_ and clipping: scaler.step(optimizer) hands the scale over."
        )

    def _world(self) -> World:
        """The processes that train together."""
        return world_of(self._group(), self.param_groups[0]["params"][0].device)

    def _group(self) -> Any:
        """Their group; None without torch.distributed."""
        return self._process_group or group_of(self._model)

    def _groups_parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _groups(self) -> dict[int, dict[str, Any]]:
        return {id(p): group for group in self.param_groups for p in group["params"]}

    def _trained(self, elsewhere: Collection[str] = ()) -> dict[str, nn.Parameter]:
        """The parameters to step, by name, in the model's order: those that got a gradient here, or ``elsewhere`` by name."""
        groups = self._groups()
        named = underlying(self._model).named_parameters()
        ours = {name: p for name, p in named if id(p) in groups and p.requires_grad}
        for name, p in ours.items():
            options.check_parameter(name, p)  # it may have been cast since
        trained = {name: p for name, p in ours.items() if id(p) in self._recorder.gradients or name in elsewhere}
        if not trained:
            options.check_membership(self._model, self.param_groups)
            raise RuntimeError("No parameter of this optimizer requires a gradient any more. Unfreeze some, or do not step.")
        return trained

    def _warn_once(self, about: str, text: str) -> None:
        """Warn, once for each word that it is ``about``, in process 0."""
        if about not in self._said and not self._world().rank:
            self._said.add(about)
            warn_user(text)
