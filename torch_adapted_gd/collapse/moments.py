"""Counts, means and scatters of classes, from batches, numerically stable near collapse.

A sum of squares loses a deviation ε beside values of size 1 once ε² nears machine epsilon. Therefore each class has a pivot,
its first sample: differences from it are exact where samples are close (Sterbenz). Each batch is summed in two passes, and
batches are merged by the formula of Chan, Golub and LeVeque (1979).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassMoments:
    """Moments of the samples v_i of each class, float64."""

    count: Tensor  # [K], N_j
    scatter: Tensor  # [K], Σ_i |v_i − v̄_j|² over the samples of class j
    pivot: Tensor  # [K, D], a sample of each class; zeros for a class without samples
    offset: Tensor  # [K, D], v̄_j − pivot
    pooled: Tensor | None = None  # [D, D], Σ_i (v_i − v̄_c(i))(v_i − v̄_c(i))ᵀ over all classes, if it is wanted

    @property
    def mean(self) -> Tensor:
        """Class means v̄_j, ``[K, D]``; zeros for a class without samples."""
        return self.pivot + self.offset

    @property
    def mean_or_nan(self) -> Tensor:
        """Class means, ``[K, D]``; NaN for a class without samples."""
        return torch.where(self.count[:, None] > 0, self.mean, torch.nan)

    @property
    def total(self) -> Tensor:
        """The number of samples, N."""
        return self.count.sum()

    @classmethod
    def zeros(cls, num_classes: int, width: int, *, pooled: bool, device: torch.device) -> ClassMoments:
        """Moments of no samples."""
        length = num_classes * (2 + 2 * width) + pooled * width**2
        return cls.unpacked(torch.zeros(length, dtype=torch.float64, device=device), num_classes, width)

    @classmethod
    def of(cls, values: Tensor, labels: Tensor, num_classes: int, *, pooled: bool) -> ClassMoments:
        """Moments of a batch: values ``[B, D]``, float64, and labels ``[B]`` in 0..K−1. ``pooled`` takes B·D² operations."""
        size, width = values.shape
        if size == 0:
            return cls.zeros(num_classes, width, pooled=pooled, device=values.device)
        zeros = values.new_zeros(num_classes, width)
        count = values.new_zeros(num_classes).index_add_(0, labels, values.new_ones(size))
        divisor = count.clamp_min(1)[:, None]
        places = torch.arange(size, device=labels.device)
        first = torch.full((num_classes,), size - 1, device=labels.device).scatter_reduce_(0, labels, places, "amin")
        pivot = torch.where(count[:, None] > 0, values[first], zeros)
        deviation = values - pivot.index_select(0, labels)
        offset = zeros.index_add(0, labels, deviation) / divisor
        deviation -= offset.index_select(0, labels)
        rest = zeros.index_add(0, labels, deviation)  # the rounding of the offset, N_j times
        scatter = count.new_zeros(num_classes).index_add_(0, labels, deviation.square().sum(1))
        scatter = (scatter - (rest.square() / divisor).sum(1)).clamp_min(0)
        square = deviation.T @ deviation - (rest / divisor).T @ rest if pooled else None
        return cls(count, scatter, pivot, offset + rest / divisor, square)

    def deviations(self, values: Tensor, labels: Tensor) -> Tensor:
        """v_i − v̄_c(i), ``[B, D]``. Pivot and offset are subtracted one by one, because a mean would be rounded."""
        return (values - self.pivot.index_select(0, labels)).sub_(self.offset.index_select(0, labels))

    def relative_to(self, origins: Tensor) -> ClassMoments:
        """Moments of v_i − o_c(i), for o ``[K, D]``. Only pivots move, so rounding does not reach the scatter."""
        moved = torch.where(self.count[:, None] > 0, self.pivot - origins.to(self.pivot), 0.0)
        return ClassMoments(self.count, self.scatter, moved, self.offset, self.pooled)

    def merge(self, other: ClassMoments) -> ClassMoments:
        """Moments of the samples of both."""
        total = self.count + other.count
        share = other.count / total.clamp_min(1)
        weight = self.count * share
        mine = (self.count > 0)[:, None]
        between = (other.pivot - self.pivot) + (other.offset - self.offset)  # [K, D], from mean to mean
        between = torch.where(mine & (other.count > 0)[:, None], between, 0.0)
        pooled = None
        if self.pooled is not None and other.pooled is not None:
            pooled = self.pooled + other.pooled + (between * weight[:, None]).T @ between
        return ClassMoments(
            total,
            self.scatter + other.scatter + between.square().sum(1) * weight,
            torch.where(mine, self.pivot, other.pivot),
            torch.where(mine, self.offset + between * share[:, None], other.offset),
            pooled,
        )

    def within_along(self, directions: Tensor) -> Tensor:
        """u_kᵀ Σ_W u_k, ``[r]``, for directions ``[D, r]``, from the pooled scatter."""
        assert self.pooled is not None
        along = ((self.pooled @ directions) * directions).sum(0)
        return along.clamp_min(0) / self.total  # rounding may make a zero negative

    def packed(self) -> Tensor:
        """All in one vector, ``[K·(2 + 2D)]`` or ``[K·(2 + 2D) + D²]``, because torchmetrics reduces one tensor at a time."""
        table = torch.cat([self.count[:, None], self.scatter[:, None], self.pivot, self.offset], dim=1).flatten()
        return table if self.pooled is None else torch.cat([table, self.pooled.flatten()])

    @classmethod
    def unpacked(cls, vector: Tensor, num_classes: int, width: int) -> ClassMoments:
        """The moments that were packed in a vector."""
        table, square = vector.tensor_split([num_classes * (2 + 2 * width)])
        count, scatter, pivot, offset = table.view(num_classes, -1).split([1, 1, width, width], dim=1)
        return cls(count[:, 0], scatter[:, 0], pivot, offset, square.view(width, width) if square.numel() else None)


def merge_packed(states: Tensor, num_classes: int, width: int) -> Tensor:
    """Merge packed moments ``[W, …]`` in order, so that all of W processes get the same bits."""
    merged = ClassMoments.unpacked(states[0], num_classes, width)
    for state in states[1:]:
        merged = merged.merge(ClassMoments.unpacked(state, num_classes, width))
    return merged.packed()
