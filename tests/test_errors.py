"""Bad input and bad luck: a clear error, and parameters, state and the random stream as they were."""

import copy
import math

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, Dense, memory
from torch_adapted_gd.jacobian.definition import dtype_and_device

from .cases import assert_at, flat, mlp, pinv_step

MSE = nn.MSELoss()


def problem(n=6, dtype=torch.float64):
    return mlp().to(dtype), torch.randn(n, 4, dtype=dtype), torch.randn(n, 3, dtype=dtype)


def assert_step_refused(optimizer, model, error, match):
    parameters, state = flat(model), copy.deepcopy(optimizer.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    report, stream = optimizer.last_step, torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    with pytest.raises(error, match=match):
        optimizer.step()
    assert torch.equal(flat(model), parameters)
    assert optimizer.state_dict() == state
    assert optimizer.last_step is report
    assert torch.equal(torch.get_rng_state(), stream)
    assert [m.training for m in model.modules()] == modes
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) if gradient is None else torch.equal(p.grad.nan_to_num(7.0), gradient.nan_to_num(7.0))


def test_a_forward_pass_that_fails_when_it_is_repeated():
    class Once(nn.Linear):
        called = False

        def forward(self, x):
            if self.called:
                raise ValueError("a second call")
            self.called = True
            return super().forward(x)

    model, x, y = Once(4, 3).double(), *problem()[1:]
    optimizer = AdaptedGD(model, criterion=MSE)
    MSE(model(x), y).backward()
    assert_step_refused(optimizer, model, RuntimeError, r"repeated with the present .* a number\. The error: .*a second call")


def test_step_without_backward():
    model, x, y = problem()
    optimizer = AdaptedGD(model)
    assert_step_refused(optimizer, model, RuntimeError, r"found no call of the model .* call loss.backward\(\) before")
    MSE(model(x), y)
    assert_step_refused(optimizer, model, RuntimeError, "found no call")
    with torch.no_grad():
        model(x)
    assert_step_refused(optimizer, model, RuntimeError, r"not under torch.no_grad\(\)")


def test_step_twice_after_one_backward():
    model, x, y = problem()
    optimizer = AdaptedGD(model)
    MSE(model(x), y).backward()
    optimizer.step()
    assert_step_refused(optimizer, model, RuntimeError, "since the last step, which used up those before")


def test_zero_grad_between_backward_and_step():
    model, x, y = problem()
    optimizer = AdaptedGD(model)
    MSE(model(x), y).backward()
    optimizer.zero_grad()
    assert_step_refused(optimizer, model, RuntimeError, "zero_grad dropped it. Call zero_grad before backward")


def test_loss_from_a_submodules_call():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp().double()

        def forward(self, x):
            return self.net(x)

    model, x, y = Wrapper(), *problem()[1:]
    optimizer = AdaptedGD(model)
    MSE(model.net(x), y).backward()
    assert_step_refused(
        optimizer, model, RuntimeError, r"although the parameters received gradients.*model.net\(x\) instead of"
    )


def test_loss_from_derivatives_of_outputs_alone():
    model = mlp(sizes=(1, 8, 8, 1)).double()
    optimizer = AdaptedGD(model)
    x = torch.linspace(0, 1, 5, dtype=torch.float64).unsqueeze(1).requires_grad_()
    slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
    slope.square().mean().backward()
    assert_step_refused(optimizer, model, RuntimeError, "from derivatives of the outputs alone")


def test_loss_gradient_that_is_not_finite():
    model, x, y = problem()
    optimizer = AdaptedGD(model)
    MSE(model(x[:2]), y[:2]).backward()
    y[5, 1] = math.nan
    MSE(model(x), y).backward()
    match = r"In call 2 of 2 of the model, the gradient of the loss in output 0 of shape \[6, 3\] has 1 entries that"
    assert_step_refused(optimizer, model, RuntimeError, match)


def test_calls_are_numbered_as_they_were_made():
    model, x, y = problem()
    optimizer = AdaptedGD(model)
    y[1] = math.nan
    MSE(torch.cat([model(x[:2]), model(x[2:4]), model(x[4:])]), y).backward()
    assert_step_refused(optimizer, model, RuntimeError, "In call 1 of 3 of the model, the gradient of the loss")


def test_outputs_that_are_not_finite():
    model, x, y = problem()
    optimizer = AdaptedGD(model)
    x[2, 0] = math.nan
    MSE(model(x), y).backward()
    match = r"In call 1 of 1 of the model, the output 0 of shape \[6, 3\] has .* not finite"
    assert_step_refused(optimizer, model, RuntimeError, match)


def test_a_kernel_that_is_not_finite():
    class Root(nn.Module):
        """Its derivative is infinite where the layer is zero."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x):
            return self.layer(x).sqrt()

    model = Root()
    nn.init.zeros_(model.layer.weight)
    nn.init.zeros_(model.layer.bias)
    optimizer = AdaptedGD(model)
    model(torch.ones(3, 2)).sum().backward()
    assert_step_refused(
        optimizer, model, RuntimeError, r"The kernel Θ of 3 outputs could not be solved \(9 entries are not finite\)"
    )


def test_a_step_that_would_overflow():
    model, x, y = problem(dtype=torch.float32)
    optimizer = AdaptedGD(model, lr=1e39)
    MSE(model(x), y).backward()
    assert_step_refused(optimizer, model, RuntimeError, "would make parameter '0.weight' not finite, so nothing was changed")


def test_after_an_error_the_loop_can_go_on():
    model, x, y = problem()
    optimizer = AdaptedGD(model)
    MSE(model(x), y * math.nan).backward()
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    optimizer.zero_grad()
    MSE(model(x), y).backward()
    optimizer.step()
    assert optimizer.last_step.full_rank


def test_model_moved_or_cast_between_call_and_step():
    model, x, y = problem()
    optimizer = AdaptedGD(model)
    MSE(model(x), y).backward()
    model.float()
    match = "Parameter '0.weight' was torch.float64 on cpu when the model was called and is torch.float32 on cpu now"
    assert_step_refused(optimizer, model, RuntimeError, match)


def test_parameters_changed_between_call_and_step():
    model, x, y = problem()
    optimizer = AdaptedGD(model)
    MSE(model(x), y).backward()
    with torch.no_grad():
        model[0].bias.clamp_(-0.1, 0.1)
    assert_step_refused(optimizer, model, RuntimeError, "Parameter '0.bias' was changed between the model's call and `step`")


def test_outputs_without_a_batch():
    model, x, _ = problem()
    optimizer = AdaptedGD(nn.Sequential(model, nn.Flatten(0), nn.Linear(18, 5).double(), Sum()))
    model = optimizer._model
    model(x).backward()
    assert_step_refused(optimizer, model, ValueError, r"should all have the batch as their first dimension.*shapes \[\[\]\]")


class Sum(nn.Module):
    def forward(self, x):
        return x.sum()


def test_an_empty_batch():
    model, x, _ = problem()
    optimizer = AdaptedGD(model)
    model(x[:0]).sum().backward()
    assert_step_refused(optimizer, model, RuntimeError, "outputs that reached the loss are empty")


def test_a_model_that_is_not_a_function_of_its_inputs():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = mlp().double(), 0

        def forward(self, x):
            self.calls += 1
            return self.net(x) * self.calls

    model, x, y = Counter(), *problem()[1:]
    expected = pinv_step(model.net, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    optimizer.step()  # of the graph that is there: nothing is repeated
    assert_at(model.net, expected)
    optimizer = AdaptedGD(model, solver=Dense(kernel="jacobian"))
    MSE(model(x), y).backward()
    assert_step_refused(optimizer, model, RuntimeError, "could not be repeated with the same outputs")


def test_everything_frozen():
    model, x, y = problem()
    optimizer = AdaptedGD(model)
    MSE(model(x), y).backward()
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="No parameter of this optimizer requires a gradient any more"):
        optimizer.step()


def test_parameters_on_several_devices():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, device="meta"))
    with pytest.raises(ValueError, match=r"should be on one device, but are on \['cpu', 'meta'\]"):
        dtype_and_device(list(model.parameters()))


def test_a_scale_that_was_taken_out_is_found_again():
    """By GradScaler.unscale_, which Lightning calls itself; where gradients were clipped after it nothing tells."""
    model, x, y = problem(dtype=torch.float32)
    reference, optimizer = copy.deepcopy(model), AdaptedGD(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(MSE(model(x), y)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    plain = AdaptedGD(reference)
    MSE(reference(x), y).backward()
    plain.step()
    assert (flat(model) - flat(reference)).norm() <= 1e-4 * flat(model).norm()
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(MSE(model(x), y)).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    before = flat(model)
    with pytest.raises(RuntimeError, match=r"GradScaler.unscale_\(optimizer\) divided `.grad`.* Leave out unscale_ and clip"):
        scaler.step(optimizer)
    assert torch.equal(flat(model), before)


def test_a_step_that_cannot_fit_is_refused_before_it_is_made(monkeypatch):
    model = nn.Linear(1, 100)
    optimizer = AdaptedGD(model, solver=Dense(space="sample", factorization="eigh"))
    model(torch.ones(50_000, 1)).sum().backward()
    match = r"A step on 5,000,000 outputs \(kernel 2e\+05 GB, and its eigenvectors\) needs .* smaller batch"
    assert_step_refused(optimizer, model, MemoryError, match)


def test_available_memory_is_known_here():
    available = memory.available_bytes(torch.device("cpu"))
    assert available is None or 1e8 < available < 1e15
    assert memory.available_bytes(torch.device("meta")) is None


def test_a_closure_that_raises_changes_nothing():
    model, x, y = problem()
    optimizer = AdaptedGD(model)

    def closure():
        optimizer.zero_grad()
        MSE(model(x), y).backward()
        raise KeyError("data")

    before = flat(model)
    with pytest.raises(KeyError, match="data"):
        optimizer.step(closure)
    assert torch.equal(flat(model), before)


def test_a_model_applied_to_its_own_output():
    model = nn.Linear(3, 3).double()
    optimizer = AdaptedGD(model)
    model(model(torch.randn(4, 3).double()).tanh()).square().mean().backward()
    assert_step_refused(optimizer, model, RuntimeError, "an input that was computed from the output of another call of it")


def test_a_failed_scaled_step_leaves_no_marks():
    model, x, y = problem(dtype=torch.float32)
    twin = copy.deepcopy(model)
    optimizer, plain = AdaptedGD(model), AdaptedGD(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(MSE(model(x), y)).backward()
    with torch.no_grad():
        model[0].bias.add_(0.0)
    with pytest.raises(RuntimeError, match="was changed between"):
        scaler.step(optimizer)
    for m, o in ((model, optimizer), (twin, plain)):
        o.zero_grad()
        MSE(m(x), y).backward()
        o.step()
    assert torch.equal(flat(model), flat(twin))


def test_weights_that_change_in_each_forward_pass_are_refused():
    class Shrinks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.state = nn.Linear(4, 3), None

        def forward(self, x):
            with torch.no_grad():
                self.layer.weight.mul_(0.5)
            self.state = self.layer(x)
            return self.state

    model = Shrinks()
    optimizer = AdaptedGD(model)
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    optimizer = AdaptedGD(model, criterion=MSE)
    MSE(model(x), y).backward()
    optimizer.step()


def test_gradients_of_parameters_that_are_not_finite():
    model, x, y = problem()
    nn.init.zeros_(model[4].bias)
    optimizer = AdaptedGD(model)
    (MSE(model(x), y) + model[4].bias.square().sum().sqrt()).backward()
    assert_step_refused(optimizer, model, RuntimeError, "The loss's gradient in parameter '4.bias' is not finite although")


def test_outputs_of_a_type_that_hides_its_tensors():
    class Distribution(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp().double()

        def forward(self, x):
            return torch.distributions.Normal(self.net(x), 1.0)

    model, x, y = Distribution(), *problem()[1:]
    optimizer = AdaptedGD(model)
    (-model(x).log_prob(y).mean()).backward()
    assert_step_refused(optimizer, model, RuntimeError, "it returned a Normal in which no real floating tensor")


def test_parameters_replaced_by_loading():
    model, x, y = problem()
    optimizer = AdaptedGD(model)
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    MSE(model(x), y).backward()
    assert_step_refused(optimizer, model, RuntimeError, "6 parameters of this optimizer are no longer the model's")


def test_a_model_cast_to_half_precision_later():
    model, x, y = problem(dtype=torch.float32)
    optimizer = AdaptedGD(model)
    model.bfloat16()
    MSE(model(x.bfloat16()), y.bfloat16()).backward()
    assert_step_refused(
        optimizer, model, ValueError, "Parameter '0.weight' should be float32 or float64, but is torch.bfloat16"
    )
