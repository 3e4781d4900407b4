import io

import pytest
import torch
from torch import nn

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
