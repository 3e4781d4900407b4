"""The kernel against its peers: time and peak memory of one build of Θ, and the ratios.

Each method runs in a process of its own, the fast ones twice, before and after the others; printed are the median times and
the memory that the process needed beyond the network and one forward and backward pass. With one thread, times are those of
the processor, which other programs disturb less. TorchJD runs where it is installed,
neural-tangents where ``--jax-python`` names an interpreter that has it (an environment of its own: it needs old versions).
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from tqdm import tqdm

from torch_adapted_gd import ntk

from .networks import CASES, Case
from .options import parse

CLOCK = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
OURS, OURS_32 = "torch_adapted_gd", "torch_adapted_gd, float32 products"
JAX = {
    "STRUCTURED_DERIVATIVES": "neural-tangents, structured derivatives",
    "NTK_VECTOR_PRODUCTS": "neural-tangents, NTK-vector products",
    "JACOBIAN_CONTRACTION": "neural-tangents, Jacobian contraction",
}


def by_vmap(model: nn.Module, x: Tensor) -> Tensor:
    """D by ``vmap(jacrev)``, then DDᵀ, all in the model's dtype."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    one = jacrev(lambda p, sample: functional_call(model, p, (sample.unsqueeze(0),)).squeeze(0))
    blocks = vmap(one, (None, 0))(parameters, x)
    jacobian = torch.cat([block.flatten(2) for block in blocks.values()], 2).flatten(0, 1)
    return jacobian @ jacobian.T


def by_torchjd(model: nn.Module, x: Tensor) -> Tensor:
    """TorchJD's Gramian engine."""
    from torchjd.autogram import Engine

    gramian: Tensor = Engine(model, batch_dim=0).compute_gramian(model(x))
    return gramian


METHODS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    OURS: lambda model, x: ntk(model, x, method="structured"),
    OURS_32: lambda model, x: ntk(model, x, method="structured", dtype=torch.float32),
    "vmap(jacrev), then DDᵀ": by_vmap,
    "TorchJD autogram": by_torchjd,
}


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def case_of(case_name: str, options: argparse.Namespace) -> Case:
    """A network of the table, with the N that the user wants."""
    case = CASES[case_name]
    return case if options.batch is None else replace(case, batch=options.batch)


def measure(case: Case, method: str, device_name: str, repeats: int, patience: float) -> dict[str, float]:
    """Median seconds and peak memory of one method, in this process."""
    device = torch.device(device_name)
    torch.manual_seed(0)
    model, x = case.build().to(device), case.batch_of_inputs().to(device)

    def finish() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return CLOCK()

    model(x).sum().backward()
    model.zero_grad()
    finish()
    before = peak_bytes(device)
    seconds: list[float] = []
    begin = finish()
    while len(seconds) < repeats + 1 and (len(seconds) < 2 or time.perf_counter() - begin < patience):
        start = finish()
        METHODS[method](model, x)
        seconds.append(finish() - start)
        if seconds[-1] > patience:
            break
    # The first one warms caches and thread pools up; where each takes seconds, that is nothing.
    return {"seconds": statistics.median(seconds[1:] or seconds), "bytes": peak_bytes(device) - before}


def in_own_process(command: list[str]) -> dict[str, float]:
    """What a measuring process prints last."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        warnings.warn(f"{' '.join(command[-2:])} failed: {last[:200]}", stacklevel=2)
        return {"seconds": float("nan"), "bytes": float("nan")}
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def jobs_of(case_name: str, options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """The methods to run on a case, with their commands."""
    limits = ["--repeats", str(options.repeats), "--patience", str(options.patience), "--device", options.device]
    if options.batch is not None:
        limits += ["--batch", str(options.batch)]
    own = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernel", *limits, "--one"]
    jobs = [(method, [*own, case_name, method]) for method in METHODS if "TorchJD" not in method or _has("torchjd")]
    case = case_of(case_name, options)
    if options.small:
        return jobs
    if options.jax_python and case.layers is not None:
        script = str(Path(__file__).with_name("jax_kernel.py"))
        for implementation, method in JAX.items():
            job = {"shape": case.shape, "batch": case.batch, "layers": case.layers, "implementation": implementation}
            job |= {"repeats": options.repeats, "patience": options.patience}
            jobs.append((method, [options.jax_python, "-W", "ignore", script, json.dumps(job)]))
    fast = [job for job in jobs if job[0] in (OURS, OURS_32, JAX["STRUCTURED_DERIVATIVES"])]
    return jobs + fast  # the machine may be slower at the end than at the start


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def compare(case_name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All methods on one case, with the ratios of their times to ours."""
    runs: dict[str, list[dict[str, float]]] = {}
    for method, command in tqdm(jobs_of(case_name, options), desc=case_name, leave=False, disable=None):
        runs.setdefault(method, []).append(in_own_process(command))
    seconds = {method: statistics.median(run["seconds"] for run in results) for method, results in runs.items()}
    return [
        {
            "model": case_name,
            "batch": case_of(case_name, options).batch,
            "method": method,
            "seconds": seconds[method],
            "gigabytes": max(run["bytes"] for run in results) / 1e9,
            "times_ours": seconds[method] / seconds[OURS],
        }
        for method, results in runs.items()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jax-python", metavar="PATH", help="an interpreter that has neural-tangents")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--only", metavar="TEXT", default="", help="only models whose name contains this")
    parser.add_argument("--device", default="cpu", help="of our own and torch's methods (cpu)")
    parser.add_argument("--batch", type=int, help="N, instead of that of each model")
    parser.add_argument("--repeats", type=int, default=9, help="kernels built for each figure (9)")
    parser.add_argument("--patience", type=float, default=10.0, help="seconds after which no further one is begun (10)")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    options = parse(parser, batch=8, repeats=1)
    if options.one:
        case_name, method = options.one
        print(json.dumps(measure(case_of(case_name, options), method, options.device, options.repeats, options.patience)))
        return
    chosen = [name for name in CASES if options.only in name]
    if not chosen:
        parser.error(f"--only {options.only!r}: no model has that in its name: {', '.join(CASES)}")
    if options.small:
        chosen = chosen[:1]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}, float32 networks; medians")
    rows = []
    for name in chosen:
        case = case_of(name, options)
        model = case.build()
        numel = sum(p.numel() for p in model.parameters())
        gigabytes = 40 * case.batch * numel / 1e9
        print(f"\n{name}: N = {case.batch}, QN = {10 * case.batch:,}, K = {numel:,}; D takes {gigabytes:.3g} GB")
        print(f"{'method':42} {'seconds':>9} {'peak GB':>8} {'times ours':>11}")
        for row in compare(name, options):
            rows.append(row)
            print(f"{row['method']:42} {row['seconds']:9.4f} {row['gigabytes']:8.3f} {row['times_ours']:11.2f}", flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"torch": torch.__version__, "device": options.device, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
