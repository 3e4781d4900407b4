"""Options of AdaptedGD and their checks."""

from typing import Any

import torch
from torch import Tensor, nn

from .checks import real_number
from .policies import Backtracking, Fixed, LevenbergMarquardt, Policy, StraightLine
from .solve import ConjugateGradients
from .step.system import Dense
from .tracking.calls import underlying

SHARED = ("damping", "momentum")  # of the one system that all parameter groups share


def check_model(model: Any) -> None:
    """Check that it is a model, on one device."""
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
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "`model` should not be scripted or traced, because that takes no hooks, but it is. Pass the model that it was made "
            "from, and call that; scripted parts of a model work."
        )


def check_normalization(model: nn.Module) -> None:
    """Check that no layer normalizes over several processes."""
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            raise ValueError(
                f"`model` should have no SyncBatchNorm in training mode for AdaptedGD, but '{name}' is one: outputs of "
                "one process would depend on the samples of others. Call eval() on it, or use GroupNorm or LayerNorm."
            )


def check_options(options: dict[str, Any]) -> None:
    """Check the options of a parameter group."""
    real_number("lr", options["lr"], low=0.0)
    real_number("alpha", options["alpha"], low=0.0, high=1.0)
    real_number("damping", options["damping"], low=0.0)
    real_number("momentum", options["momentum"], low=0.0, below=1.0)
    real_number("weight_decay", options["weight_decay"], low=0.0)


def check_damping(damping: Any) -> Policy | None:
    """The policy for a ``damping``; None for the default."""
    if damping is None or isinstance(damping, Backtracking | StraightLine | LevenbergMarquardt):
        return damping
    if damping in (Backtracking, StraightLine, LevenbergMarquardt):
        raise TypeError(f"`damping` should be a number or a policy, but got the class. Write {damping.__name__}().")
    if isinstance(damping, (str, bool)) or not hasattr(damping, "__float__") or isinstance(damping, Tensor):
        raise TypeError(
            "`damping` should be a number, LevenbergMarquardt(), Backtracking() or StraightLine(), but got "
            f"{damping!r} of type {type(damping).__name__}."
        )
    return Fixed(real_number("damping", damping, low=0.0))


def check_solver(solver: Any) -> Dense | ConjugateGradients | None:
    """The solver; None for "auto"."""
    if isinstance(solver, Dense | ConjugateGradients):
        return solver
    if solver == "auto":
        return None
    given = f"the class. Write {solver.__name__}()" if solver in (Dense, ConjugateGradients) else repr(solver)
    raise TypeError(f'`solver` should be "auto", Dense() or ConjugateGradients(), but got {given}.')


def check_parameter(name: str | None, p: Tensor) -> None:
    """Check that a parameter can be stepped; ``name`` is None if it is not the model's."""
    if name is None:
        raise ValueError(
            f"`params` should belong to `model`, but a parameter of shape {list(p.shape)} does not. Pass the module that "
            "owns it and whose outputs enter the loss."
        )
    if hasattr(p, "device_mesh") or "FlatParameter" in type(p).__name__:
        raise ValueError(
            f"Parameter '{name}' should be whole in each process, but is sharded (a DTensor, as fully_shard makes them). Use "
            "DistributedDataParallel; what AdaptedGD itself needs is shared out among the processes (docs/distributed.md)."
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
    """Check that all parameters of the groups are still the model's."""
    present = {id(p) for p in underlying(model).parameters()}
    lost = [list(p.shape) for group in groups for p in group["params"] if id(p) not in present]
    if lost:
        raise RuntimeError(
            f"{len(lost)} parameters of this optimizer are no longer the model's (the first has shape {lost[0]}): "
            "load_state_dict(assign=True) or a new layer replaced them. Make a new AdaptedGD after that."
        )


def shared_option(groups: list[dict[str, Any]], name: str) -> Any:
    """An option that must be the same in all parameter groups."""
    values = {group[name] for group in groups}
    if len(values) > 1:
        raise ValueError(f"`{name}` should be the same in all parameter groups, but they have {sorted(map(str, values))}.")
    return values.pop()
