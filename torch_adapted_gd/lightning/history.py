"""What was found in each evaluation, in plain numbers."""

from __future__ import annotations

import math
from typing import Any

import torch

from .evaluation import Figures

Row = dict[str, Any]

_RATES = ("loss", "within", "bias")


class History:
    """Rows in the order in which they were found, and the newest of each name.

    Args:
        keep: Keep all rows, and not the newest alone.
    """

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self.rows: list[Row] = []
        self.newest: dict[str, Row] = {}

    def add(self, name: str, figures: Figures, *, epoch: float, step: int, s: float) -> Figures:
        """Add a row.

        Args:
            name: Of what.
            figures: Float64 scalars, and values of each class, ``[K]``.
            epoch: Epochs done.
            step: Optimizer steps done.
            s: What rates are taken in.

        Returns:
            The figures with their rates, if there was a row of this name before.
        """
        keys = list(figures)
        flat = torch.cat([figures[key].flatten() for key in keys]).tolist()  # one transfer for all
        row: Row = {"name": name, "epoch": epoch, "step": step, "s": s}
        for key in keys:
            count = figures[key].numel()
            row[key] = flat[:count] if figures[key].ndim else flat[0]
            flat = flat[count:]
        last = self.newest.get(name)
        if last is not None:
            for key in _RATES:
                row[f"rate_{key}"] = _rate(last[key], row[key], s - last["s"])
                figures = {**figures, f"rate_{key}": torch.tensor(row[f"rate_{key}"], dtype=torch.float64)}
        self.newest[name] = row
        if self._keep:
            self.rows.append(row)
        return figures

    def begin_run(self) -> None:
        """Another training begins: what comes is not compared with what was."""
        self.newest = {}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"rows": list(self.rows), "newest": dict(self.newest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.rows, self.newest = list(state["rows"]), dict(state["newest"])

    def named(self) -> dict[str, list[Row]]:
        """Rows by name."""
        return {
            name: [row for row in self.rows if row["name"] == name] for name in dict.fromkeys(row["name"] for row in self.rows)
        }


def _rate(before: float, now: float, elapsed: float) -> float:
    """−Δ ln(q)/Δs; infinite where q has become zero, NaN where it was or no time has passed."""
    if not (elapsed > 0 and before > 0 and now >= 0):
        return math.nan
    return math.inf if now == 0 else math.log(before / now) / elapsed
