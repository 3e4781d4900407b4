"""States of the collapse metrics: they stay float64 after casts, can be copied, and are not confused in collections."""

import copy
import pickle

import pytest
import torch
from torch import nn

from torch_adapted_gd.collapse import output_collapse

from .collapsed import near_targets
from .test_collapse_outputs import UNIT

torchmetrics = pytest.importorskip("torchmetrics")

from torch_adapted_gd.collapse.metrics import FinalLayerCollapse, NearestClassMeanAgreement, NeuralCollapse  # noqa: E402


def make(name):
    """A metric, and its data."""
    outputs, labels = near_targets(UNIT, [9, 4, 8], 2e-9, 1e-9)
    if name == "outputs":
        return FinalLayerCollapse(3), (outputs, labels)
    if name == "features":
        return NeuralCollapse(3, 3), (outputs, labels)
    return NearestClassMeanAgreement(UNIT), (outputs, outputs[:, [1, 0, 2]])


def values(metric):
    found = metric.compute()
    return {key: float(value) for key, value in (found if isinstance(found, dict) else {"": found}).items()}


def within_a_module(metric):
    module = nn.Module()
    module.inner = nn.Sequential(nn.Linear(2, 2))
    module.inner.collapse = metric
    return module


NAMES = ["outputs", "features", "agreement"]
CASTS = {
    "half": lambda metric: metric.half(),
    "float": lambda metric: metric.float(),
    "to(bfloat16)": lambda metric: metric.to(torch.bfloat16),
    "to(float16)": lambda metric: metric.to(torch.float16),
    "to(cpu, float32)": lambda metric: metric.to("cpu", torch.float32),
    "set_dtype": lambda metric: metric.set_dtype(torch.float16),
    "module.half": lambda metric: within_a_module(metric).half(),
    "module.to(bfloat16)": lambda metric: within_a_module(metric).to(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", NAMES)
def test_states_stay_float64(name, cast):
    metric, data = make(name)
    before = {key: state.dtype for key, state in metric.metric_state.items()}
    metric.update(*data)
    expected, dtypes = values(metric), {key: state.dtype for key, state in metric.metric_state.items()}
    assert before == dtypes
    assert torch.float64 in dtypes.values()
    CASTS[cast](metric)
    assert {key: state.dtype for key, state in metric.metric_state.items()} == dtypes
    assert values(metric) == expected
    metric.reset()
    metric(*data)
    assert {key: state.dtype for key, state in metric.metric_state.items()} == dtypes
    assert values(metric) == expected


def test_the_module_around_it_is_cast():
    metric, _ = make("outputs")
    module = within_a_module(metric).to(torch.bfloat16)
    assert module.inner[0].weight.dtype == torch.bfloat16
    assert metric.targets.values.dtype == torch.float64
    assert not list(metric.buffers())
    assert not module.inner.collapse.state_dict()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric)), FinalLayerCollapse.clone])
@pytest.mark.parametrize("name", NAMES)
def test_copies_go_on_by_themselves(name, again):
    metric, data = make(name)
    metric.update(*data)
    expected = values(metric)
    other = again(metric)
    assert values(other) == expected
    half = [tensor[:11] for tensor in data]
    other.update(*half)
    metric_only = values(metric)
    assert metric_only == expected
    metric.update(*half)
    assert values(other) == values(metric)
    metric.merge_state(other)
    assert metric.update_count == 4


@pytest.mark.parametrize("name", NAMES)
def test_reset(name):
    metric, data = make(name)
    metric.update(*data)
    expected = values(metric)
    metric.update(*[tensor[:9] for tensor in data])
    metric.reset()
    assert all((state == 0).all() for state in metric.metric_state.values())
    metric.update(*data)
    assert values(metric) == expected


@pytest.mark.parametrize("name", NAMES)
def test_states_are_saved_where_that_is_asked_for(name):
    metric, data = make(name)
    metric.persistent(True)
    metric.update(*data)
    other, _ = make(name)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other.update(*[tensor[:0] for tensor in data])
    assert values(other) == values(metric)


def test_targets_are_copied():
    targets = UNIT.clone()
    metric = FinalLayerCollapse(3, targets, output="loss")
    targets.fill_(7)
    metric.update(UNIT, torch.arange(3))
    assert metric.compute() == 0


def test_made_under_another_default_device():
    with torch.device("meta"):
        metric = FinalLayerCollapse(3)
    assert metric.targets.values.device.type == "cpu"
    assert {state.device.type for state in metric.metric_state.values()} == {"meta"}


def test_outputs_with_a_gradient():
    outputs, labels = near_targets(UNIT, [3, 3, 3], 0.1, 0.1)
    metric = FinalLayerCollapse(3)
    found = metric(outputs.requires_grad_(), labels)
    assert not any(value.requires_grad for value in [*found.values(), *metric.metric_state.values()])


def collection_of(metrics, batches):
    """A collection of clones of metrics, and the metrics themselves, updated with the same batches."""
    collection = torchmetrics.MetricCollection({key: metric.clone() for key, metric in metrics.items()})
    for outputs, labels in batches:
        collection.update(outputs, labels)
        for metric in metrics.values():
            metric.update(outputs, labels)
    return collection


def test_collections_keep_different_targets_apart():
    outputs, labels = near_targets(UNIT, [9, 4, 8], 2e-10, 1e-10)
    outputs = outputs.detach()
    metrics = {
        "unit": FinalLayerCollapse(3, output="loss"),
        "given": FinalLayerCollapse(3, UNIT, output="within"),
        "near": FinalLayerCollapse(3, UNIT + 1e-9, output="loss"),
    }
    collection = collection_of(metrics, [(outputs[:11], labels[:11]), (outputs[11:], labels[11:])])
    assert sorted(map(sorted, collection.compute_groups.values())) == [["given", "unit"], ["near"]]
    found = collection.compute()
    assert found == {key: metric.compute() for key, metric in metrics.items()}
    expected = output_collapse(outputs, labels, class_targets=UNIT + 1e-9)["loss"]
    assert found["near"] == pytest.approx(float(expected), rel=1e-14, abs=0)
    assert found["near"] > 10 * found["unit"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"ignore_index": 0}, {}),
        ({"ignore_index": 0}, {"ignore_index": -1}),
        ({"nan_strategy": "ignore"}, {}),
    ],
)
def test_collections_keep_different_settings_apart(one, other):
    metrics = {"one": FinalLayerCollapse(3, output="loss", **one), "other": FinalLayerCollapse(3, output="loss", **other)}
    second = torch.rand(3, 3).double()
    second[0] = torch.nan if "nan_strategy" in one else 2.0
    # A collection groups by the first batch, which does not distinguish them.
    collection = collection_of(metrics, [(UNIT[1:], torch.arange(1, 3)), (second, torch.arange(3))])
    assert len(collection.compute_groups) == 2
    alone = {key: metric.compute() for key, metric in metrics.items()}
    torch.testing.assert_close(collection.compute(), alone, rtol=0, atol=0, equal_nan=True)


def test_collections_share_the_same_targets():
    outputs, labels = near_targets(UNIT, [9, 4, 8], 0.1, 0.1)
    metrics = {key: FinalLayerCollapse(3, output=key) for key in ("loss", "within", "bias")}
    metrics["halved"] = FinalLayerCollapse(3, output="loss", scale=0.5)
    collection = collection_of(metrics, zip(outputs.split(5), labels.split(5), strict=True))
    assert len(collection.compute_groups) == 1
    found = collection.compute()
    assert found == {key: metric.compute() for key, metric in metrics.items()}
    assert found["halved"] == found["loss"] / 2
    collection.reset()
    collection.update(outputs, labels)
    assert collection.compute()["loss"] == pytest.approx(float(found["loss"]), rel=1e-14)


def test_collections_of_features_and_outputs():
    outputs, labels = near_targets(UNIT, [9, 4, 8], 0.1, 0.1)
    features = NeuralCollapse(3, 3, cov="trace")
    collection = torchmetrics.MetricCollection({"outputs": FinalLayerCollapse(3), "features": features.clone()})
    for _ in range(2):
        collection.update(outputs, labels)
        features.update(outputs, labels)
    assert len(collection.compute_groups) == 2
    assert collection.compute()["nc1_trace"] == features.compute()["nc1_trace"]


def test_plots_have_a_log_axis():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    plt = pytest.importorskip("matplotlib.pyplot")
    outputs, labels = near_targets(UNIT, [9, 4, 8], 0.1, 0.1)
    single, every = FinalLayerCollapse(3, output="loss"), FinalLayerCollapse(3)
    losses = [single(outputs, labels), single(outputs / 2, labels)]
    every.update(outputs, labels)
    drawn = [single.plot(), single.plot(losses), every.plot(), single.plot(losses, plt.figure().subplots())]
    for _, axes in drawn:
        assert all(one.get_yscale() == "log" for one in getattr(axes, "flat", [axes]))
    assert drawn[1][1].lines[0].get_ydata().tolist() == [float(loss) for loss in losses]
    plt.close("all")
