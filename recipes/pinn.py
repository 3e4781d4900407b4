"""A physics-informed network: −Δu = f on the unit square, u = 0 on its boundary.

The loss is the mean square of −Δu − f at points inside, plus a weight times that of u at points on the boundary. Derivatives
are taken by `torch.autograd.grad`, outside of the network, and the loop is that of any torch optimizer with a closure. Such a
loss is as ill-conditioned as the square of the differential operator, which is what slows gradient descent down; a
Gauss–Newton step does not depend on that. Adam and LBFGS run beside it on the same loss, for the same time.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from race import (
    Run,
    above_zero,
    adam,
    lbfgs,
    new_figure,
    new_parser,
    positive,
    started,
    step_on,
    train,
    write_all,
)
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


def network(width: int) -> nn.Sequential:
    """A tanh network 2-width-width-1: points ``[N, 2]`` → u, ``[N, 1]``."""
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)).double()


def laplacian(model: nn.Module, points: Tensor) -> Tensor:
    """Δu at points ``[N, 2]``: ``[N, 1]``."""
    x = points.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    seconds = [torch.autograd.grad(slopes[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
    return torch.stack(seconds, 1).sum(1, keepdim=True)


def collocation_points(n: int) -> tuple[Tensor, Tensor]:
    """n² points inside, in rows and columns, and n on each edge."""
    ticks = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    zero, one = torch.zeros_like(ticks), torch.ones_like(ticks)
    edges = [torch.stack(edge, 1) for edge in ((ticks, zero), (ticks, one), (zero, ticks), (one, ticks))]
    return torch.cartesian_prod(ticks, ticks), torch.cat(edges)


@dataclass
class Job:
    """The equation on its points, and the grid on which solutions are compared; the same for every method.

    Attributes:
        inside: Points inside, ``[N, 2]``.
        boundary: Points on the boundary, ``[M, 2]``.
        grid: Where the error is taken, ``[L², 2]``.
        build: Makes the starting network, always the same.
        boundary_weight: Of the mean square of u on the boundary.
        criterion: The mean square, as AdaptedGD is given it.
    """

    inside: Tensor
    boundary: Tensor
    grid: Tensor
    build: Callable[[], nn.Module]
    boundary_weight: float = 50.0
    criterion: nn.Module = field(default_factory=nn.MSELoss)

    def loss(self, model: nn.Module) -> Tensor:
        """Mean square of −Δu − f inside, and the weighted one of u on the boundary."""
        u = model(self.boundary)
        inside = self.criterion(-laplacian(model, self.inside), source(self.inside)[:, None])
        loss: Tensor = inside + self.boundary_weight * self.criterion(u, torch.zeros_like(u))
        return loss

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Loss, and relative L2 error of the solution."""
        u = exact(self.grid)
        with torch.no_grad():
            error = (model(self.grid)[:, 0] - u).norm() / u.norm()
        return {"loss": float(self.loss(model).detach()), "error": float(error)}


def plot_maps(solutions: Mapping[str, Tensor], u: Tensor) -> "Figure":
    """The first solution, and where each one is off by how much, on one scale.

    Args:
        solutions: Name → solution on a square grid, ``[M, M]``.
        u: The exact solution.
    """
    from matplotlib.colors import LogNorm

    errors = {name: (solution - u).abs().nan_to_num(math.inf) for name, solution in solutions.items()}
    name, solution = next(iter(solutions.items()))
    least = 10.0 ** math.floor(math.log10(float(errors[name].median())) - 1)  # drawn for what is less, where signs change
    most = max(float(error[error.isfinite()].max()) for error in errors.values() if error.isfinite().any())
    columns = len(solutions) + 1
    figure, (first, *others) = new_figure(3.2 * columns + 1, 3.3, dpi=100, ncols=columns)
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

    def build() -> nn.Module:
        torch.manual_seed(options.seed)
        return network(options.width)

    ticks = torch.linspace(0, 1, 101, dtype=torch.float64)
    return Job(*collocation_points(options.points), torch.cartesian_prod(ticks, ticks), build)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe."""
    parser = new_parser(__doc__, "results/pinn", "metrics.csv and figures", "6² points, width 12, 20 steps")
    parser.add_argument("--points", type=positive, default=15, help="n: n² points inside, n on each edge (15)")
    parser.add_argument("--width", type=positive, default=20, help="units of each of the two hidden layers (20)")
    parser.add_argument("--steps", type=positive, default=40, help="steps of AdaptedGD (40)")
    parser.add_argument("--lr", type=above_zero, default=1e-2, help="first learning rate of Adam (1e-2)")
    with started(parser, arguments, {"points": 6, "width": 12, "steps": 20}) as options:
        job = prepare(options)
        models = {name: job.build() for name in ("AdaptedGD", "Adam", "LBFGS")}
        num_params = sum(p.numel() for p in models["Adam"].parameters())
        num_residuals = len(job.inside) + len(job.boundary)
        print(f"{num_residuals:,} residuals, tanh network 2-{options.width}-{options.width}-1: K = {num_params:,} parameters")
        print(HEADER)
        runs: list[Run] = []
        for name, model in models.items():
            if name == "AdaptedGD":
                optimizer = AdaptedGD(model, criterion=job.criterion)
                run = step_on(
                    optimizer, partial(job.loss, model), options.steps, partial(job.measure, model), count="gradients"
                )
            else:
                parameters = model.parameters()
                other = adam(parameters, options.lr) if name == "Adam" else lbfgs(parameters)
                seconds = runs[0].rows[-1]["seconds"]
                run = train(name, other, partial(job.loss, model), seconds, partial(job.measure, model), count="gradients")
            row = run.rows[-1]
            print(f"{name:12s} {row['seconds']:8.1f} {row['gradients']:10.0f} {row['loss']:10.2e} {row['error']:18.2e}")
            runs.append(run)
        with torch.no_grad():
            u = exact(job.grid)
            side = math.isqrt(len(u))
            solutions = {name: model(job.grid).view(side, side) for name, model in models.items()}
        error = plot_loss({run.name: (run.column("seconds"), run.column("error")) for run in runs}, xlabel="seconds")
        error.axes[0].set(ylabel="relative L2 error", title="Physics-informed network for −Δu = f")
        write_all(options.out, runs, {"error.png": error, "solution.png": plot_maps(solutions, u.view(side, side))})


if __name__ == "__main__":
    main()
