"""Inputs that a model makes itself: noise, grids, times."""

import numpy as np
import torch
from torch import nn

from .linear import Dense
from .parts import param, tanh_net


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


MODELS = {
    "reparametrized": (Reparametrized, (4,)),
    "numpy_noise": (NumpyNoise, (4,)),
    "inner_grid": (InnerGrid, (4,)),
    "times": (Times, (4,)),
}
