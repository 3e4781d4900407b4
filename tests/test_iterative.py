"""Steps by conjugate gradients with the optimizer's other options, and where systems are singular in ways of their own."""

import copy

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, ConjugateGradients, HalfSquaredLoss, output_jacobian

from .cases import mlp


def made(dtype=torch.float64):
    """A network with more parameters, 7,950, than outputs, 2,000."""
    torch.manual_seed(0)
    model = mlp(sizes=(30, 80, 60, 10)).to(dtype)
    return model, torch.randn(200, 30, dtype=dtype), torch.randn(200, 10, dtype=dtype)


def moved(model, calls, criterion=None, **options):
    """The step φ, flat, of one or more calls, and its report."""
    model = copy.deepcopy(model)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = AdaptedGD(model, criterion=criterion, **options)
    loss = sum(0.5 * (model(x) - y).square().sum() if criterion is None else criterion(model(x), y) for x, y in calls)
    loss.backward()
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return (before - after).double(), optimizer.last_step


def relative(a, b):
    return float((a - b).norm() / b.norm())


EXACT = ConjugateGradients(rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_undamped_steps_of_full_rank_equal_the_pseudoinverse(dtype):
    model, x, y = (made(dtype)[0], *(t[:100] for t in made(dtype)[1:]))
    step, report = moved(model, [(x, y)], damping=0.0, solver=EXACT)
    precise = copy.deepcopy(model).double()
    jacobian = output_jacobian(precise, x.double())
    expected = torch.linalg.pinv(jacobian) @ (precise(x.double()) - y.double()).detach().flatten()
    assert report.status == "converged"
    assert relative(step, expected) < (1e-8 if dtype == torch.float64 else 1e-3)  # θ itself is rounded to float32
    assert report.projected_fraction == pytest.approx(1)


HARD = {
    "dead units": lambda: (nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 4)), 60),
    "fewer parameters than outputs": lambda: (nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 4)), 60),
    "single precision": lambda: (mlp(sizes=(6, 8, 8, 4)).float(), 100),
}


@pytest.mark.filterwarnings("ignore:Conjugate gradients did not converge")
@pytest.mark.parametrize("iterations", [5, 400])
@pytest.mark.parametrize("name", HARD)
def test_never_silently_wrong(name, iterations):
    torch.manual_seed(0)
    model, n = HARD[name]()
    if name != "single precision":
        model = model.double()
        model[0].bias.data -= 1.0
    x = torch.randn(n, 6, dtype=next(model.parameters()).dtype)
    x[n // 2 :] = x[: n - n // 2]
    y = torch.randn_like(model(x))
    step, report = moved(model, [(x, y)], damping=0.0, solver=ConjugateGradients(rtol=1e-2, max_iter=iterations))
    assert report.iterations <= iterations + 1
    assert step.isfinite().all()
    if report.status in ("converged", "rank_deficient"):
        jacobian = output_jacobian(copy.deepcopy(model).double(), x.double())
        g = (model(x) - y).detach().double().flatten()
        values, vectors = torch.linalg.eigh(jacobian @ jacobian.T)
        values.clamp_(min=0)
        zero = 1e-8 * float(values.mean())  # what is near that may count or not: one solution, or many
        errors = [(vectors.T @ (jacobian @ step)) - (1 - (zero / (values + zero)) ** k) * (vectors.T @ g) for k in range(1, 9)]
        assert min(error.norm() for error in errors) <= 2e-2 * g.norm()
    else:
        assert report.status == "not_converged"


@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"momentum": 0.9}])
def test_with_other_options(options):
    model, x, y = made()
    steps = []
    for solver in (EXACT, "auto"):
        twin = copy.deepcopy(model)
        optimizer = AdaptedGD(twin, lr=0.1, damping=1e-2, solver=solver, **options)
        for _ in range(3):
            optimizer.zero_grad()
            (0.5 * (twin(x) - y).square().sum()).backward()
            optimizer.step()
        steps.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    assert relative(steps[0], steps[1]) < 1e-8


def test_the_metric_of_the_loss():
    model, x, _ = made()
    labels = torch.randint(10, (len(x),), generator=torch.Generator().manual_seed(0))
    criterion = nn.CrossEntropyLoss()
    options = {"criterion": criterion, "metric": "ggn", "damping": 1e-2}
    step, report = moved(model, [(x, labels)], solver=EXACT, **options)
    assert relative(step, moved(model, [(x, labels)], **options)[0]) < 1e-6
    others = moved(model, [(x, labels)], solver=ConjugateGradients(1e-11, preconditioner="samples"), **options)[1]
    assert report.iterations < 0.5 * others.iterations  # as the blocks are weighed like the system


def test_the_default_policy():
    model, x, y = made()
    losses = []
    for solver in (ConjugateGradients(rtol=1e-10), "auto"):
        twin = copy.deepcopy(model)
        optimizer = AdaptedGD(twin, criterion=HalfSquaredLoss(), solver=solver)
        for _ in range(4):
            loss = optimizer.full_batch([(x, y)])
        losses.append(loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_step_that_fails_changes_nothing():
    model, x, y = made()
    optimizer = AdaptedGD(model, solver=ConjugateGradients(), damping=1e-3)
    before = copy.deepcopy(model.state_dict())
    (model(x) - y).square().sum().backward()
    optimizer._recorder.calls[0].gradients[0][0] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"solver": ConjugateGradients}, TypeError, "but got the class. Write ConjugateGradients()"),
        ({"solver": 3}, TypeError, '`solver` should be "auto", Dense() or ConjugateGradients(), but got 3'),
    ],
)
def test_options_that_do_not_go_together(options, error, text):
    with pytest.raises(error) as caught:
        AdaptedGD(nn.Linear(2, 2), **options)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rtol": 0.0}, ValueError),
        ({"rtol": "small"}, TypeError),
        ({"max_iter": 0}, ValueError),
        ({"preconditioner": "ilu"}, ValueError),
        ({"warm_start": 1}, TypeError),
    ],
)
def test_options_of_conjugate_gradients(options, error):
    with pytest.raises(error, match=f"`{next(iter(options))}` should be"):
        ConjugateGradients(**options)
