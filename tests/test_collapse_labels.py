"""The forms in which users give classes, and arguments that are refused."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from torch_adapted_gd.collapse import neural_collapse, output_collapse
from torch_adapted_gd.collapse.labels import ClassTargets

LABELS = torch.tensor([2, 0, 1, 1, 2])
ROWS = torch.tensor([[0.1, -3.0], [0.7, 2.0], [5.0, 0.3]], dtype=torch.float64)
DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers(dtype):
    assert torch.equal(ClassTargets(3).labels(LABELS.to(dtype)), LABELS)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("targets", [None, ROWS])
def test_one_hot_rows(dtype, targets):
    assert torch.equal(ClassTargets(3, targets).labels(one_hot(LABELS, 3).to(dtype)), LABELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_the_targets(dtype):
    assert torch.equal(ClassTargets(3, ROWS).labels(ROWS[LABELS].to(dtype)), LABELS)  # 0.1 is another number in float32
    single = ClassTargets(class_targets=torch.tensor([[-1.0], [0.0], [1.0]]))
    assert torch.equal(single.labels((LABELS - 1).to(dtype)), LABELS)
    assert torch.equal(single.labels((LABELS - 1).to(dtype)[:, None]), LABELS)


def test_no_samples():
    for empty in (torch.zeros(0).long(), torch.zeros(0, 3), torch.zeros(0, 2)):
        assert ClassTargets(3, ROWS).labels(empty).shape == (0,)


def test_equal_targets():
    targets = ClassTargets(class_targets=torch.tensor([[0.0, 1.0], [1.0, 1.0], [-0.0, 1.0], [1.0, 1.0], [2.0, 0.0]]))
    assert not targets.distinct
    assert targets.first_equal.tolist() == [0, 1, 0, 1, 4]
    assert torch.equal(targets.labels(one_hot(LABELS, 5)), LABELS)
    with pytest.raises(ValueError, match="Several classes have the same target: pass integer labels"):
        targets.labels(targets.values[LABELS])
    assert ClassTargets(500).first_equal.tolist() == list(range(500))


def test_rows_of_two_meanings():
    exchanged = ClassTargets(3, torch.eye(3)[[1, 0, 2]])
    assert torch.equal(exchanged.labels(torch.eye(3)[[2, 2]]), torch.tensor([2, 2]))
    with pytest.raises(ValueError, match="`target` should have one meaning"):
        exchanged.labels(one_hot(LABELS, 3))
    assert torch.equal(ClassTargets(3, torch.eye(3)).labels(one_hot(LABELS, 3)), LABELS)


def test_the_name_of_targets_is_their_content():
    digests = {
        ClassTargets(4).digest(), ClassTargets(4).digest(1), ClassTargets(5).digest(), ClassTargets(3, ROWS).digest(),
        ClassTargets(3, ROWS + 1e-15).digest(), ClassTargets(2, ROWS.T).digest(),
    }  # fmt: skip
    assert len(digests) == 6
    assert ClassTargets(4).digest() == ClassTargets(class_targets=torch.eye(4)).digest()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([0, 3]), r"`target` should be in 0\.\.2, but has 3"),
        (torch.tensor([0, -1]), r"`target` should be in 0\.\.2, but has -1"),
        (torch.tensor([0.0, 1.0]), r"`target` should be integer labels .* has shape \[2\] and torch.float32"),
        (torch.tensor(0), r"has shape \[\] and torch.int64"),
        (torch.zeros(2, 3, 4), r"has shape \[2, 3, 4\] and torch.float32. Flatten dense predictions"),
        (torch.zeros(2).to(torch.complex64), r"has shape \[2\] and torch.complex64"),
        (torch.tensor([[0.9, 0.1, 0.0]]), "Soft and mixed labels have no class"),
        (torch.tensor([[1.0, 1.0, 0.0]]), "Soft and mixed labels have no class"),
        (torch.zeros(1, 3), "Soft and mixed labels have no class"),
        (torch.tensor([[1.0, math.nan, 0.0]]), "Soft and mixed labels have no class"),
        (torch.eye(4), r"got torch.float32 of shape \[4, 4\] with other rows"),
        (torch.zeros(2, 1).long(), r"got torch.int64 of shape \[2, 1\]"),
    ],
)
def test_labels_that_are_none(target, message):
    with pytest.raises(ValueError, match=message):
        ClassTargets(3).labels(target)


def test_ignored_labels():
    targets = ClassTargets(3)
    assert targets.labels(torch.tensor([0, -100, 2]), -100).tolist() == [0, -1, 2]
    assert targets.labels(torch.tensor([0, 1, 255]).to(torch.uint8), 255).tolist() == [0, 1, -1]
    assert targets.labels(torch.tensor([0, 1, 2]), 1).tolist() == [0, -1, 2]
    with pytest.raises(ValueError, match=r"in 0\.\.2, but has -1"):
        targets.labels(torch.tensor([-1, -100]), -100)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": None}, ValueError, "`num_classes` should be given where `class_targets` is not"),
        ({"num_classes": 0}, ValueError, "`num_classes` should be at least 1, but got 0"),
        ({"num_classes": 2.0}, TypeError, "`num_classes` should be a whole number, but got 2.0 of type float"),
        ({"num_classes": True}, TypeError, "`num_classes` should be a whole number, but got True of type bool"),
        ({"class_targets": [[1.0]]}, TypeError, "`class_targets` should be a tensor .* but got list"),
        ({"class_targets": torch.eye(2)}, ValueError, r"`class_targets` should be a tensor \[3, outputs\].* shape \[2, 2\]"),
        ({"class_targets": torch.ones(3)}, ValueError, r"a row for each class, but has shape \[3\]"),
        ({"class_targets": torch.ones(3, 0)}, ValueError, r"a row for each class, but has shape \[3, 0\]"),
        ({"class_targets": torch.full((3, 1), math.nan)}, ValueError, "`class_targets` should be finite"),
    ],
)
def test_targets_that_are_none(options, error, message):
    with pytest.raises(error, match=message):
        ClassTargets(**{"num_classes": 3, **options})


OUTPUTS = {"preds": torch.zeros(3, 3), "target": torch.arange(3)}
FEATURES = {"features": torch.eye(3), "target": torch.arange(3)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"preds": [[1.0]]}, TypeError, "`preds` should be a floating tensor, but got list"),
        ({"preds": torch.eye(3).long()}, TypeError, "`preds` should be a floating tensor, but got torch.int64"),
        (
            {"preds": torch.eye(4), "num_classes": 3},
            ValueError,
            r"`preds` .* 3 entries for each .* but has shape \[4, 4\]",
        ),
        ({"preds": torch.ones(3), "num_classes": 3}, ValueError, r"3 entries for each sample, but has shape \[3\]"),
        ({"preds": torch.ones(3, 0), "num_classes": 3}, ValueError, r"3 entries for each sample, but has shape \[3, 0\]"),
        ({"preds": torch.tensor(1.0)}, ValueError, r"`preds` should have the batch first .* has shape \[\]"),
        ({"target": torch.arange(2)}, ValueError, "`preds` and `target` should have as many samples, but got 3 and 2"),
        ({"target": [0, 1, 2]}, TypeError, "`target` should be a tensor, but got list"),
        ({"scale": -1.0}, ValueError, "`scale` should be at least 0 and finite, but got -1"),
        ({"scale": "1"}, TypeError, "`scale` should be a number, but got '1' of type str"),
        ({"ignore_index": 1.5}, TypeError, "`ignore_index` should be an integer or None, but got 1.5"),
        ({"ignore_index": True}, TypeError, "`ignore_index` should be an integer or None, but got True"),
        ({"nan_strategy": "drop"}, ValueError, "`nan_strategy` should be one of 'propagate', .* but got 'drop'"),
    ],
)
def test_bad_arguments_of_output_collapse(options, error, message):
    with pytest.raises(error, match=message):
        output_collapse(**{**OUTPUTS, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"features": None}, TypeError, "`features` should be a floating tensor, but got NoneType"),
        ({"target": [0, 1, 2]}, TypeError, "`target` should be a tensor, but got list"),
        ({"target": torch.zeros(0).long()}, ValueError, "`num_classes` should be given where there is no `weight`"),
        ({"num_classes": 0}, ValueError, "`num_classes` should be at least 1, but got 0"),
        ({"num_classes": 2}, ValueError, r"`target` should be in 0\.\.1, but has 2"),
        ({"weight": 3.0}, TypeError, "`weight` should be a tensor, but got float"),
        ({"weight": torch.eye(3), "bias": 0.0}, TypeError, "`bias` should be a tensor, but got float"),
        ({"weight": torch.ones(3, 2)}, ValueError, r"`weight` should have shape \[3, 3\], but has \[3, 2\]"),
        ({"weight": torch.eye(3), "bias": torch.ones(2)}, ValueError, r"`bias` should have shape \[3\], but has \[2\]"),
        ({"logits": [1]}, TypeError, "`logits` should be a floating tensor, but got list"),
        ({"logits": torch.eye(2)}, ValueError, r"`logits` should have shape \[3, 3\], but has \[2, 2\]"),
        ({"weighting": "equal"}, ValueError, "`weighting` should be one of 'class', 'sample', but got 'equal'"),
        ({"rtol": 1.0}, ValueError, "`rtol` should be at least 0 and below 1, but got 1.0"),
        ({"rtol": "small"}, TypeError, "`rtol` should be a number, but got 'small'"),
        ({"hpd_lambda": 1.0}, ValueError, "`hpd_lambda` should come with the `weight`.* but got no weight"),
        ({"hpd_lambda": 0.0, "weight": torch.eye(3)}, ValueError, "`hpd_lambda` should be at least 1e-300"),
        (
            {"hpd_lambda": 1.0, "weight": torch.eye(3), "class_targets": torch.ones(3, 2)},
            ValueError,
            "but got targets of width 2 for 3 classes",
        ),
    ],
)
def test_bad_arguments_of_neural_collapse(options, error, message):
    with pytest.raises(error, match=message):
        neural_collapse(**{**FEATURES, **options})
