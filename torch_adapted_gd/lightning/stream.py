"""Outputs that training, validation and tests compute anyway, gathered as they come."""

from __future__ import annotations

import sys
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
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # what has been compiled would not call the hooks
        self._handles = (
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._take, with_kwargs=True),
        )
        self._open = False
        self._before: list[int] = []  # how many calls there had been when those that are under way began

    def _enter(self, *call: Any) -> None:
        del call
        if self._open:
            self._before.append(len(self._watched.calls))

    def _take(self, *call: Any) -> None:
        # In several processes Lightning calls the module for its whole training_step, in which the module is called.
        if self._open and self._before and self._before.pop() == len(self._watched.calls):
            self._watched.take(*call)
            self._watched.calls[-1] = tuple(copied(value) for value in self._watched.calls[-1])

    def close(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()

    def begin_batch(self) -> None:
        """A batch is about to be computed."""
        self._watched.calls.clear()
        self._before.clear()
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


def copied(value: Any) -> Any:
    """Tensors as they are now: the user may change them in place."""
    return value.clone() if isinstance(value, Tensor) else value


class StreamStages(Callback):
    """Passes on what Lightning says of batches."""

    _stream: Stream | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch."""
        if self._stream is not None:
            self._stream.begin_batch()
        del trainer, pl_module, batch, batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward pass is over."""
        if self._stream is not None:
            self._stream.end_forward()
        del trainer, pl_module, loss

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off: there will be no teardown."""
        del exception
        self.teardown(trainer, pl_module, "")

    def begin_stage(self, trainer: Trainer, module: LightningModule, stage: str, loaders: int) -> None:
        """Batches of so many loaders are to come."""
        raise NotImplementedError

    def add_batch(self, stage: str, index: int, batch: Any) -> None:
        """A batch of this loader has been computed."""
        raise NotImplementedError

    def end_stage(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
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
        self.end_stage(trainer, pl_module, "val")

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
        self.end_stage(trainer, pl_module, "test")
