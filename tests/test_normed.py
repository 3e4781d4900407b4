"""Weights in lengths and directions: all that is computed from D in factors, against D by its definition."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from torch_adapted_gd import ntk, output_jacobian
from torch_adapted_gd.jacobian import tangent_jacobian
from torch_adapted_gd.jacobian.definition import recorded


class Twice(nn.Module):
    """One weight at two places, and its v at a third one, if that is asked for."""

    def __init__(self, *, directly=False):
        super().__init__()
        self.first, self.last, self.directly = weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2), directly

    def forward(self, x):
        x = torch.tanh(self.first(torch.tanh(self.first(x))))
        if self.directly:
            x = x + x @ self.first.parametrizations.weight.original1
        return self.last(x)


def head(features):
    return nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(features, 3))


MODELS = {
    "linear": (lambda: nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.Tanh(), weight_norm(nn.Linear(6, 3))), (4,), "normed"),
    "sequence": (lambda: nn.Sequential(weight_norm(nn.Linear(4, 6)), head(18)), (3, 4), "normed"),
    "groups": (lambda: nn.Sequential(weight_norm(nn.Conv1d(4, 6, 3, groups=2)), head(36)), (4, 8), "normed"),
    "places": (lambda: nn.Sequential(weight_norm(nn.Conv1d(1, 3, 3)), head(294)), (1, 100), "normed"),
    "twice": (Twice, (4,), "normed"),
    "directly": (lambda: Twice(directly=True), (4,), "written"),
    "columns": (lambda: nn.Sequential(weight_norm(nn.Linear(4, 6), dim=1), head(6)), (4,), "written"),
    "embedding": (lambda: nn.Sequential(weight_norm(nn.Embedding(7, 3)), head(6)), None, "normed"),
}


@pytest.mark.parametrize("name", MODELS)
def test_kernel_products_and_rows_are_those_of_the_jacobian(name):
    build, shape, way = MODELS[name]
    model = build().double()
    with torch.no_grad():
        for p in model.parameters():  # lengths that are no longer those of v
            p.mul_(0.7 + 0.5 * torch.rand_like(p))
    x = torch.randint(7, (5, 2)) if shape is None else torch.randn(5, *shape, dtype=torch.float64)
    d = output_jacobian(model, x)
    theta = d @ d.T
    assert float((ntk(model, x).reshape(theta.shape) - theta).norm()) <= 1e-12 * float(theta.norm())
    call, names = recorded(model, (x,))
    jacobian = tangent_jacobian(model, [call], names)
    assert {jacobian._ways[name] for name in names if name.endswith("original1")} == {way}
    size = float(d.norm())
    u, v = torch.randn(len(d), dtype=torch.float64), torch.randn(d.shape[1], dtype=torch.float64)
    found = jacobian.rmv(u)
    assert float((torch.cat([found[name] for name in names]) - d.T @ u).norm()) <= 1e-12 * size * float(u.norm())
    parts = dict(zip(names, v.split([jacobian.numels[name] for name in names]), strict=True))
    assert float((jacobian.mv(parts) - d @ v).norm()) <= 1e-12 * size * float(v.norm())
    assert float((torch.cat(list(jacobian.rows())) - d).norm()) <= 1e-12 * size
    blocks = jacobian.sample_blocks()[0]
    n, q, _ = blocks.shape
    expected = theta.view(n, q, n, q).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    assert float((blocks - expected).norm()) <= 1e-12 * float(theta.norm())
