"""The family of gradient fields of Theorem 2.3, their metric and their equilibria, against dense algebra."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_adapted_gd import gradient_field, is_equilibrium, metric_tensor

from .cases import Tied, flat, move
from .tangents import NETWORKS, SHORT, Dense, assert_close, dead, duplicated, dying, narrow, random

ALPHAS = (0.0, 0.25, 0.5, 0.9, 1.0)


def targets(y):
    return y, lambda out: (out - y).square().sum() / (2 * len(y))


def quartic(y):
    def loss(out):
        return (out - y).pow(4).sum() + (out * y).sum()

    return loss, loss


def gradient(loss, outputs):
    return torch.func.grad(loss)(outputs.detach()).flatten()


@pytest.mark.parametrize("make", [targets, quartic])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "randomized"])
def test_fields_are_the_dense_ones(name, make):
    model, x = NETWORKS[name]()
    given, loss = make(random(*model(x).shape))
    for _ in range(2):
        dense, outputs = Dense.of(model, x), model(x).detach()
        g = gradient(loss, outputs)
        for alpha in ALPHAS:
            found = gradient_field(model, x, given, alpha)
            expected = dense.field(g, alpha)
            tolerance = 1e-13 * dense.condition**2
            assert_close(found.parameters, expected, tolerance)  # (2.31)
            assert found.outputs.shape == outputs.shape
            motion = found.outputs.flatten()
            assert_close(motion, dense.d @ found.parameters, 1e-10)  # (2.39)
            shaped = alpha * torch.eye(len(g), dtype=torch.float64) + (1 - alpha) * dense.theta
            assert_close(motion, -shaped @ dense.p @ g, 1e-10)  # (2.41)
            assert found.slope == pytest.approx(float(expected @ dense.d.T @ g), rel=1e-9)
            assert found.slope < 0 or name == "dead"
            assert found.rank == dense.rank
            out = float((g - dense.p @ g).norm() / g.norm())
            assert found.off_range == pytest.approx(out, abs=1e-9)
            assert found.parameters.dtype == found.outputs.dtype == torch.float64
        move(model, 0.3 * random(len(flat(model))))  # another θ nearby
        if name in ("dying", "dead"):
            break  # there ReLUs may switch


def test_ends_of_the_family():
    """α = 0 is −∇_θC (2.33), which autograd gives; α = 1 is −(DᵀD)⁺∇_θC (2.34)."""
    model, x = narrow()
    y = random(12, 2)
    ((model(x) - y).square().sum() / 24).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    d = Dense.of(model, x).d
    assert_close(gradient_field(model, x, y, 0.0).parameters, -gradient, 1e-12)
    expected = -torch.linalg.pinv(d.T @ d, rtol=1e-12, hermitian=True) @ gradient
    assert_close(gradient_field(model, x, y).parameters, expected, 1e-8)  # (DᵀD)⁺ squares κ² again
    assert torch.equal(torch.cat([p.grad.flatten() for p in model.parameters()]), gradient)


def test_slope_is_the_change_of_the_loss():
    model, x = NETWORKS["wide"]()
    y = random(5, 3)
    for alpha in ALPHAS:
        field = gradient_field(model, x, y, alpha)
        values, h = [], 1e-4 / float(field.parameters.norm())
        for sign in (1, -1):
            move(model, sign * h * field.parameters)
            values.append(float((model(x) - y).detach().square().sum()) / 10)
            move(model, -sign * h * field.parameters)
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(field.slope, rel=1e-5)


# Points at which ∇_θC = 0: model, inputs, targets or a loss, and whether ∇ₓC = 0 too.


def zero_loss():
    model, x = NETWORKS["wide"]()
    return model, x, model(x).detach(), True


def out_of_reach(build):
    """Targets whose difference from the outputs is orthogonal to ran D."""
    model, x = build()
    dense, outputs = Dense.of(model, x), model(x).detach()
    u = random(outputs.numel())
    return model, x, outputs + (u - dense.p @ u).reshape(outputs.shape), False


def least_squares():
    """A linear model with fewer parameters than outputs, fitted."""
    model, x, y = nn.Linear(3, 2).double(), random(9, 3), random(9, 2)
    with torch.no_grad():
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones(9, 1)], 1).double(), y).solution
        model.weight.copy_(solution[:3].T)
        model.bias.copy_(solution[3])
    return model, x, y, False


def undecided():
    """Each input has both labels, so equal probabilities minimize the cross-entropy."""
    model, x = nn.Linear(3, 2).double(), random(4, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    return model, torch.cat([x, x]), lambda out: F.cross_entropy(out, torch.tensor([0] * 4 + [1] * 4)), False


def no_tangent():
    model, x = dead()
    return model, x, random(4, 2), False


STATIONARY = {
    "zero loss": zero_loss,
    "duplicated": lambda: out_of_reach(duplicated),
    "narrow": lambda: out_of_reach(narrow),
    "dying": lambda: out_of_reach(dying),
    "tied": lambda: out_of_reach(lambda: (Tied().double(), random(5, 5))),
    "least squares": least_squares,
    "undecided": undecided,
    "no tangent": no_tangent,
}


@pytest.mark.parametrize("name", STATIONARY)
def test_equilibria_are_those_of_all_fields(name):
    """(2.36), (2.44): an equilibrium of one α is one of all α, whether or not ∇ₓC = 0."""
    model, x, given, at_rest = STATIONARY[name]()
    loss = given if callable(given) else targets(given)[1]
    dense = Dense.of(model, x)
    g = gradient(loss, model(x))
    assert at_rest == (float(g.norm()) < 1e-12)
    size = max(1.0, float(dense.inverse.norm()), float(dense.d.norm()) ** 2) * float(g.norm())
    for alpha in ALPHAS:
        field = gradient_field(model, x, given, alpha)
        assert float(field.parameters.norm()) <= 1e-9 * size
        assert float(field.outputs.norm()) <= 1e-9 * size
        assert field.slope <= 0.0 or abs(field.slope) <= 1e-16 * size**2
    found = is_equilibrium(model, x, given)
    assert bool(found) is True
    assert max(found.gradient, found.adapted, found.reach) <= 1e-9 * size
    assert found.off_range == pytest.approx(float(g.norm()), rel=1e-9)


@pytest.mark.parametrize("name", [name for name in STATIONARY if name != "no tangent"])
def test_elsewhere_is_no_equilibrium(name):
    model, x, given, _ = STATIONARY[name]()
    loss = given if callable(given) else targets(given)[1]
    move(model, 0.01 * random(len(flat(model))))
    dense = Dense.of(model, x)
    g = gradient(loss, model(x))
    found = is_equilibrium(model, x, given)
    assert bool(found) is False
    assert found.gradient == pytest.approx(float((dense.d.T @ g).norm()), rel=1e-9)
    assert found.adapted == pytest.approx(float((dense.inverse @ g).norm()), rel=1e-6)
    assert found.reach == pytest.approx(float((dense.p @ g).norm()), rel=1e-6)
    assert found.reach**2 + found.off_range**2 == pytest.approx(float(g.square().sum()), rel=1e-9)
    largest = float(torch.linalg.matrix_norm(dense.d, 2))
    assert found.bound == pytest.approx(torch.finfo(torch.float64).eps ** 0.5 * largest * float(g.norm()), rel=1e-9)
    for alpha in ALPHAS:
        field = gradient_field(model, x, given, alpha)
        assert field.slope < 0
        assert float(field.parameters.norm()) > found.bound
    share = found.gradient / (largest * float(g.norm()))
    assert not is_equilibrium(model, x, given, tolerance=0.9 * share)
    assert is_equilibrium(model, x, given, tolerance=1.1 * share)


def test_float32_equilibria():
    """A gradient as small as float32's rounding counts as zero, in units of |D||g|."""
    model, x, y, _ = out_of_reach(narrow)
    model, x, y = model.float(), x.float(), y.float()
    assert is_equilibrium(model, x, y)
    assert is_equilibrium(model, x, (model(x) + 1e3 * (y - model(x))).detach())
    move(model, 0.1 * random(len(flat(model))))
    assert not is_equilibrium(model, x, y)


@pytest.mark.parametrize("name", ["wide", "duplicated", "narrow", "cnn"])
def test_metric_is_the_inverse_on_the_range(name):
    """(2.45)-(2.46): with that metric V_α is the gradient, h(V, w) = −∇ₓC·w for all w in ran Θ."""
    model, x = NETWORKS[name]()
    dense, y = Dense.of(model, x), random(*model(x).shape)
    g, n = gradient(targets(y)[1], model(x)), y.numel()
    eye, q = torch.eye(n, dtype=torch.float64), n // len(y)
    w = dense.p @ random(n)
    for alpha in ALPHAS:
        metric = metric_tensor(dense.theta, alpha)
        shaped = dense.p @ (alpha * eye + (1 - alpha) * dense.theta) @ dense.p
        expected = torch.linalg.pinv(shaped, rtol=1e-12 if alpha < 0.1 else 1e-9, hermitian=True)
        assert_close(metric, expected, 1e-13 * dense.condition**2)
        assert torch.equal(metric, metric.T)
        assert metric.dtype == torch.float64
        spectrum = torch.linalg.eigvalsh(metric)
        assert int((spectrum > 1e-12 * spectrum[-1]).sum()) == dense.rank
        assert_close(metric @ (eye - dense.p), torch.zeros_like(eye), 1e-9, metric.norm())
        motion = gradient_field(model, x, y, alpha).outputs.flatten()
        assert float(motion @ metric @ w) == pytest.approx(-float(g @ w), rel=1e-8)
        assert_close(metric_tensor(dense.theta.reshape(len(y), q, len(y), q), alpha), metric, 1e-14)
    assert (name in SHORT) == (dense.rank < n)


def test_metric_by_hand():
    theta = torch.diag(torch.tensor([4.0, 1.0, 0.0]))  # float32 is cast
    for alpha, options, expected in (
        (0.0, {}, [1 / 4, 1, 0]),
        (0.25, {}, [1 / 3.25, 1, 0]),
        (1.0, {}, [1, 1, 0]),
        (0.0, {"rank_rtol": 0.6}, [1 / 4, 0, 0]),  # singular values 2 and 1
    ):
        assert_close(metric_tensor(theta, alpha, **options), torch.diag(torch.tensor(expected, dtype=torch.float64)), 1e-14)
    v = random(4)
    line = torch.outer(v, v) / v.square().sum()  # zero on the complement even if α is tiny
    assert_close(metric_tensor(line, 1e-13), line, 1e-9)
    assert not metric_tensor(torch.zeros(2, 2), 0.5).any()


METRICS = {
    "wide": (torch.ones(2, 8), {}, r"`theta` should be square, \[n, n\] or \[N, Q, N, Q\], but has shape \[2, 8\]"),
    "vector": (torch.ones(4), {}, r"`theta` should be square, .* but has shape \[4\]"),
    "blocks": (torch.ones(2, 3, 3, 2), {}, r"`theta` should be square, .* but has shape \[2, 3, 3, 2\]"),
    "three": (torch.ones(1, 1, 1), {}, r"`theta` should be square, .* but has shape \[1, 1, 1\]"),
    "nan": (torch.full((2, 2), float("nan")), {}, "`theta` should be finite"),
    "alpha": (torch.eye(2), {"alpha": -0.1}, "`alpha` should be at least 0 and at most 1, but got -0.1"),
    "cut": (torch.eye(2), {"rank_rtol": 1.5}, "`rank_rtol` should be at least 0 and below 1, but got 1.5"),
}


@pytest.mark.parametrize("case", METRICS)
def test_kernels_without_a_metric(case):
    theta, changes, message = METRICS[case]
    with pytest.raises(ValueError, match=message):
        metric_tensor(theta, **{"alpha": 0.0, **changes})


FIELDS = {
    "alpha": ({"alpha": 2.0}, ValueError, "`alpha` should be at least 0 and at most 1, but got 2.0"),
    "a word": ({"alpha": "1"}, TypeError, "`alpha` should be a number, but got '1'"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_arguments_of_fields(case):
    changes, error, message = FIELDS[case]
    model, x = narrow()
    arguments = {"y_or_loss": torch.zeros(12, 2), **changes}
    with pytest.raises(error, match=message):
        gradient_field(model, x, **arguments)


def test_arguments_of_equilibria():
    model, x = narrow()
    for bad in (-1.0, 1.0):
        with pytest.raises(ValueError, match="`tolerance` should be at least 0 and below 1, but got"):
            is_equilibrium(model, x, torch.zeros(12, 2), tolerance=bad)
    with pytest.raises(TypeError, match="`y_or_loss` should be targets or a function"):
        is_equilibrium(model, x, None)
