"""The integrators: where they evaluate the field, and their errors."""

import math

import pytest
import torch

from torch_adapted_gd.theory.integrate import integrate


@pytest.mark.parametrize("method", ["dopri5", "rk4", "euler"])
def test_no_field_is_asked_for_past_the_end(method):
    """Also for a small field, for which torchdiffeq's first probe is far ahead."""
    for size in (1.0, 1e-6):
        times = []

        def field(at, z, size=size, times=times):
            times.append(at)
            return size * z

        grid = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
        path, evaluations = integrate(field, torch.ones(2).double(), grid, method, 1e-8, 1e-8)
        assert evaluations == len(times)
        assert max(times) <= 1.0
        assert (min(times), max(times)) == pytest.approx((0.0, 1.0 if method != "euler" else 0.3))
        assert path.shape == (3, 2)
        if method == "dopri5":
            assert torch.allclose(path, torch.exp(size * grid)[:, None].expand(3, 2), rtol=1e-6)


def test_steps_that_become_too_small():
    def field(at, z):
        return z**2  # 1/(1 − t)

    grid = torch.tensor([0.0, 2.0], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="could not be integrated to the tolerances: underflow in dt"):
        integrate(field, torch.ones(1).double(), grid, "dopri5", 1e-6, 1e-8)


def test_steps_without_end():
    evaluations = 0

    def field(at, z):
        nonlocal evaluations
        evaluations += 1
        assert evaluations < 10_000
        return torch.cos(1e6 * at * torch.ones_like(z))  # needs more steps than are allowed

    grid = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="could not be integrated to the tolerances: max_num_steps exceeded"):
        integrate(field, torch.zeros(1).double(), grid, "dopri5", 1e-12, 1e-12)


def test_a_field_that_is_not_finite():
    grid = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="not finite at time 1: it diverges"):
        integrate(lambda at, z: z / (1 - at) if at < 1 else z * math.inf, torch.ones(1).double(), grid, "euler", 0, 0)
