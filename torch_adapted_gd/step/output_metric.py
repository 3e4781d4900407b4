"""Metrics H = SSᵀ of the outputs, by their symmetric roots S."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor

LEAST = 1e-12  # curvature where there is a gradient, relative to the largest: damping decides how far to go there


class Metric(ABC):
    """H = SSᵀ of the outputs x ``[R]``. S has a column for each row that the loss depends on, ``[R, R']``.

    Args:
        keep: Which rows these are, ``[R]``.
        local: Whether S couples neither the samples of a call, nor calls.

    Attributes:
        kept: Their numbers ``[R']``; None for all.
        rows: R'.
        local: As given.
    """

    def __init__(self, keep: Tensor, *, local: bool) -> None:
        self._keep, self.local = keep, local
        self.kept: Tensor | None = None if bool(keep.all()) else keep.nonzero()[:, 0]
        self.rows = len(keep) if self.kept is None else len(self.kept)

    def root(self, v: Tensor) -> Tensor:
        """Sv, ``[R]`` or ``[R, k]``."""
        if self.kept is not None:
            v = v.new_zeros(len(self._keep), *v.shape[1:]).index_copy_(0, self.kept, v)
        return self._root_times(v, 0)

    def root_transpose(self, v: Tensor, first: int = 0) -> Tensor:
        """Sᵀv; v may be a part of the rows, those of whole samples of one call, from number ``first`` on."""
        image = self._root_times(v, first)
        return image if self.kept is None else image[self._keep[first : first + len(v)]]

    def root_inverse(self, v: Tensor) -> Tensor:
        """S⁺v."""
        image = self._inverse_times(v)
        return image if self.kept is None else image[self.kept]

    def padded(self) -> Metric:
        """The same with columns of zeros for all other rows, so that there are R; ``rows`` stays R'."""
        same = copy.copy(self)
        same.kept = None
        return same

    @abstractmethod
    def _root_times(self, v: Tensor, first: int) -> Tensor:
        """Rows of the padded S from number ``first`` on, times v, zero in rows that are not kept."""

    @abstractmethod
    def _inverse_times(self, v: Tensor) -> Tensor:
        """The pseudoinverse of the padded S times v."""


class DiagonalMetric(Metric):
    """H = diag(s²) with s ``[R]``."""

    def __init__(self, s: Tensor, keep: Tensor) -> None:
        super().__init__(keep, local=True)
        self._s = torch.where(keep, s, 0.0)

    def _root_times(self, v: Tensor, first: int) -> Tensor:
        return self._s[first : first + len(v)].view(-1, *[1] * (v.ndim - 1)) * v

    def _inverse_times(self, v: Tensor) -> Tensor:
        s = self._s.view(-1, *[1] * (v.ndim - 1))
        return torch.where(s > 0, v / s, 0.0)


class BlockMetric(Metric):
    """H with blocks of rows: S = H^½.

    Args:
        index: The rows of each block ``[G, m]``, −1 for none.
        blocks: ``[G, m, m]``, symmetric. Eigenvalues below `LEAST` of the largest count as zero, or as that where g is more
            than rounding.
        g: The gradient, ``[R]``.
        noise: The rounding of g, ``[R]``.
        keep: See `Metric`.
        local: See `Metric`.
    """

    def __init__(self, index: Tensor, blocks: Tensor, g: Tensor, noise: Tensor, keep: Tensor, *, local: bool) -> None:
        super().__init__(keep, local=local)
        values, vectors = torch.linalg.eigh(blocks)
        own, allowed = (torch.where(index >= 0, v[index.clamp(min=0)], 0.0) for v in (g, noise))  # [G, m]
        along = (vectors.mT @ own[..., None])[..., 0].abs()
        asked = along > allowed.norm(dim=1, keepdim=True)
        least = LEAST * float(values.max().clamp(min=0.0))
        values = torch.where(values > least, values, least * asked)
        inverses = torch.where(values > 0, values.rsqrt(), 0.0)
        self._index = index
        self._root = (vectors * values.sqrt()[:, None]) @ vectors.mT
        self._inverse = (vectors * inverses[:, None]) @ vectors.mT

    def _root_times(self, v: Tensor, first: int) -> Tensor:
        return self._applied(self._root, v, first)

    def _inverse_times(self, v: Tensor) -> Tensor:
        return self._applied(self._inverse, v, 0)

    def _applied(self, matrices: Tensor, v: Tensor, first: int) -> Tensor:
        flat = v.reshape(len(v), -1)
        inside = (self._index >= first) & (self._index < first + len(v))
        groups = inside.any(1)
        index, inside = self._index[groups] - first, inside[groups]
        part = torch.where(inside[..., None], flat[index.clamp(0, max(0, len(v) - 1))], 0.0)  # [G, m, k]
        image = matrices[groups] @ part
        out = torch.zeros_like(flat)
        out[index[inside]] = image[inside]
        out[~self._keep[first : first + len(v)]] = 0.0
        return out.view(v.shape)
