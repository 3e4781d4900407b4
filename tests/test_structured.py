"""The structured kernel against the dense float64 one, on the table of models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_adapted_gd import ntk
from torch_adapted_gd.jacobian import tangent_jacobian, written_if_small
from torch_adapted_gd.jacobian.blocks import SortedTerms
from torch_adapted_gd.jacobian.definition import recorded

from .cases import dense_jacobian, mlp
from .layers import LAYERS, draw

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def relative_error(model, x, **options):
    """Of the kernel, and of Dᵀu."""
    d = dense_jacobian(model, *x)
    call, names = recorded(model, x)
    jacobian = tangent_jacobian(model, [call], names, method="structured", **options)
    u = torch.randn(len(d), dtype=torch.float64)
    product = torch.cat(list(jacobian.rmv(u).values()))
    return max(
        float((got - expected).norm() / expected.norm()) for got, expected in ((jacobian.gram(), d @ d.T), (product, d.T @ u))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_kernel_and_products_are_those_of_the_dense_jacobian(name, dtype):
    build, shape = LAYERS[name]
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
        jacobian = tangent_jacobian(model, [call], names, **options)
        assert jacobian.description == "structured"
        assert jacobian.shape == first.shape
        u = torch.randn(5 * q, dtype=torch.float64)
        assert error(torch.cat(list(jacobian.rmv(u).values())), first.T @ u) <= TOLERANCE[dtype]
        v = torch.randn(first.shape[1], dtype=torch.float64)
        parts = dict(zip(names, v.split([model.get_parameter(name).numel() for name in names]), strict=True))
        typical = first.norm() * v.norm() / len(v) ** 0.5  # |Dv|, but for chance
        assert (jacobian.mv(parts) - first @ v).norm() <= TOLERANCE[dtype] * typical
        assert error(torch.cat(list(jacobian.rows(limit=1))), first) <= TOLERANCE[dtype]
        gram, products, square = jacobian.parameter_gram(torch.stack([u, -u], 1))
        assert error(gram, first.T @ first) <= TOLERANCE[dtype]
        assert error(products, torch.stack([first.T @ u, -first.T @ u], 1)) <= TOLERANCE[dtype]
        assert square == pytest.approx(float(first.square().sum()), rel=TOLERANCE[dtype])
    both = tangent_jacobian(model, [recorded(model, x)[0] for x in (x1, x2)], names, method="structured")
    stacked = torch.cat([first, second])
    assert error(both.gram(), stacked @ stacked.T) <= TOLERANCE[dtype]
    assert (both.mv(parts) - stacked @ v).norm() <= 2 * TOLERANCE[dtype] * typical
    u = torch.randn(8 * q, dtype=torch.float64)
    assert error(torch.cat(list(both.rmv(u).values())), stacked.T @ u) <= TOLERANCE[dtype]
    assert error(ntk(model, x1, dtype=torch.float32).reshape(5 * q, 5 * q), first @ first.T) <= 2e-6
    # The model and the random stream are as they were.
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.is_leaf for p in model.parameters())
    assert not torch.equal(state, torch.get_rng_state())  # u was drawn above, and nothing else
    torch.set_rng_state(state)


@pytest.mark.parametrize("method", ["structured", "jacobian"])
def test_gram_of_several_calls_in_blocks_and_weighed(method, monkeypatch):
    model = mlp().double()
    names = [name for name, _ in model.named_parameters()]
    x1, x2 = torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    d = torch.cat([dense_jacobian(model, x) for x in (x1, x2)])  # [24, K]
    root = torch.block_diag(*torch.randn(8, 3, 3, dtype=torch.float64))
    seen = []

    def weigh(rows, first):
        seen.append((first, len(rows)))
        part = slice(first, first + len(rows))
        return root[part, part].T @ rows

    for limit, blocks in ((2**22, [(0, 15), (15, 9)]), (1, [(3 * i, 3) for i in range(8)])):
        monkeypatch.setattr("torch_adapted_gd.jacobian.operator.ROWS_ELEMENTS", limit)  # D is kept or not
        calls = [recorded(model, x)[0] for x in (x1, x2)]
        seen.clear()
        v = torch.randn(24, 1, dtype=torch.float64)
        jacobian = written_if_small(tangent_jacobian(model, calls, names, method=method))
        gram, products, _ = jacobian.parameter_gram(v, weigh)
        weighed = root.T @ d
        torch.testing.assert_close(gram, weighed.T @ weighed)
        torch.testing.assert_close(products, d.T @ v)
        torch.testing.assert_close(torch.cat(list(jacobian.rmv(v[:, 0]).values())), d.T @ v[:, 0])
        assert seen == blocks


def test_a_gram_of_wrong_rows_is_found_out(monkeypatch):
    model = mlp().double()
    call, names = recorded(model, torch.randn(5, 4, dtype=torch.float64))
    rows = SortedTerms.rows
    monkeypatch.setattr(SortedTerms, "rows", lambda self, samples: [(name, 1.01 * part) for name, part in rows(self, samples)])
    with pytest.raises(RuntimeError, match=r"Dᵀu differs by"):
        tangent_jacobian(model, [call], names).parameter_gram(torch.zeros(15, 1, dtype=torch.float64))


class Overlapping(nn.Module):
    """Two views of one weight that share a row."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        return F.linear(torch.tanh(F.linear(x, self.weight[:3])), self.weight[2:, :3])


def test_views_that_overlap():
    model, x = Overlapping().double(), torch.randn(6, 4, dtype=torch.float64)
    assert relative_error(model, (x,)) <= 1e-12
