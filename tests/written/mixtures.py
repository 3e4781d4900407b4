"""Features and mixtures, as people write them."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .parts import param, tanh_net


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


MODELS = {
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
}
