"""Real digits to zero loss along a straight line.

A network with more parameters than outputs (K ≥ QN) is trained on images of digits by AdaptedGD with
LinearInterpolationLR. Theory (Proposition 2.4, Corollary 3.2) says: the outputs of every image move on a straight line
from where they start to their target, the loss is (1 − t)² C₀, and so do class averages and deviations within classes.
The table says how nearly, and what the rank of the Jacobian was.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import race
import torch
from digits import SOURCES, Digits, load_digits
from race import above_zero, positive
from torch import Tensor, nn
from tqdm import tqdm

from torch_adapted_gd import AdaptedGD, HalfSquaredLoss, LinearInterpolationLR, __version__, ntk
from torch_adapted_gd.plotting import plot_collapse, plot_loss, plot_output_paths, plot_spectrum
from torch_adapted_gd.solve import default_rtol

CLASSES = 10
HEADER = "  step      t        loss    (1-t)^2 C0   off line      rank/QN   class avg   deviation  seconds"


@dataclass
class Job:
    """The data and the starting network of a run, the same for every optimizer."""

    images: Tensor  # [N, 784]
    labels: Tensor  # [N]
    targets: Tensor  # [N, 10], one-hot
    test_images: Tensor
    test_labels: Tensor
    build: Callable[[], nn.Module]
    criterion: nn.Module = field(default_factory=HalfSquaredLoss)

    def accuracy(self, model: nn.Module) -> tuple[float, float]:
        """Share of training and test images whose largest output is their class."""
        with torch.no_grad():
            parts = ((self.images, self.labels), (self.test_images, self.test_labels))
            train, test = (float((model(x).argmax(1) == y).double().mean()) for x, y in parts)
        return train, test


@dataclass
class Run(race.Run):
    """What was recorded: one row a step, and the outputs ``[N, 10]`` at each."""

    outputs: list[Tensor] = field(default_factory=list)
    diverged: bool = False
    accuracy: tuple[float, float] = (math.nan, math.nan)

    def observe(self, job: Job, model: nn.Module, step: int, t: float, rank: float, outputs: float) -> str:
        """Take down the present state of the network, while the clock stands; returns the row to print."""
        with self.paused() as seconds:
            return self._observe(job, model, step, t, rank, outputs, seconds)

    def _observe(self, job: Job, model: nn.Module, step: int, t: float, rank: float, outputs: float, seconds: float) -> str:
        with torch.no_grad():
            x = model(job.images).double().cpu()
        y = job.targets.double().cpu()
        self.outputs.append(x)
        start = self.outputs[0]
        timeless = math.isnan(t)
        if timeless:  # where on the line it is nearest
            t = float(((x - start) * (y - start)).sum() / (y - start).square().sum())
        distances = (x - (1 - t) * start - t * y).norm(dim=1) / (start - y).norm(dim=1)
        averages, deviations = class_figures(x, job.labels.cpu(), torch.eye(CLASSES, dtype=torch.float64))
        loss = float((x - y).square().sum() / (2 * len(x)))
        row = {
            "step": step,
            "t": t,
            "loss": loss,
            "theory": math.nan if timeless else (1 - t) ** 2 * (self.rows[0]["loss"] if self.rows else loss),
            "distance": float(distances.max()),
            "rank": rank,
            "num_outputs": outputs,
            "class_average_error": float(averages.nanmean()),
            "mean_deviation": float(deviations.nanmean()),
            "seconds": seconds,
        }
        self.rows.append(row)
        ranks = "-" if math.isnan(rank) else f"{rank:.0f}/{outputs:.0f}"
        theory = "-" if timeless else f"{row['theory']:.3e}"
        return (
            f"{step:6d} {t:6.3f} {loss:11.3e} {theory:>13} {row['distance']:10.4f} {ranks:>12} "
            f"{row['class_average_error']:11.3e} {row['mean_deviation']:11.3e} {seconds:8.1f}"
        )


def class_figures(x: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Distance |x̄_j − y_j| and mean deviation |Δx_i| of each class (3.9)-(3.10); NaN for a class without samples.

    Args:
        x: Outputs, ``[N, Q]``.
        labels: Classes, ``[N]``.
        targets: Target of each class, ``[J, Q]``.
    """
    averages = torch.stack([x[labels == j].mean(0) for j in range(len(targets))])
    deviations = (x - averages[labels]).norm(dim=1)
    return (averages - targets).norm(dim=1), torch.stack([deviations[labels == j].mean() for j in range(len(targets))])


def run_adapted(job: Job, steps: int) -> tuple[Run, nn.Module]:
    """Train by AdaptedGD, ``steps`` equal steps of t from 0 to 1."""
    model = job.build()
    optimizer = AdaptedGD(model, criterion=job.criterion, damping=0.0)
    scheduler = LinearInterpolationLR(optimizer, total_steps=steps)
    run = Run("AdaptedGD")
    print(HEADER)
    print(run.observe(job, model, 0, 0.0, math.nan, math.nan))
    for step in run.times(steps):
        optimizer.zero_grad()
        loss = job.criterion(model(job.images), job.targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
        report = optimizer.last_step
        assert report is not None
        row = run.observe(job, model, step, scheduler.t, report.rank, report.num_outputs)
        tqdm.write(row, file=sys.stdout)
    run.accuracy = job.accuracy(model)
    return run, model


def run_torch(job: Job, name: str, seconds: float, lr: float | None) -> tuple[Run, nn.Module]:
    """Train by an optimizer of torch's on the whole batch, for as long as AdaptedGD took."""
    model = job.build()
    optimizer: torch.optim.Optimizer
    if name == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02 if lr is None else lr, momentum=0.9)
    elif name == "Adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3 if lr is None else lr)
    else:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0 if lr is None else lr, line_search_fn="strong_wolfe")

    closure = race.gradient_of(optimizer, lambda: job.criterion(model(job.images), job.targets))
    run, step, shown = Run(f"torch.optim.{name}"), 0, 1.0

    def goes_on() -> bool:
        tqdm.write(run.observe(job, model, step, math.nan, math.nan, math.nan), file=sys.stdout)
        if not run.rows[-1]["loss"] < 1e3 * run.rows[0]["loss"]:
            print(f"{run.name} diverged and was stopped: use a smaller --lr.")
            run.diverged = True
            del run.rows[-1], run.outputs[-1]  # figures and files hold what was finite
        elif len({row["loss"] for row in run.rows[-4:]}) == 1 < len(run.rows) - 3:
            print(f"{run.name} makes no more progress and was stopped.")
        else:
            return True
        return False

    print(f"\n{run.name}, as long as AdaptedGD took; t is the nearest point of the line\n{HEADER}")
    goes_on()
    for step in run.until(seconds):
        optimizer.step(closure)  # type: ignore[no-untyped-call, unused-ignore]
        if step >= shown:  # a row for each half as many steps again: most happens early
            shown = max(step + 1, 1.5 * step)
            if not goes_on():
                break
    else:
        if step > run.rows[-1]["step"]:
            goes_on()
    run.accuracy = job.accuracy(model)
    return run, model


def draw(job: Job, runs: Sequence[Run], spectra: dict[str, Tensor], rtol: float, out: Path) -> list[Path]:
    """Write the figures."""
    adapted, labels = runs[0], job.labels.cpu()
    targets = torch.eye(CLASSES, dtype=torch.float64)
    per_step = [class_figures(x, labels, targets) for x in adapted.outputs]
    averages, deviations = (torch.stack(list(parts)) for parts in zip(*per_step, strict=True))  # [T, J] each
    theory = (adapted.column("t"), adapted.column("theory"))
    if len(runs) == 1:
        loss = plot_loss({adapted.name: (adapted.column("t"), adapted.column("loss"))}, theory)
    else:
        loss = plot_loss(
            {run.name: (run.column("seconds"), run.column("loss")) for run in runs},
            (adapted.column("seconds"), adapted.column("theory")),
            xlabel="seconds",
            theory_label="theory for AdaptedGD: (1 − t)² C₀",
        )
    figures = {
        "loss.png": loss,
        "collapse.png": plot_collapse(adapted.column("t"), averages, deviations),
        "paths.png": plot_output_paths({run.name: torch.stack(run.outputs) for run in runs}, labels, targets),
        "spectrum.png": plot_spectrum(spectra, rtol),
    }
    for name, figure in figures.items():
        figure.savefig(out / name)
    return [out / name for name in figures]


def write(runs: Sequence[Run], options: argparse.Namespace, num_params: int, rtol: float, out: Path) -> None:
    """Write ``metrics.csv`` (all rows) and ``summary.json`` (the figures that a reader asks for first)."""
    race.write_rows(out / "metrics.csv", "optimizer", runs)
    adapted = runs[0].rows
    summary: dict[str, Any] = {
        "torch_adapted_gd": __version__,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "torch": torch.__version__,
        "num_params": num_params,
        "num_outputs": int(adapted[-1]["num_outputs"]),
        "smallest_rank": int(min(row["rank"] for row in adapted[1:])),
        "rtol": rtol,
        "runs": {
            run.name: {
                "initial_loss": run.rows[0]["loss"],
                "final_loss": run.rows[-1]["loss"],
                "loss_ratio": run.rows[-1]["loss"] / run.rows[0]["loss"],
                "largest_distance_from_line": max(run.column("distance")),
                "steps": int(run.rows[-1]["step"]),
                "diverged": run.diverged,
                "seconds": run.rows[-1]["seconds"],
                "train_accuracy": run.accuracy[0],
                "test_accuracy": run.accuracy[1],
            }
            for run in runs
        },
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""

    def device(text: str) -> str:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
            raise argparse.ArgumentTypeError(f"should be cpu, cuda or cuda:N, but got {text!r}")
        return text

    parser = race.new_parser(__doc__, "results", "metrics.csv, summary.json and figures", "20 samples, width 32, 10 steps")
    add = parser.add_argument
    add("--data", choices=SOURCES, default="mnist5k", help="mnist5k needs no download (default)")
    add("--root", type=Path, default=Path("data"), help="where mnist and fashion-mnist are, or are downloaded to (data)")
    add("--samples", type=positive, default=300, help="training images, N (300)")
    add("--width", type=positive, default=256, help="units of each of the two hidden layers (256)")
    add("--activation", choices=("tanh", "relu"), default="tanh", help="of the hidden layers (tanh)")
    add("--steps", type=positive, default=60, help="steps from t = 0 to t = 1, T (60)")
    add("--device", type=device, default="cpu", help="cpu or cuda (cpu)")
    add("--dtype", choices=("float32", "float64"), default="float32", help="of the network (float32)")
    add("--optimizer", choices=("adapted", "sgd", "adam", "lbfgs"), default="adapted", help="run torch's beside it, as long")
    add("--lr", type=above_zero, help="learning rate of torch's optimizer (sgd 0.02 with momentum 0.9, adam 1e-3, lbfgs 1)")
    return parser


def prepare(options: argparse.Namespace) -> Job:
    """Load the images and fix the starting network."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: torch finds {torch.cuda.device_count()} CUDA devices here.")
    digits: Digits = load_digits(options.data, options.root, options.samples, options.seed)

    def build() -> nn.Module:
        torch.manual_seed(options.seed)
        width, activation = options.width, {"tanh": nn.Tanh, "relu": nn.ReLU}[options.activation]
        layers = [nn.Linear(784, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, CLASSES)]
        return nn.Sequential(*layers).to(device, dtype)

    labels = digits.train_labels.to(device)
    return Job(
        images=digits.train_images.to(device, dtype),
        labels=labels,
        targets=nn.functional.one_hot(labels, CLASSES).to(dtype),
        test_images=digits.test_images.to(device, dtype),
        test_labels=digits.test_labels.to(device),
        build=build,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    parser = build_parser()
    options = race.parse(parser, arguments, {"samples": 20, "width": 32, "steps": 10})
    if options.lr is not None and options.optimizer == "adapted":
        parser.error("argument --lr: is for torch's optimizers: add --optimizer sgd, adam or lbfgs")
    with race.errors_in_one_line(parser):
        job = prepare(options)
        race.make_folder(options.out)
        start = job.build()
        num_params, num_outputs = sum(p.numel() for p in start.parameters()), CLASSES * len(job.images)
        print(
            f"{options.samples} images of {options.data}, MLP 784-{options.width}-{options.width}-10 {options.activation}, "
            f"{options.dtype}: QN = {num_outputs:,} outputs, K = {num_params:,} parameters"
        )
        adapted, trained = run_adapted(job, options.steps)
        runs = [adapted]
        if options.optimizer != "adapted":
            name = {"sgd": "SGD", "adam": "Adam", "lbfgs": "LBFGS"}[options.optimizer]
            runs.append(run_torch(job, name, adapted.rows[-1]["seconds"], options.lr)[0])
        rtol = default_rtol(num_outputs, torch.finfo(getattr(torch, options.dtype)).eps)
        spectra = {
            name: torch.linalg.eigvalsh(ntk(model, job.images).reshape(num_outputs, num_outputs)).cpu()
            for name, model in (("at the start", start), ("at the end", trained))
        }
        write(runs, options, num_params, rtol, options.out)
        figures = draw(job, runs, spectra, rtol, options.out)
    print()
    for run in runs:
        first, last = run.rows[0], run.rows[-1]
        print(
            f"{run.name}: loss {first['loss']:.3g} → {last['loss']:.3g} (ratio {last['loss'] / first['loss']:.2g}) in "
            f"{last['step']:.0f} steps, {last['seconds']:.1f} s; at most {max(run.column('distance')):.2%} off the line; "
            f"accuracy: train {run.accuracy[0]:.3f}, test {run.accuracy[1]:.3f}"
        )
    print(f"wrote {', '.join(str(path) for path in (options.out / 'metrics.csv', options.out / 'summary.json', *figures))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
