"""What an optimizer keeps from step to step, and how a step is taken back where only the next loss can judge it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checks import checksum
from ..options import shared_option
from ..policies import LevenbergMarquardt, Policy
from .remembered import State

if TYPE_CHECKING:
    from ..jacobian import ParameterVector
    from .linearization import Linearization
    from .recorded import TotalLoss
    from .trials import Trial

_SAME = 1e-3  # relative difference of two losses at the same parameters that rounding does not make
_OF_LAST = ("predicted", "before", "job", "undone", "left", "previous", "previous_momentum")


@dataclass(frozen=True)
class Move:
    """Where a step leads."""

    values: dict[str, Tensor]  # the parameters, by name
    momentum: dict[str, Tensor]  # φ, likewise; empty without momentum
    psi: Tensor | None  # ψ, if it is to be kept
    remembered: State  # what the policy remembers

    @classmethod
    def of(
        cls, linearization: Linearization, trial: Trial, values: dict[str, Tensor], remembered: State, *, with_momentum: bool
    ) -> Move:
        """The move of a trial to these parameters."""
        momentum = {}
        for name, p in linearization.trained.items() if with_momentum else ():
            momentum[name] = (trial.direction.adapted[name] / linearization.curvature).reshape(p.shape).to(p.dtype)
        iterative = linearization.system.iterative
        return cls(values, momentum, trial.direction.weights if iterative and iterative.warm_start else None, remembered)


class Kept:
    """The optimizer's state, a part of its checkpoints.

    The state of each parameter has its momentum φ; that of the first one also ψ and the numbers that policies remember. If
    neither outputs nor a closure could judge the last step, the next loss does, and a bad step is taken back: then the state
    also has the values to return to, and what the step was expected to do.

    Args:
        state: The optimizer's ``state``.
        groups: Its ``param_groups``.
    """

    def __init__(self, state: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
        self._state, self._groups = state, groups
        self._parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self._first = self._parameters[0]

    @property
    def psi(self) -> Tensor | None:
        """ψ of the last step, for conjugate gradients to begin with."""
        found = self._state.get(self._first, {}).get("psi")
        return None if found is None else found.double()

    def momentum(self, trained: Mapping[str, nn.Parameter], decay: float) -> ParameterVector | None:
        """μφ of the last step for a decay μ, zero where a parameter has none; None if there is nothing of it."""
        known = {name: self._state.get(p, {}).get("momentum") for name, p in trained.items()}
        if not decay or all(part is None for part in known.values()):
            return None
        parts = {name: torch.zeros_like(p) if (part := known[name]) is None else part for name, p in trained.items()}
        return {name: decay * part.double().reshape(-1) for name, part in parts.items()}

    def look_back(self, policy: Policy, total: TotalLoss, model: nn.Module) -> tuple[State, bool]:
        """What the policy remembers now that the next loss has come, and λ; and whether to take the last step back.

        Args:
            policy: Who judges.
            total: The loss now.
            model: The module whose parameters have to be where the step left them.
        """
        kept = {name: value for name, value in self._state.get(self._first, {}).items() if isinstance(value, float)}
        kept["damping"] = shared_option(self._groups, "damping")
        if not isinstance(policy, LevenbergMarquardt) or not ("predicted" in kept or "undone" in kept):
            return kept, False
        # With the weights that terms had then.
        factors = [kept[f"factor{i}"] for i in range(len(kept)) if f"factor{i}" in kept]
        comparable = len(factors) == len(total.factors)
        now = total.value(factors if comparable else None)
        same = comparable and kept["job"] == total.job
        if (undone := kept.pop("undone", None)) is not None:
            if same and abs(now - undone) > _SAME * abs(undone):
                kept["noisy"] = 1.0  # the same parameters have another loss than before
            return kept, False
        if kept["left"] != checksum(model.parameters()):
            del kept["predicted"]  # someone else has moved the parameters
            return kept, False
        return policy.looked_back(kept, now, same=same and not kept.get("noisy"), lost=total.lost)

    def undo(self, kept: State) -> None:
        """Take the last step back, and remember λ and the number of rejections of ``kept``."""
        for p in self._parameters:
            state = self._state[p]
            if "previous" in state:
                p.copy_(state.pop("previous"))
                state.pop("momentum", None)
            if "previous_momentum" in state:
                state["momentum"] = state.pop("previous_momentum")
        first = self._state[self._first]
        del first["predicted"]
        first["undone"] = first.pop("before")
        self.remember({"rejections": kept["rejections"], "damping": kept["damping"]})

    def take(self, trained: Mapping[str, nn.Parameter], move: Move, model: nn.Module, *, judged_later: bool) -> None:
        """Move the parameters, and keep what the next step builds on; with ``judged_later`` also the values to return to."""
        for p in self._parameters:
            state = self._state[p]  # of each, as tools that save states expect it
            for name in [name for name in state if name in _OF_LAST or name.startswith("factor")]:
                del state[name]
        for name, p in trained.items():
            state = self._state[p]
            if judged_later:
                state["previous"] = p.detach().clone()
                if "momentum" in state:
                    state["previous_momentum"] = state["momentum"]
            p.copy_(move.values[name])
            if name in move.momentum:
                state["momentum"] = move.momentum[name]
        if move.psi is not None:
            self._state[self._first]["psi"] = move.psi.to(self._first.dtype)  # loading a state casts it to that
        if judged_later:
            self._state[self._first]["left"] = checksum(model.parameters())
        self.remember(move.remembered)

    def remember(self, numbers: State) -> None:
        """Keep numbers for the next step; ``"damping"`` is the λ of all parameter groups."""
        numbers = dict(numbers)
        if (damping := numbers.pop("damping", None)) is not None:
            for group in self._groups:
                group["damping"] = damping
        if numbers:
            self._state[self._first].update(numbers)


def expected(linearization: Linearization, values: dict[str, Tensor], kept: State, total: TotalLoss) -> State:
    """What the next loss is to be compared with, if it judges a step to these parameters."""
    change = {name: (value - linearization.trained[name]).double().reshape(-1) for name, value in values.items()}
    predicted = linearization.criteria_change(linearization.linear(change))
    factors = {f"factor{i}": factor for i, factor in enumerate(total.factors)}
    return {"predicted": predicted, "job": total.job, "noisy": kept.get("noisy", 0.0), **factors}
