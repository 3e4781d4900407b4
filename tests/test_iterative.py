"""Steps by conjugate gradients, against dense ones and against pinv of the dense float64 Jacobian."""

import copy

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, ConjugateGradients, HalfSquaredLoss, output_jacobian
from torch_adapted_gd.system import choose_solver

from .cases import cnn, mlp


class Block(nn.Module):
    """A transformer's block on patches."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(self.embed(x)).mean(1))


class Widths(nn.Module):
    """As many outputs as the input has columns."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 24)
        self.head = nn.Linear(24, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x.unsqueeze(2)))).squeeze(2)


def normalized():
    model = nn.Sequential(nn.Linear(4, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 3))
    model(torch.randn(30, 4))
    return model.eval()


MODELS = {
    "mlp": (lambda: mlp(sizes=(30, 80, 60, 10)), (200, 30)),
    "relu": (lambda: mlp(nn.ReLU, sizes=(8, 60, 30, 3)), (40, 8)),
    "cnn": (cnn, (6, 1, 8, 8)),
    "vit": (Block, (20, 5, 4)),
    "batch_norm": (normalized, (16, 4)),
}


def made(name, dtype=torch.float64):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().to(dtype)
    x = torch.randn(shape, dtype=dtype)
    return model, x, torch.randn_like(model(x))


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


EXACT = ConjugateGradients(tolerance=1e-11)


@pytest.mark.parametrize("damping", [1e-2, 1e-5])
@pytest.mark.parametrize("name", MODELS)
def test_damped_steps_equal_dense_ones(name, damping):
    model, x, y = made(name)
    step, report = moved(model, [(x, y)], damping=damping, solver=EXACT)
    dense, _ = moved(model, [(x, y)], damping=damping, solver="eigh", space="sample")
    assert relative(step, dense) < 1e-6
    assert report.status == "converged"
    assert report.solver == "cg (output blocks)"
    assert report.residual <= 1e-11
    assert report.rank is None
    assert not report.full_rank
    assert set(report.seconds) == {"factors", "preconditioner", "iterations"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_undamped_steps_of_full_rank_equal_the_pseudoinverse(dtype):
    model, x, y = (made("mlp", dtype)[0], *(t[:100] for t in made("mlp", dtype)[1:]))
    step, report = moved(model, [(x, y)], damping=0.0, solver=EXACT)
    precise = copy.deepcopy(model).double()
    jacobian = output_jacobian(precise, x.double())
    expected = torch.linalg.pinv(jacobian) @ (precise(x.double()) - y.double()).detach().flatten()
    assert report.status == "converged"
    assert relative(step, expected) < (1e-8 if dtype == torch.float64 else 1e-3)  # θ itself is rounded to float32
    assert report.projected_fraction == pytest.approx(1)


def test_short_rank_gives_the_pseudoinverse():
    model, x, y = made("mlp")
    x, y = torch.cat([x[:40], x[:40]]), y[:80]  # two targets for each
    step, report = moved(model, [(x, y)], damping=0.0, solver=ConjugateGradients(tolerance=1e-6, iterations=3000))
    jacobian = output_jacobian(model, x)
    g = (model(x) - y).detach().flatten()
    expected = torch.linalg.pinv(jacobian, rtol=1e-8) @ g
    assert report.status == "rank_deficient"
    assert relative(step, expected) < 1e-6
    assert report.projected_fraction == pytest.approx(float((jacobian @ expected).norm() / g.norm()), rel=1e-6)


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
    step, report = moved(model, [(x, y)], damping=0.0, solver=ConjugateGradients(tolerance=1e-2, iterations=iterations))
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


def test_it_says_once_that_it_did_not_converge():
    model, x, y = made("mlp")
    optimizer = AdaptedGD(
        model, lr=1e-3, damping=1e-6, solver=ConjugateGradients(tolerance=1e-10, iterations=2, warm_start=False)
    )
    for first in (True, False):
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()
        if first:
            with pytest.warns(UserWarning, match="Conjugate gradients did not converge: after 2 iterations the residual is"):
                optimizer.step()
        else:
            optimizer.step()
        assert optimizer.last_step.status == "not_converged"
        assert optimizer.last_step.residual > 1e-10


@pytest.mark.parametrize("preconditioner", ["samples", "none"])
def test_other_preconditioners(preconditioner):
    model, x, y = made("mlp")
    solver = ConjugateGradients(tolerance=1e-10, iterations=5000, preconditioner=preconditioner)
    step, report = moved(model, [(x, y)], damping=1e-2, solver=solver)
    assert relative(step, moved(model, [(x, y)], damping=1e-2)[0]) < 1e-7
    assert report.solver == {"samples": "cg (sample blocks)", "none": "cg (none)"}[preconditioner]


@pytest.mark.parametrize("room", [0, 1, 4])
def test_blocks_are_shared_where_memory_is_short(room, monkeypatch):
    model, x, y = made("mlp")
    free = int((room + 3.5) * 4 * len(x) ** 2 / 0.6)
    monkeypatch.setattr("torch_adapted_gd.iterative.available_bytes", lambda _: free)
    step, report = moved(model, [(x, y)], damping=1e-3, solver=ConjugateGradients(tolerance=1e-10, iterations=2000))
    assert relative(step, moved(model, [(x, y)], damping=1e-3)[0]) < 1e-6
    assert report.solver == ("cg (output blocks)" if room else "cg (sample blocks)")


def test_calls_stack_and_may_differ_in_their_outputs():
    torch.manual_seed(0)
    model = Widths().double()
    calls = [(x, torch.randn_like(x)) for x in (torch.randn(6, 2), torch.randn(4, 3), torch.randn(5, 2))]
    calls = [(x.double(), y.double()) for x, y in calls]
    step, report = moved(model, calls, damping=1e-2, solver=EXACT, space="sample")
    assert relative(step, moved(model, calls, damping=1e-2, space="sample")[0]) < 1e-6
    assert report.num_calls == 3


@pytest.mark.parametrize("options", [{"kernel": "jacobian"}, {"chunk_size": 30}, {"alpha": 0.5}, {"momentum": 0.9}])
def test_with_other_options(options):
    model, x, y = made("mlp")
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
    model, x, _ = made("mlp")
    labels = torch.randint(10, (len(x),), generator=torch.Generator().manual_seed(0))
    criterion = nn.CrossEntropyLoss()
    options = {"criterion": criterion, "metric": "ggn", "damping": 1e-2}
    step, report = moved(model, [(x, labels)], solver=EXACT, **options)
    assert relative(step, moved(model, [(x, labels)], **options)[0]) < 1e-6
    others = moved(model, [(x, labels)], solver=ConjugateGradients(1e-11, preconditioner="samples"), **options)[1]
    assert report.iterations < 0.5 * others.iterations  # as the blocks are weighed like the system


def test_the_default_policy():
    model, x, y = made("mlp")
    losses = []
    for solver in (ConjugateGradients(tolerance=1e-10), "auto"):
        twin = copy.deepcopy(model)
        optimizer = AdaptedGD(twin, criterion=HalfSquaredLoss(), solver=solver)
        for _ in range(4):
            loss = optimizer.full_batch([(x, y)])
        losses.append(loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_nothing_to_do():
    model, x, _ = made("mlp")
    step, report = moved(model, [(x, model(x).detach())], damping=1e-3, solver="cg")
    assert step.abs().max() == 0
    assert report.status == "converged"
    assert report.iterations == 0


def test_a_warm_start_spares_iterations_and_resumes_to_the_same_bits():
    model, x, y = made("mlp", torch.float32)

    def optimizer_of(network, warm):
        return AdaptedGD(
            network, lr=0.01, criterion=HalfSquaredLoss(), damping=1e-5, solver=ConjugateGradients(1e-4, warm_start=warm)
        )

    counts = []
    for warm in (True, False):
        network = copy.deepcopy(model)
        optimizer = optimizer_of(network, warm)
        for _ in range(4):
            optimizer.full_batch([(x, y)])
        counts.append(optimizer.last_step.iterations)
        if warm:
            state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(network.state_dict())
            optimizer.full_batch([(x, y)])
            other = copy.deepcopy(model)
            other.load_state_dict(weights)
            resumed = optimizer_of(other, warm)
            resumed.load_state_dict(state)
            resumed.full_batch([(x, y)])
            assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert counts[0] < counts[1]


def test_a_step_that_fails_changes_nothing():
    model, x, y = made("mlp")
    optimizer = AdaptedGD(model, solver="cg", damping=1e-3)
    before = copy.deepcopy(model.state_dict())
    (model(x) - y).square().sum().backward()
    optimizer._recorder.calls[0].gradients[0][0] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_where_auto_takes_conjugate_gradients(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_solver("auto", "auto", None, 10**6, 8000, cpu) == ("sample", None)
    assert choose_solver("auto", "auto", None, 8000, 10**6, cpu) == ("parameter", None)
    assert choose_solver("auto", "auto", None, 10**6, 10**4, cpu) == ("sample", ConjugateGradients())
    assert choose_solver("auto", "auto", None, 10**5, 10**6, cpu) == ("sample", ConjugateGradients())
    assert choose_solver("auto", "auto", 1e-6, 10**6, 10**4, cpu) == ("sample", None)
    assert choose_solver("auto", "eigh", None, 10**6, 10**4, cpu) == ("sample", None)
    assert choose_solver("parameter", "auto", None, 10**5, 10**6, cpu) == ("parameter", None)
    assert choose_solver("auto", "cg", None, 10, 20, cpu) == ("sample", ConjugateGradients())
    monkeypatch.setattr("torch_adapted_gd.system.available_bytes", lambda _: 10**9)
    assert choose_solver("auto", "auto", None, 10**6, 6000, cpu) == ("sample", ConjugateGradients())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"solver": ConjugateGradients}, TypeError, "but got the class. Write ConjugateGradients()"),
        ({"solver": 3}, TypeError, "`solver` should be a word or a ConjugateGradients(), but got 3"),
        ({"solver": "cg", "space": "parameter"}, ValueError, "`space` should be"),
        ({"solver": ConjugateGradients(), "rtol": 1e-6}, ValueError, "`rtol` should be left out for conjugate gradients"),
    ],
)
def test_options_that_do_not_go_together(options, error, text):
    with pytest.raises(error) as caught:
        AdaptedGD(nn.Linear(2, 2), **options)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tolerance": 0.0}, ValueError),
        ({"tolerance": "small"}, TypeError),
        ({"iterations": 0}, ValueError),
        ({"preconditioner": "ilu"}, ValueError),
        ({"warm_start": 1}, TypeError),
    ],
)
def test_options_of_conjugate_gradients(options, error):
    with pytest.raises(error, match=f"`{next(iter(options))}` should be"):
        ConjugateGradients(**options)
