"""What `AdaptedGD` does with nothing but a criterion, beside settings by hand: the table in docs/choosing.md.

Seven small jobs, whole data and mini-batches, regression and digits, three seeds each. A cell has the median of the training
loss at the end (and of the best test accuracy where there is a test set); "diverged" if the loss ended above where it began in
any seed, or a step could not be taken.
"""

import argparse
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torch_adapted_gd import AdaptedGD, LevenbergMarquardt

from .classify import data
from .networks import mlp
from .options import parse

SETTINGS: dict[str, dict[str, Any]] = {
    "nothing set": {},
    "damping=0": {"damping": 0.0},
    "damping=1e-2": {"damping": 1e-2},
    "damping=1e-1": {"damping": 1e-1},
    "damping=1": {"damping": 1.0},
    "lr=0.3, damping=1e-2": {"lr": 0.3, "damping": 1e-2},
    "lr=0.1, damping=1e-3, momentum=0.9": {"lr": 0.1, "damping": 1e-3, "momentum": 0.9},
    'lr=0.3, damping=1e-2, metric="ggn"': {"lr": 0.3, "damping": 1e-2, "metric": "ggn"},
    "policy, carry_over=0": {"damping": LevenbergMarquardt(carry_over=0.0)},
    "policy, second_order=False": {"damping": LevenbergMarquardt(second_order=False)},
    "policy, initial=1e-2": {"damping": LevenbergMarquardt(initial=1e-2)},
    "policy, initial=1": {"damping": LevenbergMarquardt(initial=1.0)},
    "policy, momentum=0.5": {"momentum": 0.5},
    'policy, metric="ggn"': {"metric": "ggn"},
}


@dataclass(frozen=True)
class Job:
    """Something to learn.

    Attributes:
        sizes: Of the network's layers.
        x: Inputs.
        y: Targets.
        batch: N of a step.
        epochs: How often all of it is seen.
        criterion: The loss.
        test: Inputs and classes that are not trained on, or None.
    """

    sizes: tuple[int, ...]
    x: Tensor
    y: Tensor
    batch: int
    epochs: int
    criterion: nn.Module
    test: tuple[Tensor, Tensor] | None = None


def jobs() -> dict[str, Job]:
    """The table's columns."""
    line = torch.linspace(-1, 1, 2000)[:, None]
    sinc = torch.sinc(10 * line)
    points = torch.rand(512, 4, generator=torch.Generator().manual_seed(0))
    waves = torch.stack([(3 * points.sum(1)).sin(), (4 * points[:, 0] * points[:, 1] - points[:, 2]).cos()], 1)
    images, labels = data()
    digits, one_hot = images[:1000], nn.functional.one_hot(labels[:1000], 10).float()
    test = images[4000:], labels[4000:]
    squared, entropy = nn.MSELoss(), nn.CrossEntropyLoss()
    return {
        "sinc, whole": Job((1, 20, 1), line, sinc, 2000, 100, squared),
        "sinc, 100": Job((1, 20, 1), line, sinc, 100, 10, squared),
        "waves, 200 whole": Job((4, 64, 64, 2), points[:200], waves[:200], 200, 30, squared),
        "waves, 64": Job((4, 64, 64, 2), points, waves, 64, 12, squared),
        "digits squared, 64": Job((784, 64, 64, 10), digits, one_hot, 64, 8, squared, test),
        "digits entropy, 64": Job((784, 64, 64, 10), digits, labels[:1000], 64, 8, entropy, test),
        "digits entropy, 100 whole": Job((784, 64, 10), images[:100], labels[:100], 100, 20, entropy, test),
    }


def train(job: Job, setting: dict[str, Any], seed: int) -> tuple[float, float, float]:
    """Training loss before and after, and the best test accuracy."""
    torch.manual_seed(seed)
    model = mlp(*job.sizes)
    optimizer = AdaptedGD(model, criterion=job.criterion, **setting)
    evaluate: Callable[[], float] = lambda: float(job.criterion(model(job.x), job.y).detach())  # noqa: E731
    start, best = evaluate(), math.nan
    for _ in range(job.epochs):
        for part in torch.randperm(len(job.x)).split(job.batch):
            optimizer.zero_grad()
            job.criterion(model(job.x[part]), job.y[part]).backward()
            try:
                optimizer.step()
            except RuntimeError:
                return start, math.inf, best
        if job.test is not None:
            with torch.no_grad():
                accuracy = float((model(job.test[0]).argmax(1) == job.test[1]).double().mean())
            best = max(accuracy, 0.0 if math.isnan(best) else best)
    return start, evaluate(), best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parse(parser, seeds=1)
    columns, settings = jobs(), list(SETTINGS.items())
    if options.small:
        columns = {name: replace(job, x=job.x[:100], y=job.y[:100], epochs=1) for name, job in columns.items()}
        settings = settings[:2]
    print("| setting | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|", flush=True)
    for name, setting in settings:
        cells = []
        for job in tqdm(columns.values(), desc=name, leave=False, disable=None):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results = [train(job, setting, seed) for seed in range(options.seeds)]
            loss = statistics.median(end for _, end, _ in results)
            cell = f"{loss:.1e}"
            if any(not end <= start for start, end, _ in results):
                cell = "diverged"
            elif job.test is not None:
                cell += f" ({statistics.median(best for *_, best in results):.3f})"
            cells.append(cell)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
