"""The loss as a function of the outputs, against autograd: its value, curvature, and the roots of its Hessian."""

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.utils._pytree import tree_flatten

from torch_adapted_gd import AdaptedGD, HalfSquaredLoss, LossFunction
from torch_adapted_gd.step.objective import Objective
from torch_adapted_gd.step.recorded import Recorded
from torch_adapted_gd.tracking.calls import Outputs
from torch_adapted_gd.tracking.terms import Entries, State, Term

N = 6


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def classes(*shape):
    return lambda: torch.randint(4, (N, *shape))


def normal(*shape):
    return lambda: torch.randn(N, *shape, dtype=torch.float64)


def uniform(*shape):
    return lambda: torch.rand(N, *shape, dtype=torch.float64)


CE, BCE = nn.CrossEntropyLoss, nn.BCEWithLogitsLoss
WEIGHT = double(0.2, 1, 3, 0)
LOSSES = {
    "mse": (nn.MSELoss, {}, (3,), normal(3)),
    "half squared": (HalfSquaredLoss, {}, (3, 2), normal(3, 2)),
    "cross-entropy": (CE, {}, (4,), classes()),
    "smoothed": (CE, {"label_smoothing": 0.1}, (4,), classes()),
    "probabilities": (CE, {}, (4,), lambda: uniform(4)().softmax(1)),
    "pixels, some ignored": (CE, {"ignore_index": 1}, (4, 3, 2), classes(3, 2)),
    "class weights": (CE, {"weight": WEIGHT}, (4, 3), classes(3)),
    "class weights, smoothed": (CE, {"weight": WEIGHT, "label_smoothing": 0.2}, (4,), classes()),
    "class weights of probabilities": (CE, {"weight": WEIGHT, "label_smoothing": 0.2}, (4,), lambda: uniform(4)().softmax(1)),
    "binary": (BCE, {}, (4,), uniform(4)),
    "binary weighted": (BCE, {"weight": double(0.3, 1, 0, 2), "pos_weight": double(0.2, 1, 3, 5)}, (4,), uniform(4)),
    "poisson": (nn.PoissonNLLLoss, {}, (3,), uniform(3)),
    "huber": (nn.HuberLoss, {}, (3,), normal(3)),
    "margins": (nn.MultiLabelSoftMarginLoss, {}, (4,), lambda: (uniform(4)() > 0.5).double()),
}
SQUARES = ("mse", "half squared")
BOUNDED = (nn.MSELoss, HalfSquaredLoss, CE, BCE)


def objective_of(criterion, x, *others, factor=1.0, scale=1.0):
    given = Outputs({0: x})
    arguments, structure = tree_flatten(((x, *others), {}))
    state = State(criterion, [])
    values = criterion(x, *others).detach()
    state.forget_unused()
    factors = {0: factor * torch.ones_like(values, dtype=torch.float64)}
    term = Term(criterion, arguments, structure, {0: [Entries(given, 0)]}, state, {0: values}, factors)
    return Objective(Recorded(nn.Module(), [given], terms=[term], scale=scale))


def setting(name, reduction, size=2.0):
    kind, options, shape, targets = LOSSES[name]
    criterion, y = kind(reduction=reduction, **options), targets()
    x = size * torch.randn(N, *shape, dtype=torch.float64)
    return criterion, x, y, objective_of(criterion, x, y, factor=3.0, scale=1.5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_value_curvature_and_root(name, reduction):
    criterion, x, y, objective = setting(name, reduction)

    def loss(z):
        return 2 * criterion(z, y).sum()

    flat = x.reshape(-1)
    h = hessian(loss, x).reshape(x.numel(), -1)
    g = objective.value_and_gradient(flat)[1]
    assert objective.value(flat) == pytest.approx(float(loss(x)))
    torch.testing.assert_close(g, torch.autograd.functional.jacobian(loss, x).reshape(-1))
    c = objective.curvatures(flat, g)
    if type(criterion) in BOUNDED:
        assert torch.linalg.eigvalsh(torch.diag(c) - h)[0] >= -1e-12
    if name in SQUARES:
        torch.testing.assert_close(torch.diag(c), h)
    if type(criterion) not in BOUNDED:
        assert float(c.max()) == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]))
    metric = objective.hessian_metric(flat, g).padded()
    eye = torch.eye(x.numel(), dtype=torch.float64)
    root = metric.root(eye)
    torch.testing.assert_close(root @ root.T, h, rtol=1e-9, atol=1e-11 * float(h.abs().max()))
    torch.testing.assert_close(metric.root_transpose(eye), root.T)
    q = x[0].numel()
    torch.testing.assert_close(metric.root_transpose(eye[q : 3 * q], first=q), root.T[q : 3 * q])  # a part of the samples
    torch.testing.assert_close(root @ metric.root_inverse(g), g)


def test_the_bound_of_cross_entropy_is_reached():
    x = double([0.0, 0.0, -40.0])  # p = (½, ½, 0)
    objective = objective_of(CE(), x, torch.tensor([0]))
    h = hessian(lambda z: CE()(z, torch.tensor([0])), x).reshape(3, 3)
    assert float(torch.linalg.eigvalsh(h)[-1]) == pytest.approx(
        float(objective.curvatures(x[0], objective.value_and_gradient(x[0])[1]).max())
    )


def test_losses_without_second_derivatives_are_measured_by_their_value():
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.zeros(N, 3, dtype=torch.float64)
    for criterion in (nn.L1Loss(), nn.MultiMarginLoss()):
        objective = objective_of(criterion, x, y if isinstance(criterion, nn.L1Loss) else torch.zeros(N, dtype=torch.long))
        g = objective.value_and_gradient(x.reshape(-1))[1]
        expected = float(g.square().sum() / (2 * objective.value(x.reshape(-1))))
        assert float(objective.curvatures(x.reshape(-1), g).max()) == pytest.approx(expected)
        with pytest.raises(RuntimeError, match='no curvature at these outputs.*Use metric="euclidean"'):
            objective.hessian_metric(x.reshape(-1), g)


def test_a_loss_that_couples_samples_has_one_block():
    x = torch.randn(N, 3, dtype=torch.float64)
    criterion = LossFunction(lambda z: (z @ z.T).logsumexp(1).sum())
    objective = objective_of(criterion, x)
    g = objective.value_and_gradient(x.reshape(-1))[1]
    metric = objective.hessian_metric(x.reshape(-1), g)
    assert not metric.local
    h = hessian(lambda z: criterion(z), x).reshape(x.numel(), -1)
    assert float(objective.curvatures(x.reshape(-1), g).max()) == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]))


def test_only_squares_have_a_curvature_for_each_entry():
    """It is the same everywhere; for others one is right for all of them."""
    x, weight = torch.randn(N, 3, dtype=torch.float64), double(1, 2, 3)
    for form, expected in ((torch.square, (2 * weight).repeat(N)), (torch.cosh, (weight * x.cosh()).max().expand(3 * N))):
        objective = objective_of(LossFunction(lambda z, form=form: (weight * form(z)).sum()), x)
        torch.testing.assert_close(
            objective.curvatures(x.reshape(-1), objective.value_and_gradient(x.reshape(-1))[1]), expected
        )


def test_where_a_loss_is_straight_its_gradient_alone_makes_a_root():
    """(z₀ + z₁)² + (z₀ − z₁)²/100 + z₂ at z₀ = z₁: a small eigenvalue that g does not ask for, and none where it does."""
    x = torch.ones(N, 3, dtype=torch.float64)
    objective = objective_of(
        LossFunction(lambda z: ((z[:, 0] + z[:, 1]) ** 2 + (z[:, 0] - z[:, 1]) ** 2 / 100 + z[:, 2]).sum()), x
    )
    g = objective.value_and_gradient(x.reshape(-1))[1]
    metric = objective.hessian_metric(x.reshape(-1), g).padded()
    torch.testing.assert_close(metric.root(metric.root_inverse(g)), g)
    root = metric.root(torch.eye(x.numel(), dtype=torch.float64))
    expected = torch.block_diag(*N * [double([2.02, 1.98, 0], [1.98, 2.02, 0], [0, 0, 0])])
    torch.testing.assert_close(root @ root.T, expected, rtol=1e-12, atol=1e-10)


def test_rounding_of_a_hessian_is_no_curvature():
    """That of cross-entropy is zero along (1, …, 1), but for rounding of either sign."""
    x = torch.randn(50, 4, dtype=torch.float64)
    objective = objective_of(CE(), x, torch.randint(4, (50,)))
    metric = objective.hessian_metric(x.reshape(-1), objective.value_and_gradient(x.reshape(-1))[1])
    ones = torch.ones(x.numel(), dtype=torch.float64)
    assert metric.root_inverse(ones).norm() <= 1e-6 * ones.norm()


@pytest.mark.parametrize(("n", "q", "coupled"), [(2, 257, False), (257, 256, False), (4097, 1, True)])
def test_blocks_that_are_too_large_are_refused(n, q, coupled):
    x = torch.ones(n, q, dtype=torch.float64)
    objective = objective_of(LossFunction(lambda z: (z.sum() if coupled else z.sum(1)).square().sum()), x)
    with pytest.raises(RuntimeError, match='Hessian would have to be held as one, and nothing was changed. Use metric="eucl'):
        objective.hessian_metric(x.reshape(-1), objective.value_and_gradient(x.reshape(-1))[1])


def test_what_is_to_be_maximized_is_refused():
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64)
    objective = objective_of(nn.MSELoss(), x, y, factor=-1.0)
    with pytest.raises(RuntimeError, match="AdaptedGD minimizes: leave the sign out"):
        objective.curvatures(x.reshape(-1), objective.value_and_gradient(x.reshape(-1))[1])


class Counting(nn.Module):
    """Gives something else each time."""

    def __init__(self, held):
        super().__init__()
        self.held, self.calls, self.log = held, 0, []

    def forward(self, x, y):
        self.calls += 1
        self.log.append(self.calls)
        counts = self.held if self.held is not None else self.log
        if self.held is not None:
            self.held.append(1)
        return len(counts) * (x - y).square_().mean()


def test_a_criterion_that_counts_is_repeated_as_it_was():
    """Its attributes, and lists among them, are as the user's own calls left them; what is elsewhere cannot be."""
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64)
    criterion = Counting(None)
    criterion(x.clone(), y)
    objective = objective_of(criterion, x, y)
    torch.testing.assert_close(objective.value_and_gradient(x.reshape(-1))[1], (4 * (x - y) / x.numel()).reshape(-1))
    assert (criterion.calls, criterion.log) == (2, [1, 2])

    class Elsewhere(list):
        pass

    objective = objective_of(Counting(Elsewhere()), x, y)
    with pytest.raises(RuntimeError, match="`criterion`, a Counting, gave .* when it was called again"):
        objective.value_and_gradient(x.reshape(-1))[1]


def test_random_numbers_of_a_criterion_are_drawn_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 30), nn.Tanh(), nn.Linear(30, 2))
    criterion = LossFunction(lambda a, b: (torch.rand(len(a), 1) * (a - b).square()).mean())
    optimizer = AdaptedGD(model, criterion=criterion)
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    for _ in range(15):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        state = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)
    assert nn.functional.mse_loss(model(x), y) < 1e-3


def test_classes_that_are_sure():
    """In float32, where rounding is all of the gradient, and to the end."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 20), torch.arange(30) % 4
    for metric in ("ggn", "euclidean"):
        model, criterion = nn.Sequential(nn.Linear(20, 60), nn.Tanh(), nn.Linear(60, 4)), CE()
        optimizer = AdaptedGD(model, criterion=criterion, metric=metric, lr=1.0 if metric == "ggn" else 4.0)
        for _ in range(40):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
        assert loss < (1e-6 if metric == "ggn" else 0.02)


def test_options_that_need_the_loss():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match='`criterion` should be given for metric="ggn".* but got None'):
        AdaptedGD(model, metric="ggn")
    with pytest.raises(ValueError, match="`metric` should be one of 'euclidean', 'ggn', but got 'fisher'"):
        AdaptedGD(model, metric="fisher")
