"""Logs the reports of AdaptedGD's steps while Lightning trains."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..full_batch import repeated_samples
from ..optimizer import AdaptedGD
from ..report import StepReport
from ..warning import AdaptedWarning
from .frameworks import Callback, LightningModule, Trainer

_NUMBERS = (
    "rank", "num_outputs", "condition", "projected_fraction", "identity_gap", "off_output_fraction", "curvature", "damping",
    "num_trials", "gain_ratio",
)  # fmt: skip


class AdaptedStepMonitor(Callback):
    """Logs the `StepReport` of each step of `AdaptedGD`.

    Logged as ``{name}/{key}`` every ``log_every_n_steps``: ``rank``, ``num_outputs``, ``condition``, ``projected_fraction``,
    ``identity_gap``, ``off_output_fraction``, ``curvature``, ``damping``, ``num_trials``, ``gain_ratio`` (NaN if it was not
    computed), and ``full_rank`` and ``rejected``, which are 0 or 1. If there are several such optimizers, their number follows
    the name. If there is none, the monitor warns and logs nothing, so that configurations can name another optimizer.

    Args:
        name: Root of the keys.
        sep: What separates root and key.
        keep_history: Fill ``history`` with a row for each step: ``step``, ``optimizer``, and the whole report.

    Example:
        >>> monitor = AdaptedStepMonitor()  # for Trainer(callbacks=[monitor])
        >>> monitor.history
        []
    """

    def __init__(self, name: str = "adapted", sep: str = "/", keep_history: bool = False) -> None:
        super().__init__()
        self.name = name
        self.sep = sep
        self.keep_history = keep_history
        self.history: list[dict[str, Any]] = []
        self._seen: dict[int, StepReport | None] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Look for AdaptedGD, and warn about samples that several processes have."""
        for loader in tree_leaves(trainer.train_dataloader) if trainer.is_global_zero else ():
            if text := repeated_samples(loader):
                warnings.warn(text, AdaptedWarning, stacklevel=2)
        self._seen = {i: opt.last_step for i, opt in enumerate(trainer.optimizers) if isinstance(opt, AdaptedGD)}
        if not self._seen:
            kinds = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "no optimizer"
            warnings.warn(f"AdaptedStepMonitor has nothing to log: the trainer has {kinds} and no AdaptedGD.", stacklevel=2)

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Log the report, if there has been a step."""
        adapted = {i: opt for i, opt in enumerate(trainer.optimizers) if isinstance(opt, AdaptedGD)}
        for index, optimizer in adapted.items():
            report: StepReport | None = optimizer.last_step
            if report is None or report is self._seen.get(index):  # while gradients accumulate
                continue
            self._seen[index] = report
            row = asdict(report)
            if self.keep_history:
                self.history.append({"step": int(trainer.global_step), "optimizer": index, **row})
            numbers = {key: float("nan") if row[key] is None else row[key] for key in _NUMBERS}
            numbers |= {"full_rank": report.full_rank, "rejected": report.status == "rejected"}
            root = self.name if len(adapted) == 1 else f"{self.name}_{index}"
            values = {f"{root}{self.sep}{key}": torch.tensor(float(n), dtype=torch.float64) for key, n in numbers.items()}
            trainer.callback_metrics.update(values)
            if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                for logger in trainer.loggers:  # Lightning's `log` takes as long as a small step
                    logger.log_metrics({k: float(v) for k, v in values.items()}, step=trainer.global_step)
