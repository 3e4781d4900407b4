"""Steps by conjugate gradients against the dense float64 route."""

import copy
import math

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, ConjugateGradients, Dense, HalfSquaredLoss, LevenbergMarquardt
from torch_adapted_gd.solve.krylov import solve_by_cg
from torch_adapted_gd.solve.preconditioner import OutputBlockInverse
from torch_adapted_gd.step.system import choose_solver

from .cases import cnn, dense_jacobian, flat, mlp, pairwise
from .layers import LAYERS
from .networks import VisionTransformer

HALF, CE = HalfSquaredLoss(), nn.CrossEntropyLoss()
TIGHT = ConjugateGradients(rtol=1e-10, max_iter=3000)
DOUBLE = torch.float64


class Widths(nn.Module):
    """As many outputs as inputs, whatever their number."""

    def __init__(self):
        super().__init__()
        self.layer, self.mix = nn.Linear(1, 20), nn.Linear(20, 20)

    def forward(self, x):
        return torch.sin(2 * self.mix(torch.tanh(self.layer(x.unsqueeze(2))))).cumsum(1).sum(2)


def normed():
    return LAYERS["batch_norm_eval"][0]()


# name -> (model, shape of the inputs)
MODELS = {
    "mlp": (lambda: mlp(sizes=(8, 30, 30, 3)), (20, 8)),
    "relu": (lambda: mlp(nn.ReLU, sizes=(8, 60, 30, 3)), (40, 8)),
    "cnn": (lambda: cnn(), (10, 1, 8, 8)),
    "vision transformer": (VisionTransformer, (8, 1, 4, 4)),
    "batch norm in eval mode": (normed, (4, 4)),
}


def of(name, dtype=DOUBLE, criterion=HALF):
    build, shape = MODELS[name]
    model, x = build().to(dtype), torch.randn(shape, dtype=dtype)
    q = model(x).shape[1]
    return model, x, torch.randint(q, (len(x),)) if criterion is CE else torch.randn(len(x), q, dtype=dtype)


def output_gradient(model, x, y, criterion=HALF):
    outputs = model(x).detach().requires_grad_()
    return torch.autograd.grad(criterion(outputs, y), outputs)[0].reshape(-1).double()


def stepped(model, batches, steps=1, criterion=HALF, **options):
    """A copy of the model after some steps; its optimizer."""
    model = copy.deepcopy(model)
    optimizer = AdaptedGD(model, **{"criterion": criterion, "lr": 0.5, "damping": 1e-3, **options})
    for _ in range(steps):
        optimizer.zero_grad()
        for x, y in batches:
            (criterion(model(x), y) / len(batches)).backward()
        optimizer.step()
    return model, optimizer


def assert_like_dense(model, batches, tolerance=1e-6, steps=1, solver=TIGHT, **options):
    """Dᵀψ of the first step, or where some lead, is that of the default solver; returns the last report."""
    expected, dense = stepped(model, batches, steps, solver=Dense(space="sample"), **options)
    found, optimizer = stepped(model, batches, steps, solver=solver, **options)
    moved = flat(expected) - flat(model)
    assert moved.norm() > 0
    assert (flat(found) - flat(expected)).norm() <= tolerance * moved.norm()
    report = optimizer.last_step
    assert report.status == "converged"
    assert report.damping == pytest.approx(dense.last_step.damping, rel=1e-6)
    return report


@pytest.mark.parametrize(
    ("preconditioner", "damping"), [("outputs", 1e-3), ("samples", 1e-3), ("none", 1e-3), ("outputs", 1e-6)]
)
def test_two_hundred_samples(preconditioner, damping):
    model = mlp(sizes=(64, 80, 60, 10)).double()
    batch = torch.rand(200, 64, dtype=DOUBLE), torch.randn(200, 10, dtype=DOUBLE)
    # The motion of the outputs is within the tolerance; that of the parameters, by up to 1/σ worse.
    report = assert_like_dense(model, [batch], solver=ConjugateGradients(1e-10, 5000, preconditioner), damping=damping)
    names = {"outputs": "cg (output blocks)", "samples": "cg (sample blocks)", "none": "cg (none)"}
    assert report.solver == names[preconditioner]


@pytest.mark.parametrize(
    ("name", "damping", "preconditioner"), pairwise(MODELS, [0.0, 1e-6, 1e-3], ["outputs", "samples", "none"])
)
def test_the_step_is_the_dense_one(name, damping, preconditioner):
    if name == "vision transformer" and damping == 0:
        pytest.skip("its singular values have no gap at which to cut")
    model, x, y = of(name)
    assert_like_dense(model, [(x, y)], solver=ConjugateGradients(1e-9, 3000, preconditioner), damping=damping)


@pytest.mark.parametrize("metric", ["euclidean", "ggn"])
@pytest.mark.parametrize("parts", [1, 3])
def test_cross_entropy_and_metrics(metric, parts):
    model, x, y = of("mlp", criterion=CE)
    batches = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
    report = assert_like_dense(model, batches, criterion=CE, metric=metric)
    assert report.num_calls == parts


@pytest.mark.parametrize("options", [{"momentum": 0.7}, {"alpha": 0.5}, {"damping": LevenbergMarquardt()}])
def test_other_options(options):
    model, x, y = of("mlp")
    assert_like_dense(model, [(x, y)], steps=3, lr=0.3, **options)


def test_blocks_are_weighed_like_the_system():
    model, x, y = of("mlp", criterion=CE)
    options = {"criterion": CE, "metric": "ggn", "damping": 1e-2}
    solvers = ConjugateGradients(1e-11), ConjugateGradients(1e-11, preconditioner="samples")
    blocks, samples = (stepped(model, [(x, y)], solver=solver, **options)[1].last_step for solver in solvers)
    assert blocks.iterations < 0.5 * samples.iterations


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_undamped_steps_of_full_rank_equal_the_pseudoinverse(dtype):
    model, x, y = mlp(sizes=(30, 80, 60, 10)).to(dtype), torch.randn(100, 30, dtype=dtype), torch.randn(100, 10, dtype=dtype)
    d, g = dense_jacobian(model, x), output_gradient(copy.deepcopy(model).double(), x.double(), y.double())
    expected = 100 * torch.linalg.pinv(d) @ g  # η = lr/c, c = 1/N
    moved, optimizer = stepped(model, [(x, y)], solver=ConjugateGradients(1e-11), damping=0.0, lr=1.0)
    step = (flat(model) - flat(moved)).double()
    assert optimizer.last_step.status == "converged"
    assert optimizer.last_step.projected_fraction == pytest.approx(1)
    assert (step - expected).norm() < (1e-8 if dtype == torch.float64 else 1e-3) * expected.norm()  # θ is rounded to float32


@pytest.mark.parametrize("preconditioner", ["outputs", "samples", "none"])
@pytest.mark.parametrize("metric", ["euclidean", "ggn"])
def test_calls_with_different_numbers_of_outputs(preconditioner, metric):
    model = Widths().double()
    batches = [(torch.randn(n, q, dtype=DOUBLE), torch.randn(n, q, dtype=DOUBLE)) for n, q in ((5, 3), (4, 2), (2, 3))]
    solver = ConjugateGradients(1e-10, 3000, preconditioner)
    assert assert_like_dense(model, batches, solver=solver, metric=metric).num_outputs == 29


@pytest.mark.parametrize("preconditioner", ["outputs", "samples", "none"])
def test_duplicated_inputs_with_targets_that_contradict_each_other(preconditioner):
    model, x, y = of("mlp")
    x[10:] = x[:10]
    d, g = dense_jacobian(model, x), output_gradient(model, x, y)
    expected = torch.linalg.pinv(d, rtol=1e-7) @ g
    solver = ConjugateGradients(rtol=1e-6, max_iter=5000, preconditioner=preconditioner)
    moved, optimizer = stepped(model, [(x, y)], solver=solver, damping=0.0, lr=1.0)
    step = (flat(model) - flat(moved)) / 20  # η = lr/c, c = 1/N
    report = optimizer.last_step
    assert report.status == "rank_deficient"
    assert (step - expected).norm() <= 1e-6 * expected.norm()
    assert (d @ (step - expected)).norm() <= 1e-6 * g.norm()
    assert report.projected_fraction == pytest.approx(float((d @ expected).norm() / g.norm()), abs=1e-6)


def test_blocks_are_shared_where_memory_is_short(monkeypatch):
    model, x, y = of("mlp")
    seen = []

    def inverse(blocks, *args):
        seen.append(len(blocks))
        return OutputBlockInverse(blocks, *args)

    monkeypatch.setattr("torch_adapted_gd.step.iterative.OutputBlockInverse", inverse)
    for room, blocks in ((6, [3]), (5.1, [2]), (4.1, [1])):
        seen.clear()
        monkeypatch.setattr(
            "torch_adapted_gd.step.iterative.available_bytes", lambda device, room=room: room * 4 * 20**2 / 0.6 + 1
        )
        assert assert_like_dense(model, [(x, y)]).solver == "cg (output blocks)"
        assert seen == blocks
    monkeypatch.setattr("torch_adapted_gd.step.iterative.available_bytes", lambda device: 3.5 * 4 * 20**2 / 0.6)
    assert assert_like_dense(model, [(x, y)]).solver == "cg (sample blocks)"
    monkeypatch.setattr("torch_adapted_gd.step.iterative.available_bytes", lambda device: None)
    seen.clear()
    assert assert_like_dense(model, [(x, y)]).solver == "cg (output blocks)"
    assert seen == [3]


def test_too_few_iterations_are_told_once():
    model, x, y = of("mlp")
    solver = ConjugateGradients(rtol=1e-10, max_iter=2, preconditioner="none", warm_start=False)
    optimizer = AdaptedGD(model, criterion=HALF, damping=1e-6, solver=solver, lr=0.1)

    def step():
        optimizer.zero_grad()
        HALF(model(x), y).backward()
        optimizer.step()

    with pytest.warns(UserWarning, match=r"Conjugate gradients did not converge: after 2 iterations the residual is") as seen:
        step()
    assert len(seen) == 1
    step()  # a second warning would be an error
    assert optimizer.last_step.status == "not_converged"
    assert optimizer.last_step.iterations == 2
    assert optimizer.last_step.residual > 1e-10
    assert torch.isfinite(flat(model)).all()


@pytest.mark.parametrize("iterations", [3, 1000])
@pytest.mark.filterwarnings("ignore:Conjugate gradients did not converge")
def test_the_report_is_true(iterations):
    model, x, y = of("mlp")
    d, g = dense_jacobian(model, x), output_gradient(model, x, y)
    solver = ConjugateGradients(1e-6, iterations, "samples")
    moved, optimizer = stepped(model, [(x, y)], solver=solver, lr=1.0)
    report = optimizer.last_step
    psi = optimizer.state[next(moved.parameters())]["psi"].double()
    theta = d @ d.T
    shift = 1e-3 * float(theta.diagonal().mean())
    assert report.damping == pytest.approx(shift, rel=1e-9)
    assert report.residual == pytest.approx(float((g - theta @ psi - shift * psi).norm() / g.norm()), rel=1e-6)
    assert (report.residual <= 1e-6) == (report.status == "converged") == (iterations == 1000)
    exact = theta @ torch.linalg.solve(theta + shift * torch.eye(len(g), dtype=DOUBLE), g)
    motion = d @ (flat(model) - flat(moved)) / 20
    assert (motion - exact).norm() <= report.residual * g.norm() * (1 + 1e-6)
    assert report.projected_fraction == pytest.approx(min(1.0, float(motion.norm() / g.norm())))
    assert report.identity_gap < 1e-9
    assert report.rank is None
    assert not report.full_rank
    assert math.isnan(report.condition)
    assert 0 < report.iterations <= iterations
    assert (report.fraction, report.space, report.num_trials) == (1.0, "sample", 1)
    assert report.seconds.keys() == {"factors", "preconditioner", "iterations"}
    assert all(value >= 0 for value in report.seconds.values())


def test_other_solvers_report_no_iterations():
    model, x, y = of("mlp")
    report = stepped(model, [(x, y)])[1].last_step
    assert (report.iterations, report.seconds, report.fraction) == (0, {}, 1.0)
    assert report.residual is None
    assert isinstance(report.rank, int)


@pytest.mark.parametrize("zero", ["g", "kernel"])
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_nothing_to_do(zero, damping):
    model, x, y = of("mlp")
    if zero == "g":
        y = model(x).detach()
    else:
        model = nn.Sequential(nn.Linear(8, 3), nn.ReLU()).double()
        nn.init.constant_(model[0].bias, -100.0)
    moved, optimizer = stepped(model, [(x, y)], solver=ConjugateGradients(), damping=damping)
    report = optimizer.last_step
    assert torch.equal(flat(moved), flat(model))
    assert (report.status, report.iterations, report.residual) == ("converged", 0, 0.0) or zero == "kernel"
    assert report.rank is None


def test_warm_start_helps_and_changes_nothing():
    model, x, y = of("mlp")
    found = {}
    for warm in (False, True):
        solver = ConjugateGradients(1e-9, 3000, "samples", warm)
        moved, optimizer = stepped(model, [(x, y)], steps=4, solver=solver, lr=0.01)
        assert ("psi" in optimizer.state[next(moved.parameters())]) == warm
        found[warm] = flat(moved), optimizer.last_step.iterations
    change = found[False][0] - flat(model)
    assert (found[True][0] - found[False][0]).norm() <= 1e-6 * change.norm()
    assert found[True][1] < found[False][1]


def test_another_number_of_outputs_is_no_start():
    model, x, y = of("mlp")
    optimizer = AdaptedGD(model, criterion=HALF, damping=1e-3, solver=TIGHT)
    for n in (20, 7, 12):
        before, twin = flat(model), copy.deepcopy(model)
        optimizer.zero_grad()
        HALF(model(x[:n]), y[:n]).backward()
        optimizer.step()
        expected, _ = stepped(twin, [(x[:n], y[:n])], lr=1.0)
        assert (flat(model) - flat(expected)).norm() <= 1e-6 * (flat(expected) - before).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_goes_on_to_the_bit(dtype):
    model, x, y = of("mlp", dtype)
    solver = ConjugateGradients(rtol=1e-3)
    batches = [(x, y)]
    model, optimizer = stepped(model, batches, steps=2, solver=solver, lr=0.1)
    twin = copy.deepcopy(model)
    again = AdaptedGD(twin, criterion=HALF, solver=solver, damping=0.0)  # not its default, a policy
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh = copy.deepcopy(model)
    without = AdaptedGD(fresh, criterion=HALF, solver=solver, lr=0.1, damping=1e-3)
    for net, its in ((model, optimizer), (twin, again), (fresh, without)):
        for _ in range(2):
            its.zero_grad()
            HALF(net(x), y).backward()
            its.step()
    assert torch.equal(flat(model), flat(twin))
    assert not torch.equal(flat(model), flat(fresh))  # the state matters


def test_a_step_that_fails_changes_nothing():
    model, x, y = of("mlp")
    optimizer = AdaptedGD(model, solver=ConjugateGradients(), damping=1e-3)
    before = flat(model)
    HALF(model(x), y).backward()
    optimizer._recorder.calls[0].gradients[0][0] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    assert torch.equal(flat(model), before)


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("solver", "params", "rows", "free", "expected"),
    [
        (None, 10**6, 8192, None, "sample"),
        (None, 10**6, 8193, None, "cg"),
        (None, 8192, 10**6, None, "parameter"),
        (None, 8193, 10**6, None, "cg"),
        (Dense(space="sample"), 100, 8193, None, "sample"),
        (Dense(space="sample"), 100, 8192, None, "sample"),
        (Dense(space="parameter"), 10**5, 10**5, None, "parameter"),
        (Dense(rtol=1e-3), 10**5, 10**5, None, "sample"),
        (Dense(factorization="eigh"), 10**5, 10**5, None, "sample"),
        (None, 10**6, 8000, 40 * 8000**2, "sample"),
        (None, 10**6, 8000, 40 * 8000**2 - 1, "cg"),
        (Dense(rtol=1e-3), 10**6, 8000, 1, "sample"),
        (None, 10**6, 1000, 1, "sample"),  # too little to ask for
        (ConjugateGradients(), 2, 2, None, "cg"),
        (ConjugateGradients(), 10**6, 10**6, None, "cg"),
    ],
)
def test_who_solves(solver, params, rows, free, expected, monkeypatch):
    monkeypatch.setattr("torch_adapted_gd.memory.available_bytes", lambda device: free)
    space, found = choose_solver(solver, params, rows, CPU, local=True)
    assert (space, found) == (("sample", ConjugateGradients()) if expected == "cg" else (expected, solver or Dense()))


def test_the_optimizer_turns_to_conjugate_gradients_by_size(monkeypatch):
    model, x, y = of("mlp")
    monkeypatch.setattr("torch_adapted_gd.step.system.DENSE", 59)
    assert stepped(model, [(x, y)])[1].last_step.solver == "cg (output blocks)"
    assert stepped(model, [(x, y)], solver=Dense(rtol=1e-9))[1].last_step.solver == "eigh"
    assert stepped(model, [(x, y)], solver=Dense(space="parameter"))[1].last_step.space == "parameter"
    monkeypatch.setattr("torch_adapted_gd.step.system.DENSE", 60)
    assert stepped(model, [(x, y)])[1].last_step.solver == "eigh"


@pytest.mark.parametrize("shift", [0.0, 1e-3])
@pytest.mark.parametrize("start", [None, 1.0, -3.0])
def test_one_iteration_for_each_eigenvalue(shift, start):
    """Without a preconditioner, and from no start or a multiple of the solution, which needs none."""
    values = torch.tensor([1.0, 2.0, 5.0], dtype=DOUBLE).repeat(4)
    g = torch.randn(12, dtype=DOUBLE)
    exact = g / (values + shift)
    found = solve_by_cg(
        lambda v: values * v,
        g,
        shift=shift,
        scale=float(values.mean()),
        precondition=lambda mu: torch.clone,
        options=ConjugateGradients(rtol=1e-12),
        start=None if start is None else start * exact,
    )
    torch.testing.assert_close(found.psi, exact)
    torch.testing.assert_close(found.image, values * exact)
    assert found.converged
    assert found.iterations == (3 if start is None else 1)


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
def test_bad_options(options, error):
    with pytest.raises(error, match=f"`{next(iter(options))}` should be"):
        ConjugateGradients(**options)


@pytest.mark.parametrize(("max_iter", "converged"), [(36, False), (100, True)])
def test_a_singular_system_settles_or_says_that_it_has_not(max_iter, converged):
    values = torch.tensor([1.0, 2.0, 5.0, 0.0], dtype=DOUBLE).repeat(3)
    g = torch.randn(12, dtype=DOUBLE)
    found = solve_by_cg(
        lambda v: values * v,
        g,
        shift=0.0,
        scale=float(values.mean()),
        precondition=lambda mu: torch.clone,
        options=ConjugateGradients(rtol=1e-6, max_iter=max_iter),
    )
    assert found.singular
    assert found.converged == converged
    if converged:
        assert (found.image - torch.where(values > 0, g, 0.0)).norm() <= 1e-6 * g.norm()


def test_a_singular_value_at_the_shift_comes_within_reach_round_by_round():
    """Each round halves what is left of it: ten until it is a thousandth."""
    values, g = torch.tensor([1.0, 2.0, 5.0, 0.0, 2e-8], dtype=DOUBLE), torch.ones(5, dtype=DOUBLE)
    found = solve_by_cg(
        lambda v: values * v,
        g,
        shift=0.0,
        scale=2.0,
        precondition=lambda mu: torch.clone,
        options=ConjugateGradients(rtol=1e-3),
    )
    assert found.singular
    assert found.converged
    assert (found.image - torch.where(values > 0, g, 0.0)).norm() <= 1e-3 * g.norm()
