"""AdaptedGD under Lightning takes the same steps in one process and in two, also after a checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytorch_lightning")


@pytest.fixture(scope="module")
def notes(made_once):
    """The results of training, by case and process."""

    def run(path):
        command = [sys.executable, "-W", "ignore", "-m", "tests.lightning_steps", str(path)]
        ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=240, check=False)
        assert ran.returncode == 0, ran.stderr[-4000:]

    folder = made_once("steps", run)
    return lambda case, rank=0: json.loads((folder / f"{case}.{rank}.json").read_text())


@pytest.mark.parametrize(
    ("alone", "together"),
    [
        ("the module, one process", "the module, two"),
        ("the module, one process", "the network, two"),
        ("functional loss, one process", "functional loss, two"),
        ("accumulated, one process", "accumulated, two"),
    ],
)
def test_two_processes_are_as_one(alone, together, notes):
    expected, found, other = notes(alone), notes(together), notes(together, 1)
    assert found["theta"] == pytest.approx(expected["theta"], rel=1e-10, abs=1e-12)
    assert found["theta"] == other["theta"]
    assert found["logged"].keys() == expected["logged"].keys()
    assert len(found["history"]) == len(expected["history"]) == 4  # before training, and after each epoch
    for ours, theirs, reference in zip(found["history"], other["history"], expected["history"], strict=True):
        assert ours.keys() == reference.keys()
        for key, value in ours.items():
            if isinstance(value, str):
                assert value == theirs[key] == reference[key]
                continue
            assert value == pytest.approx(theirs[key], rel=1e-12, nan_ok=True)
            assert value == pytest.approx(reference[key], rel=1e-9, nan_ok=True)


def test_resumed_in_two_processes(notes):
    assert notes("the module, two, resumed")["theta"] == notes("the module, two")["theta"]
