"""Steps that are judged by the next loss, as nothing else can: taken back exactly where they were bad."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, AdaptedWarning, LevenbergMarquardt

from .cases import flat


def curve():
    torch.manual_seed(1)
    x = torch.linspace(-2, 2, 40, dtype=torch.float64)[:, None]
    model = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1)).double()
    return model, x, torch.sin(3 * x)


def step(model, optimizer, criterion, x, y):
    """One step on something that was computed from the outputs, which no forward pass gives again."""
    optimizer.zero_grad()
    loss = criterion(model(x).sinh(), y)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_a_bad_step_is_taken_back_exactly(momentum):
    model, x, y = curve()
    criterion = nn.MSELoss()
    policy = LevenbergMarquardt(initial=1e-5)
    optimizer = AdaptedGD(model, criterion=criterion, damping=policy, momentum=momentum, weight_decay=1e-6)
    undone, before = 0, flat(model)
    for _ in range(60):
        here, loss = flat(model), criterion(model(x).sinh(), y).item()
        damping = optimizer.param_groups[0]["damping"]
        assert step(model, optimizer, criterion, x, y) == loss
        if optimizer.last_step.status == "rejected":
            undone += 1
            assert optimizer.last_step.fraction == 0
            assert torch.equal(flat(model), before)
            assert optimizer.param_groups[0]["damping"] > damping
            assert criterion(model(x).sinh(), y).item() < loss
        else:
            before = here
    assert undone > 0
    assert criterion(model(x).sinh(), y) < 5e-2


def test_the_closure_comes_before_the_next_loss():
    model, x, y = curve()
    criterion = nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion)

    def closure():
        optimizer.zero_grad()
        loss = criterion(model(x).sinh(), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(15)]
    assert losses == sorted(losses, reverse=True)
    assert optimizer.last_step.gain_ratio > 0


def test_it_resumes_to_the_same_bits():
    model, x, y = curve()
    criterion = nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion, damping=LevenbergMarquardt(initial=1e-5))
    for _ in range(7):
        step(model, optimizer, criterion, x, y)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, _, _ = curve()
    resumed = AdaptedGD(other, criterion=criterion, damping=LevenbergMarquardt(initial=1e-5))
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    copied_model, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other, resumed), (copied_model, copied)):
        for _ in range(7):
            step(m, o, criterion, x, y)
    assert torch.equal(flat(model), flat(other))
    assert torch.equal(flat(model), flat(copied_model))


def test_other_points_are_no_reason_to_take_a_step_back():
    model, _, _ = curve()
    criterion = nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion)
    torch.manual_seed(0)
    for _ in range(60):
        x = 4 * torch.rand(40, 1, dtype=torch.float64) - 2
        step(model, optimizer, criterion, x, torch.sin(3 * x))
        assert optimizer.last_step.status != "rejected"
    assert criterion(model(x).sinh(), torch.sin(3 * x)) < 1e-2


def test_a_step_to_nowhere_is_taken_back():
    model, x, y = curve()
    criterion = nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion)
    step(model, optimizer, criterion, x, y)
    before = optimizer.state[model[0].weight]["previous"].clone()
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    step(model, optimizer, criterion, x, y)
    assert optimizer.last_step.status == "rejected"
    assert torch.equal(model[0].weight, before)


def test_rejections_one_after_the_other_are_told_of():
    model, x, y = curve()
    criterion = nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion)

    def grows(k):
        optimizer.zero_grad()
        (10.0**k * criterion(model(x).sinh(), y)).backward()
        optimizer.step()

    for k in range(19):
        grows(k)
    with pytest.warns(AdaptedWarning, match="The last 10 steps were rejected") as caught:
        grows(19)
    assert [warning.filename for warning in caught] == [__file__]
