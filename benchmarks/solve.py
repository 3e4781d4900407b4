"""What solving Θψ = Pg costs by each factorization, against the eigenvalue decomposition; and least squares against LAPACK."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from torch_adapted_gd import rank_revealing_lstsq
from torch_adapted_gd.solve import Factorization, default_rtol, factorize

from .options import parse

try:
    from scipy.linalg import lapack
except ImportError:
    lapack = None

SPECTRA = ("full rank", "rank 0.9 n", "rank 0.5 n", "rank 0.02 n", "no gap")
DAMPINGS = (0.0, 1e-2)


def jacobian(n: int, spectrum: str, device: torch.device) -> Tensor:
    """A random D in float64 on the device."""
    if spectrum == "no gap":  # singular values that fall evenly through what counts as zero, to 1e-12
        d: Tensor = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q * torch.logspace(0, -12, n, dtype=torch.float64)
    else:
        columns = 2 * n if spectrum == "full rank" else round(float(spectrum.split()[1]) * n)
        d = torch.randn(n, columns, dtype=torch.float64) / columns**0.5
    return d.to(device)


def median_seconds(function: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, Any]:
    """Median time of a call, after one to warm up, and what it returned."""
    seconds, result = [], None
    for _ in range(repeats + 1):
        start = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), result


def measure_kernel(d: Tensor, damping: float, repeats: int) -> dict[str, Any]:
    """Seconds of a factorization with one solution, by choice and by eigenvalues."""
    n, device = len(d), d.device
    theta, g, rtol = d @ d.T, torch.randn(n, dtype=torch.float64).to(device), default_rtol(n)
    shift = damping * float(theta.diagonal().mean())

    def solved(method: str) -> tuple[Factorization, Tensor]:
        found = factorize(theta, rtol=rtol, method=method, least_shift=shift)
        return found, found.solve(g, shift)

    fast, (found, psi) = median_seconds(lambda: solved("auto"), device, repeats)
    slow, (sure, expected) = median_seconds(lambda: solved("eigh"), device, repeats)
    again, _ = median_seconds(lambda: found.solve(g, shift), device, repeats)
    step = d.T @ expected
    row = {
        "n": n,
        "damping": damping,
        "method": found.method,
        "rank": found.rank,
        "rank_by_eigh": sure.rank,
        "seconds": fast,
        "seconds_eigh": slow,
        "ratio": slow / fast,
        "seconds_of_another_right_side": again,
        "error": float((d.T @ psi - step).norm() / step.norm()),
    }
    if lapack is not None and not damping:
        array, floor = theta.cpu().numpy().T, rtol**2 * float(theta.diagonal().max())
        dpstrf = lambda: lapack.dpstrf(array, tol=floor, lower=0)  # noqa: E731
        row["seconds_dpstrf"], _ = median_seconds(dpstrf, torch.device("cpu"), repeats)
    return row


def measure_least_squares(m: int, n: int, rank: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds of `rank_revealing_lstsq` and of LAPACK's, by singular values, which torch has on CPU only."""
    a = (torch.randn(m, rank, dtype=torch.float64) @ torch.randn(rank, n, dtype=torch.float64)).to(device)
    b = torch.randn(m, dtype=torch.float64).to(device)
    ours, found = median_seconds(lambda: rank_revealing_lstsq(a, b), device, repeats)
    row = {"m": m, "n": n, "rank": found.rank, "method": found.method, "seconds": ours}
    if device.type == "cpu":
        cut = max(m, n) * torch.finfo(a.dtype).eps
        gelsd = lambda: torch.linalg.lstsq(a, b[:, None], rcond=cut, driver="gelsd").solution[:, 0]  # noqa: E731
        theirs, x = median_seconds(gelsd, device, repeats)
        row |= {"seconds_gelsd": theirs, "ratio": theirs / ours, "error": float((found.solution - x).norm() / x.norm())}
    return row


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="where (cpu)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each, after one to warm up (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parse(parser, repeats=1)
    torch.manual_seed(0)
    device = torch.device(options.device)
    sizes = (640,) if options.small else (640, 1280, 2560)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}; medians of {options.repeats}")
    print("\n   n spectrum     damping  by                 ours     eigh  ratio   again   dpstrf  rank (eigh's)  error of Dᵀψ")
    rows = []
    for n, spectrum in tqdm([(n, spectrum) for n in sizes for spectrum in SPECTRA], leave=False, disable=None):
        d = jacobian(n, spectrum, device)
        for damping in DAMPINGS:
            row = {"spectrum": spectrum, **measure_kernel(d, damping, options.repeats)}
            rows.append(row)
            dpstrf = f"{row['seconds_dpstrf']:8.4f}" if "seconds_dpstrf" in row else " " * 8
            print(
                f"{n:4} {spectrum:12} {damping:7g}  {row['method']:16} {row['seconds']:7.4f} {row['seconds_eigh']:8.4f} "
                f"{row['ratio']:5.1f}x {row['seconds_of_another_right_side']:7.4f} {dpstrf} "
                f"{row['rank']:5} ({row['rank_by_eigh']:4})   {row['error']:.1e}"
            )
    print("\nleast squares     by      ours    gelsd  ratio  error of x")
    squares = []
    for n in sizes:
        for shape in ((n, n // 2, n // 2), (n // 2, n, n // 2), (n, n // 2, n // 4)):
            row = measure_least_squares(*shape, device, options.repeats)
            squares.append(row)
            against = f"{row['seconds_gelsd']:8.4f} {row['ratio']:5.1f}x  {row['error']:.1e}" if "ratio" in row else ""
            print(f"{row['m']:4} x {row['n']:4}, r {row['rank']:4} {row['method']:4} {row['seconds']:7.4f} {against}")
    if options.json:
        figures = {"torch": torch.__version__, "device": options.device, "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps(figures | {"kernel": rows, "least_squares": squares}, indent=2) + "\n")


if __name__ == "__main__":
    main()
