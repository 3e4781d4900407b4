"""The adapted flow and its family: straight lines, both times, orders, and comparison with an independent integration."""

import copy
import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_adapted_gd import adapted_flow, follow_path, interpolation_deviation
from torch_adapted_gd.theory import flow

from .cases import flat, mlp, move
from .tangents import NETWORKS, Dense, assert_close, random, taken_down

TIGHT = {"rtol": 1e-7, "atol": 1e-9}
LOOSE = {"rtol": 1e-6, "atol": 1e-8}  # where the accuracy does not matter


def problem(sizes=(5, 8, 2), n=4):
    """A network of K >= 4 QN, inputs, targets."""
    model = mlp(sizes=sizes).double()
    assert len(flat(model)) >= 4 * n * sizes[-1]
    return model, random(n, sizes[0]), random(n, sizes[-1])


def small(n=3):
    return problem((3, 5, 1), n)


def line(start, y, t):
    return torch.stack([(1 - at) * start + at * y for at in t.tolist()])


def farthest(found, expected, start, y):
    """Largest distance at any time, in units of |x₀ − y|."""
    return float((found - expected).flatten(1).norm(dim=1).max() / (start - y).norm())


def runge_kutta(field, z, times, steps):
    """∂_t z = field(t, z) by the classical method, ``steps`` between any two times."""
    path = [z]
    for a, b in itertools.pairwise(times):
        h = (b - a) / steps
        for k in range(steps):
            t = a + k * h
            k1 = field(t, z)
            k2 = field(t + h / 2, z + h / 2 * k1)
            k3 = field(t + h / 2, z + h / 2 * k2)
            k4 = field(t + h, z + h * k3)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        path.append(z)
    return torch.stack(path)


def dense_field(model, x, y, alpha):
    """V_α for C = |x − y|²/2N by dense algebra."""
    model = copy.deepcopy(model)

    def field(theta):
        move(model, theta - flat(model))
        g = (model(x) - y).detach().flatten() / len(x)
        return Dense.of(model, x).field(g, alpha)

    return field


@pytest.mark.parametrize("t_end", [1.0, 0.7])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_outputs_move_straight_to_the_targets(seed, t_end):
    """Proposition 2.4, at full rank."""
    torch.manual_seed(seed)
    model, x, y = problem()
    x0, theta = model(x).detach(), flat(model)
    found = adapted_flow(model, x, y, t_end=t_end, steps=7, **TIGHT)
    assert torch.allclose(found.t, t_end * torch.arange(8, dtype=torch.float64) / 7, rtol=1e-15)
    assert farthest(found.outputs, line(x0, y, found.t), x0, y) <= 1e-6
    start = float((x0 - y).square().sum()) / (2 * len(x))
    assert torch.allclose(found.losses, (1 - found.t) ** 2 * start, rtol=0, atol=1e-6 * start)
    assert found.ranks.tolist() == [8] * 8
    assert float(found.off_range.max()) < 1e-6
    assert torch.equal(found.parameters[0], theta)
    assert found.evaluations < 500  # it stops before t = 1, where ever shorter steps would be needed
    for k in (3, 7):
        again = copy.deepcopy(model)
        move(again, found.parameters[k] - theta)
        assert_close(found.outputs[k], again(x).detach(), 1e-12)
    s = [-len(x) * math.log(1 - t) if t < 1 else math.inf for t in found.t.tolist()]
    assert found.s.tolist() == pytest.approx(s, rel=1e-12)
    assert torch.equal(flat(model), theta)


def test_outputs_move_exponentially_in_time_s():
    """(2.50). By default the flow ends at s = N."""
    model, x, y = problem()
    x0 = model(x).detach()
    found = adapted_flow(model, x, y, time="s", steps=5, **TIGHT)
    assert found.s.tolist() == pytest.approx([k * 4 / 5 for k in range(6)])
    assert torch.allclose(found.t, 1 - torch.exp(-found.s / 4), rtol=1e-12)
    expected = torch.stack([y + math.exp(-s / 4) * (x0 - y) for s in found.s.tolist()])
    assert farthest(found.outputs, expected, x0, y) <= 1e-6
    longer = adapted_flow(model, x, y, time="s", t_end=8.0, steps=1, **TIGHT)
    assert farthest(longer.outputs[-1:], (y + math.exp(-2) * (x0 - y))[None], x0, y) <= 1e-6


def test_standard_gradient_flow_at_alpha_zero():
    """(2.3), with gradients of C by autograd alone."""
    model, x, y = small()
    copied = copy.deepcopy(model)

    def field(s, theta):
        move(copied, theta - flat(copied))
        loss = (copied(x) - y).square().sum() / (2 * len(x))
        return -torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(copied.parameters()))])

    expected = runge_kutta(field, flat(model), [0.0, 1.0, 2.0], 60)
    found = adapted_flow(model, x, y, alpha=0.0, time="s", t_end=2.0, steps=2, **TIGHT)
    assert_close(found.parameters, expected, 1e-7, (expected[-1] - expected[0]).norm())


@pytest.mark.parametrize("time", ["t", "s"])
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_flows_are_those_of_the_dense_field(alpha, time):
    """Any α, in both times, against dense algebra and another integrator; in t the same curve has speed N/(1−t)."""
    model, x, y = small()
    field = dense_field(model, x, y, alpha)
    grid = [0.0, 0.3, 0.6] if time == "t" else [0.0, 1.0, 2.0]
    pace = (lambda t: len(x) / (1 - t)) if time == "t" else lambda s: 1.0
    expected = runge_kutta(lambda at, theta: pace(at) * field(theta), flat(model), grid, 12)
    found = adapted_flow(model, x, y, alpha=alpha, time=time, t_end=grid[-1], steps=2, **TIGHT)
    assert_close(found.parameters, expected, 1e-5, (expected[-1] - expected[0]).norm())


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("name", ["wide", "duplicated", "narrow", "dying", "cnn"])
def test_euler_in_time_t_is_the_schedule(name, alpha):
    """θ ← θ − 1/(T−k) D⁺(x − y) for α = 1, at any rank, the last a full Gauss–Newton step; V_α at the same speed for others."""
    model, x = NETWORKS[name]()
    y = model(x).detach() + 0.1 * random(*model(x).shape)
    steps = 3
    field, theta = dense_field(model, x, y, alpha), flat(model)
    expected = [theta]
    for k in range(steps):
        theta = theta + len(x) / (steps - k) * field(theta)
        expected.append(theta)
    found = adapted_flow(model, x, y, alpha=alpha, method="euler", steps=steps)
    moved = (expected[-1] - expected[0]).norm()
    for a, b in zip(found.parameters, expected, strict=True):
        assert_close(a, b, 1e-7, moved)
    assert found.evaluations == steps
    assert found.ranks[0] == Dense.of(model, x).rank
    dense, apart = Dense.of(model, x), (model(x) - y).detach().flatten()
    assert float(found.off_range[0]) == pytest.approx(float((apart - dense.p @ apart).norm() / apart.norm()), abs=1e-9)


LOSSES = {
    "cross-entropy": lambda labels: lambda out: F.cross_entropy(out, labels),
    "summed": lambda labels: lambda out: F.cross_entropy(out, labels, reduction="sum") / 4 + out.square().mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_in_time_s(name):
    """At full rank outputs follow the Euclidean flow ∂_s x = −∇ₓC (2.20), which does not depend on the network."""
    model, x, _ = problem()
    loss = LOSSES[name](torch.tensor([0, 1, 1, 0]))
    x0 = model(x).detach()
    field = torch.func.grad(loss)
    expected = runge_kutta(lambda s, out: -field(out), x0, [0.0, 1.0, 2.0], 40)
    found = adapted_flow(model, x, loss, time="s", t_end=2.0, steps=2, **TIGHT)
    assert_close(found.outputs, expected, 1e-6)
    assert found.losses.tolist() == pytest.approx([float(loss(out)) for out in expected], rel=1e-6)
    assert (found.losses.diff() < 0).all()


def test_targets_as_a_loss():
    model, x, y = small()
    ends = [
        adapted_flow(model, x, given, time="s", method="rk4", steps=4).parameters
        for given in (y, lambda out: (out - y).square().sum() / 6, y.float(), nn.Parameter(y))
    ]
    assert_close(ends[1], ends[0], 1e-12)
    assert_close(ends[2], ends[0], 1e-6)
    assert torch.equal(ends[3], ends[0])


def errors(method, counts, t_end):
    """Distance from the line at the end, for each number of steps."""
    torch.manual_seed(3)
    model, x, y = small()
    x0 = model(x).detach()
    found = [adapted_flow(model, x, y, method=method, t_end=t_end, steps=steps) for steps in counts]
    assert [len(f.t) for f in found] == [steps + 1 for steps in counts]
    return [farthest(f.outputs[-1:], line(x0, y, f.t[-1:]), x0, y) for f in found]


ORDERS = {  # method, steps, end -> order, tolerance: the next term of Euler's error is smaller by 1/T
    "euler": ((16, 32, 64), 0.8, 1.0, 0.15),
    "rk4": ((8, 16, 32), 0.8, 4.0, 0.5),
    "rk4, whose last step to t = 1 errs by its square": ((8, 16, 32), 1.0, 2.0, 0.3),
}


@pytest.mark.parametrize("case", ORDERS)
def test_orders(case):
    steps, t_end, order, tolerance = ORDERS[case]
    found = errors(case.split(",")[0], steps, t_end)
    assert [math.log2(a / b) for a, b in itertools.pairwise(found)] == pytest.approx([order] * 2, abs=tolerance)
    assert order < 4 or found[-1] < 1e-6


@pytest.mark.parametrize("method", ["dopri5", "rk4", "euler"])
def test_one_step(method):
    model, x, y = small()
    found = adapted_flow(model, x, y, method=method, steps=1, **LOOSE)
    assert (found.t.tolist(), len(found.parameters)) == ([0.0, 1.0], 2)
    assert found.s.tolist() == [0.0, math.inf]
    if method != "dopri5":  # t = 0 is one step before the end
        newton = flat(model) - Dense.of(model, x).inverse @ (model(x).detach() - y).flatten()
        assert_close(found.parameters[-1], newton, 1e-9)


def test_steps_finer_than_the_last_leg(monkeypatch):
    monkeypatch.setattr(flow, "_LAST", 0.4)
    model, x, y = small()
    found = adapted_flow(model, x, y, steps=8, **LOOSE)
    assert farthest(found.outputs[:-1], line(found.outputs[0], y, found.t[:-1]), found.outputs[0], y) <= 1e-4


def test_tolerances_are_used():
    model, x, y = small()
    x0 = model(x).detach()
    far, counts = [], []
    for rtol, atol in ((1e-3, 1e-4), (1e-8, 1e-4), (1e-8, 1e-10)):
        found = adapted_flow(model, x, y, t_end=0.9, steps=1, rtol=rtol, atol=atol)
        far.append(farthest(found.outputs, line(x0, y, found.t), x0, y))
        counts.append(found.evaluations)
    assert far == sorted(far, reverse=True)
    assert far[0] > 10 * far[-1]
    assert counts[0] < counts[1] < counts[2]


def test_float32_networks():
    model, x, y = small()
    model, x, y = model.float(), x.float(), y.float()
    x0 = model(x).detach()
    found = adapted_flow(model, x, y, steps=5, rtol=1e-5, atol=1e-7, load=True)
    assert farthest(found.outputs, line(x0.double(), y.double(), found.t), x0, y) <= 1e-4
    for recorded in (found.s, found.t, found.losses, found.outputs, found.off_range, found.parameters):
        assert recorded.dtype == torch.float64
    assert torch.equal(flat(model), found.parameters[-1].float().double())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_load_leaves_the_end_and_nothing_else():
    model, x, y = small()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)  # its references stay those of the model
    before = taken_down(model)
    kept = model[0].bias.clone()
    found = adapted_flow(model, x, y, method="euler", steps=4, load=True)
    assert torch.equal(flat(model), found.parameters[-1])
    assert found.parameters.shape == (5, len(flat(model)))
    assert torch.equal(model[0].bias, kept)
    assert_close(model(x).detach(), found.outputs[-1], 1e-14)
    assert taken_down(model)[1:] == before[1:]
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))


def test_a_start_at_the_targets_stays():
    model, x, _ = small()
    found = adapted_flow(model, x, model(x), steps=3)
    assert torch.equal(found.parameters, flat(model).expand(4, -1))
    assert found.losses.tolist() == [0.0] * 4
    assert found.off_range.tolist() == [0.0] * 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_other_grad_modes(mode):
    model, x, y = small()
    expected = adapted_flow(model, x, y, method="rk4", steps=2).parameters
    with mode():
        # Products are inference tensors here, like targets that a user computes in this mode.
        found = adapted_flow(model, x * 1.0, y * 1.0, method="rk4", steps=2).parameters
    assert torch.equal(found, expected)


def asserting(out):
    raise AssertionError("of the user's own")


ERRORS = {
    "time": ({"time": "tau"}, ValueError, "`time` should be one of 't', 's', but got 'tau'"),
    "alpha": ({"alpha": 1.1}, ValueError, "`alpha` should be at least 0 and at most 1, but got 1.1"),
    "past the end": ({"t_end": 1.5}, ValueError, "`t_end` should be at most 1 in the time t, but got 1.5"),
    "no time": ({"t_end": 0.0}, ValueError, "`t_end` should be at least 1e-300 and finite, but got 0.0"),
    "for ever": ({"time": "s", "t_end": math.inf}, ValueError, "`t_end` should be at least 1e-300 and finite, but got inf"),
    "steps": ({"steps": 0}, ValueError, "`steps` should be at least 1, but got 0"),
    "half steps": ({"steps": 2.5}, TypeError, "`steps` should be a whole number, but got 2.5"),
    "method": ({"method": "heun"}, ValueError, "`method` should be one of 'dopri5', 'rk4', 'euler', but got 'heun'"),
    "rtol": ({"rtol": 1.0}, ValueError, "`rtol` should be at least 0 and below 1, but got 1.0"),
    "atol": ({"atol": -1.0}, ValueError, "`atol` should be at least 0 and finite, but got -1.0"),
    "labels": ({"y_or_loss": torch.zeros(3).long()}, ValueError, r"outputs' shape \[3, 1\], but have \[3\]. For class labels"),
    "one target": ({"y_or_loss": torch.zeros(1, 1)}, ValueError, r"outputs' shape \[3, 1\], but have \[1, 1\]"),
    "nan": ({"y_or_loss": torch.full((3, 1), math.nan)}, ValueError, "Targets should be finite, but have NaN"),
    "a list": ({"y_or_loss": [[0.0]] * 3}, TypeError, "`y_or_loss` should be targets or a function .* but got list"),
    "loss in t": ({"y_or_loss": nn.CrossEntropyLoss()}, ValueError, '`time` should be "s" where a loss is given'),
    "vector": ({"y_or_loss": lambda out: out.sum(1), "time": "s"}, ValueError, r"loss should be a scalar, but has shape \[3\]"),
    "float": (
        {"y_or_loss": float, "time": "s", "x": torch.zeros(1, 3)},
        TypeError,
        "loss should be a scalar tensor, but got float",
    ),
    "constant": ({"y_or_loss": lambda out: torch.ones(()), "time": "s"}, ValueError, "differentiable function of the outputs"),
    "apart": (
        {"y_or_loss": lambda out: torch.ones((), requires_grad=True) * 2, "time": "s"},
        ValueError,
        "differentiable function of the outputs",
    ),
    "assertion": ({"y_or_loss": asserting, "time": "s"}, AssertionError, "^of the user's own$"),
}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")
@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    model, x, y = small()
    changes, error, message = ERRORS[case]
    before = taken_down(model)
    arguments = {"x": x, "y_or_loss": y, **changes}
    with pytest.raises(error, match=message):
        adapted_flow(model, arguments.pop("x").double(), arguments.pop("y_or_loss"), **arguments)
    assert taken_down(model) == before


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_divergence_is_named(method):
    model, x, _ = small()
    before = taken_down(model)
    # The loss has no lower bound, and its gradient grows without limit.
    with pytest.raises(RuntimeError, match="(flow|tangent kernel) is not finite"):
        adapted_flow(model, x, lambda out: -out.pow(4).sum(), time="s", t_end=1e6, method=method, steps=20)
    assert taken_down(model) == before


@pytest.mark.parametrize("missing", ["torchdiffeq", "tqdm"])
def test_without_torchdiffeq(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    model, x, y = small()
    x0 = model(x).detach()
    before = taken_down(model)
    for call in (
        lambda: adapted_flow(model, x, y),
        lambda: interpolation_deviation(model, x, y),
        lambda: follow_path(model, x, lambda s: x0 + s * (y - x0)),
    ):
        with pytest.raises(ImportError, match=r"Flows need torchdiffeq: pip install 'torch_adapted_gd\[flow\]'"):
            call()
    assert taken_down(model) == before
