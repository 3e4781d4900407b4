"""Curve fitting: y = sinc(10x) by a network of 61 parameters, in mini-batches.

The job is the one that torch-levenberg-marquardt shows in its README: 20,000 points of [−1, 1], batches of 1,000. AdaptedGD
runs with its defaults; Adam, LBFGS on all points, and torch-levenberg-marquardt where it is installed run beside it for the
same time, from the same weights.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from race import Run, above_zero, adam, lbfgs, new_figure, new_parser, positive, started, tidy, train, write_all
from torch import Tensor, nn

from torch_adapted_gd import AdaptedGD
from torch_adapted_gd.plotting import plot_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS, BATCH = 20_000, 1_000
PEER = "torch-levenberg-marquardt"
HEADER = f"{'method':26s} {'seconds':>8s} {'epochs':>8s} {'loss over all points':>21s}"


@dataclass
class Job:
    """Points, their order, and the starting network; the same for every method.

    Attributes:
        x: ``[N, 1]``.
        y: ``[N, 1]``.
        batch: Points of a batch.
        seed: Of their order and of the network.
    """

    x: Tensor
    y: Tensor
    batch: int
    seed: int

    def build(self) -> nn.Module:
        """The starting network."""
        torch.manual_seed(self.seed)
        return nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without end, shuffled anew each epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for chosen in torch.randperm(len(self.x), generator=generator).split(self.batch):
                yield self.x[chosen], self.y[chosen]

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The loss over all points."""
        with torch.no_grad():
            return {"loss": float(nn.functional.mse_loss(model(self.x), self.y))}


def run_adapted(job: Job, model: nn.Module, epochs: int) -> Run:
    """Train by AdaptedGD."""
    criterion = nn.MSELoss()
    optimizer = AdaptedGD(model, criterion=criterion)
    batches, per_epoch = job.batches(), len(job.x) // job.batch
    run = Run("AdaptedGD")
    run.record(lambda: job.measure(model), epochs=0)
    for step in run.times(epochs * per_epoch):
        x, y = next(batches)
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        if step % max(1, per_epoch // 2) == 0:
            run.record(lambda: job.measure(model), epochs=step / per_epoch)
    return run


def run_adam(job: Job, model: nn.Module, seconds: float, lr: float) -> Run:
    """Train by Adam."""
    batches = job.batches()

    def loss() -> Tensor:
        x, y = next(batches)
        return nn.functional.mse_loss(model(x), y)

    share = job.batch / len(job.x)
    return train("Adam", adam(model.parameters(), lr), loss, seconds, partial(job.measure, model), "epochs", share)


def run_lbfgs(job: Job, model: nn.Module, seconds: float) -> Run:
    """Train by LBFGS, each gradient that of all points."""

    def loss() -> Tensor:
        return nn.functional.mse_loss(model(job.x), job.y)

    return train("LBFGS", lbfgs(model.parameters()), loss, seconds, partial(job.measure, model), "epochs")


def run_peer(job: Job, model: nn.Module, seconds: float) -> Run:
    """Train by torch-levenberg-marquardt, with the options of its README."""
    import torch_levenberg_marquardt as tlm

    trainer = tlm.training.LevenbergMarquardtModule(
        model, tlm.loss.MSELoss(), learning_rate=1.0, attempts_per_step=10, solve_method="solve"
    )
    batches, per_epoch, step = job.batches(), len(job.x) // job.batch, 0
    run = Run(PEER)
    run.record(lambda: job.measure(model), epochs=0)
    for step in run.until(seconds):
        trainer.training_step(*next(batches))
        if run.due(seconds / 100):
            run.record(lambda: job.measure(model), epochs=step / per_epoch)
    run.record(lambda: job.measure(model), epochs=step / per_epoch)
    return run


def plot_fit(fits: Mapping[str, Tensor], x: Tensor, y: Tensor) -> "Figure":
    """The curves that were found, and below them how far off each one is.

    Args:
        fits: Name → outputs ``[N]``.
        x: Points, ``[N]``, in order.
        y: Targets, ``[N]``.
    """
    figure, (above, below) = new_figure(7.2, 6.4, dpi=100, nrows=2, sharex=True, height_ratios=(2, 3))
    above.plot(x, y, color="black", linestyle="--", linewidth=1.2, label="y = sinc(10x)", zorder=5)
    for name, fit in fits.items():
        error = (fit - y).abs()
        above.plot(x, fit, linewidth=1.6, alpha=0.8, label=name)
        below.plot(x, error.clamp_min(torch.finfo(y.dtype).eps / 2), linewidth=0.9, alpha=0.8, label=name)
    above.set(title="sinc(10x) by a network 1-20-1 of 61 parameters", ylabel="y")
    below.set(yscale="log", xlabel="x", ylabel="|error|")
    tidy(above)
    tidy(below)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe."""
    parser = new_parser(__doc__, "results/regression", "metrics.csv and figures", "2,000 points, batches of 100, 2 epochs")
    parser.set_defaults(points=POINTS, batch=BATCH)
    parser.add_argument("--epochs", type=positive, default=50, help="of AdaptedGD (50)")
    parser.add_argument("--lr", type=above_zero, default=1e-2, help="first learning rate of Adam (1e-2)")
    with started(parser, arguments, {"points": POINTS // 10, "batch": BATCH // 10, "epochs": 2}) as options:
        x = torch.linspace(-1, 1, options.points).unsqueeze(1)
        job = Job(x, torch.sinc(10 * x), options.batch, options.seed)
        runs: list[Run] = []
        fits: dict[str, Tensor] = {}

        def go(method: Callable[[Job, nn.Module], Run]) -> None:
            model = job.build()
            runs.append(method(job, model))
            with torch.no_grad():
                fits[runs[-1].name] = model(x).squeeze(1)
            row = runs[-1].rows[-1]
            print(f"{runs[-1].name:26s} {row['seconds']:8.1f} {row['epochs']:8.1f} {row['loss']:21.2e}")

        print(f"{options.points:,} points in batches of {options.batch:,}, tanh network 1-20-1\n{HEADER}")
        go(partial(run_adapted, epochs=options.epochs))
        seconds = runs[0].rows[-1]["seconds"]
        go(partial(run_adam, seconds=seconds, lr=options.lr))
        go(partial(run_lbfgs, seconds=seconds))
        if importlib.util.find_spec("torch_levenberg_marquardt"):
            go(partial(run_peer, seconds=seconds))
        else:
            print(f"{PEER} is not installed and was left out: pip install {PEER}")
        loss = plot_loss({run.name: (run.column("seconds"), run.column("loss")) for run in runs}, xlabel="seconds")
        loss.axes[0].set(ylabel="loss over all points", title="sinc(10x) in mini-batches")
        fit = plot_fit(fits, x.squeeze(1), job.y.squeeze(1))
        write_all(options.out, runs, {"loss.png": loss, "fit.png": fit})


if __name__ == "__main__":
    main()
