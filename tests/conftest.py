import os

import pytest
import torch

from torch_adapted_gd.jacobian import rules


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    # A function mode that stays behind would have all that follows go through it.
    assert torch._C._len_torch_function_stack() == 0


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
