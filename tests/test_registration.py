"""Rules of users, and what is found out when one is wrong."""

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, AdaptedWarning, Dense, ntk, register_rule

from .cases import MSE, assert_at, dense_jacobian, flat, pinv_step
from .layers import Scale
from .test_structured import relative_error

MUL = torch.Tensor.mul  # what `self.scale * x` calls


def scaled():
    return nn.Sequential(nn.Linear(4, 5), Scale(5), nn.Tanh(), nn.Linear(5, 2)).double()


def by_rule(use):
    return {"scale": use.gradient * use.samples_first(use.argument("x")).unsqueeze(1)}


def register(rule, **options):
    return register_rule(MUL, names=("scale", "x"), **options)(rule)


@pytest.mark.usefixtures("table")
def test_a_registered_rule_serves():
    seen = []

    def rule(use):
        seen.append((use.function, use.argument("x").shape, use.gradient.shape, use.names))
        return by_rule(use)

    assert register(rule) is rule
    assert relative_error(scaled(), (torch.randn(3, 4).double(),)) <= 1e-12
    assert (MUL, (3, 5), (3, 2, 5), {"1.scale"}) in seen


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("sample_dims", ["any", 1])
def test_samples_are_found_in_any_dimension(sample_dims):
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = Scale(4)

        def forward(self, x):
            return self.scale(x.transpose(0, 1)).tanh().sum(0)

    register(lambda use: {"scale": by_rule(use)["scale"].sum(2)}, sample_dims=sample_dims)
    assert relative_error(Transposed().double(), (torch.randn(3, 3, 4).double(),)) <= 1e-12


@pytest.mark.usefixtures("table")
def test_a_rule_that_declines_leaves_a_use_to_the_way_of_any_function():
    def rule(use):
        raise NotImplementedError("not this one")

    register(rule)
    assert relative_error(scaled(), (torch.randn(3, 4).double(),)) <= 1e-12


def wrong(use):
    return {"scale": 1.01 * by_rule(use)["scale"]}


def wrong_for_several_outputs(use):
    """Right for Q = 1, with which the uses' sum is checked."""
    product = by_rule(use)["scale"]
    return {"scale": product.flip(1) * 1.1 if product.shape[1] > 1 else product}


@pytest.mark.usefixtures("table")
def test_a_wrong_rule_is_told_apart_in_parameter_space():
    register(wrong)
    model, x, y = scaled(), torch.randn(40, 4).double(), torch.randn(40, 2).double()
    expected = pinv_step(model, x, y, 0.3 * 40)
    optimizer = AdaptedGD(model, lr=0.3, criterion=MSE, damping=0.0)
    MSE(model(x), y).backward()
    with pytest.warns(
        UserWarning,
        match=r"parameter '1.scale' has a use that AdaptedGD cannot see, or a wrong rule",
    ):
        optimizer.step()
    assert_at(model, expected, 1e-6)  # κ² ε, in parameter space
    assert optimizer.last_step.space == "parameter"
    assert optimizer.last_step.kernel == "structured, and 1 of 5 parameters by jacobian (rows)"


@pytest.mark.usefixtures("table")
def test_a_wrong_rule_is_found_out_and_never_stepped_on():
    register(wrong)
    message = r"wrong rule \(mul of '1.scale'\): the Jacobian .* differs from a backward pass by 0.01 of its size"
    model, x, y = scaled(), torch.randn(3, 4).double(), torch.randn(3, 2).double()
    d = dense_jacobian(model, x)
    with pytest.warns(AdaptedWarning, match=message) as caught:
        theta = ntk(model, x)
    assert caught[0].filename == __file__
    torch.testing.assert_close(theta.reshape(6, 6), d @ d.T)
    with pytest.raises(RuntimeError, match=message):
        ntk(model, x, method="structured")

    expected, before = pinv_step(model, x, y, 0.5), flat(model)
    optimizer = AdaptedGD(model, lr=0.5, solver=Dense(kernel="structured"))
    MSE(model(x), y).backward()
    with pytest.raises(RuntimeError, match=f'The structured kernel is not right for this model: .*{message}.*Use "auto"'):
        optimizer.step()
    assert torch.equal(flat(model), before)
    optimizer = AdaptedGD(model, lr=0.5)
    for step in range(2):
        optimizer.zero_grad()
        MSE(model(x), y).backward()
        if step:
            optimizer.step()  # without a second warning, which would be an error
        else:
            with pytest.warns(AdaptedWarning, match=message) as caught:
                optimizer.step()
            assert caught[0].filename == __file__
            assert_at(model, expected)


def failing(use):
    raise IndexError("off by one")


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (failing, IndexError, "off by one"),
        (wrong_for_several_outputs, RuntimeError, "(uᵀΘv|Dᵀu) differs by .* for random u"),
    ],
)
def test_a_rule_with_a_fault_is_an_error_and_not_a_slow_success(rule, error, message):
    register(rule)
    model, x, y = scaled(), torch.randn(3, 4).double(), torch.randn(3, 2).double()
    with pytest.raises(error, match=message):
        ntk(model, x)
    optimizer, before = AdaptedGD(model, lr=0.5), flat(model)

    def step():
        MSE(model(x), y).backward()
        optimizer.step()

    with pytest.raises(error, match=message):
        step()
    assert torch.equal(flat(model), before)


@pytest.mark.usefixtures("table")
def test_a_parameter_that_a_rule_leaves_out_takes_rows():
    register(lambda use: {})
    model, x = scaled(), torch.randn(3, 4).double()
    d = dense_jacobian(model, x)
    with pytest.warns(UserWarning, match="'1.scale'"):
        theta = ntk(model, x)
    torch.testing.assert_close(theta.reshape(6, 6), d @ d.T)


def test_registration_refuses_what_is_no_function_or_dimension():
    with pytest.raises(
        TypeError, match="`functions` should be functions that a forward pass calls, but got .*not to module types"
    ):
        register_rule(nn.Linear, names=("input",))
    with pytest.raises(TypeError, match="`functions` should be functions that a forward pass calls, but got 3"):
        register_rule(3, names=("input",))
    for bad in ("last", -1, True, 1.5):
        with pytest.raises(ValueError, match="`sample_dims` should be 'first', 'any' or a whole number of at least 0, but got"):
            register_rule(MUL, names=("scale", "x"), sample_dims=bad)
