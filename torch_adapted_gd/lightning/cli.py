"""A mixin for LightningCLI, so that configuration files can name `AdaptedGD` or any optimizer of torch.

LightningCLI itself gives an optimizer the parameters of the module, but `AdaptedGD` needs the module. Needs jsonargparse:
``pip install 'torch_adapted_gd[lightning]' 'jsonargparse[signatures]'``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..optimizer import AdaptedGD
from ..schedule import LinearInterpolationLR
from .frameworks import LightningModule

if TYPE_CHECKING:
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
else:
    LightningCLI = object

__all__ = ["AdaptedCLIMixin"]


class AdaptedCLIMixin(LightningCLI):
    """Adds ``optimizer`` and ``lr_scheduler`` to a LightningCLI's configuration, for `AdaptedGD` and any other optimizer.

    Put it before the LightningCLI of either namespace: ``class CLI(AdaptedCLIMixin, LightningCLI): pass``. The configuration
    then has

    - ``optimizer``: ``class_path`` and ``init_args``, without ``model`` or ``params``;
    - ``optimizer_module``: for `AdaptedGD`, the name of the submodule that computes the outputs: ``net`` if ``training_step``
      calls ``self.net(x)``; by default the module itself, for ``self(x)``;
    - ``optimizer_criterion``: for `AdaptedGD`, the name of the submodule that is its ``criterion``: ``loss`` if
      ``training_step`` calls ``self.loss(outputs, targets)``;
    - ``lr_scheduler``: ``class_path`` and ``init_args``, without ``optimizer``;
    - ``lr_scheduler_interval``: ``step`` or ``epoch``; by default ``step`` for `LinearInterpolationLR`, else ``epoch``;
    - ``lr_scheduler_monitor``: the metric that a scheduler such as `ReduceLROnPlateau` reads.

    Without ``optimizer``, the module's own ``configure_optimizers`` is used.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "auto_configure_optimizers": False})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options."""
        super().add_arguments_to_parser(parser)
        optimizer, scheduler = Callable[[Any], Optimizer], Callable[[Optimizer], LRScheduler]
        parser.add_argument("--optimizer", type=optimizer | None, default=None, help="the optimizer")
        parser.add_argument("--optimizer_module", type=str | None, default=None, help="the submodule for AdaptedGD")
        parser.add_argument("--optimizer_criterion", type=str | None, default=None, help="the loss for AdaptedGD")
        parser.add_argument("--lr_scheduler", type=scheduler | None, default=None, help="the schedule")
        parser.add_argument("--lr_scheduler_interval", choices=["step", "epoch"], help="how often it is stepped")
        parser.add_argument("--lr_scheduler_monitor", type=str | None, default=None, help="the metric that it reads")

    def instantiate_classes(self) -> None:
        """Make the objects, and give the module its optimizer."""
        super().instantiate_classes()
        nested = self.subcommand is not None
        written = self.config[str(self.subcommand)] if nested else self.config
        made = self.config_init[str(self.subcommand)] if nested else self.config_init
        if made.get("optimizer") is None:
            for key in ("optimizer_module", "optimizer_criterion", "lr_scheduler"):
                if made.get(key) is not None:
                    raise ValueError(f"`{key}` should come with an `optimizer`, but there is none in the configuration.")
            return
        self.model.configure_optimizers = partial(_configure_optimizers, self.model, made, _is_adapted(written.optimizer))


def _is_adapted(written: Any) -> bool:
    path = str(getattr(written, "class_path", written))
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None) if module else None
    return isinstance(found, type) and issubclass(found, AdaptedGD)


def _configure_optimizers(module: LightningModule, made: Any, adapted: bool) -> Any:
    """What `configure_optimizers` of the module returns, from the objects that a configuration made."""
    inner, criterion = made.get("optimizer_module"), made.get("optimizer_criterion")
    for key, value in (("optimizer_module", inner), ("optimizer_criterion", criterion)):
        if value is not None and not adapted:
            raise ValueError(f"`{key}` is for AdaptedGD, but got {value!r} with another optimizer. Leave it out.")
    network = module if inner is None else module.get_submodule(inner)
    watched = {} if criterion is None else {"criterion": module.get_submodule(criterion)}
    optimizer = made.optimizer(network, **watched) if adapted else made.optimizer(module.parameters())
    if made.get("lr_scheduler") is None:
        return optimizer
    scheduler, interval = made.lr_scheduler(optimizer), made.get("lr_scheduler_interval")
    by_step = isinstance(scheduler, LinearInterpolationLR) if interval is None else interval == "step"
    settings = {"scheduler": scheduler, "interval": "step" if by_step else "epoch"}
    if made.get("lr_scheduler_monitor") is not None:
        settings["monitor"] = made.lr_scheduler_monitor
    return {"optimizer": optimizer, "lr_scheduler": settings}
