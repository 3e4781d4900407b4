"""From a batch of a loader to outputs and target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from .frameworks import CollapseConfigError, LightningModule, Trainer

Step = Callable[[LightningModule, Any], tuple[Tensor, Tensor]]


class BatchReader:
    """How batches are read.

    Args:
        step_fn: From module and batch to outputs and target; None for ``module(x), y``.
        target_fn: From batch to target; None for y.
        autocast: Whether to keep the trainer's autocast.
    """

    def __init__(self, step_fn: Step | None, target_fn: Callable[[Any], Tensor] | None, autocast: bool) -> None:
        self._step_fn = step_fn
        self._target_fn = target_fn
        self._autocast = autocast

    def precision(self, trainer: Trainer) -> AbstractContextManager[Any]:
        """Context of a forward pass: what a precision of all numbers needs, and autocast if it is wanted."""
        plugin = trainer.precision_plugin
        mixed = any(cls.__name__ == "MixedPrecision" for cls in type(plugin).__mro__)
        return nullcontext() if mixed and not self._autocast else plugin.forward_context()

    def moved(self, trainer: Trainer, module: LightningModule, batch: Any) -> Any:
        """The batch where the network is. Hooks before and after are not called: they are for training, and may augment."""
        holder: Any = getattr(trainer, "datamodule", None)
        if holder is None or type(holder).transfer_batch_to_device.__qualname__.startswith("DataHooks."):
            holder = module
        return holder.transfer_batch_to_device(trainer.precision_plugin.convert_input(batch), module.device, 0)

    def outputs(self, module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
        """Outputs and target.

        Raises:
            CollapseConfigError: Nobody said what they are.
        """
        if self._step_fn is not None:
            return self._step_fn(module, batch)
        if not _is_list(batch) or len(batch) < (2 if self._target_fn is None else 1):
            raise CollapseConfigError(
                f"{_EXPECTED}{_kind(batch)}. Say by `step_fn`, from module and batch, what outputs and target are."
            )
        return module(batch[0]), self.target(batch)

    def target(self, batch: Any) -> Tensor:
        """Target.

        Raises:
            CollapseConfigError: Nobody said what it is.
        """
        if self._target_fn is not None:
            return self._target_fn(batch)
        if not _is_list(batch) or len(batch) != 2:
            raise CollapseConfigError(f"{_EXPECTED}{_kind(batch)}. Say by `target_fn`, from the batch, what the target is.")
        target: Tensor = batch[1]
        return target


_EXPECTED = "Batches should be (x, y), but one is a "


def _is_list(batch: Any) -> bool:
    return isinstance(batch, Sequence) and not isinstance(batch, str)


def _kind(batch: Any) -> str:
    return f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
