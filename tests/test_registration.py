"""Rules of users, and what is found out when one is wrong."""

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, ntk, register_rule

from .cases import MSE, assert_at, dense_jacobian, flat, pinv_step
from .layers import Scale
from .test_structured import relative_error


def scaled():
    return nn.Sequential(nn.Linear(4, 5), Scale(5), nn.Tanh(), nn.Linear(5, 2)).double()


def by_rule(call):
    return {"scale": call.gradient * call.input.unsqueeze(1)}


@pytest.mark.usefixtures("table")
def test_a_registered_rule_serves():
    seen = []

    @register_rule(Scale)
    def rule(call):
        seen.append((type(call.module), call.input.shape, call.gradient.shape, call.parameters))
        return by_rule(call)

    assert relative_error(scaled(), (torch.randn(3, 4).double(),)) <= 1e-12
    assert (Scale, (3, 5), (3, 2, 5), {"scale": "1.scale"}) in seen

    class Special(Scale):  # inherits forward, so the rule
        pass

    class Changed(Scale):
        def forward(self, x):
            return self.scale * x**2

    del seen[:]
    for cls, served in ((Special, True), (Changed, False)):
        assert relative_error(nn.Sequential(nn.Linear(4, 5), cls(5)).double(), (torch.randn(3, 4).double(),)) <= 1e-12
        assert bool(seen) is served
        del seen[:]


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("sample_dims", ["any", 1])
def test_samples_are_found_in_any_dimension(sample_dims):
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = Scale(4)

        def forward(self, x):
            return self.scale(x.transpose(0, 1)).tanh().sum(0)

    @register_rule(Scale, sample_dims=sample_dims)
    def rule(call):
        return {"scale": (call.gradient * call.input.unsqueeze(1)).sum(2)}

    assert relative_error(Transposed().double(), (torch.randn(3, 3, 4).double(),)) <= 1e-12


def wrong(call):
    return {"scale": 1.01 * call.gradient * call.input.unsqueeze(1)}


def wrong_for_several_outputs(call):
    """Right for Q = 1, with which rules are checked one by one."""
    product = call.gradient * call.input.unsqueeze(1)
    return {"scale": product.flip(1) * 1.1 if product.shape[1] > 1 else product}


def failing(call):
    raise IndexError("off by one")


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("rule", [wrong, failing])
def test_a_wrong_rule_is_told_apart_in_parameter_space(rule):
    """Where all rows of D are checked together at first: the other parameters keep their rules."""
    register_rule(Scale)(rule)
    model, x, y = scaled(), torch.randn(40, 4).double(), torch.randn(40, 2).double()
    expected = pinv_step(model, x, y, 0.3 * 40)
    optimizer = AdaptedGD(model, lr=0.3, criterion=MSE, damping=0.0)
    MSE(model(x), y).backward()
    with pytest.warns(UserWarning, match=r"'1' \(Scale\): its rule"):
        optimizer.step()
    assert_at(model, expected, 1e-6)  # κ² ε, in parameter space
    assert optimizer.last_step.space == "parameter"
    assert optimizer.last_step.kernel == "structured, and 1 of 5 parameters by jacobian (per_sample)"


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (wrong, r"'1' \(Scale\): its rule differs from a backward pass by 0.01 of its size"),
        (wrong_for_several_outputs, "uᵀΘv is .* for random u and v where backward passes give"),
        (failing, r"'1' \(Scale\): its rule failed with IndexError: off by one"),
    ],
)
def test_a_wrong_rule_is_found_out_and_never_stepped_on(rule, message):
    register_rule(Scale)(rule)
    model, x, y = scaled(), torch.randn(3, 4).double(), torch.randn(3, 2).double()
    d = dense_jacobian(model, x)
    with pytest.warns(UserWarning, match=message) as caught:
        theta = ntk(model, x)
    assert caught[0].filename == __file__
    torch.testing.assert_close(theta.reshape(6, 6), d @ d.T)
    with pytest.raises(RuntimeError, match=message):
        ntk(model, x, method="structured")

    expected, before = pinv_step(model, x, y, 0.5), flat(model)
    optimizer = AdaptedGD(model, lr=0.5, kernel="structured")
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
            with pytest.warns(UserWarning, match=message) as caught:
                optimizer.step()
            assert caught[0].filename == __file__
            assert_at(model, expected)


@pytest.mark.usefixtures("table")
def test_a_parameter_that_a_rule_leaves_out_is_served_by_its_jacobian():
    register_rule(Scale)(lambda call: {})
    model, x = scaled(), torch.randn(3, 4).double()
    d = dense_jacobian(model, x)
    torch.testing.assert_close(ntk(model, x).reshape(6, 6), d @ d.T)


def test_registration_refuses_what_is_no_module_type_or_dimension():
    with pytest.raises(TypeError, match="`module_types` should be subclasses of torch.nn.Module, but got <class 'int'>"):
        register_rule(int)
    for bad in ("last", -1, True, 1.5):
        with pytest.raises(ValueError, match="`sample_dims` should be 'first', 'any' or a whole number of at least 0, but got"):
            register_rule(Scale, sample_dims=bad)
