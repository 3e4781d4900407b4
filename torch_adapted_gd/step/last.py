"""The last step, where only the next loss can judge it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..checks import checksum
from .shares import TotalLoss

if TYPE_CHECKING:
    from ..policies import LevenbergMarquardt
    from .linearization import Linearization
    from .remembered import State

_SAME = 1e-3  # relative difference of two losses at the same parameters that rounding does not make
_FIGURES = ("predicted", "before", "job", "undone", "left")
_VALUES = ("previous", "previous_momentum")


class LastStep:
    """The last step, if neither outputs nor a closure could judge it. The next loss does, and a bad step is taken back.

    Its figures are kept in the state of the first parameter, and the values to return to in the state of each, so that they
    are part of a checkpoint.

    Args:
        state: The optimizer's state.
        parameters: All parameters of the optimizer.
    """

    def __init__(self, state: dict[Any, Any], parameters: list[nn.Parameter]) -> None:
        self._state, self._parameters = state, parameters

    def look_back(self, policy: LevenbergMarquardt, kept: State, total: TotalLoss, model: nn.Module) -> tuple[State, bool]:
        """What the policy remembers now that the next loss has come, and whether to take the step back.

        Args:
            policy: Who judges.
            kept: What it remembered.
            total: The loss now.
            model: The module whose parameters have to be where the step left them.
        """
        if "predicted" not in kept and "undone" not in kept:
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
        """Take the step back."""
        for p in self._parameters:
            state = self._state[p]
            if "previous" in state:
                p.copy_(state.pop("previous"))
                state.pop("momentum", None)
            if "previous_momentum" in state:
                state["momentum"] = state.pop("previous_momentum")
        first = self._state[self._parameters[0]]
        del first["predicted"]
        first["undone"], first["rejections"] = first.pop("before"), kept["rejections"]

    def forget(self) -> None:
        """Drop all that was kept of it: another step is about to be taken."""
        for p in self._parameters:
            state = self._state[p]  # of each, as tools that save states expect it
            for name in [name for name in state if name in (*_FIGURES, *_VALUES) or name.startswith("factor")]:
                del state[name]

    def keep(self, p: nn.Parameter) -> None:
        """Keep the value of a parameter before it is moved."""
        state = self._state[p]
        state["previous"] = p.detach().clone()
        if "momentum" in state:
            state["previous_momentum"] = state["momentum"].clone()

    def left(self, model: nn.Module) -> None:
        """Note where the parameters are after the step."""
        self._state[self._parameters[0]]["left"] = checksum(model.parameters())


def expected(linearization: Linearization, change: dict[str, Tensor], kept: State, total: TotalLoss) -> State:
    """What the next loss is to be compared with, once parameters have moved by ``change``."""
    figures = {f"factor{i}": factor for i, factor in enumerate(total.factors)}
    return {
        "predicted": linearization.expected(change),
        "job": total.job,
        "noisy": kept.get("noisy", 0.0),
        **figures,
    }
