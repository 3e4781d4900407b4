"""Outputs that training, validation and tests compute anyway, gathered as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .evaluation import Evaluation, Watched
from .frameworks import Callback, LightningModule, Trainer


class Stream:
    """Watches a module while Lightning runs its loops.

    Args:
        module: What gives the outputs: the last layer, or the whole.
        name: What it is called in messages.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._watched = Watched(module)
        self._name = name
        self._handle = module.register_forward_hook(self._take, with_kwargs=True)
        self._open = False

    def _take(self, *call: Any) -> None:
        if self._open:
            self._watched.take(*call)

    def close(self) -> None:
        """Watch no longer."""
        self._handle.remove()

    def begin_batch(self) -> None:
        """A batch is about to be computed."""
        self._watched.calls.clear()
        self._open = True

    def end_forward(self) -> None:
        """What is computed now is no more of this batch: a backward pass, or an optimizer that tries other weights."""
        self._open = False

    def add(self, evaluation: Evaluation, target: Tensor) -> None:
        """Add the batch that was computed.

        Args:
            evaluation: To what.
            target: Of the batch.

        Raises:
            RuntimeError: The module was not called just once.
        """
        self.end_forward()
        with torch.no_grad():
            features, outputs = self._watched.only_call(self._name)
            evaluation.add(outputs, target, features)


class StreamStages(Callback):
    """Passes on what Lightning says of validation and tests."""

    def begin_stage(self, trainer: Trainer, module: LightningModule, stage: str, loaders: int) -> None:
        """Batches of so many loaders are to come."""
        raise NotImplementedError

    def add_batch(self, stage: str, index: int, batch: Any) -> None:
        """A batch of this loader has been computed."""
        raise NotImplementedError

    def end_stage(self, trainer: Trainer, module: LightningModule, stage: str, epoch: float) -> None:
        """These were all."""
        raise NotImplementedError

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to gather."""
        loaders = trainer.val_dataloaders
        self.begin_stage(trainer, pl_module, "val", len(loaders) if isinstance(loaders, Sequence) else 1)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch."""
        del dataloader_idx
        self.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Gather the batch."""
        del pl_module, outputs, batch_idx
        if not trainer.sanity_checking:
            self.add_batch("val", dataloader_idx, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was gathered."""
        self.end_stage(trainer, pl_module, "val", float(trainer.current_epoch))

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to gather."""
        loaders = trainer.test_dataloaders
        self.begin_stage(trainer, pl_module, "test", len(loaders) if isinstance(loaders, Sequence) else 1)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch."""
        del dataloader_idx
        self.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Gather the batch."""
        del pl_module, outputs, batch_idx
        if not trainer.sanity_checking:
            self.add_batch("test", dataloader_idx, batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was gathered."""
        self.end_stage(trainer, pl_module, "test", float(trainer.current_epoch))
