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
        # In float64 from the start: Lightning loads checkpoints before it converts modules.
        self.net = nn.Sequential(nn.Linear(INPUTS, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
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


class Data(pl.LightningDataModule):
    """Gives each of two processes its half of each batch of the one that trains alone."""

    def train_dataloader(self):
        processes, rank = self.trainer.world_size, self.trainer.global_rank
        size = 6 // processes
        indices = [i for start in range(0, 24, 6) for i in range(start + rank * size, start + (rank + 1) * size)]
        return DataLoader(torch.utils.data.Subset(dataset(), indices), batch_size=size)


def fit(folder, case, epochs, name="", *, save=False, resume=None):
    whole, told, accumulated, processes = CASES[case]
    monitor = CollapseMonitor(CLASSES, head="net.2", reference=DataLoader(dataset(), batch_size=5))
    callbacks = [monitor, AdaptedStepMonitor(), Notes(monitor, folder / f"{case}{name}")]
    if save:
        callbacks.append(pl.callbacks.ModelCheckpoint(folder / case, save_last=True))
    options = {
        "strategy": "ddp_fork" if processes > 1 else "auto",
        "devices": processes,
        "precision": "64-true",
        "accumulate_grad_batches": accumulated,
        "use_distributed_sampler": False,
        "enable_checkpointing": save,
        "max_epochs": epochs,
    }
    new_trainer(pl, folder, callbacks, **options).fit(Classifier(whole, told), datamodule=Data(), ckpt_path=resume)


def main(folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for case in CASES:
        fit(folder, case, 3)
    fit(folder, "the module, two", 2, ", begun", save=True)
    fit(folder, "the module, two", 3, ", resumed", resume=folder / "the module, two" / "last.ckpt")


class Notes(pl.Callback):
    def __init__(self, monitor, path):
        self.monitor, self.path = monitor, path

    def on_train_end(self, trainer, pl_module):
        notes = {
            "history": self.monitor.history,
            "theta": torch.cat([p.detach().reshape(-1) for p in pl_module.parameters()]).tolist(),
            "trials": trainer.optimizers[0].last_step.num_trials,
            "logged": {key: float(value) for key, value in trainer.callback_metrics.items()},
        }
        Path(f"{self.path}.{trainer.global_rank}.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
