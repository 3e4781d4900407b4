"""From a batch of a loader to outputs and targets, and the call of the last layer, or of the module, for that batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .frameworks import CollapseConfigError, LightningModule, Trainer

Step = Callable[[LightningModule, Any], tuple[Tensor, Tensor]]
TargetOf = Callable[[Any], Tensor]


def forward_context(trainer: Trainer, autocast: bool) -> AbstractContextManager[Any]:
    """The precision of a forward pass: what the trainer has set, but autocast only if it is wanted."""
    plugin = trainer.precision_plugin
    mixed = any(cls.__name__ == "MixedPrecision" for cls in type(plugin).__mro__)
    return nullcontext() if mixed and not autocast else plugin.forward_context()


def to_device(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """The batch on the module's device, without the hooks before and after the transfer, which may augment it."""
    holder: Any = getattr(trainer, "datamodule", None)
    if holder is None or type(holder).transfer_batch_to_device.__qualname__.startswith("DataHooks."):
        holder = module
    return holder.transfer_batch_to_device(trainer.precision_plugin.convert_input(batch), module.device, 0)


def outputs_and_target(
    module: LightningModule, batch: Any, step_fn: Step | None, target_fn: TargetOf | None
) -> tuple[Tensor, Tensor]:
    """What ``step_fn`` returns, or ``module(x)`` and the target of a batch ``(x, …)``."""
    if step_fn is not None:
        return step_fn(module, batch)
    target = target_of(batch, target_fn)
    if not _is_list(batch) or not batch:
        raise _unexpected(batch)
    return module(batch[0]), target


def target_of(batch: Any, target_fn: TargetOf | None) -> Tensor:
    """What ``target_fn`` returns, or y of a batch ``(x, y)``."""
    if target_fn is not None:
        return target_fn(batch)
    if not _is_list(batch) or len(batch) != 2:
        raise _unexpected(batch)
    target: Tensor = batch[1]
    return target


def _is_list(batch: Any) -> bool:
    return isinstance(batch, Sequence) and not isinstance(batch, str)


def _unexpected(batch: Any) -> CollapseConfigError:
    kind = type(batch).__name__ + (f" of {len(batch)}" if hasattr(batch, "__len__") else "")
    return CollapseConfigError(
        f"Batches should be (x, y), but one is a {kind}. Pass `target_fn`, from a batch to its target, or in reference mode "
        "`step_fn`, from module and batch to outputs and target."
    )


def linear_layer(module: nn.Module, name: str, num_classes: int | None) -> nn.Linear:
    """The last layer that a user named, with an output for each class if their number is given."""
    found = dict(module.named_modules()).get(name)
    if not isinstance(found, nn.Linear):
        linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
        raise CollapseConfigError(
            f"`head` should name a Linear layer of {type(module).__name__}, but {name!r} is "
            f"{'not there' if found is None else f'a {type(found).__name__}'}. It has {', '.join(linear[-5:]) or 'none'}."
        )
    if num_classes is not None and not is_lazy(found.weight) and found.out_features != num_classes:
        raise CollapseConfigError(
            f"`head` should have an output for each of the {num_classes} classes for NC3 and NC4, but {name!r} has "
            f"{found.out_features}. Pass nc=False to leave neural collapse out."
        )
    return found


class WatchedModule:
    """Records the input and output of a module's one call for each batch, between `begin` and `end`, until it is closed.

    Later calls do not belong to the batch: an optimizer may try other weights. Messages call the module ``name``.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._name = name
        self._handles = (
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave, with_kwargs=True),
        )
        self._open = False
        self._calls: list[tuple[Any, Any]] = []
        self._before: list[int] = []  # for each call under way, the number of calls recorded when it began

    def _enter(self, *_: Any) -> None:
        if self._open:
            self._before.append(len(self._calls))

    def _leave(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # In several processes Lightning calls the module for its training_step, which calls it again: record the inner call.
        if self._open and self._before and self._before.pop() == len(self._calls):
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            self._calls.append((_copy(given), _copy(output)))

    def begin(self) -> None:
        """The next batch begins."""
        self._calls, self._before, self._open = [], [], True

    def end(self) -> None:
        """The forward pass of the batch is over."""
        self._open = False

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def only_call(self) -> tuple[Tensor, Tensor]:
        """Input and output of the one call since `begin`."""
        self.end()
        if len(self._calls) != 1:
            found = f"called {len(self._calls)} times" if self._calls else "never called"
            raise RuntimeError(
                f"{self._name} should be called once for each batch, but was {found}. Name the layer that gives the outputs by "
                "`head`, or pass `step_fn`, which computes the outputs."
            )
        given, output = self._calls.pop()
        if not isinstance(given, Tensor) or not isinstance(output, Tensor):
            raise RuntimeError(f"{self._name} should be given a tensor and return one, but returned {type(output).__name__}.")
        return given, output


def _copy(value: Any) -> Any:
    """A copy of a tensor, because users may change it in place."""
    return value.detach().clone() if isinstance(value, Tensor) else value
