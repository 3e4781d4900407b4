"""Several processes: the same step as one process on all of their samples, and one decision for all."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .distributed import CASES, CHECKS, SIZE

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("distributed")]  # one process runs all cases

# What little damping on a singular D makes of rounding: κ of 1e8 and more.
BOUNDS = {"equation": 1e-8, "backtracking": 1e-10}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each case came to in one process, and in several by rank."""
    path = tmp_path_factory.mktemp("distributed") / "results.pt"
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed", str(path)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("name", CASES)
def test_the_same_as_one_process(name, results):
    alone, together = results["alone"][name], [found[name] for found in results["together"]]
    if alone is None:
        pytest.skip("not installed")
    theta = together[0]["theta"]
    bound = BOUNDS.get(name, 1e-12 if alone["double"] else 1e-5)
    for ours, expected in zip(theta, alone["theta"], strict=True):
        assert (ours - expected).norm() <= bound * expected.norm()
    assert (alone["theta"][0] - alone["theta"][-1]).norm() > 1e-3 * theta.norm() or len(theta) == 1
    for ours, expected in zip(together[0]["reports"], alone["reports"], strict=True):
        for field in ("status", "num_trials", "rank", "num_outputs", "space"):
            assert ours[field] == expected[field]
        assert ours["relative_damping"] == pytest.approx(expected["relative_damping"], rel=1e-4)
    for other in together[1:]:
        assert torch.equal(other["theta"], theta)
        assert repr(other["reports"]) == repr(together[0]["reports"])
        assert repr(other["state"]) == repr(together[0]["state"])


@pytest.mark.parametrize("name", CHECKS)
def test_all_processes_agree(name, results):
    assert [found[name] for found in results["together"]] == [""] * SIZE
