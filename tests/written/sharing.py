"""Containers and sharing, as people write them."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from .parts import param, tanh_net


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


MODELS = {
    "parameter_list": (ParameterLists, (4,)),
    "parameter_dict": (ParameterDicts, (4,)),
    "two_places": (TwoPlaces, (3, 4)),
    "shared_matrix": (SharedMatrix, (3, 3)),
    "layers_not_called": (SubmoduleWeight, (4,)),
    "inner_functional_call": (InnerCall, (4,)),
}
