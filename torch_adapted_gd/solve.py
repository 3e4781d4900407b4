"""The tangent-kernel system Θψ = Pg (2.22), solved with its rank revealed."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .checks import all_finite, one_of, real_number

METHODS = ("auto", "eigh")
_EIGH_IS_CHEAP = 128  # up to this n the eigenvalue decomposition takes a millisecond or so
_MARGIN = 100.0  # how far the smallest eigenvalue has to be from what counts as zero for Cholesky's factor to be trusted

Status = Literal["full_rank", "rank_deficient", "zero", "not_finite", "not_converged"]


@dataclass(frozen=True)
class KernelSolution:
    """What `solve_kernel` found. A failure is a value here: ``status`` says so and ``psi`` is zero.

    Attributes:
        psi: ψ in float64, in the shape of g: the one of least norm, in ran Θ.
        rank: Number of singular values of D counted as nonzero.
        condition: σ_max/σ_min of D over those (Θ's own is the square); NaN when the rank is 0. By ``"eigh"`` it is computed, by
            ``"cholesky"`` estimated, from below and mostly within a third.
        projected_fraction: |Pg|/|g|, the part of the gradient within reach of the parameters; 1 for g = 0.
        damping: The λ that was added, in the units of Θ.
        status: ``"full_rank"``, ``"rank_deficient"``, ``"zero"`` (Θ = 0), ``"not_finite"`` (Θ, g or ψ has NaN or infinite
            entries) or ``"not_converged"`` (the eigenvalue routine gave up).
        method: ``"cholesky"`` or ``"eigh"``, what served.
    """

    psi: Tensor
    rank: int
    condition: float
    projected_fraction: float
    damping: float
    status: Status
    method: str = "eigh"

    @property
    def message(self) -> str:
        """The status in words, with what to try."""
        return {
            "full_rank": "Θ has full rank: every output can be moved on its own.",
            "rank_deficient": f"Θ has rank {self.rank} of {self.psi.numel()}: {1 - self.projected_fraction**2:.1%} of "
            "|g|² is out of reach. Duplicate inputs, dead units and K < QN do this; a wider network may cure it.",
            "zero": "Θ is zero: no trainable parameter moves any output. Look for dead units and frozen layers.",
            "not_finite": "Θ, g or ψ has entries that are not finite. Look at the inputs, then lower the learning rate.",
            "not_converged": "The eigenvalue decomposition of Θ did not converge. Damping helps when entries are huge.",
        }[self.status]


def default_rtol(size: int, eps: float = 0.0) -> float:
    """Relative size below which a singular value of D is lost in the rounding of Θ.

    Θ's eigenvalues σ² come with absolute errors near ``size``·ε·σ_max² (ε of float64, in which Θ is formed and
    factored), so singular values of D below √(``size``·ε)·σ_max are noise; and those below ``eps``·σ_max are noise of D
    itself, when it was computed in a coarser precision.

    Args:
        size: QN, the number of rows of Θ.
        eps: Machine epsilon of the arithmetic that D was computed in.
    """
    return max(math.sqrt(size * torch.finfo(torch.float64).eps), eps)


@torch.no_grad()
def solve_kernel(
    theta: Tensor, g: Tensor, *, damping: float = 0.0, rtol: float | None = None, method: str = "auto"
) -> KernelSolution:
    """Solve Θψ = Pg, equation (2.22): ψ = (Θ + λ1)⁻¹ g on ran Θ, with P the orthogonal projector onto it.

    The rank is that of D (Θ = DDᵀ): with singular values σ = √eigenvalues of Θ, those with σ ≤ ``rtol``·σ_max count as
    zero and their directions are left out of ψ, damped or not. A float64 Cholesky factorization serves where an estimate of
    the condition from its factor says that the rank is full by a wide margin; if not, an eigenvalue decomposition of the
    symmetric Θ reveals the rank, on CPU and CUDA alike. (``torch.linalg.lstsq`` on CUDA assumes full rank and is wrong
    without it.) Gradients are not tracked through the solution.

    Args:
        theta: Θ, ``[n, n]`` or ``[N, Q, N, Q]`` (as `ntk` returns it), symmetric and positive semi-definite, float32 or
            float64; used in float64.
        g: The output gradient ∇ₓC with n entries, in any shape.
        damping: λ relative to the mean of diag Θ; 0 gives the pseudoinverse Θ⁺g.
        rtol: The relative cut on the singular values of D; by default √(n·ε) with ε of Θ's dtype.
        method: ``"auto"`` as described, or ``"eigh"``: always the eigenvalue decomposition, 10 to 20 times the time of
            Cholesky's, with the exact condition.

    Returns:
        The solution with its rank, condition and status. Dᵀψ = Dᵀ(Θ + λ1)⁻¹g, → D⁺g as λ → 0.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A shape does not fit, Θ is not symmetric or has a negative eigenvalue beyond rounding, or a number is out
            of range.

    Example:
        >>> theta = torch.tensor([[4.0, 4.0], [4.0, 4.0]], dtype=torch.float64)  # rank 1
        >>> solution = solve_kernel(theta, torch.tensor([1.0, 3.0]))
        >>> solution.psi, solution.rank, solution.status
        (tensor([0.2500, 0.2500], dtype=torch.float64), 1, 'rank_deficient')
        >>> round(solution.projected_fraction**2, 3)
        0.8
    """
    for name, tensor in (("theta", theta), ("g", g)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}` should be a tensor, but got {type(tensor).__name__}.")
        if tensor.dtype not in (torch.float32, torch.float64) and (name == "theta" or tensor.is_complex()):
            raise TypeError(f"`{name}` should be float32 or float64, but is {tensor.dtype}. Convert it first.")
    damping = real_number("damping", damping, low=0.0)
    one_of("method", method, METHODS)
    n = g.numel()
    square = (theta.ndim == 2 and theta.shape[0] == theta.shape[1]) or (theta.ndim == 4 and theta.shape[:2] == theta.shape[2:])
    if not square or theta.numel() != n * n or n == 0:
        raise ValueError(
            f"`theta` should be [n, n] or [N, Q, N, Q] with n = {n}, the number of entries of `g`, and n > 0, but got "
            f"{list(theta.shape)}."
        )
    eps = torch.finfo(theta.dtype).eps
    rtol = default_rtol(n, math.sqrt(n * eps)) if rtol is None else real_number("rtol", rtol, low=0.0, below=1.0)
    matrix = theta.reshape(n, n).double()
    if all_finite(matrix):
        asymmetry = (matrix - matrix.T).abs().max()
        if asymmetry > 1e3 * max(eps, 1e-12) * matrix.abs().max():
            raise ValueError(f"`theta` should be symmetric, but differs from its transpose by up to {asymmetry:.3g}.")
    solution = solve_symmetric(matrix, g.reshape(n).to(matrix), damping=damping, rtol=rtol, method=method, eps=eps)
    return dataclasses.replace(solution, psi=solution.psi.reshape(g.shape))


def solve_symmetric(
    matrix: Tensor, right: Tensor, *, damping: float, rtol: float, method: str = "auto", eps: float | None = None
) -> KernelSolution:
    """`solve_kernel` for a Θ ``[n, n]`` known to be symmetric and a g ``[n]``, both in float64.

    Args:
        matrix: Θ.
        right: g.
        damping: See `solve_kernel`.
        rtol: The same.
        method: The same.
        eps: Relative rounding of the entries of Θ; a more negative eigenvalue than that explains is an error.

    Raises:
        ValueError: Θ has a negative eigenvalue beyond rounding.
    """
    n = len(right)
    shift = damping * float(matrix.diagonal().mean())

    def failure(status: Status) -> KernelSolution:
        return KernelSolution(torch.zeros_like(right), 0, math.nan, math.nan, math.nan, status)

    if not (all_finite(matrix) and all_finite(right)):
        return failure("not_finite")
    if method == "auto" and n > _EIGH_IS_CHEAP:
        try:
            solution = _by_cholesky(matrix, right, shift, rtol)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of numbers near the ends of float64's range
            solution = None
        if solution is not None:
            return solution
    try:
        eigenvalues, vectors = torch.linalg.eigh(matrix)  # ascending; vectors [n, n], one a column
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return failure("not_converged")
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    if smallest < -1e2 * n * (eps or torch.finfo(torch.float64).eps) * max(largest, -smallest):
        raise ValueError(f"`theta` should be positive semi-definite, but has the eigenvalue {smallest:.3g}.")
    rank = int((eigenvalues > rtol**2 * largest).sum()) if largest > 0 else 0
    kept, basis = eigenvalues[n - rank :], vectors[:, n - rank :]  # [rank], [n, rank]
    coefficients = basis.T @ right
    psi = basis @ (coefficients / (kept + shift))
    if not torch.isfinite(psi).all():  # entries near the ends of float64's range
        return failure("not_finite")
    size = float(torch.linalg.vector_norm(right))
    return KernelSolution(
        psi=psi,
        rank=rank,
        condition=math.sqrt(largest / float(kept[0])) if rank else math.nan,
        projected_fraction=min(1.0, float(torch.linalg.vector_norm(coefficients)) / size) if size else 1.0,
        damping=shift,
        status="full_rank" if rank == n else "rank_deficient" if rank else "zero",
    )


def _by_cholesky(matrix: Tensor, right: Tensor, shift: float, rtol: float) -> KernelSolution | None:
    """The solution for a Θ whose rank is full by a wide margin; None for any other."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(len(right), 4, generator=generator, dtype=torch.float64, device="cpu").to(right)
    start[:, 0] = right  # its image is ψ

    def inverse(block: Tensor) -> Tensor:
        return torch.cholesky_solve(block, factor)

    first = inverse(start)
    largest = _largest_eigenvalue(lambda block: matrix @ block, start, matrix @ start)
    smallest = 1 / _largest_eigenvalue(inverse, start, first)
    # The factor is that of Θ with an error near n·ε·λ_max, which also is what the default of rtol² stands for.
    noise = max(rtol**2, len(matrix) * torch.finfo(torch.float64).eps)
    if not smallest > _MARGIN * noise * largest:
        return None
    psi = first[:, 0]
    if shift:
        factor, info = torch.linalg.cholesky_ex(
            matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        )
        psi = inverse(right[:, None])[:, 0]
    if int(info) or not torch.isfinite(psi).all():
        return None
    return KernelSolution(psi, len(psi), math.sqrt(largest / smallest), 1.0, shift, "full_rank", "cholesky")


def _largest_eigenvalue(apply: Callable[[Tensor], Tensor], start: Tensor, image: Tensor) -> float:
    """The largest eigenvalue of a positive operator, from below: the largest Ritz value on a block Krylov space.

    Args:
        apply: The operator, on blocks ``[n, b]``.
        start: A block.
        image: The operator applied to it.
    """
    basis = torch.linalg.qr(torch.cat([start, image], 1)).Q  # [n, 2b]
    ritz = basis.T @ apply(basis)
    return float(torch.linalg.eigvalsh((ritz + ritz.T) / 2)[-1])
