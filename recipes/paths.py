"""The same network led to the same targets along a line and along a detour (3.1), and a start from which neither is feasible.

Where D has full rank, ∂_s θ = D⁺ ∂_s x leads the outputs along any path that begins where they are: the figure shows the
straight line and a bend, both ending at the class targets. Where the rank is short a path may ask for motion outside ran D
(Remark 3.1): of two images that are the same, outputs can only move together. The table says how much of each path's motion was
out of reach, and how far outputs were from path and target, in units of |x₀ − y|.
"""

from collections.abc import Sequence
from pathlib import Path

import race
import torch
from digits import load_digits
from torch import Tensor, nn

from torch_adapted_gd import DetourPath, LinearPath, PathResult, follow_path
from torch_adapted_gd.plotting import plot_output_paths

CLASSES = 10


def build(width: int, seed: int) -> nn.Module:
    """The network, the same each time."""
    torch.manual_seed(seed)
    layers = [nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES)]
    return nn.Sequential(*layers).double()


def describe(name: str, found: PathResult, y: Tensor) -> str:
    """A row of the table."""
    way = float((found.wanted[0] - y).norm())
    return (
        f"{name:34} {int(found.ranks.min()):5d}/{y.numel():<5d} {float(found.off_range.max()):12.2e} "
        f"{float(found.distance.max()) / way:12.2e} {float((found.outputs[-1] - y).norm()) / way:12.2e}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe."""
    parser = race.new_parser(__doc__, "results/paths", "metrics.csv and the figure", "8 images, a narrow network")
    parser.add_argument("--samples", type=race.positive, default=20, help="images (20)")
    parser.add_argument("--width", type=race.positive, default=48, help="of both hidden layers (48)")
    parser.add_argument("--bend", type=race.above_zero, default=0.7, help="how far off the line the detour is half-way (0.7)")
    parser.add_argument("--tolerance", type=race.above_zero, default=1e-7, help="of the integration, relative (1e-7)")
    with race.started(parser, arguments, {"samples": 8, "width": 24, "tolerance": 1e-5}) as options:
        digits = load_digits("mnist5k", Path("data"), options.samples, options.seed)
        x, labels = digits.train_images, digits.train_labels
        y = nn.functional.one_hot(labels, CLASSES).double()
        turned = y.roll(CLASSES // 4, dims=1)  # towards another class, and back
        again = torch.cat([x[: len(x) // 2]] * 2)  # each of the first half twice, with labels of the whole
        jobs = {
            "a line": (x, LinearPath, {}),
            "a detour": (x, DetourPath, {"bend": options.bend * (turned - y)}),
            "a line, images twice": (again, LinearPath, {}),
        }
        print(f"{'path':34} {'rank/QN':>11} {'out of reach':>12} {'off path':>12} {'off target':>12}")
        results: dict[str, PathResult] = {}
        for name, (inputs, kind, extra) in jobs.items():
            model = build(options.width, options.seed)
            targets = y[: len(inputs)]
            with torch.no_grad():
                path = kind(model(inputs), targets, **extra)
            results[name] = follow_path(model, inputs, path, steps=40, rtol=options.tolerance, atol=options.tolerance / 100)
            print(describe(name, results[name], targets), flush=True)
        runs = [
            race.Run.of(name, {"s": found.s, "rank": found.ranks, "off_range": found.off_range, "distance": found.distance})
            for name, found in results.items()
        ]
        figure = plot_output_paths(
            {name: found.outputs for name, found in results.items()}, labels, torch.eye(CLASSES, dtype=torch.float64)
        )
        race.write_all(options.out, runs, {"paths.png": figure})


if __name__ == "__main__":
    main()
