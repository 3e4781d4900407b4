"""Every benchmark runs, in its small mode, in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HELPERS = {
    "__init__",
    "architectures",
    "equations",
    "jax_kernel",
    "networks",
    "options",
}  # the rest are benchmarks
NEEDS = {
    "classify": ["mlxtend", "tqdm"],
    "defaults": ["mlxtend", "tqdm"],
    "fullbatch": ["mlxtend", "tqdm"],
    "minibatch": ["mlxtend", "tqdm"],
    "monitor": ["pytorch_lightning"],
    "regression": ["torch_levenberg_marquardt", "tqdm"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({path.stem for path in (ROOT / "benchmarks").glob("*.py")} - HELPERS))
def test_small(name):
    missing = [package for package in NEEDS.get(name, ["tqdm"]) if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # other tests use the cores too
    command = [sys.executable, "-m", f"benchmarks.{name}", "--small"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout.strip()
