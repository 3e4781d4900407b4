"""Weights made of parameters, as people write them."""

import math
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ..layers import tokens
from .parts import param, tanh_net


class SlicedWeight(nn.Module):
    """A network of which a narrower one is used, as in slimmable networks."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.v = param(5, 4), param(5), param(4, 6)

    def forward(self, x):
        h = torch.tanh(F.linear(x, self.w[:3], self.b[:3]))
        return F.linear(h, self.v[1:3, ::2])


class TransposedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = param(4, 3), param(3, 2)

    def forward(self, x):
        h = torch.tanh(F.linear(x, self.w.t()))
        h = torch.tanh(h @ self.w.T @ self.w)
        return F.linear(h, self.v.transpose(0, 1))


class TiedLogits(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.inner = nn.Embedding(7, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = torch.tanh(self.inner(self.emb(x))).mean(1)
        return (h @ self.emb.weight.t())[:, :3]


class ChunkedWeight(nn.Module):
    """Queries, keys and values in one parameter."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.out = param(9, 4), param(9), param(2, 3)

    def forward(self, x):  # [n, 3, 4]
        q, k, v = (F.linear(x, w, b) for w, b in zip(self.w.chunk(3), self.b.chunk(3), strict=True))
        attention = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(3), -1)
        return F.linear((attention @ v).mean(1), self.out)


class SplitWeight(nn.Module):
    """A GRU cell from one parameter for each side, split, and unbound biases."""

    def __init__(self):
        super().__init__()
        self.wx, self.wh, self.b = param(3, 9), param(3, 9), param(3, 3)

    def forward(self, x):  # [n, t, 3]
        h = torch.zeros_like(x[:, 0])
        br, bz, bn = self.b.unbind(0)
        for t in range(x.size(1)):
            xr, xz, xn = (x[:, t] @ self.wx).split(3, dim=-1)
            hr, hz, hn = h @ self.wh[:, :3], h @ self.wh[:, 3:6], h @ self.wh[:, 6:]
            r, z = torch.sigmoid(xr + hr + br), torch.sigmoid(xz + hz + bz)
            h = (1 - z) * torch.tanh(xn + r * hn + bn) + z * h
        return h


class FlatParameters(nn.Module):
    """All weights of a network in one vector."""

    shapes = ((4, 5), (5,), (5, 2), (2,))

    def __init__(self):
        super().__init__()
        self.theta = param(sum(math.prod(s) for s in self.shapes))

    def forward(self, x):
        parts, place = [], 0
        for shape in self.shapes:
            parts.append(self.theta[place : place + math.prod(shape)].view(shape))
            place += math.prod(shape)
        w1, b1, w2, b2 = parts
        return torch.tanh(x @ w1 + b1) @ w2 + b2


class HyperNetwork(nn.Module):
    """A network that makes the weights of another, the same for all samples."""

    def __init__(self):
        super().__init__()
        self.code, self.hyper, self.head = param(2), nn.Linear(2, 12), nn.Linear(3, 2)

    def forward(self, x):
        w = torch.tanh(self.hyper(self.code)).view(4, 3)
        return self.head(torch.tanh(x @ w))


class ConditionalHyperNetwork(nn.Module):
    """And another for each sample."""

    def __init__(self):
        super().__init__()
        self.hyper, self.base, self.head = tanh_net(4, 3, 8), param(4, 2), param(2)

    def forward(self, x, y):
        w = self.base + self.hyper(y).view(-1, 4, 2)
        return torch.tanh(torch.einsum("ni,nio->no", x, w)) * self.head


class ConcatenatedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.top, self.bottom = param(2, 4), param(3, 4)
        self.left, self.right = param(5), param(5)

    def forward(self, x):
        h = torch.tanh(F.linear(x, torch.cat([self.top, self.bottom])))
        return h @ torch.stack([self.left, self.right], dim=1)


class StandardizedConv(nn.Conv2d):
    """Weight standardization."""

    def forward(self, x):
        w = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        w = w / (w.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


def standardized():
    return nn.Sequential(StandardizedConv(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))


class MaskedLinear(nn.Linear):
    """Of MADE."""

    def __init__(self, inputs, outputs, mask):
        super().__init__(inputs, outputs)
        self.register_buffer("mask", mask)

    def forward(self, x):
        return F.linear(x, self.mask * self.weight, self.bias)


def made():
    first, second = torch.ones(5, 3).tril(), torch.ones(3, 5).tril(-1)
    return nn.Sequential(MaskedLinear(3, 5, first), nn.ReLU(), MaskedLinear(5, 3, second), nn.Sigmoid())


class PlainMask(nn.Module):
    """A mask that nobody registered: it stays in float32 and moves nowhere."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.head = param(5, 4), param(5), param(5, 2)
        self.mask = torch.ones(5, 4).tril()

    def forward(self, x):
        return torch.tanh(F.linear(x, self.w * self.mask, self.b)) @ self.head


class MergedAdapter(nn.Module):
    """A frozen weight and a low-rank correction of it."""

    def __init__(self, merged):
        super().__init__()
        self.merged = merged
        self.w0 = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.a, self.b, self.head = param(2, 4), param(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        if self.merged:
            h = F.linear(x, self.w0 + self.b @ self.a)
        else:
            h = F.linear(x, self.w0) + 0.5 * F.linear(F.linear(x, self.a), self.b)
        return self.head(torch.tanh(h))


class PositiveWeights(nn.Module):
    """A convex network: weights through softplus and exp, as log-scales are."""

    def __init__(self):
        super().__init__()
        self.w, self.raw, self.log_scale, self.skip = param(4, 4), param(4, 2), param(2), param(4, 2)

    def forward(self, x):
        h = F.softplus(x @ self.w)
        return h @ F.softplus(self.raw) * self.log_scale.exp() + x @ self.skip


class NormalizedClassifier(nn.Module):
    """Cosine logits: weights and features on the sphere."""

    def __init__(self):
        super().__init__()
        self.body, self.centres = nn.Linear(4, 3), param(3, 3)

    def forward(self, x):
        return 5 * F.linear(F.normalize(self.body(x)), F.normalize(self.centres))


class OldWeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.first = nn.utils.weight_norm(nn.Conv1d(1, 3, 2))
            self.second = nn.utils.weight_norm(nn.Linear(9, 2), dim=None)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).flatten(1))


def weight_normed_deep():
    return nn.Sequential(
        nn.Sequential(parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), nn.Tanh()),
        nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(9, 3)),
        nn.Tanh(),
        nn.Linear(3, 2),
    )


def spectral_normed_deep():
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Conv1d(2, 3, 2)),
        nn.LeakyReLU(),
        nn.Sequential(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(9, 3), n_power_iterations=2), nn.Tanh()),
        nn.Linear(3, 2),
    )


class OrthogonalRecurrence(nn.Module):
    """An orthogonal matrix applied at each time, and a wide one after it."""

    def __init__(self):
        super().__init__()
        self.inp, self.head = nn.Linear(2, 4), nn.Linear(3, 2)
        self.rec = parametrizations.orthogonal(nn.Linear(4, 4, bias=False), orthogonal_map="cayley")
        self.wide = parametrizations.orthogonal(nn.Linear(4, 3))

    def forward(self, x):  # [n, t, 2]
        h = torch.zeros(len(x), 4, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = torch.tanh(self.inp(x[:, t]) + self.rec(h))
        return self.head(torch.tanh(self.wide(h)))


class Symmetric(nn.Module):
    """A registered parametrization of one's own, on a root parameter."""

    class Mirror(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).transpose(-1, -2)

    def __init__(self):
        super().__init__()
        self.w, self.head = param(4, 4), param(4, 2)
        nn.utils.parametrize.register_parametrization(self, "w", self.Mirror())

    def forward(self, x):
        return torch.tanh(x @ self.w) @ self.head


MODELS = {
    "sliced_weight": (SlicedWeight, (4,)),
    "transposed_weight": (TransposedWeight, (4,)),
    "tied_logits": (TiedLogits, tokens),
    "chunked_weight": (ChunkedWeight, (3, 4)),
    "split_gru": (SplitWeight, (3, 3)),
    "flat_parameters": (FlatParameters, (4,)),
    "hypernetwork": (HyperNetwork, (4,)),
    "hypernetwork_by_sample": (ConditionalHyperNetwork, None),
    "concatenated_weights": (ConcatenatedWeights, (4,)),
    "weight_standardization": (standardized, (1, 3, 4)),
    "made": (made, (3,)),
    "masked_plain": (PlainMask, (4,)),
    "adapter_merged": (lambda: MergedAdapter(merged=True), (4,)),
    "adapter_unmerged": (lambda: MergedAdapter(merged=False), (4,)),
    "positive_weights": (PositiveWeights, (4,)),
    "cosine_logits": (NormalizedClassifier, (4,)),
    "weight_norm_old": (OldWeightNorm, (1, 4)),
    "weight_norm_deep": (weight_normed_deep, (2, 4)),
    "spectral_norm_deep": (spectral_normed_deep, (2, 4)),
    "orthogonal_recurrence": (OrthogonalRecurrence, (3, 2)),
    "symmetric": (Symmetric, (4,)),
}
