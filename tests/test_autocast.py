"""Low precision: autocast in the forward pass, and what it means for rank and penalties."""

import copy

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD

from .cases import (
    MSE,
    flat,
    mlp,
    pinv_step,
    problem,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, x, y = problem(dtype=torch.float32)
    expected = pinv_step(copy.deepcopy(model), x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    with torch.autocast("cpu", dtype=dtype):
        loss = MSE(model(x).float(), y)
    loss.backward()
    optimizer.step()
    assert (flat(model) - expected).norm() < 0.05 * expected.norm()
    assert optimizer.last_step.off_output_fraction == 0
    assert optimizer.last_step.kernel == "structured"


def test_the_rank_cut_follows_the_arithmetic_of_the_forward_pass():
    cuts = {}
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        model, x = mlp(sizes=(4, 30, 30, 3)), torch.randn(12, 4)
        x[6:] = x[:6] + 1e-4  # nearly duplicates: told apart in float32, and noise in bfloat16
        optimizer = AdaptedGD(model, lr=0.0)
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        cuts[dtype] = optimizer.last_step.rank
    assert cuts[None] == 36
    assert cuts[torch.bfloat16] <= 18


class Both(nn.Module):
    """One matrix, applied in both layouts at several places: its Jacobian is written out in float32."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(40, 40) / 6), nn.Linear(120, 2)

    def forward(self, x):
        return self.head((torch.tanh(nn.functional.linear(x, self.weight)) @ self.weight).flatten(1))


@pytest.mark.parametrize("kind", ["small", "places", "both"])
def test_step_inside_autocast_is_the_step_outside(kind):
    results = []
    for inside in (True, False):
        torch.manual_seed(0)
        model, x, y = problem(dtype=torch.float32)
        if kind == "places":
            model = nn.Sequential(nn.Conv1d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 300, 2))
            x, y = torch.randn(6, 1, 300), torch.randn(6, 2)
        elif kind == "both":
            model, x, y = Both(), torch.randn(90, 3, 40), torch.randn(90, 2)
        optimizer = AdaptedGD(model, lr=0.5)
        MSE(model(x), y).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            optimizer.step()
        results.append(flat(model))
    assert torch.equal(*results)


def test_penalties_are_seen_under_autocast():
    model, x, y = problem(dtype=torch.float32)
    optimizer = AdaptedGD(model, lr=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = MSE(model(x).float(), y) + 0.01 * sum(p.square().sum() for p in model.parameters())
    loss.backward()
    with pytest.warns(UserWarning, match="did not come through"):
        optimizer.step()


def test_weights_shared_by_calls_under_autocast_are_no_penalty():
    model, x, y = problem(dtype=torch.float32)
    optimizer = AdaptedGD(model, lr=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = MSE(model(x[:3]).float(), y[:3]) + MSE(model(x[3:]).float(), y[3:])
    loss.backward()
    optimizer.step()
    assert optimizer.last_step.off_output_fraction == 0


def test_entries_that_are_rearranged_are_found_again_in_low_precision():
    """Numbers beyond 256 are not told apart in bfloat16."""
    ends = []
    for order in (torch.arange(400), torch.randperm(400)):
        torch.manual_seed(0)
        model, x, y = nn.Linear(4, 40), torch.randn(10, 4), torch.randn(400)
        optimizer = AdaptedGD(model, criterion=MSE, damping=0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            MSE(model(x).flatten()[order], y[order]).backward()
        optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (ends[0] - ends[1]).norm() <= 0.02 * ends[0].norm()


def test_gradients_of_far_targets_are_explained_in_low_precision():
    """They are much larger than the outputs, and rounded by 2⁻⁹."""
    model, x, y = problem(dtype=torch.float32)
    optimizer = AdaptedGD(model, criterion=MSE, damping=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        MSE(model(x), 1e4 * y).backward()
    optimizer.step()
    assert optimizer.last_step.status == "full_rank"
