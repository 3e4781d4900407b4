"""Trials of a step: Levenberg–Marquardt with its second-order part, and the line search."""

import copy

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, Backtracking, LevenbergMarquardt, LossFunction

from .cases import MSE, dense_jacobian, flat, mlp, move, problem
from .trials import SEARCHES, by_closure, closure_of, wave

CE = nn.CrossEntropyLoss()


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("criterion", [MSE, CE], ids=["mse", "cross-entropy"])
def test_every_step_lowers_the_loss(search, with_closure, criterion):
    model, x, y = wave()
    if criterion is CE:
        model, y = mlp(sizes=(1, 12, 3)).double(), (y[:, 0] > 0).long() + (y[:, 0] > 0.8).long()
    optimizer = AdaptedGD(model, criterion=criterion, damping=by_closure(search, with_closure))
    closure = closure_of(model, optimizer, x, y, criterion)
    losses = [criterion(model(x), y).item()]
    for _ in range(15):
        if with_closure:
            assert optimizer.step(closure).item() == losses[-1]
        else:
            closure()
            optimizer.step()
        losses.append(criterion(model(x), y).item())
        assert losses[-1] < losses[-2]
        assert optimizer.last_step.num_trials >= 1
        assert optimizer.last_step.gain_ratio > 0
    assert losses[-1] < 0.2 * losses[0]


def test_an_accepted_trial_is_the_step_of_its_damping():
    model, x, y = wave()
    policy = LevenbergMarquardt(initial=1e-14, second_order=False)
    optimizer = AdaptedGD(model, criterion=MSE, damping=policy)
    reference = copy.deepcopy(model)
    closure_of(model, optimizer, x, y)()
    optimizer.step()
    report = optimizer.last_step
    assert report.num_trials > 1
    tried = policy.initial
    for rejections in range(1, report.num_trials):
        tried = policy.raised(tried, rejections)
    plain = AdaptedGD(reference, criterion=MSE, damping=tried)
    closure_of(reference, plain, x, y)()
    plain.step()
    assert torch.equal(flat(model), flat(reference))
    assert plain.last_step.damping == report.damping
    assert optimizer.param_groups[0]["damping"] == policy.after(tried, report.gain_ratio)


def test_the_gain_ratio_is_actual_over_predicted():
    model, x, y = wave()
    optimizer = AdaptedGD(model, criterion=MSE, damping=LevenbergMarquardt(initial=0.1, second_order=False))
    d = torch.func.vmap(torch.func.jacrev(lambda p, z: torch.func.functional_call(model, p, z[None])[0]), (None, 0))(
        dict(model.named_parameters()), x
    )
    jacobian = torch.cat([part.detach().reshape(len(x), -1) for part in d.values()], 1)
    residual, start = (model(x) - y).detach()[:, 0], flat(model)
    closure_of(model, optimizer, x, y)()
    optimizer.step()
    predicted = (residual.square().mean() - (residual + jacobian @ (flat(model) - start)).square().mean()).item()
    actual = residual.square().mean().item() - MSE(model(x), y).item()
    assert optimizer.last_step.gain_ratio == pytest.approx(actual / predicted)


def test_the_second_order_part_is_that_of_the_bent_outputs():
    model, x, y = wave()
    optimizer = AdaptedGD(model, criterion=MSE, damping=LevenbergMarquardt(initial=1.0))
    first_order = copy.deepcopy(model)
    plain = AdaptedGD(first_order, criterion=MSE, damping=1.0)
    start, outputs = flat(model), model(x).detach()
    for m, o in ((model, optimizer), (first_order, plain)):
        closure_of(m, o, x, y)()
        o.step()
    reference = copy.deepcopy(first_order)
    move(reference, start - flat(reference))
    d = dense_jacobian(reference, x)
    bend = (first_order(x).detach() - outputs)[:, 0] - d @ (flat(first_order) - start)
    shift = (d @ d.T).diagonal().mean()
    part = -d.T @ torch.linalg.solve(d @ d.T + shift * torch.eye(len(x), dtype=torch.float64), bend)
    assert 0 < part.norm() < 0.375 * (flat(first_order) - start).norm()
    assert MSE(model(x), y) < MSE(first_order(x), y)
    assert (flat(model) - flat(first_order) - part).norm() <= 1e-9 * part.norm()


def test_the_second_order_part_saves_steps():
    losses = {True: [], False: []}
    for second_order, ends in losses.items():
        for seed in range(5):
            torch.manual_seed(seed)
            model, x, y = wave()
            optimizer = AdaptedGD(model, criterion=MSE, damping=LevenbergMarquardt(second_order=second_order))
            for _ in range(40):
                closure_of(model, optimizer, x, y)()
                optimizer.step()
            ends.append(MSE(model(x), y).item())
    assert sorted(losses[True])[2] < 0.3 * sorted(losses[False])[2]


class Fragile(nn.Module):
    """Not a number once its weight is large."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight + torch.log(1.5 - self.weight)


@pytest.mark.parametrize("search", SEARCHES)
def test_outputs_that_are_not_finite_are_shortened_in_the_plain_loop(search):
    model, x = Fragile(), torch.ones(4, 1, dtype=torch.float64)
    optimizer = AdaptedGD(model, lr=40.0, criterion=MSE, damping=SEARCHES[search])
    before = MSE(model(x), 4 * x).item()
    MSE(model(x), 4 * x).backward()
    optimizer.step()
    assert optimizer.last_step.num_trials > 1
    assert MSE(model(x), 4 * x).item() < before


@pytest.mark.parametrize("search", SEARCHES)
def test_the_loss_has_to_be_known(search):
    model, x, y = wave()
    optimizer = AdaptedGD(model, lr=0.01, damping=SEARCHES[search])
    closure = closure_of(model, optimizer, x, y, criterion=nn.L1Loss())
    closure()
    before = flat(model)
    with pytest.raises(RuntimeError, match="needs the loss at trial parameters.*Pass the loss as `criterion`.*or a closure"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    losses = [optimizer.step(closure).item() for _ in range(5)]  # any loss will do there
    assert losses == sorted(losses, reverse=True)


@pytest.mark.filterwarnings("ignore:.* of the loss's gradient did not come through the model's outputs")
def test_penalties_are_part_of_the_loss():
    """With a closure as it is; in the plain loop to first order."""
    ends = []
    for with_closure in (True, False):
        torch.manual_seed(0)
        model, x, y = wave()
        optimizer = AdaptedGD(model, lr=0.1, criterion=MSE, damping=LevenbergMarquardt())

        def loss(model=model, x=x, y=y):
            return MSE(model(x), y) + 1e-4 * sum(p.square().sum() for p in model.parameters())

        def closure(optimizer=optimizer, loss=loss):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        start = loss().item()
        for _ in range(20):
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        ends.append(loss().item() / start)
    assert max(ends) < 0.03


@pytest.mark.parametrize("search", SEARCHES)
def test_a_momentum_that_leads_uphill_is_left_out(search):
    model, x, y = wave()
    optimizer = AdaptedGD(model, criterion=MSE, momentum=0.9, damping=SEARCHES[search])
    closure = closure_of(model, optimizer, x, y)
    optimizer.step(closure)
    for p in model.parameters():
        optimizer.state[p]["momentum"].mul_(-1e4)
    before = MSE(model(x), y).item()
    optimizer.step(closure)
    assert MSE(model(x), y) < before


@pytest.mark.parametrize("search", SEARCHES)
def test_a_stationary_point_is_not_a_rejection(search):
    model, x, _ = wave()
    optimizer = AdaptedGD(model, criterion=MSE, damping=by_closure(search))
    before = flat(model)
    optimizer.step(closure_of(model, optimizer, x, model(x).detach()))
    assert optimizer.last_step.status != "rejected"
    assert optimizer.last_step.num_trials == 1
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_plain_gradients_in_a_step_are_shortened_too(alpha):
    model, x, y = wave()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)  # large derivatives: a gradient step of length lr/c is far too long
    optimizer = AdaptedGD(model, criterion=MSE, alpha=alpha)
    losses = [MSE(model(x), y).item()]
    for _ in range(5):
        closure_of(model, optimizer, x, y)()
        optimizer.step()
        assert optimizer.last_step.status != "rejected"
        losses.append(MSE(model(x), y).item())
    assert optimizer.last_step.num_trials > 1
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("with_decay", [1e-4, 1e-2])
def test_weight_decay_is_no_part_of_the_judgement(with_decay):
    """It goes on where the loss cannot be lowered any more."""
    model, x, y = wave(8)
    optimizer = AdaptedGD(model, criterion=MSE, weight_decay=with_decay)
    for _ in range(60):
        closure_of(model, optimizer, x, y)()
        optimizer.step()
    before = flat(model).norm()
    rejected = 0
    for _ in range(10):
        closure_of(model, optimizer, x, y)()
        optimizer.step()
        rejected += optimizer.last_step.status == "rejected"
    assert rejected <= 2
    assert flat(model).norm() < before


def test_the_second_order_part_keeps_to_the_learning_rates():
    _, x, y = wave()
    model = mlp(sizes=(1, 12, 12, 1)).double()
    groups = [{"params": model[0].parameters(), "lr": 1e-8}, {"params": model[2:].parameters()}]
    optimizer = AdaptedGD(model, params=groups, criterion=MSE)
    before = model[0].weight.detach().clone()
    for _ in range(5):
        closure_of(model, optimizer, x, y)()
        optimizer.step()
    assert 0 < (model[0].weight - before).norm() < 1e-5


@pytest.mark.parametrize("lr", [2.0, 4.0])
def test_a_line_search_with_long_steps_of_a_bounded_curvature(lr):
    model, criterion = mlp().double(), nn.BCEWithLogitsLoss()
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randint(2, (7, 3)).double()
    optimizer = AdaptedGD(model, lr=lr, criterion=criterion, damping=Backtracking(damping=1e-2))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        assert optimizer.last_step.gain_ratio is None or optimizer.last_step.gain_ratio > 0
    assert losses == sorted(losses, reverse=True)


class Particular(nn.Module):
    """Refuses weights that it does not like."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))

    def forward(self, x):
        if self.weight > 1.5:
            raise ValueError("too large")
        return x @ self.weight


def test_a_model_that_refuses_a_trial_has_it_shortened():
    model, x = Particular(), torch.ones(4, 1, dtype=torch.float64)
    optimizer = AdaptedGD(model, criterion=MSE)
    MSE(model(x), 9 * x).backward()
    optimizer.step()
    assert 1 < model.weight <= 1.5
    assert optimizer.last_step.num_trials > 1


def test_what_rounding_hides_is_not_tried_over_and_over():
    model, x, y = wave(8)
    model, x, y = model.float(), x.float(), y.float()
    optimizer = AdaptedGD(model, criterion=MSE)
    trials = []
    for _ in range(80):
        closure_of(model, optimizer, x, y)()
        optimizer.step()
        trials.append(optimizer.last_step.num_trials)
    assert MSE(model(x), y).item() < 1e-9
    assert sum(trials[-20:]) <= 40


@pytest.mark.parametrize("policy", [None, Backtracking(1e-6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fit_that_cannot_improve_is_stationary(dtype, policy):
    model, criterion = mlp(sizes=(4, 20, 3)).to(dtype), nn.MSELoss()
    x, y = torch.randn(30, 4, dtype=dtype), torch.randn(30, 3, dtype=dtype)
    optimizer = AdaptedGD(model, criterion=criterion, damping=policy)
    statuses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        before = flat(model)
        optimizer.step()
        statuses.append(optimizer.last_step.status)
        assert torch.equal(flat(model), before) == (statuses[-1] == "stationary")
    assert set(statuses[:5]) == {"full_rank"}
    assert set(statuses[-20:]) == {"stationary"}
    assert loss < 100 * torch.finfo(dtype).eps ** 1.5


def test_a_loss_below_zero_is_corrected_once_in_each_trial():
    model, x, y = problem()
    criterion = LossFunction(lambda a, b: nn.functional.mse_loss(a, b) - 100)
    optimizer = AdaptedGD(model, criterion=criterion, damping=LevenbergMarquardt(initial=1e-3))
    passes = []
    model[0].register_forward_hook(lambda *_: passes.append(1))
    for _ in range(6):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        passes.clear()
        optimizer.step()
        assert len(passes) <= 2 * optimizer.last_step.num_trials
