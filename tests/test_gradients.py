"""Which part of the loss's gradient the step takes, and which kinds of gradient it bears."""

import copy
import warnings

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, Dense, HalfSquaredLoss

from .cases import MSE, assert_at, flat, mlp, pinv_step, problem


def test_a_penalty_takes_a_plain_gradient_step():
    model, x, y = problem()
    start = flat(model)
    expected = pinv_step(model, x, y, 0.5 / (2 / 18)) - 0.5 * 0.02 * start
    optimizer = AdaptedGD(model, lr=0.5, criterion=MSE, damping=0.0)
    loss = MSE(model(x), y) + 0.01 * sum(p.square().sum() for p in model.parameters())
    loss.backward()
    with pytest.warns(UserWarning, match=r"of the loss's gradient did not come through (.|\n)* use `weight_decay`") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    assert_at(model, expected)
    assert 0 < optimizer.last_step.off_output_fraction < 1
    optimizer.zero_grad()
    (MSE(model(x), y) + model[0].weight.square().sum()).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # said once


def test_clipping_the_gradients_changes_nothing_and_is_warned_of():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.warns(UserWarning, match="`.grad` of '0.weight' is not what backward delivered.* lower `lr`") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    assert_at(model, expected)
    assert optimizer.last_step.off_output_fraction == 0
    MSE(model(x), y).backward()  # .grad holds the last step's as well, which is not worth a second word
    optimizer.step()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kernel", ["structured", "jacobian"])
def test_hooks_that_clip_gradients_of_parameters_change_nothing_and_are_warned_of(kernel, before):
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    seen = []

    def clip(gradient):
        seen.append(gradient)
        return gradient.clamp(-1e-3, 1e-3)

    if before:
        model[0].weight.register_hook(clip)
    optimizer = AdaptedGD(model, lr=0.5, solver=Dense(kernel=kernel))
    if not before:
        model[0].weight.register_hook(clip)
    MSE(model(x), y).backward()
    assert model[0].weight.grad.abs().max() <= 1e-3
    with pytest.warns(UserWarning, match="`.grad` of '0.weight' is not what backward delivered"):
        optimizer.step()
    assert_at(model, expected)
    assert len(seen) == 1  # it sees the passes of the user alone


def test_sparse_gradients():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 2)

        def forward(self, tokens):
            return self.head(self.embedding(tokens).mean(1))

    model, tokens, y = Bag().double(), torch.randint(7, (4, 3)), torch.randn(4, 2).double()
    dense = copy.deepcopy(model)
    dense.embedding.sparse = False
    expected = pinv_step(dense, tokens, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    for _ in range(2):  # the same rows twice, to add sparse gradients up: the least squares solution is the same
        MSE(model(tokens), y).backward()
    optimizer.step()
    assert_at(model, expected, 1e-6)  # every row of D twice: rank-deficient, and Θ squares the condition
    assert optimizer.last_step.rank <= optimizer.last_step.num_outputs / 2


def test_a_physics_informed_network_whose_outputs_are_residuals():
    class Residual(nn.Module):
        """u'' + u on given points, and u at the ends."""

        def __init__(self):
            super().__init__()
            self.net = mlp(sizes=(1, 10, 10, 1))

        def forward(self, x):
            with torch.enable_grad():
                x = x.requires_grad_() if x.is_leaf and not torch._C._functorch.is_functorch_wrapped_tensor(x) else x
                u = self.net(x)
                slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
                return torch.autograd.grad(slope.sum(), x, create_graph=True)[0] + u

    model = Residual().double()
    x = torch.linspace(0, 1, 8, dtype=torch.float64).unsqueeze(1)
    target = torch.ones(8, 1, dtype=torch.float64)
    criterion = HalfSquaredLoss()
    optimizer = AdaptedGD(model, criterion=criterion, damping=0.0)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = criterion(model(x.clone()), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-12 * losses[0]
