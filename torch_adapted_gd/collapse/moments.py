"""Counts, means and scatters of classes, gathered batch by batch without losing what is small.

Sums of squares lose a deviation ε beside values of size 1 as soon as ε² nears machine epsilon: near collapse they are wrong
altogether. Here each class has a pivot, the first sample seen; differences from it are exact where samples are close
(Sterbenz), a batch's mean and scatter are taken in two passes, and batches are merged by the formula of Chan, Golub and
LeVeque (1979).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassMoments:
    """Moments of the samples of each class, float64.

    Attributes:
        count: N_j, ``[K]``.
        scatter: Σ_i |v_i − v̄_j|² over the samples of class j, ``[K]``.
        pivot: A sample of the class, ``[K, D]``; zeros for a class without any.
        offset: v̄_j − pivot, ``[K, D]``.
        pooled: Σ_i (v_i − v̄_c(i))(v_i − v̄_c(i))ᵀ over all classes, ``[D, D]``, or None if it was not wanted.
    """

    count: Tensor
    scatter: Tensor
    pivot: Tensor
    offset: Tensor
    pooled: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Class averages v̄_j, ``[K, D]``; zeros for a class without samples."""
        return self.pivot + self.offset

    @property
    def mean_or_nan(self) -> Tensor:
        """Class averages, ``[K, D]``; NaN for a class without samples."""
        return torch.where(self.count[:, None] > 0, self.mean, torch.nan)

    @property
    def total(self) -> Tensor:
        """The number of samples, N."""
        return self.count.sum()

    @classmethod
    def zeros(cls, num_classes: int, width: int, *, pooled: bool, device: torch.device | str) -> ClassMoments:
        """Moments of no samples.

        Args:
            num_classes: K.
            width: D.
            pooled: Whether to hold the pooled scatter.
            device: Where.
        """
        zeros = torch.zeros(num_classes, 2 + 2 * width, dtype=torch.float64, device=device)
        square = torch.zeros(width, width, dtype=torch.float64, device=device) if pooled else None
        return cls(zeros[:, 0], zeros[:, 1], zeros[:, 2 : 2 + width], zeros[:, 2 + width :], square)

    @classmethod
    def of(cls, values: Tensor, labels: Tensor, num_classes: int, *, pooled: bool) -> ClassMoments:
        """Moments of a batch, in two passes, with the rounding of the mean made good.

        Args:
            values: ``[B, D]``, float64.
            labels: ``[B]``, each in 0..K−1.
            num_classes: K.
            pooled: Whether to take the pooled scatter, B·D² operations.
        """
        size, width = values.shape
        if size == 0:
            return cls.zeros(num_classes, width, pooled=pooled, device=values.device)
        zeros = values.new_zeros(num_classes, width)
        count = values.new_zeros(num_classes).index_add_(0, labels, values.new_ones(size))
        at_least_one = count.clamp_min(1)
        places = torch.arange(size, device=labels.device)
        first = torch.full((num_classes,), size - 1, device=labels.device).scatter_reduce_(0, labels, places, "amin")
        pivot = torch.where(count[:, None] > 0, values[first], zeros)
        deviation = values - pivot.index_select(0, labels)  # from the pivots, at first
        offset = zeros.index_add(0, labels, deviation) / at_least_one[:, None]
        deviation -= offset.index_select(0, labels)
        rest = zeros.index_add(0, labels, deviation)  # zero but for the rounding of the offset
        scatter = count.new_zeros(num_classes).index_add_(0, labels, deviation.square().sum(1))
        scatter = (scatter - rest.square().sum(1) / at_least_one).clamp_min(0)
        square = None
        if pooled:
            square = deviation.T @ deviation - (rest / at_least_one[:, None]).T @ rest
        return cls(count, scatter, pivot, offset + rest / at_least_one[:, None], square)

    def deviations(self, values: Tensor, labels: Tensor) -> Tensor:
        """v_i − v̄_c(i), ``[B, D]``, without the rounding of the means.

        Args:
            values: ``[B, D]``, float64.
            labels: ``[B]``.
        """
        return (values - self.pivot.index_select(0, labels)).sub_(self.offset.index_select(0, labels))

    def relative_to(self, origins: Tensor) -> ClassMoments:
        """Moments of v_i − o_c(i): the pivots move, and deviations have not seen the rounding of the difference.

        Args:
            origins: o_j, ``[K, D]``.
        """
        moved = torch.where(self.count[:, None] > 0, self.pivot - origins.to(self.pivot), 0.0)
        return ClassMoments(self.count, self.scatter, moved, self.offset, self.pooled)

    def merge(self, other: ClassMoments) -> ClassMoments:
        """Moments of the samples of both."""
        total = self.count + other.count
        share = other.count / total.clamp_min(1)
        apart = (other.pivot - self.pivot) + (other.offset - self.offset)  # [K, D], between the means
        both = (self.count > 0) & (other.count > 0)
        apart = torch.where(both[:, None], apart, 0.0)
        weight = self.count * share
        mine = (self.count > 0)[:, None]
        offset = self.offset + apart * share[:, None]
        pooled = None
        if self.pooled is not None and other.pooled is not None:
            pooled = self.pooled + other.pooled + (apart * weight[:, None]).T @ apart
        return ClassMoments(
            total,
            self.scatter + other.scatter + apart.square().sum(1) * weight,
            torch.where(mine, self.pivot, other.pivot),
            torch.where(mine, offset, other.offset),
            pooled,
        )

    def within_along(self, directions: Tensor) -> Tensor:
        """u_kᵀ Σ_W u_k, ``[r]``, from the pooled scatter.

        Args:
            directions: u_k, ``[D, r]``.
        """
        assert self.pooled is not None
        along = ((self.pooled @ directions) * directions).sum(0)
        return along.clamp_min(0) / self.total  # rounding may take what is 0 below

    def packed(self) -> Tensor:
        """All in one vector, ``[K·(2 + 2D)]`` or ``[K·(2 + 2D) + D²]``: a reduction sees one tensor at a time."""
        parts = [torch.cat([self.count[:, None], self.scatter[:, None], self.pivot, self.offset], dim=1).flatten()]
        return torch.cat([*parts, self.pooled.flatten()]) if self.pooled is not None else parts[0]

    @classmethod
    def unpacked(cls, vector: Tensor, num_classes: int, width: int) -> ClassMoments:
        """What was packed.

        Args:
            vector: From `packed`.
            num_classes: K.
            width: D.
        """
        table, square = vector.tensor_split([num_classes * (2 + 2 * width)])
        count, scatter, pivot, offset = table.view(num_classes, -1).split([1, 1, width, width], dim=1)
        return cls(count[:, 0], scatter[:, 0], pivot, offset, square.view(width, width) if square.numel() else None)


def merge_packed(states: Tensor, num_classes: int, width: int) -> Tensor:
    """Merge packed moments ``[W, …]`` one after the other, as from W processes: each gets the same bits.

    Args:
        states: Stacked vectors.
        num_classes: K.
        width: D.
    """
    merged = ClassMoments.unpacked(states[0], num_classes, width)
    for state in states[1:]:
        merged = merged.merge(ClassMoments.unpacked(state, num_classes, width))
    return merged.packed()
