"""Real digits to zero loss along a straight line.

A network with more parameters than outputs (K ≥ QN) is trained on images of digits by AdaptedGD with
LinearInterpolationLR. Theory (Proposition 2.4, Corollary 3.2) says: the outputs of every image move on a straight line
from where they start to their target, the loss is (1 − t)² C₀, and so do class averages and deviations within classes.
The table says how nearly, and what the rank of the Jacobian was.

Beyond 8,192 outputs (QN), where the kernel is too large to be held, the steps are solved by conjugate gradients and are as long
as the outputs follow the line (StraightLine), all images in each; the table says what they took.

Several processes share the images, ``torchrun --nproc-per-node 2 recipes/mnist.py``, and take the same steps as one.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import race
import torch
from digits import SOURCES, Digits, load_digits
from mnist_run import CLASSES, PARTS, Job, Run, class_figures
from race import above_zero, not_negative, positive
from torch import Tensor, nn
from tqdm import tqdm

from torch_adapted_gd import AdaptedGD, ConjugateGradients, Dense, LinearInterpolationLR, StraightLine, __version__, ntk
from torch_adapted_gd.plotting import plot_collapse, plot_loss, plot_output_paths
from torch_adapted_gd.solve import default_rtol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGE = 8192  # outputs beyond which conjugate gradients solve, as the library's solver="auto" does
ENOUGH = 1e-6  # the loss at which steps as long as the outputs follow end
DRAWN, IN_SPECTRUM = 50, 500  # images of each class whose paths are drawn, and images whose kernel is, of a large job
HEADER = "  step      t        loss    (1-t)^2 C0   off line      rank/QN   class avg   deviation  seconds"
HEADER_CG = HEADER.replace("     rank/QN", "iter residual")


def run_adapted(job: Job, steps: int, damping: float) -> tuple[Run, nn.Module]:
    """Train by AdaptedGD, ``steps`` equal steps of t from 0 to 1."""
    model = job.build()
    optimizer = AdaptedGD(model, criterion=job.criterion, damping=damping, solver=Dense())
    scheduler = LinearInterpolationLR(optimizer, total_steps=steps)
    run = Run("AdaptedGD")
    print(HEADER)
    print(run.observe(job, model, 0, 0.0))
    for step in run.times(steps):
        optimizer.zero_grad()
        loss = job.criterion(model(job.images[job.mine]), job.targets[job.mine])
        loss.backward()
        optimizer.step()
        scheduler.step()
        report = optimizer.last_step
        assert report is not None
        row = run.observe(job, model, step, scheduler.t, report)
        tqdm.write(row, file=sys.stdout)
    run.accuracy = job.accuracy(model)
    return run, model


def run_full(job: Job, steps: int, damping: float) -> tuple[Run, nn.Module]:
    """Train by AdaptedGD with conjugate gradients on all images at once, steps as long as the outputs follow the line."""
    model = job.build()
    policy = StraightLine(damping=damping)
    optimizer = AdaptedGD(model, criterion=job.criterion, damping=policy, solver=ConjugateGradients())
    loader = job.loader()
    run, t = Run("AdaptedGD"), 0.0
    print(HEADER_CG)
    print(run.observe(job, model, 0, t))
    for step in run.times(steps):
        optimizer.full_batch(loader)
        report = optimizer.last_step
        assert report is not None
        t += (1 - t) * report.fraction
        tqdm.write(run.observe(job, model, step, t, report), file=sys.stdout)
        if report.status == "rejected":
            print("No step was short enough for the outputs to follow it: stopped.")
            break
        if run.rows[-1]["loss"] <= ENOUGH:
            break
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

    targets = job.targets.to(next(model.parameters()).device)
    closure = race.gradient_of(optimizer, lambda: job.criterion(job.outputs(model, job.images), targets))
    run, step, shown = Run(f"torch.optim.{name}"), 0, 1.0

    def goes_on() -> bool:
        tqdm.write(run.observe(job, model, step, math.nan), file=sys.stdout)
        if not run.rows[-1]["loss"] < 1e3 * run.rows[0]["loss"]:
            print(f"{run.name} diverged and was stopped: use a smaller --lr.")
            run.diverged = True
            del run.rows[-1], run.outputs[-1]  # figures and files hold what was finite
        elif len({row["loss"] for row in run.rows[-4:]}) == 1 < len(run.rows) - 3:
            print(f"{run.name} makes no more progress and was stopped.")
        else:
            return True
        return False

    header = HEADER_CG if job.solver == "cg" else HEADER
    print(f"\n{run.name}, as long as AdaptedGD took; t is the nearest point of the line\n{header}")
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


def kernel_spectra(job: Job, models: dict[str, nn.Module], seed: int) -> tuple[dict[str, Tensor], int]:
    """Eigenvalues of each network's kernel on all images, or for a large job on some drawn at random, and on how many."""
    images = job.images
    if job.solver == "cg":
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:IN_SPECTRUM]
        images = images[chosen.to(images.device)]
    size, spectra = CLASSES * len(images), {}
    for name, model in models.items():
        theta = ntk(model, images.to(next(model.parameters()).device)).reshape(size, size)
        spectra[name] = torch.linalg.eigvalsh(theta).cpu()
    return spectra, len(images)


def draw_spectrum(eigenvalues: dict[str, Tensor], rtol: float, title: str) -> "Figure":
    """Singular values of D, the square roots of the kernel's eigenvalues, relative to the largest, with the rank cut."""
    figure, ax = race.new_figure()
    for name, values in eigenvalues.items():
        sigma = values.double().clamp_min(0).sqrt().sort(descending=True).values
        relative = sigma / sigma[0].clamp_min(torch.finfo(torch.float64).tiny)
        rank = int((relative > rtol).sum())
        ax.plot(range(1, len(relative) + 1), relative, linewidth=1.6, label=f"{name} (rank {rank} of {len(relative)})")
    ax.axhline(rtol, color="black", linestyle="--", linewidth=1.2, label=f"rank cut, rtol = {rtol:.1e}")
    ax.set(yscale="log", xlabel="index", ylabel="σ / σ_max")
    ax.set_title(title, fontsize="medium")
    race.tidy(ax)
    return figure


def draw(job: Job, runs: Sequence[Run], spectra: tuple[dict[str, Tensor], int], rtol: float, out: Path) -> list[Path]:
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
    shown, suffix = torch.arange(len(labels)), ""
    if job.solver == "cg" and int(torch.bincount(labels).max()) > DRAWN:
        shown = torch.cat([torch.nonzero(labels == j).flatten()[:DRAWN] for j in range(CLASSES)])
        suffix = f", {DRAWN} images of each class"
    paths = {run.name + suffix: torch.stack([x[shown] for x in run.outputs]) for run in runs}
    title, in_spectrum = "Spectrum of the tangent kernel", spectra[1]
    if in_spectrum < len(labels):
        title += f" on {in_spectrum:,} of the {len(labels):,} images, at random"
    figures = {
        "loss.png": loss,
        "collapse.png": plot_collapse(adapted.column("t"), averages, deviations),
        "paths.png": plot_output_paths(paths, labels[shown], targets),
        "spectrum.png": draw_spectrum(spectra[0], rtol, title),
    }
    for name, figure in figures.items():
        figure.savefig(out / name)
    return [out / name for name in figures]


def write(job: Job, runs: Sequence[Run], options: argparse.Namespace, num_params: int, rtol: float, out: Path) -> None:
    """Write ``metrics.csv`` (all rows) and ``summary.json`` (the figures that a reader asks for first)."""
    race.write_rows(out / "metrics.csv", "optimizer", runs)
    adapted = runs[0].rows
    summary: dict[str, Any] = {
        "torch_adapted_gd": __version__,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "torch": torch.__version__,
        "num_params": num_params,
        "num_outputs": int(adapted[-1]["num_outputs"]),
        "solver": job.solver,
        "smallest_rank": None if job.solver == "cg" else int(min(row["rank"] for row in adapted[1:])),
        "rtol": None if job.solver == "cg" else rtol,
        "runs": {
            run.name: {
                "initial_loss": run.rows[0]["loss"],
                "final_loss": run.rows[-1]["loss"],
                "loss_ratio": run.rows[-1]["loss"] / run.rows[0]["loss"],
                "largest_distance_from_line": max(run.column("distance")),
                "largest_distance_of_all_outputs": max(run.column("distance_all")),
                "steps": int(run.rows[-1]["step"]),
                "diverged": run.diverged,
                "seconds": run.rows[-1]["seconds"],
                "train_accuracy": run.accuracy[0],
                "test_accuracy": None if math.isnan(run.accuracy[1]) else run.accuracy[1],
            }
            for run in runs
        },
    }
    if job.solver == "cg":
        summary["runs"][runs[0].name] |= {
            "iterations": int(sum(row["iterations"] for row in adapted[1:])),
            "largest_residual": max(row["residual"] for row in adapted[1:]),
            "smallest_fraction": min(row["fraction"] for row in adapted[1:]),
            "last_fraction": adapted[-1]["fraction"],
            "seconds_by_part": {part: sum(row[f"seconds_{part}"] for row in adapted[1:]) for part in PARTS},
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
    add("--data", choices=SOURCES, default="mnist5k", help="mnist5k (default) and mnist5k-shifted need no download")
    add("--root", type=Path, default=Path("data"), help="where mnist and fashion-mnist are, or are downloaded to (data)")
    add("--samples", type=positive, default=300, help="training images, N (300)")
    add("--width", type=positive, default=256, help="units of each of the two hidden layers (256)")
    add("--activation", choices=("tanh", "relu"), default="tanh", help="of the hidden layers (tanh)")
    add("--steps", type=positive, default=60, help="steps from t = 0 to t = 1, T; with cg the most (60)")
    add("--solver", choices=("auto", "cg", "dense"), default="auto", help=f"auto: cg beyond {LARGE:,} outputs, else dense")
    add("--damping", type=not_negative, help="λ relative to the mean of diag Θ (cg 1e-4, dense 0)")
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
    digits: Digits = load_digits(options.data, options.root, options.samples, options.seed, use_test_images=True)

    def build() -> nn.Module:
        torch.manual_seed(options.seed)
        width, activation = options.width, {"tanh": nn.Tanh, "relu": nn.ReLU}[options.activation]
        layers = [nn.Linear(784, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, CLASSES)]
        return nn.Sequential(*layers).to(device, dtype)

    large = CLASSES * options.samples > LARGE if options.solver == "auto" else options.solver == "cg"
    device_of_data = torch.device("cpu") if large else device
    labels = digits.train_labels.to(device_of_data)
    return Job(
        images=digits.train_images.to(device_of_data, dtype),
        labels=labels,
        targets=nn.functional.one_hot(labels, CLASSES).to(dtype),
        test_images=digits.test_images.to(device_of_data, dtype),
        test_labels=digits.test_labels.to(device_of_data),
        build=build,
        solver="cg" if large else "dense",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe."""
    parser = build_parser()
    options = race.parse(parser, arguments, {"samples": 20, "width": 32, "steps": 10})
    if options.lr is not None and options.optimizer == "adapted":
        parser.error("argument --lr: is for torch's optimizers: add --optimizer sgd, adam or lbfgs")
    with race.errors_in_one_line(parser), race.launched() as mine:
        job = dataclasses.replace(prepare(options), mine=mine)
        race.make_folder(options.out)
        start = job.build()
        num_params, num_outputs = sum(p.numel() for p in start.parameters()), CLASSES * len(job.images)
        print(
            f"{options.samples} images of {options.data}, MLP 784-{options.width}-{options.width}-10 {options.activation}, "
            f"{options.dtype}: QN = {num_outputs:,} outputs, K = {num_params:,} parameters"
        )
        eps = torch.finfo(getattr(torch, options.dtype)).eps
        rtol = default_rtol(num_outputs, eps)
        if job.solver == "cg":
            adapted, trained = run_full(job, options.steps, 1e-4 if options.damping is None else options.damping)
        else:
            adapted, trained = run_adapted(job, options.steps, options.damping or 0.0)
        runs = [adapted]
        if options.optimizer != "adapted":
            name = {"sgd": "SGD", "adam": "Adam", "lbfgs": "LBFGS"}[options.optimizer]
            runs.append(run_torch(job, name, adapted.rows[-1]["seconds"], options.lr)[0])
        spectra = kernel_spectra(job, {"at the start": start, "at the end": trained}, options.seed)
        if mine.start:  # the first process writes
            return
        write(job, runs, options, num_params, rtol, options.out)
        figures = draw(job, runs, spectra, default_rtol(CLASSES * spectra[1], eps), options.out)
        print()
        for run in runs:
            first, last = run.rows[0], run.rows[-1]
            test = "- (no images are left to test)" if math.isnan(run.accuracy[1]) else f"{run.accuracy[1]:.3f}"
            print(
                f"{run.name}: loss {first['loss']:.3g} → {last['loss']:.3g} (ratio {last['loss'] / first['loss']:.2g}) in "
                f"{last['step']:.0f} steps, {last['seconds']:.1f} s; at most {max(run.column('distance')):.2%} off the line, "
                f"all outputs together {max(run.column('distance_all')):.2%}; accuracy: train {run.accuracy[0]:.3f}, "
                f"test {test}"
            )
        print(f"wrote {', '.join(str(path) for path in (options.out / 'metrics.csv', options.out / 'summary.json', *figures))}")


if __name__ == "__main__":
    main()
