"""Trains with AdaptedGD under Lightning's ``ddp`` strategy, by ``python -m tests.lightning_steps FOLDER``."""

import json
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from torch_adapted_gd import AdaptedGD
from torch_adapted_gd.lightning import AdaptedStepMonitor, CollapseMonitor

from .lightning_cases import CLASSES, INPUTS, new_trainer

# What AdaptedGD is given, whether it is told of the criterion, batches accumulated, processes.
CASES = {
    "the module, one process": (True, True, 1, 1),
    "the module, two": (True, True, 1, 2),
    "the network, two": (False, True, 1, 2),
    "functional loss, one process": (True, False, 1, 1),
    "functional loss, two": (True, False, 1, 2),
    "accumulated, one process": (True, True, 2, 1),
    "accumulated, two": (True, True, 2, 2),
}


def dataset():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(24, INPUTS, generator=generator, dtype=torch.float64)
    return torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0.4).long())


class Classifier(pl.LightningModule):
    def __init__(self, whole, told):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(INPUTS, 6), nn.Tanh(), nn.Linear(6, CLASSES))
        self.criterion = nn.CrossEntropyLoss()
        self.whole, self.told = whole, told

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, labels = batch
        outputs = self(x) if self.whole else self.net(x)
        return self.criterion(outputs, labels) if self.told else nn.functional.cross_entropy(outputs, labels)

    def configure_optimizers(self):
        return AdaptedGD(self if self.whole else self.net, criterion=self.criterion if self.told else None)


class Order(torch.utils.data.Sampler):
    """Gives each of two processes its half of each batch of the one that trains alone."""

    def __init__(self, processes, rank, accumulated):
        self.indices = [
            i for start in range(0, 24, 6) for i in range(start, start + 6)[slice(rank * 3, rank * 3 + 3) if processes == 2 else slice(None)]
        ]

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


class Data(pl.LightningDataModule):
    def __init__(self, accumulated):
        super().__init__()
        self.accumulated = accumulated

    def train_dataloader(self):
        processes, rank = self.trainer.world_size, self.trainer.global_rank
        return DataLoader(dataset(), batch_size=6 // processes, sampler=Order(processes, rank, self.accumulated))


def main(folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for case, (whole, told, accumulated, processes) in CASES.items():
        module, monitor = Classifier(whole, told), CollapseMonitor(CLASSES, head="net.2", reference=DataLoader(dataset(), batch_size=5))
        options = {
            "strategy": "ddp_fork" if processes > 1 else "auto",
            "devices": processes,
            "precision": "64-true",
            "accumulate_grad_batches": accumulated,
            "use_distributed_sampler": False,
            "enable_checkpointing": True,
        }
        checkpoint = pl.callbacks.ModelCheckpoint(folder / case, save_last=True)
        callbacks = [monitor, AdaptedStepMonitor(), checkpoint, Notes(monitor, folder / case)]
        new_trainer(pl, folder, callbacks, **{**options, "max_epochs": 2}).fit(module, datamodule=Data(accumulated))
        again = Classifier(whole, told)
        callbacks = [CollapseMonitor(CLASSES, head="net.2", reference=DataLoader(dataset(), batch_size=5)), Notes(None, folder / f"{case}, resumed")]
        trainer = new_trainer(pl, folder, callbacks, **{**options, "max_epochs": 3, "enable_checkpointing": False})
        trainer.fit(again, datamodule=Data(accumulated), ckpt_path=folder / case / "last.ckpt")
        straight = Classifier(whole, told)
        callbacks = [Notes(None, folder / f"{case}, straight")]
        trainer = new_trainer(pl, folder, callbacks, **{**options, "max_epochs": 3, "enable_checkpointing": False})
        trainer.fit(straight, datamodule=Data(accumulated))


class Notes(pl.Callback):
    def __init__(self, monitor, path):
        self.monitor, self.path = monitor, path

    def on_train_end(self, trainer, pl_module):
        notes = {
            "history": [] if self.monitor is None else self.monitor.history,
            "theta": torch.cat([p.detach().reshape(-1) for p in pl_module.parameters()]).tolist(),
            "trials": trainer.optimizers[0].last_step.num_trials,
            "logged": {key: float(value) for key, value in trainer.callback_metrics.items()},
        }
        Path(f"{self.path}.{trainer.global_rank}.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
