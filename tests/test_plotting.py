import sys

import pytest
import torch

from torch_adapted_gd import plotting


def test_figures_hold_what_they_are_given(tmp_path):
    t = [0.0, 0.5, 1.0]
    loss = plotting.plot_loss({"ours": (t, [1.0, 0.2, 1e-9])}, (t, [1.0, 0.25, 0.0]))
    (ax,) = loss.axes
    assert ax.get_yscale() == "log"
    assert [line.get_label() for line in ax.lines] == ["ours", "theory: (1 − t)² C₀"]

    curves = torch.tensor([[1.0, 2.0, 3.0], [0.5, 1.0, 1.5], [0.0, 0.0, 0.0]])
    collapse = plotting.plot_collapse(t, curves, 0.1 * curves, ["a", "b", "c"])
    assert len(collapse.axes) == 2
    assert list(collapse.axes[0].lines[0].get_ydata()) == [1.0, 0.5, 0.0]

    targets, labels = torch.eye(3), torch.tensor([0, 1, 2, 2])
    outputs = torch.stack([(1 - s) * torch.zeros(4, 3) + s * targets[labels] for s in (0.0, 0.5, 1.0)])
    paths = plotting.plot_output_paths({"one": outputs, "two": outputs}, labels, targets)
    first, second = paths.axes
    assert first.get_xlim() == second.get_xlim()
    assert first.lines[0].get_xdata()[-1] == pytest.approx(1.0)  # class 0 ends at its target, angle 0 on the circle

    for i, figure in enumerate((loss, collapse, paths)):
        figure.savefig(tmp_path / f"{i}.png")


def test_many_classes_and_an_empty_one():
    curves = torch.rand(4, 23)
    curves[:, 3] = float("nan")
    plotting.plot_collapse([0.0, 0.3, 0.6, 1.0], curves, curves)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"Figures need matplotlib: pip install 'torch_adapted_gd\[plot\]'"):
        plotting.plot_loss({})
