import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from torch_adapted_gd import AdaptedGD, LinearInterpolationLR

from .cases import COUPLED

CRITERION = nn.CrossEntropyLoss()


def build():
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": [*model[1].parameters(), *model[4].parameters()]}]
    optimizer = AdaptedGD(model, params=groups, criterion=CRITERION, damping=1e-2, alpha=0.8, weight_decay=1e-3)
    return model, optimizer, LinearInterpolationLR(optimizer, 8)


def train(model, optimizer, scheduler, steps):
    for _ in range(steps):
        x, y = torch.randn(7, 4), torch.randint(3, (7,))
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        optimizer.step()
        scheduler.step()


@COUPLED
@pytest.mark.parametrize("accumulated", [False, True])
def test_resuming_in_the_middle_gives_the_same_bits(accumulated):
    model, optimizer, scheduler = build()
    train(model, optimizer, scheduler, 3)
    optimizer.param_groups[0]["damping"] = optimizer.param_groups[1]["damping"] = 5e-3  # changed on the way, restored too
    file = io.BytesIO()
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "stream": torch.get_rng_state(),
        },
        file,
    )
    train(model, optimizer, scheduler, 3)

    other_model, other, other_scheduler = build()
    if accumulated:
        train(other_model, other, other_scheduler, 1)  # leftovers that loading has to replace
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other_model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    other_scheduler.load_state_dict(saved["scheduler"])
    torch.set_rng_state(saved["stream"])
    train(other_model, other, other_scheduler, 3)

    ours, theirs = model.state_dict(), other_model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert other.state_dict() == optimizer.state_dict()
    assert other.last_step == optimizer.last_step


def made(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 2))
    return model, AdaptedGD(model, criterion=nn.MSELoss(), **options)


def regress(model, optimizer, steps=2):
    x, y = torch.randn(16, 5, generator=torch.Generator().manual_seed(1)), torch.zeros(16, 2)
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.criterion(model(x), y).backward()
        optimizer.step()


def test_a_state_is_loaded_as_often_as_one_likes():
    """As accelerate does; and into copies, of whose defaults torch makes more."""
    model, optimizer = made()
    optimizer.load_state_dict(optimizer.state_dict())
    regress(model, optimizer)
    best = copy.deepcopy(optimizer.state_dict())
    regress(model, optimizer)
    optimizer.load_state_dict(best)
    for other in (copy.deepcopy(made()[1]), pickle.loads(pickle.dumps(made()[1]))):
        other.load_state_dict(other.state_dict())


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}])
@pytest.mark.parametrize("steps", [0, 2])
def test_distributed_checkpoints(options, steps):
    """torch.distributed.checkpoint calls `step` with zero gradients and lr 0 to have the state made."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model, optimizer = made(**options)
    regress(model, optimizer, steps)
    optimizer.zero_grad()
    before = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = checkpoint.get_optimizer_state_dict(model, optimizer)
        other, fresh = made(**options)
        checkpoint.set_optimizer_state_dict(other, fresh, saved)
    assert optimizer.param_groups[0]["lr"] == 1.0
    if steps:
        for ours, theirs in zip(tree_leaves(before["state"]), tree_leaves(fresh.state_dict()["state"]), strict=True):
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    other.load_state_dict(model.state_dict())
    regress(model, optimizer)
    regress(other, fresh)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
