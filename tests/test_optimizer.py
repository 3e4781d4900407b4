"""The step against hand-written ones: θ ← θ − η [α D⁺g + (1−α) Dᵀg] with the dense float64 D and `torch.linalg.pinv`."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_adapted_gd import AdaptedGD, Dense, HalfSquaredLoss

from .cases import cnn, dense_jacobian, flat, make, mlp, move, pairwise

MODELS = {
    "tanh, K > QN": (lambda: mlp(), (6, 4)),
    "relu, K > QN": (lambda: mlp(nn.ReLU), (6, 4)),
    "cnn, K > QN": (cnn, (6, 1, 8, 8)),
    "tanh, K < QN": (lambda: mlp(sizes=(4, 3, 3)), (20, 4)),
    "relu, K < QN": (lambda: mlp(nn.ReLU, sizes=(4, 3, 3)), (20, 4)),
    "duplicates": (lambda: mlp(), (6, 4)),
}
LOSSES = {
    "mse mean": (nn.MSELoss(), lambda n: 2 / (3 * n)),
    "mse sum": (nn.MSELoss(reduction="sum"), lambda n: 2.0),
    "half squared": (HalfSquaredLoss(), lambda n: 1 / n),
    "cross-entropy": (nn.CrossEntropyLoss(), lambda n: 0.5 / n),
}


def problem(model_name, loss_name):
    build, shape = MODELS[model_name]
    torch.manual_seed(3)
    model, x = build().double(), torch.randn(shape, dtype=torch.float64)
    if model_name == "duplicates":
        x[3:] = x[:3]
    y = torch.randint(3, (len(x),)) if loss_name == "cross-entropy" else torch.randn(len(x), 3, dtype=torch.float64)
    return model, x, y


def output_gradient(model, x, y, criterion):
    outputs = model(x).detach().requires_grad_()
    return torch.autograd.grad(criterion(outputs, y), outputs)[0].reshape(-1)


@pytest.mark.parametrize(
    ("loss_name", "model_name", "alpha", "calls", "with_criterion"),
    pairwise(LOSSES, MODELS, [0.0, 0.5, 1.0], [1, 2], [True, False]),
)
def test_five_steps_equal_hand_written_gauss_newton(model_name, loss_name, alpha, calls, with_criterion):
    model, x, y = problem(model_name, loss_name)
    reference = copy.deepcopy(model)
    criterion, curvature = LOSSES[loss_name]
    c = curvature(len(x))
    eta = 0.3 / c if alpha == 1 else 0.02
    lr = eta * c if with_criterion else eta
    optimizer = AdaptedGD(model, lr=lr, criterion=criterion if with_criterion else None, alpha=alpha, damping=0.0)
    mean = criterion.reduction == "mean"
    for step_number in range(5):
        optimizer.zero_grad()
        for part, target in zip(x.chunk(calls), y.chunk(calls), strict=True):
            (criterion(model(part), target) / (calls if mean else 1)).backward()
        optimizer.step()

        d = dense_jacobian(reference, x)
        g = output_gradient(reference, x, y, criterion)
        change = alpha * (torch.linalg.pinv(d, rtol=1e-6) @ g) + (1 - alpha) * (d.T @ g)
        move(reference, -eta * change)

        report = optimizer.last_step
        assert report.num_calls == calls
        assert (report.num_outputs, report.num_params) == d.shape
        assert report.rank == torch.linalg.matrix_rank(d, rtol=1e-6)
        assert report.full_rank == (report.rank == len(g))
        if step_number == 0:
            assert report.full_rank == model_name.endswith("K > QN")
        assert report.identity_gap < 1e-9
        assert report.off_output_fraction == 0
        assert report.status == ("full_rank" if report.full_rank else "rank_deficient")
    assert (flat(model) - flat(reference)).norm() <= 1e-8 * flat(reference).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("penalty", [0.0, 0.01])
def test_alpha_zero_is_sgd_to_the_bit(dtype, penalty):
    model = mlp(nn.ReLU).to(dtype)
    twin = copy.deepcopy(model)
    x, y = torch.randn(6, 4, dtype=dtype), torch.randint(3, (6,))
    pairs = [(model, AdaptedGD(model, lr=0.1, alpha=0.0)), (twin, torch.optim.SGD(twin.parameters(), lr=0.1))]
    pairs[0][1]._said.add("off-output")  # the penalty's warning has a test of its own
    for _ in range(5):
        for net, optimizer in pairs:
            optimizer.zero_grad()
            (F.cross_entropy(net(x), y) + penalty * sum(p.square().sum() for p in net.parameters())).backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", ["tanh, K > QN", "tanh, K < QN", "duplicates"])
def test_damping_is_levenberg_marquardt(name):
    model, x, y = problem(name, "mse mean")
    d, g = dense_jacobian(model, x), output_gradient(model, x, y, nn.MSELoss())
    before = flat(model)
    optimizer = AdaptedGD(model, lr=0.7, damping=0.01)
    nn.MSELoss()(model(x), y).backward()
    optimizer.step()
    shift = 0.01 * float((d @ d.T).diagonal().mean())
    expected = -0.7 * torch.linalg.solve(d.T @ d + shift * torch.eye(d.shape[1], dtype=d.dtype), d.T @ g)
    assert (flat(model) - before - expected).norm() < 1e-9 * expected.norm()
    assert optimizer.last_step.damping == pytest.approx(shift)
    assert optimizer.last_step.relative_damping == pytest.approx(0.01)


def test_weight_decay_is_decoupled():
    model, x, y = problem("tanh, K > QN", "mse mean")
    d, g = dense_jacobian(model, x), output_gradient(model, x, y, nn.MSELoss())
    before = flat(model)
    optimizer = AdaptedGD(model, lr=0.5, weight_decay=0.1)
    nn.MSELoss()(model(x), y).backward()
    optimizer.step()
    torch.testing.assert_close(flat(model), before * (1 - 0.05) - 0.5 * torch.linalg.pinv(d) @ g, rtol=1e-9, atol=1e-11)


def test_rtol_cuts_singular_values():
    model, x, y = problem("tanh, K > QN", "mse mean")
    d, g = dense_jacobian(model, x), output_gradient(model, x, y, nn.MSELoss())
    before = flat(model)
    optimizer = AdaptedGD(model, solver=Dense(rtol=0.3))
    nn.MSELoss()(model(x), y).backward()
    optimizer.step()
    torch.testing.assert_close(flat(model), before - torch.linalg.pinv(d, rtol=0.3) @ g, rtol=1e-9, atol=1e-11)
    assert optimizer.last_step.rank == torch.linalg.matrix_rank(d, rtol=0.3) < len(g)


def test_homotopy_in_output_space():
    """Δx = −η (α 1 + (1−α) Θ) Pg + O(η²), equation (2.41)."""
    for alpha in (0.0, 0.3, 1.0):
        errors = []
        for eta in (1e-3, 1e-4):
            model, x, y = problem("duplicates", "half squared")
            d, g = dense_jacobian(model, x), output_gradient(model, x, y, HalfSquaredLoss())
            projected = d @ (torch.linalg.pinv(d, rtol=1e-9) @ g)
            before = model(x).detach().reshape(-1)
            optimizer = AdaptedGD(model, lr=eta, alpha=alpha)
            HalfSquaredLoss()(model(x), y).backward()
            optimizer.step()
            expected = -eta * (alpha * projected + (1 - alpha) * d @ (d.T @ projected))
            errors.append(float((model(x).detach().reshape(-1) - before - expected).norm()))
            assert optimizer.last_step.projected_fraction == pytest.approx(float(projected.norm() / g.norm()))
        assert errors[1] < 0.02 * errors[0]  # second order in η


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_float32_follows_float64(activation):
    """The float32 model with a float64 kernel makes the float64 model's steps (MATH.md's numerics)."""
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(5)
        model = mlp(activation, sizes=(4, 40, 40, 3)).to(dtype)
        x, y = torch.randn(12, 4).to(dtype), torch.randn(12, 3).to(dtype)
        criterion = nn.MSELoss()
        optimizer = AdaptedGD(model, lr=0.25, criterion=criterion, damping=0.0)
        for _ in range(5):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        results.append(flat(model))
    assert (results[0] - results[1]).norm() < 1e-4 * results[1].norm()


@pytest.mark.parametrize(
    "name", ["two_heads", "tied", "lstm", "layer_norm", "weight_norm", "batchnorm_eval", "branching", "old_style_function"]
)
def test_one_full_step_of_many_models_is_the_pseudoinverse(name):
    model, x = make(name)
    d = dense_jacobian(model, x)
    before = flat(model)
    optimizer = AdaptedGD(model, lr=0.1)
    leaves = [t for t in torch.utils._pytree.tree_leaves(model(x)) if isinstance(t, torch.Tensor)]
    sum((t.square().sum() for t in leaves), start=torch.zeros(())).backward()
    g = torch.cat([2 * t.detach().reshape(len(x), -1) for t in leaves], 1).reshape(-1)
    optimizer.step()
    expected = -0.1 * torch.linalg.pinv(d, rtol=1e-7) @ g
    assert (flat(model) - before - expected).norm() < 1e-8 * max(1.0, float(expected.norm()))


def test_the_report_names_how():
    model, x, y = problem("tanh, K > QN", "mse mean")
    criterion = nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion, damping=0.0)
    assert optimizer.last_step is None
    criterion(model(x), y).backward()
    optimizer.step()
    report = optimizer.last_step
    assert (report.kernel, report.solver, report.status) == ("structured", "eigh", "full_rank")
    assert report.curvature == pytest.approx(2 / 18)
    assert report.projected_fraction == pytest.approx(1.0)
    d = dense_jacobian(problem("tanh, K > QN", "mse mean")[0], x)
    assert report.condition == pytest.approx(float(torch.linalg.cond(d)), rel=1e-8)
    assert math.isfinite(report.damping)
