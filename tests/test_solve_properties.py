"""Properties of both solvers on shapes, ranks and conditions of hypothesis's choice."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torch_adapted_gd import rank_revealing_lstsq, solve_kernel
from torch_adapted_gd.solve import choice

from .matrices import cosines, spread

EPS = torch.finfo(torch.float64).eps
SETTINGS = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the seed is set in each example
)


@st.composite
def matrices(draw, largest=40, conditions=3.0):
    """D ``[n, K]`` of a rank between 1 and min(n, K), with its rank and condition."""
    rows, columns = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    rank = draw(st.integers(1, min(rows, columns)))
    condition = 10 ** draw(st.floats(0.0, conditions)) if rank > 1 else 1.0
    torch.manual_seed(draw(st.integers(0, 2**31)))
    d = (cosines(rows)[:, :rank] * spread(rank, condition)) @ cosines(columns)[:, :rank].T
    return d * 10 ** draw(st.floats(-10.0, 10.0)), rank, condition


@pytest.fixture
def any_size(monkeypatch):
    """Have the fast factorizations tried on small matrices, too."""
    monkeypatch.setattr(choice, "_CHOLESKY_PAYS", 0)
    monkeypatch.setattr(choice, "_PIVOTS_PAY", 0)


@SETTINGS
@given(matrices(), st.sampled_from([0.0, 1e-8, 1e-3, 1.0, 100.0]), st.sampled_from([1e-20, 1.0, 1e20]))
def test_kernel_solution(any_size, case, damping, size):
    d, rank, condition = case
    n = len(d)
    theta, g = d @ d.T, size * torch.randn(n, dtype=torch.float64)
    u, sigma, vh = torch.linalg.svd(d, full_matrices=False)
    u, sigma, vh = u[:, :rank], sigma[:rank], vh[:rank]
    for method in ("auto", "eigh"):
        solution = solve_kernel(theta, g, damping=damping, method=method)
        shift = damping * float(theta.diagonal().mean())
        assert (solution.rank, solution.damping) == (rank, pytest.approx(shift))
        assert solution.status == ("full_rank" if rank == n else "rank_deficient")
        assert method == "auto" or solution.method == "eigh"
        gain = sigma / (sigma**2 + shift)
        allowed = 8 * n * EPS * condition**2 * g.norm()  # n·ε·κ² of what the size of the step can be
        assert (d.T @ solution.psi - vh.T @ (gain * (u.T @ g))).norm() <= allowed * gain.max()
        assert (solution.psi - u @ (u.T @ solution.psi)).norm() <= 8 * n * EPS * condition**2 * solution.psi.norm()
        # Θψ + λψ = Pg, (2.22) with damping
        assert (theta @ solution.psi + shift * solution.psi - u @ (u.T @ g)).norm() <= allowed
        assert solution.projected_fraction == pytest.approx(float((u.T @ g).norm() / g.norm()), abs=8 * n * EPS * condition**2)


@SETTINGS
@given(matrices(conditions=9.0), st.integers(1, 4))
def test_least_squares(case, columns):
    a, rank, condition = case
    m, n = a.shape
    b = torch.randn(m, columns, dtype=torch.float64)
    found = rank_revealing_lstsq(a, b)
    assert found.rank == rank
    assert found.status == ("full_rank" if rank == min(m, n) else "rank_deficient")
    assert 0.3 * condition <= found.condition <= (1 + 1e-5) * condition
    u, sigma, vh = torch.linalg.svd(a, full_matrices=False)
    u, sigma, vh = u[:, :rank], sigma[:rank], vh[:rank]
    rounding = 8 * max(m, n) * EPS * condition * b.norm()
    assert (found.solution - vh.T @ ((u.T @ b) / sigma[:, None])).norm() <= rounding / sigma[-1]
    assert (found.solution - vh.T @ (vh @ found.solution)).norm() <= 8 * max(m, n) * EPS * condition * found.solution.norm()
    assert (a.T @ (a @ found.solution - b)).norm() <= rounding * sigma[0]  # normal equations
    residual = torch.linalg.vector_norm(b - u @ (u.T @ b), dim=0)
    torch.testing.assert_close(found.residual_norm, residual, rtol=1e-9, atol=float(rounding))


@SETTINGS
@given(matrices(), st.sampled_from([0.0, 1e-2]))
def test_the_two_agree(case, damping):
    """Dᵀψ of the kernel is the least-squares step, D⁺g; damped, that of D above √λ1."""
    d, rank, condition = case
    n, k = d.shape
    g = torch.randn(n, dtype=torch.float64)
    solution = solve_kernel(d @ d.T, g, damping=damping)
    if damping:
        stacked = torch.cat([d, solution.damping**0.5 * torch.eye(k, dtype=torch.float64)])
        found = rank_revealing_lstsq(stacked, torch.cat([g, torch.zeros(k, dtype=torch.float64)]))
    else:
        found = rank_revealing_lstsq(d, g)
        assert found.rank == solution.rank == rank
    smallest = max(float(torch.linalg.matrix_norm(d, 2)) / condition, solution.damping**0.5)
    # Two roundings add up here: that of D Dᵀ and its solution, and that of the decomposition that it is compared with.
    assert (d.T @ solution.psi - found.solution).norm() <= 64 * (n + k) * EPS * condition**2 * g.norm() / smallest
