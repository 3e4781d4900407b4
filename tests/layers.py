"""Models for the structured kernel: every layer rule, every way of sharing, and what people build of them."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from .cases import Branching, LastState, OldStyle, Tied, TwoHeads, cnn, mlp, weight_normed
from .networks import Attention, ResidualBlock, UNet, VisionTransformer


class Then(nn.Module):
    """A layer, something that mixes its outputs, and a linear head on all of a sample."""

    def __init__(self, layer, features, before=None):
        super().__init__()
        self.before, self.layer, self.head = before or nn.Identity(), layer, nn.Linear(features, 3)

    def forward(self, *x):
        h = self.layer(self.before(*x))
        h = h[0] if isinstance(h, tuple) else h
        return self.head(torch.tanh(h).flatten(1))


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return self.scale * x


class Shift(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x + self.bias


class Recurrent(nn.Module):
    """One layer called several times, with an activation between."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x):
        for _ in range(3):
            x = self.norm(torch.tanh(self.inner(x)) + x)
        return self.head(x)


class TiedEmbedding(nn.Module):
    """A language model whose output layer has the embedding's weight: two rules for one parameter."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner, self.out = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        return self.out(torch.tanh(self.inner(self.embedding(tokens)).mean(1)))


class TiedLinears(nn.Module):
    """Two layers of different biases with one weight, at different numbers of places."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x)).mean(1)))


class Elsewhere(nn.Module):
    """A layer whose bias is also used by the model itself, beside a layer that is skipped and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.skipped, self.frozen = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(4, 5), nn.Linear(5, 5)
        self.frozen.requires_grad_(False)
        self.head.weight.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.frozen(self.body(x)) * self.body.bias))


class Positions(nn.Module):
    """An embedding of positions, computed once for all samples, and a parameter of the model's own."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places, self.head = nn.Embedding(7, 4), nn.Embedding(3, 4), nn.Linear(4, 2)
        self.start = nn.Parameter(torch.randn(4))

    def forward(self, tokens):
        h = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1])) + self.start
        return self.head(torch.tanh(h).sum(1))


class TimeFirst(nn.Module):
    """Samples in the second dimension, as recurrent layers have them by default; as many places as samples."""

    def __init__(self):
        super().__init__()
        self.inner, self.rnn, self.norm, self.head = nn.Linear(3, 4), nn.GRU(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)

    def forward(self, x):
        h, last = self.rnn(torch.tanh(self.inner(x.transpose(0, 1))))
        return self.head(torch.tanh(self.norm(h)).sum(0) + last[0])


class Patches(nn.Module):
    """Pieces of each sample taken for a batch of their own, samples first or last in it."""

    def __init__(self, minor):
        super().__init__()
        self.minor = minor
        self.conv, self.norm, self.act, self.head = nn.Conv1d(2, 3, 2), nn.GroupNorm(1, 3), nn.PReLU(3), nn.Linear(9, 2)

    def forward(self, x):  # [N, S, 2, 4]
        n, s = x.shape[:2]
        x = (x.transpose(0, 1) if self.minor else x).reshape(n * s, 2, 4)
        h = self.act(self.norm(self.conv(x)))
        h = h.reshape(s, n, -1).transpose(0, 1) if self.minor else h.reshape(n, s, -1)
        return self.head(torch.tanh(h).sum(1))


class InPlace(nn.Module):
    """Activations and additions in place, and a view of a layer's output."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = self.first(x)
        h[:, :3].mul_(2)
        h = F.relu(h, inplace=True)
        a, b = h.chunk(2, 1)
        z = self.second(a)
        z += b
        return self.head(z.tanh_())


class Checkpointed(nn.Module):
    """A part that is computed again in each backward pass, with the same dropout."""

    def __init__(self, p=0.0):
        super().__init__()
        self.p = p
        self.first, self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        def inner(h):
            return F.dropout(torch.tanh(self.inner(h)), self.p)

        return self.head(checkpoint(inner, torch.tanh(self.first(x)), use_reentrant=False))


class Siamese(nn.Module):
    """Two versions of each sample in one batch, all first versions before all second ones."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(4, 3), nn.Conv1d(1, 2, 2)

    def forward(self, x):
        z = self.conv(self.linear(torch.cat([x, x**2])).unsqueeze(1))
        a, b = z.chunk(2)
        return (a * b).flatten(1)


class Recursive(nn.Module):
    """A block, with weights of its own, that calls itself."""

    def __init__(self):
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x, depth=2):
        h = torch.tanh(self.layer(x) @ self.weight)
        return self(h, depth - 1) if depth else h


class Lists(nn.Module):
    """Weights in a list, which is a module that is never called, and weights that are partly inputs of others."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])
        self.hyper, self.head = nn.Linear(4, 8), nn.Linear(2, 2)

    def forward(self, x):
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return self.head((self.hyper(x).view(-1, 2, 4) @ x.unsqueeze(2)).squeeze(2))


class TwoInputs(nn.Module):
    """A module without a rule that takes two inputs, one of them by keyword."""

    def __init__(self):
        super().__init__()
        self.pair, self.head = nn.Bilinear(4, 4, 5), nn.Linear(5, 2)

    def forward(self, x, y):
        return self.head(torch.tanh(self.pair(torch.tanh(x), input2=y)))


def normed(layer, *shape):
    """A normalization with a weight, a bias and running averages that are not trivial, between linear layers."""
    for p in layer.parameters():
        nn.init.normal_(p)
    for name, b in layer.named_buffers():
        if "running" in name:
            b.uniform_(0.5, 2)
    return Then(layer, torch.Size(shape[1:]).numel())


def conv(cls, shape, *args, **kwargs):
    layer = cls(*args, **kwargs)
    return Then(layer, layer(torch.zeros(shape)).flatten(1).shape[1])


def spectral():
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2))


def orthogonal():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 2))


def tokens(n):
    return torch.randint(7, (n, 3))


# name -> (model, shape of a sample or what draws a batch)
LAYERS = {
    "linear": (mlp, (4,)),
    "linear_no_bias": (lambda: nn.Sequential(nn.Linear(4, 9, bias=False), nn.Tanh(), nn.Linear(9, 2, bias=False)), (4,)),
    "linear_on_sequences": (lambda: Then(nn.Linear(4, 5), 15), (3, 4)),
    "linear_wide_on_short_sequences": (lambda: Then(nn.Linear(40, 50), 100), (2, 40)),
    "linear_on_grids": (lambda: Then(nn.Linear(2, 3), 36), (3, 4, 2)),
    "conv1d": (lambda: conv(nn.Conv1d, (1, 2, 9), 2, 4, 3, stride=2, padding=2, dilation=2), (2, 9)),
    "conv2d": (lambda: conv(nn.Conv2d, (1, 2, 6, 5), 2, 3, (3, 2), stride=(1, 2), padding=(1, 0)), (2, 6, 5)),
    "conv2d_groups": (lambda: conv(nn.Conv2d, (1, 4, 5, 5), 4, 6, 3, groups=2, padding="same"), (4, 5, 5)),
    "conv2d_depthwise": (lambda: conv(nn.Conv2d, (1, 3, 5, 5), 3, 6, 3, groups=3, bias=False), (3, 5, 5)),
    "conv2d_circular": (lambda: conv(nn.Conv2d, (1, 1, 5, 4), 1, 2, 3, padding=(1, 2), padding_mode="circular"), (1, 5, 4)),
    "conv2d_replicate": (lambda: conv(nn.Conv2d, (1, 1, 5, 4), 1, 2, 3, padding="same", padding_mode="replicate"), (1, 5, 4)),
    "conv2d_one_place": (lambda: conv(nn.Conv2d, (1, 4, 3, 3), 4, 6, 3, groups=2), (4, 3, 3)),
    "conv3d": (lambda: conv(nn.Conv3d, (1, 1, 4, 3, 4), 1, 2, 2, padding=1, padding_mode="reflect"), (1, 4, 3, 4)),
    "conv_transpose1d": (
        lambda: conv(nn.ConvTranspose1d, (1, 3, 4), 3, 2, 3, stride=2, padding=2, output_padding=1, dilation=2),
        (3, 4),
    ),
    "conv_transpose2d": (
        lambda: conv(
            nn.ConvTranspose2d, (1, 4, 3, 2), 4, 6, (2, 3), stride=(3, 2), padding=(0, 1), output_padding=(1, 1), groups=2
        ),
        (4, 3, 2),
    ),
    "conv_transpose3d": (lambda: conv(nn.ConvTranspose3d, (1, 2, 2, 2, 2), 2, 1, 2, bias=False), (2, 2, 2, 2)),
    "embedding": (lambda: Then(nn.Embedding(7, 4), 12), tokens),
    "embedding_padding": (lambda: Then(nn.Embedding(7, 4, padding_idx=2), 12), tokens),
    "embedding_small": (lambda: Then(nn.Embedding(7, 1), 3), tokens),
    "layer_norm": (lambda: normed(nn.LayerNorm((3, 4)), 1, 2, 3, 4), (2, 3, 4)),
    "layer_norm_no_bias": (lambda: normed(nn.LayerNorm(4, bias=False), 1, 3, 4), (3, 4)),
    "rms_norm": (lambda: normed(nn.RMSNorm(4), 1, 3, 4), (3, 4)),
    "group_norm": (lambda: normed(nn.GroupNorm(2, 4), 1, 4, 5), (4, 5)),
    "instance_norm": (lambda: normed(nn.InstanceNorm2d(3, affine=True), 1, 3, 4, 2), (3, 4, 2)),
    "instance_norm_running": (
        lambda: normed(nn.InstanceNorm1d(3, affine=True, track_running_stats=True), 1, 3, 4).eval(),
        (3, 4),
    ),
    "batch_norm_eval": (lambda: normed(nn.BatchNorm1d(4), 1, 4).eval(), (4,)),
    "batch_norm2d_eval": (lambda: normed(nn.BatchNorm2d(3), 1, 3, 2, 2).eval(), (3, 2, 2)),
    "batch_norm_train_first": (lambda: normed(nn.BatchNorm1d(4), 1, 4), (4,)),
    "prelu": (lambda: Then(nn.PReLU(), 12, nn.Linear(4, 4)), (3, 4)),
    "prelu_channels": (lambda: Then(nn.PReLU(3), 12, nn.Conv1d(3, 3, 1)), (3, 4)),
    "scale_and_shift": (lambda: nn.Sequential(Scale(4), nn.Linear(4, 5), Shift(5), nn.Tanh(), Scale(5), Shift(5)), (4,)),
    "bilinear": (TwoInputs, None),
    "multihead_attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), (3, 4)),
    "lstm_classifier": (LastState, (5, 3)),
    "time_first": (TimeFirst, (5, 3)),
    "patches": (lambda: Patches(minor=False), (3, 2, 4)),
    "patches_minor": (lambda: Patches(minor=True), (3, 2, 4)),
    "called_three_times": (Recurrent, (4,)),
    "tied_linears": (TiedLinears, (3, 4)),
    "tied_embedding": (TiedEmbedding, tokens),
    "tied_autoencoder": (Tied, (5,)),
    "used_elsewhere": (Elsewhere, (4,)),
    "positions": (Positions, tokens),
    "weight_norm": (weight_normed, (4,)),
    "spectral_norm": (spectral, (4,)),
    "orthogonal": (orthogonal, (4,)),
    "in_place": (InPlace, (4,)),
    "two_heads": (TwoHeads, (4,)),
    "branching": (Branching, (3,)),
    "old_style_function": (OldStyle, (3,)),
    "cnn": (cnn, (1, 8, 8)),
    "residual_block": (lambda: ResidualBlock().eval(), (2, 6, 6)),
    "vision_transformer": (VisionTransformer, (1, 4, 4)),
    "u_net": (UNet, (1, 4, 4)),
    "checkpointed": (Checkpointed, (4,)),
    "siamese": (Siamese, (4,)),
    "recursive": (lambda: nn.Sequential(Recursive(), nn.Linear(4, 2)), (4,)),
    "lists": (Lists, (4,)),
    "embedding_bag": (lambda: Then(nn.EmbeddingBag(7, 4), 4), tokens),
    "attention": (Attention, (3, 4)),
}


def draw(shape, n, dtype):
    """A batch of n for a model of the table, as a tuple of positional inputs."""
    if shape is None:
        return torch.randn(n, 4, dtype=dtype), torch.randn(n, 4, dtype=dtype)
    return (shape(n) if callable(shape) else torch.randn(n, *shape, dtype=dtype),)
