"""The networks on real digits, and all that is computed of them: by the package, and independently of it."""

import math
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from claims import ALPHAS, Context, Net, computed, doubt, slopes
from digits import load_digits
from torch import Tensor, nn

from torch_adapted_gd import (
    AdaptedGD,
    Definiteness,
    DetourPath,
    FlowResult,
    GradientField,
    HalfSquaredLoss,
    InterpolationDeviation,
    KernelSolution,
    LinearInterpolationLR,
    LinearPath,
    LineLosses,
    PathResult,
    adapted_flow,
    effective_kernel,
    follow_path,
    gradient_field,
    interpolation_deviation,
    is_equilibrium,
    is_positive_definite,
    kernel_block,
    line_losses,
    metric_tensor,
    ntk,
    output_jacobian,
    rank_revealing_lstsq,
    solve_kernel,
)
from torch_adapted_gd.collapse import output_collapse

CLASSES = 10
PACE = 3e-4  # steps of flows that derivatives are taken of, in units of their fastest time
TIMES = 40  # at which the deviation is recorded, up to
T_END = 0.6


def network(sizes: tuple[int, ...], seed: int) -> nn.Module:
    """A tanh network in float64."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def build(samples: int, width: int, rtol: float, seed: int) -> Context:
    """Four networks on N images of digits, K ≥ 4·QN for each.

    ``wide`` is an MLP 784-width-width-10, whose D has full rank. ``twins`` is the same where every sixth image is a copy of
    another one with another label. ``small`` is like ``wide`` on images of 7×7 pixels, half of them, with a DᵀD that can be
    written down; ``narrow`` has four units before the last layer, so that the rank is short and ran D turns with θ.

    Args:
        samples: N.
        width: Units of each of the two hidden layers.
        rtol: Relative tolerance of flows; the absolute one is a hundredth.
        seed: Of weights and the choice of images.
    """
    digits = load_digits("mnist5k", Path("data"), samples, seed)
    images, labels = digits.train_images, digits.train_labels
    pooled = F.avg_pool2d(images.view(-1, 1, 28, 28), 4).flatten(1)
    copies = samples // 6
    few = samples // 2
    doubled = torch.cat([images[:-copies], images[:copies]])
    conflicting = torch.cat([labels[:-copies], (labels[:copies] + 1) % CLASSES])
    wide = network((784, width, width, CLASSES), seed)

    def net(name: str, model: nn.Module, x: Tensor, classes: Tensor) -> Net:
        return Net(name, model, x, classes, F.one_hot(classes, CLASSES).double(), (rtol, rtol / 100))

    narrow = 8 + 2 * math.ceil(samples / 4)  # K ≥ 4·QN
    nets = [
        net("wide", wide, images, labels),
        net("twins", wide, doubled, conflicting),
        net("small", network((49, few, few, CLASSES), seed), pooled[:few], labels[:few]),
        net("narrow", network((49, narrow, 4, CLASSES), seed), pooled, labels),
    ]
    return Context({one.name: one for one in nets})


# At one θ.


@computed
def D(_: Context, net: Net) -> Tensor:  # noqa: N802
    """D = ∂x/∂θ (2.12)."""
    return output_jacobian(net.model, net.x)


@computed
def kernel(_: Context, net: Net) -> Tensor:
    """Θ (3.15)."""
    return ntk(net.model, net.x).reshape(net.num_outputs, net.num_outputs)


@computed
def gradient(_: Context, net: Net) -> dict[str, Tensor]:
    """∇_θC of the paper's loss and of cross-entropy, by backward passes."""
    found = {}
    for name, criterion, target in (("half", HalfSquaredLoss(), net.y), ("entropy", nn.CrossEntropyLoss(), net.labels)):
        loss = criterion(net.model(net.x), target)
        parts = torch.autograd.grad(loss, list(net.model.parameters()))
        found[name] = torch.cat([part.flatten() for part in parts])
    return found


@computed
def loss(_: Context, net: Net) -> dict[str, Tensor]:
    """C (2.48) and ∇ₓC, by autograd."""
    x = net.start.view_as(net.y).clone().requires_grad_()
    value = HalfSquaredLoss()(x, net.y)
    return {"value": value.detach(), "gradient": torch.autograd.grad(value, x)[0].flatten()}


@computed
def pinv(_: Context, net: Net) -> Tensor:
    """D⁺, by torch."""
    found: Tensor = torch.linalg.pinv(net.jacobian)
    return found


@computed
def gram_pinv(_: Context, net: Net) -> Tensor:
    """(DᵀD)⁺ ``[K, K]``, by torch."""
    found: Tensor = torch.linalg.pinv(net.jacobian.T @ net.jacobian, rtol=1e-10, hermitian=True)
    return found


@computed
def lstsq_pinv(_: Context, net: Net) -> dict[str, Tensor]:
    """D⁺ and (D⁺)⁺, column by column, by the package's least squares."""
    d = net.jacobian
    once = rank_revealing_lstsq(d, torch.eye(len(d)).to(d), rtol=1e-10).solution
    twice = rank_revealing_lstsq(once, torch.eye(len(once)).to(d), rtol=1e-10).solution
    tall = rank_revealing_lstsq(d.T, torch.eye(d.shape[1]).to(d), rtol=1e-10).solution
    return {"once": once, "twice": twice, "of_transpose": tall}


@computed
def P(_: Context, net: Net) -> Tensor:  # noqa: N802
    """The projector onto ran D, of singular vectors."""
    u = net.svd[0]
    return u @ u.T


@computed
def solution(_: Context, net: Net) -> KernelSolution:
    """Θψ = Pg (2.22)."""
    return solve_kernel(ntk(net.model, net.x), net.g)


@computed
def fields(_: Context, net: Net) -> dict[str, Tensor]:
    """V_α (2.31), (2.41) for each of `ALPHAS`."""
    found: list[GradientField] = [gradient_field(net.model, net.x, net.y, alpha) for alpha in ALPHAS]
    return {
        "parameters": torch.stack([one.parameters for one in found]),
        "outputs": torch.stack([one.outputs.flatten() for one in found]),
        "slope": torch.tensor([one.slope for one in found], dtype=torch.float64),
    }


@computed
def metrics(_: Context, net: Net) -> Tensor:
    """h_α (2.45)-(2.46) for each of `ALPHAS`."""
    return torch.stack([metric_tensor(ntk(net.model, net.x), alpha) for alpha in ALPHAS])


@computed
def effective(_: Context, net: Net) -> dict[str, Tensor]:
    """The kernel that outputs follow (3.17), for three α at θ₀ and for α = 1 at 1.5 θ₀."""
    n = net.num_outputs
    first, half, last = (effective_kernel(net.model, net.x, alpha).reshape(n, n) for alpha in (0.0, 0.5, 1.0))
    return {
        "first": first,
        "half": half,
        "last": last,
        "moved": effective_kernel(net.at(1.5 * net.theta).model, net.x).reshape(n, n),
    }


@computed
def definite(_: Context, net: Net) -> Definiteness:
    """Whether Θ is positive-definite (3.16)."""
    return is_positive_definite(net.model, net.x)


@computed
def blocks(_: Context, net: Net) -> Tensor:
    """Θ(x_i, x_j) (3.14) for some pairs, ``[3, Q, Q]``."""
    return torch.stack([kernel_block(net.model, net.x, i, j) for i, j in ((0, 0), (0, 1), (-1, 1))])


# Flows.


@computed
def short(_: Context, net: Net) -> dict[str, object]:
    """The flow for α = 0, ½ and 1, nine records of each: ∂_s x and ∂_s θ at the fifth, θ there, and what they may err by."""
    found: dict[str, list[Tensor]] = {"velocity": [], "drift": [], "theta": []}
    doubts = []  # Runge and Kutta's own error, PACE⁴/120, is less than these by far
    for alpha in (0.0, 0.5, 1.0):
        rate = (alpha + (1 - alpha) * net.largest**2) / net.num_samples  # of the fastest direction
        h = PACE / rate
        flow = adapted_flow(net.model, net.x, net.y, alpha=alpha, time="s", t_end=8 * h, steps=8, method="rk4")
        for name, values in (("velocity", flow.outputs.flatten(1)), ("drift", flow.parameters)):
            found[name].append(slopes(values, h)[0])
            doubts.append(doubt(values, h))
        found["theta"].append(flow.parameters[4])
    return {**{name: torch.stack(parts) for name, parts in found.items()}, "doubt": max(doubts) + noise(net)}


def noise(net: Net) -> float:
    """What rounding leaves of a difference over a step of `PACE` of the way."""
    return net.rounding(2) / PACE


@computed
def short_D(c: Context, net: Net) -> Tensor:  # noqa: N802
    """D at those θ, ``[3, QN, K]``."""
    thetas = c.original(f"{net.name}.short.theta")
    return torch.stack([output_jacobian(net.at(theta).model, net.x) for theta in thetas])


@computed
def flow_t(_: Context, net: Net) -> FlowResult:
    """The adapted flow in the time t, to the end."""
    return adapted_flow(net.model, net.x, net.y, steps=10, rtol=net.tolerance[0], atol=net.tolerance[1])


@computed
def flow_s(_: Context, net: Net) -> FlowResult:
    """The adapted flow in its own time, to t = ½."""
    end = net.num_samples * math.log(2)
    return adapted_flow(net.model, net.x, net.y, time="s", t_end=end, steps=8, rtol=net.tolerance[0], atol=net.tolerance[1])


@computed
def deviation(_: Context, net: Net) -> InterpolationDeviation:
    """The deviation from the line (2.59)."""
    return interpolation_deviation(
        net.model, net.x, net.y, t_end=T_END, steps=TIMES, rtol=net.tolerance[0], atol=net.tolerance[1]
    )


@computed
def projectors(_: Context, net: Net) -> Tensor:
    """P_t along the adapted flow at the times of the deviation, ``[T, QN, QN]``, from D by definition."""
    flow = adapted_flow(net.model, net.x, net.y, t_end=T_END, steps=TIMES, rtol=net.tolerance[0], atol=net.tolerance[1])
    found = []
    for theta in flow.parameters:
        d = output_jacobian(net.at(theta).model, net.x)
        values, vectors = torch.linalg.eigh(d @ d.T)
        basis = vectors[:, values > 1e-11 * values[-1]]
        found.append(basis @ basis.T)
    return torch.stack(found)


@computed
def followed(_: Context, net: Net) -> PathResult:
    """The network led along a bend to its targets (3.5)."""
    path = DetourPath(net.start.view_as(net.y), net.y, bend(net))
    return follow_path(net.model, net.x, path, steps=8, rtol=net.tolerance[0], atol=net.tolerance[1])


@computed
def led(_: Context, net: Net) -> dict[str, object]:
    """∂_sθ on the first part of that path, θ there, and what the former may err by."""
    path = DetourPath(net.start.view_as(net.y), net.y, bend(net))
    found = follow_path(net.model, net.x, path, s_end=8 * PACE, steps=8, method="rk4")
    return {
        "drift": slopes(found.parameters, PACE)[0],
        "theta": found.parameters[4],
        "doubt": doubt(found.parameters, PACE) + noise(net),
    }


def bend(net: Net) -> Tensor:
    """How far off the line that path is half-way, ``[N, Q]``."""
    return 0.2 * torch.randn(net.y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@computed
def straight(_: Context, net: Net) -> PathResult:
    """The network led along the straight line (3.7)."""
    path = LinearPath(net.start.view_as(net.y), net.y)
    return follow_path(net.model, net.x, path, steps=5, rtol=net.tolerance[0], atol=net.tolerance[1])


@computed
def lines(_: Context, net: Net) -> Tensor:
    """Places on the package's line (2.51), at eleven equal times."""
    path = LinearPath(net.start.view_as(net.y), net.y)
    return torch.stack([path(t).flatten() for t in torch.linspace(0, 1, 11, dtype=torch.float64)])


def trained(net: Net, steps: int, more: int = 0) -> tuple[nn.Module, Tensor]:
    """AdaptedGD on the straight-line schedule, and full steps after it: the network, and its outputs at all steps."""
    model = net.at(net.theta).model
    criterion = HalfSquaredLoss()
    optimizer = AdaptedGD(model, criterion=criterion, damping=0.0)
    scheduler = LinearInterpolationLR(optimizer, total_steps=steps)
    outputs = [net.start]
    for _ in range(steps + more):
        optimizer.zero_grad()
        criterion(model(net.x), net.y).backward()
        optimizer.step()
        scheduler.step()
        outputs.append(model(net.x).detach().flatten())
    return model, torch.stack(outputs)


@computed
def steps(_: Context, net: Net) -> dict[str, Tensor]:
    """Outputs on the way, in 5, 20 and 40 steps; the last two for ``wide`` alone."""
    return {str(count): trained(net, count)[1] for count in ((20, 40) if net.name == "wide" else (5,))}


@computed
def equilibrium(_: Context, net: Net) -> dict[str, object]:
    """Where training ends with duplicated images of conflicting labels: an equilibrium, though ∇ₓC is not zero."""
    before = is_equilibrium(net.model, net.x, net.y)
    model, outputs = trained(net, 5, more=6)
    return {
        "before": before,
        "after": is_equilibrium(model, net.x, net.y),
        "D": output_jacobian(model, net.x),
        "outputs": outputs[-1],
    }


# What outputs do.


@computed
def collapse(c: Context, net: Net) -> dict[str, Tensor]:
    """The split of the loss (3.11) along the adapted flow, each ``[T]``, and that of each class, ``[T, J]``."""
    outputs = c.original(f"{net.name}.flow_t.outputs")
    found = [output_collapse(x, net.labels, scale=0.5, per_class=True) for x in outputs]
    split = {key: torch.stack([one[key] for one in found]) for key in ("loss", "within", "bias", "bias_max", "within_max")}
    for key in ("within", "bias"):
        each = [torch.stack([one[f"{key}_class_{j}"] for j in range(CLASSES)]) for one in found]
        split[f"{key}_classes"] = torch.stack(each).nan_to_num()
    return split


@computed
def between(c: Context, net: Net) -> LineLosses:
    """Losses on straight lines between the flow's ends (4.1)."""
    last = c.original(f"{net.name}.flow_t.parameters")[-1]
    return line_losses(net.model, net.x, net.y, net.parameters(), net.parameters(last), steps=10)
