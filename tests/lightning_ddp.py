"""Trains in two processes, by ``python -m tests.lightning_ddp FOLDER``, and writes what the monitors in each recorded."""

import json
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, WeightedRandomSampler

from torch_adapted_gd.lightning import CollapseMonitor

from .lightning_cases import CLASSES, HALF, INPUTS, dataset, new_trainer, one_hot

SUBSET = [0, 1, 2, 4, 5, 7, 9, 11, 12, 15, 18, 21, 22]


def given(trainer, module):
    return DataLoader(dataset(), batch_size=4, shuffle=True)


# Options of the monitor, of the training loader and of the trainer.
CASES = {
    "odd": ({"head": "net.2", "hpd_lambda": 1e-2}, {"shuffle": True}, {}),
    "one batch at a time": ({"head": "net.2", "cache_bytes": 0}, {}, {}),
    "drop_last": ({"head": "net.2"}, {"shuffle": True, "drop_last": True}, {}),
    "subset": ({}, {"sampler": SubsetRandomSampler(SUBSET)}, {}),
    "weights": ({}, {"sampler": WeightedRandomSampler([1.0, 1.0, 0.0] * 7 + [0.0] * 2, 16)}, {}),
    "limit": ({"limit_batches": 3}, {}, {}),
    "overfit": ({}, {}, {"overfit_batches": 2}),
    "explicit": ({"reference": given, "head": "net.2", "cache_bytes": 0}, {}, {}),
    "explicit limit": ({"reference": [next(iter(DataLoader(dataset(), batch_size=23)))], "limit_batches": 1}, {}, {}),
    "one sample": ({"reference": "val", "head": "net.2", "cache_bytes": 0}, {}, {}),
    "every step": ({"every_n_steps": 2, "head": "net.2"}, {}, {}),
    "stream": ({"mode": "stream"}, {}, {}),
    "stream of the head": ({"mode": "stream", "head": "net.2"}, {}, {}),
}


class Classifier(pl.LightningModule):
    def __init__(self, case):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), nn.Linear(4, CLASSES))
        self.case = case
        self.seen = []  # outputs of the present epoch

    def forward(self, x):
        return self.net(x)

    def on_train_epoch_start(self):
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, labels = batch
        outputs = self(x)
        self.seen.append((outputs.detach().clone(), labels))
        return HALF(outputs, one_hot(labels).to(outputs.dtype))

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def val_dataloader(self):
        return DataLoader(dataset(2 if self.case.startswith("stream") else 1), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Notes(pl.Callback):
    def __init__(self, monitor, path):
        self.monitor, self.path = monitor, path

    def on_train_end(self, trainer, pl_module):
        seen = [torch.cat(parts).tolist() for parts in zip(*pl_module.seen, strict=True)]
        logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
        notes = {"history": self.monitor.history, "logged": logged, "seen": seen, "keys": list(logged)}
        Path(f"{self.path}.{trainer.global_rank}.json").write_text(json.dumps(notes))
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), f"{self.path}.pt")


def main(folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for case, (options, train, settings) in CASES.items():
        monitor = CollapseMonitor(CLASSES, **options)
        callbacks = [monitor, Notes(monitor, folder / case)]
        several = {"strategy": "ddp_fork", "devices": 2, "precision": "64-true", "max_epochs": 1, **settings}
        trainer = new_trainer(pl, folder, callbacks, **several)
        trainer.fit(Classifier(case), DataLoader(dataset(), batch_size=4, **train))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
