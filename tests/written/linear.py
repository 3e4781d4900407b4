"""Linear maps by hand, as people write them."""

import torch
from torch import nn
from torch.nn import functional as F

from .parts import param


class Dense(nn.Module):
    """The linear layer that everybody writes first."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.w, self.b = param(inputs, outputs), param(outputs)

    def forward(self, x):
        return x @ self.w + self.b


class AddMM(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.v, self.c = param(4, 5), param(5), param(5, 2), param(2)

    def forward(self, x):
        h = torch.tanh(torch.addmm(self.b, x, self.w))
        return torch.addmm(self.c, h, self.v, beta=0.5, alpha=2.0)


class RootMatrices(nn.Module):
    """A network without layers."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1 = param(6, 4), param(6)
        self.w2, self.b2 = param(2, 6), param(2)

    def forward(self, x):
        h = torch.relu(F.linear(x, self.w1, self.b1))
        return F.linear(h, self.w2) + self.b2


class EinsumRows(nn.Module):
    """Einsum on samples, with the weight as it is and transposed."""

    def __init__(self):
        super().__init__()
        self.first, self.second = param(4, 5), param(2, 5)

    def forward(self, x):
        h = torch.tanh(torch.einsum("ni,io->no", x, self.first))
        return torch.einsum("bi,oi->bo", h, self.second)


class EinsumTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.heads, self.out = param(4, 3), param(3, 2, 2), param(2, 2, 2)

    def forward(self, x):  # [n, t, 4]
        h = torch.tanh(torch.einsum("nti,io->nto", x, self.w))
        h = torch.einsum("nti,ihd->nhtd", h, self.heads).tanh().mean(2)
        return torch.einsum("nhd,hdk->nk", h, self.out)


class EinsumEllipsis(nn.Module):
    """The weight as first operand, an ellipsis, and two parameters in one equation."""

    def __init__(self):
        super().__init__()
        self.w, self.a, self.b = param(3, 4), param(3, 2), param(2, 2)

    def forward(self, x):
        h = torch.sin(torch.einsum("oi,...i->...o", self.w, x))
        return torch.einsum("nti,ir,ro->no", h, self.a, self.b)


class EinsumCapitals(nn.Module):
    """Indices named as those of the paper."""

    def __init__(self):
        super().__init__()
        self.w, self.out = param(4, 3), param(3, 2)

    def forward(self, x):  # [n, t, 4]
        return torch.einsum("NQ,QZ->NZ", torch.tanh(torch.einsum("NTZ,ZQ->NTQ", x, self.w)).mean(1), self.out)


class ProductsByKeyword(nn.Module):
    """Products whose second operand is given by its keyword."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.out = param(4, 3), param(3), param(3)

    def forward(self, x):
        h = torch.tanh(torch.mm(x, mat2=self.w) + torch.addmm(self.b, x, mat2=self.w))
        return torch.stack([torch.mv(h, vec=self.out), torch.matmul(h, other=self.out)], 1)


class Mixer(nn.Module):
    """MLP-Mixer: a parameter from the left mixes tokens."""

    def __init__(self):
        super().__init__()
        self.mix, self.unmix = param(5, 3), param(3, 5)
        self.channels, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):  # [n, 3, 4]
        x = x + self.unmix @ F.gelu(self.mix @ x)
        x = x + torch.tanh(self.channels(x))
        return self.head(x.mean(1))


class MatmulLeft(nn.Module):
    """Samples in columns."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.v = param(5, 4), param(5, 1), param(2, 5)

    def forward(self, x):
        h = torch.tanh(torch.matmul(self.w, x.t()) + self.b)
        return torch.mm(self.v, h).t()


class ExpandedBMM(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.v = param(4, 3), param(3), param(3, 2)

    def forward(self, x):  # [n, 3, 4]
        h = torch.tanh(torch.bmm(x, self.w.unsqueeze(0).expand(x.shape[0], -1, -1)) + self.b)
        return torch.bmm(h, self.v.repeat(len(x), 1, 1)).sum(1)


class Heads(nn.Module):
    """A matrix for each head, by broadcasting."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.v = param(2, 4, 3), param(2, 1, 3), param(2, 3, 2)

    def forward(self, x):
        h = x[:, None, None, :].expand(-1, 2, -1, -1)  # [n, h, 1, i]
        h = torch.tanh(h @ self.w + self.b)
        return (h @ self.v).sum(1).squeeze(1)


class BaddBMM(nn.Module):
    """An ensemble: networks in the batch dimension, samples in the next."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.v, self.c = param(3, 4, 4), param(3, 1, 4), param(3, 4, 1), param(3, 1, 1)

    def forward(self, x):
        h = torch.tanh(torch.baddbmm(self.b, x.expand(3, -1, -1), self.w))
        return torch.baddbmm(self.c, h, self.v).squeeze(-1).t()


class TensorDot(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = param(3, 4, 5), param(5, 2)

    def forward(self, x):  # [n, 3, 4]
        h = torch.tanh(torch.tensordot(x, self.w, dims=([1, 2], [0, 1])))
        return torch.tensordot(h, self.v, dims=1)


class FunctionalBilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b, self.v = param(3, 4, 4), param(3), param(3, 2)

    def forward(self, x, y):
        return torch.tanh(F.bilinear(x, torch.sin(y), self.w, self.b)) @ self.v


class Score(nn.Module):
    """A vector as weight: one output for each sample, in one dimension."""

    def __init__(self):
        super().__init__()
        self.w, self.v, self.c = param(4, 5), param(5), nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return torch.tanh(x @ self.w) @ self.v + self.c


class MatrixVector(nn.Module):
    """mv, inner products by sum, dot products with a vector and outer ones of it."""

    def __init__(self):
        super().__init__()
        self.w, self.u, self.v = param(4, 3), param(3), param(3)

    def forward(self, x):
        h = torch.sigmoid(torch.mm(x, self.w))
        return torch.stack([torch.mv(h, self.u), (h * self.v).sum(-1), torch.inner(h, self.u * self.v)], 1)


class Outer(nn.Module):
    """A scalar feature spread over a vector: rank one."""

    def __init__(self):
        super().__init__()
        self.u, self.v, self.head = param(4), param(3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(torch.outer(x @ self.u, self.v)))


MODELS = {
    "own_dense": (lambda: nn.Sequential(Dense(4, 5), nn.Tanh(), Dense(5, 2)), (4,)),
    "addmm": (AddMM, (4,)),
    "root_matrices": (RootMatrices, (4,)),
    "einsum_rows": (EinsumRows, (4,)),
    "einsum_tokens": (EinsumTokens, (3, 4)),
    "einsum_ellipsis": (EinsumEllipsis, (2, 4)),
    "einsum_capitals": (EinsumCapitals, (3, 4)),
    "products_by_keyword": (ProductsByKeyword, (4,)),
    "mixer": (Mixer, (3, 4)),
    "matmul_left": (MatmulLeft, (4,)),
    "bmm_expanded": (ExpandedBMM, (3, 4)),
    "heads_broadcast": (Heads, (4,)),
    "baddbmm_ensemble": (BaddBMM, (4,)),
    "tensordot": (TensorDot, (3, 4)),
    "vector_weight": (Score, (4,)),
    "matrix_vector": (MatrixVector, (4,)),
    "outer": (Outer, (4,)),
    "functional_bilinear": (FunctionalBilinear, None),
}
