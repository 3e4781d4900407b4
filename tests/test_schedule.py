import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, AdaptedWarning, HalfSquaredLoss, LinearInterpolationLR

from .cases import mlp


def run(steps, criterion, lr=1.0, scale=1.0, after=0):
    """Distances from the straight line after each step, relative to |x₀ − y|, and |x − y| at the end."""
    torch.manual_seed(1)
    model = mlp(sizes=(4, 40, 40, 2)).double()
    x, y = torch.randn(10, 4).double(), 0.5 * torch.randn(10, 2).double()
    optimizer = AdaptedGD(model, lr=lr, criterion=criterion, damping=0.0)
    scheduler = LinearInterpolationLR(optimizer, steps)
    loss_function = criterion or nn.MSELoss()
    x0 = model(x).detach()
    distances = []
    for k in range(steps + after):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr / max(steps - k, 1))
        optimizer.zero_grad()
        (scale * loss_function(model(x), y)).backward()
        optimizer.step()
        scheduler.step()
        assert scheduler.t == pytest.approx(min((k + 1) / steps, 1.0))
        line = (1 - scheduler.t) * x0 + scheduler.t * y
        distances.append(float((model(x).detach() - line).norm() / (x0 - y).norm()))
        assert optimizer.last_step.full_rank
    return distances


@pytest.mark.parametrize("criterion", [HalfSquaredLoss(), HalfSquaredLoss("sum"), nn.MSELoss(), nn.MSELoss(reduction="sum")])
def test_outputs_move_on_the_line_whatever_the_reduction(criterion):
    coarse, fine = run(8, criterion), run(16, criterion)
    assert max(fine) < 0.05
    assert max(fine) < 0.6 * max(coarse)  # O(1/T)
    assert fine[-1] < 2e-3


def test_without_a_criterion_the_unit_is_the_users():
    q, n = 2, 10
    torch.testing.assert_close(run(8, None, lr=n * q / 2), run(8, nn.MSELoss()))  # η = 1/c, c = 2/(QN)


def test_after_the_last_step_full_steps_hold_the_targets():
    distances = run(8, HalfSquaredLoss(), after=3)
    assert distances[-1] < 1e-10, distances


def test_state_dict_resumes():
    model = mlp()
    criterion = HalfSquaredLoss()
    optimizer = AdaptedGD(model, criterion=criterion, damping=0.0)
    scheduler = LinearInterpolationLR(optimizer, 5)
    for _ in range(2):
        optimizer.zero_grad()
        criterion(model(torch.ones(2, 4)), torch.ones(2, 3)).backward()
        optimizer.step()
        scheduler.step()
    other = AdaptedGD(model, criterion=criterion, damping=0.0)
    resumed = LinearInterpolationLR(other, 7)
    resumed.load_state_dict(scheduler.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert (resumed.total_steps, resumed.t, other.param_groups[0]["lr"]) == (5, 0.4, pytest.approx(1 / 3))


def test_groups_keep_their_own_learning_rates():
    model = mlp()
    optimizer = AdaptedGD(model, params=[{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}])
    scheduler = LinearInterpolationLR(optimizer, 4)
    assert scheduler.get_last_lr() == [0.125, 0.25]


def test_bad_arguments():
    optimizer = AdaptedGD(mlp())
    with pytest.raises(ValueError, match="`total_steps` should be at least 1, but got 0"):
        LinearInterpolationLR(optimizer, 0)
    with pytest.raises(TypeError, match="`total_steps` should be a whole number, but got 2.5"):
        LinearInterpolationLR(optimizer, 2.5)
    with pytest.raises(TypeError, match="Optimizer"):
        LinearInterpolationLR("optimizer", 5)


def test_damping_by_a_policy_is_warned_about():
    with pytest.warns(AdaptedWarning, match="Give AdaptedGD damping=0.0 to follow it") as caught:
        LinearInterpolationLR(AdaptedGD(mlp(), criterion=nn.MSELoss()), 5)
    assert caught[0].filename == __file__
