"""Claims of sections 3 and 4: prescribed paths, collapse of the final layer, the tangent kernel, lines in parameter space."""

import math

import torch
from claims import Context, Finding, apart, largest, registry
from claims_objects import CLASSES, PACE, bend
from torch import Tensor

CLAIMS, claim = registry()


@claim
def lifted(c: Context) -> Finding:
    """(3.1): D⁺Dv is the part of v in ran Dᵀ."""
    net, d = c.nets["narrow"], c["narrow.D"]
    v = torch.randn(d.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = net.svd[2]
    return Finding(
        "rank_revealing_lstsq, SVD", apart(c["narrow.lstsq_pinv.once"] @ (d @ v), rows.T @ (rows @ v)), net.rounding(1)
    )


@claim
def lifted_fields(c: Context) -> Finding:
    """(3.2): D⁺ of the outputs' motion is that of θ, for all V_α."""
    net = c.nets["narrow"]
    v, w = c["narrow.fields.parameters"], c["narrow.fields.outputs"]
    return Finding(
        "gradient_field, torch's pinv",
        largest(*(apart(c["narrow.pinv"] @ b, a) for a, b in zip(v, w, strict=True))),
        net.rounding(2),
    )


@claim
def bent_path(c: Context) -> Finding:
    """(3.3)-(3.4): a bent path is followed to y at full rank, and asks for nothing out of reach."""
    net, s = c.nets["wide"], c["wide.followed.s"]
    expected = net.y.flatten() + (1 - s)[:, None] * net.way + torch.sin(math.pi * s)[:, None] * bend(net).flatten()
    outputs = c["wide.followed.outputs"].flatten(1)
    error = largest(
        apart(c["wide.followed.wanted"].flatten(1), expected),
        float((outputs - expected).norm(dim=1).max() / net.way.norm()),
        float((outputs[-1] - net.y.flatten()).norm() / net.way.norm()),
        float(c["wide.followed.off_range"].abs().max()),
    )
    return Finding("follow_path(DetourPath), closed form", error, net.integration())


@claim
def path_velocity(c: Context) -> Finding:
    """(3.5): ∂_sθ = D⁺∂_s x on the way."""
    net, s = c.nets["small"], 4 * PACE
    speed = -net.way + math.pi * math.cos(math.pi * s) * bend(net).flatten()
    d = net.at(c["small.led.theta"]).jacobian
    bound = float(c.pristine["small.led.doubt"])
    return Finding("follow_path, torch's pinv", apart(c["small.led.drift"], torch.linalg.pinv(d) @ speed), bound)


@claim
def ranges(c: Context) -> Finding:
    """(3.6): ran D, the complement of ker Dᵀ and that of ker D⁺ are one."""
    net = c.nets["narrow"]
    left = torch.linalg.svd(c["narrow.D"].T)[2][net.rank :]  # ker Dᵀ
    plus = torch.linalg.svd(c["narrow.pinv"])[2][net.rank :]
    one = torch.eye(net.num_outputs, dtype=torch.float64)
    errors = (apart(one - k.T @ k, c["narrow.P"]) for k in (left, plus))
    return Finding("output_jacobian, SVD", largest(*errors), net.rounding(1))


@claim
def infeasible_line(c: Context) -> Finding:
    """(3.7): with conflicting labels the line leaves ran D by |P⊥(x₀ − y)|, and outputs end at x₀ + P(y − x₀)."""
    net = c.nets["twins"]
    reach = c["twins.P"] @ net.way
    share = float((net.way - reach).norm() / net.way.norm())
    error = largest(
        float((c["twins.straight.off_range"] - share).abs().max()),
        float((c["twins.straight.outputs"][-1].flatten() - net.start + reach).norm() / net.way.norm()),
        float((c["twins.straight.ranks"] - net.rank).abs().max()),
    )
    return Finding("follow_path(LinearPath), P of the SVD", error, net.integration())


def by_class(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number, average and mean squared deviation of each class (3.8)-(3.10), one sample after the other.

    Args:
        x: ``[N, Q]``.
        labels: ``[N]``.
    """
    counts, averages = torch.zeros(CLASSES, dtype=torch.float64), torch.zeros(CLASSES, x.shape[1], dtype=torch.float64)
    spread = torch.zeros(CLASSES, dtype=torch.float64)
    for row, j in zip(x, labels.tolist(), strict=True):
        averages[j] = (averages[j] * counts[j] + row) / (counts[j] + 1)
        counts[j] += 1
    for row, j in zip(x, labels.tolist(), strict=True):
        spread[j] += (row - averages[j]).square().sum() / counts[j]
    return counts, averages, spread


@claim
def classes(c: Context) -> Finding:
    """(3.8)-(3.10): class averages and deviations."""
    net = c.nets["wide"]
    counts, averages, spread = by_class(net.start.view_as(net.y), net.labels)
    seen = counts > 0
    bias = (averages - torch.eye(CLASSES).double()).square().sum(1)
    error = largest(
        apart(c["wide.collapse.bias_classes"][0][seen], bias[seen] / 2),
        apart(c["wide.collapse.within_classes"][0][seen], spread[seen] / 2),
    )
    return Finding("output_collapse(per_class), loops", error, net.rounding())


def split(c: Context) -> tuple[float, float]:
    """By how much C is off the two parts of (3.11), corrected; and off those with the last term as printed."""
    net = c.nets["wide"]
    counts, averages, spread = by_class(net.start.view_as(net.y), net.labels)
    bias = (averages - torch.eye(CLASSES).double()).square().sum(1) * (counts > 0)
    weighted, printed = float(counts @ bias) / net.num_samples, float(bias.sum())
    loss = float(net.way.square().sum()) / net.num_samples
    within = float(counts @ spread) / net.num_samples
    found = 2 * c["wide.collapse.loss"][0], 2 * c["wide.collapse.within"][0], 2 * c["wide.collapse.bias"][0]
    error = largest(
        abs(float(found[1] + found[2]) / loss - 1),
        *(abs(float(part) / value - 1) for part, value in zip(found, (loss, within, weighted), strict=True)),
    )
    return error, abs(float(found[1]) + printed - loss) / loss


@claim
def split_of_loss(c: Context) -> Finding:
    """(3.11), corrected: C = (1/N)Σ|Δx_i|² + Σ(N_j/N)|x̄_j − y_j|²."""
    return Finding("output_collapse, loops", split(c)[0], c.nets["wide"].rounding())


@claim
def printed_split(c: Context) -> Finding:
    """(3.11), as printed: C is not (1/N)Σ|Δx_i|² + Σ|x̄_j − y_j|²."""
    error, off = split(c)
    return Finding("the same", error, c.nets["wide"].rounding(), off=off, amount=1.0)


def per_class(c: Context) -> tuple[Tensor, Tensor, Tensor]:
    """Along the flow: 1 − t, and class averages and deviations."""
    net = c.nets["wide"]
    averages = torch.stack([by_class(x, net.labels)[1] for x in c["wide.flow_t.outputs"]])
    return 1 - c["wide.flow_t.t"], averages, c["wide.flow_t.outputs"] - averages[:, net.labels]


@claim
def averages_converge(c: Context) -> Finding:
    """(3.12): class averages move straight to their targets."""
    net = c.nets["wide"]
    left, averages, _ = per_class(c)
    counts, first, _ = by_class(net.start.view_as(net.y), net.labels)
    seen = counts > 0
    away = (first - torch.eye(CLASSES).double())[seen]
    line = torch.eye(CLASSES).double()[seen] + left[:, None, None] * away
    squares = away.square().sum(1)
    bias = counts[seen] @ squares / (2 * net.num_samples)
    error = largest(
        float((averages[:, seen] - line).flatten(1).norm(dim=1).max() / net.way.norm()),
        float((c["wide.collapse.bias"] - left.square() * bias).abs().max() / bias) / 2,
        float((c["wide.collapse.bias_max"] - left * squares.max().sqrt()).abs().max() / squares.max().sqrt()),
    )
    # A class has less than the whole distance: the worst one √N less at most.
    return Finding("adapted_flow, output_collapse", error, net.integration() * math.sqrt(net.num_samples))


@claim
def deviations_vanish(c: Context) -> Finding:
    """(3.13): deviations within classes shrink straight to zero."""
    net = c.nets["wide"]
    left, _, deviations = per_class(c)
    counts, averages, spread = by_class(net.start.view_as(net.y), net.labels)
    first = net.start.view_as(net.y) - averages[net.labels]
    within = counts @ spread / (2 * net.num_samples)
    most = spread.max().sqrt()
    error = largest(
        float((deviations - left[:, None, None] * first).flatten(1).norm(dim=1).max() / first.norm()),
        float((c["wide.collapse.within"] - left.square() * within).abs().max() / within) / 2,
        float((c["wide.collapse.within_max"] - left * most).abs().max() / most),
    )
    scale = float(net.way.norm() / first.norm())
    return Finding("adapted_flow, output_collapse", error, net.integration() * scale * math.sqrt(net.num_samples))


@claim
def block(c: Context) -> Finding:
    """(3.14): Θ(x_i, x_j) = Df(x_i)Df(x_j)ᵀ, of two samples alone."""
    net, errors = c.nets["wide"], []
    for found, (i, j) in zip(c["wide.blocks"], ((0, 0), (0, 1), (-1, 1)), strict=True):
        first, second = (net.only(k).jacobian for k in (i, j))
        errors.append(apart(found, first @ second.T))
    return Finding("kernel_block, one sample's backward()", largest(*errors), net.rounding())


@claim
def block_matrix(c: Context) -> Finding:
    """(3.15): DDᵀ consists of these blocks."""
    net = c.nets["wide"]
    theta = c["wide.kernel"]
    tiles = theta.view(net.num_samples, CLASSES, net.num_samples, CLASSES)
    blocks = torch.stack([tiles[i, :, j] for i, j in ((0, 0), (0, 1), (-1, 1))])
    error = largest(apart(theta, c["wide.D"] @ c["wide.D"].T), apart(c["wide.blocks"], blocks))
    return Finding("ntk, output_jacobian, kernel_block", error, net.rounding())


@claim
def definite(c: Context) -> Finding:
    """(3.16): Θ is positive-definite on the data where rank D = QN, and not on duplicates."""
    errors = []
    for name, expected in (("wide", True), ("twins", False)):
        net = c.nets[name]
        squares = net.svd[1].square()
        least = float(squares[-1]) if expected else 0.0
        errors += [
            abs(float(c[f"{name}.definite.smallest"]) - least) / net.largest**2,
            abs(float(c[f"{name}.definite.largest"]) / net.largest**2 - 1),
            0.0 if bool(c[f"{name}.definite.bool"]) is expected else 1.0,
            abs(float(c[f"{name}.definite.rank"]) - net.rank),
        ]
    net = c.nets["twins"]
    u = torch.zeros_like(net.y)  # twins moved apart: Σ u_iᵀΘ(x_i, x_j)u_j = 0 though u is not; one alone: |Dᵀu|² > 0
    u[0], u[-(net.num_samples // 6)] = 1.0, -1.0
    alone = torch.zeros_like(net.y)
    alone[0] = 1.0
    forms = [float(one.flatten() @ c["twins.kernel"] @ one.flatten()) for one in (u, alone)]
    size = float((net.jacobian.T @ alone.flatten()).square().sum())
    errors += [abs(forms[0]) / size, abs(forms[1] / size - 1)]
    return Finding("is_positive_definite, ntk, SVD", largest(*errors), c.nets["wide"].rounding())


# Differences along moves of 1e-4 |θ|: err by its square times a third derivative.
EFFECTIVE = 1e-5


@claim
def trivial_kernel(c: Context) -> Finding:
    """(3.17): the adapted flow's kernel is δ_ij 1 at full rank, at any θ."""
    one = torch.eye(c.nets["wide"].num_outputs, dtype=torch.float64)
    errors = (apart(c[f"wide.effective.{at}"], one) for at in ("last", "moved"))
    return Finding("effective_kernel, by differences", largest(*errors), EFFECTIVE)


@claim
def effective_kernels(c: Context) -> Finding:
    """(3.17): between, and with rank loss, it is αP + (1−α)Θ."""
    theta, p = c["twins.D"] @ c["twins.D"].T, c["twins.P"]
    errors = (
        apart(c["twins.effective.first"], theta),
        apart(c["twins.effective.half"], (p + theta) / 2),
        apart(c["twins.effective.last"], p),
    )
    return Finding("effective_kernel, dense D and P", largest(*errors), EFFECTIVE)


@claim
def parameter_line(c: Context) -> Finding:
    """(4.1): the line in parameter space has the same ends, and is not the one in output space."""
    net, t = c.nets["wide"], c["wide.between.t"]
    end = c["wide.flow_t.parameters"][-1]
    outputs = torch.stack([net.outputs((1 - at) * net.theta + at * end) for at in t])
    losses = (outputs - net.y.flatten()).square().sum(1) / (2 * net.num_samples)
    straight = torch.stack([torch.lerp(net.start, net.outputs(end), float(at)) for at in t]) - net.y.flatten()
    first = float(losses[0])
    differ = float((c["wide.between.parameter_line"] - c["wide.between.output_line"]).abs().max()) / first
    error = largest(
        apart(c["wide.between.parameter_outputs"].flatten(1), outputs),
        apart(c["wide.between.parameter_line"], losses),
        apart(c["wide.between.output_line"], straight.square().sum(1) / (2 * net.num_samples)),
    )
    return Finding("line_losses, one place after the other", error, net.rounding(), off=differ, amount=0.01)
