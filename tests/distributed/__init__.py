"""What several processes do, against one process on all of their samples: `python -m tests.distributed FILE [NAME...]`."""

from . import agreement, steps  # noqa: F401, they register cases and checks
from .parts import CASES, CHECKS, SIZE

__all__ = ["CASES", "CHECKS", "SIZE"]
