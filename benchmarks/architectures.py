"""Models as people write them: those of torch, of libraries, and the same by hand, in the ways that are seen in the wild."""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from .networks import mlp

VOCABULARY = 2000


@dataclass(frozen=True)
class Model:
    """A model and its inputs.

    Attributes:
        build: Makes the model, in the mode in which it is trained.
        inputs: N → positional inputs of that many samples, from torch's generator.
        most: Samples are no more than these, where a step takes long.
        needs: The package that it comes from, if it is not torch.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    most: int | None = None
    needs: str | None = None


class OwnLinear(nn.Module):
    """A linear layer by somebody who did not know of nn.Linear."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs]`` → ``[N, outputs]``."""
        return x @ self.w + self.b


class EinsumMLP(nn.Module):
    """An MLP 784-256-256-10 with all parameters on the root."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(784, 256) / 28), nn.Parameter(torch.zeros(256))
        self.w2, self.b2 = nn.Parameter(torch.randn(256, 256) / 16), nn.Parameter(torch.zeros(256))
        self.w3, self.b3 = nn.Parameter(torch.randn(256, 10) / 16), nn.Parameter(torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 784]`` → ``[N, 10]``."""
        x = torch.tanh(torch.einsum("ni,ij->nj", x, self.w1) + self.b1)
        x = torch.tanh(torch.einsum("ni,ij->nj", x, self.w2) + self.b2)
        return torch.einsum("ni,ij->nj", x, self.w3) + self.b3


class Adapted(nn.Module):
    """y = W₀x + b₀ + BAx, a frozen layer with an adapter of low rank; B as after some training, since it begins as 0."""

    def __init__(self, layer: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs]`` → ``[N, outputs]``."""
        y: Tensor = self.layer(x) + self.up(self.down(x))
        return y


class EncoderClassifier(nn.Module):
    """Blocks of a transformer, the mean over positions, and a head."""

    def __init__(self, blocks: nn.Module, width: int = 64) -> None:
        super().__init__()
        self.blocks, self.head = blocks, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, width]`` → ``[N, 10]``."""
        logits: Tensor = self.head(self.blocks(x).mean(1))
        return logits


class AttentionByHand(nn.Module):
    """What nn.TransformerEncoderLayer does: attention, feedforward, dropout and a norm after each."""

    def __init__(self, width: int = 64, heads: int = 4, feedforward: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, width]`` → the same."""
        n, t, width = x.shape
        q = self.query(x).view(n, t, self.heads, -1).transpose(1, 2)  # [N, heads, T, width / heads]
        k = self.key(x).view(n, t, self.heads, -1).transpose(1, 2)
        v = self.value(x).view(n, t, self.heads, -1).transpose(1, 2)
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(width // self.heads), -1)
        mixed = (self.dropout(weights) @ v).transpose(1, 2).reshape(n, t, width)
        x = self.norm1(x + self.dropout(self.out(mixed)))
        y: Tensor = self.norm2(x + self.dropout(self.down(self.dropout(torch.relu(self.up(x))))))
        return y


class LSTMClassifier(nn.Module):
    """The last state of an LSTM, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 16]`` → ``[N, 10]``."""
        states, _ = self.lstm(x)
        logits: Tensor = self.head(states[:, -1])
        return logits


class PackedGRU(nn.Module):
    """The last state of a GRU for sequences that end at different times, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(16, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """``[N, T, 16]`` and lengths ``[N]`` → ``[N, 10]``."""
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, last = self.gru(packed)
        logits: Tensor = self.head(last[-1])
        return logits


class MeanOfEmbeddings(nn.Module):
    """Words without their order."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, T]`` → ``[N, 10]``."""
        logits: Tensor = self.head(self.embedding(tokens).mean(1))
        return logits


class ResidualBlock(nn.Module):
    """Two convolutions with GroupNorm beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(4, outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.GroupNorm(4, outputs)
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` → ``[N, outputs, H / stride, W / stride]``."""
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def group_norm_resnet() -> nn.Sequential:
    """A small ResNet for images of 1×28×28."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        ResidualBlock(16, 16, 1),
        ResidualBlock(16, 32, 2),
        ResidualBlock(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class UNet(nn.Module):
    """Two levels with skip connections, for 1×16×16; the image that it makes is pooled to 4×4."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def twice(inputs: int, outputs: int) -> nn.Sequential:
            first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
            return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

        self.down1, self.down2, self.middle = twice(1, width), twice(width, 2 * width), twice(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.after2, self.after1 = twice(4 * width, 2 * width), twice(2 * width, width)
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, 16, 16]`` → ``[N, 16]``."""
        first = self.down1(x)
        second = self.down2(nn.functional.max_pool2d(first, 2))
        x = self.middle(nn.functional.max_pool2d(second, 2))
        x = self.after2(torch.cat([self.up2(x), second], 1))
        x = self.after1(torch.cat([self.up1(x), first], 1))
        return nn.functional.avg_pool2d(self.last(x), 4).flatten(1)


def source(points: Tensor) -> Tensor:
    """The right side f of −Δu = f, whose solution is sin(πx) sin(πy)."""
    return 2 * math.pi**2 * (math.pi * points).sin().prod(1)


class ResidualByAutograd(nn.Module):
    """−Δu − f at points inside, u being an MLP 2-32-32-1 that is differentiated twice by autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2, 32, 32, 1)

    def forward(self, points: Tensor) -> Tensor:
        """``[N, 2]`` → ``[N, 1]``."""
        x = points.detach().requires_grad_()
        u = self.net(x)
        (slopes,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        laplacian = torch.zeros_like(u[:, 0])
        for i in range(2):
            laplacian = laplacian + torch.autograd.grad(slopes[:, i].sum(), x, create_graph=True)[0][:, i]
        return (-laplacian - source(points)).unsqueeze(1)


class ResidualByJets(nn.Module):
    """The same, with values, both first derivatives and the Laplacian carried through the layers, ``[N, 4, width]``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2, 32, 32, 1)

    def forward(self, points: Tensor) -> Tensor:
        """``[N, 2]`` → ``[N, 1]``."""
        slopes = torch.eye(2).to(points).expand(len(points), 2, 2)
        jet = torch.cat([points[:, None], slopes, torch.zeros_like(points)[:, None]], 1)
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                # The layer's image of 0 is its bias, which derivatives do not have.
                value, derivatives, bias = layer(torch.cat([jet, torch.zeros_like(jet[:, :1])], 1)).split([1, 3, 1], 1)
                jet = torch.cat([value, derivatives - bias], 1)
            else:
                value, first, second = jet.split([1, 2, 1], 1)
                t = torch.tanh(value)
                d = 1 - t**2
                jet = torch.cat([t, d * first, d * second - 2 * t * d * first.square().sum(1, keepdim=True)], 1)
        return -jet[:, 3] - source(points).unsqueeze(1)


class Logits(nn.Module):
    """A classifier of transformers as a function of tokens."""

    def __init__(self, name: str, **config: Any) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        classifier: nn.Module = getattr(transformers, f"{name}ForSequenceClassification")(
            getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, num_labels=10, pad_token_id=0, **config)
        )
        self.classifier = classifier

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, T]`` → ``[N, 10]``."""
        logits: Tensor = self.classifier(input_ids=tokens).logits
        return logits


def bert() -> nn.Module:
    """A tiny one."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return Logits("Bert", max_position_embeddings=32, **sizes)


def gpt2() -> nn.Module:
    """A tiny one."""
    return Logits("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=1)


def transformer() -> nn.Module:
    """Torch's own."""
    layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=128, batch_first=True)
    return EncoderClassifier(nn.TransformerEncoder(layer, 2))


def weight_normed() -> nn.Module:
    """An MLP 784-256-256-10 with lengths and directions of weights apart."""
    return nn.Sequential(*(weight_norm(layer) if isinstance(layer, nn.Linear) else layer for layer in mlp(784, 256, 256, 10)))


def adapters() -> nn.Module:
    """An MLP 784-256-256-10 that is frozen but for its adapters."""
    layers = mlp(784, 256, 256, 10)
    return nn.Sequential(*(Adapted(layer) if isinstance(layer, nn.Linear) else layer for layer in layers))


def normal(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Samples of normal random numbers."""
    return lambda n: (torch.randn(n, *shape),)


def tokens(length: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Samples of tokens; none is the first, which is padding."""
    return lambda n: (torch.randint(1, VOCABULARY, (n, length)),)


def sequences(n: int) -> tuple[Tensor, Tensor]:
    """Sequences, and how long each of them is."""
    return torch.randn(n, 28, 16), torch.randint(10, 29, (n,))


def points(n: int) -> tuple[Tensor, ...]:
    """4n points of the unit square."""
    return (torch.rand(4 * n, 2),)


def of_timm(name: str, **options: Any) -> Model:
    """A model of timm for images of 3×32×32, in eval mode, as BatchNorm needs it where samples should not interact."""

    def build() -> nn.Module:
        model: nn.Module = importlib.import_module("timm").create_model(name, pretrained=False, num_classes=10, **options)
        return model.eval()

    return Model(build, normal(3, 32, 32), most=4, needs="timm")


MODELS = {
    "MLP, nn.Linear": Model(lambda: mlp(784, 256, 256, 10), normal(784)),
    "MLP, own layers, x @ w + b": Model(
        lambda: nn.Sequential(OwnLinear(784, 256), nn.Tanh(), OwnLinear(256, 256), nn.Tanh(), OwnLinear(256, 10)), normal(784)
    ),
    "MLP, einsum on the root": Model(EinsumMLP, normal(784)),
    "MLP, weight_norm": Model(weight_normed, normal(784)),
    "MLP, frozen, adapters of rank 8": Model(adapters, normal(784)),
    "nn.TransformerEncoder": Model(transformer, normal(16, 64)),
    "transformer by hand": Model(
        lambda: EncoderClassifier(nn.Sequential(AttentionByHand(), AttentionByHand())), normal(16, 64)
    ),
    "nn.LSTM": Model(LSTMClassifier, normal(28, 16)),
    "nn.GRU, packed": Model(PackedGRU, sequences),
    "nn.Embedding, mean": Model(MeanOfEmbeddings, tokens(20)),
    "nn.EmbeddingBag": Model(lambda: nn.Sequential(nn.EmbeddingBag(VOCABULARY, 32), nn.Linear(32, 10)), tokens(20)),
    "ResNet, GroupNorm": Model(group_norm_resnet, normal(1, 28, 28)),
    "U-Net": Model(UNet, normal(1, 16, 16)),
    "PINN, autograd.grad": Model(ResidualByAutograd, points),
    "PINN, jets": Model(ResidualByJets, points),
    "timm resnet10t": of_timm("resnet10t"),
    "timm mobilenetv3_small_050": of_timm("mobilenetv3_small_050"),
    "timm convnext_atto": of_timm("convnext_atto"),
    "timm vit_tiny_patch16_224": of_timm("vit_tiny_patch16_224", img_size=32, patch_size=8),
    "timm edgenext_xx_small": of_timm("edgenext_xx_small"),
    "transformers BERT": Model(bert, tokens(16), needs="transformers"),
    "transformers GPT-2": Model(gpt2, tokens(16), needs="transformers"),
}
