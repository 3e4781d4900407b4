"""CollapseMonitor in two processes logs what one process logs, to 1e-12, for every sampler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pl = pytest.importorskip("pytorch_lightning")

from torch_adapted_gd.collapse import output_collapse  # noqa: E402
from torch_adapted_gd.lightning import CollapseMonitor  # noqa: E402

from . import lightning_ddp  # noqa: E402
from .lightning_cases import CLASSES, agree, dataset, expected, new_trainer, samples  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(made_once):
    if sys.platform == "win32":
        pytest.skip("processes are forked")

    def run(path):
        command = [sys.executable, "-m", "tests.lightning_ddp", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=ROOT)
        assert result.returncode == 0, result.stderr[-3000:]

    return made_once("processes", run)


def notes(folder, case):
    return [json.loads((folder / f"{case}.{rank}.json").read_text()) for rank in (0, 1)]


def trained(folder, case):
    module = lightning_ddp.Classifier(case).double()
    module.load_state_dict(torch.load(folder / f"{case}.pt"))
    return module


def chosen(case):
    """Indices that the reference should have."""
    nonzero = [i for i in range(21) if i % 3 < 2]
    parts = {
        "subset": lightning_ddp.SUBSET,
        "weights": nonzero,
        "limit": range(12),
        "overfit": range(16),
        "one sample": range(1),
    }
    return list(parts.get(case, range(23)))


REFERENCE = [case for case in lightning_ddp.CASES if not case.startswith("stream")]


@pytest.mark.parametrize("case", lightning_ddp.CASES)
def test_both_processes_have_the_same(folder, case):
    first, second = notes(folder, case)
    assert json.dumps(first["history"]) == json.dumps(second["history"])  # to the bit, NaN too
    assert first["keys"] == second["keys"]
    assert json.dumps(first["logged"]) == json.dumps(second["logged"])
    last = first["history"][-1]
    root = last["name"]
    assert {f"{root}/{key}" for key, v in last.items() if not isinstance(v, list)} - {
        f"{root}/{key}" for key in ("name", "epoch", "step", "s")
    } <= set(first["keys"])


@pytest.mark.parametrize("case", REFERENCE)
def test_two_processes_have_what_the_trained_network_has(folder, case):
    options = lightning_ddp.CASES[case][0]
    history = notes(folder, case)[0]["history"]
    x, labels = samples()
    indices = chosen(case)
    more = {"hpd_lambda": options["hpd_lambda"]} if "hpd_lambda" in options else {}
    if case == "one sample":  # one class: NC is not defined
        x, labels = samples(1)
        values = output_collapse(trained(folder, case)(x.double()), labels, CLASSES)
        values = {key: float(value) for key, value in values.items()}
        assert torch.tensor(history[-1]["nc1_pinv"]).isnan()
    else:
        values = expected(trained(folder, case), (x[indices], labels[indices]), options.get("head"), **more)
    assert history[-1]["num_samples"] == len(indices)
    agree(history[-1], values)
    assert history[0]["step"] == 0
    assert history[0]["loss"] != history[-1]["loss"]
    if case == "every step":
        assert [row["step"] for row in history] == [0, 2, 3]


@pytest.mark.parametrize("case", ["odd", "one batch at a time", "limit", "explicit"])
def test_two_processes_are_one(folder, case, tmp_path):
    from torch.utils.data import DataLoader

    options, train, settings = lightning_ddp.CASES[case]
    monitor = CollapseMonitor(CLASSES, **options)
    trainer = new_trainer(pl, tmp_path, monitor, precision="64-true", max_epochs=1, limit_train_batches=1, **settings)
    trainer.fit(trained(folder, case), DataLoader(dataset(), batch_size=4, **train))
    both = notes(folder, case)[0]["history"][-1]
    agree(both, {key: v for key, v in monitor.history[0].items() if key not in ("name", "epoch", "step", "s")})


@pytest.mark.parametrize("case", [case for case in lightning_ddp.CASES if case.startswith("stream")])
def test_a_stream_has_the_outputs_of_both_processes(folder, case):
    ranks = notes(folder, case)
    outputs = torch.cat([torch.tensor(rank["seen"][0], dtype=torch.float64) for rank in ranks])
    labels = torch.cat([torch.tensor(rank["seen"][1]) for rank in ranks])
    row = ranks[0]["history"][-1]
    assert row["num_samples"] == len(outputs) == 24  # the sampler repeats one
    assert [r["name"] for r in ranks[0]["history"]] == ["val_stream", "train_stream"]
    agree(row, {key: float(value) for key, value in output_collapse(outputs, labels, CLASSES).items()})
