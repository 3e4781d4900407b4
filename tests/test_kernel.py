import pytest
import torch
from torch import nn

from torch_adapted_gd import memory, ntk
from torch_adapted_gd.jacobian.gram import gram

from .cases import dense_jacobian, make, mlp


@pytest.mark.parametrize("name", ["mlp_tanh", "cnn", "two_heads", "tied", "layer_norm", "batchnorm_eval", "old_style_function"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ntk_is_the_product_of_jacobians(name, dtype):
    model, x1 = make(name, dtype)
    x2 = torch.cat([torch.randn_like(x1), x1[:1]])
    first, second = dense_jacobian(model, x1), dense_jacobian(model, x2)
    q = first.shape[0] // len(x1)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for other, columns, got in ((first, len(x1), ntk(model, x1)), (second, len(x2), ntk(model, x1, x2, method="jacobian"))):
        expected = first @ other.T
        assert got.shape == (len(x1), q, columns, q)
        assert got.dtype == torch.float64
        error = (got.reshape(expected.shape) - expected).norm() / expected.norm()
        assert error < tolerance


@pytest.mark.parametrize("rows", [1, 5, 300, 700])
def test_gram_in_tiles_and_blocks(rows, monkeypatch):
    monkeypatch.setattr("torch_adapted_gd.jacobian.gram._CAST_ELEMENTS", 16 * rows)
    monkeypatch.setattr("torch_adapted_gd.jacobian.gram._LEAST_WIDTH", 1)
    a, b = torch.randn(rows, 50), torch.randn(7, 50)
    torch.testing.assert_close(gram(a), a.double() @ a.double().T, rtol=0, atol=1e-12)
    torch.testing.assert_close(gram(a, b), a.double() @ b.double().T, rtol=0, atol=1e-12)
    assert torch.equal(gram(a), gram(a).T)


def test_bad_arguments(monkeypatch):
    with pytest.raises(ValueError, match="`method` should be one of 'auto', 'structured', 'jacobian', but got 'fast'"):
        ntk(mlp(), torch.ones(1, 4), method="fast")
    with pytest.raises(TypeError, match="`model` should be a torch.nn.Module"):
        ntk(None, torch.ones(1, 4))
    for dtype in ("float64", torch.long):
        with pytest.raises(TypeError, match="`dtype` should be a floating torch dtype, but got"):
            ntk(mlp(), torch.ones(1, 4), dtype=dtype)
    monkeypatch.setattr(memory, "_ALWAYS_THERE", 0)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10_000)
    with pytest.raises(MemoryError, match="A kernel of 100 by 100 outputs in float64 needs .* grows with the square"):
        gram(torch.ones(100, 2))
    with pytest.raises(MemoryError, match="A Jacobian of"):
        ntk(nn.Linear(10, 10), torch.ones(100, 10), method="jacobian")


def test_the_batch_size_is_that_of_the_outputs():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, edges, x):
            return self.layer(x + x[edges[0]].mean(0))

    model, edges, x = Pairs().double(), torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.randn(6, 4).double()
    theta = ntk(model, (edges, x))
    d = dense_jacobian(model, edges, x)
    assert theta.shape == (6, 2, 6, 2)
    torch.testing.assert_close(theta.reshape(12, 12), d @ d.T)


@pytest.mark.parametrize("elements", [1, 300])
def test_embeddings_multiply_some_pairs_at_a_time(monkeypatch, elements):
    """Pairs of places with equal tokens may be more than memory holds."""
    monkeypatch.setattr("torch_adapted_gd.jacobian.tokens._ELEMENTS", elements)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(3000, 4), nn.Flatten(), nn.Linear(20, 2)).double()  # a small table is written out
    x, other = torch.randint(30, (12, 5)), torch.randint(30, (7, 5))
    first, second = (dense_jacobian(model, inputs) for inputs in (x, other))
    for found, expected in ((ntk(model, x), first @ first.T), (ntk(model, x, other), first @ second.T)):
        assert (found.flatten(2).flatten(0, 1) - expected).norm() <= 1e-12 * expected.norm()
