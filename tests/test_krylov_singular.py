"""Conjugate gradients without damping where Θ is singular, or nearly: what has converged is right."""

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, ConjugateGradients, HalfSquaredLoss

from .cases import dense_jacobian, flat, mlp, pairwise

HALF = HalfSquaredLoss()


def dead():
    """ReLUs none of which fire: the last bias alone moves the outputs."""
    model = mlp(nn.ReLU, sizes=(4, 30, 20, 3))
    nn.init.constant_(model[2].bias, -10.0)
    return model, torch.randn(20, 4)


def few_parameters():
    return mlp(sizes=(4, 3, 3)), torch.randn(30, 4)


def copies():
    return mlp(), torch.randn(10, 4).repeat(2, 1)


def nearly_dead():
    """The same, of which a few fire a little: singular values down to 3e-4."""
    model = mlp(nn.ReLU, sizes=(4, 30, 20, 3))
    with torch.no_grad():
        model[2].bias.sub_(0.6)
    return model, torch.randn(20, 4)


def near_copies():
    """Full rank, half of the singular values 1e-4 and less."""
    x = torch.randn(20, 4)
    x[10:] = x[:10] + 1e-3 * torch.randn(10, 4)
    return mlp(), x


def mixed_scales():
    """Singular values without a gap from 1 to 1e-6."""
    return mlp(sizes=(4, 40, 3)), torch.randn(20, 4) * torch.logspace(-3, 1, 20)[:, None]


def silently_wrong(system, dtype, **options):
    """Whether a converged solution's motion Θψ is farther from Pg than the tolerance, and by how much."""
    model, x = system()
    model, x = model.to(dtype), x.to(dtype)
    y = torch.randn(len(x), 3, dtype=dtype)
    d, g = dense_jacobian(model, x), (model(x).detach() - y).reshape(-1).double() / len(x)
    optimizer = AdaptedGD(model, criterion=HALF, solver=ConjugateGradients(**options), damping=0.0, lr=1e-3)
    HALF(model(x), y).backward()
    optimizer.step()
    assert torch.isfinite(flat(model)).all()
    psi = optimizer.state[next(model.parameters())]["psi"].double()  # rounded where the network is float32
    expected = d @ (torch.linalg.pinv(d, rtol=1e-7) @ g)
    wrong = float((d @ (d.T @ psi) - expected).norm() / g.norm())
    rounding = 4 * torch.finfo(dtype).eps * float((d @ d.T).norm() * psi.norm() / g.norm())
    return optimizer.last_step.status == "converged" and wrong > options["rtol"] + rounding, wrong


PRECONDITIONERS = ["outputs", "samples", "none"]


@pytest.mark.parametrize(
    ("system", "tolerance", "dtype", "preconditioner"),
    pairwise([dead, few_parameters, copies], [1e-2, 1e-4], [torch.float32, torch.float64], PRECONDITIONERS),
)
@pytest.mark.filterwarnings("ignore:Conjugate gradients did not converge")
def test_never_silently_wrong(system, tolerance, dtype, preconditioner):
    found, wrong = silently_wrong(system, dtype, rtol=tolerance, preconditioner=preconditioner)
    assert not found, wrong


@pytest.mark.parametrize(
    ("system", "preconditioner"),
    [(near_copies, "samples"), (near_copies, "none")]
    + [(system, preconditioner) for system in (mixed_scales, nearly_dead) for preconditioner in PRECONDITIONERS],
)
@pytest.mark.filterwarnings("ignore:Conjugate gradients did not converge")
def test_small_singular_values_are_not_silently_left_out(system, preconditioner):
    found, wrong = silently_wrong(system, torch.float64, rtol=1e-2, preconditioner=preconditioner)
    assert not found, wrong


def test_no_progress_is_noticed_long_before_iterations_run_out():
    model, x = copies()
    optimizer = AdaptedGD(
        model.double(), criterion=HALF, solver=ConjugateGradients(preconditioner="none"), damping=0.0, lr=1e-3
    )
    HALF(model(x.double()), torch.randn(20, 3).double()).backward()
    optimizer.step()
    assert optimizer.last_step.status == "rank_deficient"
    assert optimizer.last_step.iterations < 280  # about 200, of which the last 60 of the first system were in vain
