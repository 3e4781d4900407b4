"""Tiny models written the way people write their own: parameters used in operations, rather than in modules that own them."""

import itertools
import math
import warnings

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .layers import tokens


def param(*shape):
    return nn.Parameter(torch.randn(*shape))


def tanh_net(*sizes):
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


# Linear maps by hand


class Dense(nn.Module):
    """The linear layer that everybody writes first."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.w, self.b = param(inputs, outputs), param(outputs)

    def forward(self, x):
        return x @ self.w + self.b


class AddMM(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.v, self.c = param(4, 5), param(5), param(5, 2), param(2)

    def forward(self, x):
        h = torch.tanh(torch.addmm(self.b, x, self.w))
        return torch.addmm(self.c, h, self.v, beta=0.5, alpha=2.0)


class RootMatrices(nn.Module):
    """A network without layers."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1 = param(6, 4), param(6)
        self.w2, self.b2 = param(2, 6), param(2)

    def forward(self, x):
        h = torch.relu(F.linear(x, self.w1, self.b1))
        return F.linear(h, self.w2) + self.b2


class EinsumRows(nn.Module):
    """Einsum on samples, with the weight as it is and transposed."""

    def __init__(self):
        super().__init__()
        self.first, self.second = param(4, 5), param(2, 5)

    def forward(self, x):
        h = torch.tanh(torch.einsum("ni,io->no", x, self.first))
        return torch.einsum("bi,oi->bo", h, self.second)


class EinsumTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.heads, self.out = param(4, 3), param(3, 2, 2), param(2, 2, 2)

    def forward(self, x):  # [n, t, 4]
        h = torch.tanh(torch.einsum("nti,io->nto", x, self.w))
        h = torch.einsum("nti,ihd->nhtd", h, self.heads).tanh().mean(2)
        return torch.einsum("nhd,hdk->nk", h, self.out)


class EinsumEllipsis(nn.Module):
    """The weight as first operand, an ellipsis, and two parameters in one equation."""

    def __init__(self):
        super().__init__()
        self.w, self.a, self.b = param(3, 4), param(3, 2), param(2, 2)

    def forward(self, x):
        h = torch.sin(torch.einsum("oi,...i->...o", self.w, x))
        return torch.einsum("nti,ir,ro->no", h, self.a, self.b)


class EinsumCapitals(nn.Module):
    """Indices named as those of the paper."""

    def __init__(self):
        super().__init__()
        self.w, self.out = param(4, 3), param(3, 2)

    def forward(self, x):  # [n, t, 4]
        return torch.einsum("NQ,QZ->NZ", torch.tanh(torch.einsum("NTZ,ZQ->NTQ", x, self.w)).mean(1), self.out)


class ProductsByKeyword(nn.Module):
    """Products whose second operand is given by its keyword."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.out = param(4, 3), param(3), param(3)

    def forward(self, x):
        h = torch.tanh(torch.mm(x, mat2=self.w) + torch.addmm(self.b, x, mat2=self.w))
        return torch.stack([torch.mv(h, vec=self.out), torch.matmul(h, other=self.out)], 1)


class Mixer(nn.Module):
    """MLP-Mixer: a parameter from the left mixes tokens."""

    def __init__(self):
        super().__init__()
        self.mix, self.unmix = param(5, 3), param(3, 5)
        self.channels, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):  # [n, 3, 4]
        x = x + self.unmix @ F.gelu(self.mix @ x)
        x = x + torch.tanh(self.channels(x))
        return self.head(x.mean(1))


class MatmulLeft(nn.Module):
    """Samples in columns."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.v = param(5, 4), param(5, 1), param(2, 5)

    def forward(self, x):
        h = torch.tanh(torch.matmul(self.w, x.t()) + self.b)
        return torch.mm(self.v, h).t()


class ExpandedBMM(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.v = param(4, 3), param(3), param(3, 2)

    def forward(self, x):  # [n, 3, 4]
        h = torch.tanh(torch.bmm(x, self.w.unsqueeze(0).expand(x.shape[0], -1, -1)) + self.b)
        return torch.bmm(h, self.v.repeat(len(x), 1, 1)).sum(1)


class Heads(nn.Module):
    """A matrix for each head, by broadcasting."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.v = param(2, 4, 3), param(2, 1, 3), param(2, 3, 2)

    def forward(self, x):
        h = x[:, None, None, :].expand(-1, 2, -1, -1)  # [n, h, 1, i]
        h = torch.tanh(h @ self.w + self.b)
        return (h @ self.v).sum(1).squeeze(1)


class BaddBMM(nn.Module):
    """An ensemble: networks in the batch dimension, samples in the next."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.v, self.c = param(3, 4, 4), param(3, 1, 4), param(3, 4, 1), param(3, 1, 1)

    def forward(self, x):
        h = torch.tanh(torch.baddbmm(self.b, x.expand(3, -1, -1), self.w))
        return torch.baddbmm(self.c, h, self.v).squeeze(-1).t()


class TensorDot(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = param(3, 4, 5), param(5, 2)

    def forward(self, x):  # [n, 3, 4]
        h = torch.tanh(torch.tensordot(x, self.w, dims=([1, 2], [0, 1])))
        return torch.tensordot(h, self.v, dims=1)


class FunctionalBilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.v = param(3, 4, 4), param(3), param(3, 2)

    def forward(self, x, y):
        return torch.tanh(F.bilinear(x, torch.sin(y), self.w, self.b)) @ self.v


class Score(nn.Module):
    """A vector as weight: one output for each sample, in one dimension."""

    def __init__(self):
        super().__init__()
        self.w, self.v, self.c = param(4, 5), param(5), nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return torch.tanh(x @ self.w) @ self.v + self.c


class MatrixVector(nn.Module):
    """mv, inner products by sum, dot products with a vector and outer ones of it."""

    def __init__(self):
        super().__init__()
        self.w, self.u, self.v = param(4, 3), param(3), param(3)

    def forward(self, x):
        h = torch.sigmoid(torch.mm(x, self.w))
        return torch.stack([torch.mv(h, self.u), (h * self.v).sum(-1), torch.inner(h, self.u * self.v)], 1)


class Outer(nn.Module):
    """A scalar feature spread over a vector: rank one."""

    def __init__(self):
        super().__init__()
        self.u, self.v, self.head = param(4), param(3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(torch.outer(x @ self.u, self.v)))


# Weights made of parameters


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


# Containers and sharing


class ParameterLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([param(4, 4), param(4, 3), param(3, 2)])
        self.biases = nn.ParameterList([param(4), param(3), param(2)])

    def forward(self, x):
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ w + b
            x = torch.tanh(x) if i < 2 else x
        return x


class ParameterDicts(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.ParameterDict({"in": param(4, 3), "out": param(3, 2), "shift": param(3)})

    def forward(self, x):
        return torch.sin(x @ self.p["in"] + self.p["shift"]) @ self.p["out"]


class TwoPlaces(nn.Module):
    """One layer on all places of a sample, and again on their mean."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):  # [n, 3, 4]
        h = torch.tanh(self.layer(x))
        return self.head(torch.tanh(self.layer(h.mean(1))) * h[:, 0])


class SharedMatrix(nn.Module):
    """One parameter as weight from the right, from the left, transposed, and as a bias."""

    def __init__(self):
        super().__init__()
        self.w = param(3, 3)

    def forward(self, x):  # [n, 3, 3]
        h = torch.tanh(x @ self.w)
        h = torch.tanh(self.w @ h + self.w)
        return F.linear(h, self.w).sum(1)


class SubmoduleWeight(nn.Module):
    """A layer that is never called: only its parameters are used."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = torch.tanh(x @ self.first.weight.mT + self.first.bias)
        return h @ self.second.weight.mT + self.second.bias


class InnerCall(nn.Module):
    """An inner module called with parameters that are computed from its own."""

    def __init__(self):
        super().__init__()
        self.net, self.log_scale = tanh_net(4, 3, 2), param(1)

    def forward(self, x):
        scale = self.log_scale.exp()
        scaled = {name: p * scale if p.ndim == 2 else p for name, p in self.net.named_parameters()}
        return functional_call(self.net, scaled, (x,))


# Gates, scales and activations


class SigmoidGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.layer = param(4), nn.Linear(4, 3)

    def forward(self, x):
        return torch.tanh(self.layer(torch.sigmoid(self.gate) * x))


class ReZero(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.ModuleList([tanh_net(3, 4, 3) for _ in range(2)])
        self.alpha = nn.ParameterList([nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.zeros(1))])

    def forward(self, x):
        for alpha, f in zip(self.alpha, self.f, strict=True):
            x = x + alpha * f(x)
        return x


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp, self.gamma, self.head = nn.LayerNorm(3), tanh_net(3, 4, 3), param(3), nn.Linear(3, 2)

    def forward(self, x):  # [n, 2, 3]
        return self.head(torch.tanh(x + self.mlp(self.norm(x)).mul(self.gamma)).mean(1))


class GLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.head = param(4, 6), param(6), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(F.glu(x @ self.w + self.b, dim=-1))


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(3, 4, bias=False) for _ in range(3))
        self.out = nn.Linear(4, 2, bias=False)

    def forward(self, x):
        return self.out(F.silu(self.w1(x)) * self.w2(x) * torch.sigmoid(self.w3(x)))


class OwnPReLU(nn.Module):
    """Slopes by torch.where, and a threshold that moves."""

    def __init__(self):
        super().__init__()
        self.w, self.slope, self.cut, self.head = param(4, 4), param(4), param(1), param(4, 2)

    def forward(self, x):
        h = x @ self.w
        h = torch.where(h > 0, h, self.slope * h)
        h = torch.maximum(h, -self.cut.exp())
        return h @ self.head


class LearnedSwish(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.beta, self.head = nn.Linear(4, 3), nn.Parameter(torch.ones(1)), nn.Linear(3, 2)

    def forward(self, x):
        x = self.layer(x)
        return self.head(x * torch.sigmoid(self.beta * x))


class Snake(nn.Module):
    """An activation with a frequency, divided by it again."""

    def __init__(self):
        super().__init__()
        self.w, self.a, self.head = param(4, 3), nn.Parameter(torch.rand(3) + 0.5), param(3, 2)

    def forward(self, x):
        h = x @ self.w
        return (h + torch.sin(self.a * h).square() / self.a) @ self.head


class Rational(nn.Module):
    """A Padé activation: coefficients as entries of parameters."""

    def __init__(self):
        super().__init__()
        self.layer, self.p, self.q, self.head = nn.Linear(4, 3), param(3), param(2), nn.Linear(3, 2)

    def forward(self, x):
        x = self.layer(x)
        top = self.p[0] + self.p[1] * x + self.p[2] * x**2
        return self.head(top / (1 + (self.q[0] * x).abs() + self.q[1].square() * x.pow(2)))


class Power(nn.Module):
    """A parameter as exponent: generalized-mean pooling."""

    def __init__(self):
        super().__init__()
        self.layer, self.p, self.head = nn.Linear(4, 3), nn.Parameter(torch.tensor(2.5)), nn.Linear(3, 2)

    def forward(self, x):  # [n, 3, 4]
        h = F.softplus(self.layer(x)).clamp(min=1e-3)
        return self.head(h.pow(self.p).mean(1).pow(1 / self.p))


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.t = nn.Linear(4, 3), nn.Parameter(torch.tensor([1.7]))

    def forward(self, x):
        return torch.softmax(self.layer(x) / self.t, -1)


class LogitScale(nn.Module):
    """CLIP: two towers, and logits scaled by an exponential."""

    def __init__(self):
        super().__init__()
        self.image, self.text, self.s = nn.Linear(4, 3), nn.Linear(4, 3), nn.Parameter(torch.tensor(0.4))

    def forward(self, x, y):
        a, b = F.normalize(self.image(x), dim=-1), F.normalize(self.text(y), dim=-1)
        logits = a * b
        return logits * self.s.exp()


# Normalizations


class OwnLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.gain, self.bias, self.head = nn.Linear(4, 5), param(5), param(5), nn.Linear(5, 2)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return self.head(torch.tanh(self.gain * (x - mean) / torch.sqrt(var + 1e-5) + self.bias))


class OwnRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.head = param(4), nn.Linear(4, 2)

    def forward(self, x):  # [n, 3, 4]
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)
        return self.head(torch.tanh(x)).prod(1)


class FunctionalNorms(nn.Module):
    """F.layer_norm and F.group_norm with parameters of the model's own."""

    def __init__(self):
        super().__init__()
        self.g1, self.b1, self.g2, self.b2, self.head = param(4), param(4), param(2), param(2), nn.Linear(8, 2)

    def forward(self, x):  # [n, 2, 4]
        x = torch.tanh(F.layer_norm(x, (4,), self.g1, self.b1))
        x = F.group_norm(x, 2, self.g2, self.b2)
        return self.head(torch.tanh(x).flatten(1))


class FiLM(nn.Module):
    """Scale and shift from a condition, on normed features."""

    def __init__(self):
        super().__init__()
        self.film, self.layer, self.head = nn.Linear(4, 6), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x, condition):
        gamma, beta = self.film(condition).chunk(2, dim=-1)
        h = F.layer_norm(self.layer(x), (3,))
        return self.head(torch.tanh((1 + gamma) * h + beta))


class SqueezeExcitation(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(1, 3, 2), nn.Linear(3, 2), nn.Linear(2, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        x = self.conv(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return self.head(torch.tanh(x * gate[:, :, None, None]).amax((2, 3)))


# Positions, embeddings and tables


class PositionParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos, self.layer = param(1, 5, 4), nn.Linear(4, 2)

    def forward(self, x):  # [n, 3, 4]
        x = x + self.pos[:, : x.shape[1]]
        return torch.tanh(self.layer(x)).sum(1)


class ClassToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls, self.sep, self.q, self.k, self.head = param(1, 1, 4), param(4), param(4, 3), param(4, 3), nn.Linear(4, 2)

    def forward(self, x):  # [n, 2, 4]
        last = self.sep.repeat(x.size(0), 1, 1)
        h = torch.cat([self.cls.expand(len(x), -1, -1), x, last], dim=1)
        attention = torch.softmax((h @ self.q) @ (h @ self.k).mT, -1)
        return self.head(torch.tanh(attention @ h))[:, 0]


class IndexedTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = param(7, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.table[x]).prod(1))


class OneHotTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.head = param(7, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = F.one_hot(x, 7).to(self.w.dtype) @ self.w
        return self.head(torch.tanh(h.cumsum(1)).sum(1))


class Places(nn.Module):
    """Embeddings of tokens and of positions, both by the functional."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.head = param(7, 3), param(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = F.embedding(x, self.words) + F.embedding(torch.arange(x.shape[1], device=x.device), self.places)
        return self.head(torch.tanh(h).mean(1))


class Gathered(nn.Module):
    """Entries of a table by gather, rows of one by index_select, and by take_along_dim."""

    def __init__(self):
        super().__init__()
        self.table, self.rows, self.more, self.head = param(7), param(7, 3), param(3, 7), nn.Linear(3, 2)

    def forward(self, x):  # [n, 3] integers
        entries = torch.gather(self.table.expand(len(x), -1), 1, x)
        rows = torch.index_select(self.rows, 0, x[:, 0])
        more = torch.take_along_dim(self.more, x.t(), 1).t()
        return self.head(torch.tanh(entries * rows + more))


class Bag(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 3, mode=mode, padding_idx=0), tanh_net(3, 3, 2)

    def forward(self, x):
        return self.head(self.bag(x))


class RaggedBag(nn.Module):
    """Sets of different sizes in one dimension, told apart by where they start."""

    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 3), tanh_net(3, 3, 2)

    def forward(self, x):  # [n, 3] integers, of which the first says how many count
        sizes = 1 + x[:, 0] % 3
        flat = torch.cat([row[:size] for row, size in zip(x, sizes.tolist(), strict=True)])
        return self.head(self.bag(flat, sizes.cumsum(0) - sizes))


class WeightedBag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 3, mode="sum"), tanh_net(3, 3, 2)

    def forward(self, x):
        weights = torch.softmax(-x.to(self.bag.weight.dtype), 1)
        return self.head(self.bag(x, per_sample_weights=weights))


class PairTable(nn.Module):
    """Entries of a table of pairs, by two indices."""

    def __init__(self):
        super().__init__()
        self.table, self.head = param(7, 7, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.table[x[:, 0], x[:, 1]] * self.table[x[:, 1], x[:, 2]]))


class Ratings(nn.Module):
    """Matrix factorization: users, items, and their biases."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(7, 3), nn.Embedding(7, 3)
        self.user_bias, self.item_bias, self.mean = nn.Embedding(7, 1), param(7), nn.Parameter(torch.zeros(()))

    def forward(self, x):  # [n, 3] integers
        user, item = x[:, 0], x[:, 1]
        score = (self.users(user) * self.items(item)).sum(-1)
        return score + self.user_bias(user).squeeze(-1) + self.item_bias[item] + self.mean


# Attention and transformers


class RelativeBias(nn.Module):
    """Swin's: a bias for each distance, added to the logits of attention."""

    def __init__(self):
        super().__init__()
        self.qkv, self.bias, self.head = nn.Linear(4, 12), param(5, 2), nn.Linear(4, 2)
        place = torch.arange(3)
        self.register_buffer("index", place[:, None] - place[None, :] + 2)

    def forward(self, x):  # [n, 3, 4]
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-2, -1) + self.bias[self.index].permute(2, 0, 1)
        h = (logits.softmax(-1) @ v).transpose(1, 2).reshape(n, t, c)
        return self.head(h.mean(1))


class FusedAttention(nn.Module):
    """scaled_dot_product_attention, causal, and with a parameter in its mask."""

    def __init__(self):
        super().__init__()
        self.w, self.bias, self.head = param(4, 12), param(3, 3), param(4, 2)

    def forward(self, x):  # [n, 3, 4]
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in (x @ self.w).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        b = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return (a + torch.tanh(b)).transpose(1, 2).flatten(2).mean(1) @ self.head


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):  # [n, 3, 4]
        return self.head(torch.tanh(x + self.attn(x, x, x, need_weights=False)[0])).sum(1)


class CrossAttention(nn.Module):
    """Queries, keys and values of three widths, and learned queries."""

    def __init__(self):
        super().__init__()
        self.queries = param(2, 4)
        self.attn, self.head = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):  # [n, 3, 5]
        queries = self.queries.unsqueeze(0).expand(len(x), -1, -1)
        h, _ = self.attn(queries, x[..., :3], x[..., 3:])
        return self.head(torch.tanh(h).flatten(1))


class SequenceFirstAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 2)

    def forward(self, x):  # [n, 3, 4]
        x = x.transpose(0, 1)
        h, weights = self.attn(x, x, x)
        return self.head(h[0]) + weights[:, 0, :2]


class Encoder(nn.Module):
    """Two blocks in training mode, without dropout."""

    def __init__(self):
        super().__init__()
        block = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(block, 2), nn.Linear(4, 2)

    def forward(self, x):  # [n, 3, 4]
        return self.head(self.encoder(x).mean(1))


class CausalEncoder(nn.Module):
    """A language model: tokens first, a causal mask, norms before."""

    def __init__(self):
        super().__init__()
        self.emb, self.pos = nn.Embedding(7, 4), param(3, 1, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.0, activation="gelu", norm_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(self.pos.dtype)
        h = self.block(self.emb(x.t()) + self.pos, src_mask=mask, is_causal=True)
        return self.head(h[-1])


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, dim_feedforward=5, dropout=0.0, batch_first=True)
        self.start, self.head = param(1, 2, 4), nn.Linear(4, 2)

    def forward(self, memory):  # [n, 3, 4]
        return self.head(self.layer(self.start.expand(len(memory), -1, -1), memory)[:, -1])


# Recurrent networks


class DeepLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 3, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):  # [n, 3, 3]
        h, (last, _) = self.lstm(x)
        return self.head(h[:, -1]) + last[-1, :, :2]


class LearnedStart(nn.Module):
    """A GRU with a first state of its own."""

    def __init__(self):
        super().__init__()
        self.start, self.gru, self.head = param(1, 1, 3), nn.GRU(3, 3), nn.Linear(3, 2)

    def forward(self, x):  # [n, 3, 3]
        _, last = self.gru(x.transpose(0, 1), self.start.expand(-1, len(x), -1).contiguous())
        return self.head(last.squeeze(0))


class Elman(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.RNN(3, 4, nonlinearity="relu", batch_first=True), nn.Linear(4, 2)

    def forward(self, x):  # [n, 3, 3]
        return self.head(torch.tanh(self.rnn(x)[0]).mean(1))


class PackedLSTM(nn.Module):
    """Samples of different lengths, longest first."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):  # [n, 4, 3]
        lengths = [max(1, x.shape[1] - i) for i in range(len(x))]
        h, (last, _) = self.lstm(pack_padded_sequence(x, lengths, batch_first=True))
        h, _ = pad_packed_sequence(h, batch_first=True)
        return self.head(torch.tanh(h).sum(1)) * last[0, :, :1]


class CellLoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 3), nn.Linear(3, 2)

    def forward(self, x):  # [n, 3, 3]
        h, c = x.new_zeros(len(x), 3), x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return self.head(h)


class KeptState(nn.Module):
    """The state is an attribute, and is there when the next call starts again."""

    def __init__(self):
        super().__init__()
        self.inp, self.w, self.head = nn.Linear(3, 3), param(3, 3), nn.Linear(3, 2)
        self.state = None

    def step(self, x):
        self.state = torch.tanh(self.inp(x) + self.state @ self.w)

    def forward(self, x):  # [n, 3, 3]
        self.state = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            self.step(x[:, t])
        return self.head(self.state)


class NeuralODE(nn.Module):
    """One field at every stage of a Runge-Kutta method, with a learned step."""

    def __init__(self):
        super().__init__()
        self.field, self.dt = tanh_net(3, 4, 3), nn.Parameter(torch.tensor(0.2))

    def forward(self, x):
        for _ in range(2):
            k1 = self.field(x)
            k2 = self.field(x + 0.5 * self.dt * k1)
            x = x + self.dt * k2
        return x


class StateSpace(nn.Module):
    """A diagonal state-space model: powers of one vector, by a loop over time."""

    def __init__(self):
        super().__init__()
        self.log_a, self.b, self.c, self.d = param(3), param(3), param(3, 2), param(2)

    def forward(self, u):  # [n, 5]
        a, state = torch.exp(-self.log_a.exp()), 0
        for t in range(u.shape[1]):
            state = a * state + u[:, t : t + 1] * self.b
        return state @ self.c + self.d * u[:, -1:]


# Convolutions


class OwnConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.v = param(3, 1, 2, 2), param(3), param(2, 3, 2, 3)

    def forward(self, x):  # [n, 1, 3, 4]
        h = torch.tanh(F.conv2d(x, self.w, self.b))
        return F.conv2d(h, self.v).flatten(1)


class DepthwiseConv(nn.Module):
    """A kernel for all channels by expansion, one for each by groups, and one to go back up."""

    def __init__(self):
        super().__init__()
        self.blur, self.each, self.up, self.head = param(3), param(2, 1, 2), param(2, 1, 2), nn.Linear(6, 2)

    def forward(self, x):  # [n, 2, 6]
        x = F.conv1d(x, self.blur.view(1, 1, 3).expand(2, -1, -1), groups=2)
        x = torch.tanh(F.conv1d(torch.tanh(x), self.each, stride=2, groups=2))
        return self.head(torch.tanh(F.conv_transpose1d(x, self.up, stride=3, output_padding=1)).flatten(1))


class Unfolded(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.head = param(4, 3), param(3), nn.Linear(3, 2)

    def forward(self, x):  # [n, 1, 3, 4]
        columns = F.unfold(x, 2).transpose(1, 2)
        return self.head(torch.tanh(columns.matmul(self.w) + self.b).mean(1))


class LocallyConnected(nn.Module):
    """A kernel for each place."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.head = param(3, 2, 3), param(3, 2), nn.Linear(6, 2)

    def forward(self, x):  # [n, 5]
        patches = x.unfold(1, 3, 1)  # [n, 3, 3]
        h = (patches[:, :, None, :] * self.w[None]).sum(-1) + self.b
        return self.head(torch.tanh(h).flatten(1))


class SpectralConv(nn.Module):
    """A Fourier neural operator, whose weights are real and imaginary parts."""

    def __init__(self):
        super().__init__()
        self.lift, self.skip, self.out = nn.Linear(1, 2), nn.Conv1d(2, 2, 1), nn.Linear(2, 1)
        self.re, self.im = param(2, 2, 2), param(2, 2, 2)

    def forward(self, x):  # [n, 6]
        h = self.lift(x.unsqueeze(-1)).transpose(1, 2)
        spectrum = torch.fft.rfft(h)
        low = torch.einsum("bix,iox->box", spectrum[..., :2], torch.complex(self.re, self.im))
        spectrum = F.pad(low, (0, spectrum.shape[-1] - 2))
        h = torch.tanh(torch.fft.irfft(spectrum, n=x.shape[1]) + self.skip(h))
        return self.out(h.transpose(1, 2)).squeeze(-1)[:, ::2]


class GlobalFilter(nn.Module):
    """The same with view_as_complex, as GFNet has it, on all frequencies."""

    def __init__(self):
        super().__init__()
        self.filter, self.head = param(3, 2, 2), nn.Linear(2, 2)

    def forward(self, x):  # [n, 4, 2]
        spectrum = torch.fft.rfft(x, dim=1) * torch.view_as_complex(self.filter)
        return self.head(torch.tanh(torch.fft.irfft(spectrum, n=4, dim=1)).mean(1))


class Graph(nn.Module):
    """A graph convolution with fixed edges."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.b = param(3, 4), param(4, 2), param(2)
        self.register_buffer("adj", torch.softmax(torch.randn(4, 4), 1))

    def forward(self, x):  # [n, 4, 3]
        h = torch.relu(self.adj @ x @ self.w1)
        return (self.adj @ h @ self.w2 + self.b).amax(1)


class GraphAttention(nn.Module):
    """Edges listed by index, messages scattered with index_add."""

    def __init__(self):
        super().__init__()
        self.w, self.a, self.head = param(3, 3), param(6), nn.Linear(3, 2)
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]]))

    def forward(self, x):  # [n, 4, 3]
        h = x @ self.w
        source, target = self.edges
        pairs = torch.cat([h[:, source], h[:, target]], -1)
        messages = torch.sigmoid(pairs @ self.a).unsqueeze(-1) * h[:, source]
        return self.head(torch.tanh(torch.zeros_like(h).index_add(1, target, messages)).sum(1))


# Features and mixtures


class RBF(nn.Module):
    def __init__(self):
        super().__init__()
        self.centres, self.b, self.head = param(5, 3), nn.Parameter(torch.rand(5)), nn.Linear(5, 2)

    def forward(self, x):
        distances = (x[:, None, :] - self.centres[None, :, :]).pow(2).sum(-1)
        return self.head(torch.exp(-self.b * distances))


class Prototypes(nn.Module):
    """The same by cdist, to points in a learned space."""

    def __init__(self):
        super().__init__()
        self.body, self.centres, self.b = nn.Linear(4, 3), param(3, 3), nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return torch.exp(-self.b * torch.cdist(self.body(x), self.centres) ** 2)


class KAN(nn.Module):
    """Coefficients of basis functions on each edge."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.scale = param(3, 3, 4), param(3, 2, 4), param(3, 2)

    def basis(self, x):
        return torch.stack([torch.tanh(x) ** k for k in range(4)], -1)

    def forward(self, x):
        h = torch.einsum("nik,iok->no", self.basis(x), self.c1)
        return torch.einsum("nik,iok->no", self.basis(h), self.c2) + F.silu(h) @ self.scale


class FourierFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.phase, self.head = param(3, 3), param(3), nn.Linear(6, 2)

    def forward(self, x):
        angles = 2 * math.pi * 0.3 * x @ self.w
        return self.head(torch.cat([torch.sin(angles), torch.cos(angles + self.phase)], -1))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.w1, self.b1, self.w2 = nn.Linear(3, 2), param(2, 3, 4), param(2, 4), param(2, 4, 2)

    def forward(self, x):
        gate = torch.softmax(self.gate(x), -1)
        h = torch.tanh(torch.einsum("ni,eio->neo", x, self.w1) + self.b1)
        return torch.einsum("ne,neo->no", gate, torch.einsum("neo,eoq->neq", h, self.w2))


class RoutedExperts(nn.Module):
    """Each expert on the samples that are sent to it, which are put back by index."""

    def __init__(self):
        super().__init__()
        self.experts, self.scale = nn.ModuleList([tanh_net(3, 3, 2) for _ in range(2)]), param(2)

    def forward(self, x):
        choice = (x[:, 0] > 0).long()
        out = torch.zeros(len(x), 2, dtype=x.dtype)
        for i, expert in enumerate(self.experts):
            rows = torch.where(choice == i)[0]
            out[rows] = expert(x[rows]) * self.scale[i]
        return out


class DeepONet(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch, self.trunk, self.b = tanh_net(4, 3, 3), tanh_net(4, 3, 3), nn.Parameter(torch.zeros(1))

    def forward(self, u, y):
        return torch.sum(self.branch(u) * torch.tanh(self.trunk(y)), dim=1, keepdim=True) + self.b


class OperatorGrid(nn.Module):
    """A DeepONet whose points are the same for all samples: the trunk has no samples."""

    def __init__(self):
        super().__init__()
        self.branch, self.trunk, self.b = tanh_net(4, 3, 3), tanh_net(1, 3, 3), param(1)
        self.register_buffer("grid", torch.linspace(0, 1, 3).unsqueeze(1))

    def forward(self, u):
        return torch.einsum("np,gp->ng", self.branch(u), torch.tanh(self.trunk(self.grid))) + self.b


class SiamesePair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.w = tanh_net(4, 3, 3), param(3)

    def forward(self, x, y):
        a, b = self.net(torch.cat([x, y], dim=0)).chunk(2, dim=0)
        return torch.sigmoid((a - b).abs() * self.w)


class DeepSets(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.pooled, self.b, self.head = param(3, 4), param(3, 4), param(4), nn.Linear(4, 2)

    def forward(self, x):  # [n, 3, 3]
        h = torch.tanh(x @ self.w + x.amax(1, keepdim=True) @ self.pooled + self.b)
        return self.head(torch.logsumexp(h, 1))


class Coupling(nn.Module):
    """RealNVP: halves that scale and shift each other, and an affine layer of its own."""

    def __init__(self):
        super().__init__()
        self.log_scale, self.shift = param(4), param(4)
        self.nets = nn.ModuleList([tanh_net(2, 3, 4) for _ in range(2)])

    def forward(self, x):
        x = x * torch.exp(self.log_scale) + self.shift
        log_det = self.log_scale.sum().expand(len(x))
        a, b = x.split(2, dim=1)
        for net in self.nets:
            s, t = net(a).chunk(2, 1)
            a, b = b * torch.exp(torch.tanh(s)) + t, a
            log_det = log_det + torch.tanh(s).sum(1)
        return torch.stack([a.square().sum(1), b.square().sum(1), log_det], 1)


class Mixture(nn.Module):
    """Log-densities of a mixture of Gaussians: nothing but parameters."""

    def __init__(self):
        super().__init__()
        self.logits, self.means, self.log_std = param(3), param(3, 2), nn.Parameter(0.3 * torch.randn(3, 2))

    def forward(self, x):  # [n, 2]
        z = (x.unsqueeze(1) - self.means) / self.log_std.exp()
        log_p = (-0.5 * z**2 - self.log_std).sum(-1)
        return torch.logsumexp(F.log_softmax(self.logits, 0) + log_p, dim=1)


class Ordinal(nn.Module):
    """Ordered thresholds by cumulative sums."""

    def __init__(self):
        super().__init__()
        self.w, self.gaps = param(4, 1), param(3)

    def forward(self, x):
        return torch.sigmoid(x @ self.w - torch.cumsum(F.softplus(self.gaps), 0))


# Inputs from within


class Reparametrized(nn.Module):
    """A variational autoencoder's noise, from torch's random stream, and noise that goes through a layer."""

    def __init__(self):
        super().__init__()
        self.code, self.noise, self.decode = nn.Linear(4, 6), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        mean, log_var = self.code(x).chunk(2, -1)
        z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
        return self.decode(torch.tanh(z + self.noise(torch.randn(len(x), 3, dtype=x.dtype))))


class NumpyNoise(nn.Module):
    """Noise from elsewhere, the same in each call."""

    def __init__(self):
        super().__init__()
        self.layer, self.noise, self.head = nn.Linear(4, 3), param(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        z = torch.from_numpy(np.random.default_rng(0).normal(size=(len(x), 3))).to(x)
        return self.head(torch.tanh(self.layer(x) + z @ self.noise))


class InnerGrid(nn.Module):
    """A trunk on a grid that is made in each call, the same for all samples."""

    def __init__(self):
        super().__init__()
        self.branch, self.trunk, self.b = tanh_net(4, 3, 3), nn.ModuleList([Dense(1, 3), Dense(3, 3)]), param(1)

    def forward(self, u):
        t = torch.linspace(0, 1, 3, dtype=u.dtype, device=u.device).unsqueeze(1)
        for layer in self.trunk:
            t = torch.tanh(layer(t))
        return self.branch(u) @ t.T + self.b


class Times(nn.Module):
    """As many times as samples, each with its own: a layer on a grid has the samples, though no input went into it."""

    def __init__(self):
        super().__init__()
        self.time, self.layer, self.head = nn.Linear(1, 3), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        t = torch.linspace(0, 1, len(x), dtype=x.dtype)
        return self.head(torch.sin(self.time(t[:, None])) * torch.tanh(self.layer(x)))


# In place


class InPlaceBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.s, self.v = param(4, 3), param(3), param(3), param(3, 2)

    def forward(self, x):
        h = x @ self.w
        h += self.b
        h = torch.sin(h)
        h.mul_(self.s).add_(self.b, alpha=0.5)
        return torch.tanh(h) @ self.v


class SetItem(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.first, self.last, self.head = nn.Linear(4, 4), param(1), param(2), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        h = h.clone()
        h[:, 0] = self.first
        h[:, 2:] *= self.last
        return self.head(torch.sin(h * h.sum(1, keepdim=True)))


class FilledSlices(nn.Module):
    """A result that is made empty and filled column by column."""

    def __init__(self):
        super().__init__()
        self.w, self.v, self.c = param(4, 2), nn.Linear(4, 1), param(1)

    def forward(self, x):
        out = torch.empty(len(x), 3, dtype=x.dtype, device=x.device)
        out[:, :1] = torch.tanh(x @ self.w[:, :1])
        out[:, 1:2] = self.v(x).sin()
        out[:, 2] = self.c * (x @ self.w[:, 1])
        return out * out.sum(1, keepdim=True)


class SequenceBuffer(nn.Module):
    """The same along time, each step from the one before."""

    def __init__(self):
        super().__init__()
        self.start, self.w, self.u = param(3), param(3, 3), param(3, 3)

    def forward(self, x):  # [n, 3, 3]
        states = x.new_zeros(x.shape[1] + 1, len(x), 3)
        states[0] = self.start
        for t in range(x.shape[1]):
            states[t + 1] = torch.tanh(x[:, t] @ self.u + states[t].clone() @ self.w)
        return states[-1]


# Derivatives of networks


def gradient(u, x):
    return torch.autograd.grad(u, x, grad_outputs=torch.ones_like(u), create_graph=True)[0]


class SecondDerivative(nn.Module):
    """Poisson's equation in one dimension, with a hard boundary condition."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(1, 4, 3, 1)

    def forward(self, x):
        x = x.clone().requires_grad_(True)
        u = x * (1 - x) * self.net(x)
        return gradient(gradient(u, x), x) + torch.sin(math.pi * x)


class SourceTerm(nn.Module):
    """The residual of Poisson's equation and nothing else: the last bias has no part in it."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(1, 4, 3, 1)

    def forward(self, x):
        x = x.clone().requires_grad_(True)
        return gradient(gradient(self.net(x), x), x) - x.exp()


class Laplacian(nn.Module):
    """In two dimensions, of points in one tensor, derivative by derivative."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 4, 4, 1)

    def forward(self, x):
        x.requires_grad_(True)
        u = self.net(x)
        du = gradient(u, x)
        u_xx = gradient(du[:, 0:1], x)[:, 0:1]
        u_yy = gradient(du[:, 1:2], x)[:, 1:2]
        return torch.cat([u_xx + u_yy, u], 1)


class Residual(nn.Module):
    """Burgers' equation: coordinates in tensors of their own, concatenated again, and weights by hand."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1, self.w2 = param(2, 4), param(4), param(4, 1)

    def u(self, x, t):
        return torch.tanh(torch.cat([x, t], dim=1) @ self.w1 + self.b1) @ self.w2

    def forward(self, points):
        x = points[:, 0:1].clone().requires_grad_()
        t = points[:, 1:2].clone().requires_grad_()
        u = self.u(x, t)
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        u_xx = torch.autograd.grad(u_x.sum(), x, create_graph=True)[0]
        return (u_t + u * u_x - 0.1 * u_xx).squeeze(-1)


class Beam(nn.Module):
    """A fourth derivative."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(1, 4, 1)

    def forward(self, x):
        x = x.detach().requires_grad_()
        u = self.net(x)
        u_2 = gradient(gradient(u, x), x)
        return torch.cat([u, u_2, gradient(gradient(u_2, x), x)], 1)


class NavierStokes(nn.Module):
    """Velocity from a stream function, a pressure, and a viscosity: Q = 3."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 4, 2)

    def forward(self, points):
        points = points.detach().clone().requires_grad_()
        psi, p = self.net(points).split(1, dim=1)
        psi_x, psi_y = gradient(psi, points).split(1, dim=1)
        u, v = psi_y, -psi_x
        (u_x, u_y), (v_x, v_y) = gradient(u, points).split(1, 1), gradient(v, points).split(1, 1)
        u_xx, u_yy = gradient(u_x, points)[:, :1], gradient(u_y, points)[:, 1:]
        v_xx, v_yy = gradient(v_x, points)[:, :1], gradient(v_y, points)[:, 1:]
        p_x, p_y = gradient(p, points).split(1, 1)
        f = u * u_x + v * u_y + p_x - 0.1 * (u_xx + u_yy)
        g = u * v_x + v * v_y + p_y - 0.1 * (v_xx + v_yy)
        return torch.cat([f, g, p], 1)


class Periodic(nn.Module):
    """The same network at the two ends, and its derivatives there."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 4, 1)

    def forward(self, x):
        left = x.detach().requires_grad_()
        right = (x.detach() + 1).requires_grad_()
        u, v = self.net(left), self.net(right)
        return torch.cat([u - v, gradient(u, left) - gradient(v, right)], 1)


class InsideAndBoundary(nn.Module):
    """Points of two kinds in one call of the network: rows of the residual, then rows of boundary values."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(4, 3, 1)

    def forward(self, inside, boundary):
        x = torch.cat([inside, boundary]).requires_grad_()
        u = self.net(x)
        du = gradient(u, x)
        u_xx = sum(gradient(du[:, i], x)[:, i] for i in range(2))
        return torch.cat([u_xx[: len(inside)], 10 * u[len(inside) :, 0]]).unsqueeze(1)


class InsideThenBoundary(nn.Module):
    """The same with the network called twice, and the kinds told apart by their place in the batch."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 4, 1)

    def forward(self, x):
        inside, boundary = x[:-2].clone().requires_grad_(), x[-2:]
        u = self.net(inside)
        u_x, u_y = gradient(u, inside).split(1, dim=1)
        return torch.cat([u_x + gradient(u_y, inside)[:, 1:] - u**2, self.net(boundary)])


class InverseProblem(nn.Module):
    """A coefficient of the equation is a parameter too."""

    def __init__(self):
        super().__init__()
        self.net, self.nu, self.log_k = tanh_net(2, 4, 1), nn.Parameter(torch.tensor(0.7)), param(1)

    def forward(self, x):
        x = x.detach().requires_grad_()
        u = self.net(x)
        u_x = gradient(u, x)
        u_xx = gradient(u_x[:, :1], x)[:, :1]
        return torch.cat([u_x[:, 1:] - self.nu * u_xx + self.log_k.exp() * u, u], 1)


class NormedSolution(nn.Module):
    """A second derivative through LayerNorm."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))
        nn.init.normal_(self.net[1].weight)

    def forward(self, x):
        x = x.detach().requires_grad_()
        u = self.net(x)
        du = gradient(u, x)
        return torch.cat([gradient(du[:, :1], x)[:, :1] - du[:, 1:], u], 1)


class AdaptiveSlopes(nn.Module):
    """Learned slopes within activations, and layers by hand."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Dense(1, 4), Dense(4, 3), Dense(3, 1)])
        self.a, self.slopes = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.rand(3) + 0.5)

    def forward(self, x):
        x = x.detach().requires_grad_()
        h = torch.tanh(10 * self.a * self.layers[0](x))
        h = torch.tanh(self.slopes * self.layers[1](h))
        u = self.layers[2](h)
        return gradient(gradient(u, x), x) + u**3


class EnergyForces(nn.Module):
    """Forces as the gradient of an energy, by sample."""

    def __init__(self):
        super().__init__()
        self.centres, self.log_width, self.w = param(4, 3), param(4), param(4)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            d = (x[:, None] - self.centres).square().sum(-1)
            energy = torch.exp(-d / (1 + self.log_width.exp())) @ self.w
            return -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


class Hamiltonian(nn.Module):
    """A field by torch.func.grad and vmap of an energy of one point, closing over the module."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 4, 1)

    def forward(self, x):
        q, p = vmap(torch.func.grad(lambda z: self.net(z).squeeze()))(x).unbind(1)
        return torch.stack([p, -q], 1)


class HessianOfCall(nn.Module):
    """The Laplacian by torch.func.hessian of functional_call under vmap."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 4, 1)

    def forward(self, x):
        params = dict(self.net.named_parameters())

        def u(params, point):
            return functional_call(self.net, params, (point,)).squeeze(-1)

        laplacian = vmap(lambda point: hessian(u, argnums=1)(params, point).diagonal().sum())
        return torch.stack([laplacian(x), vmap(u, in_dims=(None, 0))(params, x)], 1)


class HessianOfClosure(nn.Module):
    """The same of a closure, with weights by hand."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.v = param(4, 2), param(4), param(4)

    def u(self, point):
        return self.v @ torch.tanh(self.w @ point + self.b)

    def forward(self, x):
        return vmap(lambda point: torch.trace(hessian(self.u)(point)))(x).unsqueeze(1)


class JacobianRows(nn.Module):
    """The Laplacian by jacrev of jacrev under vmap, and a divergence."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 3, 2)

    def forward(self, x):
        first = vmap(jacrev(self.net))(x)  # [n, 2, 2]
        second = vmap(jacrev(jacrev(self.net)))(x)  # [n, 2, 2, 2]
        return torch.stack([first.diagonal(dim1=1, dim2=2).sum(1), second[:, 0].diagonal(dim1=1, dim2=2).sum(1)], 1)


class ForwardDerivatives(nn.Module):
    """Second derivatives by jvp of jvp, along each coordinate."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 4, 1)

    def forward(self, x):
        def along(i):
            v = torch.zeros_like(x)
            v[:, i] = 1
            return jvp(lambda y: jvp(self.net, (y,), (v,))[1], (x,), (v,))[1]

        return torch.cat([along(0) + along(1), jvp(self.net, (x,), (x,))[0]], 1)


# name -> (model, shape of a sample or what draws a batch, None for two inputs [n, 4])
WRITTEN = {
    # linear maps by hand
    "own_dense": (lambda: nn.Sequential(Dense(4, 5), nn.Tanh(), Dense(5, 2)), (4,)),
    "addmm": (AddMM, (4,)),
    "root_matrices": (RootMatrices, (4,)),
    "einsum_rows": (EinsumRows, (4,)),
    "einsum_tokens": (EinsumTokens, (3, 4)),
    "einsum_ellipsis": (EinsumEllipsis, (2, 4)),
    "einsum_capitals": (EinsumCapitals, (3, 4)),
    "products_by_keyword": (ProductsByKeyword, (4,)),
    "mixer": (Mixer, (3, 4)),
    "matmul_left": (MatmulLeft, (4,)),
    "bmm_expanded": (ExpandedBMM, (3, 4)),
    "heads_broadcast": (Heads, (4,)),
    "baddbmm_ensemble": (BaddBMM, (4,)),
    "tensordot": (TensorDot, (3, 4)),
    "vector_weight": (Score, (4,)),
    "matrix_vector": (MatrixVector, (4,)),
    "outer": (Outer, (4,)),
    # weights made of parameters
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
    # containers and sharing
    "parameter_list": (ParameterLists, (4,)),
    "parameter_dict": (ParameterDicts, (4,)),
    "two_places": (TwoPlaces, (3, 4)),
    "shared_matrix": (SharedMatrix, (3, 3)),
    "layers_not_called": (SubmoduleWeight, (4,)),
    "inner_functional_call": (InnerCall, (4,)),
    # gates, scales and activations
    "sigmoid_gate": (SigmoidGate, (4,)),
    "rezero": (ReZero, (3,)),
    "layer_scale": (LayerScale, (2, 3)),
    "glu": (GLU, (4,)),
    "swiglu": (SwiGLU, (3,)),
    "own_prelu": (OwnPReLU, (4,)),
    "learned_swish": (LearnedSwish, (4,)),
    "snake": (Snake, (4,)),
    "rational": (Rational, (4,)),
    "learned_power": (Power, (3, 4)),
    "temperature": (Temperature, (4,)),
    "logit_scale": (LogitScale, None),
    # normalizations
    "own_layer_norm": (OwnLayerNorm, (4,)),
    "own_rms_norm": (OwnRMSNorm, (3, 4)),
    "functional_norms": (FunctionalNorms, (2, 4)),
    "film": (FiLM, None),
    "squeeze_excitation": (SqueezeExcitation, (1, 3, 4)),
    # positions, embeddings and tables
    "position_parameter": (PositionParameter, (3, 4)),
    "class_token": (ClassToken, (2, 4)),
    "indexed_table": (IndexedTable, tokens),
    "one_hot_table": (OneHotTable, tokens),
    "functional_embeddings": (Places, tokens),
    "gathered": (Gathered, tokens),
    "bag_mean": (lambda: Bag("mean"), tokens),
    "bag_sum": (lambda: Bag("sum"), tokens),
    "bag_weighted": (WeightedBag, tokens),
    "bag_ragged": (RaggedBag, tokens),
    "ratings": (Ratings, tokens),
    # attention and transformers
    "relative_bias": (RelativeBias, (3, 4)),
    "self_attention": (SelfAttention, (3, 4)),
    "cross_attention": (CrossAttention, (3, 5)),
    "sequence_first_attention": (SequenceFirstAttention, (3, 4)),
    "encoder": (Encoder, (3, 4)),
    "causal_encoder": (CausalEncoder, tokens),
    "decoder": (Decoder, (3, 4)),
    # recurrent networks
    "lstm_deep": (DeepLSTM, (3, 3)),
    "gru_learned_start": (LearnedStart, (3, 3)),
    "rnn": (Elman, (3, 3)),
    "lstm_packed": (PackedLSTM, (4, 3)),
    "lstm_cell": (CellLoop, (3, 3)),
    "kept_state": (KeptState, (3, 3)),
    "neural_ode": (NeuralODE, (3,)),
    "state_space": (StateSpace, (5,)),
    # convolutions
    "own_conv": (OwnConv, (1, 3, 4)),
    "depthwise_conv": (DepthwiseConv, (2, 6)),
    "unfolded_conv": (Unfolded, (1, 3, 4)),
    "locally_connected": (LocallyConnected, (5,)),
    "spectral_conv": (SpectralConv, (6,)),
    "global_filter": (GlobalFilter, (4, 2)),
    "graph": (Graph, (4, 3)),
    "graph_attention": (GraphAttention, (4, 3)),
    # features and mixtures
    "rbf": (RBF, (3,)),
    "prototypes": (Prototypes, (4,)),
    "kan": (KAN, (3,)),
    "fourier_features": (FourierFeatures, (3,)),
    "experts": (Experts, (3,)),
    "experts_routed": (RoutedExperts, (3,)),
    "deeponet": (DeepONet, None),
    "deeponet_grid": (OperatorGrid, (4,)),
    "siamese_pair": (SiamesePair, None),
    "deep_sets": (DeepSets, (3, 3)),
    "coupling": (Coupling, (4,)),
    "mixture": (Mixture, (2,)),
    "ordinal": (Ordinal, (4,)),
    # inputs from within
    "reparametrized": (Reparametrized, (4,)),
    "numpy_noise": (NumpyNoise, (4,)),
    "inner_grid": (InnerGrid, (4,)),
    "times": (Times, (4,)),
    # in place
    "in_place_bias": (InPlaceBias, (4,)),
    "filled_slices": (FilledSlices, (4,)),
    "sequence_buffer": (SequenceBuffer, (3, 3)),
    # derivatives of networks
    "second_derivative": (SecondDerivative, (1,)),
    "source_term": (SourceTerm, (1,)),
    "laplacian": (Laplacian, (2,)),
    "burgers": (Residual, (2,)),
    "beam": (Beam, (1,)),
    "navier_stokes": (NavierStokes, (2,)),
    "periodic": (Periodic, (2,)),
    "inside_and_boundary": (InsideAndBoundary, None),
    "inside_then_boundary": (InsideThenBoundary, (2,)),
    "inverse_problem": (InverseProblem, (2,)),
    "layer_norm_inside": (NormedSolution, (2,)),
    "slopes_inside": (AdaptiveSlopes, (1,)),
    "energy_forces": (EnergyForces, (3,)),
    "hamiltonian": (Hamiltonian, (2,)),
    "hessian_of_call": (HessianOfCall, (2,)),
    "hessian_of_closure": (HessianOfClosure, (2,)),
    "jacobian_rows": (JacobianRows, (2,)),
    "forward_derivatives": (ForwardDerivatives, (2,)),
    # functions for which vmap takes a loop, and indices that are tuples
    "functional_bilinear": (FunctionalBilinear, None),
    "bag_max": (lambda: Bag("max"), tokens),
    "fused_attention": (FusedAttention, (3, 4)),
    "pair_table": (PairTable, tokens),
    "set_item": (SetItem, (4,)),
}
