"""The networks that kernels are measured on."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network, its batch, and what an implementation in JAX needs to know to build the same.

    Attributes:
        build: Makes the network.
        shape: Of a sample.
        batch: N.
        layers: ``("dense", units)``, ``("conv", channels)`` (3×3, same padding), ``"tanh"``, ``"relu"``, ``"pool"`` (average by
            2) and ``"flatten"``; None where nobody has written it in JAX.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    layers: tuple[str | tuple[str, int], ...] | None = None

    def batch_of_inputs(self) -> Tensor:
        """Normal random numbers, the same each time."""
        return torch.randn(self.batch, *self.shape, generator=torch.Generator().manual_seed(0))


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with tanh between."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def cnn(*channels: int) -> nn.Sequential:
    """3×3 convolutions with ReLU and average pooling by 2 after each, and a linear layer to 10 outputs, for 28×28 images."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    side = 28 // 2 ** (len(channels) - 1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side**2, 10))


class VisionTransformer(nn.Module):
    """16 patches of 7×7, two pre-norm blocks of width 64 with 4 heads written from linear layers, mean over patches."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 2 * width),
                    "down": nn.Linear(2 * width, width),
                }
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, 1, 28, 28]`` → ``[N, 10]``."""
        x = self.patches(x).flatten(2).transpose(1, 2)  # [N, T, width]
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            q, k, v = block["qkv"](block["norm1"](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = torch.softmax(q @ k.transpose(2, 3) / q.shape[3] ** 0.5, 3) @ v
            x = x + block["out"](mixed.transpose(1, 2).flatten(2))
            x = x + block["down"](torch.nn.functional.gelu(block["up"](block["norm2"](x))))
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def _dense(*units: int) -> tuple[str | tuple[str, int], ...]:
    layers: list[str | tuple[str, int]] = []
    for unit in units:
        layers += [("dense", unit), "tanh"]
    return tuple(layers[:-1])


def _convolutions(*channels: int) -> tuple[str | tuple[str, int], ...]:
    layers: list[str | tuple[str, int]] = []
    for channel in channels:
        layers += [("conv", channel), "relu", "pool"]
    return (*layers, "flatten", ("dense", 10))


CASES = {
    "MLP 784-256-256-10": Case(lambda: mlp(784, 256, 256, 10), (784,), 64, _dense(256, 256, 10)),
    "MLP 784-256-256-10, large batch": Case(lambda: mlp(784, 256, 256, 10), (784,), 256, _dense(256, 256, 10)),
    "MLP 784-(128 x 6)-10": Case(lambda: mlp(784, *[128] * 6, 10), (784,), 64, _dense(*[128] * 6, 10)),
    "CNN 1-16-32": Case(lambda: cnn(1, 16, 32), (1, 28, 28), 64, _convolutions(16, 32)),
    "CNN 1-64-128": Case(lambda: cnn(1, 64, 128), (1, 28, 28), 32, _convolutions(64, 128)),
    "ViT, 2 blocks of width 64": Case(VisionTransformer, (1, 28, 28), 32),
}
