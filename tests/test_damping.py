"""The policy that chooses the damping, and what it remembers."""

import io
import math
import pickle

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, Backtracking, LevenbergMarquardt
from torch_adapted_gd.step.remembered import CarryOver, read

from .cases import MSE, flat, mlp
from .trials import closure_of, wave


def test_damping_and_momentum_are_resumed_to_the_same_bits():
    torch.manual_seed(3)
    model, x, y = wave()
    optimizer = AdaptedGD(model, criterion=MSE, damping=LevenbergMarquardt(), momentum=0.5)

    def train(model, optimizer, steps):
        for _ in range(steps):
            closure_of(model, optimizer, x, y, optimizer.criterion)()
            optimizer.step()

    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)  # plain numbers and tensors alone
    assert saved["optimizer"]["param_groups"][0]["damping"] == optimizer.param_groups[0]["damping"] != 1e-2
    other, _, _ = wave()
    resumed = AdaptedGD(other, criterion=MSE, damping=LevenbergMarquardt(), momentum=0.5)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    copied, copied_model = pickle.loads(pickle.dumps((optimizer, model)))
    for m, o in ((model, optimizer), (other, resumed), (copied_model, copied)):
        train(m, o, 4)
    assert torch.equal(flat(model), flat(other))
    assert torch.equal(flat(model), flat(copied_model))
    assert optimizer.param_groups[0]["damping"] == resumed.param_groups[0]["damping"]


def test_policy():
    policy = LevenbergMarquardt(initial=1.0, increase=3.0, decrease=0.5, good=0.8, poor=0.2, smallest=0.4)
    assert [policy.after(1.0, ratio) for ratio in (0.9, 0.5, 0.1)] == [0.5, 1.0, 3.0]
    assert policy.after(0.5, 1.0) == 0.4
    assert [policy.raised(1.0, n) for n in (1, 2, 3)] == [3.0, 6.0, 12.0]


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("initial", 0.0, ValueError, "`initial` should be at least 1e-300"),
        ("initial", math.nan, ValueError, "`initial` should be"),
        ("increase", 1.0, ValueError, "`increase` should be at least 1"),
        ("decrease", 1.0, ValueError, "`decrease` should be at least 1e-300 and below 1, but got 1.0"),
        ("good", 0.1, ValueError, "`good` should be at least 0.25"),
        ("poor", 1.0, ValueError, "`poor` should be at least 0.0001 and below 1"),
        ("accept", -0.1, ValueError, "`accept` should be at least 0"),
        ("smallest", 0.0, ValueError, "`smallest` should be at least 1e-300"),
        ("num_trials", 0, ValueError, "`num_trials` should be at least 1"),
        ("num_trials", 2.0, TypeError, "`num_trials` should be a whole number"),
        ("second_order", 1, TypeError, "`second_order` should be True or False, but got 1"),
    ],
)
def test_options_of_the_policy_are_checked(name, value, error, match):
    with pytest.raises(error, match=match):
        LevenbergMarquardt(**{name: value})


def test_options_of_the_optimizer_are_checked():
    model = mlp()
    with pytest.raises(TypeError, match=r"`damping` should be a number, LevenbergMarquardt\(\), .*, but got 'auto'"):
        AdaptedGD(model, damping="auto")
    with pytest.raises(TypeError, match=r"but got the class. Write LevenbergMarquardt\(\)"):
        AdaptedGD(model, damping=LevenbergMarquardt)


def test_a_number_is_the_default_where_the_loss_is_not_known():
    model = mlp()
    assert AdaptedGD(model).param_groups[0]["damping"] == 0.0
    assert AdaptedGD(model, criterion=MSE, damping=Backtracking()).param_groups[0]["damping"] == 0.0
    assert AdaptedGD(model, criterion=MSE).param_groups[0]["damping"] == LevenbergMarquardt().initial


def test_damping_is_lowered_only_where_gains_carry_over():
    """The whole data again and again, and batches that have nothing to do with each other."""
    for carried in (True, False):
        torch.manual_seed(0)
        model = mlp(sizes=(30, 40, 1)).double()
        optimizer = AdaptedGD(model, criterion=MSE)
        dampings = []
        x, y = torch.randn(5, 30, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
        for _ in range(12):
            if not carried:
                x, y = torch.randn(5, 30, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
            closure_of(model, optimizer, x, y)()
            optimizer.step()
            dampings.append(optimizer.param_groups[0]["damping"])
        carry = read(CarryOver, optimizer.state[next(model.parameters())])
        if carried:
            assert carry.share == pytest.approx(1.0, abs=1e-6)
            assert dampings[-1] < 1e-4
        else:
            assert carry.share < 0.5
            assert min(dampings[2:]) >= dampings[1]


def test_carry_over_is_what_the_next_batch_sees():
    carry = CarryOver()
    assert carry.met(3.0).share is None
    carry = carry.met(3.0).stepped(3.0, -2.0)  # 3 → 1
    assert carry.met(1.0).share == 1.0
    assert carry.met(3.0).share == 0.0
    assert carry.met(2.0).share == 0.5
    carry = carry.met(2.0).stepped(2.0, -1.0)
    assert carry.met(2.0).share == pytest.approx(1 - (0.9 * 1 + 1) / (0.9 * 2 + 1))
    policy = LevenbergMarquardt()
    assert policy.after(1.0, 1.0, 0.6) == policy.after(1.0, 1.0) == 1 / 3
    assert policy.after(1.0, 1.0, 0.4) == 1.0
    assert LevenbergMarquardt(carry_over=0.0).after(1.0, 1.0, -5.0) == 1 / 3


def test_carry_over_of_losses_below_zero():
    carry = CarryOver().met(-4.0).stepped(-4.0, 0.0)
    assert carry.met(-4.0).share is None
    assert CarryOver().met(-4.0).stepped(-4.0, -2.0).met(-6.0).share == 1.0


def test_damping_is_raised_while_the_next_batch_is_worse_by_far():
    policy = LevenbergMarquardt()
    assert policy.after(1.0, 1.0, -1.5) == 2.0
    carry = CarryOver().met(1.0).stepped(1.0, -1.0)
    assert carry.met(100.0).share == -3.0  # an outlier counts for no more than that
    # Where a step gains a hundredth of the loss, chance makes batches differ by more: what counts is beyond that.
    carry = CarryOver().met(100.0).stepped(100.0, -1.0)
    assert [carry.met(loss).share for loss in (99.0, 100.0, 101.5, 102.5)] == [None, None, None, -2.5]


def test_no_damping_is_not_the_end():
    """Of a state that was saved without the policy, too."""
    model, x, y = wave()
    state = AdaptedGD(model, criterion=MSE, damping=0.0).state_dict()
    optimizer = AdaptedGD(model, criterion=MSE)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["damping"] == 0.0
    before = MSE(model(x), y).item()
    closure_of(model, optimizer, x, y)()
    optimizer.step()
    assert MSE(model(x), y).item() < before
    assert optimizer.param_groups[0]["damping"] > 0


def test_a_group_that_is_added_later_takes_the_present_damping():
    model, x, y = wave()
    optimizer = AdaptedGD(model, params=model[0].parameters(), criterion=MSE)
    for _ in range(3):
        closure_of(model, optimizer, x, y)()
        optimizer.step()
    assert optimizer.param_groups[0]["damping"] != LevenbergMarquardt().initial
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.5})
    assert optimizer.param_groups[1]["damping"] == optimizer.param_groups[0]["damping"]
    closure_of(model, optimizer, x, y)()
    optimizer.step()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_batches_of_different_sizes_compare(reduction):
    torch.manual_seed(0)
    model, criterion = mlp(sizes=(5, 8, 1)).double(), nn.MSELoss(reduction=reduction)
    optimizer = AdaptedGD(model, criterion=criterion)
    for step in range(20):
        x = torch.randn(8 if step % 5 else 64, 5, dtype=torch.float64)
        optimizer.zero_grad()
        criterion(model(x), x.sum(1, keepdim=True).sin()).backward()
        optimizer.step()
    after = read(CarryOver, optimizer.state[next(model.parameters())]).after
    assert after == pytest.approx(nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin()).item(), rel=1e-6)


class Residual(nn.Module):
    """u' − 4π cos 2πt and u(0) − 1 at points that are drawn anew in each forward pass."""

    def __init__(self):
        super().__init__()
        self.u = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self):
        t = (1.5 * torch.rand(60, 1)).requires_grad_()
        (du,) = torch.autograd.grad(self.u(t).sum(), t, create_graph=True)
        start = (self.u(torch.zeros(1, 1)) - 1).expand(60, 1)
        return torch.cat([start, du - 4 * math.pi * torch.cos(2 * math.pi * t)], 1)


@pytest.mark.filterwarnings("ignore:Rows of the output Jacobian")
def test_points_drawn_anew_do_not_freeze_it():
    torch.manual_seed(0)
    model, criterion, zero = Residual(), nn.MSELoss(), torch.zeros(60, 2)
    optimizer = AdaptedGD(model, criterion=criterion)
    for _ in range(100):
        optimizer.zero_grad()
        loss = criterion(model(), zero)
        loss.backward()
        optimizer.step()
    assert loss < 1e-5
    assert optimizer.param_groups[0]["damping"] < 1e-3


class Decay(nn.Module):
    """A curve whose parameters have very different units."""

    def __init__(self, unit):
        super().__init__()
        self.a, self.k, self.c = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (1e6 * unit, 5e-4, 0.0))

    def forward(self, t):
        return self.a * torch.exp(-self.k * t) + self.c


@pytest.mark.parametrize("unit", [1.0, 1e-6])
def test_units_of_parameters_do_not_matter_where_the_solution_is_unique(unit):
    t = torch.linspace(0, 4000, 60, dtype=torch.float64)
    y = 2.5e6 * unit * torch.exp(-1.3e-3 * t) + 4e4 * unit
    model, criterion = Decay(unit), nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion)
    for _ in range(100):
        optimizer.zero_grad()
        criterion(model(t), y).backward()
        optimizer.step()
        assert optimizer.last_step.rank == 3
    with torch.no_grad():
        assert (model(t) - y).norm() <= 1e-8 * y.norm()
