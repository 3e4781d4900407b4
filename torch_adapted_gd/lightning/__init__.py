"""Callbacks for Lightning, under both of its names: ``lightning.pytorch`` and ``pytorch_lightning``.

Needs Lightning and torchmetrics: ``pip install 'torch_adapted_gd[lightning]'``.
"""

from .frameworks import CollapseConfigError
from .monitor import CollapseMonitor
from .steps import AdaptedStepMonitor

__all__ = ["AdaptedStepMonitor", "CollapseConfigError", "CollapseMonitor"]
