"""Blocks of Θ that are had without the whole, against the same of the dense kernel, on the table of models."""

import pytest
import torch
from torch import nn

from torch_adapted_gd.jacobian import tangent_jacobian
from torch_adapted_gd.jacobian.definition import recorded
from torch_adapted_gd.jacobian.dense import DenseJacobian
from torch_adapted_gd.jacobian.factored import FactoredJacobian

from .cases import cnn, dense_jacobian, mlp
from .layers import LAYERS, draw

NAMES = [
    "linear",
    "linear_on_sequences",
    "linear_wide_on_short_sequences",
    "conv2d",
    "conv2d_groups",
    "conv2d_depthwise",
    "conv2d_one_place",
    "conv_transpose1d",
    "conv_transpose2d",
    "embedding",
    "embedding_padding",
    "layer_norm",
    "batch_norm2d_eval",
    "prelu",
    "scale_and_shift",
    "bilinear",
    "multihead_attention",
    "lstm_classifier",
    "patches_minor",
    "called_three_times",
    "tied_linears",
    "tied_embedding",
    "tied_autoencoder",
    "used_elsewhere",
    "positions",
    "lists",
    "two_heads",
    "cnn",
    "residual_block",
    "vision_transformer",
    "u_net",
    "attention",
]


def error(got, expected):
    return float((got - expected).norm() / expected.norm())


def assert_blocks(model, batches, method="auto", chunk_size=None, dtype=torch.float64, tolerance=1e-12):
    """Both kinds of blocks are those of DDᵀ; returns the factors."""
    jacobians = [dense_jacobian(model, *x) for x in batches]
    records = [recorded(model, x) for x in batches]
    jacobian = tangent_jacobian(model, [call for call, _ in records], records[0][1], method=method, chunk_size=chunk_size)
    sizes = [len(x[0]) for x in batches]
    outputs = [len(d) // n for d, n in zip(jacobians, sizes, strict=True)]
    assert jacobian.shapes == list(zip(sizes, outputs, strict=True))
    blocks = jacobian.sample_blocks()
    for block, d, n, q in zip(blocks, jacobians, sizes, outputs, strict=True):
        by_sample = d.view(n, q, -1)
        assert block.dtype == torch.float64
        assert error(block, by_sample @ by_sample.mT) <= tolerance

    for numbers in [[i] for i in range(len(batches))] + ([list(range(len(batches)))] if len(set(outputs)) == 1 else []):
        q = outputs[numbers[0]]
        rotations = [torch.randn(sizes[i], q, q + 1, dtype=torch.float64) for i in numbers]  # more combinations than outputs
        rows = [
            torch.einsum("nqc,nqk->cnk", r, jacobians[i].view(sizes[i], q, -1)) for r, i in zip(rotations, numbers, strict=True)
        ]
        combined = torch.cat(rows, 1)  # [C, N, K]
        out = torch.full((q + 1, combined.shape[1], combined.shape[1]), 7.0, dtype=dtype)
        jacobian.output_blocks(rotations, numbers, out)
        assert error(out.triu().double(), (combined @ combined.mT).triu()) <= tolerance
    return jacobian


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_blocks_are_those_of_the_dense_kernel(name, chunk_size):
    build, shape = LAYERS[name]
    model = build().double()
    one = assert_blocks(model, [draw(shape, 5, torch.float64)], chunk_size=chunk_size)
    assert (len(one.chunks_of(0)) > 1) == (chunk_size is not None)
    assert_blocks(model, [draw(shape, 4, torch.float64), draw(shape, 3, torch.float64)], chunk_size=chunk_size)


@pytest.mark.parametrize("name", ["linear", "cnn", "batch_norm_train_first", "tied_autoencoder", "branching"])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_blocks_of_a_jacobian(name, chunk_size):
    build, shape = LAYERS[name]
    model = build().double()
    batches = [draw(shape, 4, torch.float64), draw(shape, 3, torch.float64)]
    assert isinstance(assert_blocks(model, batches, "jacobian", chunk_size), DenseJacobian)


@pytest.mark.parametrize("build", [lambda: mlp(), cnn], ids=["mlp", "cnn"])
def test_blocks_in_float32_of_float32_factors(build):
    shape = (4,) if build is not cnn else (1, 8, 8)
    assert_blocks(build(), [draw(shape, 6, torch.float32), draw(shape, 2, torch.float32)], dtype=torch.float32, tolerance=3e-6)


@pytest.mark.parametrize("name", ["linear", "linear_wide_on_short_sequences", "conv2d", "conv2d_one_place", "embedding"])
def test_blocks_in_small_pieces(name, monkeypatch):
    """Of samples, of tiles, of columns and of combinations."""
    monkeypatch.setattr("torch_adapted_gd.jacobian.diagonal.ROWS_ELEMENTS", 7)
    monkeypatch.setattr("torch_adapted_gd.jacobian.diagonal._TILE_ROWS", 2)
    monkeypatch.setattr(FactoredJacobian, "combinations_at_once", lambda self: 2)
    build, shape = LAYERS[name]
    assert_blocks(build().double(), [draw(shape, 5, torch.float64), draw(shape, 3, torch.float64)], chunk_size=2)


@pytest.mark.parametrize("sizes", [(30, 20, 3), (2, 3, 3)])
def test_layers_written_out_and_factored(sizes):
    assert_blocks(mlp(sizes=sizes).double(), [draw(sizes[:1], 9, torch.float64)])


def test_calls_with_different_outputs():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 3)

        def forward(self, x):
            return torch.tanh(self.layer(x.unsqueeze(2))).sum(2)  # [N, width of the input]

    inputs = [(torch.randn(n, q, dtype=torch.float64),) for n, q in ((4, 5), (3, 2))]
    assert_blocks(Wide().double(), inputs)


def test_outputs_held_are_not_changed():
    """Chunks that are held give the same blocks twice, and Θ as before."""
    model = mlp().double()
    call, names = recorded(model, torch.randn(5, 4, dtype=torch.float64))
    jacobian = tangent_jacobian(model, [call], names)
    before = jacobian.gram()
    rotation = torch.randn(5, 3, 2, dtype=torch.float64)
    found = []
    for _ in range(2):
        out = torch.empty(2, 5, 5, dtype=torch.float64)
        jacobian.output_blocks([rotation], [0], out)
        found.append((jacobian.sample_blocks()[0], out.triu()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(jacobian.gram(), before)
