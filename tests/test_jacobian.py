import numpy as np
import pytest
import torch
from torch import nn

from torch_adapted_gd import memory, output_jacobian
from torch_adapted_gd.jacobian.definition import METHODS, call_jacobian
from torch_adapted_gd.tracking.calls import record

from .cases import CASES, MaskedMean, cnn, dense_jacobian, make, mlp, pairwise


@pytest.mark.parametrize("name", CASES)
def test_auto_equals_the_oracle(name):
    model, x = make(name)
    expected = dense_jacobian(model, x)
    torch.testing.assert_close(output_jacobian(model, x), expected, rtol=0, atol=1e-13 * expected.abs().max().item())


@pytest.mark.parametrize("name", CASES)
def test_float32(name):
    model, x = make(name, torch.float32)
    matrix = output_jacobian(model, x)
    assert matrix.dtype == torch.float32
    expected = dense_jacobian(model, x, double="dropout" not in name)
    torch.testing.assert_close(matrix.double(), expected, rtol=0, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("name", "method", "chunk_size"),
    pairwise(["mlp_tanh", "cnn", "two_heads", "tied", "batchnorm_eval"], METHODS, [None, 1, 3, 1000]),
)
def test_methods_and_chunks_agree(name, method, chunk_size):
    model, x = make(name)
    expected = dense_jacobian(model, x)
    matrix = output_jacobian(model, x, method=method, chunk_size=chunk_size)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-13 * expected.abs().max().item())


def test_rows_are_sample_major_and_columns_follow_named_parameters():
    model = nn.Linear(2, 3, bias=True).double()
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    matrix = output_jacobian(model, x)
    for i in range(2):
        for q in range(3):
            row = torch.zeros(9, dtype=torch.float64)
            row[2 * q : 2 * q + 2] = x[i]  # weight row q
            row[6 + q] = 1  # bias q
            assert torch.equal(matrix[3 * i + q], row)


def test_frozen_parameters_have_no_columns():
    model, x = make("mlp_tanh")
    model[0].weight.requires_grad_(False)
    matrix = output_jacobian(model, x)
    assert matrix.shape[1] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(matrix, dense_jacobian(model, x))


def test_keyword_and_integer_inputs():
    model = MaskedMean().double()
    tokens, weights = torch.randint(7, (5, 3)), torch.rand(5, 3, dtype=torch.float64)
    call = record(model, (tokens,), {"weights": weights})
    matrix = call_jacobian(model, call, [n for n, _ in model.named_parameters()])
    torch.testing.assert_close(matrix, dense_jacobian(model, tokens, weights=weights))


@pytest.mark.parametrize("name", ["dropout", "batchnorm_train", "spectral_norm"])
def test_model_and_random_stream_are_left_alone(name):
    model, x = make(name)
    model[0].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    output_jacobian(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model._forward_hooks


def test_dropout_draws_the_mask_that_a_call_would_draw():
    model, x = make("dropout")
    state = torch.get_rng_state()
    matrix = output_jacobian(model, x)
    torch.set_rng_state(state)
    output = model(x)
    weight = torch.autograd.grad(output.sum(), model[2].weight)[0]  # its rows are the sum of masked activations
    torch.testing.assert_close(matrix[:, 45:63].sum(0).reshape(2, 9), weight)


def test_random_numbers_are_drawn_at_once_whatever_the_chunk():
    model = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, 2)).double()
    x = torch.randn(5, 4).double()
    expected = dense_jacobian(model, x)
    matrix = call_jacobian(model, record(model, (x,)), [n for n, _ in model.named_parameters()], chunk_size=2)
    torch.testing.assert_close(matrix, expected)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_parts_are_differentiated_as_eager_ones(method):
    compiled_calls = []

    def backend(graph, inputs):
        return lambda *args: compiled_calls.append(1) or graph(*args)

    model, x = make("mlp_tanh")
    expected = dense_jacobian(model, x)
    outer = nn.Sequential(torch.compile(model, backend=backend))
    call = record(outer, (x,))
    compiled_calls.clear()
    matrix = call_jacobian(outer, call, [n for n, _ in outer.named_parameters()], method=method)
    assert not compiled_calls
    torch.testing.assert_close(matrix, expected)
    torch.compiler.reset()


def test_numpy_randomness_is_refused_with_its_reason():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(x) * float(np.random.rand())  # noqa: NPY002, as users write it

    with pytest.raises(RuntimeError, match="could not be repeated with the same outputs.*no numpy"):
        output_jacobian(Noisy(), torch.randn(3, 2))


def test_bad_arguments():
    with pytest.raises(TypeError, match="`model` should be a torch.nn.Module, but got str"):
        output_jacobian("model", torch.ones(1))
    with pytest.raises(ValueError, match="`method` should be one of 'auto', 'rows', 'jacrev', but got 'fast'"):
        output_jacobian(mlp(), torch.ones(1, 4), method="fast")
    with pytest.raises(ValueError, match="`chunk_size` should be at least 1, but got 0"):
        output_jacobian(mlp(), torch.ones(1, 4), chunk_size=0)
    with pytest.raises(TypeError, match="`chunk_size` should be a whole number, but got 2.5"):
        output_jacobian(mlp(), torch.ones(1, 4), chunk_size=2.5)
    with pytest.raises(ValueError, match="should have trainable parameters, but none"):
        output_jacobian(nn.Tanh(), torch.ones(1, 4))
    with pytest.raises(ValueError, match="the batch as their first dimension, but those of the loss have shapes"):
        output_jacobian(nn.Sequential(mlp(), nn.Flatten(0), nn.Linear(3, 1), nn.Flatten(0), Squeeze()), torch.ones(1, 4))
    with pytest.raises(ValueError, match="should return floating tensors that depend on its parameters"):
        output_jacobian(nn.Sequential(mlp(), Argmax()), torch.ones(1, 4))


class Squeeze(nn.Module):
    def forward(self, x):
        return x.squeeze(0)


class Argmax(nn.Module):
    def forward(self, x):
        return x.argmax(-1)


def test_an_empty_batch_has_no_rows():
    assert output_jacobian(mlp(), torch.ones(0, 4)).shape == (0, 191)


def test_a_jacobian_that_cannot_fit_is_refused_before_it_is_made(monkeypatch):
    with pytest.raises(MemoryError, match=r"A Jacobian of 2,000,000 outputs by 200,100 parameters .* GB"):
        output_jacobian(nn.Linear(2000, 100), torch.ones(1, 1).expand(20000, 2000))
    monkeypatch.setattr(memory, "_ALWAYS_THERE", 0)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match="only 1e-06 GB are available on cpu. Use fewer samples"):
        output_jacobian(cnn(), torch.ones(4, 1, 8, 8))
