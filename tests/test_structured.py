"""The structured kernel against the dense float64 one, on the table of models."""

import pytest
import torch

from torch_adapted_gd import ntk
from torch_adapted_gd.jacobian import recorded
from torch_adapted_gd.kernel import tangent_kernel

from .cases import dense_jacobian
from .layers import LAYERS, draw

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def relative_error(model, x, **options):
    """Of the kernel, and of Dᵀu."""
    d = dense_jacobian(model, *x)
    call, names = recorded(model, x)
    kernel = tangent_kernel(model, [call], names, method="structured", **options)
    u = torch.randn(len(d), dtype=torch.float64)
    product = torch.cat(list(kernel.factors.transpose_product(u).values()))
    return max(
        float((got - expected).norm() / expected.norm()) for got, expected in ((kernel.theta, d @ d.T), (product, d.T @ u))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_kernel_and_products_are_those_of_the_dense_jacobian(name, dtype):
    build, shape, description = LAYERS[name]
    model = build().to(dtype)
    x1, x2 = draw(shape, 5, dtype), draw(shape, 3, dtype)
    first, second = dense_jacobian(model, *x1), dense_jacobian(model, *x2)
    q = len(first) // 5
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()

    def error(got, expected):
        return float((got - expected).norm() / expected.norm())

    for options in ({}, {"chunk_size": 1}, {"chunk_size": 2}):
        symmetric = ntk(model, x1, **options).reshape(5 * q, 5 * q)
        assert error(symmetric, first @ first.T) <= TOLERANCE[dtype]
        assert torch.equal(symmetric, symmetric.T)
        cross = ntk(model, x1, x2, **options).reshape(5 * q, 3 * q)
        assert error(cross, first @ second.T) <= TOLERANCE[dtype]
        call, names = recorded(model, x1)
        kernel = tangent_kernel(model, [call], names, **options)
        assert kernel.factors.description == description
        u = torch.randn(5 * q, dtype=torch.float64)
        assert error(torch.cat(list(kernel.factors.transpose_product(u).values())), first.T @ u) <= TOLERANCE[dtype]
    both = tangent_kernel(model, [recorded(model, x)[0] for x in (x1, x2)], names, method="structured")
    stacked = torch.cat([first, second])
    assert error(both.theta, stacked @ stacked.T) <= TOLERANCE[dtype]
    u = torch.randn(8 * q, dtype=torch.float64)
    assert error(torch.cat(list(both.factors.transpose_product(u).values())), stacked.T @ u) <= TOLERANCE[dtype]
    assert error(ntk(model, x1, dtype=torch.float32).reshape(5 * q, 5 * q), first @ first.T) <= 2e-6
    # The model and the random stream are as they were.
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.is_leaf for p in model.parameters())
    assert not torch.equal(state, torch.get_rng_state())  # u was drawn above, and nothing else
    torch.set_rng_state(state)
