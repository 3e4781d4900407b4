import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch_adapted_gd

ROOT = Path(__file__).parent.parent


def test_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import torch_adapted_gd; new = set(sys.modules) - before; "
        "print([m for m in new if m.split('.')[0] in "
        "('lightning', 'pytorch_lightning', 'torchmetrics', 'torchvision', 'matplotlib', 'scipy', 'tqdm', 'mlxtend')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_all_is_there_and_documented():
    for name in torch_adapted_gd.__all__:
        assert getattr(torch_adapted_gd, name).__doc__
    assert torch_adapted_gd.__version__
    assert (ROOT / "torch_adapted_gd" / "py.typed").exists()


@pytest.mark.filterwarnings("default")  # Lightning's own
def test_the_readmes_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["report"].rank == 120
    assert "loss" in capsys.readouterr().out
