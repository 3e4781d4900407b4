"""Checks: what all processes have to agree on, and what happens if one fails."""

import contextlib
import copy
import datetime
import tempfile
import time
import warnings
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from torch_adapted_gd import AdaptedGD

from .parts import CHECKS, check, data, mlp, raises, shared, trained, wrapped


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
