"""The history of a monitor: a row of plain numbers for each evaluation, with the rates since the one before."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from .evaluation import Figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]


class History:
    """Rows of evaluations, and the newest row of each name, which the next rates start from. ``keep`` is for the rows."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.rows: list[Row] = []
        self.newest: dict[str, Row] = {}

    def add(self, figures: Figures, **place: Any) -> Figures:
        """Add a row of its ``name``, ``epoch``, ``step`` and ``s``, and of figures; returns the figures with their rates."""
        numbers = torch.stack([*figures.values()]).tolist()  # one transfer for all
        row: Row = place | dict(zip(figures, numbers, strict=True))
        if (last := self.newest.get(row["name"])) is not None:
            for key in ("loss", "within", "bias"):
                row[f"rate_{key}"] = _rate(last[key], row[key], row["s"] - last["s"])
                figures = {**figures, f"rate_{key}": figures[key].new_tensor(row[f"rate_{key}"])}
        for key in ("within_class", "bias_class"):
            row[key] = [row.pop(of_class) for of_class in [*row] if of_class.startswith(f"{key}_")]
        self.newest[row["name"]] = row
        if self.keep:
            self.rows.append(row)
        return figures

    def is_at(self, name: str, step: int, epoch: float | None = None) -> bool:
        """Whether the newest row of a name is of this step, and of this epoch."""
        row = self.newest.get(name)
        return row is not None and row["step"] == step and epoch in (None, row["epoch"])

    def plot(self, x: str) -> Figure:
        """A page of curves with a column for each name."""
        from ..plotting import plot_collapse_page

        runs: dict[str, list[Row]] = {}
        for row in self.rows:
            runs.setdefault(row["name"], []).append(row)
        return plot_collapse_page(runs, x=x)


def _rate(before: float, now: float, elapsed: float) -> float:
    """−Δ ln(q)/Δs; infinite if q has become zero, NaN if it was zero or no time has passed."""
    if not (elapsed > 0 and before > 0 and now >= 0):
        return math.nan
    return math.inf if now == 0 else math.log(before / now) / elapsed
