"""Positions, embeddings and tables, as people write them."""

import torch
from torch import nn
from torch.nn import functional as F

from ..layers import tokens
from .parts import param, tanh_net


class PositionParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos, self.layer = param(1, 5, 4), nn.Linear(4, 2)

    def forward(self, x):  # [n, 3, 4]
        x = x + self.pos[:, : x.shape[1]]
        return torch.tanh(self.layer(x)).sum(1)


class ClassToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls, self.sep, self.q, self.k, self.head = param(1, 1, 4), param(4), param(4, 3), param(4, 3), nn.Linear(4, 2)

    def forward(self, x):  # [n, 2, 4]
        last = self.sep.repeat(x.size(0), 1, 1)
        h = torch.cat([self.cls.expand(len(x), -1, -1), x, last], dim=1)
        attention = torch.softmax((h @ self.q) @ (h @ self.k).mT, -1)
        return self.head(torch.tanh(attention @ h))[:, 0]


class IndexedTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = param(7, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.table[x]).prod(1))


class OneHotTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.head = param(7, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = F.one_hot(x, 7).to(self.w.dtype) @ self.w
        return self.head(torch.tanh(h.cumsum(1)).sum(1))


class Places(nn.Module):
    """Embeddings of tokens and of positions, both by the functional."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.head = param(7, 3), param(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = F.embedding(x, self.words) + F.embedding(torch.arange(x.shape[1], device=x.device), self.places)
        return self.head(torch.tanh(h).mean(1))


class Gathered(nn.Module):
    """Entries of a table by gather, rows of one by index_select, and by take_along_dim."""

    def __init__(self):
        super().__init__()
        self.table, self.rows, self.more, self.head = param(7), param(7, 3), param(3, 7), nn.Linear(3, 2)

    def forward(self, x):  # [n, 3] integers
        entries = torch.gather(self.table.expand(len(x), -1), 1, x)
        rows = torch.index_select(self.rows, 0, x[:, 0])
        more = torch.take_along_dim(self.more, x.t(), 1).t()
        return self.head(torch.tanh(entries * rows + more))


class Bag(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 3, mode=mode, padding_idx=0), tanh_net(3, 3, 2)

    def forward(self, x):
        return self.head(self.bag(x))


class RaggedBag(nn.Module):
    """Sets of different sizes in one dimension, told apart by where they start."""

    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 3), tanh_net(3, 3, 2)

    def forward(self, x):  # [n, 3] integers, of which the first says how many count
        sizes = 1 + x[:, 0] % 3
        flat = torch.cat([row[:size] for row, size in zip(x, sizes.tolist(), strict=True)])
        return self.head(self.bag(flat, sizes.cumsum(0) - sizes))


class WeightedBag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 3, mode="sum"), tanh_net(3, 3, 2)

    def forward(self, x):
        weights = torch.softmax(-x.to(self.bag.weight.dtype), 1)
        return self.head(self.bag(x, per_sample_weights=weights))


class PairTable(nn.Module):
    """Entries of a table of pairs, by two indices."""

    def __init__(self):
        super().__init__()
        self.table, self.head = param(7, 7, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.table[x[:, 0], x[:, 1]] * self.table[x[:, 1], x[:, 2]]))


class Ratings(nn.Module):
    """Matrix factorization: users, items, and their biases."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(7, 3), nn.Embedding(7, 3)
        self.user_bias, self.item_bias, self.mean = nn.Embedding(7, 1), param(7), nn.Parameter(torch.zeros(()))

    def forward(self, x):  # [n, 3] integers
        user, item = x[:, 0], x[:, 1]
        score = (self.users(user) * self.items(item)).sum(-1)
        return score + self.user_bias(user).squeeze(-1) + self.item_bias[item] + self.mean


MODELS = {
    "position_parameter": (PositionParameter, (3, 4)),
    "class_token": (ClassToken, (2, 4)),
    "indexed_table": (IndexedTable, tokens),
    "one_hot_table": (OneHotTable, tokens),
    "functional_embeddings": (Places, tokens),
    "gathered": (Gathered, tokens),
    "bag_mean": (lambda: Bag("mean"), tokens),
    "bag_sum": (lambda: Bag("sum"), tokens),
    "bag_weighted": (WeightedBag, tokens),
    "bag_ragged": (RaggedBag, tokens),
    "ratings": (Ratings, tokens),
    "bag_max": (lambda: Bag("max"), tokens),
    "pair_table": (PairTable, tokens),
}
