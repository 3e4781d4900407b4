"""What several processes do, against one process on all of their samples. Run as a program: results go to a file.

A clean process forks the others, which takes a tenth of a second, runs all cases in each, and writes what they came to.
"""

import contextlib
import copy
import datetime
import os
import signal
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as Wrapped

import torch_adapted_gd as tag
from torch_adapted_gd import AdaptedGD, Backtracking, ConjugateGradients, Dense, LevenbergMarquardt, LossFunction, StraightLine

SIZE = 3
STEPS = 4
CASES = {}
FIELDS = ("status", "num_trials", "rank", "num_outputs", "num_calls", "damping", "fraction", "curvature", "space")


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
    x, y = (shared(t, rank, size, sizes) for t in (xy or data(sum(sizes), dtype=next(model.parameters()).dtype)))
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
    yield from trained(rank, size, mlp(torch.float64), nn.MSELoss(), (2, 9, 5), damping=0.0, lr=0.5)


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
    yield from trained(
        rank, size, mlp(), nn.MSELoss(), (2, 9, 5), lr=0.5, damping=1e-2, momentum=0.6, weight_decay=1e-2
    )


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


def outcome_of(name, rank, size):
    """θ after each step, what the reports said, and the state."""
    thetas, reports, optimizer = [], [], None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model, optimizer in CASES[name](rank, size):
            thetas.append(torch.cat([p.detach().double().reshape(-1) for p in model.parameters()]))
            reports.append({field: getattr(optimizer.last_step, field) for field in FIELDS})
    return {"theta": torch.stack(thetas), "reports": reports, "state": copy.deepcopy(optimizer.state_dict())}


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
                    import traceback

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


def main():
    torch.set_num_threads(1)
    names = sys.argv[2:] or list(CASES)

    def work(rank, size):
        found = {}
        for name in names:
            found[name] = outcome_of(name, rank, size)
            dist.barrier()
        return found

    together = in_processes(work, SIZE)
    alone = {name: outcome_of(name, 0, 1) for name in names}
    torch.save({"alone": alone, "together": together}, sys.argv[1])


if __name__ == "__main__":
    main()
    print(tag.__name__)
