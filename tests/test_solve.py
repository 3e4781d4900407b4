import math

import pytest
import torch

from torch_adapted_gd import solve_kernel
from torch_adapted_gd.solve import default_rtol

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def jacobian(rows, columns, rank, condition, device="cpu"):
    """A float64 matrix of known rank, its nonzero singular values spread evenly (in log) over 1..1/condition."""
    u = torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, rank, dtype=torch.float64))[0]
    sigma = torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
    return ((u * sigma) @ v.T).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(1, 1, 1), (6, 9, 6), (40, 100, 40), (40, 100, 17), (60, 20, 20), (60, 20, 3)]
)
def test_solution_is_the_pseudoinverse(rows, columns, rank, condition, device):
    d = jacobian(rows, columns, rank, condition, device)
    g = torch.randn(rows, dtype=torch.float64, device=device)
    solution = solve_kernel(d @ d.T, g)
    pinv = torch.linalg.pinv(d, rtol=1e-9)
    expected = pinv @ g
    kappa = condition if rank > 1 else 1.0
    # forming Θ squares the condition number: ε·κ² relative to the largest the solution could be, |g|·κ
    assert (d.T @ solution.psi - expected).norm() <= 1e-14 * rows * kappa**2 * g.norm() * kappa
    assert solution.rank == rank
    assert solution.status == ("full_rank" if rank == rows else "rank_deficient")
    assert solution.condition == pytest.approx(kappa, rel=1e-12 * kappa**2 + 1e-12)
    assert solution.projected_fraction == pytest.approx(float((d @ expected).norm() / g.norm()), rel=1e-7)
    projected = d @ pinv @ g
    assert ((d @ d.T) @ solution.psi - projected).norm() <= 1e-14 * rows * kappa**2 * g.norm()  # Θψ = Pg (2.22)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("damping", [1e-6, 1e-2, 10.0])
def test_damping_is_levenberg_marquardt(damping, device):
    d = jacobian(30, 50, 20, 1e2, device)
    g = torch.randn(30, dtype=torch.float64, device=device)
    solution = solve_kernel(d @ d.T, g, damping=damping)
    shift = damping * float((d @ d.T).diagonal().mean())
    assert solution.damping == pytest.approx(shift)
    eye = torch.eye(50, dtype=torch.float64, device=device)
    expected = torch.linalg.solve(d.T @ d + shift * eye, d.T @ g)  # (DᵀD + λ)⁻¹ ∇_θC
    torch.testing.assert_close(d.T @ solution.psi, expected, rtol=1e-8, atol=1e-8 * float(expected.norm()))


def test_rank_is_decided_in_singular_values_of_the_jacobian():
    sigma = torch.tensor([1.0, 1e-2, 1e-4, 1e-6], dtype=torch.float64)
    theta = torch.diag(sigma**2)
    g = torch.ones(4)
    assert [solve_kernel(theta, g, rtol=r).rank for r in (0.5, 2e-2, 5e-3, 5e-5, 5e-7)] == [1, 1, 2, 3, 4]
    assert solve_kernel(theta, g).rank == 4
    assert solve_kernel(theta.float(), g).rank == 2  # √(4·1.2e-7) = 7e-4
    assert default_rtol(1000) == pytest.approx(math.sqrt(1000 * 2.220446049250313e-16))
    assert default_rtol(1000, 1e-3) == 1e-3


def test_directions_below_the_cut_are_left_out_when_damped_too():
    theta = torch.diag(torch.tensor([1.0, 1e-20], dtype=torch.float64))
    assert solve_kernel(theta, torch.ones(2), damping=1e-3).psi[1] == 0


def test_zero_kernel():
    solution = solve_kernel(torch.zeros(3, 3), torch.ones(3))
    assert (solution.status, solution.rank, solution.projected_fraction) == ("zero", 0, 0.0)
    assert math.isnan(solution.condition)
    assert torch.equal(solution.psi, torch.zeros(3, dtype=torch.float64))
    assert "no trainable parameter moves any output" in solution.message


def test_zero_gradient():
    solution = solve_kernel(torch.eye(3), torch.zeros(3))
    assert solution.projected_fraction == 1.0
    assert torch.equal(solution.psi, torch.zeros(3, dtype=torch.float64))
    assert "full rank" in solution.message


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_a_status(bad):
    theta, g = torch.eye(3), torch.ones(3)
    for solution in (solve_kernel(theta * bad, g), solve_kernel(theta, g * bad)):
        assert solution.status == "not_finite"
        assert torch.equal(solution.psi, torch.zeros(3, dtype=torch.float64))
        assert "not finite" in solution.message


def test_failed_eigenvalues_are_a_status(monkeypatch):
    def fail(matrix):
        raise torch.linalg.LinAlgError("no")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    assert solve_kernel(torch.eye(3), torch.ones(3)).status == "not_converged"


def test_shapes():
    d = jacobian(12, 20, 12, 10.0)
    theta, g = d @ d.T, torch.randn(4, 3)
    solution = solve_kernel(theta.reshape(4, 3, 4, 3), g)
    assert solution.psi.shape == (4, 3)
    torch.testing.assert_close(solution.psi.reshape(12), solve_kernel(theta, g.reshape(12)).psi)


def test_bad_arguments():
    theta, g = torch.eye(4), torch.ones(4)
    with pytest.raises(TypeError, match="`theta` should be a tensor, but got list"):
        solve_kernel([[1.0]], g)
    with pytest.raises(TypeError, match="`g` should be a tensor, but got float"):
        solve_kernel(theta, 1.0)
    with pytest.raises(ValueError, match=r"`theta` should be \[n, n\] or \[N, Q, N, Q\] with n = 3.* but got \[4, 4\]"):
        solve_kernel(theta, g[:3])
    with pytest.raises(ValueError, match=r"but got \[2, 8\]"):
        solve_kernel(theta.reshape(2, 8), g)
    with pytest.raises(ValueError, match=r"but got \[2, 2, 4, 1\]"):
        solve_kernel(theta.reshape(2, 2, 4, 1), g)
    with pytest.raises(ValueError, match="n > 0"):
        solve_kernel(theta[:0, :0], g[:0])
    with pytest.raises(ValueError, match="`theta` should be symmetric, but differs from its transpose by up to 1"):
        solve_kernel(torch.ones(4, 4).triu(), g)
    for damping in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="`damping` should be at least 0 and finite, but got"):
            solve_kernel(theta, g, damping=damping)
    for rtol in (-1e-3, 1.0, math.nan):
        with pytest.raises(ValueError, match="`rtol` should be at least 0 and below 1, but got"):
            solve_kernel(theta, g, rtol=rtol)
    with pytest.raises(TypeError, match="`rtol` should be a number, but got '1e-3' of type str"):
        solve_kernel(theta, g, rtol="1e-3")


def test_tensors_that_require_a_gradient_are_taken_as_they_are():
    g = torch.ones(3, requires_grad=True)
    assert not solve_kernel(torch.eye(3), g).psi.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex128])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=f"`theta` should be float32 or float64, but is {dtype}"):
        solve_kernel(torch.eye(3).to(dtype), torch.ones(3))


def test_a_kernel_is_positive_semi_definite():
    with pytest.raises(ValueError, match="`theta` should be positive semi-definite, but has the eigenvalue -1"):
        solve_kernel(torch.diag(torch.tensor([1.0, -1.0])), torch.ones(2))


def test_the_ends_of_the_range_are_a_status():
    assert solve_kernel(torch.eye(3, dtype=torch.float64) * 1e-320, torch.ones(3)).status in ("not_finite", "full_rank")
    assert solve_kernel(torch.eye(3, dtype=torch.float64) * 1e-320, torch.ones(3)).psi.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize(
    ("rank", "condition", "method"),
    [
        (200, 1.0, "cholesky"),
        (200, 1e2, "cholesky"),
        (200, 1e4, "cholesky"),
        (200, 1e7, "eigh"),
        (150, 10.0, "eigh"),
        (1, 1.0, "eigh"),
    ],
)
def test_cholesky_serves_where_the_rank_is_full_by_far(rank, condition, method, damping, device):
    d = jacobian(200, 300, rank, condition, device)
    g = torch.randn(200, dtype=torch.float64, device=device)
    theta = d @ d.T
    fast, sure = solve_kernel(theta, g, damping=damping), solve_kernel(theta, g, damping=damping, method="eigh")
    assert (fast.method, sure.method) == (method, "eigh")
    assert (fast.rank, fast.status, fast.damping) == (sure.rank, sure.status, sure.damping)
    assert fast.projected_fraction == pytest.approx(sure.projected_fraction, abs=1e-12)
    kappa = min(condition, damping**-0.5 if damping else condition)
    expected = d.T @ sure.psi
    assert (d.T @ fast.psi - expected).norm() <= 1e-14 * 200 * kappa**2 * g.norm() * kappa
    if rank > 1:
        assert 0.5 * sure.condition <= fast.condition <= (1 + 1e-9) * sure.condition
    if not damping and condition < 1e7:
        assert (expected - torch.linalg.pinv(d, rtol=1e-9) @ g).norm() <= 1e-14 * 200 * kappa**2 * g.norm() * kappa


def test_cholesky_is_not_trusted_near_the_cut_of_the_rank():
    sigma = torch.logspace(0, -4, 200, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64))[0]
    theta, g = (q * sigma**2) @ q.T, torch.randn(200)
    for rtol in (1e-6, 5e-5, 1.5e-4, 1e-2):
        solution = solve_kernel(theta, g, rtol=rtol)
        assert solution.rank == int((sigma > rtol).sum())
        assert solution.method == ("cholesky" if rtol < 1e-5 else "eigh")


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e150])
def test_the_scale_of_the_kernel_does_not_matter(scale):
    d = jacobian(150, 200, 150, 1e2)
    g = torch.randn(150, dtype=torch.float64)
    solution = solve_kernel(scale * (d @ d.T), g)
    assert (solution.method, solution.rank) == ("cholesky", 150)
    torch.testing.assert_close(scale * solution.psi, solve_kernel(d @ d.T, g).psi, rtol=1e-9, atol=0)


def test_solve_methods_are_named():
    with pytest.raises(ValueError, match="`method` should be one of 'auto', 'eigh', but got 'lu'"):
        solve_kernel(torch.eye(2), torch.ones(2), method="lu")
