import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch_adapted_gd

ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup():
    parser = configparser.ConfigParser()
    parser.read_string((ROOT / "setup.cfg").read_text())
    return parser


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


def test_the_version_is_the_same_everywhere(setup):
    version = setup["metadata"]["version"]
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(heading for heading in headings if heading != "Unreleased") == version


def test_the_oldest_versions_are_those_that_setup_allows(setup):
    """`.ci/oldest` tests them. What is pinned beside them has no lower bound to hold to."""
    bounds = "\n".join([setup["options"]["install_requires"], *setup["options.extras_require"].values()])
    lowest = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)$", bounds, re.MULTILINE))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    assert lowest["torch"] == "2.6"
    for name in set(lowest) & set(pins):
        assert f"{pins[name]}.".startswith(f"{lowest[name]}."), name
    extras = ("plot", "lightning", "cli", "flow", "recipes", "peers", "test")
    needed = "\n".join([setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in extras)])
    assert set(re.findall(r"^([\w-]+)", needed, re.MULTILINE)) - {"torch_adapted_gd"} <= set(pins)


BELOW = {
    "tracking": set(),
    "solve": set(),
    "collapse": set(),
    "jacobian": {"tracking"},
    "step": {"tracking", "solve", "jacobian"},
    "theory": {"tracking", "solve", "jacobian"},
    "lightning": {"collapse"},
}


def test_folders_import_from_those_below_them_alone():
    package = Path(torch_adapted_gd.__file__).parent
    assert {path.parent.name for path in package.glob("*/__init__.py")} == BELOW.keys()
    for folder, below in BELOW.items():
        for path in (package / folder).rglob("*.py"):
            imported = re.findall(r"^ *from \.\.(\w+)", path.read_text(), re.MULTILINE)
            assert set(imported) & BELOW.keys() <= below, path
