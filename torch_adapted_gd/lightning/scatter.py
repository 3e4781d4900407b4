"""The scatter within classes, in a second pass."""

from typing import Any

import torch
from torch import Tensor

from ..collapse.metrics import Float64Metric
from ..collapse.moments import ClassMoments


class WithinScatterAlong(Float64Metric):
    """u_kᵀ Σ_W u_k for directions u_k, in a second pass: what ``nc1_pinv`` needs, without the D² numbers of Σ_W.

    Args:
        moments: Of the features, whose means are taken off in two parts: a mean that was rounded loses small deviations.
        directions: u_k, ``[D, r]``.
        kwargs: For `torchmetrics.Metric`.
    """

    squares: Tensor
    seen: Tensor

    def __init__(self, moments: ClassMoments, directions: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.moments, self.directions = moments, directions
        zeros = torch.zeros(directions.shape[1], dtype=torch.float64, device=directions.device)
        self.add_state("squares", zeros, dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros((), dtype=torch.int64, device=directions.device), dist_reduce_fx="sum")

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch: features ``[B, D]``, float64, and classes ``[B]``."""
        self.squares = self.squares + (self.moments.deviations(features, labels) @ self.directions).square().sum(0)
        self.seen = self.seen + len(labels)

    def compute(self) -> Tensor:
        """``[r]``."""
        return self.squares / self.seen
