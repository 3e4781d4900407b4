"""What CollapseMonitor adds to training, in units of the forward passes that it cannot do without.

A network is trained in Lightning on 1,000 images; at the end of each epoch the monitor evaluates it on them, and beside it,
in the same run, a callback does nothing but run the network on the same batches. The ratio of the medians is printed.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_adapted_gd.lightning import CollapseMonitor

from .networks import cnn, mlp
from .options import parse


class Classifier(pl.LightningModule):
    """Any classifier."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Its outputs."""
        outputs: Tensor = self.net(x)
        return outputs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        del batch_idx
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def pooled_cnn() -> nn.Sequential:
    """A network of convolutions whose features are means over the image, as those of ResNets are."""
    return nn.Sequential(*list(cnn(1, 64, 128))[:-2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class TimedMonitor(CollapseMonitor):
    """Knows how long each evaluation took, logging included."""

    seconds: list[float]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin."""
        self.seconds = []
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate."""
        began = time.perf_counter()
        super().on_train_epoch_end(trainer, pl_module)
        self.seconds.append(time.perf_counter() - began)


class ForwardPasses(pl.Callback):
    """Runs the network on the same batches, and knows how long that took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run it."""
        began = time.perf_counter()
        loader: Any = trainer.train_dataloader
        with torch.no_grad():
            for x, _ in DataLoader(loader.dataset, batch_size=loader.batch_size):
                pl_module(x)
        self.seconds.append(time.perf_counter() - began)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000, help="reference images (1000)")
    parser.add_argument("--epochs", type=int, default=30, help="medians are over so many (30)")
    options = parse(parser, samples=50, epochs=1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    images, labels = torch.randn(options.samples, 1, 28, 28), torch.randint(0, 10, (options.samples,))
    cases: dict[str, tuple[Callable[[], nn.Module], str]] = {
        "MLP 784-256-256-10": (lambda: nn.Sequential(nn.Flatten(), mlp(784, 256, 256, 10)), "net.1.4"),
        "MLP 784-1024-1024-10": (lambda: nn.Sequential(nn.Flatten(), mlp(784, 1024, 1024, 10)), "net.1.4"),
        "CNN 1-64-128, 128 features": (pooled_cnn, "net.8"),
        "CNN 1-64-128, 6,272 features": (lambda: cnn(1, 64, 128), "net.7"),
    }
    print(f"{options.samples} images, {torch.get_num_threads()} threads; seconds, medians of {options.epochs} epochs")
    print("| network | monitored | forward passes | monitor | ratio |\n|---|---|---|---|---|")
    for name, (build, head) in cases.items():
        for watched in (None, head):
            monitor, passes = TimedMonitor(10, head=watched), ForwardPasses()
            trainer = pl.Trainer(
                max_epochs=options.epochs + 2,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[monitor, passes],
            )
            trainer.fit(Classifier(build()), DataLoader(TensorDataset(images, labels), batch_size=250, shuffle=True))
            alone, whole = (statistics.median(seconds[2:]) for seconds in (passes.seconds, monitor.seconds))
            what = "outputs" if watched is None else "outputs and features"
            print(f"| {name} | {what} | {alone:.4f} | {whole:.4f} | {whole / alone:.2f} |", flush=True)


if __name__ == "__main__":
    main()
