"""Several processes: the same step as one process on all of their samples, and one decision for all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .distributed import CASES, CHECKS, SIZE

pytestmark = pytest.mark.slow

# What little damping on a singular D makes of rounding: κ of 1e8 and more.
BOUNDS = {"equation": 1e-8, "backtracking": 1e-10}


def run(path, *names, device="cpu"):
    """What each case came to in one process, and in several by rank."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed", str(path), *names]
    env = {**os.environ, "DISTRIBUTED_DEVICE": device}
    root = Path(__file__).parents[1]
    ran = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return torch.load(path, weights_only=False)


@pytest.fixture(scope="module")
def results(made_once):
    folder = made_once("distributed", lambda path: run(path / "results.pt"))
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize("name", CASES)
def test_the_same_as_one_process(name, results):
    compare(name, results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_same_on_one_gpu(tmp_path):
    names = (
        "unequal_shards",
        "momentum_and_decay",
        "classes_ggn",
        "conjugate_gradients",
        "parameter_space",
        "judged_by_the_next",
    )
    results = run(tmp_path / "results.pt", *names, device="cuda:0")
    for name in names:
        compare(name, results)


def compare(name, results):
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
