"""The tangent-kernel system Θψ = Pg (2.22): a tensor Θ and a gradient in, ψ and its figures out."""

import dataclasses
import math

import torch
from torch import Tensor

from ..checks import all_finite, one_of, real_number
from .choice import factorize
from .solution import METHODS, KernelSolution
from .spectrum import default_rtol


@torch.no_grad()
def solve_kernel(
    theta: Tensor, g: Tensor, *, damping: float = 0.0, rtol: float | None = None, method: str = "auto"
) -> KernelSolution:
    """Solve Θψ = Pg, equation (2.22): ψ = (Θ + λ1)⁻¹ g on ran Θ, with P the orthogonal projector onto it.

    The rank is that of D (Θ = DDᵀ): with singular values σ = √eigenvalues of Θ, those with σ ≤ ``rtol``·σ_max count as
    zero and their directions are left out of ψ, damped or not. A float64 Cholesky factorization serves where an estimate of
    the condition from its factor says that the rank is full by a wide margin. If not, pivoted Cholesky, Θ ≈ LLᵀ with r
    columns, reveals a rank r that the spectrum has a gap at; where it has none, the eigenvalue decomposition of the symmetric
    Θ does, unless λ is 10⁶ times what counts as zero: the rank is an estimate then, and Dᵀψ within 0.002·|g|/(2√λ) of what
    eigenvalues give. Matrices for which these are no faster (n ≤ 128, or 512 where the rank is short) are left to them. All of
    it is the same on CPU and CUDA. (``torch.linalg.lstsq`` on CUDA assumes full rank and is wrong without it.) Gradients are
    not tracked through the solution.

    Args:
        theta: Θ, ``[n, n]`` or ``[N, Q, N, Q]`` (as `ntk` returns it), symmetric and positive semi-definite, float32 or
            float64; used in float64.
        g: The output gradient ∇ₓC with n entries, in any shape.
        damping: λ relative to the mean of diag Θ; 0 gives the pseudoinverse Θ⁺g.
        rtol: The relative cut on the singular values of D; by default √(n·ε) with ε of Θ's dtype.
        method: ``"auto"`` as described, or ``"eigh"``: always the eigenvalue decomposition, some ten times the time of
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
    shift = damping * float(matrix.diagonal().mean())
    if not all_finite(right):
        return KernelSolution.failure("not_finite", right)
    factorization = factorize(matrix, rtol=rtol, method=method, eps=eps, least_shift=shift)
    psi = factorization.solve(right, shift)
    if not all_finite(psi) and method != "eigh":  # entries near the ends of float64's range
        factorization = factorize(matrix, rtol=rtol, method="eigh", eps=eps)
        psi = factorization.solve(right, shift)
    if factorization.status in ("not_finite", "not_converged"):
        return KernelSolution.failure(factorization.status, right)
    if not all_finite(psi):
        return KernelSolution.failure("not_finite", right)
    size = float(torch.linalg.vector_norm(right))
    return KernelSolution(
        psi=psi,
        rank=factorization.rank,
        condition=factorization.condition,
        projected_fraction=min(1.0, factorization.projected_norm(right) / size) if size else 1.0,
        damping=shift,
        status=factorization.status,
        method=factorization.method,
    )
