"""The differential equations that physics-informed networks are measured on, each with its exact solution and loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .networks import mlp

Points = tuple[Tensor, Tensor]  # in the interior, [N, d], and where u is given, [M, d]


def derivative(u: Tensor, x: Tensor) -> Tensor:
    """∂u/∂x of each sample, ``[N, d]``."""
    (found,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return found


@dataclass(frozen=True)
class Equation:
    """A problem, as its papers state it: loss ½ mean r² + ½ mean (u − given)², uniform random points, tanh, float64.

    Attributes:
        sizes: Of the network's layers.
        interior: Residual r of the network at points that require a gradient, ``[N, 1]``.
        solution: The exact u at points ``[N, d]``, ``[N, 1]``.
        points: Draws as many points as asked for.
        counts: How many inside and on the boundary.
        redrawn: After how many steps new ones are drawn; 0 for never.
        published: What others report: their name → relative L2 error.
        note: In which time, and on what.
        by_residual: Whether new points inside are denser where the network's residual is large, in proportion to
            |r| + mean |r| (Wu et al. 2023, residual-based adaptive distribution).
    """

    sizes: tuple[int, ...]
    interior: Callable[[nn.Module, Tensor], Tensor]
    solution: Callable[[Tensor], Tensor]
    points: Callable[[tuple[int, int], torch.Generator], Points]
    counts: tuple[int, int]
    redrawn: int
    published: dict[str, float]
    note: str
    by_residual: bool = False

    def network(self, seed: int) -> nn.Module:
        """The starting network of a seed."""
        torch.manual_seed(seed)
        return mlp(*self.sizes).double()

    def loss(self, model: nn.Module, points: Points, criterion: nn.Module) -> Tensor:
        """The loss, as everybody writes it."""
        inside, boundary = points
        r = self.interior(model, inside.clone().requires_grad_())
        total: Tensor = 0.5 * criterion(r, torch.zeros_like(r)) + 0.5 * criterion(model(boundary), self.solution(boundary))
        return total

    @torch.no_grad()
    def error(self, model: nn.Module, where: Tensor) -> float:
        """Relative L2 error of the solution."""
        u = self.solution(where)
        return float((model(where) - u).norm() / u.norm())

    def test_points(self) -> Tensor:
        """Where the error is taken."""
        return self.points((4000, 0), torch.Generator().manual_seed(12345))[0]

    def new_points(self, model: nn.Module, generator: torch.Generator) -> Points:
        """Points to go on with."""
        count, on_boundary = self.counts
        if not self.by_residual:
            return self.points(self.counts, generator)
        inside, boundary = self.points((10 * count, on_boundary), generator)
        size = self.interior(model, inside.clone().requires_grad_()).detach().abs().flatten()
        return inside[torch.multinomial(size + size.mean(), count, generator=generator)], boundary


def in_cube(d: int) -> Callable[[tuple[int, int], torch.Generator], Points]:
    """Uniform points of the unit cube, and of its faces."""

    def draw(counts: tuple[int, int], generator: torch.Generator) -> Points:
        inside, boundary = (torch.rand(n, d, generator=generator, dtype=torch.float64) for n in counts)
        face = torch.randint(2 * d, (counts[1],), generator=generator)
        boundary[torch.arange(counts[1]), face // 2] = (face % 2).double()
        return inside, boundary

    return draw


def in_time(counts: tuple[int, int], generator: torch.Generator) -> Points:
    """Points (t, x) of [0, 1]×[−1, 1]; half of the others at t = 0, half at x = ±1."""
    inside, given = (torch.rand(n, 2, generator=generator, dtype=torch.float64) for n in counts)
    inside[:, 1] = 2 * inside[:, 1] - 1
    half = counts[1] // 2
    given[:half, 0], given[:half, 1] = 0.0, 2 * given[:half, 1] - 1
    given[half:, 1] = torch.randint(2, (counts[1] - half,), generator=generator).double() * 2 - 1
    return inside, given


def poisson(source: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """−Δu − f."""

    def residual(model: nn.Module, x: Tensor) -> Tensor:
        slopes = derivative(model(x), x)
        laplacian = torch.stack([derivative(slopes[:, i], x)[:, i : i + 1] for i in range(x.shape[1])]).sum(0)
        return -laplacian - source(x.detach())

    return residual


def sines(x: Tensor) -> Tensor:
    """Π sin πxᵢ."""
    return (math.pi * x).sin().prod(1, keepdim=True)


def cosines(x: Tensor) -> Tensor:
    """Σ cos πxᵢ."""
    return (math.pi * x).cos().sum(1, keepdim=True)


VISCOSITY = 0.01 / math.pi


def burgers(model: nn.Module, x: Tensor) -> Tensor:
    """u_t + u u_x − ν u_xx."""
    u: Tensor = model(x)
    slopes = derivative(u, x)
    return slopes[:, :1] + u * slopes[:, 1:] - VISCOSITY * derivative(slopes[:, 1], x)[:, 1:]


def burgers_solution(x: Tensor) -> Tensor:
    """By the Cole–Hopf transform: u = −∫ sin π(x−y) w dy / ∫ w dy, w = exp(−cos π(x−y)/2πν − y²/4νt); u = −sin πx at t = 0."""
    t, place = x[:, :1], x[:, 1:]
    z = torch.linspace(-10, 10, 2001, dtype=torch.float64)  # y = z√(4νt); the trapezoidal rule, whose error is rounding here
    argument = math.pi * (place - z * (4 * VISCOSITY * t).sqrt())
    log_weight = -argument.cos() / (2 * math.pi * VISCOSITY) - z**2
    weight = torch.softmax(log_weight, 1)
    u: Tensor = -(weight * argument.sin()).sum(1, keepdim=True)
    return u


_PLANE = Equation(
    (2, 64, 1),
    poisson(lambda x: 2 * math.pi**2 * sines(x)),
    sines,
    in_cube(2),
    (900, 120),
    0,
    {"ENGD": 1.2e-7, "KFAC*": 4.0e-7, "Adam": 1.9e-4, "LBFGS": 3.1e-4},
    "1000 s on a GPU (Dangel et al. 2024, exp09)",
)
_CUBE = Equation(
    (5, 64, 1),
    poisson(lambda x: math.pi**2 * cosines(x)),
    cosines,
    in_cube(5),
    (3000, 500),
    1,
    {"ENGD": 3.5e-8, "KFAC*": 1.6e-6, "LBFGS": 5.6e-4},
    "3000 s on a GPU; ENGD 4.3e-6 after 60 s (Dangel et al. 2024, exp10)",
)
EQUATIONS = {
    "P1": _PLANE,
    "P2": replace(
        _PLANE,
        sizes=(2, 64, 64, 48, 48, 1),
        published={"KFAC*": 1.58e-6, "KFAC": 1.4e-5, "Adam": 4.2e-4, "LBFGS": 6.8e-4},
        note="1000 s on a GPU (Dangel et al. 2024, exp15)",
    ),
    "P3": _CUBE,
    "P4": replace(
        _CUBE,
        sizes=(5, 64, 64, 48, 48, 1),
        published={"SPRING": 1.7e-7, "ENGD-W": 4.3e-7},
        note="7000 s on a GPU; ENGD-W 7.4e-6 after 300 s (Guzmán-Cordero et al. 2025)",
    ),
    "P5": Equation(
        (2, 20, 20, 20, 20, 1),
        burgers,
        burgers_solution,
        in_time,
        (1500, 300),
        25,
        {"SSBroyden": 1.6e-8, "SOAP": 4.0e-5},
        "SSBroyden 2,878 s (Urbán et al., Kiyani et al. 2025), on other points",
        by_residual=True,  # of 1,500 uniform ones too few see the front: the loss falls to 1e-7 while the error is 0.26
    ),
}
