"""Closures evaluated at trial parameters: the same steps as without, and no trace, whatever happens."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, LevenbergMarquardt

from .cases import COUPLED, MSE, flat, mlp
from .trials import SEARCHES, assert_same, by_closure, closure_of, snapshot, wave

CE = nn.CrossEntropyLoss()


@COUPLED
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("criterion", [MSE, CE], ids=["mse", "cross-entropy"])
def test_closure_and_plain_loop_take_the_same_steps(search, criterion):
    """Dropout draws the same masks in each trial, batch norm starts from the same statistics."""
    ends = []
    for with_closure in (False, True):
        torch.manual_seed(5)
        layers = (nn.Linear(3, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Dropout(0.2), nn.Linear(10, 4))
        model = nn.Sequential(*layers).double()
        x = torch.randn(12, 3, dtype=torch.float64)
        y = torch.randint(4, (12,)) if criterion is CE else torch.randn(12, 4, dtype=torch.float64)
        policy = by_closure(search, with_closure)
        if isinstance(policy, LevenbergMarquardt):
            policy = dataclasses.replace(policy, second_order=False)
        optimizer = AdaptedGD(model, criterion=criterion, momentum=0.3, damping=policy)
        closure = closure_of(model, optimizer, x, y, criterion)
        for _ in range(4):
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        ends.append((flat(model), [b.clone() for b in model.buffers()], torch.get_rng_state(), optimizer.last_step.num_trials))
    assert (ends[0][0] - ends[1][0]).norm() <= 1e-8 * ends[0][0].norm()
    assert all(torch.allclose(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))
    assert torch.equal(ends[0][2], ends[1][2])
    assert ends[0][3] == ends[1][3]


@COUPLED
@pytest.mark.parametrize("worse", ["larger", "nan", "infinite"])
@pytest.mark.parametrize("search", SEARCHES)
def test_a_step_of_rejected_trials_changes_nothing(search, worse):
    model = nn.Sequential(nn.Linear(3, 10), nn.BatchNorm1d(10), nn.Dropout(0.2), nn.Tanh(), nn.Linear(10, 2)).double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    optimizer = AdaptedGD(model, criterion=MSE, momentum=0.5, damping=by_closure(search))
    in_place = worse == "larger"
    good = closure_of(model, optimizer, x, y, set_to_none=not in_place)
    optimizer.step(good)
    value = {"larger": 1e3, "nan": math.nan, "infinite": math.inf}[worse]
    bad = closure_of(
        model,
        optimizer,
        x,
        y,
        change=lambda loss, number: loss if number == 1 else value * loss.detach(),
        set_to_none=not in_place,
    )

    before, state = snapshot(model, optimizer), torch.get_rng_state()
    torch.manual_seed(1)
    good()  # what one evaluation leaves in gradients, buffers and the random stream
    left = snapshot(model, optimizer), torch.get_rng_state()
    with torch.no_grad():
        for b, value_before in zip(model.buffers(), before[1], strict=True):
            b.copy_(value_before)
    torch.set_rng_state(state)
    torch.manual_seed(1)
    optimizer.step(bad)
    assert optimizer.last_step.status == "rejected"
    assert 5 < optimizer.last_step.num_trials < len(bad.calls)
    assert not torch.equal(bad.calls[0], bad.calls[1])
    assert_same(left[0], snapshot(model, optimizer))
    assert torch.equal(left[1], torch.get_rng_state())
    assert_same((before[0], [], [], before[3]), (snapshot(model, optimizer)[0], [], [], snapshot(model, optimizer)[3]))
    optimizer.step(good)  # and it goes on
    assert optimizer.last_step.status != "rejected"


@pytest.mark.parametrize("search", SEARCHES)
def test_trials_that_are_not_finite_are_shortened(search):
    model, x, y = wave()
    optimizer = AdaptedGD(model, lr=3.0, criterion=MSE, damping=by_closure(search))
    start = flat(model)

    def near(loss, _):
        return loss if (flat(model) - start).norm() < 1e-3 else loss * math.nan

    closure = closure_of(model, optimizer, x, y, change=near)
    before = MSE(model(x), y).item()
    optimizer.step(closure)
    assert optimizer.last_step.num_trials > 1
    assert 0 < (flat(model) - start).norm() < 1e-3
    assert MSE(model(x), y) < before


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("search", SEARCHES)
def test_a_closure_that_raises_changes_nothing(search, at):
    model, x, y = wave()
    optimizer = AdaptedGD(model, lr=8.0, criterion=MSE, momentum=0.5, damping=by_closure(search))
    optimizer.step(closure_of(model, optimizer, x, y))
    before, state = snapshot(model, optimizer), torch.get_rng_state()

    def fail(loss, number):
        if number == at:
            raise KeyError("lost")
        return loss if number == 1 else 1e3 * loss

    with pytest.raises(KeyError, match="lost"):
        optimizer.step(closure_of(model, optimizer, x, y, change=fail))
    after = snapshot(model, optimizer)
    assert_same((before[0], before[1], [], before[3]), (after[0], after[1], [], after[3]))
    assert torch.equal(state, torch.get_rng_state())
    optimizer.step(closure_of(model, optimizer, x, y))
    assert not torch.equal(flat(model), torch.cat([p.reshape(-1) for p in before[0]]))


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda loss: [loss], "a list"),
        (lambda loss: loss.expand(2), r"a Tensor of shape \[2\]"),
        (lambda loss: None, "a NoneType"),
        (lambda loss: "0.1", "a str"),
        (lambda loss: True, "a bool"),
        (lambda loss: loss + 0j, "a Tensor"),
    ],
)
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("search", SEARCHES)
def test_a_closure_has_to_return_a_number(search, at, returned, words):
    model, x, y = wave()
    optimizer = AdaptedGD(model, criterion=MSE, damping=by_closure(search))
    before = snapshot(model, optimizer)
    closure = closure_of(model, optimizer, x, y, change=lambda loss, number: returned(loss) if number == at else loss)
    with pytest.raises(TypeError, match=rf"`closure` should return the loss as one number, but returned {words}"):
        optimizer.step(closure)
    after = snapshot(model, optimizer)
    assert_same((before[0], before[1], [], before[3]), (after[0], after[1], [], after[3]))


@pytest.mark.parametrize("search", SEARCHES)
def test_a_loss_that_is_not_finite_is_refused(search):
    model, x, y = wave()
    optimizer = AdaptedGD(model, criterion=MSE, damping=by_closure(search))
    before = flat(model)
    with pytest.raises(RuntimeError, match="`closure` should return a finite loss, but returned nan"):
        optimizer.step(closure_of(model, optimizer, x, y, change=lambda loss, _: loss.item() * math.nan))
    assert torch.equal(flat(model), before)


class Careless(nn.Module):
    """Puts new tensors in the place of buffers, changes a frozen parameter and counts its calls."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1).double()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.teacher = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)
        self.count = 0

    def forward(self, x):
        out = torch.tanh(self.layer(x))
        self.mean = 0.5 * self.mean + 0.5 * out.detach().mean()
        with torch.no_grad():
            self.teacher.mul_(0.5).add_(0.5 * out.mean())
        self.count += 1
        return out


@pytest.mark.parametrize("raises", [False, True])
def test_trials_leave_no_trace_on_modules(raises):
    model, x = Careless(), torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
    once = copy.deepcopy(model)
    once(x)
    optimizer = AdaptedGD(model, criterion=MSE, damping=LevenbergMarquardt(judge="closure"))

    def change(loss, number):
        if raises and number == 2:
            model.eval()
            raise KeyError("lost")
        return loss

    closure = closure_of(model, optimizer, x, x + 3, change=change)
    if raises:
        with pytest.raises(KeyError):
            optimizer.step(closure)
    else:
        optimizer.step(closure)
    assert len(closure.calls) >= 2
    assert torch.equal(model.mean, once.mean)
    assert dict(model.named_buffers())["mean"] is model.mean
    assert torch.equal(model.teacher, once.teacher)
    assert model.count == 1
    assert model.training


def test_a_closure_that_agrees_is_not_called_again():
    for criterion, y in ((MSE, torch.randn(9, 3)), (CE, torch.randint(3, (9,))), (CE, torch.randn(9, 3).softmax(1))):
        model, x = mlp(), torch.randn(9, 4)
        optimizer = AdaptedGD(model, criterion=criterion)
        closure = closure_of(model, optimizer, x, y, criterion)
        for _ in range(3):
            optimizer.step(closure)
        assert len(closure.calls) == 3


def test_a_closure_that_tells_the_last_of_accumulated_losses_alone():
    """As Lightning has it: with a criterion all is known; without, no policy can judge."""
    for criterion, status in ((MSE, None), (None, "several backward passes")):
        model, x, y = wave()
        optimizer = AdaptedGD(model, criterion=criterion)
        loss_of = criterion or nn.functional.mse_loss
        losses = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(8):
                optimizer.zero_grad()
                (loss_of(model(x[::2]), y[::2]) / 2).backward()

                def closure(model=model, x=x, y=y, loss_of=loss_of):
                    loss = loss_of(model(x[1::2]), y[1::2]) / 2
                    loss.backward()
                    return loss

                optimizer.step(closure)
                losses.append(nn.functional.mse_loss(model(x), y).item())
        assert [status in str(warning.message) for warning in caught] == ([] if status is None else [True])
        assert optimizer.last_step.num_calls == 2
        if criterion:
            assert losses == sorted(losses, reverse=True)
