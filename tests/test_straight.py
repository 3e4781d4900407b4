"""Steps that keep outputs on the line, and one step over all batches of a loader."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_adapted_gd import AdaptedGD, ConjugateGradients, HalfSquaredLoss, StraightLine, output_jacobian

from .cases import mlp


def problem(n=40):
    torch.manual_seed(0)
    model = mlp(sizes=(6, 40, 30, 3)).double()
    x = torch.randn(n, 6, dtype=torch.float64)
    return model, x, torch.randn(n, 3, dtype=torch.float64)


@pytest.mark.parametrize("solver", ["auto", ConjugateGradients()], ids=["dense", "cg"])
def test_outputs_follow_the_line_to_the_targets(solver):
    model, x, y = problem()
    optimizer = AdaptedGD(model, criterion=HalfSquaredLoss(), solver=solver, damping=StraightLine(0.02, damping=1e-6))
    start, t, fractions = model(x).detach(), 0.0, []
    for _ in range(60):
        optimizer.full_batch([(x, y)])
        fractions.append(optimizer.last_step.fraction)
        t += (1 - t) * fractions[-1]
        line = (1 - t) * start + t * y
        assert (model(x) - line).norm() <= 0.05 * (start - y).norm()
    assert fractions[0] < 0.5
    assert fractions[-1] == 1
    assert HalfSquaredLoss()(model(x), y) < 1e-10


def test_a_step_is_as_long_as_its_prediction_holds():
    model, x, y = problem()
    twin = copy.deepcopy(model)
    whole = AdaptedGD(twin, criterion=HalfSquaredLoss(), damping=1e-6)
    whole.full_batch([(x, y)])
    delta = torch.cat([(q - p).detach().flatten() for p, q in zip(model.parameters(), twin.parameters(), strict=True)])
    push = (output_jacobian(model, x) @ delta).view_as(y)
    before = model(x).detach()
    optimizer = AdaptedGD(model, criterion=HalfSquaredLoss(), damping=StraightLine(0.01, damping=1e-6))
    optimizer.full_batch([(x, y)])
    report = optimizer.last_step
    error = (model(x).detach() - before - report.fraction * push).norm() / push.norm()
    assert 1e-3 < error <= 0.01
    assert report.num_trials > 1


def test_the_length_to_try_next():
    policy = StraightLine(0.02)
    assert policy.next_fraction(0.1, 0.02) == pytest.approx(0.08)
    assert policy.next_fraction(0.1, 0.0) == pytest.approx(0.5)
    assert policy.next_fraction(0.5, 1e-9) == 1.0
    assert policy.next_fraction(0.1, float("inf")) == pytest.approx(0.01)


def test_where_no_step_is_short_enough_nothing_changes():
    model, x, y = problem()
    optimizer = AdaptedGD(model, criterion=HalfSquaredLoss(), damping=StraightLine(1e-12, 0.5, damping=1e-6))
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    optimizer.full_batch([(x, y)])
    assert optimizer.last_step.status == "rejected"
    assert optimizer.last_step.fraction == 0
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert optimizer.state_dict() == state


def test_it_resumes_to_the_same_bits_and_needs_no_criterion():
    model, x, y = problem()

    def step(optimizer, network):
        optimizer.zero_grad()
        (0.5 * (network(x) - y).square().sum()).backward()
        optimizer.step()

    optimizer = AdaptedGD(model, damping=StraightLine(damping=1e-6))
    for _ in range(3):
        step(optimizer, model)
    twin = copy.deepcopy(model)
    resumed = AdaptedGD(twin, damping=StraightLine(damping=1e-6))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(optimizer, model)
    step(resumed, twin)
    assert resumed.last_step.num_trials == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_options():
    with pytest.raises(TypeError, match=r"but got the class. Write StraightLine\(\)"):
        AdaptedGD(nn.Linear(2, 2), damping=StraightLine)
    with pytest.raises(ValueError, match="`tolerance` should be"):
        StraightLine(0.0)
    with pytest.raises(ValueError, match="`smallest` should be"):
        StraightLine(smallest=1.0)


LABELS = torch.arange(40) % 3
LABELS[::7] = -100
CRITERIA = {
    "half": (HalfSquaredLoss(), None),
    "mse": (nn.MSELoss(), None),
    "sum": (nn.MSELoss(reduction="sum"), None),
    "ignored": (nn.CrossEntropyLoss(), LABELS),
    "weights": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)), LABELS),
    "logits": (nn.BCEWithLogitsLoss(), (torch.arange(120).view(40, 3) % 2).double()),
}


@pytest.mark.parametrize("solver", ["auto", ConjugateGradients(1e-12)], ids=["dense", "cg"])
@pytest.mark.parametrize("name", CRITERIA)
def test_batches_of_a_loader_are_one_batch(name, solver):
    model, x, y = problem()
    criterion, targets = CRITERIA[name]
    y = y if targets is None else targets
    twin = copy.deepcopy(model)
    optimizer = AdaptedGD(model, criterion=criterion, damping=0.1, solver=solver)
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    other = AdaptedGD(twin, criterion=criterion, damping=0.1, solver=solver)
    twin(x).sum().backward()  # to be cleared
    assert other.full_batch(DataLoader(TensorDataset(x, y), batch_size=17)) == pytest.approx(loss.item(), rel=1e-12)
    assert other.last_step.num_calls == 3
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)


def test_inputs_may_be_several():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, a, b):
            return self.layer(a) * b

    torch.manual_seed(0)
    a, b, y = torch.randn(6, 2), torch.randn(6, 1), torch.randn(6, 3)
    losses = []
    for batches in ([((a, b), y)], [({"a": a, "b": b}, y)]):
        torch.manual_seed(1)
        optimizer = AdaptedGD(Two(), criterion=nn.MSELoss())
        losses.append([optimizer.full_batch(batches) for _ in range(2)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("batches", "error", "text"),
    [
        ([], ValueError, "`loader` should give at least one batch"),
        ([torch.zeros(2, 6)], TypeError, "`loader` should give pairs of inputs and a tensor of targets, but gave a Tensor"),
        ([(torch.zeros(2, 6), torch.zeros(2, 3), 1)], TypeError, "but gave 3 things"),
    ],
)
def test_loaders_that_do_not_do(batches, error, text):
    model, _, _ = problem()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        AdaptedGD(model.float(), criterion=nn.MSELoss()).full_batch(batches)
    assert all(torch.equal(a.float(), b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("criterion", [None, nn.MSELoss(reduction="none")])
def test_a_full_batch_needs_a_reduced_criterion(criterion):
    model, x, y = problem()
    with pytest.raises(ValueError, match="`criterion` should be one loss that returns a number"):
        AdaptedGD(model, criterion=criterion).full_batch([(x, y)])


def test_a_model_that_returns_more():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(TypeError, match="needs a model that returns a tensor, but it returned a tuple"):
        AdaptedGD(Pair(6, 3).double(), criterion=nn.MSELoss()).full_batch([problem()[1:]])


def test_outputs_that_nothing_gives_again_are_named():
    model, x, y = problem()
    criterion = HalfSquaredLoss()
    optimizer = AdaptedGD(model, criterion=criterion, damping=StraightLine())
    criterion(model(x).sinh(), y).backward()
    with pytest.raises(RuntimeError, match="StraightLine.. needs a criterion that is given the model's outputs"):
        optimizer.step()
