"""Attention and transformers, as people write them."""

import torch
from torch import nn
from torch.nn import functional as F

from ..layers import tokens
from .parts import param


class RelativeBias(nn.Module):
    """Swin's: a bias for each distance, added to the logits of attention."""

    def __init__(self):
        super().__init__()
        self.qkv, self.bias, self.head = nn.Linear(4, 12), param(5, 2), nn.Linear(4, 2)
        place = torch.arange(3)
        self.register_buffer("index", place[:, None] - place[None, :] + 2)

    def forward(self, x):  # [n, 3, 4]
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-2, -1) + self.bias[self.index].permute(2, 0, 1)
        h = (logits.softmax(-1) @ v).transpose(1, 2).reshape(n, t, c)
        return self.head(h.mean(1))


class FusedAttention(nn.Module):
    """scaled_dot_product_attention, causal, and with a parameter in its mask."""

    def __init__(self):
        super().__init__()
        self.w, self.bias, self.head = param(4, 12), param(3, 3), param(4, 2)

    def forward(self, x):  # [n, 3, 4]
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in (x @ self.w).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        b = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return (a + torch.tanh(b)).transpose(1, 2).flatten(2).mean(1) @ self.head


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):  # [n, 3, 4]
        return self.head(torch.tanh(x + self.attn(x, x, x, need_weights=False)[0])).sum(1)


class CrossAttention(nn.Module):
    """Queries, keys and values of three widths, and learned queries."""

    def __init__(self):
        super().__init__()
        self.queries = param(2, 4)
        self.attn, self.head = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):  # [n, 3, 5]
        queries = self.queries.unsqueeze(0).expand(len(x), -1, -1)
        h, _ = self.attn(queries, x[..., :3], x[..., 3:])
        return self.head(torch.tanh(h).flatten(1))


class SequenceFirstAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 2)

    def forward(self, x):  # [n, 3, 4]
        x = x.transpose(0, 1)
        h, weights = self.attn(x, x, x)
        return self.head(h[0]) + weights[:, 0, :2]


class Encoder(nn.Module):
    """Two blocks in training mode, without dropout."""

    def __init__(self):
        super().__init__()
        block = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(block, 2), nn.Linear(4, 2)

    def forward(self, x):  # [n, 3, 4]
        return self.head(self.encoder(x).mean(1))


class CausalEncoder(nn.Module):
    """A language model: tokens first, a causal mask, norms before."""

    def __init__(self):
        super().__init__()
        self.emb, self.pos = nn.Embedding(7, 4), param(3, 1, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.0, activation="gelu", norm_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(self.pos.dtype)
        h = self.block(self.emb(x.t()) + self.pos, src_mask=mask, is_causal=True)
        return self.head(h[-1])


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, dim_feedforward=5, dropout=0.0, batch_first=True)
        self.start, self.head = param(1, 2, 4), nn.Linear(4, 2)

    def forward(self, memory):  # [n, 3, 4]
        return self.head(self.layer(self.start.expand(len(memory), -1, -1), memory)[:, -1])


MODELS = {
    "relative_bias": (RelativeBias, (3, 4)),
    "self_attention": (SelfAttention, (3, 4)),
    "cross_attention": (CrossAttention, (3, 5)),
    "sequence_first_attention": (SequenceFirstAttention, (3, 4)),
    "encoder": (Encoder, (3, 4)),
    "causal_encoder": (CausalEncoder, tokens),
    "decoder": (Decoder, (3, 4)),
    "fused_attention": (FusedAttention, (3, 4)),
}
