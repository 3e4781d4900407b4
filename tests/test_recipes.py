"""The recipes as a person runs them: a process, its table, its files, its one-line errors."""

import csv
import gzip
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

RECIPES = Path(__file__).parent.parent / "recipes"


def load(name):
    """One recipe file as a module; files that it imports come before it."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up, and one recipe file the other
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def race():
    return load("race")


@pytest.fixture(scope="module")
def mnist(digits, race):
    load("mnist_run")
    return load("mnist")


@pytest.fixture(scope="module")
def pinn(race):
    return load("pinn")


@pytest.fixture(scope="module")
def regression(race):
    return load("regression")


def refused(recipe, capsys, *arguments):
    """What a run that has to fail writes last."""
    with pytest.raises(SystemExit) as caught:
        recipe.main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("--samples", "1", "--steps", "1"),
        ("--samples", "7", "--steps", "2", "--dtype", "float64", "--activation", "relu", "--optimizer", "adam"),
        ("--samples", "10", "--steps", "3", "--optimizer", "sgd", "--lr", "50"),
    ],
)
def test_odd_sizes(mnist, capsys, tmp_path, arguments):
    mnist.main([*arguments, "--width", "8", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "AdaptedGD: loss" in out
    assert ("diverged and was stopped" in out) is ("50" in arguments)
    assert len(list(tmp_path.iterdir())) == 6


def smoke(name, out, *arguments):
    """A run of seconds in a process of its own: the rows it wrote and what it said; its figures are checked."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # other tests use the cores too
    command = [sys.executable, RECIPES / f"{name}.py", "--smoke", "--out", out, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert list(out.glob("*.png"))
    for figure in out.glob("*.png"):
        assert figure.read_bytes().startswith(b"\x89PNG")
        assert figure.name in result.stdout
    return list(csv.DictReader((out / "metrics.csv").read_text().splitlines())), result


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adapted", "lbfgs"])
def test_smoke(tmp_path, optimizer):
    rows, result = smoke("mnist", tmp_path, "--optimizer", optimizer)
    adapted = [row for row in rows if row["optimizer"] == "AdaptedGD"]
    assert len(adapted) == 11
    for k, row in enumerate(adapted):
        assert float(row["t"]) == pytest.approx(k / 10)
        assert float(row["theory"]) == pytest.approx((1 - k / 10) ** 2 * float(adapted[0]["loss"]))
        assert k == 0 or float(row["rank"]) == float(row["num_outputs"]) == 200
        assert float(row["distance"]) < 0.05
        # straight lines of Corollary 3.2
        assert float(row["class_average_error"]) == pytest.approx(
            (1 - k / 10) * float(adapted[0]["class_average_error"]), abs=0.02
        )
    assert float(adapted[-1]["loss"]) < 1e-5 * float(adapted[0]["loss"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["smallest_rank"] == summary["num_outputs"] == 200
    assert summary["runs"]["AdaptedGD"]["train_accuracy"] == 1.0
    assert len(summary["runs"]) == (1 if optimizer == "adapted" else 2)
    for run in summary["runs"].values():
        assert run["diverged"] is False
        assert 0 < run["largest_distance_from_line"] < (0.05 if run is summary["runs"]["AdaptedGD"] else 2)
    assert {path.name for path in tmp_path.glob("*.png")} == {"loss.png", "collapse.png", "paths.png", "spectrum.png"}
    assert "rank/QN" in result.stdout
    assert "200/200" in result.stdout


def last_rows(rows):
    """The last row of each method; times and counts of each rise."""
    methods = {}
    for row in rows:
        methods.setdefault(row["method"], []).append(row)
    for own in methods.values():
        seconds = [float(row["seconds"]) for row in own]
        assert seconds == sorted(seconds)
        assert len(own) > 1
    return {method: own[-1] for method, own in methods.items()}


@pytest.mark.slow
def test_pinn_smoke(tmp_path):
    rows, result = smoke("pinn", tmp_path)
    last = last_rows(rows)
    assert list(last) == ["AdaptedGD", "Adam", "LBFGS"]
    assert last["AdaptedGD"]["gradients"] == "20"
    assert float(last["AdaptedGD"]["error"]) < 1e-2
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv", "error.png", "solution.png"}
    assert f"{float(last['AdaptedGD']['error']):.2e}" in result.stdout


@pytest.mark.slow
def test_regression_smoke(tmp_path):
    rows, result = smoke("regression", tmp_path)
    last = last_rows(rows)
    installed = importlib.util.find_spec("torch_levenberg_marquardt") is not None
    assert list(last) == ["AdaptedGD", "Adam", "LBFGS", *["torch-levenberg-marquardt"] * installed]
    assert ("pip install torch-levenberg-marquardt" in result.stdout) is not installed
    assert len({row["loss"] for row in rows if row["epochs"] == "0"}) == 1  # the same weights to begin with
    assert float(last["AdaptedGD"]["epochs"]) == 2
    assert float(last["AdaptedGD"]["loss"]) < 1e-2
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv", "loss.png", "fit.png"}


@pytest.mark.slow
def test_regression_says_how_to_get_the_peer_that_is_not_installed(regression, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(regression.importlib.util, "find_spec", lambda name: None)
    regression.main(["--smoke", "--epochs", "1", "--out", str(tmp_path)])
    assert "torch-levenberg-marquardt is not installed and was left out: pip install" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows_wanted", "loss"), [("burgers", 16, 2.0), ("inverse", 21, 5.0)])
def test_smoke_of_equations(tmp_path, name, rows_wanted, loss):
    rows, result = smoke(name, tmp_path)
    assert [int(row["steps"]) for row in rows] == list(range(rows_wanted))
    assert float(rows[-1]["loss"]) < min(loss, float(rows[0]["loss"]))
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv", "solution.png"}
    assert f"{float(rows[-1]['error']):.2e}" in result.stdout


def test_exact_solution_of_burgers_equation_is_converged(race):
    burgers = load("burgers")
    points = burgers.inner_points(50, 0)
    torch.testing.assert_close(burgers.exact(points), burgers.exact(points, 5001), rtol=0, atol=1e-12)
    given = burgers.given_points(20)
    values = torch.where(given[:, :1] == 0, -(torch.pi * given[:, 1:]).sin(), 0.0)
    torch.testing.assert_close(burgers.exact(given), values, rtol=0, atol=1e-12)


def test_laplacian_and_points_of_pinn(pinn):
    inside, boundary = pinn.collocation_points(3)
    laplacian = pinn.laplacian(lambda x: pinn.exact(x)[:, None], inside)
    torch.testing.assert_close(-laplacian[:, 0], pinn.source(inside))
    assert len(boundary) == 12
    assert ((boundary == 0) | (boundary == 1)).any(1).all()


def test_time_of_recording_does_not_count(race):
    run = race.Run("method")
    for _ in range(2):
        run.record(lambda: time.sleep(0.2) or {"loss": 1.0})
    assert run.rows[1]["seconds"] < 0.1
    assert run.seconds < 0.2
    assert not run.due(0.15)
    assert run.column("loss") == [1.0, 1.0]
    assert list(run.until(-1.0)) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--samples", "5001"), "--samples should be at most 5000 for mnist5k, but got 5001"),
        (("--damping", "-1"), "argument --damping: should be a number, at least 0, but got '-1'"),
        (("--steps", "ten"), "argument --steps: should be a whole number above 0, but got 'ten'"),
        (("--lr", "0.1"), "argument --lr: is for torch's optimizers"),
        (("--out", "/dev/null"), "--out /dev/null is a file: name a folder"),
    ],
)
def test_wrong_options_give_one_clear_line(mnist, capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)  # where the default --out would be made
    line = refused(mnist, capsys, *arguments)
    assert re.match(r"[\w.-]+: error: ", line)
    assert words in line
    assert not list(tmp_path.iterdir())


def test_missing_data_without_a_network_gives_one_clear_line(mnist, capsys, tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    line = refused(mnist, capsys, "--data", "fashion-mnist", "--root", tmp_path, "--out", tmp_path)
    assert f"fashion-mnist is not under {tmp_path} and could not be downloaded" in line
    assert "or use --data mnist5k or mnist5k-shifted, which need no download" in line


def write_idx(folder, kind, count):
    """Small files in MNIST's own format: magic number, sizes, bytes."""
    generator = np.random.default_rng(count)
    images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = np.arange(count, dtype=np.uint8) % 10
    for name, array in ((f"{kind}-images-idx3-ubyte", images), (f"{kind}-labels-idx1-ubyte", labels)):
        header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
        (folder / name).write_bytes(header + array.tobytes())
        with gzip.open(folder / f"{name}.gz", "wb") as file:
            file.write(header + array.tobytes())
    return images, labels


@pytest.mark.parametrize(("source", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_idx_files(tmp_path, digits, source, folder):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    images, _ = write_idx(raw, "train", 40)
    write_idx(raw, "t10k", 7)
    data = digits.load_digits(source, tmp_path, 30, seed=1)
    assert data.train_images.shape == (30, 784)
    assert data.test_images.shape == (7, 784)
    assert torch.equal(torch.bincount(data.train_labels), torch.full((10,), 3))
    rows = torch.from_numpy(images.reshape(40, 784)).double() / 255
    assert all((rows == image).all(1).any() for image in data.train_images)


def test_real_digits_are_spread_over_the_classes(digits):
    data = digits.load_digits("mnist5k", Path("nowhere"), 25, seed=0)
    assert data.train_images.dtype == torch.float64
    assert 0 <= data.train_images.min() < data.train_images.max() <= 1
    counts = torch.bincount(data.train_labels, minlength=10)
    assert set(counts.tolist()) == {2, 3}
    assert len(data.test_images) == 1000
    again, other = (digits.load_digits("mnist5k", Path("nowhere"), 25, seed=s) for s in (0, 1))
    assert torch.equal(data.train_images, again.train_images)
    assert not torch.equal(data.train_images, other.train_images)
    everything = digits.load_digits("mnist5k", Path("nowhere"), 4000, seed=0)
    test_rows = {tuple(row.nonzero().flatten().tolist()) for row in everything.test_images}
    train_rows = {tuple(row.nonzero().flatten().tolist()) for row in everything.train_images}
    assert not test_rows & train_rows
