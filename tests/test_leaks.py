import gc
import weakref

import torch
from torch import nn

from torch_adapted_gd import AdaptedGD

from .cases import COUPLED, mlp


def live_tensors():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_calls_that_never_reach_a_step_leave_nothing():
    model = mlp()
    optimizer = AdaptedGD(model)
    x = torch.randn(5, 4)

    def passes(count):
        for i in range(count):
            output = model(x)
            if i % 4 == 1:
                output.sum()  # a loss without backward
            if i % 4 == 2:
                inputs = x.clone().requires_grad_()
                torch.autograd.grad(model(inputs).sum(), inputs)  # a gradient that is not the parameters'
            if i % 4 == 3:
                with torch.no_grad():
                    model(x)

    passes(20)
    before = live_tensors()
    passes(1000)
    assert live_tensors() <= before
    assert not optimizer._recorder.calls
    assert not optimizer._recorder._pending


@COUPLED
def test_steps_leave_nothing():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    optimizer = AdaptedGD(model, lr=1e-3)

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()

    steps(3)
    before = live_tensors()
    steps(20)
    assert live_tensors() <= before


def test_dropped_backward_passes_leave_nothing():
    model = mlp()
    optimizer = AdaptedGD(model)

    def rounds(count):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(3, 4)).square().sum().backward()

    rounds(3)
    before = live_tensors()
    rounds(200)
    assert live_tensors() <= before


def test_derivatives_that_no_criterion_is_given_are_forgotten():
    model = mlp()
    optimizer = AdaptedGD(model, criterion=nn.MSELoss())

    def residuals(count):  # an evaluation, which no step follows
        for _ in range(count):
            x = torch.randn(3, 4, requires_grad=True)
            torch.autograd.grad(model(x).sum(), x, create_graph=True)

    residuals(300)
    before = live_tensors()
    residuals(100)
    assert live_tensors() <= before
    assert optimizer.last_step is None


def test_a_running_total_of_losses_keeps_no_inputs():
    model = mlp()
    optimizer = AdaptedGD(model, lr=1e-3)
    total = torch.zeros(())
    references = []
    for _ in range(5):
        x = torch.randn(3, 4)
        loss = model(x).square().sum()
        total = total + loss  # undetached, as people do
        optimizer.zero_grad()
        loss.backward()
        references += [weakref.ref(t) for call in optimizer._recorder.calls for t in call.inputs.as_given]
        optimizer.step()
    gc.collect()
    assert len(references) == 5
    assert not any(reference() is not None for reference in references)
    assert total.requires_grad
