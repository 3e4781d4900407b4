"""Peak memory of the kernel and of Dᵀψ beyond the network, against what the Jacobian D would take."""

import argparse
import resource
import time

import torch

from torch_adapted_gd.jacobian import tangent_jacobian
from torch_adapted_gd.jacobian.definition import recorded

from .networks import mlp
from .options import parse


def peak() -> float:
    """Gigabytes that this process has held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024, help="of the MLP's two hidden layers (1024)")
    parser.add_argument("--batch", type=int, default=512, help="N (512)")
    options = parse(parser, width=64, batch=64)
    torch.manual_seed(0)
    model, x = mlp(784, options.width, options.width, 10), torch.randn(options.batch, 784)
    model(x).sum().backward()
    model.zero_grad()
    before = peak()
    start = time.perf_counter()
    call, names = recorded(model, (x,))
    jacobian = tangent_jacobian(model, [call], names, method="structured")
    theta = jacobian.gram()
    middle = time.perf_counter()
    psi = torch.randn(len(theta), dtype=torch.float64)
    jacobian.rmv(psi)
    end = time.perf_counter()
    numel, rows = sum(p.numel() for p in model.parameters()), len(theta)
    print(
        f"MLP 784-{options.width}-{options.width}-10, float32, N = {options.batch}: QN = {rows:,}, K = {numel:,}\n"
        f"kernel {middle - start:.2f} s, Dᵀψ {end - middle:.2f} s, peak {peak() - before:.2f} GB above the network; "
        f"Θ itself takes {8 * rows**2 / 1e9:.2f} GB, D would take {4 * rows * numel / 1e9:.1f} GB"
    )


if __name__ == "__main__":
    main()
