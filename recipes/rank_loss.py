"""What rank loss costs: how far, and why, outputs leave the straight line when the Jacobian's rank is short.

Three ways to lose rank, on real digits: images that are there twice with conflicting labels, fewer parameters than outputs
(K < QN), and hidden units that are dead. Along the adapted flow, Proposition 2.5 predicts the deviation from the line from the
projectors P met on the way alone; the recipe integrates both and compares. Where P does not change, the deviation is
t P⊥(x₀ − y), and the loss that remains is |P⊥(x₀ − y)|²/2N.

A fourth way costs nothing: one-hot targets sum to one, so at zero loss the outputs of each image do, too. With more images than
features, either the columns of the last layer's W then sum to zero, or the features lie in a hyperplane. In the first case the
sums of outputs depend on the last layer's parameters alone, and the rank falls by N − (features + 1). The residual of the
sums is zero, too, so no target gets out of reach. The recipe trains such a network and shows the spectrum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import race
import torch
from digits import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from torch_adapted_gd import AdaptedGD, HalfSquaredLoss, InterpolationDeviation, interpolation_deviation, ntk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = 10
LAYERS, STEPS = (32, 10), 16  # of the network that learns one-hot targets


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


def draw(runs: Sequence[race.Run]) -> "Figure":
    """Deviation from the line, in units of |x₀ − y|: observed (lines) and predicted (circles)."""
    figure, ax = race.new_figure()
    circles: dict[str, Any] = {"marker": "o", "markersize": 4, "linestyle": "none", "markerfacecolor": "white"}
    for run in runs:
        (line,) = ax.plot(run.column("t"), run.column("observed"), linewidth=1.6, label=run.name)
        ax.plot(run.column("t"), run.column("predicted"), color=line.get_color(), **circles)
    ax.plot([], [], color="grey", label="predicted", **circles)
    ax.set(xlabel="t", ylabel="|x̃(t) − line| / |x₀ − y|", title="Deviation from the straight line", ylim=(0, None))
    race.tidy(ax)
    return figure


@dataclass
class OneHot:
    """What training on one-hot targets does to the rank.

    Attributes:
        images: N.
        features: Units of the last hidden layer.
        rows: Figures before the first step and after each.
        spectra: Eigenvalues of Θ relative to the largest, at the start and at the end.
    """

    images: int
    features: int
    rows: list[dict[str, float]]
    spectra: tuple[Tensor, Tensor]

    def report(self) -> str:
        """What happened, in lines."""
        first, last = self.rows[0], self.rows[-1]
        short = self.images - self.features - 1
        return "\n".join(
            [
                f"one-hot targets: N = {self.images}, QN = {self.images * CLASSES}, {self.features} features, "
                f"rank {first['rank']} to {last['rank']}",
                f"  loss: {first['loss']:.4f} → {last['loss']:.1e} in {len(self.rows) - 1} steps",
                f"  sums of the last layer's columns, |1ᵀW|/√Q|W|: {first['column sums']:.3f} → {last['column sums']:.1e}; "
                f"if they vanish, the rank falls by {short}",
                f"  σ_min/σ_max of the features with a column of ones: {first['hyperplane']:.1e} → {last['hyperplane']:.1e}; "
                "if it vanishes, the rank stays",
            ]
        )


def one_hot_targets(images: Tensor, labels: Tensor, hidden: int, features: int, steps: int) -> OneHot:
    """Train a network with few features by `AdaptedGD` with its defaults, to zero loss."""
    last = nn.Linear(features, CLASSES)
    body = nn.Sequential(nn.Linear(784, hidden), nn.Tanh(), nn.Linear(hidden, features), nn.Tanh())
    model, y, criterion = nn.Sequential(body, last).double(), one_hot(labels), HalfSquaredLoss()
    optimizer = AdaptedGD(model, criterion=criterion)
    rows, spectra = [], []
    for step in tqdm(range(steps + 1), "one-hot targets", leave=False, disable=None):
        optimizer.zero_grad()
        loss = criterion(model(images), y)
        theta = ntk(model, images).flatten(2).flatten(0, 1)  # [QN, QN]
        values = torch.linalg.eigvalsh(theta).flip(0)
        spectra.append(values / values[0])
        weight = last.weight.detach()
        rank = int((spectra[-1] > len(theta) * torch.finfo(torch.float64).eps).sum())
        sums = float(weight.sum(0).norm() / (CLASSES**0.5 * weight.norm()))
        with torch.no_grad():
            singular = torch.linalg.svdvals(nn.functional.pad(body(images), (0, 1), value=1.0))
        hyperplane = float(singular[-1] / singular[0])
        rows.append({"step": step, "loss": loss.item(), "rank": rank, "column sums": sums, "hyperplane": hyperplane})
        if step < steps:
            loss.backward()
            optimizer.step()
    return OneHot(len(images), features, rows, (spectra[0], spectra[-1]))


def draw_spectra(found: OneHot) -> "Figure":
    """The spectrum of Θ before and after, and where the rank should fall to."""
    figure, ax = race.new_figure()
    for name, values in zip(("at the start", f"after {len(found.rows) - 1} steps"), found.spectra, strict=True):
        ax.plot(range(1, len(values) + 1), values.clamp_min(1e-20), linewidth=1.6, label=name)
    kept = found.images * CLASSES - (found.images - found.features - 1)
    ax.axvline(kept, color="black", linestyle="--", linewidth=1.2, label=f"QN − N + features + 1 = {kept}")
    ax.set(yscale="log", xlabel="index", ylabel="eigenvalue of Θ / the largest", title="One-hot targets")
    race.tidy(ax)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe."""
    parser = race.new_parser(__doc__, "results/rank_loss", "metrics.csv and the figures", "8 images, narrow networks")
    parser.add_argument("--samples", type=race.positive, default=20, help="images (20)")
    parser.add_argument("--width", type=race.positive, default=32, help="of hidden layers (32)")
    parser.add_argument("--tolerance", type=race.above_zero, default=1e-8, help="of the integration, relative (1e-8)")
    with race.started(parser, arguments, {"samples": 8, "width": 8, "tolerance": 1e-6}) as options:
        digits = load_digits("mnist5k", Path("data"), options.samples, options.seed)
        runs = []
        for build in BUILDERS:
            torch.manual_seed(options.seed)
            case = build(digits.train_images, digits.train_labels, options.width)
            found = interpolation_deviation(case.model, case.x, case.y, rtol=options.tolerance, atol=options.tolerance / 100)
            print(report(case, found), flush=True)
            columns = {"t": found.t, "rank": found.ranks, "loss": found.losses, "off_range": found.off_range}
            for name, part in (("observed", found.observed), ("predicted", found.predicted)):
                columns[name] = part.flatten(1).norm(dim=1) / found.distance
            runs.append(race.Run.of(case.name, columns))
        torch.manual_seed(options.seed)
        digits = load_digits("mnist5k", Path("data"), max(80, 4 * options.samples), options.seed)
        learnt = one_hot_targets(digits.train_images, digits.train_labels, *LAYERS, STEPS)
        print(learnt.report())
        race.write_rows(options.out / "one_hot.csv", "method", [race.Run("one-hot targets", learnt.rows)])
        race.write_all(options.out, runs, {"deviation.png": draw(runs), "one_hot.png": draw_spectra(learnt)})


if __name__ == "__main__":
    main()
