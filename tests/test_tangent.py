"""The network as a map of its parameters, and its tangent, against dense algebra."""

import pytest
import torch
from torch import nn

from torch_adapted_gd import (
    adapted_flow,
    effective_kernel,
    follow_path,
    gradient_field,
    interpolation_deviation,
    is_equilibrium,
    line_losses,
)
from torch_adapted_gd.theory.local import OutputMap

from .cases import COUPLED, Features, TwoHeads, flat, make, mlp
from .tangents import NETWORKS, SHORT, Dense, assert_close, narrow, random, randomized, taken_down


@pytest.mark.parametrize("name", NETWORKS)
def test_tangent_is_that_of_the_dense_jacobian(name):
    model, x = NETWORKS[name]()
    dense = Dense.of(model, x)
    network = OutputMap(model, x)
    tangent = network.tangent()
    rows, columns = dense.d.shape
    u, many = random(rows), random(rows, 3)
    tolerance = 1e-13 * dense.condition**2
    size = float(dense.d.norm())
    assert (network.num_outputs, network.num_params) == (rows, columns)
    assert tangent.rank == dense.rank
    assert (name in SHORT) == (dense.rank < rows)
    assert_close(tangent.theta, dense.theta, 1e-13, size**2)
    assert_close(tangent.pull(u), dense.d.T @ u, 1e-13, size * u.norm())
    inverse = torch.linalg.pinv(dense.theta, rtol=1e-12, hermitian=True)
    for given in (u, many):
        assert_close(tangent.solve(given), inverse @ given, tolerance)
        assert_close(tangent.project(given), dense.p @ given, tolerance, u.norm())
    assert_close(tangent.lift(u), dense.inverse @ u, tolerance)
    assert_close(dense.d @ tangent.lift(u), tangent.project(u), tolerance, u.norm())  # DD⁺ = P
    assert tangent.off_range(u) == pytest.approx(float((u - dense.p @ u).norm() / u.norm()), abs=tolerance)
    assert tangent.off_range(torch.zeros_like(u)) == 0.0


def test_tangent_at_other_parameters():
    model, x = narrow()
    network = OutputMap(model, x)
    theta = flat(model) + 0.3 * random(network.num_params)
    with network.borrowed():
        tangent, outputs = network.tangent(theta), network.outputs(theta)
        moved = Dense.of(model, x)  # the model has them now
        assert torch.equal(network.values(), theta)
    assert_close(tangent.theta, moved.theta, 1e-13)
    assert torch.equal(tangent.outputs, outputs)


@pytest.mark.parametrize("name", ["batchnorm_train", "dropout", "spectral_norm", "transformer_dropout", "lstm"])
def test_outputs_are_those_of_the_tangent(name):
    """Both are of the same batch statistics, random numbers and buffers, however often they are asked for."""
    model, x = make(name)
    network = OutputMap(model, x)
    first = network.tangent().outputs
    for again in (network.outputs(), network.outputs(network.values()), network.tangent().outputs):
        assert_close(again, first, 1e-14)
    assert_close(first, model(x).detach().flatten(), 1e-14)  # and of the call that the user would make now


def test_rank_cut():
    model = nn.Linear(2, 1, bias=False).double()
    x = torch.diag(torch.tensor([1.0, 1e-3], dtype=torch.float64))
    ranks = [OutputMap(model, x, rtol).tangent().rank for rtol in (None, 0, 0.9e-3, 1.1e-3)]
    assert ranks == [2, 2, 2, 1]


def test_rank_cut_knows_the_parameters_precision():
    """A singular value below what float32 resolves of the largest is none of D's, though Θ in float64 would show it."""
    for dtype, small, rank in ((torch.float64, 1e-7, 2), (torch.float32, 1e-7, 1), (torch.float32, 2e-7, 2)):
        model = nn.Linear(2, 1, bias=False).to(dtype)
        assert OutputMap(model, torch.diag(torch.tensor([1.0, small], dtype=dtype))).tangent().rank == rank


def test_values_load_and_read():
    model = mlp(sizes=(2, 3, 1))
    model[0].bias.requires_grad_(False)
    network = OutputMap(model, random(2, 2).float())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert network.num_params == sum(p.numel() for p in trained.values())
    assert network.eps == torch.finfo(torch.float32).eps
    assert torch.equal(network.values(), flat(model))
    assert torch.equal(network.read("state", model.state_dict()), flat(model))
    kept = model[0].bias.clone()
    theta = random(network.num_params)
    network.load(theta)
    assert torch.equal(flat(model), theta.float().double())
    assert torch.equal(model[0].bias, kept)


STATES = {  # of `read`
    "none": (lambda state: {}, r"`start` should have the parameter 'weight' of shape \[1, 2\], but has none"),
    "shape": (
        lambda state: {**state, "bias": torch.zeros(2)},
        r"`start` should have the parameter 'bias' of shape \[1\], but has \[2\]",
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_states_that_do_not_fit(case):
    change, message = STATES[case]
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=message):
        OutputMap(model, torch.ones(1, 2)).read("start", change(model.state_dict()))


def test_states_of_wrapped_models():
    model = nn.Linear(2, 1)
    network = OutputMap(torch.compile(model, backend="eager"), torch.ones(1, 2))
    for source in (network.model, model):
        assert torch.equal(network.read("start", source.state_dict()), flat(model))


def frozen():
    return nn.Linear(4, 2).requires_grad_(False)


REFUSED = {
    "several outputs": (TwoHeads, (3, 4), ValueError, "should return one tensor here, but returns 2 that depend on parameters"),
    "outputs and features": (Features, (3, 4), ValueError, "should return one tensor here, but returns 2"),
    "frozen": (frozen, (3, 4), ValueError, "should have trainable parameters"),
    "no module": (lambda: torch.tanh, (3, 4), TypeError, r"should be a torch\.nn\.Module"),
    "no samples": (
        lambda: nn.Linear(4, 2),
        (0, 4),
        ValueError,
        r"`x` should have samples, but the outputs have shape \[0, 2\]",
    ),
    "no batch": (lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0), Sum()), (3, 4), ValueError, "batch as their first"),
}


class Sum(nn.Module):
    def forward(self, x):
        return x.sum()


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_are_no_output_map(case):
    build, shape, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        OutputMap(build(), torch.randn(shape))


@pytest.mark.parametrize("bad", [-1e-9, 1.0, float("nan")])
def test_rank_cut_is_checked(bad):
    model, x = narrow()
    y = model(x).detach() + 1
    for call in (
        lambda: gradient_field(model, x, y, rank_rtol=bad),
        lambda: is_equilibrium(model, x, y, rank_rtol=bad),
        lambda: adapted_flow(model, x, y, method="euler", rank_rtol=bad),
        lambda: effective_kernel(model, x, rank_rtol=bad),
    ):
        with pytest.raises(ValueError, match="`rank_rtol` should be at least 0 and below 1, but got"):
            call()
    with pytest.raises(TypeError, match="`rank_rtol` should be a number, but got '1e-3'"):
        OutputMap(model, x, "1e-3")


def line_from(model, x, y):
    x0 = OutputMap(model, x).outputs().reshape(y.shape)
    return lambda s: x0 + s * (y - x0)


MEASUREMENTS = {
    "flow": lambda model, x, y: adapted_flow(model, x, y, method="euler", steps=3),
    "homotopy": lambda model, x, y: adapted_flow(model, x, y, alpha=0.5, time="s", method="rk4", steps=2),
    "deviation": lambda model, x, y: interpolation_deviation(model, x, y, method="euler", steps=3),
    "path": lambda model, x, y: follow_path(model, x, line_from(model, x, y), method="euler", steps=3),
    "field": lambda model, x, y: gradient_field(model, x, y, 0.5),
    "equilibrium": lambda model, x, y: is_equilibrium(model, x, y),
    "kernel": lambda model, x, y: effective_kernel(model, x),
    "lines": lambda model, x, y: line_losses(model, x, y, model.state_dict(), copied(model), steps=3),
}


def copied(model):
    return {name: t + 0.1 for name, t in model.state_dict().items()}


@COUPLED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measurements_leave_everything_as_it_was(name, dtype):
    model, x = randomized()
    model, x = model.to(dtype), x.to(dtype)
    with torch.no_grad():
        model[0].bias[0] = -0.0
    model[4].weight.grad = torch.ones_like(model[4].weight)
    y = random(4, 2)
    given = x.clone(), y.clone()
    before = taken_down(model)
    MEASUREMENTS[name](model, x, y)
    assert taken_down(model) == before
    assert torch.equal(x, given[0])
    assert torch.equal(y, given[1])


class Failing:
    """Fails at its n-th call."""

    def __init__(self, function, calls):
        self.function, self.calls = function, calls

    def __call__(self, argument):
        self.calls -= 1
        if not self.calls:
            raise KeyError("failing")
        return self.function(argument)


FAILURES = {
    "flow": lambda model, x, y, n: adapted_flow(
        model, x, Failing(lambda out: (out - y).square().sum(), n), time="s", method="euler", steps=9
    ),
    "path": lambda model, x, y, n: follow_path(model, x, Failing(line_from(model, x, y), n), method="euler", steps=4),
    "lines": lambda model, x, y, n: line_losses(
        model, x, Failing(lambda out: out.sum(), n), model.state_dict(), copied(model), steps=9
    ),
}


@pytest.mark.parametrize("n", [1, 4, 9])
@pytest.mark.parametrize("name", FAILURES)
def test_failures_leave_everything_as_it_was(name, n):
    model, x = randomized()
    y = random(4, 2)
    before = taken_down(model)
    with pytest.raises(KeyError, match="failing"):
        FAILURES[name](model, x, y, n)
    assert taken_down(model) == before


def test_diverged_parameters_are_named():
    model, x = narrow()
    model[0].weight.data[0, 0] = float("nan")
    y = torch.zeros(12, 2)
    for call in (gradient_field, is_equilibrium, interpolation_deviation):
        with pytest.raises(RuntimeError, match="tangent kernel is not finite there: the parameters have diverged"):
            call(model, x, y)
