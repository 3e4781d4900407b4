"""Which calls of the model belong to a step: those whose outputs' gradients go on into ``.grad``."""

import copy
import warnings

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD

from .cases import (
    MSE,
    Features,
    Halves,
    TwoHeads,
    assert_at,
    flat,
    mlp,
    pinv_step,
    problem,
)


def test_zero_grad_before_the_forward_pass():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    optimizer.zero_grad()
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(model, expected)


def test_zero_grad_between_forward_and_backward_keeps_the_call():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    loss = MSE(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert_at(model, expected)


def test_zero_grad_after_backward_drops_the_call():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(torch.randn_like(x)), y).backward()
    optimizer.zero_grad()
    MSE(model(x), y).backward()
    optimizer.step()
    assert optimizer.last_step.num_calls == 1
    assert_at(model, expected)


def test_a_loop_that_only_clears_the_models_gradients():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5)
    for _ in range(3):
        expected = pinv_step(model, x, y, 0.5)
        model.zero_grad()
        MSE(model(x), y).backward()
        optimizer.step()
        assert optimizer.last_step.num_calls == 1
        assert_at(model, expected)


def test_gradients_by_autograd_grad_do_not_count_as_they_fill_no_grad():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    loss = MSE(model(x), y)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)  # a look at them, say
    with pytest.raises(RuntimeError, match="torch.autograd.grad does not count, because"):
        optimizer.step()
    loss.backward(retain_graph=True)
    torch.autograd.grad(loss, list(model.parameters()))
    optimizer.step()
    assert_at(model, expected)


def test_input_gradients_do_not_count():
    """As in adversarial inputs, or in u_x of a physics-informed loss."""
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    moved = x.clone().requires_grad_()
    outputs = model(moved)
    torch.autograd.grad(outputs.sum(), moved, retain_graph=True)
    MSE(model(x), y).backward()
    torch.autograd.grad(outputs.sum(), moved)
    optimizer.step()
    assert optimizer.last_step.num_calls == 1
    assert_at(model, expected)


def test_evaluation_passes_do_not_count():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    loss = MSE(model(x), y)
    with torch.no_grad():
        model(torch.randn_like(x))
    with torch.inference_mode():
        model(torch.randn_like(x))
    model(torch.randn_like(x)).sum()  # its output never reaches a backward pass
    loss.backward()
    optimizer.step()
    assert optimizer.last_step.num_calls == 1
    assert_at(model, expected)


def test_several_calls_in_one_loss():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(torch.cat([model(x[:1]), model(x[1:4]), model(x[4:])]), y).backward()
    optimizer.step()
    assert optimizer.last_step.num_calls == 3
    assert_at(model, expected)


def test_backward_twice_through_one_call_adds_up():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 1.0)
    optimizer = AdaptedGD(model, lr=0.5)
    loss = MSE(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert optimizer.last_step.num_calls == 1
    assert_at(model, expected)


def test_backward_twice_with_zero_grad_between_counts_once():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    loss = MSE(model(x), y)
    loss.backward(retain_graph=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert_at(model, expected)


def test_pytree_outputs_and_the_ones_a_loss_does_not_see():
    model, x = TwoHeads().double(), torch.randn(5, 4).double()
    optimizer = AdaptedGD(model, lr=0.1)
    out = model(x)
    (out["first"].square().sum() + out["rest"][0].sum()).backward()
    optimizer.step()
    assert optimizer.last_step.num_outputs == 25
    optimizer.zero_grad()
    model(x)["first"].square().sum().backward()  # the second head is no output of this loss
    optimizer.step()
    assert optimizer.last_step.num_outputs == 10
    assert optimizer.last_step.full_rank


@pytest.mark.parametrize("build", [Halves, Features])
def test_only_what_the_loss_uses_of_related_outputs_counts(build):
    class First(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)[0]

    model, x, y = build().double(), torch.randn(6, 4).double(), torch.randn(6, 3).double()
    expected = pinv_step(First(copy.deepcopy(model)), x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x)[0], y).backward()
    optimizer.step()
    assert optimizer.last_step.num_outputs == 18
    assert_at(model, expected)


class Squeezed(nn.Module):
    """Its output is a view."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x).unsqueeze(1).squeeze(1)


def test_outputs_may_be_changed_in_place():
    for build in (Halves, mlp, Squeezed):
        model, x, y = build().double(), torch.randn(6, 4).double(), torch.randn(6, 3).double()
        twin, optimizer = copy.deepcopy(model), AdaptedGD(model, lr=0.5)
        reference = AdaptedGD(twin, lr=0.5)
        out, other = (m(x)[0] if build is Halves else m(x) for m in (model, twin))
        out.mul_(2)[:, 0].add_(1)
        MSE(out, y).backward()
        MSE(2 * other + torch.tensor([1.0, 0, 0]).double(), y).backward()
        optimizer.step()
        reference.step()
        assert_at(model, flat(twin))


def test_clearing_gradients_on_the_model_drops_the_call():
    for clear in (lambda m: m.zero_grad(), lambda m: m.zero_grad(set_to_none=False)):
        model, x, y = problem()
        expected = pinv_step(model, x, y, 0.5)
        optimizer = AdaptedGD(model, lr=0.5)
        MSE(model(torch.randn_like(x)), y).backward()  # for its input gradient, say
        clear(model)
        MSE(model(x), y).backward()
        optimizer.step()
        assert optimizer.last_step.num_calls == 1
        assert_at(model, expected)


def test_parameters_without_a_gradient_stay():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5, weight_decay=0.1)
    before = model[0].weight.clone()
    MSE(model(x), y).backward(inputs=list(model[4].parameters()))
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert optimizer.last_step.num_params == sum(p.numel() for p in model[4].parameters())
    assert optimizer.last_step.off_output_fraction == 0


def test_a_model_that_calls_itself():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x, depth=1):
            h = torch.tanh(self.inner(x))
            return self.outer(self(h, depth=0)) if depth else h

    model, x, y = Recursive().double(), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(model, expected)


def test_a_criterion_that_is_given_outputs_twice():
    class Twice(nn.Sequential):
        def forward(self, x):
            return torch.cat([super().forward(x)] * 2, 1)

    model, x, y = problem()
    targets = torch.cat([y, y.flip(0)], 1)
    expected = pinv_step(Twice(*model), x, targets, 0.5 * targets.numel() / 2)
    criterion = nn.MSELoss()
    optimizer = AdaptedGD(model, lr=0.5, criterion=criterion, damping=0.0)
    criterion(torch.cat([model(x)] * 2, 1), targets).backward()
    optimizer.step()
    assert_at(model, expected)


def test_a_loss_of_what_the_model_keeps_beside_its_output():
    class Keeps(Halves):
        def forward(self, x):
            first, self.second = self.layer(x).chunk(2, 1)
            return first

    model, x, _ = Keeps().double(), *problem()[1:]
    optimizer = AdaptedGD(model, lr=0.5)
    model(x)
    model.second.sum().backward()  # sends the returned half an undefined gradient
    with pytest.raises(RuntimeError, match="although the parameters received gradients"):
        optimizer.step()


def test_vectorized_jacobians_of_the_user_are_let_through():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5)
    jacobian = torch.autograd.functional.jacobian(model, x, vectorize=True)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(copy.deepcopy(model), x))
    expected = pinv_step(model, x, y, 0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert optimizer.last_step.num_calls == 1
    assert_at(model, expected)


def test_parameters_that_are_frozen_between_forward_and_backward_stay():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5)
    expected = torch.cat([flat(model[:4]), pinv_step(model[4], model[:4](x).detach(), y, 0.5)])
    loss = MSE(model(x), y)
    model[:4].requires_grad_(False)
    loss.backward()
    optimizer.step()
    model.requires_grad_(True)
    assert_at(model, expected)
    loss = MSE(model(x), y)
    model.requires_grad_(False)
    optimizer.zero_grad()
    loss.backward()  # fills nothing
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="found no call of the model"):
        optimizer.step()


def test_threads_with_models_of_their_own():
    from concurrent.futures import ThreadPoolExecutor

    def problem_of(seed):  # built outside the threads: they share torch's random stream, in an order that varies
        torch.manual_seed(seed)
        return mlp().double(), *(torch.randn(6, n, dtype=torch.float64) for n in (4, 3))

    def train(problem):
        model, x, y = problem
        criterion = nn.MSELoss()
        optimizer = AdaptedGD(model, criterion=criterion)
        for _ in range(8):
            optimizer.zero_grad()
            criterion(model(x), 0.3 * y).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(train, [problem_of(seed) for seed in range(4)]))
        for seed, trained in enumerate(together):
            torch.testing.assert_close(trained, train(problem_of(seed)), rtol=0, atol=1e-9)


def test_tracing_is_let_through():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x, _ = problem()
        optimizer = AdaptedGD(model)
        assert torch.equal(torch.jit.trace(model, x)(x), model(x))
        del optimizer


def test_clearing_gradients_on_the_model_between_backward_and_step_drops_the_call():
    for clear in (lambda m: m.zero_grad(), lambda m: m.zero_grad(set_to_none=False)):
        model, x, y = problem()
        optimizer = AdaptedGD(model)
        before = flat(model)
        MSE(model(x), y).backward()
        clear(model)
        with pytest.raises(RuntimeError, match="zero_grad dropped it"):
            optimizer.step()
        assert torch.equal(flat(model), before)


def test_clearing_is_noticed_before_a_newly_trained_parameter_confirms():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5)
    model[4].requires_grad_(False)
    MSE(model(x), y).backward()
    model.zero_grad()
    model[4].requires_grad_(True)  # its gradient arrives before all others
    expected = pinv_step(model, x, y, 0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert optimizer.last_step.num_calls == 1
    assert_at(model, expected)
