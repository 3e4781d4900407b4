"""Uses of parameters in the user's own step: from the graph that is there, wherever the user takes derivatives."""

import contextlib
import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, HalfSquaredLoss, ntk
from torch_adapted_gd.jacobian.factored import FactoredJacobian, Piece
from torch_adapted_gd.jacobian.linearized import Linearized
from torch_adapted_gd.tracking.tape import Tape, constants_of

from .cases import MSE, assert_at, dense_jacobian, mlp, pinv_step, problem


class Own(nn.Module):
    """A layer by hand, with a normalization and a learned slope."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))
        self.slope = nn.Parameter(torch.rand(outputs))

    def forward(self, x):
        return torch.tanh(self.slope * (x @ self.w + self.b))


def field(outputs=1):
    return nn.Sequential(Own(2, 5), nn.LayerNorm(5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def gradient(u, x):
    (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return g


def laplacian(net, x):
    g = gradient(net(x), x)
    return sum(gradient(g[:, i], x)[:, i] for i in range(x.shape[1]))


def bending(net, x):
    """Fourth derivatives."""
    return laplacian(lambda z: laplacian(net, z), x) + net(x)[:, 0]


def navier_stokes(net, x):
    """Three residuals for each point, of a stream function and a pressure."""
    out = net(x)
    psi = gradient(out[:, 0], x)
    u, v = psi[:, 1], -psi[:, 0]
    du, dv, dp = gradient(u, x), gradient(v, x), gradient(out[:, 1], x)
    lap = [sum(gradient(d[:, i], x)[:, i] for i in (0, 1)) for d in (du, dv)]
    return torch.stack(
        [
            u * du[:, 0] + v * du[:, 1] + dp[:, 0] - 0.1 * lap[0],
            u * dv[:, 0] + v * dv[:, 1] + dp[:, 1] - 0.1 * lap[1],
            out[:, 1] ** 2,
        ],
        1,
    )


def periodic(net, x):
    """Points that depend on each other in pairs, in one call."""
    both = net(torch.cat([x, x + 1]))
    return both[: len(x)] - both[len(x) :] + both[: len(x)] ** 2


def weighted_terms(net, x):
    """Several point sets: a residual inside and values at the boundary, in one vector of rows."""
    inside, boundary = x[:4], x[4:].detach()
    inside = inside.detach().requires_grad_()
    return torch.cat([laplacian(net, inside), 10 * net(boundary)[:, 0]])


OUTSIDE = {
    "laplacian": (laplacian, 1),
    "fourth derivatives": (bending, 1),
    "navier-stokes": (navier_stokes, 2),
    "periodic pairs": (periodic, 1),
    "several point sets": (weighted_terms, 1),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_derivatives_taken_outside_of_the_module(name):
    residual, outputs = OUTSIDE[name]
    net, x = field(outputs), torch.randn(7, 2).double().requires_grad_()
    parameters = dict(net.named_parameters())
    tape = Tape(parameters, constants_of(net, parameters), differentiable=True)

    def watched(points):
        with tape:
            return net(points)

    rows = residual(watched, x)
    found = Linearized([rows], parameters, tape.notes, eps=2.0**-52, dtype=torch.float64)
    assert not found.remarks
    jacobian = FactoredJacobian([[Piece(found)]], parameters, dtype=torch.float64)
    expected = residual(net, x).reshape(-1)
    grads = [torch.autograd.grad(r, list(parameters.values()), retain_graph=True, materialize_grads=True) for r in expected]
    d = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in grads])
    assert (jacobian.gram() - d @ d.T).norm() <= 1e-13 * (d @ d.T).norm()
    u = torch.randn(len(d)).double()
    assert (torch.cat(list(jacobian.rmv(u).values())) - d.T @ u).norm() <= 1e-13 * (d.T @ u).norm()
    plain = torch.autograd.grad(rows.reshape(-1) @ u, list(parameters.values()), materialize_grads=True)
    assert (torch.cat([part.reshape(-1) for part in plain]) - d.T @ u).norm() <= 1e-13 * (d.T @ u).norm()


class Counting(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.passes = net, 0

    def forward(self, *x):
        self.passes += 1
        return self.net(*x)


def test_a_step_with_a_fixed_damping_runs_the_forward_pass_once():
    net, x, y = problem()
    model = Counting(net)
    optimizer = AdaptedGD(model, lr=0.5, damping=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        MSE(model(x), y).backward()
        optimizer.step()
        assert model.passes == step + 1


class Noisy(nn.Module):
    """What cannot be repeated: another generator's numbers, and a state that is kept as an attribute and in a list."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.kept = nn.Linear(4, 40), nn.Linear(40, 3), []

    def forward(self, x):
        self.hidden = torch.tanh(self.first(x))
        self.kept.append(self.hidden)
        return self.second(self.hidden * (1 + torch.from_numpy(1e-6 * np.random.default_rng().standard_normal(40))))


class Drawn(nn.Module):
    """Points are drawn in each forward pass."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1))

    def forward(self):
        points = torch.rand(6, 1, dtype=torch.float64)
        return self.net(points) - torch.sin(points)


@pytest.mark.parametrize("options", [{"damping": 1e-6, "lr": 1.0}, {}], ids=["damped", "default"])
@pytest.mark.parametrize("build", [Noisy, Drawn])
def test_models_that_cannot_be_repeated_train(build, options):
    model, x, y = build().double(), torch.randn(6, 4).double(), torch.randn(6, 3).double()
    inputs, y = ((x,), y) if build is Noisy else ((), torch.zeros(6, 1).double())
    criterion = HalfSquaredLoss()
    optimizer = AdaptedGD(model, criterion=criterion, **options)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = criterion(model(*inputs), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] <= 1e-4 * losses[0]
    assert optimizer.last_step.kernel == "structured"


def test_autocast_that_a_wrapper_puts_around_forward():
    """As accelerate does: the model itself enters it, and gives float32 back."""
    model, x, y = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 3)), torch.randn(8, 4), torch.randn(8, 3)
    inner = model.forward

    def forward(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inner(x).float()

    model.forward = forward
    optimizer = AdaptedGD(model, criterion=MSE)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = MSE(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] <= 1e-2 * losses[0]
    assert optimizer.last_step.kernel == "structured"


@pytest.mark.filterwarnings("ignore")  # of torch, on its own future
@pytest.mark.parametrize("copied", [False, True], ids=["watched", "copied"])
def test_exports_of_a_watched_model(copied):
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), torch.randn(6, 3)
    optimizer = AdaptedGD(model, lr=0.1)
    MSE(model(x), y).backward()
    optimizer.step()
    exported = copy.deepcopy(model) if copied else model
    tells = hasattr(torch.compiler, "is_exporting")  # torch 2.6 does not say that a strict export is at work
    for way in (
        lambda m: torch.export.export(m, (x,), strict=False).module(),
        lambda m: torch.export.export(m, (x,), strict=tells).module(),
        lambda m: torch.jit.trace(m, x),
        torch.jit.script,
        lambda m: torch.jit.script(nn.Sequential(m, nn.Identity())),
        torch.fx.symbolic_trace,
    ):
        assert torch.equal(way(exported)(x), model(x))
    assert "__prepare_scriptable__" in vars(model)
    MSE(model(x), y).backward()  # still watched
    optimizer.step()
    del optimizer
    assert "__prepare_scriptable__" not in vars(model)


def test_functions_that_are_compiled_within_the_model():
    function = torch.compile(lambda x, w: torch.tanh(x @ w), backend="eager")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(function(x, self.w))

    model, x, y = Model().double(), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(model, expected)
    torch.compiler.reset()


def test_data_parallel_on_one_device():
    net, x, y = problem()
    model = nn.DataParallel(net)
    expected = pinv_step(net, x, y, 0.5)
    torch.testing.assert_close(ntk(model, x), ntk(net, x))
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(net, expected)
    model.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"is an nn.DataParallel over 2\. Pass model.module"):
        AdaptedGD(model)


def test_data_that_is_refilled_after_backward():
    model, x, y = problem()
    expected = pinv_step(copy.deepcopy(model), x.clone(), y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    x.zero_()  # a loader's buffer
    optimizer.step()
    assert_at(model, expected)


def test_a_gradient_kept_on_the_outputs_is_the_users_own():
    model, x, y = problem()
    AdaptedGD(model, lr=0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    outputs = model(x)
    seen = []
    outputs.retain_grad()
    outputs.register_hook(seen.append)
    MSE(outputs, y).backward()
    optimizer.step()
    torch.testing.assert_close(outputs.grad, 2 * (outputs - y).detach() / y.numel())
    assert len(seen) == 1


def test_rows_that_come_from_different_places_of_a_batch():
    """Twice as many outputs as inputs, each of an input that is not at its number."""

    class Mirrored(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            h = self.net(torch.cat([x, -x])[torch.arange(2 * len(x)).flip(0)])
            return torch.cat([h[: len(x)], h[len(x) :] ** 2])

    model, x = Mirrored().double(), torch.randn(4, 4).double()
    d = dense_jacobian(model, x)
    torch.testing.assert_close(ntk(model, x, method="structured").reshape(len(d), len(d)), d @ d.T)


def test_a_mode_of_the_users_own_is_left_alone():
    class Doubling(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return 2 * result if func is torch.tanh else result

    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5)
    with Doubling():
        expected = ntk(model, x)
        MSE(model(x), y).backward()
    optimizer.step()
    assert optimizer.last_step.kernel == "structured"
    assert expected.shape == (6, 3, 6, 3)


class Level(nn.Module):
    """A number that is added to all logits before a softmax: it has no effect, and derivatives by it are rounding errors."""

    def __init__(self, level):
        super().__init__()
        self.net, self.level = mlp(), level

    def forward(self, x):
        return torch.softmax(self.net(x) + self.level(x), -1)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.value


@pytest.mark.parametrize("level", [Constant, lambda: nn.Linear(4, 1)], ids=["constant", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_without_effect_need_no_rows(dtype, level):
    for _ in range(5):
        model, x = Level(level()).to(dtype), torch.randn(50, 4, dtype=dtype)
        d = dense_jacobian(model, x)
        theta = ntk(model, x, method="structured").reshape(len(d), len(d))
        assert (theta - d @ d.T).norm() <= 100 * torch.finfo(dtype).eps * (d @ d.T).norm()


class SequenceFirst(nn.Module):
    """Raw features, a normalization behind, and as many places as samples: gradients at the first layer are tiny."""

    def __init__(self, mix):
        super().__init__()
        self.first, self.head, self.mix = nn.Linear(4, 8), nn.Linear(8, 3), mix

    def forward(self, x):
        h = self.first(x.transpose(0, 1))
        h = nn.functional.layer_norm(h, (8,)).transpose(0, 1).mean(1)
        return self.head(h - h.mean(0) if self.mix else h)


@pytest.mark.parametrize("mix", [False, True])
def test_tiny_gradients_do_not_hide_where_the_samples_are(mix):
    model, x = SequenceFirst(mix), 1e7 * torch.randn(6, 6, 4)
    d = dense_jacobian(model, x)
    with pytest.warns(UserWarning, match="Rows of the output Jacobian") if mix else contextlib.nullcontext():
        theta = ntk(model, x).reshape(18, 18)
    assert (theta - d @ d.T).norm() <= 1e-4 * (d @ d.T).norm()


def test_another_thread_that_evaluates_the_model():
    model, x, y = problem()
    expected = pinv_step(copy.deepcopy(model), x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)

    def evaluate():
        with torch.no_grad():
            model(x)

    def meanwhile(module, args):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=evaluate)
            thread.start()
            thread.join(10)

    model[2].register_forward_pre_hook(meanwhile)
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(model, expected)
    assert torch._C._len_torch_function_stack() == 0


def test_an_operation_that_is_wrong_under_vmap():
    """torch's `cdist`, differentiated for several outputs at once."""

    class Prototypes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.points, self.head = nn.Linear(4, 3), nn.Parameter(torch.randn(5, 3)), nn.Linear(5, 6)

        def forward(self, x):
            return self.head(torch.cdist(torch.tanh(self.first(x)), self.points))

    model, x = Prototypes().double(), torch.randn(4, 4).double()
    d = dense_jacobian(model, x, by_rows=True)
    torch.testing.assert_close(ntk(model, x).reshape(24, 24), d @ d.T)


def test_operands_that_are_asked_for_their_form_alone_are_no_uses():
    model, x = ByExample(), torch.randn(5, 4)
    parameters = dict(model.named_parameters())
    tape = Tape(parameters, constants_of(model, parameters), differentiable=False)
    with tape:
        model(x)
    assert [note.function for note in tape.notes] == [nn.functional.linear, torch.Tensor.mul]


def test_a_hidden_gradient_that_is_retained():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            self.hidden = torch.tanh(self.net[0](x))
            self.hidden.retain_grad()
            return self.net[2:](self.hidden)

    model, x, y = Hidden().double(), *problem()[1:]
    MSE(model(x), y).backward()
    expected = model.hidden.grad.clone()
    model.zero_grad()
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    assert torch.equal(model.hidden.grad, expected)
    optimizer.step()


def test_an_empty_batch_beside_another():
    model, x, y = problem()
    expected = pinv_step(copy.deepcopy(model), x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    (model(x[:0]).sum() + MSE(model(x), y)).backward()
    optimizer.step()
    assert_at(model, expected)


class Masked(nn.Module):
    def __init__(self, where):
        super().__init__()
        self.w, mask = nn.Parameter(torch.randn(3, 4)), torch.ones(3, 4)
        self.masks = {"w": mask} if where == "dict" else [mask]
        if where == "buffer":
            self.register_buffer("mask", mask)

    def forward(self, x):
        mask = self.mask if hasattr(self, "mask") else (self.masks["w"] if isinstance(self.masks, dict) else self.masks[0])
        return torch.tanh(nn.functional.linear(x, self.w * mask))


@pytest.mark.parametrize("where", ["buffer", "dict", "list"])
def test_masks_that_change_after_backward(where):
    model, x, y = Masked(where), torch.randn(5, 4), torch.randn(5, 3)
    expected = pinv_step(copy.deepcopy(model).double(), x.double(), y.double(), 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    for mask in [model.mask] if where == "buffer" else (model.masks.values() if where == "dict" else model.masks):
        mask[0] = 0
    optimizer.step()
    assert_at(model, expected, 1e-4)


def test_one_sample_without_a_batch_within():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x[0])))[None]

    model, x = Single().double(), torch.randn(1, 4).double()
    d = dense_jacobian(model, x)
    torch.testing.assert_close(ntk(model, x, method="structured").reshape(2, 2), d @ d.T)


def test_watchers_of_a_model_and_of_a_part_of_it():
    depth = torch._C._len_torch_function_stack()
    net, x, y = problem()
    model = Counting(net)
    optimizers = [AdaptedGD(m, lr=0.5) for m in (net, model, net, model)]
    for _ in range(3):
        optimizers[-1].zero_grad()
        MSE(model(x), y).backward()
        assert torch._C._len_torch_function_stack() == depth
    optimizers[-1].step()


class ScaledInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 5), nn.Parameter(torch.randn(5))

    def forward(self, x):
        h = self.layer(x)
        h.mul_(self.scale)
        return torch.tanh(h)


class Broadcast(ScaledInPlace):
    """An operation with two results."""

    def forward(self, x):
        h, scale = torch.broadcast_tensors(self.layer(x), self.scale)
        return torch.tanh(h * scale)


class ByExample(ScaledInPlace):
    """Operands that are asked for their form alone, and that are returned as they are."""

    def forward(self, x):
        h = torch.tanh(self.layer(x)).to(self.scale).type_as(self.layer.bias)
        return h * self.scale


class DerivedUnderVmap(ScaledInPlace):
    """Weights that are computed from parameters within a transform."""

    def forward(self, x):
        return torch.vmap(lambda p: torch.tanh(nn.functional.linear(p, 2 * self.layer.weight)) @ self.scale.exp())(x)[:, None]


class Norms(ScaledInPlace):
    """Normalizations with all their arguments, by number and by name."""

    def forward(self, x):
        h = nn.functional.rms_norm(self.layer(x), (5,), self.scale, 0.3)
        h = nn.functional.layer_norm(h, (5,), weight=self.scale, bias=self.layer.bias, eps=0.2)
        return nn.functional.group_norm(h, 1, self.scale, self.layer.bias, 0.1)


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("build", [ScaledInPlace, Broadcast, ByExample, DerivedUnderVmap, Norms])
def test_outputs_and_steps_are_the_same_where_derivatives_may_be_taken(build, differentiable):
    model, x = build().double(), torch.randn(5, 4).double()
    y = torch.randn_like(model(x))
    expected, alone = pinv_step(copy.deepcopy(model), x, y, 0.5), model(x).detach()
    optimizer = AdaptedGD(model, lr=0.5)
    outputs = model(x.clone().requires_grad_(differentiable))
    torch.testing.assert_close(outputs, alone, rtol=1e-14, atol=1e-14)
    MSE(outputs, y).backward()
    optimizer.step()
    assert optimizer.last_step.kernel == "structured"
    assert_at(model, expected, 1e-8)


def test_weights_whose_rows_are_many_are_named(monkeypatch):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6), dim=1), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(5, 4).double()
    d = dense_jacobian(model, x)
    monkeypatch.setattr("torch_adapted_gd.jacobian.factored._MANY_ENTRIES", 10 * 24 - 1)
    with pytest.warns(UserWarning, match=r"240 entries .* \('0.parametrizations.weight.original0', .*, 2 in all\)"):
        theta = ntk(model, x, method="structured")
    torch.testing.assert_close(theta.reshape(10, 10), d @ d.T)
    monkeypatch.setattr("torch_adapted_gd.jacobian.factored._MANY_ENTRIES", 10 * 24)
    ntk(model, x)  # quietly
