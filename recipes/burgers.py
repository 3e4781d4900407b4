"""Burgers' equation by a physics-informed network: u_t + u u_x = ν u_xx, ν = 0.01/π, whose solution grows a steep front.

x is in [−1, 1], t in [0, 1], u(0, x) = −sin πx and u(t, ±1) = 0. The loss is the mean square of the equation's residual at
points inside, plus a weight times that of what is given at the start and at both ends. The loop is that of any torch optimizer
with a closure, and derivatives are taken by `torch.autograd.grad`, outside of the network. The exact solution is that of Cole
and Hopf. Half of the points are denser near x = 0, where the front is, and x is scaled before the first layer.
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
    tidy,
    write_all,
)
from torch import Tensor, nn

from torch_adapted_gd import AdaptedGD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VISCOSITY = 0.01 / math.pi
TIMES = (0.25, 0.5, 0.75, 1.0)  # of the slices that are drawn
COLUMNS = {"loss": "loss", "relative L2 error": "error"}


def exact(points: Tensor, nodes: int = 2001) -> Tensor:
    """The solution at points (t, x), ``[N, 2]``, by Cole and Hopf: ``[N, 1]``.

    u = −∫ sin π(x−y) w dy / ∫ w dy with w = exp(−cos π(x−y)/2πν − y²/4νt), y = z√(4νt), by the trapezoidal rule in z.

    Args:
        points: Where.
        nodes: How many values of z in [−10, 10]. With 2,001 the rule's error is rounding.
    """
    t, x = points[:, :1], points[:, 1:]
    z = torch.linspace(-10, 10, nodes, dtype=points.dtype)
    argument = math.pi * (x - z * (4 * VISCOSITY * t).sqrt())
    weight = (-argument.cos() / (2 * math.pi * VISCOSITY) - z**2).softmax(1)  # exp would overflow
    return -(weight * argument.sin()).sum(1, keepdim=True)


class Network(nn.Module):
    """A tanh network u(t, x) with three hidden layers.

    Args:
        width: Units of each hidden layer.

    Shape:
        Points ``[N, 2]``; output ``[N, 1]``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = [nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 1)).double()

    def forward(self, points: Tensor) -> Tensor:
        """The solution at the points."""
        u: Tensor = self.layers(torch.stack([2 * points[:, 0] - 1, 6 * points[:, 1]], 1))
        return u


def residual(model: nn.Module, points: Tensor) -> Tensor:
    """u_t + u u_x − ν u_xx at points ``[N, 2]``: ``[N, 1]``."""
    where = points.clone().requires_grad_()
    u = model(where)
    (slopes,) = torch.autograd.grad(u.sum(), where, create_graph=True)
    (seconds,) = torch.autograd.grad(slopes[:, 1].sum(), where, create_graph=True)
    value: Tensor = slopes[:, :1] + u * slopes[:, 1:] - VISCOSITY * seconds[:, 1:]
    return value


def inner_points(n: int, seed: int) -> Tensor:
    """A number n of points of a Sobol sequence in [0, 1]×[−1, 1], half of them denser near x = 0: ``[n, 2]``."""
    t, x = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(n, dtype=torch.float64).split(1, 1)
    x = 2 * x - 1
    return torch.cat([t, torch.where(torch.arange(n)[:, None] % 2 == 0, x, (4 * x).sinh() / math.sinh(4))], 1)


def given_points(n: int) -> Tensor:
    """A number n of points at the start, evenly spaced, and n/2 at both ends together: ``[~1.5n, 2]``."""
    x = torch.linspace(-1, 1, n, dtype=torch.float64)
    t = torch.linspace(0, 1, max(n // 4, 2), dtype=torch.float64)
    sides = [(torch.zeros_like(x), x), (t, -torch.ones_like(t)), (t, torch.ones_like(t))]
    return torch.cat([torch.stack(side, 1) for side in sides])


@dataclass
class Job:
    """The equation on its points, and the grid on which the solution is compared.

    Attributes:
        inside: Points inside, ``[N, 2]``.
        given: Points at the start and at both ends, ``[M, 2]``.
        weight: Of the mean square there.
        criterion: The mean square, as AdaptedGD is given it.
    """

    inside: Tensor
    given: Tensor
    weight: float = 10.0
    criterion: nn.Module = field(default_factory=nn.MSELoss)

    def __post_init__(self) -> None:
        ticks = torch.linspace(0, 1, 101, dtype=torch.float64)
        self.grid = torch.cartesian_prod(ticks, torch.linspace(-1, 1, 401, dtype=torch.float64))
        self.u = exact(self.grid)
        start = self.given[:, :1] == 0
        self.values = torch.where(start, -(math.pi * self.given[:, 1:]).sin(), 0.0)

    def loss(self, model: nn.Module) -> Tensor:
        """Mean square of the residual, and the weighted one of what is given."""
        r = residual(model, self.inside)
        loss: Tensor = self.criterion(r, torch.zeros_like(r)) + self.weight * self.criterion(model(self.given), self.values)
        return loss

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Loss, and relative L2 error of the solution."""
        with torch.no_grad():
            error = (model(self.grid) - self.u).norm() / self.u.norm()
        return {"loss": float(self.loss(model).detach()), "error": float(error)}


def plot_solution(job: Job, u: Tensor, run: Run) -> "Figure":
    """The solution, where it is off by how much, slices of it, and loss and error after each step.

    Args:
        job: The equation.
        u: The approximate solution on the grid.
        run: What was recorded.
    """
    solution, truth = u.view(101, 401), job.u.view(101, 401)
    figure, ((map_ax, error_ax), (slice_ax, loss_ax)) = new_figure(10, 6.4, dpi=75, nrows=2, ncols=2)
    extent = (0.0, 1.0, -1.0, 1.0)
    draw_map(figure, map_ax, solution, extent, cmap="RdBu_r", title="u by the network")
    draw_error(figure, error_ax, (solution - truth).abs(), extent)
    x = torch.linspace(-1, 1, 401, dtype=torch.float64).numpy()
    for k, t in enumerate(TIMES):
        slice_ax.plot(x, solution[round(100 * t)].numpy(), color=f"C{k}", linewidth=1.6, label=f"t = {t:g}")
        slice_ax.plot(x, truth[round(100 * t)].numpy(), color="black", linestyle=":", label="exact" if t == 1 else None)
    slice_ax.set(xlabel="x", ylabel="u", title="slices")
    tidy(slice_ax)
    draw_columns(loss_ax, run, COLUMNS, f"relative L2 error {run.rows[-1]['error']:.1e}")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe."""
    parser = new_parser(__doc__, "results/burgers", "metrics.csv and solution.png", "200 + 32 points, width 8, 15 steps")
    parser.add_argument("--points", type=positive, default=1500, help="points inside (1500)")
    parser.add_argument("--given", type=positive, default=134, help="points at the start, half as many at both ends (134)")
    parser.add_argument("--width", type=positive, default=16, help="units of each of the three hidden layers (16)")
    parser.add_argument("--steps", type=positive, default=100, help="steps (100)")
    with started(parser, arguments, {"points": 200, "given": 22, "width": 8, "steps": 15}) as options:
        torch.manual_seed(options.seed)
        model = Network(options.width)
        job = Job(inner_points(options.points, options.seed), given_points(options.given))
        num_params = sum(p.numel() for p in model.parameters())
        print(f"{len(job.inside):,} points inside, {len(job.given):,} at the start and ends, K = {num_params:,} parameters")
        optimizer = AdaptedGD(model, criterion=job.criterion)
        run = step_on(optimizer, partial(job.loss, model), options.steps, partial(job.measure, model), shown=COLUMNS)
        with torch.no_grad():
            write_all(options.out, [run], {"solution.png": plot_solution(job, model(job.grid), run)})


if __name__ == "__main__":
    main()
