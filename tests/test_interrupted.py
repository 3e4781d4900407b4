"""Forward and backward passes that raise, and are interrupted: nothing of them is left."""

import contextlib

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD

from .cases import MSE, assert_at, pinv_step, problem


def raise_(error):
    raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_pass_that_raised_is_forgotten(error):
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5)
    handle = model[2].register_forward_pre_hook(lambda module, args: raise_(error))
    with pytest.raises(error):
        model(x)
    assert error is KeyboardInterrupt or not optimizer._recorder._passes.under_way
    handle.remove()
    expected = pinv_step(model, x, y, 0.5)
    MSE(model(x), y).backward()
    assert not optimizer._recorder._passes.under_way
    optimizer.step()
    assert_at(model, expected)


class Interrupted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.now = nn.Linear(4, 3), True

    def forward(self, x):
        h = self.layer(x)
        if self.now:
            raise KeyboardInterrupt
        return h


def test_an_interrupted_forward_pass_leaves_nothing_at_work():
    depth = torch._C._len_torch_function_stack()
    model, x = Interrupted().double(), torch.randn(5, 4).double()
    optimizer = AdaptedGD(model, lr=0.5)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    (running,) = optimizer._recorder._passes.under_way
    for _ in range(300):  # operations of the user's own, elsewhere
        model.layer.weight + 1
    assert running.tapes[-1].finished
    model.now = False
    MSE(model(x), torch.zeros(5, 3).double()).backward()
    optimizer.step()
    assert torch._C._len_torch_function_stack() == depth
    model.now = True
    with pytest.raises(KeyboardInterrupt):
        model(x)
    del optimizer
    assert torch._C._len_torch_function_stack() == depth


def test_a_forward_pass_that_raised_is_not_taken_for_an_output():
    model, x, _ = problem()
    optimizer = AdaptedGD(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(x[:, :3])
    with pytest.raises(RuntimeError, match="call loss.backward"):
        optimizer.step()


def test_a_backward_pass_that_raised_leaves_nothing():
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise MemoryError("no luck")

    model, x, y = problem()
    breaking = nn.Sequential(model)
    breaking.register_forward_hook(lambda module, args, output: output if good else Breaks.apply(output))
    optimizer = AdaptedGD(breaking, lr=0.5)
    good = False
    with pytest.raises(MemoryError, match="no luck"):
        MSE(breaking(x), y).backward()
    good = True
    expected = pinv_step(model, x, y, 0.5)
    MSE(breaking(x), y).backward()
    optimizer.step()
    assert optimizer.last_step.num_calls == 1
    assert_at(model, expected)


class WithScale(nn.Module):
    """A model with a parameter that the loss uses beside the outputs."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("begins_at_a_parameter", [False, True])
def test_a_backward_pass_that_raised_before_it_reached_a_parameter_leaves_nothing(begins_at_a_parameter):
    """Neither to one that reaches the outputs first, nor to one that reaches a parameter first."""
    model, x, y = problem()
    watched = WithScale(model)
    optimizer = AdaptedGD(watched, lr=0.5)
    outputs = watched(x)
    outputs.register_hook(lambda gradient: raise_(MemoryError))
    with pytest.raises(MemoryError):
        MSE(outputs, y).backward()
    expected = pinv_step(model, x, y, 0.5)
    loss = MSE(watched(x), y)
    if begins_at_a_parameter:
        loss = loss + watched.scale.square()
    loss.backward()
    beside = pytest.warns(UserWarning, match="did not come through") if begins_at_a_parameter else contextlib.nullcontext()
    with beside:
        optimizer.step()
    assert optimizer.last_step.num_calls == 1
    assert_at(model, expected)
    assert watched.scale.item() == (0 if begins_at_a_parameter else 1)
