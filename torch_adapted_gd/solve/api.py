"""The tangent-kernel system Θψ = Pg (2.22): a tensor Θ and a gradient in, ψ and its figures out."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import all_finite, one_of, real_number, real_tensor
from .choice import factorize
from .factorization import Status
from .spectrum import default_rtol


@dataclass(frozen=True)
class KernelSolution:
    """Result of `solve_kernel`. A failure is a value: ``status`` says what failed, and ``psi`` is zero.

    Attributes:
        psi: ψ in float64, in the shape of g: the solution of least norm, in ran Θ.
        rank: Number of singular values of D counted as nonzero. An estimate for ``"pivoted_cholesky"`` with a large damping.
        condition: σ_max/σ_min of D over those (Θ's own is the square); NaN when the rank is 0. Exact by ``"eigh"``. Otherwise
            an estimate from below, mostly within a third.
        projected_fraction: |Pg|/|g|, the part of the gradient that parameters can reach; 1 for g = 0.
        damping: The λ that was added, in the units of Θ.
        status: ``"full_rank"``, ``"rank_deficient"``, ``"zero"`` (Θ = 0), ``"not_finite"`` (Θ, g or ψ has NaN or infinite
            entries) or ``"not_converged"`` (the eigenvalue routine failed).
        method: The factorization: ``"cholesky"``, ``"pivoted_cholesky"`` or ``"eigh"``.
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
            "|g|² is out of reach. Duplicate inputs, dead units and K < QN cause this. A wider network may help.",
            "zero": "Θ is zero: no trainable parameter moves any output. Look for dead units and frozen layers.",
            "not_finite": "Θ, g or ψ has entries that are not finite. Look at the inputs, then lower the learning rate.",
            "not_converged": "The eigenvalue decomposition of Θ did not converge. Damping helps when entries are huge.",
        }[self.status]


@torch.no_grad()
def solve_kernel(
    theta: Tensor, g: Tensor, *, damping: float = 0.0, rtol: float | None = None, method: str = "auto"
) -> KernelSolution:
    """Solve Θψ = Pg, equation (2.22): ψ = (Θ + λ1)⁻¹ g on ran Θ, with P the orthogonal projector onto it.

    The rank is that of D (Θ = DDᵀ). Singular values σ of D (the roots of Θ's eigenvalues) with σ ≤ ``rtol``·σ_max count as
    zero, and ψ has no part in their directions, damped or not. ``"auto"`` takes the first method that it can trust:

    1. Cholesky, if an estimate of the condition shows that the rank is full by a wide margin.
    2. Pivoted Cholesky, Θ ≈ LLᵀ with r columns, if the spectrum has a gap at r; or if λ is 10⁶ times what counts as zero: then
       the rank is an estimate, and Dᵀψ differs from that of the eigenvalues by at most 0.002·|g|/(2√λ).
    3. The eigenvalue decomposition. It is also used for small matrices (n ≤ 128, or 512 if the rank is not full), where the
       others are not faster.

    CPU and CUDA take the same steps. (``torch.linalg.lstsq`` on CUDA assumes full rank and is wrong without it.) Gradients
    are not tracked through the solution.

    Args:
        theta: Θ, ``[n, n]`` or ``[N, Q, N, Q]`` (as `ntk` returns it), symmetric and positive semi-definite, float32 or
            float64; used in float64.
        g: The output gradient ∇ₓC with n entries, in any shape.
        damping: λ relative to the mean of diag Θ; 0 gives the pseudoinverse Θ⁺g.
        rtol: The relative cut on the singular values of D; by default √(n·ε) with ε of Θ's dtype.
        method: ``"auto"``, or ``"eigh"``: always the eigenvalue decomposition. It gives the exact condition and takes about ten
            times as long as Cholesky.

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
    real_tensor("theta", theta, precise=True)
    real_tensor("g", g)
    damping = real_number("damping", damping, low=0.0)
    one_of("method", method, ("auto", "eigh"))
    n = g.numel()
    square = (theta.ndim == 2 and theta.shape[0] == theta.shape[1]) or (theta.ndim == 4 and theta.shape[:2] == theta.shape[2:])
    if not square or theta.numel() != n * n or n == 0:
        raise ValueError(
            f"`theta` should be [n, n] or [N, Q, N, Q] with n = {n}, the number of entries of `g`, and n > 0, but got "
            f"{list(theta.shape)}."
        )
    eps = torch.finfo(theta.dtype).eps
    rtol = default_rtol(n, math.sqrt(n * eps)) if rtol is None else real_number("rtol", rtol, low=0.0, below=1.0)
    matrix, right = theta.reshape(n, n).double(), g.reshape(n).to(theta.device, torch.float64)

    def failure(status: Status) -> KernelSolution:
        return KernelSolution(torch.zeros_like(right).reshape(g.shape), 0, math.nan, math.nan, math.nan, status)

    asymmetry = (matrix - matrix.T).abs().max()
    if asymmetry > 1e3 * max(eps, 1e-12) * matrix.abs().max():  # not if there are NaN or infinite entries
        raise ValueError(f"`theta` should be symmetric, but differs from its transpose by up to {asymmetry:.3g}.")
    if not all_finite(right):
        return failure("not_finite")
    shift = damping * float(matrix.diagonal().mean())
    found = factorize(matrix, rtol=rtol, method=method, eps=eps, least_shift=shift)
    psi = found.solve(right, shift)
    if found.status in ("not_finite", "not_converged"):
        return failure(found.status)
    if not all_finite(psi):
        return failure("not_finite")
    size = float(torch.linalg.vector_norm(right))
    fraction = min(1.0, found.projected_norm(right) / size) if size else 1.0
    return KernelSolution(psi.reshape(g.shape), found.rank, found.condition, fraction, shift, found.status, found.method)
