"""An inverse problem: the unknown κ of the heat equation u_t = κ u_xx, from the solution at 60 points without noise.

t and x are in [0, 1]. κ is a parameter of the module that AdaptedGD is given, beside the network u(t, x), and is used in the
residual, outside of the module. The loss is the mean square of the residual at points inside, plus a weight times that of
u − data. Nothing is given at the start or at the ends. The data are u = exp(−κπ²t) sin πx with κ = 0.1; training starts at 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from race import (
    Run,
    draw_columns,
    draw_error,
    draw_map,
    new_figure,
    new_parser,
    positive,
    started,
    step_on,
    write_all,
)
from torch import Tensor, nn

from torch_adapted_gd import AdaptedGD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KAPPA = 0.1
COLUMNS = {"loss": "loss", "relative L2 error": "error", "|κ − 0.1|": "kappa_error"}


def exact(points: Tensor) -> Tensor:
    """The solution at points (t, x), ``[N, 2]``: ``[N, 1]``."""
    return (-KAPPA * math.pi**2 * points[:, :1]).exp() * (math.pi * points[:, 1:]).sin()


class Network(nn.Module):
    """A tanh network u(t, x) with two hidden layers, and κ.

    Args:
        width: Units of each hidden layer.

    Attributes:
        kappa: The unknown coefficient.

    Shape:
        Points ``[N, 2]``; output ``[N, 1]``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = [nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 1)).double()
        self.kappa = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, points: Tensor) -> Tensor:
        """The solution at the points."""
        u: Tensor = self.layers(4 * points - 2)  # from [0, 1] to [−2, 2]
        return u


def residual(model: Network, points: Tensor) -> Tensor:
    """u_t − κ u_xx at points ``[N, 2]``: ``[N, 1]``."""
    where = points.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(model(where).sum(), where, create_graph=True)
    (seconds,) = torch.autograd.grad(slopes[:, 1].sum(), where, create_graph=True)
    value: Tensor = slopes[:, :1] - model.kappa * seconds[:, 1:]
    return value


@dataclass
class Job:
    """The equation on its points, the data, and the grid on which the solution is compared.

    Attributes:
        inside: Points of the equation, ``[N, 2]``.
        measured: Points of the data, ``[M, 2]``.
        weight: Of the mean square of u − data.
        criterion: The mean square, as AdaptedGD is given it.
    """

    inside: Tensor
    measured: Tensor
    weight: float = 100.0
    criterion: nn.Module = field(default_factory=nn.MSELoss)

    def __post_init__(self) -> None:
        ticks = torch.linspace(0, 1, 101, dtype=torch.float64)
        self.grid = torch.cartesian_prod(ticks, ticks)
        self.data = exact(self.measured)

    def loss(self, model: Network) -> Tensor:
        """Mean square of the residual, and the weighted one of u − data."""
        r = residual(model, self.inside)
        loss: Tensor = self.criterion(r, torch.zeros_like(r)) + self.weight * self.criterion(model(self.measured), self.data)
        return loss

    def measure(self, model: Network) -> dict[str, float]:
        """Loss, relative L2 error of the solution, and error of κ."""
        u = exact(self.grid)
        with torch.no_grad():
            error = (model(self.grid) - u).norm() / u.norm()
        kappa_error = abs(float(model.kappa.detach()) - KAPPA)
        return {"loss": float(self.loss(model).detach()), "error": float(error), "kappa_error": kappa_error}


def plot_solution(job: Job, u: Tensor, run: Run) -> "Figure":
    """The solution, where it is off by how much, and the loss and the error of κ after each step.

    Args:
        job: The equation.
        u: The approximate solution on the grid.
        run: What was recorded.
    """
    figure, (map_ax, error_ax, loss_ax) = new_figure(12, 3.6, dpi=75, ncols=3)
    extent = (0.0, 1.0, 0.0, 1.0)
    draw_map(figure, map_ax, u.view(101, 101), extent, cmap="viridis", title="u by the network, and the data's points")
    draw_error(figure, error_ax, (u - exact(job.grid)).abs().view(101, 101), extent)
    map_ax.scatter(*job.measured.T.numpy(), s=8, color="white", edgecolors="black", linewidths=0.5)
    title = f"|κ − 0.1| = {run.rows[-1]['kappa_error']:.1e} at the end"
    draw_columns(loss_ax, run, {"loss": "loss", "|κ − 0.1|": "kappa_error"}, title)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe."""
    parser = new_parser(__doc__, "results/inverse", "metrics.csv and solution.png", "6² points, width 8, 20 steps")
    parser.add_argument("--points", type=positive, default=12, help="n: n² points of the equation (12)")
    parser.add_argument("--data", type=positive, default=60, help="points of the data (60)")
    parser.add_argument("--width", type=positive, default=12, help="units of each of the two hidden layers (12)")
    parser.add_argument("--steps", type=positive, default=80, help="steps (80)")
    with started(parser, arguments, {"points": 6, "width": 8, "steps": 20}) as options:
        torch.manual_seed(options.seed)
        model = Network(options.width)
        ticks = (torch.arange(options.points, dtype=torch.float64) + 0.5) / options.points
        job = Job(torch.cartesian_prod(ticks, ticks), torch.rand(options.data, 2, dtype=torch.float64))
        num_params = sum(p.numel() for p in model.parameters())
        print(f"{len(job.inside):,} points of the equation, {len(job.measured):,} of data, K = {num_params:,} parameters")
        optimizer = AdaptedGD(model, criterion=job.criterion)
        run = step_on(optimizer, partial(job.loss, model), options.steps, partial(job.measure, model), shown=COLUMNS)
        with torch.no_grad():
            write_all(options.out, [run], {"solution.png": plot_solution(job, model(job.grid), run)})


if __name__ == "__main__":
    main()
