"""Proposition 2.5: how rank loss bends outputs from the straight line."""

import copy
import math

import pytest
import torch
from torch import nn

from torch_adapted_gd import adapted_flow, interpolation_deviation

from .cases import flat, mlp, move
from .tangents import Dense, assert_close, duplicated, dying, random

TOLERANCES = {"rtol": 3e-8, "atol": 1e-10}


def conflicting():
    """The same inputs with other targets."""
    model, x = duplicated()
    return model, x, random(8, 2)


def near(model, x, reach, noise):
    """Targets that parameters nearby nearly give, so that the flow stays where its tangent is well-conditioned."""
    teacher = copy.deepcopy(model)
    move(teacher, reach * random(len(flat(model))))
    y = teacher(x).detach()
    return model, x, y + noise * random(*y.shape)


def narrow():
    """K < QN: 7 parameters for 12 outputs, the hidden units apart from one another."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.5, 0.3], [-0.3, 1.5]]))
        model[2].weight.copy_(torch.tensor([[1.0, -1.0]]))
    return near(model, random(12, 2), 0.2, 0.1)


def dead_relus():
    return near(*dying(), 0.05, 0.1)


NONLINEAR = {"conflicting labels": conflicting, "K < QN": narrow, "dead ReLUs": dead_relus}


@pytest.mark.parametrize("name", NONLINEAR)
def test_deviation_is_the_predicted_one(name):
    model, x, y = NONLINEAR[name]()
    x0 = model(x).detach()
    dense = Dense.of(model, x)
    theta = flat(model)
    found = interpolation_deviation(model, x, y, steps=3, t_end=0.9, **TOLERANCES)
    apart = (found.predicted - found.observed).norm(dim=(1, 2))
    assert found.error == pytest.approx(float(apart.max()) / found.distance)
    assert 0 < found.error <= 1e-6
    assert found.ranks.tolist() == [dense.rank] * 4
    assert dense.rank < y.numel()
    assert torch.equal(flat(model), theta)
    assert found.t.tolist() == pytest.approx([0.0, 0.3, 0.6, 0.9])
    assert found.distance == pytest.approx(float((x0 - y).norm()))
    for seen in (found.predicted, found.observed):
        assert seen.shape == (4, *y.shape)
        assert not seen[0].any()
        assert float(seen[-1].norm()) > 0.05 * found.distance
    # What was observed is what the flow does, and what was out of reach what projectors there say.
    flow = adapted_flow(model, x, y, t_end=0.9, steps=3, **TOLERANCES)
    line = torch.stack([(1 - t) * x0 + t * y for t in found.t.tolist()])
    assert_close(found.observed, flow.outputs - line, 1e-5)
    assert found.losses.tolist() == pytest.approx(flow.losses.tolist(), rel=1e-6)
    way = (x0 - y).flatten()
    move(model, flow.parameters[-1] - theta)
    for k, oracle in ((0, dense), (3, Dense.of(model, x))):
        expected = float((way - oracle.p @ way).norm() / way.norm())
        assert float(found.off_range[k]) == pytest.approx(expected, abs=1e-5)
        assert expected > 0.05


def test_prediction_takes_the_turning_of_the_range_into_account():
    """In a network ran D turns, and t P⊥₀(x₀ − y) is not the deviation."""
    model, x, y = narrow()
    dense, way = Dense.of(model, x), (model(x) - y).detach()
    found = interpolation_deviation(model, x, y, steps=2, t_end=0.9, **TOLERANCES)
    constant = 0.9 * (way.flatten() - dense.p @ way.flatten())
    assert float((found.predicted[-1].flatten() - constant).norm()) > 1e-2 * found.distance
    assert found.error <= 1e-6


def linear(n=6, k=3):
    """Linear in its parameters, with fewer of these than outputs: P is constant."""
    return nn.Linear(k, 2, bias=False).double(), random(n, k), random(n, 2)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "euler"])
def test_closed_form_for_a_constant_range(method):
    """t P⊥(x₀ − y). Any method is exact: θ moves on a straight line, and so does the prediction."""
    model, x, y = linear()
    way = (model(x) - y).detach().flatten()
    off = way - Dense.of(model, x).p @ way
    found = interpolation_deviation(model, x, y, steps=10, t_end=0.9, method=method, rtol=1e-11, atol=1e-12)
    expected = torch.stack([t * off for t in found.t.tolist()]).reshape(11, 6, 2)
    assert_close(found.predicted, expected, 1e-10)
    assert_close(found.observed, expected, 1e-10)
    assert found.off_range.tolist() == pytest.approx([float(off.norm() / way.norm())] * 11, rel=1e-10)
    within = float(way.square().sum() - off.square().sum())
    losses = [((1 - t) ** 2 * within + float(off.square().sum())) / 12 for t in found.t.tolist()]
    assert found.losses.tolist() == pytest.approx(losses, rel=1e-9)


@pytest.mark.parametrize("method", ["dopri5", "euler"])
def test_loss_that_remains(method):
    """|P⊥(x₀ − y)|²/2N at t = 1."""
    model, x, y = linear()
    way = (model(x) - y).detach().flatten()
    off = way - Dense.of(model, x).p @ way
    remains = float(off.square().sum()) / 12
    assert remains > 0.01
    found = adapted_flow(model, x, y, method=method, steps=4)
    assert float(found.losses[-1]) == pytest.approx(remains, rel=1e-9)
    assert float(found.off_range[-1]) == pytest.approx(1.0, abs=1e-9)
    nearly = interpolation_deviation(model, x, y, t_end=0.9999, steps=1)
    assert float(nearly.losses[-1]) == pytest.approx(remains, rel=1e-6)


def test_none_at_full_rank():
    model = mlp(sizes=(3, 6, 1)).double()
    x, y = random(3, 3), random(3, 1)
    found = interpolation_deviation(model, x, y, steps=3, t_end=0.9, **TOLERANCES)
    assert found.ranks.tolist() == [3] * 4
    assert float(found.predicted.norm()) < 1e-7
    assert float(found.observed.norm()) < 1e-6
    assert float(found.off_range.max()) < 1e-7
    assert found.error < 1e-6


def test_a_start_at_the_targets():
    model, x, _ = conflicting()
    found = interpolation_deviation(model, x, model(x), method="euler", steps=2)
    assert found.error == 0.0
    assert found.distance == 0.0
    assert not found.observed.any()


def test_float32_networks():
    model, x, y = conflicting()
    found = interpolation_deviation(model.float(), x.float(), y.float(), steps=2, t_end=0.8, rtol=1e-5, atol=1e-7)
    assert found.ranks.tolist() == [8] * 3
    assert found.error < 1e-4
    assert found.predicted.dtype == found.observed.dtype == torch.float64


def test_rank_cut_is_used():
    """Cut at a larger singular value, more of the way is out of reach: so says the prediction, and so it goes."""
    model = nn.Linear(2, 1, bias=False).double()
    x, y = torch.diag(torch.tensor([1.0, 1e-2], dtype=torch.float64)), random(2, 1)
    way = (model(x) - y).detach()
    whole = interpolation_deviation(model, x, y, steps=1, t_end=0.5)
    cut = interpolation_deviation(model, x, y, steps=1, t_end=0.5, rank_rtol=0.1)
    assert (whole.ranks[0], cut.ranks[0]) == (2, 1)
    assert_close(cut.predicted[-1], torch.stack([0 * way[0], 0.5 * way[1]]), 1e-7)
    assert max(cut.error, whole.error) < 1e-7


ERRORS = {
    "the end": ({"t_end": 1.0}, ValueError, "`t_end` should be at least 1e-300 and below 1, but got 1.0"),
    "a loss": ({"y": nn.MSELoss()}, TypeError, "`y` should be a tensor of targets, but got MSELoss"),
    "labels": ({"y": torch.zeros(6).long()}, ValueError, r"outputs' shape \[6, 2\], but have \[6\]"),
    "infinite": ({"y": torch.full((6, 2), math.inf)}, ValueError, "Targets should be finite"),
    "steps": ({"steps": True}, TypeError, "`steps` should be a whole number, but got True"),
    "method": ({"method": "midpoint"}, ValueError, "`method` should be one of 'dopri5', 'rk4', 'euler'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    model, x, y = linear()
    changes, error, message = ERRORS[case]
    arguments = {"y": y, **changes}
    with pytest.raises(error, match=message):
        interpolation_deviation(model, x, **arguments)
