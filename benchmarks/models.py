"""Models as people write them: what a step costs, how its kernel came about, and whether the kernel is right.

A step is the forward pass, `loss.backward()` and `optimizer.step()`, with a mean squared loss, ``damping=1e-3`` and nothing
else set, in units of one forward plus backward pass of a copy that no optimizer watches; both are measured in turn, after one
of each to warm up, and medians are printed. With one thread they are seconds of processor time, which other programs disturb
less. The error is that of `ntk` against DDᵀ by a backward pass for each output, both in
float64 and, since it is a matter of dropout's mask otherwise, in eval mode.

Models of timm and transformers run where these are installed, and not with ``--small``, unless ``--only`` asks for them. The
exit status is 1 where a model failed.
"""

import argparse
import copy
import importlib.util
import json
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from torch_adapted_gd import AdaptedGD, ntk, output_jacobian

from .architectures import MODELS, Model
from .options import parse

CRITERION = nn.MSELoss()
CLOCK = time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def seconds_of(function: Callable[[], object]) -> float:
    """The time of one call."""
    start = CLOCK()
    function()
    return CLOCK() - start


def cost(model: nn.Module, x: tuple[Tensor, ...], repeats: int, patience: float) -> dict[str, Any]:
    """Median seconds of a step and of a plain pass, and what the optimizer reports of its last step."""
    twin = copy.deepcopy(model)
    y = torch.randn_like(twin(*x))
    optimizer = AdaptedGD(model, damping=1e-3)

    def plain() -> None:
        CRITERION(twin(*x), y).backward()

    def step() -> None:
        CRITERION(model(*x), y).backward()
        optimizer.step()

    passes: list[float] = []
    steps: list[float] = []
    twin.zero_grad()
    plain()
    begin = time.perf_counter()
    while len(steps) < repeats + 1 and (not steps or time.perf_counter() - begin < patience):
        twin.zero_grad()
        passes.append(seconds_of(plain))
        optimizer.zero_grad()
        steps.append(seconds_of(step))
    report = optimizer.last_step
    assert report is not None
    # The first one warms up; where nobody has the patience for another, it has to do.
    plain_seconds, step_seconds = statistics.median(passes[1:] or passes), statistics.median(steps[1:] or steps)
    return {
        "outputs": report.num_outputs,
        "parameters": report.num_params,
        "plain_seconds": plain_seconds,
        "step_seconds": step_seconds,
        "ratio": step_seconds / plain_seconds,
        "steps": len(steps),
        "kernel": report.kernel,
        "solver": report.solver,
        "status": report.status,
    }


def error(model: nn.Module, x: tuple[Tensor, ...]) -> float:
    """How far the kernel is from DDᵀ, relative to its norm."""
    double = copy.deepcopy(model).double().eval()
    inputs = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, x)
    d = output_jacobian(double, inputs, method="rows")
    expected = d @ d.T
    theta = ntk(double, inputs).reshape(expected.shape)
    return float((theta - expected).norm() / expected.norm())


def measure(case: Model, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model; ``"failed"`` instead of those that could not be had, and what was warned of."""
    torch.manual_seed(0)
    model = case.build()
    untouched = copy.deepcopy(model)
    most = case.most or options.samples
    figures: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = case.inputs(min(options.samples, most))
        figures["samples"] = len(x[0])
        try:
            figures |= cost(model, x, options.repeats, options.patience)
            figures["error"] = error(untouched, case.inputs(min(options.error_samples, most)))
        except (RuntimeError, ValueError, TypeError, MemoryError) as problem:
            figures["failed"] = f"{type(problem).__name__}: {problem}"
    figures["warnings"] = list(dict.fromkeys(str(warning.message) for warning in caught))
    return figures


def show(name: str, figures: dict[str, Any]) -> None:
    """A row of the table, and what there is to say about it."""
    row = f"{name:32} {figures['samples']:4}"
    if "ratio" in figures:
        row += (
            f" {figures['outputs']:5} {figures['parameters']:9,} {1e3 * figures['plain_seconds']:9.2f} "
            f"{1e3 * figures['step_seconds']:10.1f} {figures['ratio']:8.1f} {max(figures['steps'] - 1, 1):5}  "
        )
        row += f"{figures['error']:8.1e}" if "error" in figures else f"{'-':>8}"
        row += f"  {figures['kernel']}"
    print(row)
    remarks = [*figures["warnings"], *([figures["failed"]] if "failed" in figures else [])]
    for remark in remarks:
        print(f"    {textwrap.shorten(remark, 160)}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--samples", type=int, default=64, help="N; models that take long have fewer (64)")
    add("--error-samples", type=int, default=3, help="N of the comparison of kernels (3)")
    add("--repeats", type=int, default=7, help="steps of each model that are timed (7)")
    add("--patience", type=float, default=60.0, metavar="SECONDS", help="after which no further step is begun (60)")
    add("--only", metavar="TEXT", default="", help="only models whose name contains this")
    add("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parse(parser, samples=2, error_samples=2, repeats=1, patience=0.5)
    chosen = {name: case for name, case in MODELS.items() if options.only in name}
    if not chosen:
        parser.error(f"--only {options.only!r}: no model has that in its name: {', '.join(MODELS)}")
    if options.small and not options.only:
        chosen = {name: case for name, case in chosen.items() if case.needs is None}
    missing = {case.needs for case in chosen.values() if case.needs and importlib.util.find_spec(case.needs) is None}
    for package in sorted(filter(None, missing)):
        print(f"{package} is not installed: its models are left out (pip install {package})")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32; medians of up to {options.repeats} steps")
    print(f"{'model':32}    N    QN         K  plain ms    step ms    ratio steps     error  kernel")
    rows = {}
    for name, case in tqdm(chosen.items(), leave=False, disable=None):
        if case.needs not in missing:
            rows[name] = measure(case, options)
            show(name, rows[name])
    if options.json:
        head = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps(head | {"models": rows}, indent=2) + "\n")
    if any("failed" in figures for figures in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
