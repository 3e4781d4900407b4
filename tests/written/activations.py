"""Gates, scales and activations, as people write them."""

import torch
from torch import nn
from torch.nn import functional as F

from .parts import param, tanh_net


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


MODELS = {
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
}
