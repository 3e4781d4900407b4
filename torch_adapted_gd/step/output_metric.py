"""Metrics H = SSᵀ of the outputs, by their roots S."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

LEAST = 1e-12  # curvature where there is a gradient, relative to the largest: how far to go there is a matter of damping


class Metric(Protocol):
    """H = SSᵀ of the outputs x ``[R]``, S ``[R, R']`` with a column for each row that the loss looks at.

    Attributes:
        kept: The numbers of these rows ``[R']``; None for all.
        local: Whether S does not couple the samples of a call, nor calls.
    """

    kept: Tensor | None
    local: bool

    def root(self, v: Tensor) -> Tensor:
        """Sv, ``[R]`` or ``[R, k]``."""

    def root_transpose(self, v: Tensor, first: int = 0) -> Tensor:
        """Sᵀv, where v may be some rows alone: those of whole samples of one call, from number ``first`` on."""

    def root_inverse(self, v: Tensor) -> Tensor:
        """S⁺v."""

    def padded(self) -> Metric:
        """The same with zeros for columns of all other rows, so that there are R."""


class DiagonalMetric:
    """H = diag(s²).

    Args:
        s: ``[R]``.
        keep: Which rows are looked at, ``[R]``.
        square: Whether the others have columns of zeros.
    """

    local = True

    def __init__(self, s: Tensor, keep: Tensor, *, square: bool = False) -> None:
        self._keep, self._s, self._square = keep, torch.where(keep, s, 0.0), square
        self.kept = None if square or bool(keep.all()) else keep.nonzero()[:, 0]

    def root(self, v: Tensor) -> Tensor:
        """See `Metric`."""
        if self.kept is not None:
            v = v.new_zeros(len(self._s), *v.shape[1:]).index_copy_(0, self.kept, v)
        return _column(self._s, v) * v

    def root_transpose(self, v: Tensor, first: int = 0) -> Tensor:
        """See `Metric`."""
        v = _column(self._s[first : first + len(v)], v) * v
        return v if self.kept is None else v[self._keep[first : first + len(v)]]

    def root_inverse(self, v: Tensor) -> Tensor:
        """See `Metric`."""
        s = _column(self._s, v)
        v = torch.where(s > 0, v / s, 0.0)
        return v if self.kept is None else v[self.kept]

    def padded(self) -> DiagonalMetric:
        """See `Metric`."""
        return DiagonalMetric(self._s, self._keep, square=True)


class BlockMetric:
    """H with blocks of rows: S = H^½.

    Args:
        index: The rows of each block ``[G, m]``, −1 for none.
        blocks: ``[G, m, m]``, symmetric; negative eigenvalues count as zero.
        g: The gradient, ``[R]``.
        noise: What rounding makes of it, ``[R]``.
        keep: Which rows are looked at.
        local: See `Metric`.
    """

    def __init__(self, index: Tensor, blocks: Tensor, g: Tensor, noise: Tensor, keep: Tensor, *, local: bool) -> None:
        values, vectors = torch.linalg.eigh(blocks)
        own, allowed = (torch.where(index >= 0, v[index.clamp(min=0)], 0.0) for v in (g, noise))  # [G, m]
        along = (vectors.mT @ own[..., None])[..., 0].abs()
        least = LEAST * float(values.max())
        asked = (along > 1e-8 * own.norm(dim=1, keepdim=True)) & (along > allowed.norm(dim=1, keepdim=True))
        there = values > 1e-14 * values[:, -1:]
        values = torch.where(asked, values.clamp(min=least), torch.where(there, values.clamp(min=0.0), 0.0))
        inverses = torch.where(values > 0, values.rsqrt(), 0.0)
        self._index, self._size, self._keep, self.local = index, len(keep), keep, local
        self._root = (vectors * values.sqrt()[:, None]) @ vectors.mT
        self._inverse = (vectors * inverses[:, None]) @ vectors.mT
        self.kept: Tensor | None = None if bool(keep.all()) else keep.nonzero()[:, 0]

    def _applied(self, matrices: Tensor, v: Tensor, first: int = 0) -> Tensor:
        """Rows from ``first`` on, as many as v has."""
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

    def root(self, v: Tensor) -> Tensor:
        """See `Metric`."""
        if self.kept is not None:
            v = v.new_zeros(self._size, *v.shape[1:]).index_copy_(0, self.kept, v)
        return self._applied(self._root, v)

    def root_transpose(self, v: Tensor, first: int = 0) -> Tensor:
        """See `Metric`."""
        image = self._applied(self._root, v, first)
        return image if self.kept is None else image[self._keep[first : first + len(v)]]

    def root_inverse(self, v: Tensor) -> Tensor:
        """See `Metric`."""
        image = self._applied(self._inverse, v)
        return image if self.kept is None else image[self.kept]

    def padded(self) -> BlockMetric:
        """See `Metric`."""
        same = object.__new__(BlockMetric)
        same.__dict__.update(self.__dict__, kept=None)
        return same


def _column(s: Tensor, v: Tensor) -> Tensor:
    return s.view(-1, *[1] * (v.ndim - 1))
