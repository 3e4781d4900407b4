"""What the cases and checks of several processes share."""

import os
import re

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as Wrapped

from torch_adapted_gd import AdaptedGD

SIZE = 3
DEVICE = os.environ.get("DISTRIBUTED_DEVICE", "cpu")  # of `trained`; several processes can share a GPU by gloo
STEPS = 3
CASES = {}


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


def raises(kind, text):
    return pytest.raises(kind, match=re.escape(text))


CHECKS = {}


def check(function):
    """Register a check: a function of (rank, size), run in all processes, that raises where something is wrong."""
    CHECKS[function.__name__] = function
    return function
