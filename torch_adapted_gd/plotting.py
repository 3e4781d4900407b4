"""Figures of recorded runs. Matplotlib is imported only when a figure is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .checks import one_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_THEORY: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.2, "zorder": 5}


def _figure(columns: int = 1, width: float = 6.4, rows: int = 1, height: float = 4.4) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure  # not by pyplot: no window, and no global state
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'torch_adapted_gd[plot]'.") from error
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=150)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes


def _class_colours(count: int) -> list[Any]:
    import matplotlib

    palette = matplotlib.colormaps["tab10" if count <= 10 else "turbo"]
    return [palette(i if count <= 10 else i / (count - 1)) for i in range(count)]


def plot_loss(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    theory: tuple[Sequence[float], Sequence[float]] | None = None,
    *,
    xlabel: str = "t",
    theory_label: str = "theory: (1 − t)² C₀",
) -> Figure:
    """Loss curves on a log axis.

    Args:
        curves: Name → x values and losses.
        theory: x values and the predicted loss, drawn dashed.
        xlabel: Name of the x axis.
        theory_label: Name of the prediction.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    figure, (ax,) = _figure()
    for name, (x, y) in curves.items():
        ax.plot(x, y, marker="o" if len(x) <= 60 else None, markersize=3.5, label=name)
    if theory is not None:
        x, y = theory
        ax.plot(x, y, label=theory_label, **_THEORY)
    ax.set_yscale("log", nonpositive="mask")
    ax.set(xlabel=xlabel, ylabel="loss C", title="Training loss")
    ax.legend(frameon=False)
    return figure


def plot_collapse(t: Sequence[float], averages: Tensor, deviations: Tensor, class_names: Sequence[str] | None = None) -> Figure:
    """Distances of class averages from their targets, and mean deviations within classes: straight lines (Corollary 3.2).

    Args:
        t: Times, ``[T]``.
        averages: |x̄_j(t) − y_j|, ``[T, J]``.
        deviations: Mean of |Δx_i(t)| over the samples of class j, ``[T, J]``.
        class_names: Names of the classes; by default their numbers.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    figure, axes = _figure(columns=2, width=5.2)
    names = class_names or [str(j) for j in range(averages.shape[1])]
    titles = ("Class averages: |x̄ⱼ − yⱼ|", "Deviations within classes: mean |Δxᵢ|")
    for ax, values, title in zip(axes, (averages, deviations), titles, strict=True):
        for name, colour, curve in zip(names, _class_colours(len(names)), values.T.tolist(), strict=True):
            if math.isnan(curve[0]):
                continue  # a class without samples
            ax.plot(t, curve, color=colour, linewidth=1.4, label=name)
            ax.plot([t[0], 1.0], [curve[0], 0.0], **{**_THEORY, "linewidth": 0.6, "alpha": 0.6})
        ax.set(xlabel="t", title=title, ylim=(0, None))
    axes[0].plot([], [], label="(1 − t) × start", **_THEORY)
    axes[0].legend(frameon=False, ncols=2, fontsize="small", title="class")
    return figure


# Panels of the page: title, the key that a run needs, and its curves with their labels; without curves, one for each class.
_PAGE: list[tuple[str, str, dict[str, str]]] = [
    ("Class averages: |x̄ⱼ − yⱼ|²", "bias_class", {}),
    ("Deviations within classes: mean |Δxᵢ|²", "within_class", {}),
    ("Squared distance to the class targets", "loss", {"loss": "loss", "within": "within", "bias": "bias"}),
    (
        "NC1: variation within classes",
        "nc1_trace",
        {"nc1_pinv": "tr Σ_W Σ_B⁺ / K", "nc1_trace": "tr Σ_W / tr Σ_B", "nc1_cdnv": "CDNV"},
    ),
    (
        "NC2: distance from a simplex",
        "nc2_etf_means",
        {
            f"nc2_{key}_{of}": f"{label}, {of}"
            for of in ("means", "weights")
            for key, label in (("equinorm", "norms"), ("maxangle", "angles"), ("etf", "ETF"))
        },
    ),
    (
        "NC3 and NC4",
        "nc3",
        {"nc3": "NC3: W against means", "nc3_etf": "NC3: ETF of WMᵀ", "nc4_mismatch": "NC4: mismatches"},
    ),
]


def plot_collapse_page(histories: Mapping[str, Sequence[Mapping[str, Any]]], *, x: str = "epoch") -> Figure:
    """A page of collapse curves on log axes, with a column for each run and a row for each recorded quantity.

    The quantities are the squared distances and deviations of each class, their sums, and NC1 to NC4. Panels in a row share
    their y axis. Zeros are left out.

    Args:
        histories: Name of a run → its rows, as in `CollapseMonitor.history`.
        x: The x axis: ``"epoch"``, ``"step"`` or ``"s"``.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: There are no rows, or ``x`` is unknown.
    """
    one_of("x", x, ("epoch", "step", "s"))
    runs = {name: rows for name, rows in histories.items() if rows}
    if not runs:
        raise ValueError("`histories` should have at least one row, but has none: nothing has been evaluated yet.")
    panels = [panel for panel in _PAGE if any(panel[1] in rows[-1] for rows in runs.values())]
    blocks = 2 if len(panels) > 3 else 1  # two panels beside each other, each with all runs
    lines, columns = -(-len(panels) // blocks), blocks * len(runs)
    figure, axes = _figure(columns, 4.4, lines, 3.2)
    for place, (title, key, curves) in enumerate(panels):
        block, line = divmod(place, lines)
        begin = line * columns + block * len(runs)
        row = axes[begin : begin + len(runs)]
        for ax, (name, rows) in zip(row, runs.items(), strict=True):
            if ax is not row[0]:
                ax.sharey(row[0])
            xs = [float(r[x]) for r in rows]
            if not curves:
                by_class = [r[key] for r in rows]
                for j, colour in enumerate(_class_colours(len(by_class[0]))):
                    ax.plot(xs, [values[j] for values in by_class], color=colour, linewidth=1.2, label=str(j))
            for curve, label in curves.items():
                if curve in rows[-1]:
                    values = [r.get(curve, math.nan) for r in rows]
                    ax.plot(xs, values, marker=".", markersize=4, linewidth=1.2, label=label)
            ax.set_yscale("log", nonpositive="mask")
            ax.set_xlabel(x)
            ax.set_title(f"{name}\n{title}" if line == 0 else title, fontsize="medium")
        if len(row[-1].lines) <= 10:
            row[-1].legend(frameon=False, fontsize="x-small", ncols=1 if curves else 2)
    return figure


def plot_output_paths(paths: Mapping[str, Tensor], labels: Tensor, targets: Tensor) -> Figure:
    """Paths of the outputs, mapped to a plane in which the class targets lie on a circle.

    Args:
        paths: Name → outputs ``[T, N, Q]`` along a run; one panel for each.
        labels: Class of each sample, ``[N]``.
        targets: Target y_j of each class, ``[J, Q]``.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    figure, axes = _figure(columns=len(paths), width=5.6)
    colours = _class_colours(len(targets))
    angles = torch.arange(len(targets), dtype=torch.float64) * (2 * math.pi / len(targets))
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)  # [J, 2]
    plane = torch.linalg.pinv(targets.double()) @ circle  # [Q, 2], maps the targets to the circle
    for ax, (name, outputs) in zip(axes, paths.items(), strict=True):
        points = outputs.double() @ plane  # [T, N, 2]
        for j, colour in enumerate(colours):
            for i in torch.nonzero(labels == j).flatten().tolist():
                ax.plot(points[:, i, 0], points[:, i, 1], color=colour, linewidth=0.7, alpha=0.7)
                ax.plot(*points[0, i], color=colour, marker=".", markersize=3, linestyle="none")
            ax.plot(*circle[j], color=colour, marker="*", markersize=13, markeredgecolor="black", linestyle="none", zorder=6)
            x, y = circle[j].tolist()
            offset = {"xytext": (14 * x, 14 * y), "textcoords": "offset points"}
            ax.annotate(str(j), (x, y), ha="center", va="center", fontsize=9, **cast(Any, offset))
        ax.set(title=f"Paths of the outputs: {name}", aspect="equal")
        ax.set_axis_off()
    reach = max(abs(bound) for ax in axes for bound in (*ax.get_xlim(), *ax.get_ylim()))
    reach = min(max(reach, 1.25), 3.0)  # diverged paths would make the others too small
    for ax in axes:  # one scale for all panels
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach))
    return figure
