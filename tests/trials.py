"""What tests of trials have in common."""

import copy
import dataclasses

import torch

from torch_adapted_gd import Backtracking, LevenbergMarquardt

from .cases import MSE, flat, mlp

SEARCHES = {"levenberg-marquardt": LevenbergMarquardt(), "line search": Backtracking(damping=1e-3)}


def by_closure(search, closure=True):
    """The policy, judged by the closure."""
    return dataclasses.replace(SEARCHES[search], judge="closure") if closure else SEARCHES[search]


def wave(n=40):
    x = torch.linspace(-1, 1, n, dtype=torch.float64)[:, None]
    return mlp(sizes=(1, 12, 1)).double(), x, torch.sin(4 * x)


def closure_of(model, optimizer, x, y, criterion=MSE, change=None, set_to_none=True):
    """The usual closure; ``change(loss, number of the call)`` makes of the loss what is returned."""
    calls = []

    def closure():
        calls.append(flat(model))
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = criterion(model(x), y)
        loss.backward()
        return loss if change is None else change(loss, len(calls))

    closure.calls = calls
    return closure


def snapshot(model, optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    return (
        [p.detach().clone() for p in model.parameters()],
        [b.detach().clone() for b in model.buffers()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        state,
    )


def assert_same(before, after):
    for first, second in zip(before[:3], after[:3], strict=True):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert before[3]["param_groups"] == after[3]["param_groups"]
    assert before[3]["state"].keys() == after[3]["state"].keys()
    for key, entry in before[3]["state"].items():
        assert entry.keys() == after[3]["state"][key].keys()
        assert all(_equal(value, after[3]["state"][key][name]) for name, value in entry.items())


def _equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or (a != a and b != b)
