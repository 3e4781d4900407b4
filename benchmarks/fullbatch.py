"""One exact step over a whole training set: time, memory, iterations, against the dense way and other preconditioners.

    python -m benchmarks.fullbatch                                  # one step on 5,000 digits, at the start and after 5 steps
    python -m benchmarks.fullbatch --compare preconditioners --samples 500
    python -m benchmarks.fullbatch --compare sizes
    python -m benchmarks.fullbatch --compare dense --samples 1000

Each figure for memory is that of a process of its own: the most that it held, libraries and data included.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torch_adapted_gd import AdaptedGD, ConjugateGradients, Dense, HalfSquaredLoss, StraightLine
from torch_adapted_gd.jacobian import Jacobian, tangent_jacobian
from torch_adapted_gd.jacobian.definition import recorded
from torch_adapted_gd.solve.krylov import Iterate, solve_by_cg
from torch_adapted_gd.solve.preconditioner import OutputBlockInverse, Preconditioner, SampleBlockInverse
from torch_adapted_gd.step.iterative import KernelOperator

from .classify import data
from .memory import peak
from .networks import mlp
from .options import parse

Inverse = Callable[[Tensor], Tensor]
SIZES, SMALL = (500, 1000, 2000, 5000), (50, 100)
PARTS = ("factors", "preconditioner", "iterations")


def digits(samples: int, device: str) -> tuple[Tensor, Tensor]:
    """Images and one-hot targets; more than 5,000 are those again, shifted by up to two pixels."""
    images, labels = data()
    generator = torch.Generator().manual_seed(0)
    chosen = torch.arange(samples) % len(images)
    x = images[chosen].view(-1, 28, 28)
    for i in range(len(images), samples):
        x[i] = x[i].roll(torch.randint(-2, 3, (2,), generator=generator).tolist(), (0, 1))
    y = nn.functional.one_hot(labels[chosen], 10).float()
    return x.flatten(1).to(device), y.to(device)


def network(options: argparse.Namespace) -> nn.Module:
    """The MLP at its start."""
    torch.manual_seed(0)
    model = mlp(784, options.width, options.width, 10)
    if options.activation == "relu":
        model = nn.Sequential(*(nn.ReLU() if isinstance(m, nn.Tanh) else m for m in model))
    return model.to(options.device)


def train(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace, *, steps: int = 60, until: float = 0.0) -> None:
    """Straight steps at damping 1e-5."""
    policy = StraightLine(damping=1e-5)
    optimizer = AdaptedGD(model, criterion=HalfSquaredLoss(), damping=policy, solver=ConjugateGradients())
    batches = list(zip(x.split(options.batch), y.split(options.batch), strict=True))
    for _ in range(steps):
        if optimizer.full_batch(batches) <= until:
            return


def one_step(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one step, in this process."""
    x, y = digits(options.samples, options.device)
    model = network(options)
    train(model, x, y, options, steps=options.after)
    solver = Dense(rtol=1e-7) if options.dense else ConjugateGradients(options.tolerance, warm_start=False)
    optimizer = AdaptedGD(model, lr=0.0, criterion=HalfSquaredLoss(), solver=solver, damping=options.damping)
    batches = list(zip(x.split(options.batch), y.split(options.batch), strict=True))
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    loss = optimizer.full_batch(batches)
    if x.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    report = optimizer.last_step
    assert report is not None
    return {
        "loss": loss,
        "seconds": seconds,
        "peak": torch.cuda.max_memory_allocated() / 1e9 if x.is_cuda else peak(),
        "iterations": report.iterations,
        "residual": math.nan if report.residual is None else report.residual,
        "solver": report.solver,
        "status": report.status,
        "num_params": report.num_params,
        **{f"{part}_s": report.seconds.get(part, math.nan) for part in PARTS},
    }


def in_process(options: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """The same in a process of its own."""
    given = {**vars(options), **changes, "compare": "none", "small": False}
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in given.items() if not isinstance(value, bool)]
    arguments += [f"--{key}" for key, value in given.items() if value is True]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fullbatch", *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def show(name: str, figures: dict[str, Any]) -> None:
    """One row."""
    parts = " ".join(f"{figures[f'{part}_s']:8.1f}" for part in PARTS)
    print(
        f"{name:28} {figures['loss']:9.2e} {figures['seconds']:8.1f} {parts} {figures['iterations']:6d} "
        f"{figures['residual']:9.1e} {figures['peak']:7.2f}  {figures['solver']}, {figures['status']}",
        flush=True,
    )


HEADER = (
    f"{'':28} {'loss':>9} {'seconds':>8} {'factors':>8} {'precond':>8} {'iterate':>8} {'iter.':>6} {'residual':>9} "
    f"{'peak GB':>7}"
)


def compare_sizes(options: argparse.Namespace) -> None:
    """Time and memory against N, with exponents fitted to the two largest sizes and all."""
    rows, sizes = {}, SMALL if options.small else SIZES
    for samples in sizes:
        rows[samples] = in_process(options, samples=samples)
        show(f"N = {samples}", rows[samples])
    n = torch.tensor(sizes, dtype=torch.float64).log()
    for what in ("seconds", *(f"{part}_s" for part in PARTS), "peak"):
        values = torch.tensor([rows[samples][what] for samples in sizes], dtype=torch.float64)
        if what == "peak":
            values = values - in_process(options, samples=10)["peak"]
        logs = values.clamp(min=1e-3).log()
        slope = float(((n - n.mean()) * (logs - logs.mean())).sum() / (n - n.mean()).square().sum())
        last = float((logs[-1] - logs[-2]) / (n[-1] - n[-2]))
        at = float(values[-1]) * (60000 / sizes[-1]) ** last
        unit = "GB beyond N = 10" if what == "peak" else "s"
        print(f"{what}: N^{slope:.2f} over all, N^{last:.2f} at the end; {at:,.0f} {unit} at N = 60,000 if that goes on")


def compare_preconditioners(options: argparse.Namespace) -> None:
    """Residual after 20 and 40 iterations, and iterations to the tolerance, in three states of the network."""
    x, y = digits(options.samples, options.device)
    model = network(options)
    states: dict[str, Callable[[], None]] = {
        "at the start": lambda: None,
        "after 8 straight steps": lambda: train(model, x, y, options, steps=8),
        "loss at most 1e-6": lambda: train(model, x, y, options, until=1e-6),
    }
    for state, reach in states.items():
        reach()
        call, names = recorded(model, x)
        jacobian = tangent_jacobian(model, [call], names)
        operator = KernelOperator(jacobian, None, ConjugateGradients())
        with torch.no_grad():
            g = (model(x) - y).double().reshape(-1)
        shift = options.damping * operator.scale
        loss = float(g.square().sum()) / (2 * len(x))
        print(
            f"\n{state}: loss {loss:.2e}\n{'preconditioner':34} {'20':>9} {'40':>9} {'iter.':>6} {'build s':>8} {'solve s':>8}"
        )
        for name, build in preconditioners(jacobian, operator, len(x), shift, options.rank).items():
            started = time.perf_counter()
            inverse = build()
            built = time.perf_counter()

            def solved(tolerance: float, iterations: int, inverse: Inverse = inverse, right: Tensor = g) -> Iterate:
                return solve_by_cg(
                    operator.__matmul__,  # noqa: B023, used within the turn of the loop
                    right,
                    shift=shift,  # noqa: B023
                    scale=operator.scale,  # noqa: B023
                    precondition=lambda _: inverse,
                    options=ConjugateGradients(tolerance, iterations),
                )

            whole = solved(options.tolerance, 500)
            seconds = time.perf_counter() - built
            after = [solved(1e-14, iterations).residual for iterations in (20, 40)]
            count = f"{whole.iterations:6d}" if whole.converged else "  >500"
            print(f"{name:34} {after[0]:9.1e} {after[1]:9.1e} {count} {built - started:8.2f} {seconds:8.2f}", flush=True)


def preconditioners(
    jacobian: Jacobian, operator: KernelOperator, samples: int, shift: float, rank: int
) -> dict[str, Callable[[], Inverse]]:
    """The library's, and others that have been proposed, for outputs of 10 classes."""
    blocks = jacobian.sample_blocks()[0]
    values, basis = torch.linalg.eigh(blocks.mean(0))

    def between(directions: Tensor) -> Tensor:
        out = torch.empty(10, samples, samples, device=blocks.device)
        jacobian.output_blocks([directions.expand(samples, 10, 10)], [0], out)
        return out

    def factored(out: Tensor, directions: Tensor) -> Inverse:
        inverse = OutputBlockInverse(out, directions, range(10), torch.ones(10, dtype=torch.float64, device=blocks.device))
        inverse.factor(shift)
        return inverse

    def kronecker() -> Inverse:
        """K ⊗ C, nearest to Θ among those whose C has this basis, by alternating least squares."""
        out = between(basis).triu()
        full = out + out.triu(1).mT  # [10, N, N]
        weights = values.float()
        for _ in range(5):
            k = torch.einsum("c,cij->ij", weights, full) / weights.square().sum()
            weights = torch.einsum("cij,ij->c", full, k) / k.square().sum()
        return factored(weights[:, None, None] * k, basis)

    def averaged() -> Inverse:
        eye = torch.eye(10, dtype=torch.float64, device=blocks.device)
        return factored(between(eye).mean(0).expand(10, -1, -1).contiguous(), eye)

    def sampled() -> Inverse:
        inverse = SampleBlockInverse(blocks)
        inverse.factor(shift)
        return inverse

    def diagonal() -> Inverse:
        inverse = SampleBlockInverse(torch.diag_embed(blocks.diagonal(dim1=1, dim2=2)))
        inverse.factor(shift)
        return inverse

    def nystroem() -> Inverse:
        """(Θ_m Θ_mm⁻¹ Θ_mᵀ + λ1)⁻¹ with m rows chosen at random."""
        chosen = torch.randperm(operator.size, generator=torch.Generator().manual_seed(0))[:rank].to(blocks.device)
        columns = torch.zeros(operator.size, rank, dtype=torch.float64, device=blocks.device)
        for j, row in enumerate(tqdm(chosen.tolist(), leave=False, disable=None)):
            unit = torch.zeros(operator.size, dtype=torch.float64, device=blocks.device)
            unit[row] = 1
            columns[:, j] = operator @ unit
        corner = columns[chosen]
        corner.diagonal().add_(1e-10 * float(corner.diagonal().mean()))
        root = torch.linalg.solve_triangular(torch.linalg.cholesky(corner), columns.T, upper=False).T
        left, size, _ = torch.linalg.svd(root, full_matrices=False)
        share = size.square() / (size.square() + shift)
        return lambda r: (r - left @ (share * (left.T @ r))) / shift

    eye = torch.eye(10, dtype=torch.float64, device=blocks.device)
    return {
        "output blocks, in C's basis": lambda: factored(between(basis), basis),
        "nearest Kronecker product": kronecker,
        "block-diagonal by output": lambda: factored(between(eye), eye),
        "output-averaged kernel": averaged,
        f"Nyström, rank {rank}": nystroem,
        "sample blocks": sampled,
        "diagonal": diagonal,
        "none": lambda: Preconditioner([]),
    }


def compare_dense(options: argparse.Namespace) -> None:
    """The same step with Θ formed and factored."""
    show("conjugate gradients", in_process(options))
    show("dense", in_process(options, dense=True))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--compare", choices=("steps", "preconditioners", "sizes", "dense", "none"), default="steps", help="what (steps)")
    add("--samples", type=int, default=5000, help="N (5000)")
    add("--width", type=int, default=256, help="of the MLP's two hidden layers (256)")
    add("--activation", choices=("tanh", "relu"), default="tanh", help="of the hidden layers (tanh)")
    add("--damping", type=float, default=1e-3, help="relative to the mean of diag Θ (1e-3)")
    add("--tolerance", type=float, default=1e-2, help="of conjugate gradients (1e-2)")
    add("--batch", type=int, default=1000, help="images in a forward pass (1000)")
    add("--after", type=int, default=0, help="steps before the one that is measured (0)")
    add("--rank", type=int, default=1000, help="of Nyström's preconditioner (1000)")
    add("--device", default="cpu", help="cpu or cuda (cpu)")
    add("--dense", action="store_true", help="form and factor Θ")
    options = parse(parser, samples=100, width=32, batch=50, rank=20)
    if options.compare == "none":
        print(json.dumps(one_step(options)))
        return
    print(
        f"MLP 784-{options.width}-{options.width}-10 {options.activation}, float32, relative damping {options.damping:g}, "
        f"tolerance {options.tolerance:g}; {torch.get_num_threads()} threads, {options.device}\n"
    )
    if options.compare == "preconditioners":
        compare_preconditioners(options)
        return
    print(HEADER)
    if options.compare == "sizes":
        compare_sizes(options)
    elif options.compare == "dense":
        compare_dense(options)
    else:
        for after in (0,) if options.small else (0, 5):
            show(f"N = {options.samples}, after {after} steps", in_process(options, after=after))


if __name__ == "__main__":
    main()
