"""Whether the kernel is positive-definite (3.16), its blocks (3.14), and the effective kernel (3.17)."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from torch_adapted_gd import effective_kernel, is_positive_definite, kernel_block, ntk

from .cases import COUPLED, TwoHeads, mlp
from .tangents import NETWORKS, SHORT, Dense, assert_close, dead, narrow, random, taken_down


@COUPLED
@pytest.mark.parametrize("name", NETWORKS)
def test_definite_is_of_full_rank(name):
    model, x = NETWORKS[name]()
    dense = Dense.of(model, x)
    found = is_positive_definite(model, x)
    n = len(dense.d)
    assert bool(found) is (name not in SHORT)
    assert (found.rank, found.size) == (dense.rank, n)
    spectrum = torch.linalg.eigvalsh(dense.theta)
    assert found.largest == pytest.approx(float(spectrum[-1]), rel=1e-12)
    assert found.smallest == pytest.approx(float(spectrum[0]), abs=1e-13 * found.largest)
    assert found.cut == pytest.approx(n * torch.finfo(torch.float64).eps * found.largest, rel=1e-9)
    assert (found.margin > 1) == bool(found)
    if found.cut:
        assert found.margin == pytest.approx(found.smallest / found.cut)
    # The quadratic form of (3.16), and its zeros.
    theta = dense.theta
    u = random(n)
    assert float(u @ theta @ u) > 0 or name == "dead"
    if name in SHORT:
        off = u - dense.p @ u
        assert abs(float(off @ theta @ off)) <= 1e-12 * found.largest * float(off.norm()) ** 2


def diagonal(small, dtype=torch.float64):
    """Singular values 1 and a small one."""
    return nn.Linear(2, 1, bias=False).to(dtype), torch.diag(torch.tensor([1.0, small], dtype=dtype))


def test_cut_of_singular_values():
    model, x = diagonal(1e-3)
    for rtol, definite in ((None, True), (0.0, True), (0.99e-3, True), (1.01e-3, False)):
        found = is_positive_definite(model, x, rtol=rtol)
        assert bool(found) is definite
        if rtol:
            assert found.cut == pytest.approx(rtol**2)
            assert found.margin == pytest.approx((1e-3 / rtol) ** 2)
    assert is_positive_definite(model, x, rtol=0.0).margin == math.inf


def test_cut_knows_the_parameters_precision():
    """Rounding of Θ hides relative singular values below about 3e-8 in float64, and below about 2e-7 for float32 networks."""
    assert is_positive_definite(*diagonal(1e-7))
    assert not is_positive_definite(*diagonal(1e-8))
    assert is_positive_definite(*diagonal(2e-7, torch.float32))
    assert not is_positive_definite(*diagonal(1e-7, torch.float32))


def test_kernel_that_is_zero():
    found = is_positive_definite(*dead(), rtol=0.0)
    assert (bool(found), found.rank, found.margin, found.largest) == (False, 0, 0.0, 0.0)


def test_several_outputs():
    model, x = TwoHeads().double(), random(3, 4)
    assert is_positive_definite(model, x).size == 15
    assert is_positive_definite(model, x)


def test_arguments_of_definiteness():
    model, x = narrow()
    with pytest.raises(ValueError, match="`rtol` should be at least 0 and below 1, but got 1.0"):
        is_positive_definite(model, x, rtol=1.0)
    with pytest.raises(TypeError, match=r"`model` should be a torch\.nn\.Module"):
        is_positive_definite(torch.tanh, x)
    with pytest.raises(ValueError, match=r"`x` should have samples, but has none"):
        is_positive_definite(model, x[:0])


@COUPLED
def test_diverged_parameters():
    model, x = narrow()
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="tangent kernel is not finite there: the parameters have diverged"):
        is_positive_definite(model, x)


@pytest.mark.parametrize("name", ["wide", "duplicated", "cnn", "tied", "one output"])
def test_blocks_are_those_of_the_kernel(name):
    """(3.15), from two samples; i and j are indices as in Python."""
    model, x = NETWORKS[name]()
    n = len(x)
    q = model(x)[0].numel()
    theta = Dense.of(model, x).theta.reshape(n, q, n, q)
    for i in range(-n, n):
        for j in (0, n - 1, -1, -n, 1):
            block = kernel_block(model, x, i, j)
            assert block.shape == (q, q)
            assert block.dtype == torch.float64
            assert_close(block, theta[i, :, j], 1e-12, theta.norm())
    assert_close(kernel_block(model, x, np.int64(1), torch.tensor(0)), theta[1, :, 0], 1e-12, theta.norm())
    assert_close(kernel_block(model, x, 0, 1).T, kernel_block(model, x, 1, 0), 1e-13)


class Sum(nn.Module):
    """Of two inputs, scaled."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(4, 3)

    def forward(self, x, z, scale=1.0):
        return scale * torch.tanh(self.first(x) + self.second(z))


def test_blocks_of_models_with_several_inputs():
    model, x, z = Sum().double(), random(3, 2), random(3, 4)
    for inputs in ((x, z), (x, z, 2.0)):
        theta = ntk(model, inputs)
        for i, j in ((0, 1), (2, 2), (-1, 0)):
            assert_close(kernel_block(model, inputs, i, j), theta[i, :, j], 1e-12)
    single = mlp(sizes=(2, 5, 1)).double()
    assert torch.equal(kernel_block(single, (x,), 0, 2), kernel_block(single, x, 0, 2))


def test_samples_that_are_not_there():
    model, x = narrow()
    for i, j in ((12, 0), (0, 12), (-13, 0)):
        with pytest.raises(IndexError, match="out of bounds for dimension 0 with size 12"):
            kernel_block(model, x, i, j)
    for bad in (1.0, slice(0, 2), "0"):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            kernel_block(model, x, 0, bad)


@pytest.mark.parametrize("name", NETWORKS)
def test_effective_kernel(name):
    """The identity for the adapted flow at full rank (3.17), P otherwise, Θ for gradient descent."""
    model, x = NETWORKS[name]()
    dense, n = Dense.of(model, x), len(x)
    rows = len(dense.d)
    eye = torch.eye(rows, dtype=torch.float64)
    before = taken_down(model)
    for alpha in (1.0, 0.3, 0.0):
        found = effective_kernel(model, x, alpha)
        assert found.shape == (n, rows // n, n, rows // n)
        expected = dense.p @ (alpha * eye + (1 - alpha) * dense.theta) @ dense.p
        if alpha == 1.0 and name not in SHORT:
            expected = eye
        assert_close(found.reshape(rows, rows), expected, 1e-4, expected.norm() or 1.0)
    assert taken_down(model) == before


def test_effective_kernel_is_measured_from_moves():
    """Its error is of second order in the length of the moves, as for central differences."""
    model, x = NETWORKS["wide"]()
    errors = [
        float((effective_kernel(model, x, step=step).reshape(15, 15) - torch.eye(15)).norm()) for step in (4e-3, 2e-3, 1e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(4.0, abs=0.2)
    assert errors[1] / errors[2] == pytest.approx(4.0, abs=0.2)


def test_effective_kernel_of_float32_networks():
    model, x = NETWORKS["one output"]()
    found = effective_kernel(model.float(), x.float(), step=1e-2)
    assert found.shape == (5, 1, 5, 1)
    assert found.dtype == torch.float64
    assert_close(found.reshape(5, 5), torch.eye(5).double(), 1e-2)


def test_arguments_of_the_effective_kernel():
    model, x = narrow()
    with pytest.raises(ValueError, match="`alpha` should be at least 0 and at most 1, but got 1.5"):
        effective_kernel(model, x, 1.5)
    for bad in (0.0, -1e-4, math.inf):
        with pytest.raises(ValueError, match="`step` should be at least 1e-300 and finite, but got"):
            effective_kernel(model, x, step=bad)
    cut = effective_kernel(*diagonal(1e-2), rank_rtol=0.1).reshape(2, 2)
    assert_close(cut, torch.diag(torch.tensor([1.0, 0.0])).double(), 1e-8)
