"""Warnings that point at the user's line."""

import sys
import warnings

_FRAMEWORKS = (
    *("torch", "lightning", "pytorch_lightning", "lightning_fabric", "accelerate", "transformers", "skorch", "ignite"),
    __name__.partition(".")[0],
)


class AdaptedWarning(UserWarning):
    """The class of this package's warnings. `AdaptedGD` gives each one once per optimizer."""


def warn_user(text: str) -> None:
    """Warn, pointing at the innermost line that belongs neither to this package nor to a framework that called it."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] in _FRAMEWORKS:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, AdaptedWarning, stacklevel=level)
