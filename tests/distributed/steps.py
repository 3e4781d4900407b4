"""Cases: steps of several processes that have to be those of one process on all of their samples."""

import contextlib
import os
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.join import Join

from torch_adapted_gd import AdaptedGD, Backtracking, ConjugateGradients, Dense, LevenbergMarquardt, LossFunction, StraightLine

from .parts import STEPS, case, data, mlp, shared, trained, wrapped


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
