"""What a run of mnist.py is made of: the job, the same for every optimizer, and what is recorded of each."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import race
import torch
from torch import Tensor, nn

from torch_adapted_gd import HalfSquaredLoss, StepReport

CLASSES = 10
BATCH = 1000  # images a forward pass, where the dense kernel of all would not fit
PARTS = ("factors", "preconditioner", "iterations")  # of a step by conjugate gradients, what time is told of


@dataclass
class Job:
    """The data and the starting network of a run, the same for every optimizer."""

    images: Tensor  # [N, 784]; by conjugate gradients on the CPU, and moved batch by batch
    labels: Tensor  # [N]
    targets: Tensor  # [N, 10], one-hot
    test_images: Tensor
    test_labels: Tensor
    build: Callable[[], nn.Module]
    solver: str = "dense"  # or "cg"
    mine: slice = field(default_factory=lambda: slice(None))  # the images that this process trains on, of several
    criterion: nn.Module = field(default_factory=HalfSquaredLoss)

    def batches(self, images: Tensor) -> tuple[Tensor, ...]:
        """The images of each forward pass: all of them, or by conjugate gradients 1,000."""
        return images.split(BATCH) if self.solver == "cg" else (images,)

    def loader(self) -> list[tuple[Tensor, Tensor]]:
        """The batches of this process with their targets, for `AdaptedGD.full_batch`."""
        return list(zip(self.batches(self.images[self.mine]), self.batches(self.targets[self.mine]), strict=True))

    def outputs(self, model: nn.Module, images: Tensor) -> Tensor:
        """What the network gives for images, on its own device."""
        device = next(model.parameters()).device
        return torch.cat([model(part.to(device)) for part in self.batches(images)])

    def accuracy(self, model: nn.Module) -> tuple[float, float]:
        """Share of training and test images whose largest output is their class; NaN where there are no images."""

        def share(images: Tensor, labels: Tensor) -> float:
            if not len(images):
                return math.nan
            return float((self.outputs(model, images).argmax(1).to(labels.device) == labels).double().mean())

        with torch.no_grad():
            return share(self.images, self.labels), share(self.test_images, self.test_labels)


@dataclass
class Run(race.Run):
    """What was recorded: one row a step, and the outputs ``[N, 10]`` at each."""

    outputs: list[Tensor] = field(default_factory=list)
    diverged: bool = False
    accuracy: tuple[float, float] = (math.nan, math.nan)

    def observe(self, job: Job, model: nn.Module, step: int, t: float, report: StepReport | None = None) -> str:
        """Take down the present state of the network, while the clock stands; returns the row to print.

        Args:
            job: The data.
            model: The network.
            step: Steps taken.
            t: The time; where it is NaN, that of the nearest point of the line is taken.
            report: Of the last step of AdaptedGD.
        """
        with self.paused() as seconds:
            return self._observe(job, model, step, t, report, seconds)

    def _observe(self, job: Job, model: nn.Module, step: int, t: float, report: StepReport | None, seconds: float) -> str:
        with torch.no_grad():
            x = job.outputs(model, job.images).double().cpu()
        y = job.targets.double().cpu()
        self.outputs.append(x)
        start = self.outputs[0]
        timeless = math.isnan(t)
        if timeless:  # where on the line it is nearest
            t = float(((x - start) * (y - start)).sum() / (y - start).square().sum())
        off = x - (1 - t) * start - t * y
        distances = off.norm(dim=1) / (start - y).norm(dim=1)
        averages, deviations = class_figures(x, job.labels.cpu(), torch.eye(CLASSES, dtype=torch.float64))
        loss = float((x - y).square().sum() / (2 * len(x)))
        row = {
            "step": step,
            "t": t,
            "loss": loss,
            "theory": math.nan if timeless else (1 - t) ** 2 * (self.rows[0]["loss"] if self.rows else loss),
            "distance": float(distances.max()),
            "distance_all": float(off.norm() / (start - y).norm()),
            "rank": math.nan if report is None or report.rank is None else report.rank,
            "num_outputs": math.nan if report is None else report.num_outputs,
            "class_average_error": float(averages.nanmean()),
            "mean_deviation": float(deviations.nanmean()),
            "seconds": seconds,
        }
        if job.solver == "cg":
            row |= _of_iterations(report)
        self.rows.append(row)
        solved = f"{'-':>12}"
        if job.solver == "cg":
            solved = f"{'-':>4} {'-':>8}" if report is None else f"{report.iterations:4d} {report.residual:8.1e}"
        elif report is not None:
            solved = f"{f'{report.rank}/{report.num_outputs}':>12}"
        theory = "-" if timeless else f"{row['theory']:.3e}"
        return (
            f"{step:6d} {t:6.3f} {loss:11.3e} {theory:>13} {row['distance']:10.4f} {solved} "
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


def _of_iterations(report: StepReport | None) -> dict[str, float]:
    """What a step by conjugate gradients took, and how far it went (eta)."""
    nan = math.nan
    if report is None:
        return {"iterations": nan, "residual": nan, "fraction": nan, **{f"seconds_{part}": nan for part in PARTS}}
    residual = nan if report.residual is None else report.residual
    own = {"iterations": report.iterations, "residual": residual, "fraction": report.fraction}
    return own | {f"seconds_{part}": report.seconds.get(part, nan) for part in PARTS}
