"""The recipes of collapse, rank loss and prescribed paths, in their small modes."""

import csv
import os
import subprocess
import sys

import pytest

from .test_recipes import RECIPES, refused, smoke

pytest.importorskip("mlxtend")
pytest.importorskip("torchdiffeq")
pytest.importorskip("tensorboard")


@pytest.mark.slow
def test_collapse(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        RECIPES / "collapse_lightning.py",
        "--smoke",
        "--out",
        tmp_path,
        "--optimizer",
        "adapted",
        "adam",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    for name in ("collapse.png", "straight_lines.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in result.stdout
    for name in ("adapted", "adam"):
        rows = list(csv.DictReader((tmp_path / name / "csv" / "metrics.csv").read_text().splitlines()))
        losses = [float(row["train_ref/loss"]) for row in rows if row["train_ref/loss"]]
        assert len(losses) == 7
        assert losses[-1] < (1e-3 if name == "adapted" else 0.9) * losses[0]
        assert list((tmp_path / name / "tensorboard").glob("events*"))
        assert ("adapted/rank" in rows[0]) is (name == "adapted")
    table = {line.split("  ")[0]: line.split() for line in result.stdout.splitlines()}
    assert float(table["loss"][2]) < 1e-3 * float(table["loss"][1])
    assert float(table["nc4_mismatch"][1]) > float(table["nc4_mismatch"][2])


def columns(rows, run):
    own = [row for row in rows if row["method"] == run]
    return {key: [float(row[key]) for row in own] for key in own[0] if key != "method"}


@pytest.mark.slow
def test_rank_loss(tmp_path):
    rows, result = smoke("rank_loss", tmp_path)
    names = list(dict.fromkeys(row["method"] for row in rows))
    assert len(names) == 3
    for name in names:
        run = columns(rows, name)
        assert run["observed"][-1] > 0.1
        assert run["predicted"] == pytest.approx(run["observed"], abs=1e-5)
        assert max(run["rank"]) < 100
    constant = columns(rows, names[0])
    closed = [t * constant["off_range"][0] for t in constant["t"]]
    assert constant["observed"] == pytest.approx(closed, abs=1e-5)
    assert "P is constant" in result.stdout
    with (tmp_path / "one_hot.csv").open() as file:
        steps = list(csv.DictReader(file))
    first, last = ({name: float(value) for name, value in row.items() if name != "method"} for row in (steps[0], steps[-1]))
    assert first["rank"] == 800
    assert last["loss"] < 1e-20
    if last["column sums"] < last["hyperplane"]:
        assert last["column sums"] < 1e-8
        assert last["rank"] == 800 - (80 - 11)
    else:
        assert last["hyperplane"] < 1e-8
        assert last["rank"] == 800


@pytest.mark.slow
def test_paths(tmp_path):
    rows, _ = smoke("paths", tmp_path)
    line, detour, twice = (columns(rows, name) for name in ("a line", "a detour", "a line, images twice"))
    for run in (line, detour):
        assert max(run["off_range"]) < 1e-6
        assert max(run["distance"]) < 1e-2
        assert min(run["rank"]) == 80
    assert min(twice["off_range"]) > 0.5
    assert twice["distance"][-1] > 1
    assert max(twice["rank"]) == 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("collapse_lightning", ("--optimizer", "rmsprop"), "invalid choice: 'rmsprop'"),
        ("collapse_lightning", ("--samples", "5000"), "--samples should be at most 4000"),
        ("rank_loss", ("--tolerance", "0"), "argument --tolerance: should be a number above 0"),
        ("paths", ("--samples", "9999"), "--samples should be at most 4000"),
        ("paths", ("--out", "/dev/null"), "--out /dev/null is a file: name a folder"),
    ],
)
def test_wrong_options(capsys, tmp_path, monkeypatch, name, arguments, words):
    from .test_recipes import load

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(RECIPES))
    assert words in refused(load(name), capsys, *arguments)
