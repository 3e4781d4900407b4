"""recipes/mnist.py where the dense kernel would not fit, in small: conjugate gradients, batches, and the data for it."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from .test_recipes import digits, mnist, race  # noqa: F401  (fixtures)

pytestmark = pytest.mark.slow


def run(mnist, out, *arguments):  # noqa: F811
    mnist.main(["--solver", "cg", "--width", "16", "--out", str(out), *arguments])
    summary = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    return list(csv.DictReader((out / "metrics.csv").read_text().splitlines())), summary


def test_conjugate_gradients_keep_to_the_line(mnist, capsys, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sys.modules["mnist_run"], "BATCH", 15)
    monkeypatch.setattr(mnist, "DRAWN", 3)
    monkeypatch.setattr(mnist, "IN_SPECTRUM", 10)
    rows, summary = run(mnist, tmp_path, "--samples", "40", "--steps", "5")
    t = 0.0
    for row in rows[1:]:
        t += (1 - t) * float(row["fraction"])
        assert float(row["t"]) == pytest.approx(t)
        assert float(row["theory"]) == pytest.approx((1 - t) ** 2 * float(rows[0]["loss"]))
        assert float(row["distance_all"]) <= float(row["distance"]) < 0.5
        assert float(row["distance_all"]) < 0.1
        assert int(row["iterations"]) > 0
        assert 0 < float(row["residual"]) <= 1e-2
        assert float(row["loss"]) == pytest.approx(float(row["theory"]), rel=0.2)
        assert all(float(row[f"seconds_{part}"]) >= 0 for part in ("factors", "preconditioner", "iterations"))
    assert len(rows) == 6
    own = summary["runs"]["AdaptedGD"]
    assert summary["solver"] == "cg"
    assert summary["smallest_rank"] is None
    assert own["iterations"] == sum(int(row["iterations"]) for row in rows[1:])
    assert 0 < own["test_accuracy"] < 1
    assert set(own["seconds_by_part"]) == {"factors", "preconditioner", "iterations"}
    out = capsys.readouterr().out
    assert "iter residual" in out
    assert "rank/QN" not in out
    assert "outputs together" in out
    header, *table = out.splitlines()[1:8]
    assert {len(line) for line in table} == {len(header)}
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_steps_end_where_the_loss_is_small_enough(mnist, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(mnist, "ENOUGH", 0.3)
    rows, _ = run(mnist, tmp_path, "--samples", "12")
    losses = [float(row["loss"]) for row in rows]
    assert losses[-1] <= 0.3 < min(losses[:-1])


def test_torch_beside_conjugate_gradients(mnist, tmp_path):  # noqa: F811
    rows, summary = run(mnist, tmp_path, "--samples", "12", "--steps", "2", "--optimizer", "adam", "--damping", "1e-3")
    assert {row["optimizer"] for row in rows} == {"AdaptedGD", "torch.optim.Adam"}
    assert summary["options"]["damping"] == 1e-3


def test_which_solver(mnist, monkeypatch):  # noqa: F811
    for arguments, solver in (
        (["--samples", "819"], "dense"),
        (["--samples", "820"], "cg"),
        (["--samples", "820", "--solver", "dense"], "dense"),
        (["--samples", "3", "--solver", "cg"], "cg"),
    ):
        assert mnist.prepare(mnist.build_parser().parse_args([*arguments, "--width", "4"])).solver == solver


def test_without_test_images_no_accuracy_is_made_up(mnist, capsys, tmp_path):  # noqa: F811
    _, summary = run(mnist, tmp_path, "--samples", "20", "--steps", "1", "--data", "mnist5k-shifted")
    assert summary["runs"]["AdaptedGD"]["test_accuracy"] is None
    assert "test - (no images are left to test)" in capsys.readouterr().out


def test_all_real_digits_are_used_and_the_rest_tests(digits):  # noqa: F811
    everything = digits.load_digits("mnist5k", Path("nowhere"), 5000, seed=0, use_test_images=True)
    assert everything.train_images.shape == (5000, 784)
    assert everything.test_images.shape == (0, 784)
    assert everything.test_labels.shape == (0,)
    assert torch.equal(torch.bincount(everything.train_labels), torch.full((10,), 500))
    most = digits.load_digits("mnist5k", Path("nowhere"), 4990, seed=0, use_test_images=True)
    assert most.test_labels.sort().values.tolist() == list(range(10))
    assert not (most.train_images[:, None] == most.test_images[None, :2]).all(2).any()


def test_shifted_digits(digits):  # noqa: F811
    data, again, other = (digits.load_digits("mnist5k-shifted", Path("nowhere"), 12_000, seed=s) for s in (0, 0, 1))
    assert data.train_images.shape == (12_000, 784)
    assert len(data.test_images) == 0
    assert torch.equal(data.train_images, again.train_images)
    assert not torch.equal(data.train_images, other.train_images)
    assert torch.equal(torch.bincount(data.train_labels), torch.full((10,), 1200))
    rows = (data.train_images * 255).round().to(torch.uint8)
    assert len({bytes(row.numpy()) for row in rows}) == 12_000  # no shift of an image comes twice
    real = (
        (digits.load_digits("mnist5k", Path("nowhere"), 5000, seed=0, use_test_images=True).train_images * 255)
        .round()
        .to(torch.uint8)
    )
    known = set()
    for down in range(-2, 3):
        for right in range(-2, 3):
            rolled = torch.nn.functional.pad(real.reshape(-1, 28, 28), (2, 2, 2, 2)).roll((down, right), (1, 2))
            known |= {bytes(row.numpy()) for row in rolled[:, 2:-2, 2:-2].reshape(-1, 784)}
    assert all(bytes(row.numpy()) in known for row in rows)
