"""One exact step by 1, 2 and 3 processes: CPU seconds, memory and what each receives, dense and by conjugate gradients.

    python -m benchmarks.distributed                                  # 2,000 digits by conjugate gradients, 512 dense
    python -m benchmarks.distributed --samples 5000 --processes 1 2   # larger

All processes run on this machine, one thread each. CPU seconds are those of one process, the median over steps, of the slowest.
Memory is the most that a process held, above what it held after a step on a few samples. The last table says what a step keeps
per process for 60,000 samples.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from torch_adapted_gd import AdaptedGD, ConjugateGradients, Dense, HalfSquaredLoss

from .fullbatch import digits, network
from .memory import peak
from .options import parse

PAPER = 60_000  # samples, of 10 outputs each


class Received:
    """Counts the bytes that this process receives by exchanges of the package."""

    def __init__(self) -> None:
        self.bytes = 0.0
        for name in ("all_reduce", "all_gather", "broadcast", "recv"):
            setattr(self, f"_{name}", getattr(dist, name))
            setattr(dist, name, getattr(self, name))

    def all_reduce(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """By a ring: what is summed passes twice, but for the own part."""
        self.bytes += 2 * tensor.nbytes * (dist.get_world_size() - 1) / dist.get_world_size()
        self._all_reduce(tensor, *args, **kwargs)  # type: ignore[attr-defined]

    def all_gather(self, parts: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Those of all others."""
        self.bytes += sum(part.nbytes for part in parts) - tensor.nbytes
        self._all_gather(parts, tensor, *args, **kwargs)  # type: ignore[attr-defined]

    def broadcast(self, tensor: torch.Tensor, source: int, *args: Any, **kwargs: Any) -> None:
        """What another one has."""
        self.bytes += tensor.nbytes * (source != dist.get_rank())
        self._broadcast(tensor, source, *args, **kwargs)  # type: ignore[attr-defined]

    def recv(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """What another one sends."""
        self.bytes += tensor.nbytes
        self._recv(tensor, *args, **kwargs)  # type: ignore[attr-defined]


def work(options: argparse.Namespace) -> None:
    """Steps of one of the processes, by the environment that torchrun sets; writes its figures."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{options.folder}/store", rank=rank, world_size=size)
    received = Received() if size > 1 else None
    if options.small:  # reading the images would take longer than all else
        x, y = torch.rand(options.samples, 784), torch.rand(options.samples, 10)
    else:
        x, y = digits(options.samples, "cpu")
    mine = torch.arange(len(x)).tensor_split(size)[rank]
    x, y = x[mine].clone(), y[mine].clone()
    batches = list(zip(x.split(500), y.split(500), strict=True))
    model = network(options)
    solver = Dense(space="sample") if options.dense else ConjugateGradients(warm_start=False)
    optimizer = AdaptedGD(model, lr=0.0, criterion=HalfSquaredLoss(), damping=options.damping, solver=solver)
    optimizer.full_batch([(x[:4], y[:4])])  # what is imported and connected by a first step is no memory of the next ones
    before, seconds = peak(), []
    for _ in range(options.steps):
        if received is not None:
            received.bytes = 0.0
        started = time.process_time()
        optimizer.full_batch(batches)
        seconds.append(time.process_time() - started)
    report = optimizer.last_step
    assert report is not None
    found = {
        "cpu": statistics.median(seconds),
        "memory": peak() - before,
        "received": 0.0 if received is None else received.bytes / 1e6,
        "iterations": report.iterations,
        "residual": report.residual,
    }
    Path(options.folder, f"{rank}.json").write_text(json.dumps(found))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def measured(options: argparse.Namespace, size: int, samples: int, dense: bool) -> dict[str, float]:
    """The figures of so many processes, of the one that has most of each."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.distributed", "--folder", folder, "--samples", str(samples)]
        command += ["--steps", str(options.steps), "--width", str(options.width), "--damping", str(options.damping)]
        command += ["--dense"] * dense + ["--small"] * options.small
        running = []
        for rank in range(size):
            numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
            environment = {**os.environ, **{name: str(number) for name, number in numbers.items()}, "OMP_NUM_THREADS": "1"}
            running.append(subprocess.Popen(command, env=environment))
        codes = [process.wait() for process in running]
        if any(codes):
            raise RuntimeError("A process failed; its message is above.")
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
    return {key: max(each[key] or 0.0 for each in found) for key in found[0]}


def on_paper(sizes: list[int]) -> None:
    """What a step on 60,000 samples with 10 outputs each keeps, per process."""
    print(f"\n{PAPER:,} samples, Q = 10: GB per process, of the preconditioner's blocks and of one vector of all outputs")
    for size in sizes:
        blocks = -(-10 // size)
        print(f"{size:3} processes  {blocks * 4 * PAPER**2 / 1e9:7.1f}  {8 * 10 * PAPER / 1e9:.3f}")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="N by conjugate gradients; a quarter of it dense (2000)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--width", type=int, default=256, help="of the MLP's two hidden layers (256)")
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--dense", action="store_true", help=argparse.SUPPRESS)
    options = parse(parser, samples=40, processes=[2], width=16, steps=1)
    options.activation, options.device = "tanh", "cpu"
    if options.folder:
        work(options)
        return
    ways = [
        (f"cg, N={options.samples:,}", options.samples, False),
        (f"dense, N={options.samples // 4:,}", options.samples // 4, True),
    ]
    print(f"{'':>16} {'processes':>9} {'CPU s':>7} {'memory MB':>9} {'received MB':>11} {'iterations':>10} {'residual':>9}")
    for name, samples, dense in ways:
        for size in tqdm(options.processes, desc=name, leave=False):
            f = measured(options, size, samples, dense)
            tqdm.write(
                f"{name:>16} {size:9} {f['cpu']:7.2f} {1e3 * f['memory']:9.0f} {f['received']:11.1f} {f['iterations']:10.0f} "
                f"{f['residual']:9.2e}",
                file=sys.stdout,
            )
    on_paper([1, 2, 4, 5, 10])


if __name__ == "__main__":
    main()
