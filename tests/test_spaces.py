"""Sample space against parameter space, and both against dense algebra: damping, momentum, metric."""

import copy
import itertools

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, ConjugateGradients, Dense
from torch_adapted_gd.jacobian import gram

from .cases import MSE, TwoHeads, cnn, dense_jacobian, flat, mlp, move, pairwise

MODELS = {
    "K > QN": (lambda: mlp(), (6, 4)),
    "K < QN": (lambda: mlp(sizes=(4, 3, 3)), (20, 4)),
    "cnn": (cnn, (4, 1, 8, 8)),
    "tied duplicates": (lambda: mlp(sizes=(4, 3, 3)), (6, 4)),
}
OPTIONS = {
    "plain": {},
    "damped": {"damping": 1e-2},
    "momentum": {"damping": 1e-3, "momentum": 0.8},
    "momentum, undamped": {"momentum": 0.5},
    "homotopy": {"damping": 1e-2, "alpha": 0.5, "weight_decay": 1e-2},
}


def setting(name, criterion):
    build, shape = MODELS[name]
    model, x = build().double(), torch.randn(shape, dtype=torch.float64)
    if "duplicates" in name:
        x[3:] = x[:3]
    q = len(model(x[:1])[0])
    y = torch.randint(q, (len(x),)) if isinstance(criterion, nn.CrossEntropyLoss) else torch.randn(len(x), q).double()
    return model, x, y


def train(model, x, y, criterion, steps=5, **options):
    optimizer = AdaptedGD(model, criterion=criterion, **{"damping": 0.0, **options})
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return optimizer


def rounding_of_the_identity(model, x, y, criterion, damping):
    """n ε |Θ| |ψ|² / |Dᵀψ|²: what of g is out of reach is |P⊥g|/λ long in ψ, and only rounding in ψᵀΘψ and in Dᵀψ."""
    theta = dense_jacobian(model, x)
    theta = theta @ theta.T
    outputs = model(x).detach().requires_grad_()
    g = torch.autograd.grad(criterion(outputs, y), outputs)[0].reshape(-1)
    shift = damping * theta.diagonal().mean()
    psi = torch.linalg.pinv(theta + shift * torch.eye(len(g), dtype=g.dtype), rtol=1e-9, hermitian=True) @ g
    return len(g) * 2.0**-52 * torch.linalg.matrix_norm(theta, 2) * psi.square().sum() / (psi @ theta @ psi)


@pytest.mark.parametrize(
    ("name", "criterion", "metric", "options"),
    pairwise(MODELS, [nn.MSELoss(), nn.CrossEntropyLoss()], ["euclidean", "ggn"], OPTIONS),
)
def test_both_spaces_give_the_same_steps(name, criterion, metric, options):
    model, x, y = setting(name, criterion)
    # Undamped Newton steps of cross-entropy run away from separable data: its minimum is at infinity.
    steps = 5 if metric == "euclidean" or isinstance(criterion, nn.MSELoss) or options == "homotopy" else 2
    ends, reports = [], []
    for space in ("sample", "parameter"):
        copied = copy.deepcopy(model)
        optimizer = train(copied, x, y, criterion, steps, lr=0.3, metric=metric, solver=Dense(space=space), **OPTIONS[options])
        ends.append(flat(copied))
        reports.append(optimizer.last_step)
        assert optimizer.last_step.space == space
    start = flat(model)
    moved = (ends[0] - start).norm()
    # Squaring D costs κ² ε of the step, and the last steps amplify what the first ones left.
    kappa = max(report.condition for report in reports) if "undamped" in options or options == "plain" else 1e2
    assert (ends[0] - ends[1]).norm() <= 1e-12 * kappa**2 * moved
    damping = OPTIONS[options].get("damping", 0.0)
    first, second = reports
    assert first.rank == second.rank
    assert first.status == second.status
    assert first.num_params == len(start)
    assert first.damping == pytest.approx(second.damping)
    assert first.condition == pytest.approx(second.condition, rel=0.5)
    # S⁺g leaves out what g has in directions of hardly any curvature, and Dᵀg does not: once classes are sure it shows.
    assert first.projected_fraction == pytest.approx(second.projected_fraction, abs=1e-5 if metric == "euclidean" else 1e-3)
    assert max(first.identity_gap, second.identity_gap) <= 1e-13 * kappa**2 + rounding_of_the_identity(
        copied, x, y, criterion, damping
    )
    automatic = train(copy.deepcopy(model), x, y, criterion, steps=1, lr=0.3).last_step
    assert automatic.space == ("parameter" if automatic.num_params < automatic.num_outputs else "sample")


@pytest.mark.parametrize(("name", "metric", "space"), pairwise(MODELS, ["euclidean", "ggn"], ["sample", "parameter"]))
def test_damped_steps_with_momentum_equal_dense_ones(name, metric, space):
    """φ = (DᵀHD + λ)⁻¹Dᵀ(g − μHDφ₋) + μφ₋, in units of the loss's curvature."""
    criterion = nn.CrossEntropyLoss()
    model, x, y = setting(name, criterion)
    reference = copy.deepcopy(model)
    lam = 0.3
    optimizer = AdaptedGD(
        model, lr=0.4, criterion=criterion, damping=lam, momentum=0.7, metric=metric, solver=Dense(space=space)
    )
    momentum = torch.zeros(len(flat(model)), dtype=torch.float64)
    n = len(x)
    for _ in range(3):
        d, outputs = dense_jacobian(reference, x), reference(x).detach().requires_grad_()
        g = torch.autograd.grad(criterion(outputs, y), outputs)[0].reshape(-1)
        p = outputs.detach().softmax(1)
        exact = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p)) / n
        h = exact if metric == "ggn" else torch.eye(len(g), dtype=torch.float64) * 0.5 / n
        gram = d.T @ h @ d
        scale = 1.0 if metric == "ggn" else 0.5 / n  # Θ is not multiplied by c in the Euclidean metric
        shift = lam * gram.trace() / scale / len(g)
        right = d.T @ (g - 0.7 * h @ d @ momentum)
        eye = torch.eye(len(momentum), dtype=torch.float64)
        momentum = torch.linalg.solve(gram / scale + shift * eye, right / scale) + 0.7 * momentum
        move(reference, -0.4 * momentum)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        assert (flat(model) - flat(reference)).norm() <= 1e-9 * flat(reference).norm()
    state = torch.cat([optimizer.state[p]["momentum"].reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(state, momentum, rtol=1e-7, atol=1e-9 * float(momentum.norm()))


@pytest.mark.parametrize("metric", ["euclidean", "ggn"])
def test_all_solvers_damp_alike_where_the_loss_selects_outputs(metric):
    """λ is relative to the mean of diag Θ over the outputs that the loss depends on, with and without a matrix."""
    selected = torch.rand(6, 3) < 0.5
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    start, found = mlp().double(), []
    for solver in (Dense(space="sample"), Dense(space="parameter"), ConjugateGradients(rtol=1e-13, max_iter=500)):
        model = copy.deepcopy(start)
        optimizer = AdaptedGD(model, criterion=MSE, damping=1e-2, metric=metric, solver=solver)
        MSE(model(x)[selected], y[selected]).backward()
        optimizer.step()
        assert optimizer.last_step.num_outputs == int(selected.sum())
        found.append(flat(model) - flat(start))
    for other in found[1:]:
        assert (other - found[0]).norm() <= 1e-9 * found[0].norm()


@pytest.mark.parametrize("space", ["sample", "parameter"])
def test_ggn_is_euclidean_for_squared_losses(space):
    model, x, y = setting("K > QN", MSE)
    ends = []
    for metric in ("euclidean", "ggn"):
        copied = copy.deepcopy(model)
        train(copied, x, y, MSE, lr=0.5, damping=1e-3, metric=metric, solver=Dense(space=space))
        ends.append(flat(copied))
    assert (ends[0] - ends[1]).norm() <= 1e-10 * ends[0].norm()


def test_ggn_of_a_pytree_of_outputs():
    """One criterion for each head: the Hessian is that of their sum."""
    model, criterion = TwoHeads().double(), nn.CrossEntropyLoss()
    x, first, rest = torch.randn(5, 4, dtype=torch.float64), torch.randint(2, (5,)), torch.randint(3, (5, 1))
    reference = copy.deepcopy(model)
    optimizer = AdaptedGD(model, lr=1.0, criterion=criterion, damping=1e-2, metric="ggn")
    outputs = model(x)
    (criterion(outputs["first"], first) + criterion(outputs["rest"][0], rest)).backward()
    optimizer.step()
    d = dense_jacobian(reference, x)
    leaves = [reference(x)["first"].detach(), reference(x)["rest"][0].detach().squeeze(2)]
    blocks, g = [], []
    for i in range(5):
        for z, y in zip(leaves, (first, rest[:, 0]), strict=True):
            p = z[i].softmax(0)
            blocks.append((torch.diag(p) - torch.outer(p, p)) / 5)
            g.append((p - nn.functional.one_hot(y[i], len(p))) / 5)
    h, g = torch.block_diag(*blocks), torch.cat(g)
    gram = d.T @ h @ d
    shift = 1e-2 * gram.trace() / len(g)
    expected = flat(reference) - torch.linalg.solve(gram + shift * torch.eye(len(gram), dtype=torch.float64), d.T @ g)
    assert (flat(model) - expected).norm() <= 1e-9 * expected.norm()


def test_parameter_space_never_holds_the_jacobian(monkeypatch):
    model = mlp(sizes=(4, 6, 2)).double()
    x, y = torch.randn(500, 4, dtype=torch.float64), torch.randn(500, 2, dtype=torch.float64)
    sizes = []
    original = gram.add_gram
    monkeypatch.setattr("torch_adapted_gd.jacobian.operator.ROWS_ELEMENTS", 1000)

    def spy(total, rows, *rest):
        sizes.append(rows.shape)
        original(total, rows, *rest)

    monkeypatch.setattr("torch_adapted_gd.jacobian.operator.add_gram", spy)
    expected = copy.deepcopy(model)
    train(model, x, y, MSE, steps=2, damping=1e-3)
    assert len(sizes) == 2 * 46  # 11 samples, 22 rows of 44 entries each, at a time
    assert max(k * rows for k, rows in sizes) <= 1000
    monkeypatch.undo()
    train(expected, x, y, MSE, steps=2, damping=1e-3)
    assert (flat(model) - flat(expected)).norm() <= 1e-11 * flat(expected).norm()


def test_momentum_keeps_what_the_new_batch_does_not_see():
    """Undamped: the part of φ₋ outside the rows of D stays, times μ; the part within is replaced by D⁺g."""
    model = nn.Linear(5, 1, bias=False).double()
    optimizer = AdaptedGD(model, lr=0.5, momentum=0.9, criterion=MSE, damping=0.0)
    steps = []
    for i in (0, 1):
        x = torch.eye(5, dtype=torch.float64)[i : i + 1]
        optimizer.zero_grad()
        before = model.weight.detach().clone()
        MSE(model(x), torch.ones(1, 1, dtype=torch.float64)).backward()
        optimizer.step()
        steps.append(((model.weight - before) / -0.5).detach()[0])
    assert steps[0].nonzero().tolist() == [[0]]
    assert steps[1][0] == pytest.approx(0.9 * float(steps[0][0]))
    assert steps[1][1] == pytest.approx(float(before[0, 1]) - 1)


def test_options_of_the_system_are_checked():
    model = mlp()
    with pytest.raises(ValueError, match="`space` should be one of 'auto', 'sample', 'parameter', but got 'output'"):
        Dense(space="output")
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="`momentum` should be at least 0 and below 1, but got"):
            AdaptedGD(model, momentum=bad)
    with pytest.raises(TypeError, match="`momentum` should be a number, but got '0.9'"):
        AdaptedGD(model, momentum="0.9")
    layers = [m for m in model if isinstance(m, nn.Linear)]
    groups = [{"params": layer.parameters(), "momentum": mu} for layer, mu in zip(layers, itertools.count(0.1), strict=False)]
    with pytest.raises(ValueError, match="`momentum` should be the same in all parameter groups"):
        AdaptedGD(model, params=[{**group, "momentum": i / 10} for i, group in enumerate(groups)])
