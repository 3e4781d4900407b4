"""Steps that are judged by the next loss, as nothing else can: taken back exactly where they were bad."""

import copy
import io

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, AdaptedWarning, LevenbergMarquardt, LossFunction

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
    before = flat(model)
    for _ in range(2):
        optimizer.zero_grad()
        out = (1e-3 * model(x)).exp()
        criterion(out, 1e3 * torch.ones_like(y)).backward()
        optimizer.step()
    assert not torch.isfinite(out).all()
    assert optimizer.last_step.status == "rejected"
    assert torch.equal(flat(model), before)


def test_what_changes_beside_the_parameters_is_no_reason_either():
    """Weights of terms, dropout, noise that is added to outputs, other optimizers: no step is taken back for these, or one."""
    torch.manual_seed(0)
    criterion, rejected = nn.MSELoss(), {}
    for kind in ("weights", "dropout", "noise", "others"):
        model, x, y = curve()
        if kind == "dropout":
            model = nn.Sequential(model[0], model[1], nn.Dropout(0.2), model[2])
        frozen = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        model.register_parameter("offset", frozen)
        optimizer = AdaptedGD(model, params=[p for p in model.parameters() if p is not frozen], criterion=criterion)
        rejected[kind] = 0
        for k in range(40):
            optimizer.zero_grad()
            out = model(x).sinh() + model.offset
            if kind == "noise":
                out = out + 0.1 * torch.randn_like(out)
            ((1 + k if kind == "weights" else 1.0) * criterion(out, y)).backward()
            optimizer.step()
            rejected[kind] += optimizer.last_step.status == "rejected"
            if kind == "others":
                with torch.no_grad():
                    frozen.add_(0.1)
        assert optimizer.param_groups[0]["damping"] <= 10  # the most that chance can raise it to
    assert rejected.pop("weights") < 12  # judged by the weights of its time
    assert rejected == {"dropout": 0, "noise": 1, "others": 0}


def test_what_was_not_trained_is_not_set_back():
    """Two networks in one model, trained in turns."""
    torch.manual_seed(0)
    first, x, y = curve()
    second, _, _ = curve()
    model = nn.ModuleList([first, second])
    model.forward = lambda x, which: model[which](x).sinh()
    criterion = LossFunction(nn.functional.mse_loss)
    optimizer = AdaptedGD(model, criterion=criterion)
    for which in (0, 0, 1, 1):
        kept = flat(model[0])
        optimizer.zero_grad()
        criterion(model(x, which).sinh(), y).backward()
        optimizer.step()
    optimizer.state[model[0][0].weight]["before"] = 0.0  # as if the last step had been bad
    before = flat(model[1])
    optimizer.zero_grad()
    criterion(model(x, 1).sinh(), y).backward()
    optimizer.step()
    assert optimizer.last_step.status == "rejected"
    assert not torch.equal(flat(model[1]), before)
    assert torch.equal(flat(model[0]), kept)


def test_a_changed_model_is_noticed():
    model, x, y = curve()
    criterion = nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion)
    criterion(model(x).sinh(), y).backward()
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"Parameter '0.weight' was changed between the model's call and `step`"):
        optimizer.step()


def test_rejections_one_after_the_other_are_told_of():
    model, x, y = curve()
    optimizer, calls = AdaptedGD(model), []

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        calls.append(1)
        return loss.item() + len(calls)

    for _ in range(9):
        optimizer.step(closure)
    with pytest.warns(AdaptedWarning, match="The last 10 steps were rejected") as caught:
        optimizer.step(closure)
    assert [warning.filename for warning in caught] == [__file__]
