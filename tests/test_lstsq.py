import math

import pytest
import torch

from torch_adapted_gd import LeastSquares, rank_revealing_lstsq

from .matrices import cosines, spread

EPS = torch.finfo(torch.float64).eps
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def matrix_of(m, n, sigma):
    return (cosines(m)[:, : len(sigma)] * sigma) @ cosines(n)[:, : len(sigma)].T


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("m", "n", "rank", "condition", "method"),
    [
        (1, 1, 1, 1.0, "qr"),
        (1, 7, 1, 1.0, "qr"),
        (7, 1, 1, 1.0, "qr"),
        (30, 30, 30, 1e3, "qr"),
        (60, 20, 20, 1e10, "qr"),
        (20, 60, 20, 1e10, "qr"),
        (60, 20, 7, 1e2, "svd"),
        (20, 60, 7, 1e2, "svd"),
        (40, 40, 39, 1e6, "svd"),
        (40, 40, 1, 1.0, "svd"),
        (300, 200, 200, 1e12, "qr"),
        (300, 200, 200, 5e12, "svd"),
        (300, 200, 150, 1e10, "svd"),
        (200, 300, 150, 1e10, "svd"),
    ],
)
def test_solution_is_that_of_least_norm(m, n, rank, condition, method, device):
    sigma = spread(rank, condition)
    a, b = matrix_of(m, n, sigma), torch.randn(m, 3, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    expected = vh[:rank].T @ ((u[:, :rank].T @ b) / s[:rank, None])
    found = rank_revealing_lstsq(a.to(device), b.to(device))
    assert isinstance(found, LeastSquares)
    assert (found.method, found.rank) == (method, rank)
    assert found.status == ("full_rank" if rank == min(m, n) else "rank_deficient")
    kappa = condition if rank > 1 else 1.0
    assert (1 - 4 * max(m, n) * EPS * kappa if method == "svd" else 0.5) * kappa <= found.condition
    assert found.condition <= (1 + 4 * max(m, n) * EPS * kappa) * kappa * (1 + 1e-9)
    # Backward stable: an error max(m, n)·ε·σ_max in A, times |x|/σ_min and |b − Ax|/σ_min²; κ once where b is within reach.
    largest = torch.linalg.vector_norm(b) * kappa
    error = torch.linalg.vector_norm(found.solution.cpu() - expected)
    assert error <= 4 * max(m, n) * EPS * kappa * largest
    residual = torch.linalg.vector_norm(b - a @ expected, dim=0)
    torch.testing.assert_close(found.residual_norm.cpu(), residual, rtol=1e-6, atol=max(m, n) * EPS * float(largest))
    reached = a @ torch.randn(n, dtype=torch.float64)
    x = rank_revealing_lstsq(a.to(device), reached.to(device)).solution.cpu()
    plain = vh[:rank].T @ ((u[:, :rank].T @ reached) / s[:rank])
    assert x.shape == (n,)
    assert torch.linalg.vector_norm(x - plain) <= 4 * max(m, n) * EPS * kappa * torch.linalg.vector_norm(plain)


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
@pytest.mark.parametrize("rank", [20, 12])
def test_the_condition_is_not_squared(rank, scale):
    """At κ = 1e10, AᵀA is singular in float64."""
    a = matrix_of(50, 20, spread(rank, 1e10))
    x = a.T @ torch.linalg.solve(a @ a.T + torch.eye(50), torch.randn(50, dtype=torch.float64))
    x = torch.linalg.pinv(a) @ (a @ x)
    found = rank_revealing_lstsq(scale * a, scale * (a @ x))
    assert found.rank == rank
    assert (found.solution - x).norm() <= 50 * EPS * 1e10 * x.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exact", [True, False])
def test_columns_of_very_different_size(dtype, exact):
    a = torch.randn(80, 40, dtype=torch.float64) * torch.logspace(-4, 4, 40, dtype=torch.float64)
    if exact:
        a[:, 20:] = a[:, :20]
    a = a.to(dtype)
    b = torch.randn(80, dtype=dtype)
    for rtol in (None, 1e-3, 1e-12):
        found = rank_revealing_lstsq(a, b, rtol=rtol)
        cut = 80 * torch.finfo(dtype).eps if rtol is None else rtol
        sigma = torch.linalg.svdvals(a.double())
        assert found.rank == int((sigma > cut * sigma[0]).sum())
        expected = torch.linalg.pinv(a.double(), rtol=cut) @ b.double()
        kappa = float(sigma[0] / sigma[found.rank - 1])
        assert found.solution.dtype == dtype
        error = (found.solution.double() - expected).norm()
        allowed = 4 * 80 * EPS * kappa * b.double().norm() / sigma[found.rank - 1]
        assert error <= allowed + torch.finfo(dtype).eps * expected.norm()


def test_cut_is_relative_to_the_largest_singular_value():
    a = 5 * torch.diag(torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64))
    assert [rank_revealing_lstsq(a, torch.ones(3), rtol=r).rank for r in (0.5, 2e-2, 2e-3, 2e-5, 0.0)] == [1, 1, 2, 3, 3]
    assert rank_revealing_lstsq(torch.diag(torch.tensor([1.0, 3e-7])), torch.ones(2)).rank == 2  # 2·ε of float32 is 2.4e-7
    assert rank_revealing_lstsq(torch.diag(torch.tensor([1.0, 2e-7])), torch.ones(2)).rank == 1


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (4, 3)])
@pytest.mark.parametrize("right", [(), (0,), (2,)])
def test_nothing_to_solve(shape, right):
    m, n = shape
    b = torch.randn(m, *right)
    found = rank_revealing_lstsq(torch.zeros(m, n), b)
    assert (found.status, found.rank, found.method) == ("zero", 0, "none")
    assert math.isnan(found.condition)
    assert torch.equal(found.solution, torch.zeros(n, *right))
    torch.testing.assert_close(found.residual_norm, torch.linalg.vector_norm(b.double(), dim=0))


@pytest.mark.parametrize("right", [(0,), (1,)])
def test_right_hand_sides_in_columns(right):
    found = rank_revealing_lstsq(torch.randn(5, 3), torch.randn(5, *right))
    assert (found.solution.shape, found.residual_norm.shape) == ((3, *right), right)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_a_status(bad):
    a, b = torch.randn(4, 3), torch.randn(4)
    for found in (rank_revealing_lstsq(a * bad, b), rank_revealing_lstsq(a, b * bad)):
        assert (found.status, found.rank, found.method) == ("not_finite", 0, "none")
        assert torch.equal(found.solution, torch.zeros(3))
        assert math.isnan(found.residual_norm)
    assert rank_revealing_lstsq(a * 1e-30, b * 1e30).status == "not_finite"  # x is beyond float32
    assert rank_revealing_lstsq(a.double() * 1e-30, b * 1e30).status == "full_rank"


def test_failed_singular_values_are_a_status(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("no")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    assert rank_revealing_lstsq(torch.ones(3, 2), torch.ones(3)).status == "not_converged"
    assert rank_revealing_lstsq(torch.eye(3), torch.ones(3)).status == "full_rank"


def test_bad_arguments():
    a, b = torch.ones(4, 3), torch.ones(4)
    with pytest.raises(TypeError, match="`a` should be a tensor, but got list. Convert it with torch.as_tensor"):
        rank_revealing_lstsq([[1.0]], b)
    with pytest.raises(TypeError, match="`b` should be a tensor, but got float"):
        rank_revealing_lstsq(a, 1.0)
    with pytest.raises(TypeError, match="`a` should be float32 or float64, but is torch.float16. Convert it first"):
        rank_revealing_lstsq(a.half(), b)
    with pytest.raises(TypeError, match="`b` should be float32 or float64, but is torch.complex64"):
        rank_revealing_lstsq(a, b * 1j)
    with pytest.raises(ValueError, match=r"`a` should be a matrix \[m, n\], but got \[2, 4, 3\]. Solve a batch one"):
        rank_revealing_lstsq(a.expand(2, 4, 3), b)
    with pytest.raises(ValueError, match=r"`b` should be \[m\] or \[m, k\] with m = 4, .* but got \[3\]"):
        rank_revealing_lstsq(a, b[:3])
    with pytest.raises(ValueError, match=r"but got \[\]"):
        rank_revealing_lstsq(a, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"but got \[4, 1, 1\]"):
        rank_revealing_lstsq(a, b[:, None, None])
    for rtol in (-1e-3, 1.0, math.nan):
        with pytest.raises(ValueError, match="`rtol` should be at least 0 and below 1, but got"):
            rank_revealing_lstsq(a, b, rtol=rtol)


def test_gradients_are_not_tracked():
    assert not rank_revealing_lstsq(torch.ones(3, 2, requires_grad=True), torch.ones(3)).solution.requires_grad
