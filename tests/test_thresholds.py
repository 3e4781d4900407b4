"""Thresholds of the policies, on curves with one parameter: what is just beyond one goes another way than what is before it."""

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, Backtracking, LevenbergMarquardt, LossFunction
from torch_adapted_gd.step.default import SamePoints

from .cases import MSE

ONE = torch.ones(1, 1, dtype=torch.float64)


class Curve(nn.Module):
    """w ↦ f(w), from w = 0 on; without damping a step aims at f = 1 along the tangent."""

    def __init__(self, f):
        super().__init__()
        self.f, self.w = f, nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))

    def forward(self, x):
        return self.f(x @ self.w)


def beyond(start, value):
    """w up to a start, then a line to a value at 1."""
    slope = (value - 1) / (1 - start)
    return lambda w: w + slope * torch.relu(w - start)


class Loop:
    def __init__(self, f, policy, **options):
        self.model = Curve(f)
        self.optimizer = AdaptedGD(self.model, criterion=MSE, damping=policy, **options)

    def step(self):
        self.optimizer.zero_grad()
        MSE(self.model(ONE), ONE).backward()
        self.optimizer.step()
        return self.model.w.item()


def test_a_length_is_enough_from_a_ten_thousandth_of_what_the_slope_promises():
    """(f − 1)² goes from 1 to (1 − ε)², by 2ε, and the slope promises 2."""
    policy = Backtracking(second_order=False)
    assert Loop(beyond(0.6, 2 - 2e-4), policy).step() == pytest.approx(1.0)
    loop = Loop(beyond(0.6, 2 - 5e-5), policy)
    assert loop.step() == pytest.approx(0.5)
    loop.step()
    assert loop.optimizer.last_step.num_trials == 2  # the whole length comes first again


def test_where_no_length_is_enough_damping_begins_at_1e_18_and_grows_a_thousandfold():
    loop = Loop(lambda w: torch.where(w > 0.4, 3.0, w), Backtracking(smallest=0.3, second_order=False))
    assert loop.step() == pytest.approx(0.25)  # half of the length with λ = 1
    report = loop.optimizer.last_step
    assert report.relative_damping == pytest.approx(1.0)
    assert report.num_trials == 2 * 8  # 0, 1e-18, 1e-15, …, 1
    loop.model.f = lambda w: w
    dampings = []
    for _ in range(3):
        loop.step()
        dampings.append(loop.optimizer.last_step.relative_damping)
    assert dampings == pytest.approx([1.0, 1e-3, 1e-6])


def test_losses_on_other_inputs_raise_damping_up_to_ten():
    policy, state = LevenbergMarquardt(), {"before": 1.0, "predicted": -1.0}
    raised = {d: policy.looked_back({**state, "damping": d}, 2.0, same=False)[0]["damping"] for d in (0.1, 9.0, 20.0)}
    assert raised == {0.1: 0.2, 9.0: 10.0, 20.0: 20.0}


def test_steps_that_are_taken_back_one_after_the_other_raise_damping_faster_and_faster():
    policy, state = LevenbergMarquardt(), {"before": 1.0, "predicted": -1.0, "damping": 1.0}
    for rejections, factor in ((0.0, 2.0), (1.0, 4.0), (2.0, 8.0), (1e5, 2.0**40)):  # and no further than floats go
        found, back = policy.looked_back({**state, "rejections": rejections}, 2.0, same=True)
        assert back
        assert found["damping"] == factor


@pytest.mark.parametrize(("left", "undamped"), [(0.45, True), (0.55, False)])
def test_fifty_undamped_steps_have_to_halve_the_loss(left, undamped):
    points = SamePoints()
    for number in range(52):
        points = points.met(1.0, left ** (number / 51))
    assert points.undamped == undamped


@pytest.mark.parametrize(
    ("policy", "fraction"),
    [(Backtracking(), 1 / 16), (LevenbergMarquardt(initial=1e-6), 0.1)],  # which then raises λ
    ids=["line search", "levenberg-marquardt"],
)
def test_a_curvature_is_learned_from_losses_threefold_in_a_step_at_most_and_not_from_their_rounding(policy, fraction):
    model, constant, curvatures, fractions = Curve(lambda w: w), 1e3, [], []
    optimizer = AdaptedGD(model, damping=policy)

    def closure():
        optimizer.zero_grad()
        loss = constant + 50 * (model(ONE) - 1).square().sum()  # its curvature is 100, and |g|²/2C = 100/21
        loss.backward()
        return loss

    def step():
        optimizer.step(closure)
        curvatures.append(optimizer.last_step.curvature)
        fractions.append(optimizer.last_step.fraction)

    for _ in range(4):
        step()
    assert curvatures == pytest.approx([100 / 21, 300 / 21, 900 / 21, 100])
    assert fractions[0] == pytest.approx(fraction)
    constant = 1e6
    nn.init.constant_(model.w, 1 - 3e-6)  # the loss falls by four times its rounding
    step()
    assert model.w.item() > 1 - 2e-6
    step()
    assert curvatures[-1] == pytest.approx(100, rel=1e-6)


@pytest.mark.parametrize(
    ("policy", "value", "end"),
    [
        (LevenbergMarquardt(initial=1e-12), 1.37, 0.63),
        (LevenbergMarquardt(initial=1e-12), 1.38, 1.0),  # 0.38 is more than three eighths of the step
        (Backtracking(), 1.3, 0.7),  # (f − 1)² goes from 0.09 to 0.051 only
        (Backtracking(), 1.2, 13 / 15),  # to 0.01, and on like that
    ],
)
def test_how_far_the_bend_is_mended(policy, value, end):
    loop = Loop(beyond(0.6, value), policy)
    assert loop.step() == pytest.approx(end, abs=1e-6)
    assert loop.optimizer.last_step.num_trials == 1


@pytest.mark.parametrize(("noise", "taken_back"), [(5e-4, True), (2e-3, False)])
def test_losses_that_repeat_to_a_thousandth_judge_the_step_before(noise, taken_back):
    levels = [0.0, 0.0, noise, noise]  # there, taken back, the same place with another loss, there
    criterion = LossFunction(lambda out: (1 + levels[len(statuses)]) * (out - 1).square().sum())
    model = Curve(lambda w: torch.where(w > 0.5, 3.0, w))
    optimizer = AdaptedGD(model, criterion=criterion, damping=LevenbergMarquardt(initial=1e-12, judge="next"))
    statuses = []
    for _ in levels:
        optimizer.zero_grad()
        criterion(model(ONE)).backward()
        optimizer.step()
        statuses.append(optimizer.last_step.status)
    assert statuses[:3] == ["full_rank", "rejected", "full_rank"]
    assert (statuses[3] == "rejected") == taken_back


@pytest.mark.parametrize(("edge", "damping", "fraction"), [(1e-2, 0.0, 1 / 128), (1.5e-3, 1.0, 1 / 512)])
def test_undamped_steps_on_differential_equations_are_no_shorter_than_a_thousandth(edge, damping, fraction):
    """u = f(w)·x with f(w) = w up to an edge and 3 beyond, for the equation u′ = 1. Where undamped steps fail, λ is raised."""

    class Solution(Curve):
        def forward(self, x):
            return self.f(self.w) * x

    model = Solution(lambda w: torch.where(w > edge, 3.0, w))
    optimizer = AdaptedGD(model, criterion=MSE)

    def closure():
        optimizer.zero_grad()
        x = ONE.clone().requires_grad_()
        loss = MSE(torch.autograd.grad(model(x).sum(), x, create_graph=True)[0], ONE)
        loss.backward()
        return loss

    optimizer.step(closure)  # the next one knows that the points stay
    nn.init.zeros_(model.w)
    optimizer.step(closure)
    assert optimizer.last_step.relative_damping == pytest.approx(damping)
    assert optimizer.last_step.fraction == fraction
