"""What `AdaptedGD.step` costs in units of one forward plus backward pass, and where the time goes.

With one thread on the CPU, times are those of the processor, which other programs disturb less.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from torch_adapted_gd import AdaptedGD, HalfSquaredLoss
from torch_adapted_gd.jacobian.factored import FactoredJacobian
from torch_adapted_gd.jacobian.linearized import Linearized

from .networks import CASES
from .options import parse

# The parts of a step, each by the function that does it; what is left over is the optimizer's own.
PARTS: dict[str, tuple[Any, str]] = {
    "in backward(): two plain backward passes, layouts, check": (Linearized, "__init__"),
    "in backward(): Q backward passes to the uses": (Linearized, "at"),
    "contraction to the kernel, and its check": (FactoredJacobian, "gram"),
    "solve": (None, "torch_adapted_gd.step.system.factorize"),
    "Dᵀψ and Dᵀg": (FactoredJacobian, "rmv"),
}


def now() -> float:
    """Seconds; on a GPU, once it has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


@contextmanager
def stopwatches(spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds that each part takes."""

    def watched(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += now() - start

        return call

    with ExitStack() as stack:
        for part, (owner, name) in PARTS.items():
            if owner is None:
                module, _, name = name.rpartition(".")
                owner = __import__(module, fromlist=[name])
            stack.enter_context(mock.patch.object(owner, name, watched(part, getattr(owner, name))))
        yield


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="steps (60)")
    parser.add_argument("--batch", type=int, default=64, help="N of the MLP (64)")
    parser.add_argument("--model", default="MLP 784-256-256-10", choices=CASES, help="network (MLP 784-256-256-10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--device", default="cpu", help="where (cpu)")
    options = parse(parser, steps=2, batch=16)
    torch.manual_seed(0)
    case = CASES[options.model]
    model, twin = case.build().to(options.device), case.build().to(options.device)
    x = torch.randn(options.batch, *case.shape).to(options.device)
    y = torch.randn(options.batch, 10).to(options.device)
    criterion = HalfSquaredLoss()
    optimizer = AdaptedGD(model, lr=1e-3, criterion=criterion, damping=0.0)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in tqdm(range(options.steps), leave=False, disable=None):
        twin.zero_grad()
        start = now()
        criterion(twin(x), y).backward()
        seconds["forward plus backward pass of the same network"].append(now() - start)
        optimizer.zero_grad()
        spent = dict.fromkeys(PARTS, 0.0)
        with stopwatches(spent):
            start = now()
            loss = criterion(model(x), y)
            after_forward = now()
            loss.backward()
            optimizer.step()
            end = now()
        seconds["forward pass, backward pass and step()"].append(end - start)
        seconds["  forward pass, watched"].append(after_forward - start)
        for part, value in spent.items():
            seconds[f"  {part}"].append(value)
        seconds["  the rest, a plain backward pass among it"].append(end - after_forward - sum(spent.values()))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    unit = medians["forward plus backward pass of the same network"]
    report = optimizer.last_step
    assert report is not None
    print(
        f"{options.model}, N = {options.batch}: QN = {report.num_outputs:,}, K = {report.num_params:,}, float32; "
        f"kernel {report.kernel}, "
        f"solver {report.solver}; {torch.get_num_threads()} threads, {options.device}, medians of {options.steps} steps"
    )
    for name, value in medians.items():
        print(f"{name:60} {1e3 * value:8.2f} ms {value / unit:7.1f} x")
    if options.json:
        options.json.write_text(json.dumps({"unit_seconds": unit, "seconds": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
