"""A physics-informed network to six digits: −Δu = f on the unit square, u = 0 on its boundary.

The outputs of the module given to AdaptedGD are the residuals: −Δu − f at points inside, the weighted u at points on the
boundary. A mean squared loss of these is as ill-conditioned as the square of the differential operator, which is what slows
gradient descent down; the Gauss–Newton step with Levenberg–Marquardt damping does not see it. Adam and LBFGS run beside it
on the same loss, for the same time.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from race import Run, above_zero, adam, errors_in_one_line, lbfgs, make_folder, new_parser, parse, positive, train, write_all
from torch import Tensor, nn

from torch_adapted_gd import AdaptedGD
from torch_adapted_gd.plotting import plot_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADER = f"{'method':12s} {'seconds':>8s} {'gradients':>10s} {'loss':>10s} {'relative L2 error':>18s}"


def exact(points: Tensor) -> Tensor:
    """The solution u = sin(πx) sin(πy) at points ``[..., 2]``."""
    return (math.pi * points).sin().prod(-1)


def source(points: Tensor) -> Tensor:
    """The right side f = −Δu at points ``[..., 2]``."""
    return 2 * math.pi**2 * exact(points)


class PoissonResidual(nn.Module):
    """Residuals of a tanh network as its outputs.

    Args:
        width: Units of each of the two hidden layers.
        boundary_weight: What u on the boundary is multiplied by.

    Shape:
        Points ``[N, 2]`` and whether each is on the boundary, ``[N]``; output ``[N, 1]``.
    """

    def __init__(self, width: int, boundary_weight: float = 50.0) -> None:
        super().__init__()
        self.boundary_weight = boundary_weight
        self.hidden = nn.ModuleList([nn.Linear(2, width), nn.Linear(width, width)])
        self.last = nn.Linear(width, 1)

    def forward(self, points: Tensor, on_boundary: Tensor) -> Tensor:
        """−Δu − f inside, the weighted u on the boundary."""
        u, laplacian = self.solve(points)
        return torch.where(on_boundary, self.boundary_weight * u, -laplacian - source(points)).unsqueeze(1)

    def u(self, points: Tensor) -> Tensor:
        """The approximate solution u, ``[N]``."""
        x = 4 * points - 2  # from [0, 1] to [−2, 2]
        for layer in self.hidden:
            x = layer(x).tanh()
        value: Tensor = self.last(x)
        return value.squeeze(1)

    def solve(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The approximate solution and its Laplacian, ``[N]`` each.

        Values, both first derivatives and the Laplacian go through the network together, ``[N, 4, width]``. Each layer is
        called on all of them, so that the kernel can be summed over layers.
        """
        value = 4 * points - 2  # from [0, 1] to [−2, 2]
        slopes = 4 * torch.eye(2).to(points).expand(len(points), 2, 2)  # ∂₁, ∂₂ of it
        jet = torch.cat([value[:, None], slopes, torch.zeros_like(value)[:, None]], 1)
        for layer in self.hidden:
            value, first, second = affine(layer, jet).split([1, 2, 1], 1)
            t = value.tanh()
            d = 1 - t**2
            jet = torch.cat([t, d * first, d * second - 2 * t * d * first.square().sum(1, keepdim=True)], 1)
        u, _, laplacian = affine(self.last, jet).squeeze(2).split([1, 2, 1], 1)
        return u.squeeze(1), laplacian.squeeze(1)


def affine(layer: nn.Module, jet: Tensor) -> Tensor:
    """A linear layer on values and derivatives ``[N, 4, ...]``, which the bias, the layer's image of 0, is no part of."""
    value, derivatives, bias = layer(torch.cat([jet, torch.zeros_like(jet[:, :1])], 1)).split([1, 3, 1], 1)
    return torch.cat([value, derivatives - bias], 1)


def collocation_points(n: int) -> tuple[Tensor, Tensor]:
    """n² points inside and n on each edge, in rows and columns; and which of them are on the boundary."""
    ticks = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    zero, one = torch.zeros_like(ticks), torch.ones_like(ticks)
    edges = [torch.stack(edge, 1) for edge in ((ticks, zero), (ticks, one), (zero, ticks), (one, ticks))]
    points = torch.cat([torch.cartesian_prod(ticks, ticks), *edges])
    return points, torch.arange(len(points)) >= n * n


@dataclass
class Job:
    """The residuals, and the grid on which solutions are compared; the same for every method.

    Attributes:
        inputs: Points and whether each is on the boundary.
        grid: Where the error is taken, ``[M², 2]``.
        build: Makes the starting network, always the same.
        criterion: What is made of the residuals and zero.
    """

    inputs: tuple[Tensor, Tensor]
    grid: Tensor
    build: Callable[[], PoissonResidual]
    criterion: nn.Module = field(default_factory=nn.MSELoss)

    def loss(self, model: nn.Module) -> Tensor:
        """Mean square of the residuals."""
        residuals = model(*self.inputs)
        loss: Tensor = self.criterion(residuals, torch.zeros_like(residuals))
        return loss

    @torch.no_grad()
    def measure(self, model: PoissonResidual) -> dict[str, float]:
        """Loss, and relative L2 error of the solution."""
        u = exact(self.grid)
        error = (model.u(self.grid) - u).norm() / u.norm()
        return {"loss": float(self.loss(model)), "error": float(error)}


def run_adapted(job: Job, model: PoissonResidual, steps: int) -> Run:
    """Train by AdaptedGD."""
    optimizer = AdaptedGD(model, criterion=job.criterion)
    run = Run("AdaptedGD")
    run.record(lambda: job.measure(model), gradients=0)
    for step in run.times(steps):
        optimizer.zero_grad()
        job.loss(model).backward()  # type: ignore[no-untyped-call, unused-ignore]
        optimizer.step()
        run.record(lambda: job.measure(model), gradients=step)
    return run


def plot_maps(solutions: Mapping[str, Tensor], u: Tensor) -> "Figure":
    """The first solution, and where each one is off by how much, on one scale.

    Args:
        solutions: Name → solution on a square grid, ``[M, M]``.
        u: The exact solution.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    errors = {name: (solution - u).abs().nan_to_num(math.inf) for name, solution in solutions.items()}
    name, solution = next(iter(solutions.items()))
    least = 10.0 ** math.floor(math.log10(float(errors[name].median())) - 1)  # drawn for what is less, where signs change
    most = max(float(error[error.isfinite()].max()) for error in errors.values() if error.isfinite().any())
    figure = Figure(figsize=(3.2 * (len(solutions) + 1) + 1, 3.3), layout="constrained", dpi=100)
    first, *others = figure.subplots(1, len(solutions) + 1)
    frame: dict[str, Any] = {"origin": "lower", "extent": (0, 1, 0, 1), "interpolation": "nearest"}
    image = first.imshow(solution.T.numpy(), cmap="viridis", **frame)
    first.set_title(f"u by {name}", fontsize="medium")
    figure.colorbar(image, ax=first, shrink=0.8)
    for ax, (name, error) in zip(others, errors.items(), strict=True):
        image = ax.imshow(error.T.clamp(least, most).numpy(), cmap="magma", norm=LogNorm(least, most), **frame)
        ax.set_title(f"{name}: relative error {float(error.norm() / u.norm()):.1e}", fontsize="medium")
    figure.colorbar(image, ax=others, shrink=0.8, label="|u − exact|")
    for ax in (first, *others):
        ax.set(xticks=(0, 1), yticks=(0, 1), xlabel="x", ylabel="y")
    return figure


def prepare(options: argparse.Namespace) -> Job:
    """The points, the grid and the starting network."""

    def build() -> PoissonResidual:
        torch.manual_seed(options.seed)
        return PoissonResidual(options.width).double()

    ticks = torch.linspace(0, 1, 101, dtype=torch.float64)
    return Job(collocation_points(options.points), torch.cartesian_prod(ticks, ticks), build)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = new_parser(__doc__, "results/pinn", "metrics.csv and figures", "6² points, width 12, 20 steps")
    add = parser.add_argument
    add("--points", type=positive, default=15, help="n: n² points inside, n on each edge (15)")
    add("--width", type=positive, default=20, help="units of each of the two hidden layers (20)")
    add("--steps", type=positive, default=120, help="steps of AdaptedGD (120)")
    add("--lr", type=above_zero, default=1e-2, help="first learning rate of Adam (1e-2)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    parser = build_parser()
    options = parse(parser, arguments, {"points": 6, "width": 12, "steps": 20})
    with errors_in_one_line(parser):
        make_folder(options.out)
        job = prepare(options)
        models = {name: job.build() for name in ("AdaptedGD", "Adam", "LBFGS")}
        num_params = sum(p.numel() for p in models["Adam"].parameters())
        num_residuals = len(job.inputs[0])
        print(f"{num_residuals:,} residuals, tanh network 2-{options.width}-{options.width}-1: K = {num_params:,} parameters")
        print(HEADER)
        runs: list[Run] = []
        for name, model in models.items():
            if name == "AdaptedGD":
                run = run_adapted(job, model, options.steps)
            else:
                parameters = model.parameters()
                optimizer = adam(parameters, options.lr) if name == "Adam" else lbfgs(parameters)
                seconds = runs[0].rows[-1]["seconds"]
                run = train(name, optimizer, partial(job.loss, model), seconds, partial(job.measure, model), count="gradients")
            row = run.rows[-1]
            print(f"{name:12s} {row['seconds']:8.1f} {row['gradients']:10.0f} {row['loss']:10.2e} {row['error']:18.2e}")
            runs.append(run)
        with torch.no_grad():
            u = exact(job.grid)
            side = math.isqrt(len(u))
            solutions = {name: model.u(job.grid).view(side, side) for name, model in models.items()}
        error = plot_loss({run.name: (run.column("seconds"), run.column("error")) for run in runs}, xlabel="seconds")
        error.axes[0].set(ylabel="relative L2 error", title="Physics-informed network for −Δu = f")
        figures = {"error.png": error, "solution.png": plot_maps(solutions, u.view(side, side))}
        files = write_all(options.out, runs, figures)
    print(f"wrote {', '.join(map(str, files))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
