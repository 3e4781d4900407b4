"""What rank loss costs: how far, and why, outputs leave the straight line when the Jacobian's rank is short.

Three ways to lose rank, on real digits: images that are there twice with conflicting labels, fewer parameters than outputs
(K < QN), and hidden units that are dead. Along the adapted flow, Proposition 2.5 predicts the deviation from the line from the
projectors P met on the way alone; the recipe integrates both and compares. Where P does not change, the deviation is
t P⊥(x₀ − y), and the loss that remains is |P⊥(x₀ − y)|²/2N.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import race
import torch
from digits import load_digits
from torch import Tensor, nn

from torch_adapted_gd import InterpolationDeviation, interpolation_deviation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = 10


@dataclass
class Case:
    """A network that cannot reach its targets.

    Attributes:
        name: Why.
        model: The network, float64.
        x: Its input.
        y: Targets, ``[N, 10]``.
        constant: Whether P is the same all along.
    """

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    constant: bool


def duplicated(images: Tensor, labels: Tensor, width: int) -> Case:
    """A quarter of the images are there twice, the second time with the next label: only their average can be learnt."""
    twice = max(1, len(images) // 4)
    x = torch.cat([images, images[:twice]])
    y = nn.functional.one_hot(torch.cat([labels, (labels[:twice] + 1) % CLASSES]), CLASSES).double()
    model = nn.Sequential(nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES))
    return Case("images twice, labels in conflict", model.double(), x, y, constant=True)


def few_parameters(images: Tensor, labels: Tensor, width: int) -> Case:
    """K < QN: images of 7×7 and a layer of one or two units."""
    del width
    small = nn.functional.avg_pool2d(images.reshape(-1, 1, 28, 28), 4).flatten(1)  # [N, 49]
    hidden = 2 if len(images) >= 20 else 1
    model = nn.Sequential(nn.Linear(49, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))
    return Case("fewer parameters than outputs", model.double(), small, one_hot(labels), constant=False)


def dead_units(images: Tensor, labels: Tensor, width: int) -> Case:
    """ReLU units whose bias keeps them at 0 on every image; one in eight is alive, and on: at a kink P would jump."""
    model = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, CLASSES)).double()
    first = model[0]
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        first.bias.fill_(5.0)
        first.bias[: width - max(1, width // 8)] = -100.0
    return Case("dead ReLU units", model, images, one_hot(labels), constant=False)


def one_hot(labels: Tensor) -> Tensor:
    """Targets e_j, ``[N, 10]``."""
    return nn.functional.one_hot(labels, CLASSES).double()


BUILDERS: tuple[Callable[[Tensor, Tensor, int], Case], ...] = (duplicated, few_parameters, dead_units)


def report(case: Case, found: InterpolationDeviation) -> str:
    """What happened, in lines."""
    n, way = len(case.x), found.distance
    k = sum(p.numel() for p in case.model.parameters())
    seen, foretold = (float(part[-1].norm()) / way for part in (found.observed, found.predicted))
    low, high = int(found.ranks.min()), int(found.ranks.max())
    first, *_, last = found.off_range.tolist()
    lines = [
        f"{case.name}: N = {n}, QN = {case.y.numel()}, K = {k:,}, rank {low}" + (f" to {high}" if high > low else ""),
        f"  out of reach, |P⊥(x₀−y)|/|x₀−y|: {first:.4f} at t = 0, {last:.4f} at the end",
        f"  off the line at t = {float(found.t[-1]):.2f}, in |x₀−y|: observed {seen:.6f}, predicted {foretold:.6f}; "
        f"on the way both differ by at most {found.error:.1e}",
        f"  loss: {float(found.losses[0]):.4f} → {float(found.losses[-1]):.4f}",
    ]
    if case.constant:
        rest = (first * way) ** 2 / (2 * n)
        more = (1 - float(found.t[-1])) ** 2 * (float(found.losses[0]) - rest)
        lines.append(f"  P is constant: of it |P⊥(x₀−y)|²/2N = {rest:.4f} stay for ever, and {more:.4f} are on their way out")
    return "\n".join(lines)


def draw(cases: Sequence[Case], results: Sequence[InterpolationDeviation]) -> "Figure":
    """Deviation from the line, in units of |x₀ − y|: observed (lines) and predicted (circles)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained", dpi=150)
    ax = figure.subplots()
    circles: dict[str, Any] = {"marker": "o", "markersize": 4, "linestyle": "none", "markerfacecolor": "white"}
    for case, found in zip(cases, results, strict=True):
        observed, predicted = (part.flatten(1).norm(dim=1) / found.distance for part in (found.observed, found.predicted))
        (line,) = ax.plot(found.t, observed, linewidth=1.6, label=case.name)
        ax.plot(found.t, predicted, color=line.get_color(), **circles)
    ax.plot([], [], color="grey", label="predicted", **circles)
    ax.set(xlabel="t", ylabel="|x̃(t) − line| / |x₀ − y|", title="Deviation from the straight line", ylim=(0, None))
    race.tidy(ax)
    return figure


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = race.new_parser(__doc__, "results/rank_loss", "metrics.csv and the figure", "8 images, narrow networks")
    parser.add_argument("--samples", type=race.positive, default=20, help="images (20)")
    parser.add_argument("--width", type=race.positive, default=32, help="of hidden layers (32)")
    parser.add_argument("--tolerance", type=race.above_zero, default=1e-8, help="of the integration, relative (1e-8)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit status."""
    parser = build_parser()
    options = race.parse(parser, arguments, {"samples": 8, "width": 8, "tolerance": 1e-6})
    with race.errors_in_one_line(parser):
        race.make_folder(options.out)
        digits = load_digits("mnist5k", Path("data"), options.samples, options.seed)
        cases, results, runs = [], [], []
        for build in BUILDERS:
            torch.manual_seed(options.seed)
            case = build(digits.train_images, digits.train_labels, options.width)
            found = interpolation_deviation(case.model, case.x, case.y, rtol=options.tolerance, atol=options.tolerance / 100)
            print(report(case, found), flush=True)
            columns = {"t": found.t, "rank": found.ranks, "loss": found.losses, "off_range": found.off_range}
            for name, part in (("observed", found.observed), ("predicted", found.predicted)):
                columns[name] = part.flatten(1).norm(dim=1) / found.distance
            cases.append(case)
            results.append(found)
            runs.append(race.Run(case.name, race.rows_of(columns)))
        files = race.write_all(options.out, runs, {"deviation.png": draw(cases, results)})
    print(f"wrote {', '.join(map(str, files))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
