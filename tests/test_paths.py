"""Outputs that follow prescribed paths (3.1)."""

import copy
import math

import pytest
import torch
from torch import nn

from torch_adapted_gd import DetourPath, LinearPath, follow_path
from torch_adapted_gd.theory.paths import motion

from .cases import flat, mlp, move
from .tangents import Dense, assert_close, duplicated, random, taken_down

TOLERANCES = {"rtol": 1e-7, "atol": 1e-9}


def problem():
    """K >= 4 QN."""
    model = mlp(sizes=(3, 6, 1)).double()
    return model, random(4, 3), random(4, 1)


def spiral(x0, y):
    """A path towards the targets that is neither linear nor polynomial."""
    side = torch.tensor([[1.0], [-1.0], [0.5], [0.0]], dtype=torch.float64)
    return lambda s: torch.exp(-s) * x0 + (1 - torch.exp(-s)) * y + (torch.cos(2 * s) - 1) * side


PATHS = {
    "linear": LinearPath,
    "detour": lambda x0, y: DetourPath(x0, y, torch.tensor([0.5])),
    "one's own": spiral,
    "polynomial": lambda x0, y: lambda s: x0 + (3 * s**2 - 2 * s**3) * (y - x0),
    "float32": lambda x0, y: lambda s: (x0 + s * (y - x0)).float(),
}


@pytest.mark.parametrize("name", PATHS)
def test_paths_are_followed(name):
    model, x, y = problem()
    x0, theta = model(x).detach(), flat(model)
    path = PATHS[name](x0, y)
    led = follow_path(model, x, path, steps=4, **TOLERANCES)
    assert led.s.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    wanted = torch.stack([path(s).detach().double() for s in led.s])
    assert_close(led.wanted, wanted, 1e-12)
    assert led.outputs.shape == (5, 4, 1)
    assert float(led.distance.max()) <= 1e-5
    assert led.distance.tolist() == pytest.approx((led.outputs - led.wanted).norm(dim=(1, 2)).tolist(), abs=1e-15)
    assert led.ranks.tolist() == [4] * 5
    assert float(led.off_range.max()) < 1e-7
    assert torch.equal(led.parameters[0], theta)
    assert torch.equal(flat(model), theta)
    move(model, led.parameters[-1] - theta)
    assert_close(model(x).detach(), led.outputs[-1], 1e-12)


def test_paths_that_come_with_the_package():
    x0, y, bend = (torch.tensor(v, dtype=torch.float64) for v in ([[1.0, 2.0]], [[3.0, 0.0]], [0.5, -1.0]))
    linear, detour = LinearPath(x0.requires_grad_(), y), DetourPath(x0, y, bend)
    for s in (0.0, 0.25, 1.0):
        at = torch.tensor(s, dtype=torch.float64)
        line = [[1 + 2 * s, 2 - 2 * s]]
        assert linear(at).tolist() == line
        off = math.sin(math.pi * s)
        assert detour(at)[0].tolist() == pytest.approx([line[0][0] + 0.5 * off, line[0][1] - off])
        assert linear(at).dtype == detour(at).dtype == torch.float64
    with torch.no_grad():
        x0 += 1  # the paths have copies
    y += 1
    bend += 1
    half = torch.tensor(0.5, dtype=torch.float64)
    assert detour(half).tolist() == [[2.5, 0.0]]
    assert linear(torch.tensor(0.5)).tolist() == [[2.0, 1.0]]


def test_motion_is_place_and_velocity():
    def path(s):
        return torch.stack([torch.sin(3 * s), s**2, torch.ones(())]).reshape(1, 3)

    for at in (0.0, 0.4, 2.0):
        place, velocity = motion(path, at, (1, 3))
        assert place.tolist() == pytest.approx([math.sin(3 * at), at**2, 1.0])
        assert velocity.tolist() == pytest.approx([3 * math.cos(3 * at), 2 * at, 0.0])
        assert place.dtype == velocity.dtype == torch.float64


def constant(x0, y):
    return lambda s: x0


def attached(x0, y):
    """Constant, with a graph that does not contain s."""
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    return lambda s: weight * x0


def still(x0, y):
    return lambda s: x0 + 0 * s


@pytest.mark.parametrize("path", [constant, attached, still])
def test_constant_paths_stay(path):
    """A constant path is an equilibrium (3.6)."""
    model, x, y = problem()
    led = follow_path(model, x, path(model(x).detach(), y), steps=3)
    assert torch.equal(led.parameters, flat(model).expand(4, -1))
    assert led.off_range.tolist() == [0.0] * 4
    assert float(led.distance.max()) == 0.0


def test_steps_are_those_of_the_dense_inverse():
    """Euler: θ ← θ + h D⁺[∂_s x + κ (x(s) − x)], also for rank D < QN; the part outside ran D is reported."""
    model, x = duplicated()
    x0 = model(x).detach()
    y = x0 + random(8, 2)
    led = follow_path(
        model, x, lambda s: x0 + torch.sin(2 * s) * (y - x0) + s**2, s_end=0.5, steps=5, method="euler", correction=2.0
    )
    assert led.s.tolist() == pytest.approx([k / 10 for k in range(6)])
    other = copy.deepcopy(model)
    for k, at in enumerate(led.s.tolist()):
        assert_close(flat(other), led.parameters[k], 1e-9)
        dense = Dense.of(other, x)
        place = (x0 + math.sin(2 * at) * (y - x0) + at**2).flatten()
        velocity = (2 * math.cos(2 * at) * (y - x0) + 2 * at).flatten()
        out = float((velocity - dense.p @ velocity).norm() / velocity.norm())
        assert out > 0.1
        assert float(led.off_range[k]) == pytest.approx(out, abs=1e-8)
        assert led.ranks[k] == dense.rank == 8
        move(other, 0.1 * dense.inverse @ (velocity + 2.0 * (place - other(x).detach().flatten())))


class Product(nn.Module):
    """f = abx: at a = b = 0 the outputs are those of a = 1, b = 0, and D = 0."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(float(value), dtype=torch.float64)) for value in (a, b))

    def forward(self, x):
        return self.a * self.b * x


STARTS = {  # (a, b) at which outputs are zero -> `off_range` of the lines to y = (1, 1) and (1, -1) from x = (1, 1), rank
    "saddle": ((0, 0), 1.0, 1.0, 0),
    "one factor": ((1, 0), 0.0, 1.0, 1),
    "the other": ((0, 1), 0.0, 1.0, 1),
}


@pytest.mark.parametrize("name", STARTS)
def test_feasibility_depends_on_the_start(name):
    """Remark 3.1: of parameters with the same outputs, some admit a path that others do not."""
    start, along, across, rank = STARTS[name]
    x = torch.ones(2, 1, dtype=torch.float64)
    for y, expected in ((x, along), (x * torch.tensor([[1.0], [-1.0]]), across)):
        led = follow_path(Product(*start), x, LinearPath(torch.zeros(2, 1), y), steps=2, **TOLERANCES)
        assert float(led.off_range[0]) == pytest.approx(expected, abs=1e-9)
        assert led.ranks[0] == rank
        if expected == 0.0:
            assert_close(led.outputs[-1], y, 1e-6)
        else:  # not followed
            assert torch.equal(led.outputs[-1], torch.zeros_like(y))
            assert led.distance.tolist() == pytest.approx([0.0, 0.5 * 2**0.5, 2**0.5])


def test_correction_reduces_drift():
    """Without it the error of Euler's steps stays in the outputs; with it the error decays."""
    model, x, y = problem()
    path = spiral(model(x).detach(), y)
    far = [
        float(follow_path(model, x, path, method="euler", steps=20, correction=correction).distance[-1])
        for correction in (0.0, 5.0, 20.0)
    ]
    assert far[0] > 2 * far[1] > 0
    assert far[1] > 2 * far[2]


def test_correction_changes_nothing_on_the_path():
    model, x, y = problem()
    path = LinearPath(model(x), y)
    ends = [follow_path(model, x, path, steps=1, correction=c, rtol=1e-6, atol=1e-8).parameters[-1] for c in (0.0, 3.0)]
    assert_close(ends[1], ends[0], 1e-4)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("rk4", 4)])
def test_orders(method, order):
    torch.manual_seed(3)  # well-conditioned; others need more steps to show the order
    model, x, y = problem()
    path = DetourPath(model(x), y, torch.full((1,), 0.3))
    few, more = (float(follow_path(model, x, path, method=method, steps=steps).distance[-1]) for steps in (8, 16))
    assert math.log2(few / more) == pytest.approx(order, abs=0.2)


def test_end_and_load():
    model, x, y = problem()
    before = taken_down(model)
    path = LinearPath(model(x), y)
    led = follow_path(model, x, path, s_end=0.5, steps=2, method="rk4", load=True)
    assert led.s.tolist() == [0.0, 0.25, 0.5]
    assert torch.equal(flat(model), led.parameters[-1])
    assert taken_down(model)[1:] == before[1:]
    rest = LinearPath(model(x), y)  # from there on
    assert_close(follow_path(model, x, rest, steps=1, rtol=1e-5).outputs[-1], y, 1e-3)


def test_paths_need_not_exist_past_their_end():
    """(1−s)^(3/2) has no velocity there: no method may evaluate it."""
    model, x, y = problem()
    x0 = model(x).detach()
    seen = []

    def path(s):
        seen.append(float(s.detach()))
        assert seen[-1] <= 1.0
        return y + (1 - s) ** 1.5 * (x0 - y)

    led = follow_path(model, x, path, steps=2, rtol=1e-4, atol=1e-6)
    assert_close(led.outputs[-1], y, 1e-3)
    assert max(seen) == 1.0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_other_grad_modes(mode):
    model, x, y = problem()
    expected = follow_path(model, x, DetourPath(model(x), y, torch.ones(1)), method="rk4", steps=2).parameters
    with mode():
        found = follow_path(model, x, DetourPath(model(x), y * 1.0, torch.ones(1)), method="rk4", steps=2).parameters
        assert_close(found, expected, 1e-14)
        with torch.inference_mode(False):
            plain = model(x).detach()
        follow_path(model, x, lambda s: plain + s * (y - plain), method="rk4", steps=1)


def test_float32_networks():
    model, x, y = problem()
    model, x, y = model.float(), x.float(), y.float()
    led = follow_path(model, x, LinearPath(model(x), y), steps=2, rtol=1e-5, atol=1e-7)
    assert float(led.distance.max()) < 1e-4
    assert led.outputs.dtype == led.wanted.dtype == led.parameters.dtype == torch.float64


ERRORS = {  # path -> from x₀ and y
    "no function": (lambda x0, y: y, TypeError, "`path` should be a function from s to outputs, but got Tensor"),
    "start": (
        lambda x0, y: LinearPath(x0 + torch.tensor([[3.0], [4.0], [0.0], [0.0]]), y),
        ValueError,
        r"should begin at the network's outputs, but is 5 from them at s = 0. Begin it at model\(x\)",
    ),
    "nan": (lambda x0, y: lambda s: x0 * math.nan, ValueError, "should begin at the network's outputs, but is nan"),
    "shape": (lambda x0, y: LinearPath(x0[:2], y[:2]), ValueError, r"should give outputs of shape \[4, 1\], but gave \[2, 1\]"),
    "flat": (lambda x0, y: lambda s: x0.flatten(), ValueError, r"should give outputs of shape \[4, 1\], but gave \[4\]"),
    "none": (lambda x0, y: lambda s: None, ValueError, r"should give outputs of shape \[4, 1\], but gave NoneType"),
    "float": (
        lambda x0, y: lambda s: x0 + s.item() * (y - x0),
        ValueError,
        r"`path` moves but has no derivative: compute it from the tensor s itself, not from float\(s\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_paths_that_do_not_fit(case):
    build, error, message = ERRORS[case]
    model, x, y = problem()
    path = build(model(x).detach(), y)
    before = taken_down(model)
    with pytest.raises(error, match=message):
        follow_path(model, x, path)
    assert taken_down(model) == before


OPTIONS = {
    "s_end": ({"s_end": 0.0}, ValueError, "`s_end` should be at least 1e-300 and finite, but got 0.0"),
    "correction": ({"correction": -1.0}, ValueError, "`correction` should be at least 0 and finite, but got -1.0"),
    "steps": ({"steps": 1.0}, TypeError, "`steps` should be a whole number, but got 1.0"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_are_checked(case):
    changes, error, message = OPTIONS[case]
    model, x, y = problem()
    with pytest.raises(error, match=message):
        follow_path(model, x, LinearPath(model(x), y), **changes)


def test_shapes_of_the_package_s_paths():
    with pytest.raises(ValueError, match=r"`start` and `target` should have one shape, but got \[2, 1\] and \[2\]"):
        LinearPath(torch.zeros(2, 1), torch.zeros(2))
    for bend in (torch.ones(3), torch.ones(5, 2, 1)):
        with pytest.raises(ValueError, match=r"`bend` should fit outputs of shape \[2, 1\], but has shape"):
            DetourPath(torch.zeros(2, 1), torch.zeros(2, 1), bend)
