"""Physics-informed networks: error against seconds and steps, beside the optimizers that were made for them.

P1, P2: −Δu = f in two dimensions, points fixed; P3, P4: in five, new points in each step; P5: Burgers' equation. All methods
take the same loop from the same weights, with the same points:

- AdaptedGD(model, criterion=criterion), nothing set, `optimizer.step(closure)`;
- ENGD-W (energy natural gradient by Woodbury's identity, with its line search over 31 step lengths) and SPRING (with its
  norm constraint), both of Guzmán-Cordero et al. 2025, written here from the paper on the kernel of this package, so that
  they have the benefit of its speed; their damping is from a small grid, by the median error at the end;
- LBFGS (strong Wolfe) and Adam of torch;
- torch-levenberg-marquardt cannot run these: its model takes derivatives of outputs alone.

Seconds are those of the process's CPU time: with one thread, what the steps take where nobody else is at work, and more than
that with several threads. Evaluations of the error are not timed. Published values are the best of 50 to 100 tuned runs on
a GPU.
"""

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torch_adapted_gd import AdaptedGD, AdaptedWarning, Backtracking, Dense, LevenbergMarquardt
from torch_adapted_gd.step.decision import Outcome, Step
from torch_adapted_gd.step.remembered import State

from .equations import EQUATIONS, Equation
from .options import parse

CRITERION = nn.MSELoss()


@dataclass(frozen=True)
class EngdW(Backtracking):
    """φ = Jᵀ(JJᵀ + λ1)⁻¹r with J = D/√N and λ as it is, and the best of the steps 1, ½, …, 2⁻³⁰."""

    def first_damping(self, state: State) -> float:  # noqa: ARG002
        """So that nobody asks for eigenvalues."""
        return 1.0

    def search(self, step: Step) -> Outcome:
        """The step."""
        linear = step.linear
        direction = step.direction(self.damping / (linear.curvature * linear.system.scale))
        trials = [step.propose(direction, 0.5**halvings) for halvings in range(31)]
        change, number = min((step.look(trial)[0], number) for number, trial in enumerate(trials))
        return Outcome(direction, trials[number] if math.isfinite(change) else None, 31, None)


@dataclass(frozen=True)
class Spring(Backtracking):
    """The same with the last step in it, φ ← Jᵀ(JJᵀ + λ1)⁻¹(r − μJφ) + μφ, and θ ← θ − min(η, √c/|φ|)·φ."""

    lr: float = 0.1
    bound: float = 1e-3

    def first_damping(self, state: State) -> float:  # noqa: ARG002
        """See `EngdW`."""
        return 1.0

    def search(self, step: Step) -> Outcome:
        """The step."""
        linear = step.linear
        direction = step.direction(self.damping / (linear.curvature * linear.system.scale))
        size = math.sqrt(sum(float(part.square().sum()) for part in direction.adapted.values())) / linear.curvature
        fraction = min(self.lr, math.sqrt(self.bound) / size) if size else self.lr
        return Outcome(direction, step.propose(direction, fraction), 1, None)


def by_kernel(policy: Backtracking, momentum: float, model: nn.Module) -> AdaptedGD:
    """A method that solves with the kernel, on the kernel of this package."""
    return AdaptedGD(model, criterion=CRITERION, damping=policy, momentum=momentum, solver=Dense(space="sample"))


def undamped(policy: Backtracking, solver: Dense, model: nn.Module) -> AdaptedGD:
    """The default policy for points that stay and a small D, or with something else in one place."""
    return AdaptedGD(model, criterion=CRITERION, damping=policy, solver=solver)


Build = Callable[[nn.Module], torch.optim.Optimizer]
METHODS: dict[str, list[Build]] = {
    "AdaptedGD": [lambda model: AdaptedGD(model, criterion=CRITERION)],
    "ENGD-W": [partial(by_kernel, EngdW(damping), 0.0) for damping in (1e-10, 1e-8, 1e-12)],
    "SPRING": [
        partial(by_kernel, Spring(damping, lr=lr, bound=bound), momentum)
        for damping, lr, momentum, bound in (
            (6.8e-10, 0.0635, 0.827, 1e-3),  # the best published setting
            (1e-8, 0.1, 0.8, 1e-3),
            (1e-10, 0.1, 0.3, 1.0),  # a bound that hardly matters
            (1e-10, 0.3, 0.3, 1.0),
        )
    ],
    "damped": [lambda model: AdaptedGD(model, criterion=CRITERION, damping=LevenbergMarquardt())],
    "first order": [partial(undamped, Backtracking(smallest=1e-3, second_order=False), Dense(factorization="svd"))],
    "all at once": [partial(undamped, Backtracking(smallest=1e-3), Dense(factorization="svd"))],
    "eigenvalues": [partial(undamped, Backtracking(smallest=1e-3), Dense(factorization="eigh"))],
    "LBFGS": [lambda model: torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")],
    "Adam": [lambda model: torch.optim.Adam(model.parameters(), lr=1e-3)],
}


PEERS = ["AdaptedGD", "ENGD-W", "SPRING", "LBFGS", "Adam"]  # the others are parts of the default policy, replaced


@dataclass
class Run:
    """Errors after so many CPU seconds and steps."""

    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def at(self, seconds: float) -> float:
        """The last error before so many seconds."""
        found = [error for s, error in zip(self.seconds, self.errors, strict=True) if s <= seconds]
        return found[-1] if found else math.nan


def train(equation: Equation, build: Build, seed: int, budget: float, steps: int) -> Run:
    """The loop that everybody has."""
    model = equation.network(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = build(model)
    points, where = equation.points(equation.counts, generator), equation.test_points()
    run = Run([0.0], [equation.error(model, where)], [0])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = equation.loss(model, points, CRITERION)
        loss.backward()
        return loss

    spent, number, shown = 0.0, 0, 0.0
    while spent < budget and number < steps:
        begin = time.process_time()
        if equation.redrawn and number and number % equation.redrawn == 0:
            points = equation.new_points(model, generator)
        try:
            optimizer.step(closure)  # type: ignore[arg-type]
        except RuntimeError:
            break  # a loss that is not finite
        spent += time.process_time() - begin
        number += 1
        if spent > shown + budget / 200 or spent >= budget or number == steps:
            run.seconds.append(spent)
            run.errors.append(equation.error(model, where))
            run.steps.append(number)
            shown = spent
    return run


def best_of(equation: Equation, builds: list[Build], seeds: int, budget: float, steps: int) -> tuple[int, list[Run]]:
    """The setting with the least median error at the end, chosen by the first seed, and its runs."""
    firsts = [train(equation, build, 0, budget, steps) for build in builds]
    ends = [run.errors[-1] if math.isfinite(run.errors[-1]) else math.inf for run in firsts]
    chosen = ends.index(min(ends))
    return chosen, [firsts[chosen], *(train(equation, builds[chosen], seed, budget, steps) for seed in range(1, seeds))]


def plot(found: dict[str, dict[str, list[Run]]], path: str) -> None:
    """Medians against CPU seconds, one panel for each problem, with what is published."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(found), 3.8), layout="constrained", dpi=100)
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for ax, (name, methods) in zip(axes, found.items(), strict=True):
        for method, runs in methods.items():
            longest = max(run.seconds[-1] for run in runs)
            grid = [longest * k / 100 for k in range(101)]
            ax.plot(grid, [statistics.median(run.at(s) for run in runs) for s in grid], label=method)
        for other, error in EQUATIONS[name].published.items():
            ax.axhline(error, color="0.6", linewidth=0.8, linestyle=":")
            ax.text(1.0, error, other, transform=ax.get_yaxis_transform(), fontsize="x-small", ha="right", va="bottom")
        ax.set(yscale="log", xlabel="CPU seconds", title=name)
    axes[0].set_ylabel("relative L2 error, median")
    axes[0].legend(fontsize="small")
    figure.savefig(path)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=EQUATIONS, default=["P1", "P2"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=PEERS)
    parser.add_argument("--steps", type=int, default=10**9, help="the most steps of each run")
    parser.add_argument("--budget", type=float, default=60.0, help="CPU seconds for each run (60)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write all runs there")
    parser.add_argument("--figure", help="draw them there")
    options = parse(parser, seeds=1, problems=["P1"], budget=2.0, steps=2)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", AdaptedWarning)  # of steps at the end, where nothing is left to be gained
    found: dict[str, dict[str, list[Run]]] = {}
    times = [options.budget / 3, options.budget * 2 / 3, options.budget]
    print(f"{options.seeds} seeds, relative L2 error: median (worst) after so many CPU seconds, and steps in all")
    print(f"{'':5} {'method':10} " + " ".join(f"{f'{s:.0f} s':>20}" for s in times) + f" {'steps':>7} setting", flush=True)
    for name in tqdm(options.problems, leave=False, disable=None):
        found[name] = {}
        for method in options.methods:
            chosen, runs = best_of(EQUATIONS[name], METHODS[method], options.seeds, options.budget, options.steps)
            found[name][method] = runs
            cells = []
            for s in times:
                errors = [run.at(s) for run in runs]
                cells.append(f"{statistics.median(errors):.1e} ({max(errors):.1e})")
            count = statistics.median(run.steps[-1] for run in runs)
            print(f"{name:5} {method:10} " + " ".join(f"{c:>20}" for c in cells) + f" {count:7.0f} {chosen + 1}", flush=True)
        published = ", ".join(f"{other} {error:.2g}" for other, error in EQUATIONS[name].published.items())
        print(f"{name:5} published: {published}; {EQUATIONS[name].note}", flush=True)
    if options.figure:
        plot(found, options.figure)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({p: {m: [vars(run) for run in runs] for m, runs in ms.items()} for p, ms in found.items()}, file)


if __name__ == "__main__":
    main()
