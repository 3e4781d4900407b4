"""The pages of docs/: their examples run, and the reference leaves no public name out."""

import re
from pathlib import Path

import pytest

import torch_adapted_gd

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("default")  # Lightning's own
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": f"docs.{page}"}
    for block in blocks_of(page):
        exec(compile(block, page, "exec"), names)
    assert not list(tmp_path.iterdir())


def test_pages_with_examples_are_found():
    assert {"quickstart.md", "theory.md", "flows.md", "collapse.md", "choosing.md"} <= set(filter(blocks_of, PAGES))


def test_the_reference_has_each_public_name_once():
    found = re.findall(r"^\.\. auto(?:class|function):: (\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert len(found) == len(set(found))
    assert set(torch_adapted_gd.__all__) <= set(found)
