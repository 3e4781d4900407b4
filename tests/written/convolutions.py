"""Convolutions, as people write them."""

import torch
from torch import nn
from torch.nn import functional as F

from .parts import param


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


MODELS = {
    "own_conv": (OwnConv, (1, 3, 4)),
    "depthwise_conv": (DepthwiseConv, (2, 6)),
    "unfolded_conv": (Unfolded, (1, 3, 4)),
    "locally_connected": (LocallyConnected, (5,)),
    "spectral_conv": (SpectralConv, (6,)),
    "global_filter": (GlobalFilter, (4, 2)),
    "graph": (Graph, (4, 3)),
    "graph_attention": (GraphAttention, (4, 3)),
}
