"""Options of AdaptedGD and what they have to be."""

from typing import Any

import torch
from torch import Tensor, nn

from .calls import underlying
from .checks import one_of, real_number
from .damping import LevenbergMarquardt
from .loss import Criterion, require_reduced
from .solve import ConjugateGradients
from .straight import StraightLine
from .system import SOLVERS

SHARED = ("damping", "rtol", "momentum")  # of the one system that all parameter groups share


def check_options(options: dict[str, Any]) -> None:
    """Check the options of a parameter group.

    Raises:
        TypeError: One has the wrong type.
        ValueError: One is out of range.
    """
    real_number("lr", options["lr"], low=0.0)
    real_number("alpha", options["alpha"], low=0.0, high=1.0)
    real_number("damping", options["damping"], low=0.0)
    real_number("momentum", options["momentum"], low=0.0, below=1.0)
    real_number("weight_decay", options["weight_decay"], low=0.0)
    if options["rtol"] is not None:
        real_number("rtol", options["rtol"], low=0.0, below=1.0)


def split_damping(
    damping: Any, criterion: Criterion | None, line_search: bool | StraightLine
) -> tuple[float, LevenbergMarquardt | None]:
    """The damping to begin with, and the policy that changes it, if there is one.

    Args:
        damping: What the user gave; None for the policy where it can be had.
        criterion: The loss, if it is known.
        line_search: Whether there is another judge of steps.

    Raises:
        TypeError: It is neither a number nor a policy.
        ValueError: It is negative, or not finite.
    """
    if damping is None:
        hidden = isinstance(criterion, nn.CrossEntropyLoss) and criterion.weight is not None and criterion.label_smoothing > 0
        known = criterion is not None and criterion.reduction != "none" and not hidden
        damping = LevenbergMarquardt() if known and not line_search else 0.0
    if isinstance(damping, LevenbergMarquardt):
        return damping.initial, damping
    if damping is LevenbergMarquardt:
        raise TypeError("`damping` should be a number or a policy, but got the class. Write LevenbergMarquardt().")
    if isinstance(damping, (str, bool)) or not hasattr(damping, "__float__") or isinstance(damping, Tensor):
        raise TypeError(
            f"`damping` should be a number or a LevenbergMarquardt(), but got {damping!r} of type {type(damping).__name__}."
        )
    return real_number("damping", damping, low=0.0), None


def check_together(
    criterion: Criterion | None, metric: str, policy: LevenbergMarquardt | None, line_search: bool | StraightLine
) -> None:
    """Check options that need each other, or exclude each other.

    Raises:
        ValueError: They do not fit together.
    """
    if line_search and policy:
        raise ValueError("`line_search` should be left out with LevenbergMarquardt(), which shortens steps itself.")
    if metric == "ggn" and criterion is None:
        raise ValueError('`criterion` should be given for metric="ggn", which is the Hessian of that loss, but got None.')
    if metric == "ggn" or policy or line_search is True:
        require_reduced(criterion)


def check_line_search(line_search: Any) -> bool | StraightLine:
    """Return ``line_search`` if it is a bool or a policy.

    Raises:
        TypeError: It is not.
    """
    if isinstance(line_search, bool | StraightLine):
        return line_search
    given = "the class. Write StraightLine()" if line_search is StraightLine else repr(line_search)
    raise TypeError(f"`line_search` should be True, False or a StraightLine(), but got {given}.")


def check_solver(solver: Any, space: str, rtol: float | None) -> str | ConjugateGradients:
    """Return ``solver`` if it is a way to solve that goes with the other options.

    Raises:
        TypeError: It is neither a word nor a `ConjugateGradients`.
        ValueError: It is an unknown word, or does not go with the others.
    """
    if not isinstance(solver, str | ConjugateGradients):
        given = "the class. Write ConjugateGradients()" if solver is ConjugateGradients else repr(solver)
        raise TypeError(f"`solver` should be a word or a ConjugateGradients(), but got {given}.")
    if isinstance(solver, str):
        one_of("solver", solver, SOLVERS)
    if solver == "cg" or isinstance(solver, ConjugateGradients):
        if space == "parameter":
            raise ValueError('`space` should be "sample" or "auto" for conjugate gradients, but got "parameter".')
        if rtol is not None:
            raise ValueError(
                f"`rtol` should be left out for conjugate gradients, which reveal no singular values, but got {rtol!r}."
            )
    return solver


def check_parameter(name: str | None, p: Tensor) -> None:
    """Check that a parameter can be stepped.

    Args:
        name: Its name in the model; None if it is not the model's.
        p: The parameter.

    Raises:
        ValueError: It cannot.
    """
    if name is None:
        raise ValueError(
            f"`params` should belong to `model`, but a parameter of shape {list(p.shape)} does not. Pass the module that "
            "owns it and whose outputs enter the loss."
        )
    if nn.parameter.is_lazy(p):
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


def check_membership(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Check that no parameter was replaced in the model since it was given.

    Raises:
        RuntimeError: One was.
    """
    present = {id(p) for p in underlying(model).parameters()}
    lost = [list(p.shape) for group in groups for p in group["params"] if id(p) not in present]
    if lost:
        raise RuntimeError(
            f"{len(lost)} parameters of this optimizer are no longer the model's (the first has shape {lost[0]}): "
            "load_state_dict(assign=True) or a new layer replaced them. Make a new AdaptedGD after that."
        )


def shared_option(groups: list[dict[str, Any]], name: str) -> Any:
    """An option of the system that all parameter groups share.

    Raises:
        ValueError: They have several.
    """
    values = {group[name] for group in groups}
    if len(values) > 1:
        raise ValueError(f"`{name}` should be the same in all parameter groups, but they have {sorted(map(str, values))}.")
    return values.pop()
