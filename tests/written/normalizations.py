"""Normalizations, as people write them."""

import torch
from torch import nn
from torch.nn import functional as F

from .parts import param


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


MODELS = {
    "own_layer_norm": (OwnLayerNorm, (4,)),
    "own_rms_norm": (OwnRMSNorm, (3, 4)),
    "functional_norms": (FunctionalNorms, (2, 4)),
    "film": (FiLM, None),
    "squeeze_excitation": (SqueezeExcitation, (1, 3, 4)),
}
