"""Models to test on, each with an input, and the dense float64 oracle that the package is tested against."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

MSE = nn.MSELoss()
COUPLED = pytest.mark.filterwarnings("ignore:Rows of the output Jacobian are taken")  # batch statistics


class TwoHeads(nn.Module):
    """Outputs are a pytree: a dict with a tuple in it and something that is no tensor."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.first = nn.Linear(6, 2)
        self.second = nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return {"first": self.first(h), "rest": (self.second(h).reshape(-1, 3, 1), "a word", None)}


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder transposed."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(5, 3)

    def forward(self, x):
        return torch.tanh(self.encoder(x)) @ self.encoder.weight


class LastState(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class MaskedMean(nn.Module):
    """Two inputs, one of them by keyword, and an integer one."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens, *, weights):
        return self.head(torch.tanh((self.embedding(tokens) * weights.unsqueeze(-1)).sum(1)))


class Branching(nn.Module):
    """Control flow that depends on the data: no vmap."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        h = self.layer(x)
        return h * 2 if h.sum() > 0 else h * 3


class Cubed(torch.autograd.Function):
    """A custom function of the old style: no torch.func."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class OldStyle(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return Cubed.apply(self.layer(x))


def mlp(activation=nn.Tanh, sizes=(4, 12, 8, 3)):
    layers = [m for a, b in itertools.pairwise(sizes[:-1]) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def cnn():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 3))


def weight_normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 2))


# name -> (model, shape of its input)
CASES = {
    "mlp_tanh": (mlp, (6, 4)),
    "mlp_relu": (lambda: mlp(nn.ReLU), (6, 4)),
    "cnn": (cnn, (4, 1, 8, 8)),
    "two_heads": (TwoHeads, (5, 4)),
    "tied": (Tied, (5, 5)),
    "weight_norm": (weight_normed, (5, 4)),
    "lstm": (LastState, (4, 5, 3)),
    "layer_norm": (lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)), (4, 3)),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), (3, 2, 4)),
    "transformer_dropout": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (3, 2, 4)),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.4), nn.Linear(9, 2)), (5, 4)),
    "batchnorm_eval": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).eval(), (5, 4)),
    "batchnorm_train": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), (5, 4)),
    "batchnorm2d_train": (lambda: nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), cnn()), (3, 1, 8, 8)),
    "spectral_norm": (lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Linear(5, 2)), (5, 4)),
    "branching": (Branching, (5, 3)),
    "old_style_function": (OldStyle, (5, 3)),
}


def make(name, dtype=torch.float64):
    build, shape = CASES[name]
    return build().to(dtype), torch.randn(shape, dtype=dtype)


def dense_jacobian(model, *args, double=True, by_rows=False, **kwargs):
    """D [NQ, K] in float64 by `jacrev` of the whole batch, or row by row where torch.func refuses; model left alone."""
    model = copy.deepcopy(model)
    if double:
        model = model.double()
        args = tuple(a.double() if a.is_floating_point() else a for a in args)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = torch.get_rng_state()

    def x(moving, rest):
        output = functional_call(model, {**rest, **moving}, args, kwargs)
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        return torch.cat([leaf.reshape(len(leaf), -1) for leaf in leaves], 1).reshape(-1)

    moving = {name: everything[name].detach() for name in names}
    dropout = any(
        (isinstance(m, (nn.Dropout, nn.MultiheadAttention)) and m.training) or type(m).__name__ == "Checkpointed"
        for m in model.modules()
    )
    rest = {name: t.detach().clone() for name, t in everything.items() if name not in moving}
    try:
        if dropout or by_rows:
            raise RuntimeError("torch.func may draw another mask than the model does, or be wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            blocks = jacrev(x)(moving, rest)
    except RuntimeError:
        moving = {name: p.clone().requires_grad_() for name, p in moving.items()}
        leaves = list(moving.values())
        rows = [torch.autograd.grad(r, leaves, retain_graph=True, materialize_grads=True) for r in x(moving, rest)]
        return torch.stack([torch.cat([b.reshape(-1) for b in row]) for row in rows]).double()
    finally:
        torch.set_rng_state(state)
    return torch.cat([block.reshape(block.shape[0], -1) for block in blocks.values()], 1).double()


def flat(model):
    """All trainable parameters as one float64 vector."""
    return torch.cat([p.detach().reshape(-1).double() for p in model.parameters() if p.requires_grad])


@torch.no_grad()
def move(model, change):
    """θ ← θ + change."""
    for p, part in zip(
        (p for p in model.parameters() if p.requires_grad),
        change.split([p.numel() for p in model.parameters() if p.requires_grad]),
        strict=True,
    ):
        p.add_(part.reshape(p.shape).to(p.dtype))


def problem(n=6, dtype=torch.float64):
    return mlp().to(dtype), torch.randn(n, 4, dtype=dtype), torch.randn(n, 3, dtype=dtype)


def pinv_step(model, x, y, eta, criterion=MSE):
    """θ after one hand-written adapted step."""
    outputs = copy.deepcopy(model)(x).detach().requires_grad_()
    g = torch.autograd.grad(criterion(outputs, y), outputs)[0].reshape(-1).double()
    return flat(model) - eta * torch.linalg.pinv(dense_jacobian(model, x), rtol=1e-7) @ g


def assert_at(model, expected, tolerance=1e-9):
    assert (flat(model) - expected).norm() <= tolerance * expected.norm()


class Halves(nn.Module):
    """Outputs that share one operation, one of them unused by the loss."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x):
        return self.layer(x).chunk(2, 1)


class Features(nn.Module):
    """Outputs of which one is computed from the other."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 7), nn.Linear(7, 3)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.head(h), h


def pairwise(*tables):
    """Rows with one value of each table, so that any two values of two tables are in some row together."""
    values = [list(table) for table in tables]
    places = range(len(values))
    missing = {
        (i, a, j, b) for i in places for j in places if i < j for a in range(len(values[i])) for b in range(len(values[j]))
    }
    rows = []
    while missing:
        i, a, j, b = min(missing)
        row = {i: a, j: b}
        for place in places:
            if place not in row:  # the value that covers most of what is missing
                row[place] = max(
                    range(len(values[place])),
                    key=lambda c, place=place: sum(
                        ((place, c, o, d) if place < o else (o, d, place, c)) in missing for o, d in row.items()
                    ),
                )
        missing -= {(i, row[i], j, row[j]) for i in places for j in places if i < j}
        rows.append(tuple(values[place][row[place]] for place in places))
    return rows
