"""Networks of full and of short rank, each with an input, and what dense algebra says of their tangent."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cases import Tied, cnn, dense_jacobian, mlp


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def duplicated():
    """A network that is given each input twice: rank QN/2."""
    x = random(4, 2)
    return mlp(sizes=(2, 9, 2)).double(), torch.cat([x, x])


def narrow():
    """K < QN."""
    return mlp(sizes=(3, 3, 2)).double(), random(12, 3)


def dying():
    """ReLUs of which most are off for all samples."""
    model = mlp(nn.ReLU, sizes=(3, 8, 2)).double()
    with torch.no_grad():
        model[0].weight[:2] *= 0.1
        model[0].bias[:2], model[0].bias[2:] = 1.0, -50.0
    return model, random(9, 3)


def dead():
    """All are off, and there is no bias behind them: D = 0."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        model[0].bias.fill_(-50.0)
    return model, random(4, 3)


def randomized():
    """Batch statistics and dropout, in training mode."""
    layers = [nn.Linear(4, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Dropout(0.3), nn.Linear(20, 2)]
    return nn.Sequential(*layers).double(), random(4, 4)


# name -> what makes a model and its input
NETWORKS = {
    "wide": lambda: (mlp(sizes=(4, 12, 3)).double(), random(5, 4)),
    "duplicated": duplicated,
    "narrow": narrow,
    "dying": dying,
    "dead": dead,
    "cnn": lambda: (cnn().double(), random(4, 1, 8, 8)),
    "tied": lambda: (Tied().double(), random(3, 5)),
    "randomized": randomized,
    "one output": lambda: (nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 1), nn.Flatten(0)).double(), random(5, 3)),
}
SHORT = ("duplicated", "narrow", "dying", "dead")  # rank D < QN


@dataclass
class Dense:
    """The oracle: D by `jacrev`, D⁺ by `torch.linalg.pinv`, P = DD⁺."""

    d: Tensor
    inverse: Tensor
    p: Tensor
    rank: int
    condition: float

    @classmethod
    def of(cls, model, x):
        d = dense_jacobian(model, *x) if isinstance(x, tuple) else dense_jacobian(model, x)
        singular = torch.linalg.svdvals(d)
        rank = int((singular > 1e-7 * singular[0]).sum())
        condition = float(singular[0] / singular[rank - 1]) if rank else 1.0
        assert condition < 1e4  # no singular value is in doubt
        inverse = torch.linalg.pinv(d, rtol=1e-7)
        return cls(d, inverse, d @ inverse, rank, condition)

    @property
    def theta(self):
        return self.d @ self.d.T

    def field(self, g, alpha):
        """V_α (2.31)."""
        gradient = self.d.T @ g
        return -(alpha * self.inverse @ (self.inverse.T @ gradient) + (1 - alpha) * gradient)


def assert_close(found, expected, tolerance=1e-10, scale=None):
    """|found − expected| ≤ tolerance·scale, the scale being |expected| by default."""
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= tolerance * float(expected.norm() if scale is None else scale)


def taken_down(model):
    """Everything of a model and of the random stream that a measurement has to leave as it is, bit by bit."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    bits = {name: t.detach().reshape(-1).contiguous().view(torch.uint8).tolist() for name, t in tensors.items()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    return bits, gradients, modes, torch.get_rng_state().tolist()
