"""Claims of section 2.2: the straight line, and the deviation from it where the rank is short."""

import math
from collections.abc import Callable

import torch
from claims import Context, Finding, Net, apart, doubt, largest, registry, slopes
from claims_fields import differences
from claims_objects import T_END, TIMES
from torch import Tensor

CLAIMS, claim = registry()


def velocity(c: Context) -> tuple[Net, Tensor, Tensor]:
    """The network, ∂_s x on the adapted flow, and (x − y)/N there."""
    net = c.nets["wide"]
    return net, c["wide.short.velocity"][2], (net.outputs(c["wide.short.theta"][2]) - net.y.flatten()) / net.num_samples


@claim
def euclidean(c: Context) -> Finding:
    """(2.47): at full rank the adapted flow is Euclidean gradient flow, all along."""
    net, outputs = c.nets["wide"], c["wide.flow_s.outputs"].flatten(1)
    h = float(c["wide.flow_s.s"][-1]) / (len(outputs) - 1)
    found = (outputs[:-4] - 8 * outputs[1:-3] + 8 * outputs[3:-1] - outputs[4:]) / (12 * h)  # ∂_s at the third of each five
    expected = -(outputs[2:-2] - net.y.flatten()) / net.num_samples
    # Differences err by (h/N)⁴/30 for e^(−s/N), and what the tolerance allows is divided by h/N = 0.087.
    bound = (h / net.num_samples) ** 4 / 30 * 1.01 + net.integration() / (h / net.num_samples)
    return Finding("adapted_flow, differences", apart(found, expected), bound)


@claim
def loss(c: Context) -> Finding:
    """(2.48): C = |x − y|²/2N, its gradient (x − y)/N."""
    net = c.nets["wide"]
    value = sum(float(step) ** 2 for step in net.way) / (2 * net.num_samples)
    error = largest(abs(float(c["wide.loss.value"]) / value - 1), apart(c["wide.loss.gradient"], net.g))
    return Finding("HalfSquaredLoss, its autograd", error, net.rounding())


@claim
def decay(c: Context) -> Finding:
    """(2.49), corrected: ∂_s x = −(x − y)/N."""
    _, found, apart_by = velocity(c)
    return Finding("adapted_flow, differences", apart(found, -apart_by), differences(c, "wide"))


@claim
def growth(c: Context) -> Finding:
    """(2.49), as printed: ∂_s x = +(x − y)/N does not hold."""
    _, found, apart_by = velocity(c)
    return Finding("the same", apart(found, -apart_by), differences(c, "wide"), off=apart(found, apart_by), amount=1.9)


@claim
def exponential(c: Context) -> Finding:
    """(2.50): x(s) = y + e^(−s/N)(x₀ − y)."""
    net, s = c.nets["wide"], c["wide.flow_s.s"]
    expected = net.y.flatten() + torch.exp(-s / net.num_samples)[:, None] * net.way
    outputs = c["wide.flow_s.outputs"].flatten(1)
    error = float((outputs - expected).norm(dim=1).max() / net.way.norm())
    return Finding("adapted_flow in s", error, net.integration())


@claim
def line(c: Context) -> Finding:
    """(2.51): the line y + (1−t)(x₀ − y)."""
    net = c.nets["wide"]
    expected = torch.stack([net.y.flatten() + (1 - k / 10) * net.way for k in range(11)])
    return Finding("LinearPath", apart(c["wide.lines"], expected), net.rounding())


@claim
def times(c: Context) -> Finding:
    """(2.52)-(2.53): t = 1 − e^(−s/N) and s = −N ln(1−t)."""
    net, n = c.nets["wide"], c.nets["wide"].num_samples
    t = torch.tensor([1 - math.exp(-float(s) / n) for s in c["wide.flow_s.s"]], dtype=torch.float64)
    s = torch.tensor([-n * math.log(1 - k / 10) for k in range(10)], dtype=torch.float64)
    error = largest(apart(c["wide.flow_s.t"], t), apart(c["wide.flow_t.s"][:10], s))
    return Finding("adapted_flow's s and t", error, net.rounding())


@claim
def reparametrized(c: Context) -> Finding:
    """(2.54): both times lead through the same θ and x."""
    net = c.nets["wide"]  # flow_s ends at t = ½, the sixth record of flow_t
    error = largest(
        float((c["wide.flow_t.outputs"][5] - c["wide.flow_s.outputs"][-1]).norm() / net.way.norm()),
        float((c["wide.flow_t.parameters"][5] - c["wide.flow_s.parameters"][-1]).norm() / net.way.norm()) * net.largest,
    )
    return Finding("adapted_flow in t and in s", error, 2 * net.integration())


@claim
def in_t(c: Context) -> Finding:
    """(2.55): ∂_t x̃ = −(x̃ − y)/(1−t)."""
    net, outputs = c.nets["wide"], c["wide.flow_t.outputs"].flatten(1)
    found = (outputs[2:] - outputs[:-2]) / 0.2  # exact for a straight line
    expected = -(outputs[1:-1] - net.y.flatten()) / (1 - c["wide.flow_t.t"][1:-1, None])
    # Tolerances are divided by the step, 0.1, and by 1 − t ≥ 0.1; relative to nine velocities, of norm 3|x₀ − y|.
    return Finding("adapted_flow in t, differences", apart(found, expected), 10 * net.integration())


@claim
def line_in_t(c: Context) -> Finding:
    """(2.56): so does the line."""
    net, x = c.nets["wide"], c["wide.lines"]
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    found = (x[2:] - x[:-2]) / 0.2
    return Finding(
        "LinearPath, differences", apart(found, -(x[1:-1] - net.y.flatten()) / (1 - t[1:-1, None])), 10 * net.rounding()
    )


@claim
def straight(c: Context) -> Finding:
    """(2.57): the adapted flow is that line, and ends at y: C = (1−t)²C₀."""
    net, t = c.nets["wide"], c["wide.flow_t.t"]
    expected = net.y.flatten() + (1 - t)[:, None] * net.way
    outputs = c["wide.flow_t.outputs"].flatten(1)
    losses, first = c["wide.flow_t.losses"], float(net.way.square().sum()) / (2 * net.num_samples)
    error = largest(
        float((outputs - expected).norm(dim=1).max() / net.way.norm()),
        float((losses - (1 - t).square() * first).abs().max()) / first / 2,  # C is quadratic: twice the distance
        float((c["wide.flow_t.ranks"] - net.num_outputs).abs().max()),
    )
    return Finding("adapted_flow in t, to t = 1", error, net.integration())


@claim
def euler(c: Context) -> Finding:
    """(2.57): Euler's steps in t are AdaptedGD's by the schedule."""
    net, theta, found = c.nets["small"], c.nets["small"].theta, [c.nets["small"].start]
    for k in range(5):
        d = net.at(theta).jacobian
        theta = theta - torch.linalg.pinv(d) @ (found[-1] - net.y.flatten()) / (5 - k)
        found.append(net.outputs(theta))
    error = apart(c["small.steps.5"], torch.stack(found))
    return Finding("LinearInterpolationLR, torch's pinv", error, 5 * net.rounding(2))  # rounding of five steps


@claim
def first_order(c: Context) -> Finding:
    """(2.57): and are of first order: half the step, half the distance from the line."""
    net, distances = c.nets["wide"], []
    for count in (20, 40):
        t = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        line = net.y.flatten() + (1 - t)[:, None] * net.way
        distances.append(float((c[f"wide.steps.{count}"] - line).norm(dim=1).max()))
    # The next term of the expansion in the step is a step's length, 1/20, times a number of order 1.
    return Finding("LinearInterpolationLR, 20 and 40 steps", abs(distances[1] / distances[0] - 0.5), 1 / 20)


# Times of the deviation of ``narrow``.
T = torch.linspace(0, T_END, TIMES + 1, dtype=torch.float64)


def on_the_way(c: Context, values: Callable[[Context], Tensor]) -> tuple[Tensor, float]:
    """∂_t of values along the flow of ``narrow`` ``[T - 8, n]``, and how much it may err by.

    Args:
        c: The objects.
        values: Of these, ``[T, n]``.
    """
    h, net = T_END / TIMES, c.nets["narrow"]
    return slopes(values(c), h), doubt(values(c.pristine), h) + net.integration() / h


def place(c: Context) -> Tensor:
    """x̃ along that flow ``[T, QN]``."""
    net = c.nets["narrow"]
    return net.y.flatten() + (1 - T)[:, None] * net.way + c["narrow.deviation.observed"].flatten(1)


@claim
def constrained(c: Context) -> Finding:
    """(2.58): with rank loss ∂_t x̃ = −P_t(x̃ − y)/(1−t)."""
    net = c.nets["narrow"]
    found, bound = on_the_way(c, place)
    reach = torch.einsum("tij,tj->ti", c["narrow.projectors"], place(c) - net.y.flatten())
    expected = (-reach / (1 - T)[:, None])[4:-4]
    return Finding("interpolation_deviation, dense P_t", apart(found, expected), bound)


@claim
def constant_projector(c: Context) -> Finding:
    """(2.59): for constant P the deviation from the line is tP⊥(x₀ − y)."""
    net, t = c.nets["twins"], c["twins.deviation.t"]
    expected = t[:, None] * (net.way - c["twins.P"] @ net.way)
    errors = (
        float((c[f"twins.deviation.{part}"].flatten(1) - expected).norm(dim=1).max() / net.way.norm())
        for part in ("predicted", "observed")
    )
    return Finding("interpolation_deviation, P of the SVD", largest(*errors), net.integration())


@claim
def predicted(c: Context) -> Finding:
    """(2.59), corrected: x̃ − [(1−t)x₀ + ty] is what is predicted from P_t alone."""
    net = c.nets["narrow"]
    found, expected = c["narrow.deviation.observed"].flatten(1), c["narrow.deviation.predicted"].flatten(1)
    error = float((found - expected).norm(dim=1).max() / net.way.norm())
    return Finding("interpolation_deviation", error, net.integration())


def off_printed_line(c: Context) -> float:
    """Largest distance, relative to |x₀ − y|, of what is predicted from x̃ − [(1−t)x₀ − ty]."""
    net, t = c.nets["narrow"], T[:, None]
    printed = place(c) - ((1 - t) * net.start - t * net.y.flatten())
    return float((printed - c["narrow.deviation.predicted"].flatten(1)).norm(dim=1).max() / net.way.norm())


@claim
def printed_line(c: Context) -> Finding:
    """(2.59), as printed: x̃ − [(1−t)x₀ − ty] is not."""
    holds = predicted.find(c)
    return Finding("the same", holds.error, holds.bound, off=off_printed_line(c), amount=0.5)


def propagated(p: Tensor, complement: Tensor, h: float, way: Tensor) -> Tensor:
    """The integral of (2.59) at the last time, with the propagator of ∂_t U = (1/(1−t)) A_t U, by Runge–Kutta and Simpson.

    Args:
        p: A at equal times, ``[2m + 1, n, n]``; every other one is the middle of a step.
        complement: P⊥ at these times.
        h: Between them.
        way: x₀ − y ``[n]``.
    """
    u = torch.eye(len(way)).to(way)
    states = [u]  # U_{t,0} at every other time

    def rate(k: int, state: Tensor) -> Tensor:
        return p[k] @ state / (1 - k * h)

    for k in range(0, len(p) - 2, 2):
        first = rate(k, u)
        second = rate(k + 1, u + h * first)
        third = rate(k + 1, u + h * second)
        u = u + h / 3 * (first + 2 * second + 2 * third + rate(k + 2, u + 2 * h * third))
        states.append(u)
    count = len(states)
    weights = [1 if k in (0, count - 1) else 4 if k % 2 else 2 for k in range(count)]
    total = torch.zeros_like(way)
    end = (count - 1) * 2 * h
    for k, (weight, state) in enumerate(zip(weights, states, strict=True)):
        back = torch.linalg.solve(state, complement[2 * k] @ way)  # U_{t,t'} = U_{t,0} U_{t',0}⁻¹
        total += weight * (1 - end) / (1 - 2 * k * h) * back
    return u @ total * (2 * h / 3)


def propagators(c: Context) -> tuple[float, float, float]:
    """Of the integral of (2.59) with P⊥ in (2.60): error and bound; and the error with P, as printed; all at the last time."""
    net, p = c.nets["narrow"], c["narrow.projectors"]
    one = torch.eye(net.num_outputs).to(p)
    h = T_END / TIMES
    observed = c["narrow.deviation.observed"][-1].flatten()
    right, wrong = (propagated(a, one - p, h, net.way) for a in (one - p, p))
    perp = one - c.pristine["narrow.projectors"]
    fine, coarse = (propagated(perp[::stride], perp[::stride], stride * h, net.way) for stride in (1, 2))
    size = net.way.norm()
    # Both rules are of fourth order: those of double steps err by 16 times as much.
    return apart(right, observed, size), apart(coarse, fine, size) + net.integration(), apart(wrong, observed, size)


@claim
def propagator(c: Context) -> Finding:
    """(2.60), corrected: U of ∂_tU = (1/(1−t))P⊥_tU gives the deviation by the integral of (2.59)."""
    error, bound, _ = propagators(c)
    return Finding("interpolation_deviation, dense P_t, quadrature", error, bound)


@claim
def printed_propagator(c: Context) -> Finding:
    """(2.60), as printed: U of ∂_tU = (1/(1−t))P_tU does not."""
    error, bound, off = propagators(c)
    return Finding("the same", error, bound, off=off, amount=0.05)


def remaining(c: Context) -> Tensor:
    """R = S/(1−t) along that flow ``[T, QN]``, S the deviation that was predicted."""
    return c["narrow.deviation.predicted"].flatten(1) / (1 - T)[:, None]


@claim
def remainder(c: Context) -> Finding:
    """(2.61)-(2.64): (1−t)R' = P⊥_t(R + x₀ − y) for the deviation (1−t)R."""
    whole = remaining(c) + c.nets["narrow"].way
    found, bound = on_the_way(c, remaining)
    beyond = whole - torch.einsum("tij,tj->ti", c["narrow.projectors"], whole)
    return Finding("interpolation_deviation, dense P_t", apart(found, (beyond / (1 - T)[:, None])[4:-4]), bound)


@claim
def records(c: Context) -> Finding:
    """(2.58)-(2.59): the times, what is out of reach on the way, |P⊥_t(x₀ − y)|, the rank and the loss."""
    net, p = c.nets["narrow"], c["narrow.projectors"]
    off_range = (net.way - p @ net.way).norm(dim=1) / net.way.norm()
    losses = (place(c) - net.y.flatten()).square().sum(1) / (2 * net.num_samples)
    ranks = p.diagonal(dim1=1, dim2=2).sum(1)
    error = largest(
        apart(c["narrow.deviation.t"], T),
        apart(c["narrow.deviation.off_range"], off_range),
        apart(c["narrow.deviation.ranks"].double(), ranks),
        apart(c["narrow.deviation.losses"], losses),
    )
    return Finding("interpolation_deviation, dense P_t", error, net.integration())
