"""What the command lines of the benchmarks share."""

import argparse
from typing import Any


def parse(parser: argparse.ArgumentParser, **small: Any) -> argparse.Namespace:
    """The options of a benchmark, which ``--small`` is added to.

    Args:
        parser: The benchmark's own.
        small: Defaults that ``--small`` changes, so that it ends in seconds; what the user gives goes before them.
    """
    parser.add_argument("--small", action="store_true", help="one small size, to see that it runs")
    options = parser.parse_args()
    if options.small:
        parser.set_defaults(**small)
        options = parser.parse_args()
    return options
