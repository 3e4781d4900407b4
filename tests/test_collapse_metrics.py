"""The collapse metrics: from any batches and merges they compute what the functions compute from all data at once."""

import copy
from contextlib import nullcontext

import pytest
import torch

from torch_adapted_gd.collapse import neural_collapse, output_collapse

from .collapsed import apart, exact_split, grid, near_targets
from .test_collapse_outputs import REGIMES, UNIT, assert_exact

torchmetrics = pytest.importorskip("torchmetrics")

from torch_adapted_gd.collapse.metrics import (  # noqa: E402
    FinalLayerCollapse,
    NearestClassMeanAgreement,
    NeuralCollapse,
)
from torch_adapted_gd.collapse.outputs import OUTPUT_KEYS  # noqa: E402

EPS = torch.finfo(torch.float64).eps
COUNTS = [19, 4, 18]


def updated(metric, *data, size=7):
    for batch in zip(*(tensor.split(size) for tensor in data), strict=True):
        metric.update(*batch)
    return metric


def near(deviation=1e-9):
    """Outputs near the unit vectors; used as features, too."""
    return near_targets(UNIT, COUNTS, 2 * deviation, deviation)


def assert_alike(found, expected, rel=1e-13):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key == "gap":  # only rounding
            assert found[key] < 1e-13 or (found[key].isnan() and value.isnan())
        else:
            floor = 1e-13 if key[:3] in ("nc2", "nc3") else 0  # those are differences of numbers near 1
            assert found[key] == pytest.approx(float(value), rel=rel, abs=floor, nan_ok=True), key


@pytest.mark.parametrize(("bias", "deviation"), REGIMES)
@pytest.mark.parametrize("size", [1, 7, 41])
@pytest.mark.parametrize("shards", [1, 4])
def test_batches_and_shards_are_as_rational_arithmetic(size, shards, bias, deviation):
    outputs, labels = near_targets(UNIT, COUNTS, bias, deviation)
    parts = [updated(FinalLayerCollapse(3), outputs[i::shards], labels[i::shards], size=size) for i in range(shards)]
    for part in parts[1:]:
        parts[0].merge_state(part)
    found = parts[0].compute()
    assert_exact(found, outputs, labels, UNIT, bias, deviation)
    assert_alike(found, output_collapse(outputs, labels), rel=1e-13 + 16 * EPS * deviation / bias)


@pytest.mark.parametrize("kind", [FinalLayerCollapse, NeuralCollapse])
def test_merge_state_is_forward_is_one_shot(kind):
    outputs, labels = near()
    make = {FinalLayerCollapse: lambda: FinalLayerCollapse(3), NeuralCollapse: lambda: NeuralCollapse(3, 3)}[kind]
    whole = updated(make(), outputs, labels, size=41).compute()
    for _ in range(4):
        cut = int(torch.randint(1, 41, ()))
        left, right = updated(make(), outputs[:cut], labels[:cut]), updated(make(), outputs[cut:], labels[cut:])
        as_dict = copy.deepcopy(left)
        as_dict.merge_state({name: state.clone() for name, state in right.metric_state.items()})
        left.merge_state(right)
        assert_alike(left.compute(), whole)
        assert_alike(as_dict.compute(), whole)
    forward, before = make(), make()
    for rows, own in zip(outputs.split(7), labels.split(7), strict=True):
        alone = make()
        alone.update(rows, own)
        batch = forward(rows, own)
        before.update(rows, own)
        partly = kind is NeuralCollapse and len(own.unique()) < 3
        with pytest.warns(UserWarning, match="have no samples") if partly else nullcontext():
            assert_alike(batch, alone.compute(), rel=0)
    assert_alike(forward.compute(), whole)
    assert_alike(before.compute(), whole)
    assert forward.update_count == 6


def test_merging_after_compute():
    outputs, labels = near()
    metric, other = (updated(FinalLayerCollapse(3), outputs[part], labels[part]) for part in (slice(20), slice(20, 41)))
    assert metric.compute()["num_samples"] == 20
    metric.merge_state(other)
    assert metric.compute()["num_samples"] == 41
    empty = FinalLayerCollapse(3, output="num_samples")
    empty.merge_state(metric)
    assert empty.compute() == 41  # and no warning that there are no data
    with pytest.raises(ValueError, match="Expected state variable moments_"):
        metric.merge_state(FinalLayerCollapse(3, UNIT + 1))


@pytest.mark.parametrize("weighting", ["class", "sample"])
@pytest.mark.parametrize("cov", ["auto", "full", "trace"])
def test_features_in_batches_are_as_at_once(cov, weighting):
    labels = torch.randint(0, 4, (60,))
    features = torch.randn(4, 6).double()[labels] + 0.3 * torch.randn(60, 6).double()
    weight, bias = torch.randn(4, 6), torch.randn(4)
    lam = None if cov == "trace" else 0.1
    metric = updated(NeuralCollapse(4, 6, cov=cov, weighting=weighting, hpd_lambda=lam), features, labels)
    expected = neural_collapse(features, labels, weight, bias, weighting=weighting, hpd_lambda=lam)
    del expected["nc4_mismatch"]
    if cov == "trace":
        del expected["nc1_pinv"]
    assert_alike(metric.compute(weight, bias), expected, rel=1e-12)
    assert metric.compute().keys() == {key for key in expected if "weights" not in key and key[:3] not in ("nc3", "hpd")}
    assert metric.compute(2 * weight)["nc2_etf_weights"] == pytest.approx(float(expected["nc2_etf_weights"]))
    torch.testing.assert_close(
        metric.class_means(), torch.stack([features[labels == j].mean(0) for j in range(4)]), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("deviation", [1e-6, 1e-12])
def test_features_near_their_means_in_batches(deviation):
    start, labels = grid(3, 5), torch.arange(60) % 3
    features = start[labels] + deviation * torch.randn(60, 5).double()
    metric = updated(NeuralCollapse(3, 5), features, labels)
    assert_alike(metric.compute(), neural_collapse(features, labels))
    exact = exact_split(features, labels, start)  # only `within` is used
    assert apart(metric.moments.scatter.sum() / 60, exact["within"]) < 32 * EPS
    assert apart(metric.moments.pooled.trace() / 60, exact["within"]) < 32 * EPS


def test_nc1_is_not_negative():
    labels = torch.arange(30) % 3
    features = torch.eye(3, 6).double()[labels]
    rotation = torch.linalg.qr(torch.randn(6, 6).double())[0]
    features[:, 4] = 1e3 * torch.randn(30)  # nearly orthogonal to the directions between the means
    features[:, 4] -= torch.stack([features[labels == j, 4].mean() for j in range(3)])[labels]
    for _ in range(10):
        rotation = rotation @ torch.linalg.qr(torch.randn(6, 6).double())[0]
        assert updated(NeuralCollapse(3, 6), features @ rotation, labels).compute()["nc1_pinv"] >= 0


def test_width_from_which_the_scatter_is_left_out():
    assert (NeuralCollapse(2, 2048).pooled, NeuralCollapse(2, 2049).pooled) == (True, False)
    assert NeuralCollapse(2, 2049, hpd_lambda=1.0).pooled


def test_agreement_with_the_nearest_mean():
    labels = torch.arange(40) % 4
    features, weight, bias = torch.randn(40, 6).double(), torch.randn(4, 6).double(), torch.randn(4).double()
    logits = features @ weight.T + bias
    metric = NearestClassMeanAgreement(updated(NeuralCollapse(4, 6), features, labels).class_means())
    expected = neural_collapse(features, labels, weight, bias)["nc4_mismatch"]
    assert 0 < expected < 1
    assert updated(metric, features.reshape(40, 2, 3), logits).compute() == expected
    other = updated(NearestClassMeanAgreement(metric.means), features[:9], logits[:9])
    metric.merge_state(other)
    assert metric.seen == 49
    metric.reset()
    metric.update(features[:0], logits[:0])
    assert metric.compute().isnan()
    features[3, 1] = torch.nan
    assert updated(metric, features, logits).compute().isnan()
    partly = NearestClassMeanAgreement(torch.tensor([[0.0], [torch.nan], [1.0]]))
    partly.update(torch.tensor([[0.2], [0.9]]), torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
    assert partly.compute() == 0.5


def test_a_class_without_samples_is_told_of_by_compute_alone():
    metric = NeuralCollapse(3, 3)
    metric(torch.eye(3)[:2], torch.arange(2))  # a batch need not have all classes
    with pytest.warns(UserWarning, match="1 of 3 classes have no samples"):
        metric.compute()


def test_without_data():
    for metric in (FinalLayerCollapse(3), NeuralCollapse(3, 4)):
        with pytest.warns(UserWarning, match="was called before the ``update`` method"):
            found = metric.compute()
        assert all(value.isnan() or key in ("num_samples", "classes_seen", "num_dropped") for key, value in found.items())
        metric.update(torch.zeros(0, metric.width), torch.zeros(0).long())
        assert_alike(metric.compute(), found)
    assert NeuralCollapse(3, 4).class_means().isnan().all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FinalLayerCollapse(3, output="sum"), ValueError, "`output` should be one of 'dict', 'loss'.* but got 'sum'"),
        (lambda: FinalLayerCollapse(3, output="within_class_0"), ValueError, "`output` should be one of"),
        (lambda: FinalLayerCollapse(3, scale=-1), ValueError, "`scale` should be at least 0"),
        (lambda: FinalLayerCollapse(3, per_class=1), TypeError, "`per_class` should be True or False, but got 1"),
        (lambda: FinalLayerCollapse(3, nan_strategy=0.0), ValueError, "`nan_strategy` should be one of"),
        (lambda: FinalLayerCollapse(3, ignore_index="-1"), TypeError, "`ignore_index` should be an integer or None"),
        (lambda: FinalLayerCollapse(3, top_k=1), ValueError, "Unexpected keyword arguments: `top_k`"),
        (lambda: NeuralCollapse(3, 0), ValueError, "`num_features` should be at least 1, but got 0"),
        (lambda: NeuralCollapse(3, 4, cov="none"), ValueError, "`cov` should be one of 'auto', 'full', 'trace'"),
        (lambda: NeuralCollapse(3, 4, cov="trace", hpd_lambda=1.0), ValueError, '`cov` should be "full" for `hpd_lambda`'),
        (lambda: NeuralCollapse(3, 4, weighting="all"), ValueError, "`weighting` should be one of"),
        (lambda: NearestClassMeanAgreement([[0.0]]), TypeError, "`means` should be a tensor .* but got list"),
        (lambda: NearestClassMeanAgreement(torch.ones(3)), ValueError, r"`means` should have shape .* but has \[3\]"),
        (
            lambda: NearestClassMeanAgreement(torch.eye(2)).update(torch.eye(2).long(), torch.eye(2)),
            TypeError,
            "`features` should be a floating tensor, but got torch.int64",
        ),
        (
            lambda: NearestClassMeanAgreement(torch.eye(2)).update(torch.eye(2), [1]),
            TypeError,
            "`logits` should be a tensor, but got list",
        ),
        (
            lambda: NearestClassMeanAgreement(torch.eye(2)).update(torch.ones(2, 3), torch.eye(2)),
            ValueError,
            r"`features` should have the batch first and 2 entries for each sample, but has shape \[2, 3\]",
        ),
        (
            lambda: NearestClassMeanAgreement(torch.eye(2)).update(torch.eye(2), torch.eye(3)),
            ValueError,
            r"`logits` should have shape \[2, 2\], or be classes \[2\], but has \[3, 3\]",
        ),
        (
            lambda: FinalLayerCollapse(3).update(torch.eye(2), torch.arange(2)),
            ValueError,
            "`preds` .* 3 entries for each",
        ),
        (lambda: NeuralCollapse(3, 3).update(torch.eye(3), torch.arange(3) + 1), ValueError, r"in 0\.\.2, but has 3"),
        (
            lambda: updated(NeuralCollapse(3, 3), torch.eye(3), torch.arange(3)).compute(torch.eye(2)),
            ValueError,
            r"`weight` should have shape \[3, 3\], but has \[2, 2\]",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_batch_that_is_refused_leaves_the_state():
    outputs, labels = near()
    metric = updated(FinalLayerCollapse(3, nan_strategy="error"), outputs, labels)
    with pytest.raises(ValueError, match="`preds` should be finite"):
        metric.update(outputs * torch.nan, labels)
    assert_alike(metric.compute(), updated(FinalLayerCollapse(3), outputs, labels).compute(), rel=0)


@pytest.mark.parametrize("strategy", ["propagate", "warn", "ignore"])
def test_samples_that_are_left_out_are_counted_over_batches(strategy):
    outputs, labels = near()
    outputs[::9], labels[1::9] = torch.nan, -1
    metric = FinalLayerCollapse(3, ignore_index=-1, nan_strategy=strategy)
    with pytest.warns(UserWarning, match="were left out") if strategy == "warn" else nullcontext():
        updated(metric, outputs, labels)
    found = metric.compute()
    with pytest.warns(UserWarning, match="were left out") if strategy == "warn" else nullcontext():
        assert_alike(found, output_collapse(outputs, labels, ignore_index=-1, nan_strategy=strategy))
    assert (found["num_dropped"], found["num_samples"]) == ((5, 36) if strategy == "propagate" else (10, 31))


@pytest.mark.parametrize("key", OUTPUT_KEYS)
def test_one_key(key):
    outputs, labels = near()
    whole = updated(FinalLayerCollapse(3, scale=0.5), outputs, labels).compute()
    one = updated(FinalLayerCollapse(3, scale=0.5, output=key), outputs, labels).compute()
    assert one == whole[key]
    assert (one.shape, one.dtype) == ((), torch.float64)


def test_keys_of_classes():
    outputs, labels = near()
    whole = updated(FinalLayerCollapse(3, per_class=True), outputs, labels).compute()
    one = updated(FinalLayerCollapse(None, UNIT, per_class=True, output="bias_class_1"), outputs, labels).compute()
    assert one == whole["bias_class_1"]
    assert_alike(whole, output_collapse(outputs, labels, per_class=True))
