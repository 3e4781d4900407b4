import math
import re

import pytest
import torch

from torch_adapted_gd import solve_kernel
from torch_adapted_gd.solve import default_rtol, equilibrated, factorize
from torch_adapted_gd.solve.cholesky import by_cholesky
from torch_adapted_gd.solve.pivoted import by_pivots

from .matrices import TABLE, Matrix, cosines, spread

EPS = torch.finfo(torch.float64).eps
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if int(re.match(r"\d+", name)[0]) >= 1000 else []) for name in TABLE]


def bound(matrix, rank, g, shift, eps=EPS):
    """How far Dᵀψ may be off.

    Θ is formed and factored with errors near n·ε·σ_max². Relative to the σ² + λ that it is divided by, that is n·ε·κ² with
    κ² = σ_max²/(σ_min² + λ), of what the step can be: σ/(σ² + λ)·|g|, which is at most |g|/σ_min and |g|/(2√λ). The rotation of
    the range, n·ε·σ_max²/σ_min², does not know of λ, but neither does it matter to directions where σ² is far below λ.
    """
    sigma = matrix.sigma[:rank]
    gain = (sigma / (sigma**2 + shift)).max()
    return float(4 * len(g) * eps * sigma[0] ** 2 / sigma[-1] ** 2 * gain * torch.linalg.vector_norm(g, dim=0).max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_table(name, device):
    expected, matrix = TABLE[name], TABLE[name].make()
    n = len(matrix.d)
    theta = (matrix.d @ matrix.d.T).to(device)
    rtol = default_rtol(n) if expected.rtol is None else expected.rtol
    found = factorize(theta, rtol=rtol)
    assert (found.method, found.size) == (expected.method, n)
    assert abs(found.rank - expected.rank) <= expected.slack
    assert found.status == ("full_rank" if found.rank == n else "rank_deficient" if found.rank else "zero")
    g = torch.randn(n, 3, dtype=torch.float64)
    if not found.rank:
        assert math.isnan(found.condition)
        assert not found.solve(g.to(device)).any()
        assert found.projected_norm(g[:, 0].to(device)) == 0
        return
    if expected.slack:  # in directions near the cut n·ε·κ² = 1: Dᵀψ has no correct digit to be tested
        return
    kappa = float(matrix.sigma[0] / matrix.sigma[-1])
    exact, rounding = found.method == "eigh", 4 * n * EPS * kappa**2
    assert (1 - rounding if exact else 0.5) * kappa <= found.condition <= (1 + rounding) * kappa
    for damping in (0.0, 1e-12, 1e-6, 1e-2, 1.0, 0.0):  # one factorization serves them all
        shift = damping * float(theta.diagonal().mean())
        psi = found.solve(g.to(device), shift).cpu()
        step = matrix.step(g, shift)
        error = torch.linalg.vector_norm(matrix.in_coordinates(psi) - step, dim=0)
        assert (error <= bound(matrix, found.rank, g, shift)).all(), damping
        if kappa <= 1e3 and name != "600, copies but for float32's last bits":
            assert (error <= 1e-8 * torch.linalg.vector_norm(step, dim=0)).all(), damping
        outside = psi - matrix.u @ (matrix.u.T @ psi)  # of least norm: nothing of ψ is outside of ran Θ
        assert torch.linalg.vector_norm(outside) <= 4 * n * EPS * kappa**2 * torch.linalg.vector_norm(psi), damping
        one = found.solve(g[:, 1].to(device), shift).cpu()
        assert torch.linalg.vector_norm(one - psi[:, 1]) <= n * EPS * kappa**2 * torch.linalg.vector_norm(one)
    projected = matrix.u @ (matrix.u.T @ g)
    allowed = 4 * n * EPS * kappa**2 * torch.linalg.vector_norm(g)
    assert torch.linalg.vector_norm(found.project(g.to(device)).cpu() - projected) <= allowed
    assert found.projected_norm(g[:, 0].to(device)) == pytest.approx(float(projected[:, 0].norm()), rel=float(allowed))


def test_the_table_is_large():
    assert len(TABLE) >= 25
    assert {row.method for row in TABLE.values()} == {"cholesky", "pivoted_cholesky", "eigh"}


@pytest.mark.parametrize("kind", [by_cholesky, by_pivots])
def test_small_matrices_are_served_or_declined(kind):
    """Whatever they serve, they serve as the eigenvalues do; they are not asked at such sizes, where those are cheap."""
    served = 0
    for seed in range(200):
        torch.manual_seed(seed)
        n = int(torch.randint(1, 40, ()))
        rank = n if kind is by_cholesky or seed % 5 == 0 else int(torch.randint(1, n + 1, ()))
        matrix = Matrix.with_values(n, spread(rank, 10 ** (8 * float(torch.rand(())))))
        theta, rtol = matrix.d @ matrix.d.T, default_rtol(n)
        found = kind(theta, rtol) if kind is by_cholesky else kind(theta, rtol, 0.0, truncate=True)
        if found is None:
            continue
        served += 1
        sure, g = factorize(theta, rtol=rtol, method="eigh"), torch.randn(n, dtype=torch.float64)
        assert found.rank == sure.rank
        assert found.condition <= (1 + 1e-3) * sure.condition
        for shift in (0.0, 1e-3):
            difference = matrix.in_coordinates(found.solve(g, shift)) - matrix.in_coordinates(sure.solve(g, shift))
            assert difference.norm() <= 2 * bound(matrix, rank, g, shift)
    assert served >= 100


@pytest.mark.parametrize(("rank", "condition"), [(300, 10.0), (300, 1e2), (560, 1e3)])
def test_refinement_pays(rank, condition):
    matrix = Matrix.with_values(600, spread(rank, condition))
    found = by_pivots(matrix.d @ matrix.d.T, default_rtol(600), 0.0, truncate=True)
    g = torch.randn(600, 10, dtype=torch.float64)
    step, solutions = matrix.step(g, 0.0), (found.solve(g), found.rough_solve(found.project(g)))
    refined, rough = ((matrix.in_coordinates(psi) - step).norm() for psi in solutions)
    assert refined < 0.7 * rough


@pytest.mark.parametrize("damping", [1e-4, 1e-2, 1.0])
def test_a_large_shift_spares_the_eigenvalues_of_an_ambiguous_rank(damping):
    matrix = Matrix.with_values(600, spread(600, 1e12))
    theta, g = matrix.d @ matrix.d.T, torch.randn(600, dtype=torch.float64)
    shift = damping * float(theta.diagonal().mean())
    rtol = default_rtol(600)
    found, sure = factorize(theta, rtol=rtol, least_shift=shift), factorize(theta, rtol=rtol, method="eigh")
    assert (found.method, factorize(theta, rtol=rtol).method) == ("pivoted_cholesky", "eigh")
    assert factorize(theta, rtol=rtol, least_shift=1e-9 * shift).method == "eigh"
    assert abs(found.rank - sure.rank) <= 60
    expected = matrix.in_coordinates(sure.solve(g, shift))
    # Directions at the cut are in or out by chance: √(n·ε)·σ_max/λ of each unit of g.
    assert (matrix.in_coordinates(found.solve(g, shift)) - expected).norm() <= rtol / shift * g.norm()
    assert (matrix.in_coordinates(found.solve(g, shift)) - expected).norm() <= 2e-3 * expected.norm()


def test_neither_zero_diagonals_nor_negative_ones_pass_for_a_kernel():
    theta = torch.zeros(600, 600, dtype=torch.float64)
    theta[0, 1] = theta[1, 0] = 1.0
    theta[2, 2] = 1.0
    with pytest.raises(ValueError, match="`theta` should be positive semi-definite, but has the eigenvalue -1"):
        factorize(theta, rtol=1e-6)
    theta[0, 1] = theta[1, 0] = 0.0
    theta[0, 0] = -1.0
    with pytest.raises(ValueError, match="`theta` should be positive semi-definite, but has the eigenvalue -1"):
        factorize(theta, rtol=1e-6)


@pytest.mark.parametrize("rank", [200, 500])
def test_the_parameters_side_has_the_same_step(rank):
    """(DᵀD + λ1)⁻¹Dᵀg = Dᵀ(DDᵀ + λ1)⁻¹g, of least norm in the limit."""
    d = (cosines(700)[:, :rank] * spread(rank, 1e2)) @ cosines(600)[:, :rank].T
    g = torch.randn(700, dtype=torch.float64)
    outputs, parameters = (factorize(m, rtol=1e-6) for m in (d @ d.T, d.T @ d))
    assert (outputs.method, parameters.method) == ("pivoted_cholesky", "pivoted_cholesky")
    for shift in (0.0, 1e-10, 1e-3):
        step = d.T @ outputs.solve(g, shift)
        assert (parameters.solve(d.T @ g, shift) - step).norm() <= 1e-8 * step.norm()


def test_a_factorization_that_failed_says_why(monkeypatch):
    theta = torch.full((600, 600), math.nan, dtype=torch.float64)
    found = factorize(theta, rtol=1e-6)
    assert (found.status, found.rank, found.method) == ("not_finite", 0, "none")
    assert not found.solve(torch.ones(600).double(), 1.0).any()
    assert found.projected_norm(torch.ones(600).double()) == 0

    def fail(matrix):
        raise torch.linalg.LinAlgError("no")

    for name in ("eigh", "eigvalsh"):  # the estimates need the latter
        monkeypatch.setattr(torch.linalg, name, fail)
    assert factorize(torch.eye(600).double(), rtol=1e-6).status == "not_converged"


def test_numbers_beyond_the_range_are_a_status():
    theta = 1e-200 * torch.eye(600).double()
    solution = solve_kernel(theta, torch.full((600,), 1e200, dtype=torch.float64), rtol=1e-6)
    assert solution.status == "not_finite"
    assert not solution.psi.any()


def test_units_of_parameters_do_not_make_the_rank_short():
    """Columns of D from 1e-7 to 1e7: DᵀD loses the small ones, and E DᵀD E does not."""
    d = torch.randn(200, 30, dtype=torch.float64)
    matrix, units = d.T @ d, torch.logspace(-7, 7, 30, dtype=torch.float64)
    scaled, g = matrix * units[:, None] * units, torch.randn(30, 2, dtype=torch.float64)
    options = {"rtol": default_rtol(30), "method": "auto", "truncate": False}
    found = factorize(scaled, **options)
    assert found.status == "rank_deficient"
    better = equilibrated(scaled, found, **options)
    assert (better.status, better.rank) == ("full_rank", 30)
    for shift in (0.0, 1e-3):  # (UMU + λ1)⁻¹Ug = U⁻¹(M + λU⁻²)⁻¹g
        expected = torch.linalg.solve(matrix + torch.diag(shift / units**2), g) / units[:, None]
        torch.testing.assert_close(better.solve(units[:, None] * g, shift), expected, rtol=1e-9, atol=0)
