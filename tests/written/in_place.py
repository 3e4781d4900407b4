"""Operations in place."""

import torch
from torch import nn

from .parts import param


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


MODELS = {
    "in_place_bias": (InPlaceBias, (4,)),
    "filled_slices": (FilledSlices, (4,)),
    "sequence_buffer": (SequenceBuffer, (3, 3)),
    "set_item": (SetItem, (4,)),
}
