import os
import shutil

import pytest
import torch
from filelock import FileLock  # torch needs it too

from torch_adapted_gd.jacobian import rules


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    # A function mode that stays behind would have all that follows go through it.
    assert torch._C._len_torch_function_stack() == 0


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Has a function fill a folder of a name, once for all of pytest-xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name, make):
        path, part = base / name, base / f"{name}.part"
        with FileLock(base / f"{name}.lock"):
            if not path.exists():
                shutil.rmtree(part, ignore_errors=True)  # of a worker that failed
                part.mkdir()
                make(part)
                part.rename(path)
        return path

    return folder


@pytest.fixture
def table():
    """Have the table of layer rules as it was, afterwards."""
    before = dict(rules._TABLE)
    yield
    rules._TABLE.clear()
    rules._TABLE.update(before)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request):
    """Lightning under each of its names."""
    return pytest.importorskip(request.param)


@pytest.fixture
def lightning():
    """Lightning under one of them."""
    return pytest.importorskip("pytorch_lightning")


# The models are tiny, and pytest-xdist's workers share the cores.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
