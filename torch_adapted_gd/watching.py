"""What an optimizer that is given a model has to do beside stepping: groups, calls and gradients, states, copies."""

import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer

from . import options
from .calls import underlying
from .recorder import CallRecorder
from .report import StepReport

_NEW = {"momentum": 0.0, "carry_over": (), "progress": ()}  # options that states of earlier versions do not have


class WatchingOptimizer(Optimizer):
    """A torch optimizer that watches the calls of a model.

    Attributes:
        last_step: The `StepReport` of the last step, or None.
    """

    _model: nn.Module
    _recorder: CallRecorder
    _said: set[str]
    last_step: StepReport | None

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

    def _warn_once(self, about: str, text: str) -> None:
        if about not in self._said:
            self._said.add(about)
            warnings.warn(text, stacklevel=7)
