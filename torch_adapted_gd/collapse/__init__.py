"""Collapse of classes: `output_collapse` and `neural_collapse` of tensors; `metrics` has the same figures as torchmetrics."""

from .functions import neural_collapse, output_collapse

__all__ = ["neural_collapse", "output_collapse"]
