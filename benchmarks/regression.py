"""sinc by 61 parameters, the job of torch-levenberg-marquardt's README: how long to its own final loss?

y = sinc(10x) at 20,000 points of [−1, 1], batches of 1,000 in a new order each epoch, network 1-20-1 tanh in float32, mean
squared error. torch-levenberg-marquardt 1.2 takes its 50 epochs as in its example (learning rate 1, 10 attempts, "solve");
`AdaptedGD(model, criterion=criterion)`, with nothing else set, takes 50 epochs of the same batches from the same weights;
Adam (1e-2, in those batches) and LBFGS (strong Wolfe, all points) run for as long as torch-levenberg-marquardt did. Losses are
over all points; evaluations, four times an epoch, are not timed.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torch_adapted_gd import AdaptedGD

from .networks import mlp
from .options import parse

BATCH = 1000
X = torch.linspace(-1, 1, 20_000)[:, None]
Y = torch.sinc(10 * X)
CRITERION = nn.MSELoss()
Step = Callable[[Tensor, Tensor], object]


@dataclass
class Run:
    """Losses over all points after so many seconds."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def reached(self, goal: float) -> float:
        """Seconds to a loss; infinite if it was not reached."""
        return next((second for second, loss in zip(self.seconds, self.losses, strict=True) if loss <= goal), math.inf)


def network(seed: int) -> nn.Module:
    """The starting network of a seed."""
    torch.manual_seed(seed)
    return mlp(1, 20, 1)


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for ever, the same for all methods."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for part in torch.randperm(len(X), generator=generator).split(BATCH):
            yield X[part], Y[part]


def levenberg_marquardt(model: nn.Module) -> Step:
    """The peer's step."""
    import torch_levenberg_marquardt as peer

    module = peer.training.LevenbergMarquardtModule(
        model, peer.loss.MSELoss(), learning_rate=1.0, attempts_per_step=10, solve_method="solve"
    )
    return lambda x, y: module.training_step(x, y)


def adapted(model: nn.Module) -> Step:
    """Ours, with its defaults."""
    return by_gradients(model, AdaptedGD(model, criterion=CRITERION))


def adam(model: nn.Module) -> Step:
    """Adam at the learning rate of the peer's README."""
    return by_gradients(model, torch.optim.Adam(model.parameters(), lr=1e-2))


def lbfgs(model: nn.Module) -> Step:
    """LBFGS on all points at once."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = CRITERION(model(X), Y)
        loss.backward()
        return loss

    return lambda _x, _y: optimizer.step(closure)  # type: ignore[no-untyped-call, unused-ignore]


def by_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """The usual loop."""

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        CRITERION(model(x), y).backward()
        optimizer.step()  # type: ignore[call-arg, unused-ignore]

    return step


def train(method: Callable[[nn.Module], Step], seed: int, steps: int | None, seconds: float = math.inf) -> Run:
    """Train until one of the limits."""
    model = network(seed)
    step = method(model)
    run, spent = Run(), 0.0
    for number, (x, y) in enumerate(tqdm(itertools.islice(batches(seed), steps), total=steps, leave=False, disable=None), 1):
        begin = time.perf_counter()
        step(x, y)
        spent += time.perf_counter() - begin
        if number % 5 == 0 or spent >= seconds:
            run.seconds.append(spent)
            with torch.no_grad():
                run.losses.append(float(CRITERION(model(X), Y)))
        if spent >= seconds:
            break
    return run


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=50, help="of torch-levenberg-marquardt and AdaptedGD (50)")
    parser.add_argument("--json", help="write all runs there")
    options = parse(parser, epochs=1, seeds=1)
    steps = options.epochs * len(X) // BATCH
    runs: dict[str, list[Run]] = {name: [] for name in ("torch-levenberg-marquardt", "AdaptedGD", "Adam", "LBFGS")}
    for seed in range(options.seeds):  # side by side, so that a busy machine is busy for all
        runs["torch-levenberg-marquardt"].append(train(levenberg_marquardt, seed, steps))
        runs["AdaptedGD"].append(train(adapted, seed, steps))
        budget = runs["torch-levenberg-marquardt"][-1].seconds[-1]
        runs["Adam"].append(train(adam, seed, None, budget))
        runs["LBFGS"].append(train(lbfgs, seed, None, budget))
    goal = statistics.median(run.losses[-1] for run in runs["torch-levenberg-marquardt"])
    print(f"{options.seeds} seeds, medians; the goal is torch-levenberg-marquardt's last loss, {goal:.2e}")
    print(f"{'method':26} {'seconds':>8} {'last loss':>10} {'(range)':>20} {'to the goal, s':>15} {'of its time':>12}")
    whole = statistics.median(run.seconds[-1] for run in runs["torch-levenberg-marquardt"])
    for name, of_method in runs.items():
        last = sorted(run.losses[-1] for run in of_method)
        reached = statistics.median(run.reached(goal) for run in of_method)
        seconds = statistics.median(run.seconds[-1] for run in of_method)
        print(
            f"{name:26} {seconds:8.2f} {statistics.median(last):10.2e} {f'{last[0]:.1e} - {last[-1]:.1e}':>20} "
            f"{reached:15.2f} {reached / whole:12.2f}"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({name: [vars(run) for run in of_method] for name, of_method in runs.items()}, file)


if __name__ == "__main__":
    main()
