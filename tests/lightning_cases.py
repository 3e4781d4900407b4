"""Classifiers, data and quiet trainers for the tests of callbacks, under either name of Lightning."""

import functools
import logging
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torch_adapted_gd import AdaptedGD, HalfSquaredLoss
from torch_adapted_gd.collapse import neural_collapse, output_collapse

NAMES = ("lightning.pytorch", "pytorch_lightning")
CLASSES, INPUTS, WIDTH = 3, 5, 6
HALF = HalfSquaredLoss()
HEAD = "net.6"


def one_hot(labels):
    return nn.functional.one_hot(labels, CLASSES).float()


class Delicate(nn.Module):
    """A network that a careless evaluation would disturb: with dropout, running statistics, and a part kept in eval mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Dropout(0.3))
        self.frozen = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.3)).eval()
        self.head = nn.Linear(WIDTH, CLASSES)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x):
        return self.head(self.frozen(self.layers(x)))


def plain():
    return nn.Sequential(
        nn.Linear(INPUTS, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH), nn.Tanh(),
        nn.Linear(WIDTH, CLASSES),
    )  # fmt: skip


@functools.cache
def classifier(pl):
    """An ordinary LightningModule, without any code for monitors."""

    class Classifier(pl.LightningModule):
        def __init__(self, make=plain, optimizer="sgd", lr=0.1):
            super().__init__()
            torch.manual_seed(7)
            self.net = make()
            self.optimizer, self.lr = optimizer, lr

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            x, labels = batch
            outputs = self(x)
            return HALF(outputs, one_hot(labels).to(outputs.dtype))

        def configure_optimizers(self):
            if self.optimizer == "adapted":
                return AdaptedGD(self, lr=0.3, criterion=HALF, damping=1e-3)
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    return Classifier


def new_classifier(pl, *args, **kwargs):
    return classifier(pl)(*args, **kwargs)


@functools.cache
def samples(count=23):
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % CLASSES
    centres = torch.randn(CLASSES, INPUTS, generator=generator)
    return centres[labels] + torch.randn(count, INPUTS, generator=generator), labels


def dataset(count=23):
    return TensorDataset(*samples(count))


def loader(count=23, batch_size=8, **options):
    return DataLoader(dataset(count), batch_size=batch_size, **options)


class Drawing(Dataset):
    """Samples that draw random numbers from three sources, and add them as noise of this size."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return 23

    def __getitem__(self, index):
        x, labels = samples()
        noise = torch.randn(INPUTS) + torch.from_numpy(np.random.randn(INPUTS)).float() + random.random()  # noqa: NPY002
        return x[index] + self.size * noise, labels[index]


def new_trainer(pl, tmp_path, callbacks=(), **options):
    for name in ("lightning", "pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    more = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "default_root_dir": tmp_path, "num_sanity_val_steps": 0}
    return pl.Trainer(callbacks=callbacks, **{**quiet, **more, **options})


def fit(pl, module, tmp_path, callbacks=(), train=None, val=None, ckpt_path=None, **options):
    trainer = new_trainer(pl, tmp_path, callbacks, **options)
    trainer.fit(module, loader(drop_last=True, shuffle=True) if train is None else train, val, ckpt_path=ckpt_path)
    return trainer


@torch.no_grad()
def expected(module, batch, head=None, **options):
    """The figures of the network in evaluation mode, by the functions."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    x, labels = batch
    kept = []
    layer = module.get_submodule(head) if head else None
    handle = layer.register_forward_hook(lambda _, args, out: kept.append((args[0], out))) if head else None
    outputs = module(x.to(next(module.parameters()).dtype))
    for part, training in modes:
        part.training = training
    found = output_collapse(outputs, labels, CLASSES)
    if head:
        handle.remove()
        features, logits = kept[0]
        found |= neural_collapse(features, labels, layer.weight, layer.bias, logits=logits, **options)
    return {key: float(value) for key, value in found.items()}


def agree(row, values, rel=1e-12):
    """Check that a row of the history has these values."""
    for key, value in values.items():
        if key != "gap":
            assert row[key] == pytest.approx(value, rel=rel, abs=1e-15, nan_ok=True), key


def framework(name):
    return pytest.importorskip(name)
