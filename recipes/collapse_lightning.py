"""Collapse on real digits, in Lightning: the adapted step beside SGD or Adam.

One network is trained by each optimizer with the paper's squared loss, far beyond the point where it makes no more mistakes on
its training images, with CollapseMonitor attached. By AdaptedGD with LinearInterpolationLR, on all images at once, class
averages and deviations move on straight lines to the targets and to zero (Corollary 3.2); SGD with weight decay nears
them in a long terminal phase, in which the features collapse too (NC1 to NC4). The table says how far each got; the figures
show how.
"""

import argparse
import logging
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import race
import torch
from digits import SOURCES, load_digits
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_adapted_gd import AdaptedGD, HalfSquaredLoss, LinearInterpolationLR
from torch_adapted_gd.lightning import AdaptedStepMonitor, CollapseMonitor
from torch_adapted_gd.plotting import plot_collapse, plot_collapse_page

CLASSES = 10
NAMES = {"adapted": "AdaptedGD", "sgd": "SGD", "adam": "Adam"}


class DigitClassifier(pl.LightningModule):
    """An MLP with the paper's squared loss between its outputs and one-hot targets.

    Args:
        width: Of both hidden layers.
        optimizer: ``"adapted"``, ``"sgd"`` or ``"adam"``; a configuration of LightningCLI may name another.
        lr: Learning rate of SGD, with momentum 0.9 and weight decay 2e-3, and of Adam; it falls to zero like a cosine.
    """

    def __init__(self, width: int = 128, optimizer: str = "adapted", lr: float = 0.1) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES)
        )
        self.criterion = HalfSquaredLoss()
        self.optimizer, self.lr = optimizer, lr

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, ``[N, 10]``."""
        outputs: Tensor = self.net(x)
        return outputs

    def _loss(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        x, labels = batch
        outputs = self(x)
        loss: Tensor = self.criterion(outputs, nn.functional.one_hot(labels, CLASSES).to(outputs.dtype))
        accuracy = (outputs.argmax(1) == labels).double().mean()
        self.log_dict({f"{stage}_loss": loss.detach(), f"{stage}_accuracy": accuracy}, on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        del batch_idx
        return self._loss(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on images that are not trained on."""
        del batch_idx
        self._loss(batch, "test")

    def configure_optimizers(self) -> Any:
        """The optimizer, and how its learning rate goes."""
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer: torch.optim.Optimizer
        scheduler: torch.optim.lr_scheduler.LRScheduler
        if self.optimizer == "adapted":
            optimizer = AdaptedGD(self, criterion=self.criterion, damping=0.0)
            scheduler = LinearInterpolationLR(optimizer, total_steps=steps)
        else:
            kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
            options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 2e-3} if self.optimizer == "sgd" else {}
            optimizer = kinds[self.optimizer](self.parameters(), lr=self.lr, **options)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class DigitsData(pl.LightningDataModule):
    """Images of digits, ``[N, 784]`` in [0, 1], and their labels.

    Args:
        samples: How many to train on.
        batch_size: Images in a step; None for all.
        source: ``"mnist5k"``, ``"mnist"`` or ``"fashion-mnist"``.
        root: Where torchvision's data is.
        seed: Which images, and in which order.
    """

    def __init__(
        self, samples: int = 300, batch_size: int | None = None, source: str = "mnist5k", root: str = "data", seed: int = 0
    ) -> None:
        super().__init__()
        self.samples, self.batch_size, self.source, self.root, self.seed = samples, batch_size, source, root, seed

    def setup(self, stage: str) -> None:
        """Load the images."""
        del stage
        digits = load_digits(self.source, Path(self.root), self.samples, self.seed)
        self.train = TensorDataset(digits.train_images.float(), digits.train_labels)
        self.test = TensorDataset(digits.test_images.float(), digits.test_labels)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, but where all images are one batch."""
        size = self.batch_size or self.samples
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, batch_size=size, shuffle=size < self.samples, generator=order)

    def val_dataloader(self) -> DataLoader[Any]:
        """The test images."""
        return DataLoader(self.test, batch_size=1000)


def train(options: argparse.Namespace, name: str) -> tuple[CollapseMonitor, dict[str, Any]]:
    """Train by one optimizer; gives its monitor and a row for the table."""
    adapted = name == "adapted"
    data = DigitsData(options.samples, None if adapted else options.batch_size, options.data, str(options.root), options.seed)
    torch.manual_seed(options.seed)
    model = DigitClassifier(options.width, name, options.lr or {"adapted": 1.0, "sgd": 0.1, "adam": 1e-3}[name])
    epochs = options.steps if adapted else options.epochs
    every = max(1, epochs // 60)

    def progress(trainer: pl.Trainer, module: pl.LightningModule) -> float:  # t of the straight line, if there is one
        del module
        return trainer.global_step / epochs if adapted else float(trainer.current_epoch)

    monitor = CollapseMonitor(CLASSES, head="net.5", every_n_epochs=every, time_fn=progress)
    out = options.out / name
    trainer = pl.Trainer(
        accelerator="cpu" if options.device == "cpu" else "gpu",
        devices=1,
        max_epochs=epochs,
        check_val_every_n_epoch=every,
        num_sanity_val_steps=0,
        log_every_n_steps=1 if adapted else 50,
        callbacks=[monitor, AdaptedStepMonitor()] if adapted else [monitor],
        logger=[CSVLogger(out, name="csv", version=""), TensorBoardLogger(out, name="tensorboard", version="")],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
    )
    began = time.perf_counter()
    trainer.fit(model, datamodule=data)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return monitor, {"seconds": time.perf_counter() - began, **metrics}


def table(rows: dict[str, tuple[CollapseMonitor, dict[str, Any]]]) -> str:
    """How far each optimizer got, from where."""
    keys = ("loss", "within", "bias", "within_fraction", "target_accuracy", "nc1_pinv", "nc2_etf_means", "nc3", "nc4_mismatch")
    columns = [f"{NAMES[name]}, {end}" for name in rows for end in ("start", "end")]
    lines = [f"{'':18}" + "".join(f"{column:>18}" for column in columns)]
    for key in keys:
        cells = [row[key] for monitor, _ in rows.values() for row in (monitor.history[0], monitor.history[-1])]
        lines.append(f"{key:18}" + "".join(f"{cell:18.3e}" for cell in cells))
    for key, label in (("test_accuracy", "test accuracy"), ("seconds", "seconds")):
        lines.append(f"{label:18}" + "".join(f"{'':18}{row[key]:18.3f}" for _, row in rows.values()))
    return "\n".join(lines)


def draw(rows: dict[str, tuple[CollapseMonitor, dict[str, Any]]], out: Path) -> list[Path]:
    """The page of curves, and the straight lines of the adapted step on linear axes."""
    page = plot_collapse_page({NAMES[name]: monitor.history for name, (monitor, _) in rows.items()})
    files = [out / "collapse.png"]
    page.savefig(files[0])
    if "adapted" in rows:
        history = rows["adapted"][0].history
        averages, deviations = (torch.tensor([row[key] for row in history]).sqrt() for key in ("bias_class", "within_class"))
        figure = plot_collapse([row["s"] for row in history], averages, deviations)
        figure.axes[1].set_title("Deviations within classes: √mean |Δxᵢ|²")
        files.append(out / "straight_lines.png")
        figure.savefig(files[1])
    return files


def quiet() -> None:
    """Without what Lightning says of machines, products, and loaders without worker processes."""
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec")
    warnings.filterwarnings("ignore", message="The number of training batches")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe."""
    parser = race.new_parser(__doc__, "results/collapse", "logs and figures", "40 images, 6 steps, 6 epochs")
    parser.add_argument(
        "--optimizer", nargs="+", choices=[*NAMES], default=["adapted", "sgd"], help="one or several (adapted sgd)"
    )
    parser.add_argument("--data", choices=SOURCES, default="mnist5k", help="mnist5k needs no download (mnist5k)")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision's data is (data)")
    parser.add_argument("--samples", type=race.positive, default=300, help="training images (300)")
    parser.add_argument("--width", type=race.positive, default=128, help="of both hidden layers (128)")
    parser.add_argument("--steps", type=race.positive, default=60, help="steps of AdaptedGD, on all images (60)")
    parser.add_argument("--epochs", type=race.positive, default=300, help="epochs of SGD and Adam (300)")
    parser.add_argument("--batch-size", type=race.positive, default=32, help="of SGD and Adam (32)")
    parser.add_argument("--lr", type=race.above_zero, help="of SGD and Adam (0.1 and 1e-3)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where (cpu)")
    quiet()
    with race.started(parser, arguments, {"samples": 40, "width": 32, "steps": 6, "epochs": 6}) as options:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device here.")
        names = list(dict.fromkeys(options.optimizer))
        print(
            f"{options.samples} images of {options.data}, MLP 784-{options.width}-{options.width}-10 tanh: "
            f"{', '.join(NAMES[name] for name in names)}"
        )
        rows = {name: train(options, name) for name in names}
        files = draw(rows, options.out)
    print(table(rows))
    if "adapted" in rows:
        first, *later = (row for row in rows["adapted"][0].history if row["s"] < 1)
        off = max(abs(math.sqrt(row[key] / first[key]) - (1 - row["s"])) for row in later for key in ("within", "bias"))
        print(f"AdaptedGD: √within and √bias differ from (1 − t) of their starts by at most {off:.1e} of these.")
    print(f"wrote {', '.join(map(str, files))}; logs in {', '.join(str(options.out / name) for name in rows)}")


if __name__ == "__main__":
    main()
