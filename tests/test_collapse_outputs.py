"""Outputs against rational arithmetic, closed forms and straight lines, and the moments of classes that they come from."""

import math
from itertools import pairwise

import pytest
import torch

from torch_adapted_gd.collapse import output_collapse
from torch_adapted_gd.collapse.moments import ClassMoments, merge_packed

from .collapsed import apart, exact_split, grid, near_targets

EPS = torch.finfo(torch.float64).eps
REGIMES = [
    (0.3, 0.3), (0.3, 1e-6), (0.3, 1e-12), (1e-6, 1e-6), (1e-6, 1e-9), (1e-9, 1e-12), (1e-12, 1e-12), (1e-12, 0.3)
]  # fmt: skip
UNIT = torch.eye(3, dtype=torch.float64)


def assert_exact(found, outputs, labels, targets, bias, deviation):
    exact = exact_split(outputs, labels, targets)
    # Outputs are exact: errors come from rounding in sums of some 40 terms.
    assert apart(found["loss"], exact["loss"]) < 32 * EPS
    assert apart(found["within"], exact["within"]) < 32 * EPS
    # The rounding of an average is relative to its terms, which are about `deviation`.
    assert apart(found["bias"], exact["bias"]) < 16 * EPS * (1 + deviation / bias)
    assert found["gap"] < 1e-13


@pytest.mark.parametrize(("bias", "deviation"), REGIMES)
@pytest.mark.parametrize("targets", [UNIT, 2 * UNIT - 1, UNIT[:, :2] - 0.3], ids=["unit", "signs", "two outputs"])
def test_the_split_is_that_of_rational_arithmetic(targets, bias, deviation):
    outputs, labels = near_targets(targets, [19, 4, 18], bias, deviation)
    found = output_collapse(outputs, labels, class_targets=targets)
    assert_exact(found, outputs, labels, targets, bias, deviation)


@pytest.mark.parametrize("deviation", [1e-6, 1e-12])
def test_outputs_far_from_their_targets_lose_nothing(deviation):
    targets = torch.tensor([[-1.0, -1.0], [1.0, -1.0]]).double()
    labels = torch.arange(40) % 2
    outputs = 0.3 + deviation * torch.randn(40, 2).double()  # x − y is not exact here, x − x' is
    found = output_collapse(outputs, labels, class_targets=targets)
    assert_exact(found, outputs, labels, targets, 1.0, deviation)


def test_closed_form_with_classes_of_other_sizes():
    counts, delta = [2, 8, 22], torch.tensor([0.5, 0.25, 2.0]).double()
    centre = grid(3, 3)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    sign = torch.ones(32).double()
    sign[::2] = -1
    outputs = centre[labels] + (sign * delta[labels])[:, None] * UNIT[1]
    found = output_collapse(outputs, labels, per_class=True)
    share = torch.tensor(counts).double() / 32
    distance = (centre - UNIT).square().sum(1)
    torch.testing.assert_close(found["within"], share @ delta.square(), rtol=4 * EPS, atol=0)
    torch.testing.assert_close(found["bias"], share @ distance, rtol=4 * EPS, atol=0)
    torch.testing.assert_close(found["bias_max"], distance.max().sqrt(), rtol=4 * EPS, atol=0)
    assert found["within_max"] == 2.0
    assert [float(found[f"within_class_{j}"]) for j in range(3)] == delta.square().tolist()
    torch.testing.assert_close(torch.stack([found[f"bias_class_{j}"] for j in range(3)]), distance, rtol=4 * EPS, atol=0)
    assert (found["num_samples"], found["classes_seen"], found["num_dropped"]) == (32, 3, 0)


def test_straight_lines_to_the_targets_keep_every_digit():
    labels = torch.tensor([0, 1, 2, 0, 1, 1, 0, 2, 0, 1, 2, 2, 0])
    start = grid(13, 3)
    first = output_collapse(UNIT[labels] + start, labels)
    before = first
    for k in range(41):
        outputs = UNIT[labels] + 2.0**-k * start  # without rounding
        found = output_collapse(outputs, labels)
        for key in ("loss", "within", "bias"):
            assert found[key] == pytest.approx(float(first[key]) * 4.0**-k, rel=1e-14, abs=0)
            if k:
                assert math.log(before[key] / found[key]) == pytest.approx(2 * math.log(2), rel=1e-14)
        assert found["within_fraction"] == pytest.approx(float(first["within_fraction"]), rel=1e-14)
        before = found


def test_it_is_the_squared_loss():
    outputs, target = torch.randn(20, 3).double(), torch.arange(20) % 3
    loss = torch.nn.functional.mse_loss(outputs, UNIT[target])
    assert float(output_collapse(outputs, target)["loss"]) == pytest.approx(3 * float(loss), rel=8 * EPS)
    full, half = (output_collapse(outputs, target, scale=scale, per_class=True) for scale in (1.0, 0.5))
    scaled = {key for key in full if key.split("_")[0] in ("loss", "within", "bias")}
    scaled -= {"within_fraction", "within_max", "bias_max"}
    assert all(half[key] == full[key] * (0.5 if key in scaled else 1.0) for key in full)
    assert len(scaled) == 9


def test_share_of_outputs_that_are_nearest_to_their_own_target():
    targets = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]).double()  # the first and the last are equal
    outputs = torch.tensor([[0.1, 0], [0.1, 0], [0.9, 0], [0.5, 0], [0.5, 0]]).double()
    found = output_collapse(outputs, torch.tensor([0, 2, 0, 0, 1]), class_targets=targets)
    assert found["target_accuracy"] == 3 / 5  # in a tie the first target counts
    near = torch.tensor([[1e8, 0.0], [1e8, 1e-3]]).double()  # |x|² − 2x·y + |y|² would lose the 1e-6
    assert output_collapse(near, torch.tensor([0, 1]), class_targets=near)["target_accuracy"] == 1


def test_zero_is_equation_3_12():
    found = output_collapse(UNIT.repeat(3, 1), torch.arange(9) % 3)
    assert [float(found[key]) for key in ("loss", "within", "bias", "gap", "bias_max", "within_max")] == [0] * 6
    assert found["within_fraction"].isnan()
    assert found["target_accuracy"] == 1


def test_a_class_without_samples_and_one_with_one():
    outputs = torch.tensor([[1.5, 0, 0.1], [0.5, 0, 0.3], [0.1, 0.2, 0.3]]).double()
    found = output_collapse(outputs, torch.tensor([0, 0, 2]), num_classes=3, per_class=True)
    assert found["classes_seen"] == 2
    assert found["within_class_2"] == 0
    assert found["within_class_1"].isnan()
    assert found["bias_class_1"].isnan()
    assert all(value.isfinite() for key, value in found.items() if not key.endswith("class_1"))
    assert found["bias"] == pytest.approx(float((2 * found["bias_class_0"] + found["bias_class_2"]) / 3))


@pytest.mark.parametrize("shape", [(0, 3), (0,), (0, 3, 1)])
def test_no_samples_are_not_collapse(shape):
    found = output_collapse(torch.zeros(shape), torch.zeros(0).long(), num_classes=3, per_class=True)
    numbers = {"num_samples", "classes_seen", "num_dropped"}
    assert all(value == 0 if key in numbers else value.isnan() for key, value in found.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_are_cast_before_anything_is_subtracted(dtype):
    outputs, labels = near_targets(UNIT, [9, 9, 9], 0.1, 1e-2)
    low = outputs.to(dtype)
    found, expected = output_collapse(low, labels), output_collapse(low.double(), labels)
    assert all(value.dtype == torch.float64 for value in found.values())
    assert found == expected


def test_outputs_of_any_shape_and_with_a_gradient():
    outputs, labels = near_targets(UNIT, [3, 3, 3], 0.1, 0.1)
    expected = output_collapse(outputs, labels)
    assert output_collapse(outputs.reshape(9, 1, 3, 1).requires_grad_(), labels) == expected
    one = output_collapse(outputs[:, 0], labels % 2, class_targets=torch.tensor([[0.0], [1.0]]))
    assert one == output_collapse(outputs[:, :1], labels % 2, class_targets=torch.tensor([[0.0], [1.0]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_finite(bad):
    outputs, labels = near_targets(UNIT, [5, 5, 5], 0.1, 0.1)
    broken = outputs.clone()
    broken[4, 1] = bad
    found = output_collapse(broken, labels, per_class=True)
    for key in ("within", "gap", "within_fraction", "bias_max", "within_max", "target_accuracy"):
        assert found[key].isnan(), key
    assert not found["loss"].isfinite()
    assert not found["bias"].isfinite()
    assert [bool(found[f"within_class_{j}"].isnan()) for j in range(3)] == [j == labels[4] for j in range(3)]
    with pytest.raises(ValueError, match="`preds` should be finite, but 1 of 15 samples are not"):
        output_collapse(broken, labels, nan_strategy="error")
    with pytest.warns(UserWarning, match="1 of 15 samples of `preds` are not finite and were left out"):
        warned = output_collapse(broken, labels, nan_strategy="warn")
    rest = torch.arange(15) != 4
    expected = {**output_collapse(outputs[rest], labels[rest]), "num_dropped": torch.tensor(1.0).double()}
    assert warned == expected
    assert output_collapse(broken, labels, nan_strategy="ignore") == expected
    ignored = torch.where(rest, labels, -1)
    assert output_collapse(broken, ignored, ignore_index=-1, nan_strategy="error") == expected
    assert output_collapse(broken, ignored, ignore_index=-1) == expected


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_merging_is_associative(scale):
    values = 1 + scale * torch.randn(60, 4).double()
    labels = torch.randint(0, 3, (60,))
    whole = ClassMoments.of(values, labels, 4, pooled=True)
    for _ in range(5):
        ends = [0, *sorted(torch.randint(0, 61, (2,)).tolist()), 60]
        a, b, c = (ClassMoments.of(values[i:j], labels[i:j], 4, pooled=True) for i, j in pairwise(ends))
        packed = merge_packed(torch.stack([a.packed(), b.packed(), c.packed()]), 4, 4)
        for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), ClassMoments.unpacked(packed, 4, 4)):
            assert torch.equal(merged.count, whole.count)
            torch.testing.assert_close(merged.scatter, whole.scatter, rtol=64 * EPS, atol=0)
            away = (merged.pivot - whole.pivot) + (merged.offset - whole.offset)
            assert away.abs().max() < 64 * EPS * scale
            assert (merged.pooled - whole.pooled).norm() < 64 * EPS * whole.pooled.norm()
    assert torch.equal(whole.mean_or_nan.isnan().all(1), torch.tensor([False, False, False, True]))
    deviations = values - whole.mean[labels]
    torch.testing.assert_close(whole.pooled, deviations.T @ deviations, rtol=0, atol=1e-6 * scale**2)
