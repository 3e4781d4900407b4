"""The collapse metrics in several processes: the same bits in each, equal to one process with all samples."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .collapsed import near_targets
from .test_collapse_outputs import UNIT

pytest.importorskip("torchmetrics")

from torch_adapted_gd.collapse.metrics import FinalLayerCollapse, NearestClassMeanAgreement, NeuralCollapse

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
WEIGHT = torch.tensor([[1.0, -0.5, 0.25], [0.0, 1.0, 0.5], [-1.0, 0.125, 1.0]])
MAKE = {
    "outputs": lambda **options: FinalLayerCollapse(3, per_class=True, ignore_index=-1, **options),
    "features": lambda **options: NeuralCollapse(3, 3, hpd_lambda=0.1, **options),
}


def samples():
    """First batches of three processes (many samples; none; a few without class 2), and their second batches."""
    torch.manual_seed(5)
    outputs, labels = near_targets(UNIT, [13, 12, 17], 2e-9, 1e-9)
    last = (labels != 2) & (torch.arange(42) > 20)
    first = ~last
    shares = [(outputs[first], labels[first]), (outputs[:0], labels[:0]), (outputs[last], labels[last])]
    more, more_labels = near_targets(UNIT, [5, 4, 6], 2e-9, 1e-9)
    return shares, list(zip(more.split([2, 9, 4]), more_labels.split([2, 9, 4]), strict=True))


def figures(metric, name):
    return metric.compute(WEIGHT) if name == "features" else metric.compute()


def agreement(means, outputs, **options):
    metric = NearestClassMeanAgreement(means, **options)
    metric.update(outputs, outputs[:, [1, 0, 2]])  # confuses two classes
    return metric.compute()


def process(rank, folder):
    """What each of three processes computes, with all three and with two of them as a group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=3, timeout=datetime.timedelta(seconds=60))
    pair = dist.new_group([0, 2])
    shares, then = samples()
    found = {}
    groups = {"three": {}, "two": {"process_group": pair}} if rank != 1 else {"three": {}}
    for size, options in groups.items():
        for name, make in MAKE.items():
            metric = make(**options)
            metric.update(*shares[rank])
            before = {key: state.clone() for key, state in metric.metric_state.items()}
            found[size, name, "first"] = figures(metric, name)
            found[size, name, "restored"] = all(torch.equal(before[key], state) for key, state in metric.metric_state.items())
            batch = metric(*then[rank]) if name == "outputs" else metric.update(*then[rank])
            found[size, name, "batch"] = batch
            found[size, name, "second"] = figures(metric, name)
        found[size, "means"] = metric.class_means()
        found[size, "means again"] = metric.class_means()
        found[size, "agreement"] = agreement(found[size, "means"], shares[rank][0], **options)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(made_once):
    folder = made_once("gloo", lambda path: mp.spawn(process, (str(path),), nprocs=3))
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(("size", "ranks"), [("three", [0, 1, 2]), ("two", [0, 2])])
def test_processes_are_as_one(processes, name, size, ranks):
    shares, then = samples()
    alone = MAKE[name]()
    for rounds, data in (("first", shares), ("second", then)):
        for rank in ranks:
            alone.update(*data[rank])
        expected = figures(alone, name)
        for rank in ranks:
            found = processes[rank][size, name, rounds]
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(found[key], processes[0][size, name, rounds][key]), key  # the same bits in all
                if key == "gap":
                    assert found[key] < 1e-14
                else:
                    assert found[key] == pytest.approx(float(value), rel=1e-14, abs=0), key
    assert all(processes[rank][size, name, "restored"] for rank in ranks)


@pytest.mark.parametrize("rank", range(3))
def test_forward_is_of_the_own_batch(processes, rank):
    metric = MAKE["outputs"]()
    metric.update(*samples()[1][rank])
    torch.testing.assert_close(processes[rank]["three", "outputs", "batch"], metric.compute(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("size", "ranks"), [("three", [0, 1, 2]), ("two", [0, 2])])
def test_means_and_agreement_over_processes(processes, size, ranks):
    shares, then = samples()
    outputs, labels = (torch.cat([data[rank][i] for data in (shares, then) for rank in ranks]) for i in range(2))
    means = torch.stack([outputs[labels == j].mean(0) for j in range(3)])
    first = torch.cat([shares[rank][0] for rank in ranks])
    expected = agreement(processes[0][size, "means"], first)
    assert 0 < expected < 1
    for rank in ranks:
        found = processes[rank]
        assert torch.equal(found[size, "means"], processes[0][size, "means"])
        assert torch.equal(found[size, "means again"], found[size, "means"])
        torch.testing.assert_close(found[size, "means"], means, rtol=0, atol=4e-16)
        assert found[size, "agreement"] == expected
