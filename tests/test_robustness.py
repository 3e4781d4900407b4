"""Ways to use layers, hooks and modes that once led the structured kernel astray."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torch_adapted_gd import AdaptedGD, Dense, ntk, output_jacobian, register_rule, solve_kernel

from .cases import COUPLED, MSE, assert_at, dense_jacobian, flat, mlp, pinv_step
from .layers import Scale


def rows(model, *x):
    """D by a plain backward pass for each output."""
    state = torch.get_rng_state()
    outputs = model(*x)
    torch.set_rng_state(state)
    x = outputs.reshape(-1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts = [torch.autograd.grad(r, parameters, retain_graph=True, materialize_grads=True) for r in x]
    return torch.stack([torch.cat([p.reshape(-1) for p in part]) for part in parts]).double()


def assert_exact(model, *x, tolerance=1e-12, **options):
    d = rows(model, *x)
    theta = ntk(model, x, **options).reshape(len(d), len(d))
    assert (theta - d @ d.T).norm() <= tolerance * (d @ d.T).norm()


class Replaced(nn.Module):
    """A layer that is called with a weight computed from its own."""

    def __init__(self, way):
        super().__init__()
        self.way, self.layer, self.head = way, nn.Linear(4, 3), nn.Linear(3, 2)
        self.low = nn.Parameter(torch.randn(3, 1))

    def forward(self, x):
        weight = F.normalize(self.layer.weight, dim=1) + self.low
        if self.way == "functional_call":
            h = functional_call(self.layer, {"weight": weight}, (x,))
        else:
            own = self.layer._parameters["weight"]
            self.layer._parameters["weight"] = weight
            h = self.layer(x)
            self.layer._parameters["weight"] = own
        return self.head(torch.tanh(h))


@pytest.mark.parametrize("way", ["functional_call", "by hand"])
def test_weights_that_a_model_replaces(way):
    model, x, y = Replaced(way).double(), torch.randn(5, 4).double(), torch.randn(5, 2).double()
    assert_exact(model, x)
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(model, expected)


def test_a_hook_that_replaces_a_weight():
    model = mlp().double()
    model[2].register_forward_pre_hook(lambda module, _: module._parameters.update(weight=module._parameters["weight"].sin()))
    original = model[2].weight

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            before = dict(model[2]._parameters)
            output = self.net(x)
            model[2]._parameters.update(before)
            return output

    outer = Outer()
    assert_exact(outer, torch.randn(3, 4).double())
    assert model[2].weight is original


def test_coupling_of_neighbours_is_found_out_in_low_precision():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 2)

        def forward(self, x):
            h = torch.tanh(self.first(x))
            h = torch.cat([h[:, :16], h[:, 16:].roll(1, 0)], 1)
            return self.head(torch.tanh(self.second(h)))

    for seed in range(3):
        torch.manual_seed(seed)
        model, x = Shifted(), torch.randn(60, 8)
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.warns(UserWarning, match="interact behind linear of 'first.bias', 'first.weight'"),
        ):
            ntk(model, x)


class Halves(nn.Module):
    """A module with two outputs of which samples interact behind one."""

    def __init__(self):
        super().__init__()
        self.gru, self.norm, self.head = nn.GRU(3, 4, batch_first=True), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        h, last = self.gru(x)
        return self.head(self.norm(h.mean(1)) + last[0])


@COUPLED
def test_one_of_several_outputs_coupled():
    assert_exact(Halves().double(), torch.randn(5, 4, 3).double())


@pytest.mark.usefixtures("table")
def test_a_rule_that_fails_for_several_outputs_alone():
    @register_rule(torch.Tensor.mul, names=("scale", "input"))
    def rule(use):
        if use.gradient.shape[1] > 1:
            raise ValueError("one at a time")
        return {"scale": use.gradient * use.samples_first(use.argument("input")).unsqueeze(1)}

    with pytest.raises(ValueError, match="one at a time"):
        assert_exact(nn.Sequential(nn.Linear(4, 5), Scale(5)).double(), torch.randn(3, 4).double())


def test_a_backward_pass_that_vmap_makes_fail():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            if torch._C._functorch.is_functorch_wrapped_tensor(gradient):
                raise ValueError("not like this")
            return 2 * gradient

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return Twice.apply(torch.tanh(self.layer(x)))

    assert_exact(Model().double(), torch.randn(3, 4).double(), method="structured")


def test_rows_of_an_operation_that_vmap_gets_wrong():
    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            z = self.layer(x)
            return torch.cdist(z, z + 0.1)

    model, x = Distances().double(), torch.randn(6, 4).double()
    d = dense_jacobian(model, x, by_rows=True)
    torch.testing.assert_close(output_jacobian(model, x), d)
    with pytest.warns(UserWarning, match="the samples of a batch interact"):
        theta = ntk(model, x)
    torch.testing.assert_close(theta.view(36, 36), d @ d.T)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("trained", [True, False])
def test_scripted_parts_of_a_model(trained):
    model, x, y = mlp().double(), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    model[0].requires_grad_(trained)
    scripted = copy.deepcopy(model)
    scripted[0] = torch.jit.script(scripted[0])
    for each in (model, scripted):
        optimizer = AdaptedGD(each, criterion=MSE)
        rows = trained and each is scripted
        with pytest.warns(UserWarning, match="Rows of the output") if rows else contextlib.nullcontext():
            for _ in range(3):
                optimizer.zero_grad()
                MSE(each(x), y).backward()
                optimizer.step()
    assert (flat(scripted) - flat(model)).norm() <= 1e-8 * flat(model).norm()


def test_inference_mode():
    model, x = mlp().double(), torch.randn(3, 4).double()
    expected = ntk(model, x)
    for method in ("auto", "structured", "jacobian"):
        with torch.inference_mode():
            assert torch.allclose(ntk(model, x, method=method), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["conv", "sequence", "embedding", "weight_norm", "norm"])
def test_autocast(name, dtype):
    body = {
        "conv": lambda: (
            nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(16, 2)),
            (2, 6),
        ),
        "sequence": lambda: (
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Flatten(), nn.Linear(20, 2)),
            (4, 3),
        ),
        "embedding": lambda: (nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.Flatten(), nn.Linear(15, 2)), None),
        "weight_norm": lambda: (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)), (3,)),
        "norm": lambda: (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    }
    model, shape = body[name]()
    x = torch.randint(7, (5, 3)) if shape is None else torch.randn(5, *shape)
    d = dense_jacobian(model, x)
    with torch.autocast("cpu", dtype=dtype):
        theta = ntk(model, x, method="structured")
    assert (theta.reshape(10, 10) - d @ d.T).norm() < 0.03 * (d @ d.T).norm()


def test_calls_that_use_different_parameters():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.a, self.b = nn.Linear(4, 3), nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

        def forward(self, x, first):
            return self.shared(x) * (self.a if first else self.b)

    torch.manual_seed(0)
    models = [Routed().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    xs = torch.randn(2, 2, 4).double()
    for model, kernel in zip(models, ("auto", "jacobian"), strict=True):
        optimizer = AdaptedGD(model, lr=0.5, solver=Dense(kernel=kernel))
        for x, first in zip(xs, (True, False), strict=True):
            model(x, first).square().sum().backward()
        optimizer.step()
    assert all(torch.allclose(p, q, atol=1e-10) for p, q in zip(*(m.parameters() for m in models), strict=True))

    class First(Routed):
        def forward(self, x):
            return self.shared(x) * self.a

    assert_exact(First().double(), xs[0])


def test_one_parameter_of_two_names_in_a_module():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.randn(4))
            self.b = self.a

        def forward(self, x):
            return x * self.a + self.b**2

    assert_exact(nn.Sequential(nn.Linear(4, 4), Twice()).double(), torch.randn(3, 4).double(), method="structured")


def test_hooks_of_layers_see_what_they_can_keep():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.scale = nn.Linear(4, 4), nn.LayerNorm(4), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return self.norm(torch.tanh(self.layer(x))) * self.scale

    model, x = nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 2)).double(), torch.randn(3, 4).double()
    nn.init.normal_(model[1].norm.weight)
    seen, sent = {}, {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, a, output, name=name: seen.__setitem__(name, output.detach()))
        if name[:1] not in ("", "0"):
            module.register_full_backward_hook(lambda m, a, gradient, name=name: sent.__setitem__(name, gradient[0].detach()))
    model(x)
    expected = {name: value.clone() for name, value in seen.items()}
    assert_exact(model, x, method="structured")
    assert all(torch.equal(seen[name], expected[name]) for name in expected)
    assert all(torch.isfinite(gradient.norm()) for gradient in sent.values())


def test_hooks_that_change_what_a_normalization_gets_and_gives():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double(), torch.randn(3, 4).double()
    model[1].register_forward_pre_hook(lambda module, args: (args[0].sin() * 3,))
    model[1].register_forward_hook(lambda module, args, output: output.exp())
    assert_exact(model, x, method="structured")


@COUPLED
@pytest.mark.parametrize("method", ["auto", "jacobian"])
def test_buffers_of_a_checkpointed_part(method):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(checkpoint(self.norm, torch.tanh(self.first(x)), use_reentrant=False))

    model, x = Model().double(), torch.randn(6, 4).double()
    before = {name: b.clone() for name, b in model.named_buffers()}
    ntk(model, x, method=method)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_a_mask_as_large_as_the_batch_and_layers_without_a_batch():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            mask = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
            return self.head(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0].sum(1))

    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True), nn.Linear(9, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.norm(self.conv(x[0]))).reshape(1, -1))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_exact(Masked().double(), torch.randn(5, 5, 4).double())
        assert_exact(Single().double(), torch.randn(1, 2, 4).double())


def test_complex_parameters_are_refused():
    model = nn.Linear(3, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match="`model` should have real parameters, but 'weight' is torch.complex64"):
        ntk(model, torch.ones(2, 3, dtype=torch.complex64))


def test_a_kernel_at_the_end_of_the_range_is_a_value_not_an_error():
    a = torch.randn(200, 300, dtype=torch.float64)
    for scale in (1e-300, 1e-310):
        solution = solve_kernel(scale * (a @ a.T), 1e20 * torch.randn(200, dtype=torch.float64))
        assert solution.status in ("not_finite", "full_rank", "rank_deficient", "zero")
