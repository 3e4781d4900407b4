"""Lightning under both of its names: ``lightning.pytorch`` and ``pytorch_lightning`` are two packages with equal contents.

The callbacks and exceptions of one are not those of the other. The classes here inherit from each package that is installed.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["Callback", "CollapseConfigError", "LightningModule", "Trainer"]


def _find(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except Exception as error:  # RuntimeError too: a torchvision that was built for another torch
        _WHY.append(f"{name}: {error}")
        return None


_WHY: list[str] = []
_FOUND = [module for module in map(_find, ("lightning.pytorch", "pytorch_lightning")) if module is not None]

if not _FOUND:
    raise ImportError(
        "torch_adapted_gd.lightning needs Lightning: pip install 'torch_adapted_gd[lightning]'. It could not be imported; "
        + "; ".join(_WHY)
    )


def _each(submodule: str, name: str) -> tuple[Any, ...]:
    return tuple(getattr(importlib.import_module(f"{module.__name__}{submodule}"), name) for module in _FOUND)


if TYPE_CHECKING:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    Callback = type("Callback", _each("", "Callback"), {"__doc__": "A callback of each Lightning that is installed."})
    LightningModule = Trainer = Any
    MisconfigurationException = type(
        "MisconfigurationException", _each(".utilities.exceptions", "MisconfigurationException"), {"__doc__": "Lightning's."}
    )


class CollapseConfigError(MisconfigurationException, ValueError):
    """The options of a monitor do not fit. Raised before training begins; a MisconfigurationException of each Lightning."""
