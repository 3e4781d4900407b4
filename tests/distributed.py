"""What several processes do, against one process on all of their samples. Run as a program: results go to a file.

A clean process forks the others, which takes a tenth of a second, runs all cases in each, and writes what they came to.
"""

import contextlib
import copy
import datetime
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as Wrapped

from torch_adapted_gd import AdaptedGD, Backtracking, ConjugateGradients, Dense, LevenbergMarquardt, LossFunction, StraightLine

SIZE = 3
DEVICE = os.environ.get("DISTRIBUTED_DEVICE", "cpu")  # of `trained`; several processes can share a GPU by gloo
STEPS = 3
CASES = {}
FIELDS = ("status", "num_trials", "rank", "num_outputs", "num_calls", "relative_damping", "fraction", "curvature", "space")


def case(function):
    """Register a case: a generator function of (rank, size) that yields (model, optimizer) after each step."""
    CASES[function.__name__] = function
    return function


def shared(tensor, rank, size, sizes=(6, 6, 6)):
    """The rows of one process; all of them for one."""
    return tensor if size == 1 else tensor.split(sizes)[rank]


def mlp(dtype=torch.float32, *, outputs=2, middle=(), seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), *middle, nn.Linear(9, outputs)).to(dtype)


def data(n=18, outputs=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.sin(2 * x[:, :outputs]) + 0.1 * torch.randn(n, outputs, generator=generator, dtype=torch.float64).to(dtype)


def wrapped(model, size, **options):
    return Wrapped(model, **options) if size > 1 else model


def trained(rank, size, model, criterion=None, sizes=(6, 6, 6), xy=None, steps=STEPS, closure=False, ddp=None, **options):
    """A plain training loop on the samples of this process."""
    x, y = (shared(t.to(DEVICE), rank, size, sizes) for t in (xy or data(sum(sizes), dtype=next(model.parameters()).dtype)))
    model.to(DEVICE)
    net = wrapped(model, size, **(ddp or {}))
    optimizer = AdaptedGD(net, criterion=options.pop("given", criterion), **options)
    loss_of = criterion or (lambda a, b: (a - b).square().mean())

    def evaluate():
        optimizer.zero_grad()
        loss = loss_of(net(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
        yield model, optimizer


@case
def equal_shards(rank, size):
    yield from trained(rank, size, mlp(), nn.MSELoss())


@case
def unequal_shards(rank, size):
    yield from trained(rank, size, mlp(), nn.MSELoss(), (2, 9, 5))


@case
def undamped(rank, size):
    yield from trained(rank, size, mlp(), nn.MSELoss(), (2, 9, 5), damping=0.0, lr=0.5)


@case
def sums(rank, size):
    yield from trained(rank, size, mlp(), nn.MSELoss(reduction="sum"), (2, 9, 5))


@case
def an_empty_shard(rank, size):
    """One process has no samples, and does not call the model."""
    model, criterion = mlp(), nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion)
    x, y = (shared(t, rank, size, (7, 0, 11)) for t in data())
    for _ in range(STEPS):
        optimizer.zero_grad()
        if len(x):
            criterion(model(x), y).backward()
        optimizer.step()
        yield model, optimizer


@case
def momentum_and_decay(rank, size):
    yield from trained(rank, size, mlp(), nn.MSELoss(), (2, 9, 5), lr=0.5, damping=1e-2, momentum=0.6, weight_decay=1e-2)


def classes():
    x, _ = data()
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.3).long()


@case
def classes_euclidean(rank, size):
    yield from trained(rank, size, mlp(outputs=3), nn.CrossEntropyLoss(), (4, 9, 5), classes())


@case
def classes_ggn(rank, size):
    model = mlp(torch.float64, outputs=3)
    x, y = classes()
    yield from trained(rank, size, model, nn.CrossEntropyLoss(), (4, 9, 5), (x.double(), y), metric="ggn")


@case
def classes_weighted_and_ignored(rank, size):
    x, y = classes()
    y[::4] = -100
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.2]))
    yield from trained(rank, size, mlp(outputs=3), criterion, (4, 9, 5), (x, y))


@case
def accumulated(rank, size):
    """Two backward passes before each step, the first without DistributedDataParallel's exchange."""
    model, criterion = mlp(), nn.MSELoss()
    net = wrapped(model, size)
    optimizer = AdaptedGD(net, criterion=criterion)
    x, y = data(36)
    halves = [[shared(t, rank, size, (2, 9, 7)) for t in half] for half in ((x[:18], y[:18]), (x[18:], y[18:]))]
    for _ in range(STEPS):
        optimizer.zero_grad()
        with net.no_sync() if size > 1 else contextlib.nullcontext():
            (0.5 * criterion(net(halves[0][0]), halves[0][1])).backward()
        (0.5 * criterion(net(halves[1][0]), halves[1][1])).backward()
        optimizer.step()
        yield model, optimizer


@case
def closure(rank, size):
    policy = LevenbergMarquardt(judge="closure")
    yield from trained(rank, size, mlp(), nn.MSELoss(), (2, 9, 5), closure=True, damping=policy)


@case
def backtracking(rank, size):
    yield from trained(rank, size, mlp(torch.float64), nn.MSELoss(), (2, 9, 5), damping=Backtracking(1e-4))


@case
def straight_line(rank, size):
    yield from trained(rank, size, mlp(torch.float64), nn.MSELoss(), (2, 9, 5), damping=StraightLine(damping=1e-6))


@case
def conjugate_gradients(rank, size):
    yield from trained(rank, size, mlp(torch.float64), nn.MSELoss(), (2, 9, 5), solver=ConjugateGradients(rtol=1e-12))


@case
def dropout(rank, size):
    """Masks of its own in each process; one process accumulates the passes of all."""
    model, criterion = mlp(middle=(nn.Dropout(0.3),)), nn.MSELoss()
    net = wrapped(model, size)
    optimizer = AdaptedGD(net, criterion=criterion, damping=LevenbergMarquardt(num_trials=1), lr=0.3)
    sizes = (2, 9, 5)
    x, y = data(16)
    for step in range(STEPS):
        optimizer.zero_grad()
        for number, (a, b) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
            if size == 1 or number == rank:
                torch.manual_seed(100 * step + number)
                weight = 1.0 if size > 1 else len(a) / 16
                (weight * criterion(net(a), b)).backward()
        optimizer.step()
        yield model, optimizer


class TwoBranches(nn.Module):
    """The second branch is used where it is asked for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x, both):
        return self.first(x) + (self.second(x).tanh() if both else 0)


@case
def unused_parameters(rank, size):
    """One branch is used in one process alone."""
    model, criterion = TwoBranches(), nn.MSELoss()
    net = wrapped(model, size, find_unused_parameters=True)
    optimizer = AdaptedGD(net, criterion=criterion)
    sizes = (2, 9, 5)
    x, y = data(16)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for number, (a, b) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
            if size == 1 or number == rank:
                weight = 1.0 if size > 1 else len(a) / 16
                (weight * criterion(net(a, number == 1), b)).backward()
        optimizer.step()
        yield model, optimizer


@case
def float64(rank, size):
    yield from trained(rank, size, mlp(torch.float64), nn.MSELoss(), (2, 9, 5))


@case
def static_graph(rank, size):
    yield from trained(rank, size, mlp(), nn.MSELoss(), ddp={"static_graph": True})


@case
def parameter_space(rank, size):
    model = nn.Sequential(nn.Linear(4, 2)).double()
    yield from trained(rank, size, model, nn.MSELoss(), (2, 9, 5), solver=Dense(space="parameter"))


@case
def parameter_space_ggn(rank, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x, y = classes()
    options = {"solver": Dense(space="parameter"), "metric": "ggn"}
    with mock.patch("torch_adapted_gd.step.system.written_if_small", lambda jacobian, *_: jacobian):  # else D goes to all
        yield from trained(rank, size, model, nn.CrossEntropyLoss(), (4, 9, 5), (x.double(), y), **options)


@case
def batch_norm_in_evaluation(rank, size):
    model = mlp(torch.float64, middle=(nn.BatchNorm1d(9),))
    model(data(dtype=torch.float64)[0])
    yield from trained(rank, size, model.eval(), nn.MSELoss(), (2, 9, 5))


@case
def full_batch(rank, size):
    model, criterion = mlp(torch.float64), nn.MSELoss()
    net = wrapped(model, size)
    optimizer = AdaptedGD(net, criterion=criterion)
    x, y = (shared(t, rank, size, (4, 9, 5)) for t in data(dtype=torch.float64))
    for _ in range(STEPS):
        optimizer.full_batch(list(zip(x.split(2), y.split(2), strict=True)))
        yield model, optimizer


@case
def without_criterion(rank, size):
    yield from trained(rank, size, mlp(torch.float64), None, lr=3.0, damping=1e-3)


@case
def closure_without_criterion(rank, size):
    yield from trained(rank, size, mlp(torch.float64), None, closure=True)


@case
def large(rank, size):
    """Larger than what is written out: factors travel, convolutions and all."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.GroupNorm(4, 32),
        nn.Flatten(),
        nn.Linear(288, 64),
        nn.Tanh(),
        nn.Linear(64, 5),
    ).double()
    x = torch.randn(12, 64, dtype=torch.float64)
    yield from trained(rank, size, model, nn.MSELoss(), (2, 6, 4), (x, torch.randn(12, 5, dtype=torch.float64)), steps=2)


@case
def large_by_conjugate_gradients(rank, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 5)).double()
    x, y = torch.randn(24, 64, dtype=torch.float64), torch.randn(24, 5, dtype=torch.float64)
    options = {"solver": ConjugateGradients(rtol=1e-12), "damping": 1e-3, "steps": 2}
    yield from trained(rank, size, model, nn.MSELoss(), (5, 12, 7), (x, y), **options)


@case
def huber(rank, size):
    yield from trained(rank, size, mlp(torch.float64), nn.HuberLoss(delta=0.3), (2, 9, 5))


@case
def own_function(rank, size):
    criterion = LossFunction(lambda a, b: (a - b).pow(4).mean())
    yield from trained(rank, size, mlp(torch.float64), criterion, (2, 9, 5), steps=2)


@case
def judged_by_the_next(rank, size):
    policy = LevenbergMarquardt(judge="next", initial=1e-4)
    yield from trained(rank, size, mlp(torch.float64), nn.MSELoss(), (2, 9, 5), damping=policy, steps=6)


@case
def penalty(rank, size):
    """What does not come through the outputs is there in each process, and counts once."""
    model, criterion = mlp(torch.float64), nn.MSELoss()
    net = wrapped(model, size)
    optimizer = AdaptedGD(net, criterion=criterion)
    x, y = (shared(t, rank, size, (2, 9, 5)) for t in data(16, dtype=torch.float64))

    def evaluate():
        optimizer.zero_grad()
        loss = criterion(net(x), y) + 1e-2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(evaluate)
        yield model, optimizer


@case
def equation(rank, size):
    """Residuals with derivatives, on points that stay: two terms, one of them in one process alone."""
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double(), nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion)
    points = shared(torch.linspace(0, 1, 18, dtype=torch.float64)[:, None], rank, size).requires_grad_()
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    def evaluate():
        optimizer.zero_grad()
        u = model(points)
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        loss = criterion(slope + u, torch.sin(points.detach()))
        if rank == 0:
            loss = loss + 10 * criterion(model(ends), torch.zeros_like(ends))
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(evaluate)
        yield model, optimizer


@case
def several_groups(rank, size):
    model = mlp(torch.float64)
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "alpha": 0.5}]
    yield from trained(rank, size, model, nn.MSELoss(), (2, 9, 5), params=groups)


@case
def join(rank, size):
    """Processes that run out of batches one after the other."""
    model, criterion = mlp(torch.float64), nn.MSELoss()
    batches = [data(5, dtype=torch.float64)] * 4
    counts = (2, 4, 3)
    net = wrapped(model, size)
    optimizer = AdaptedGD(net, criterion=criterion)
    seen = []
    if size == 1:
        for step in range(4):
            optimizer.zero_grad()
            parts = [batches[step][0][r : r + 3] for r in range(3) if step < counts[r]]
            targets = [batches[step][1][r : r + 3] for r in range(3) if step < counts[r]]
            criterion(net(torch.cat(parts)), torch.cat(targets)).backward()
            optimizer.step()
        yield model, optimizer
        return
    with Join([net, optimizer]):
        for x, y in batches[: counts[rank]]:
            optimizer.zero_grad()
            criterion(net(x[rank : rank + 3]), y[rank : rank + 3]).backward()
            optimizer.step()
            seen.append(optimizer.last_step)
    yield model, optimizer


@case
def join_of_the_optimizer_alone(rank, size):
    """The wrapper is optional under Join, too."""
    model, criterion = mlp(torch.float64), nn.MSELoss()
    x, y = data(5, dtype=torch.float64)
    counts = (2, 4, 3)
    optimizer = AdaptedGD(model, criterion=criterion)
    with Join([optimizer]) if size > 1 else contextlib.nullcontext():
        for step in range(counts[rank] if size > 1 else 4):
            optimizer.zero_grad()
            parts = [r for r in range(3) if step < counts[r]] if size == 1 else [rank]
            criterion(model(torch.cat([x[r : r + 3] for r in parts])), torch.cat([y[r : r + 3] for r in parts])).backward()
            optimizer.step()
    yield model, optimizer


@case
def all_labels_ignored_in_one(rank, size):
    """The mean of its loss is NaN, and counts for nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
    x = torch.randn(6, 1, 4, 4, dtype=torch.float64)
    y = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
    y[2:4] = -100
    yield from trained(rank, size, model, nn.CrossEntropyLoss(), (2, 2, 2), (x, y))


@case
def all_labels_ignored_in_one_judged_by_the_next(rank, size):
    x, y = classes()
    y[4:13] = -100
    options = {"damping": LevenbergMarquardt(judge="next")}
    yield from trained(rank, size, mlp(torch.float64, outputs=3), nn.CrossEntropyLoss(), (4, 9, 5), (x.double(), y), **options)


class Transcribing(nn.Module):
    """A CTC loss, whose mean is of losses that are divided by the lengths of their targets."""

    def __init__(self):
        super().__init__()
        self.ctc = nn.CTCLoss()

    def forward(self, x, y):
        lengths = (y > 0).sum(1)
        return self.ctc(x.log_softmax(-1).transpose(0, 1), y, torch.full((len(x),), x.shape[1]), lengths)


@case
def connectionist_temporal_classification(rank, size):
    model, loss = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)).double(), Transcribing()
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(9, 8, 4, dtype=torch.float64)
    lengths = torch.tensor([1, 1, 2, 3, 4, 4, 4, 3, 2])
    y = torch.randint(1, 5, (9, 4)) * (torch.arange(4) < lengths[:, None])
    yield from trained(rank, size, model, loss, (2, 4, 3), (x, y), given=loss.ctc)


@case
def a_hinge_that_is_satisfied(rank, size):
    """All values of one process are zero, which says nothing of what their mean divides by."""
    model, hinge, squares = mlp(torch.float64), nn.TripletMarginLoss(margin=4.0), nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=(hinge, squares))
    x, y = data(16, dtype=torch.float64)
    negative = y + 3
    negative[:2] += 1e3
    x, y, negative = (shared(t, rank, size, (2, 9, 5)) for t in (x, y, negative))
    for _ in range(STEPS):
        optimizer.zero_grad()
        outputs = model(x)
        (hinge(outputs, y, negative) + squares(outputs, y)).backward()
        optimizer.step()
        yield model, optimizer


@case
def an_empty_shard_that_calls(rank, size):
    yield from trained(rank, size, mlp(torch.float64), nn.MSELoss(reduction="sum"), (10, 0, 6))


def raises(kind, text):
    return pytest.raises(kind, match=re.escape(text))


CHECKS = {}


def check(function):
    """Register a check: a function of (rank, size), run in all processes, that raises where something is wrong."""
    CHECKS[function.__name__] = function
    return function


def snapshot(model, optimizer):
    return [p.detach().clone() for p in model.parameters()], repr(optimizer.state_dict()), torch.get_rng_state()


def unchanged(before, after):
    equal = all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    return equal and before[1] == after[1] and torch.equal(before[2], after[2])


def alike(tensors, size):
    """Whether all processes have the same bits."""
    found = [None] * size
    dist.all_gather_object(found, [t.tolist() for t in tensors])
    return all(each == found[0] for each in found)


FAILURES = {
    "parameters": "torch_adapted_gd.optimizer.AdaptedGD._alike",
    "loss": "torch_adapted_gd.optimizer.Objective",
    "uses": "torch_adapted_gd.step.system.tangent_jacobian",
    "kernel": "torch_adapted_gd.jacobian.factored.FactoredJacobian.gram",
    "factors": "torch_adapted_gd.jacobian.factored.FactoredJacobian.factors",
    "solution": "torch_adapted_gd.step.system.factorize",
    "direction": "torch_adapted_gd.step.linearization.Linearization.direction",
    "trial": "torch_adapted_gd.tracking.replay.Replay.outputs_with",
    "move": "torch_adapted_gd.step.kept.Move.of",
    "report": "torch_adapted_gd.report.StepReport.of",
    "warnings": "torch_adapted_gd.optimizer.AdaptedGD._warn",
}


def failing(stage):
    def run(rank, size):
        model, criterion = mlp(), nn.MSELoss()
        x, y = (shared(t, rank, size) for t in data())
        net = wrapped(model, size)
        optimizer = AdaptedGD(net, criterion=criterion)

        def backward():
            optimizer.zero_grad()
            criterion(net(x), y).backward()

        with mock.patch("torch_adapted_gd.step.system._SMALL", 0):
            for _ in range(2):
                backward()
                optimizer.step()
            backward()
            before, started = snapshot(model, optimizer), time.perf_counter()
            broken = mock.patch(FAILURES[stage], side_effect=OSError("no space left"))
            with broken if rank == 1 else contextlib.nullcontext():
                if rank == 1:
                    with raises(OSError, "no space left"):
                        optimizer.step()
                else:
                    with raises(RuntimeError, "Process 1 of 3 could not take the step, so no process changed anything. OSE"):
                        optimizer.step()
            assert time.perf_counter() - started < 2
            assert unchanged(before, snapshot(model, optimizer))
            backward()
            optimizer.step()
        assert optimizer.last_step.status == "full_rank"
        assert not unchanged(before, snapshot(model, optimizer))
        assert alike(model.parameters(), size)

    return run


CHECKS.update({f"failure_in_{stage}": failing(stage) for stage in FAILURES})


def stepped(model, rank, size, **options):
    optimizer = AdaptedGD(model, **options)
    x, y = (shared(t, rank, size) for t in data())
    options["criterion"](model(x), y).backward()
    before = snapshot(model, optimizer)
    try:
        optimizer.step()
    finally:
        assert unchanged(before, snapshot(model, optimizer))


@check
def other_options(rank, size):
    with raises(RuntimeError, "The options should be the same in all processes, but differ between process 0 and process 1"):
        stepped(mlp(), rank, size, criterion=nn.MSELoss(), lr=0.5 if rank == 1 else 1.0)


@check
def other_parameters(rank, size):
    with raises(RuntimeError, "The parameters should be the same in all processes, but differ between process 0 and process 2"):
        stepped(mlp(seed=int(rank == 2)), rank, size, criterion=nn.MSELoss())


@check
def other_criteria(rank, size):
    with raises(RuntimeError, "The criteria should be the same in all processes, but differ between process 0 and process 1"):
        stepped(mlp(), rank, size, criterion=nn.MSELoss(reduction="sum" if rank == 1 else "mean"))


@check
def other_frozen_parameters(rank, size):
    model = mlp()
    model[0].weight.requires_grad_(rank != 1)
    with raises(RuntimeError, "The numbers of trainable parameters should be the same in all processes, but differ between"):
        stepped(model, rank, size, criterion=nn.MSELoss(), params=list(model.parameters()))


@check
def a_state_loaded_in_one(rank, size):
    options = {"criterion": nn.MSELoss(), "damping": 1e-2, "momentum": 0.5}
    model = mlp()
    first, second = AdaptedGD(model, **options), AdaptedGD(model, **options)
    x, y = (shared(t, rank, size) for t in data())

    def run(optimizer):
        optimizer.zero_grad()
        options["criterion"](model(x), y).backward()
        optimizer.step()

    run(first)
    second.last_step = None
    if rank == 0:
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    with raises(RuntimeError, "The states of optimizers should be the same in all processes, but differ between process 0 and"):
        run(second)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second)


@check
def a_second_step_without_a_call(rank, size):
    """Gradients of zeros, which ask for the state alone, in one process."""
    model, criterion = mlp(), nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion)
    x, y = (shared(t, rank, size) for t in data())
    criterion(model(x), y).backward()
    optimizer.step()
    if rank == 1:
        optimizer.zero_grad(set_to_none=False)
    with raises(RuntimeError, "`step` found no call of the model"):
        optimizer.step()


@check
def time_outs_are_those_of_the_group(rank, size):
    from torch_adapted_gd.world import _timeout_of, world_of

    group = dist.new_group(timeout=datetime.timedelta(seconds=17))
    world = world_of(group, torch.device("cpu"))
    assert _timeout_of(group) == _timeout_of(world._control) == datetime.timedelta(seconds=17)


@check
def shares_of_any_size_have_one_curvature(rank, size):
    """The weights of processes round differently; entries that are curved alike take no metric, which would copy Θ."""
    from torch_adapted_gd.step.linearization import Problem

    for sizes in ((5, 1, 28), (3, 18, 1), (4, 26, 1)):
        with mock.patch("torch_adapted_gd.step.linearization.Problem", wraps=Problem) as made:
            for _ in trained(rank, size, mlp(), nn.MSELoss(), sizes, steps=1):
                assert made.call_args.args[2] is None


@check
def synchronized_batch_norm(rank, size):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = mlp(), nn.SyncBatchNorm(2)

        def forward(self, x):
            return self.layer(x)

    with raises(ValueError, "`model` should have no SyncBatchNorm in training mode for AdaptedGD, but 'norm' is one"):
        stepped(Net(), rank, size, criterion=nn.MSELoss())


@check
def sharded_parameters(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    model = distribute_module(mlp(), init_device_mesh("cpu", (size,)))
    with raises(ValueError, "Parameter '0.weight' should be whole in each process, but is sharded"):
        AdaptedGD(model, criterion=nn.MSELoss())


@check
def warnings_come_from_one(rank, size):
    model, criterion = mlp(), nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion)
    x, y = (shared(t, rank, size) for t in data())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            (criterion(model(x), y) + model[0].weight.square().sum()).backward()
            optimizer.step()
    assert len([w for w in caught if "did not come through" in str(w.message)]) == int(rank == 0)


@check
def padded_samplers(rank, size):
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    model, samples = mlp(), TensorDataset(*data(16))
    sampler = DistributedSampler(samples, size, rank)
    optimizer = AdaptedGD(model, criterion=nn.MSELoss(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [optimizer.full_batch(DataLoader(samples, batch_size=3, sampler=sampler)) for _ in range(2)]
    assert [str(w.message).startswith("DistributedSampler gives 2 of 16 samples twice") for w in caught] == [True] * (rank == 0)
    assert alike([torch.tensor(losses)], size)
    assert losses[1] < losses[0]


@check
def a_loader_that_fails(rank, size):
    model = mlp()
    optimizer = AdaptedGD(wrapped(model, size), criterion=nn.MSELoss())
    before = snapshot(model, optimizer)
    batches = [data(4)] if rank != 2 else []
    kind, text = (
        (ValueError, "`loader` should give at least one batch") if rank == 2 else (RuntimeError, "Process 2 of 3 could")
    )
    with raises(kind, text):
        optimizer.full_batch(batches)
    assert unchanged(before, snapshot(model, optimizer))
    optimizer.full_batch([data(4)])


@check
def a_group_of_its_own(rank, size):
    """A process that trains by itself exchanges nothing."""
    groups = [dist.new_group([r]) for r in range(size)]
    model = mlp(seed=rank)
    criterion = nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion, process_group=groups[rank])
    x, y = data(4 + rank)
    for _ in range(rank + 1):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    assert optimizer.last_step.num_outputs == 2 * (4 + rank)


@check
def a_checkpoint_of_one_resumes_all(rank, size):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    options = {"criterion": nn.MSELoss(), "lr": 0.5, "momentum": 0.5}
    model = mlp()
    x, y = (shared(t, rank, size) for t in data())

    def run(net, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            options["criterion"](net(x), y).backward()
            optimizer.step()

    net = wrapped(model, size)
    optimizer = AdaptedGD(net, **options)
    run(net, optimizer, 2)
    saved = [(copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()))] if rank == 0 else [None]
    dist.broadcast_object_list(saved, 0)
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder, 0)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder[0])
    run(net, optimizer, 2)

    again = mlp(seed=5)
    again_net = wrapped(again, size)
    again_optimizer = AdaptedGD(again_net, **options)
    again.load_state_dict(saved[0][0])
    again_optimizer.load_state_dict(saved[0][1])
    run(again_net, again_optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    third = mlp(seed=6)
    third_net = wrapped(third, size)
    third_optimizer = AdaptedGD(third_net, **options)
    model_state, optimizer_state = get_state_dict(third_net, third_optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder[0])
    set_state_dict(third_net, third_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    run(third_net, third_optimizer, 2)
    apart = max(float((a - b).abs().max()) for a, b in zip(model.parameters(), third.parameters(), strict=True))
    assert apart <= 1e-6, apart


def as_launched(rank, size):
    """The environment that torchrun sets."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "TORCHELASTIC_RUN_ID": "none"}
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    return mock.patch.dict(os.environ, {**address, **{name: str(number) for name, number in numbers.items()}})


@case
def under_accelerate(rank, size):
    accelerate = pytest.importorskip("accelerate")
    model, criterion = mlp(), nn.MSELoss()
    x, y = (shared(t, rank, size) for t in data())
    with as_launched(rank, size) if size > 1 else contextlib.nullcontext():
        accelerator = accelerate.Accelerator(cpu=True)
        assert accelerator.num_processes == size
        net = accelerator.prepare(model)
        optimizer = accelerator.prepare(AdaptedGD(net, criterion=criterion))
        for _ in range(STEPS):
            optimizer.zero_grad()
            accelerator.backward(criterion(net(x), y))
            optimizer.step()
            yield model, optimizer.optimizer
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@case
def under_fabric(rank, size):
    fabrics = pytest.importorskip("lightning.fabric")
    model, criterion = mlp(), nn.MSELoss()
    x, y = (shared(t, rank, size) for t in data())
    with as_launched(rank, size) if size > 1 else contextlib.nullcontext():
        fabric = fabrics.Fabric(accelerator="cpu", strategy="ddp" if size > 1 else "auto", devices=size)
        fabric.launch()
        assert fabric.world_size == size
        net, optimizer = fabric.setup(model, AdaptedGD(model, criterion=criterion))
        for _ in range(STEPS):
            optimizer.zero_grad()
            fabric.backward(criterion(net(x), y))
            optimizer.step()
            yield model, optimizer.optimizer


def outcome_of(name, rank, size):
    """θ after each step, what the reports said, and the state."""
    thetas, reports, model, optimizer = [], [], None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for model, optimizer in CASES[name](rank, size):
                thetas.append(torch.cat([p.detach().double().reshape(-1) for p in model.parameters()]))
                reports.append({field: getattr(optimizer.last_step, field) for field in FIELDS})
        except pytest.skip.Exception:  # something is not installed
            return None
    return {
        "theta": torch.stack(thetas),
        "reports": reports,
        "state": copy.deepcopy(optimizer.state_dict()),
        "double": next(model.parameters()).dtype == torch.float64,
    }


def in_processes(work, size, timeout=60):
    """Fork processes that work on something and give what each came to, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                try:
                    torch.set_num_threads(1)
                    dist.init_process_group(
                        "gloo",
                        init_method=f"file://{folder}/store",
                        rank=rank,
                        world_size=size,
                        timeout=datetime.timedelta(seconds=timeout),
                    )
                    torch.save(work(rank, size), f"{folder}/{rank}.pt")
                    dist.barrier()
                    dist.destroy_process_group()
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)
            children.append(child)
        codes = {}
        while len(codes) < size:
            child, status = os.wait()
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child]:
                for other in set(children) - codes.keys():  # it would wait for the one that failed
                    os.kill(other, signal.SIGKILL)
        if any(codes.values()):
            raise RuntimeError(f"A process failed: {codes}")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(size)]


def checked(name, rank, size):
    """What a check found to be wrong; nothing if all is well."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CHECKS[name](rank, size)
    except Exception:
        return traceback.format_exc()
    return ""


def main():
    """Run all cases and checks, or some, and write what they came to."""
    torch.set_num_threads(1)
    names = sys.argv[2:] or [*CASES, *CHECKS]

    def work(rank, size):
        found = {}
        for name in names:
            found[name] = outcome_of(name, rank, size) if name in CASES else checked(name, rank, size)
            dist.barrier()
        return found

    together = in_processes(work, SIZE)
    alone = {name: outcome_of(name, 0, 1) for name in names if name in CASES}
    torch.save({"alone": alone, "together": together}, sys.argv[1])


if __name__ == "__main__":
    main()
