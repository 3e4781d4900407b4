"""Features: a simplex with noise in closed form, the papers' definitions written out, identities and symmetries."""

import pytest
import torch

from torch_adapted_gd.collapse import neural_collapse, output_collapse
from torch_adapted_gd.collapse.features import Means, mismatches
from torch_adapted_gd.collapse.moments import ClassMoments

from .collapsed import grid, published, simplex

EPS = torch.finfo(torch.float64).eps


def noisy_simplex(classes, width, norm, deviation):
    """2D samples a class, ±√D·s along each axis around the corners of a simplex: Σ_W = s²."""
    means = simplex(classes, width, norm)
    noise = width**0.5 * deviation * torch.eye(width).double()
    around = torch.cat([noise, -noise])
    features = (means[:, None] + around).reshape(-1, width)
    return means, features, torch.arange(classes).repeat_interleave(2 * width)


def cloud(counts, width, deviation=0.5):
    """Classes of these sizes around random means, and a random head."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[torch.randperm(sum(counts))]
    features = torch.randn(len(counts), width).double()[labels] + deviation * torch.randn(len(labels), width).double()
    return features, labels, torch.randn(len(counts), width).double(), torch.randn(len(counts)).double()


@pytest.mark.parametrize(("classes", "width"), [(2, 2), (3, 3), (4, 9), (6, 6)])
@pytest.mark.parametrize("deviation", [0.1, 1e-9])
def test_a_simplex_with_the_same_noise_in_all_directions(classes, width, deviation):
    norm = 3.0
    means, features, labels = noisy_simplex(classes, width, norm, deviation)
    found = neural_collapse(features, labels, weight=0.7 * means)
    k = classes
    # Features near 3 are rounded to about 4e-16, beside a deviation of 1e-9: twice that relative to its square.
    precision = 1e-13 + 16 * EPS / deviation
    assert found["nc1_pinv"] == pytest.approx((k - 1) ** 2 * deviation**2 / (k * norm**2), rel=precision, abs=0)
    assert found["nc1_trace"] == pytest.approx(width * deviation**2 / norm**2, rel=precision, abs=0)
    assert found["nc1_cdnv"] == pytest.approx(width * deviation**2 * (k - 1) / (2 * k * norm**2), rel=precision, abs=0)
    for key, value in found.items():
        if not key.startswith("nc1"):
            assert value < 64 * EPS, key
    assert neural_collapse(features, labels, weight=-means)["nc3"] == pytest.approx(4, rel=1e-14)


def test_nc4_is_of_the_head_with_its_bias():
    means, features, labels = noisy_simplex(4, 6, 3.0, 0.1)
    centre = 10 * means[1]
    features, weight = features + centre, 0.7 * means
    right = -(weight @ centre)  # argmax W(h − μ_G) = argmin |h − μ_j|
    assert neural_collapse(features, labels, weight, right)["nc4_mismatch"] == 0
    assert neural_collapse(features, labels, weight)["nc4_mismatch"] == 3 / 4  # without the bias, all are class 1
    flipped = right + 1e3 * torch.eye(4).double()[2]
    assert neural_collapse(features, labels, weight, flipped)["nc4_mismatch"] == 3 / 4
    logits = features @ weight.T + right
    assert neural_collapse(features, labels, weight, flipped, logits=logits)["nc4_mismatch"] == 0
    assert neural_collapse(features, labels, logits=logits.half())["nc4_mismatch"] == 0


def test_nearest_mean():
    nan = torch.tensor([[0.0, 0.0], [torch.nan, torch.nan], [1.0, 0.0]]).double()
    rows = torch.tensor([[0.5, 0.0], [0.6, 9.0], [-1.0, 0.0]]).double()
    assert mismatches(torch.tensor([0, 2, 0]), rows, nan).tolist() == [0, 0, 0]
    assert mismatches(torch.tensor([1, 1, 2]), rows, nan).tolist() == [1, 1, 1]
    assert mismatches(torch.tensor([0, 1, 2]), rows, nan * torch.nan).tolist() == [1, 1, 1]
    far = torch.tensor([[1e8, 0.0], [1e8, 1e-3]]).double()  # |h|² − 2h·μ + |μ|² would lose the 1e-6
    assert mismatches(torch.tensor([0, 1]), far, far).tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:A simplex of 5 class means")
@pytest.mark.parametrize("weighting", ["class", "sample"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("counts", "width"), [([8, 8, 8], 5), ([8, 8, 8], 2), ([6, 6], 4), ([3, 17, 5, 9], 7), ([1, 12, 4], 3), ([9] * 5, 2)]
)
def test_the_published_definitions(counts, width, biased, weighting):
    features, labels, weight, bias = cloud(counts, width)
    bias = bias if biased else None
    found = neural_collapse(features, labels, weight, bias, weighting=weighting)
    expected = published(features, labels, weight, bias, weighting=weighting)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # Σ_B squares the condition of the means, below 1e3 here, in the definition's own pseudoinverse.
        assert found[key] == pytest.approx(value, rel=1e-9 if key == "nc1_pinv" else 1e-12, abs=1e-14), key


def test_covariance_of_all_features_is_that_within_and_between():
    features, labels, _, _ = cloud([3, 17, 5], 6)
    moments = ClassMoments.of(features, labels, 3, pooled=True)
    means = Means.of(moments, "sample")
    between = means.centred.T @ (means.weights[:, None] * means.centred)
    whole = torch.cov(features.T, correction=0)
    torch.testing.assert_close(moments.pooled / 25 + between, whole, rtol=0, atol=32 * EPS * float(whole.norm()))
    within = float(moments.scatter.sum()) / 25
    found = neural_collapse(features, labels, weighting="sample")["nc1_trace"]
    assert within * (1 + 1 / found) == pytest.approx(float(whole.trace()), rel=1e-13)


def test_a_linear_head_carries_the_split_of_its_outputs():
    features, labels, weight, bias = cloud([3, 17, 5], 6)
    moments = ClassMoments.of(features, labels, 3, pooled=True)
    found = output_collapse(features @ weight.T + bias, labels)
    within = torch.trace(weight @ (moments.pooled / 25) @ weight.T)
    heads = moments.mean @ weight.T + bias - torch.eye(3).double()
    assert found["within"] == pytest.approx(float(within), rel=1e-13)
    assert found["bias"] == pytest.approx(float(moments.count / 25 @ heads.square().sum(1)), rel=1e-13)


@pytest.mark.parametrize("lam", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("targets", [None, "given"])
def test_split_at_the_best_linear_head(lam, targets):
    counts, width = [3, 17, 5], 4
    features, labels, weight, bias = cloud(counts, width)
    targets = torch.randn(3, 3).double() if targets else None
    goals = (torch.eye(3).double() if targets is None else targets)[labels]
    extended = torch.cat([features, torch.ones(25, 1).double()], 1)

    def split(head):
        found = neural_collapse(
            features, labels, head[:, :-1], head[:, -1], hpd_lambda=lam, class_targets=targets, weighting="class"
        )
        return found["hpd_nc1"], found["hpd_nc23"], found["hpd_perp"]

    def objective(head):
        return float(((extended @ head.T - goals).square().sum() / 25 + lam * head.square().sum()) / 2)

    head = torch.cat([weight, bias[:, None]], 1)
    assert float(sum(split(head))) == pytest.approx(objective(head), rel=1e-12)
    # The same least-squares problem with √λ as further rows, so that no condition number is squared
    rows = torch.cat([extended / 5, lam**0.5 * torch.eye(5).double()])
    best = torch.linalg.lstsq(rows, torch.cat([goals / 5, torch.zeros(5, 3).double()])).solution.T
    assert split(best)[2] < 1e-20
    assert float(sum(split(best)[:2])) == pytest.approx(objective(best), rel=1e-12)
    # hpd_nc23 alone: the loss of the best head at the means
    own = torch.stack([extended[labels == j].mean(0) @ best.T for j in range(3)])
    away = (own - (torch.eye(3).double() if targets is None else targets)).square().sum(1)
    assert split(head)[1] == pytest.approx(float(torch.tensor(counts).double() / 50 @ away), rel=1e-10)


@pytest.mark.parametrize("counts", [[9, 9, 9], [2, 15, 7]])
def test_symmetries(counts):
    features, labels, weight, bias = cloud(counts, 5)
    expected = neural_collapse(features, labels, weight, bias)
    rotation = torch.linalg.qr(torch.randn(5, 5).double())[0]
    order = torch.randperm(3)
    shift = torch.randn(5).double()
    same = {
        "rotation": neural_collapse(features @ rotation, labels, weight @ rotation, bias),
        "translation": neural_collapse(features + shift, labels, weight, bias - weight @ shift),
        "scale": neural_collapse(3.7 * features, labels, weight / 3.7, bias),
        "names of classes": neural_collapse(features, order.argsort()[labels], weight[order], bias[order]),
        "order of samples": neural_collapse(features.flip(0), labels.flip(0), weight, bias),
    }
    for name, found in same.items():
        for key, value in expected.items():
            assert found[key] == pytest.approx(float(value), rel=1e-11, abs=1e-14), (name, key)


def test_features_far_from_zero():
    features, labels = grid(30, 4), torch.arange(30) % 3
    expected, found = (neural_collapse(features + shift, labels) for shift in (0.0, 2.0**30))  # without rounding
    for key, value in expected.items():
        # A mean is rounded to 1e-7 here; differences of pivots and offsets are not.
        assert found[key] == pytest.approx(float(value), rel=1e-12, abs=1e-14), key


@pytest.mark.parametrize("bits", [20, 33, 43])
def test_variation_far_below_the_rounding_of_means(bits):
    labels, start, away = torch.arange(48) % 3, grid(3, 5), grid(48, 5)
    step = 2.0**-bits
    found = neural_collapse(start[labels] + step * away, labels)["nc1_pinv"]  # features without rounding
    inner = [away[labels == j] for j in range(3)]
    means = start + step * torch.stack([rows.mean(0) for rows in inner])
    deviations = torch.cat([rows - rows.mean(0) for rows in inner])
    between = (means - means.mean(0)).T @ (means - means.mean(0)) / 3
    scatter = deviations.T @ deviations / 48
    expected = step**2 * torch.trace(scatter @ torch.linalg.pinv(between, rtol=1e-10, hermitian=True)) / 3
    assert found == pytest.approx(float(expected), rel=1e-12, abs=0)


def test_means_that_coincide():
    features = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1], [2, 0], [4, 0]]).double()
    found = neural_collapse(features, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert found["nc1_cdnv"] == torch.inf
    assert found["nc1_pinv"].isfinite()
    both = neural_collapse(features[:4], torch.tensor([0, 0, 1, 1]))
    assert both["nc1_pinv"] == both["nc1_trace"] == both["nc1_cdnv"] == torch.inf


def test_directions_that_count():
    features = torch.diag(torch.tensor([1.0, 1.0, 1e-3])).double().repeat(2, 1)
    labels = torch.arange(6) % 3
    features[:3, 2] += 0.1
    features[3:, 2] -= 0.1
    fine, coarse = neural_collapse(features, labels), neural_collapse(features, labels, rtol=0.9)
    assert coarse["nc1_pinv"] < fine["nc1_pinv"]
    features, labels, _, _ = cloud([9, 5, 6], 5)  # at most K − 1 directions, though rounding adds others
    assert neural_collapse(features, labels, rtol=0.0) == neural_collapse(features, labels)


def test_one_class_or_none():
    for labels in (torch.zeros(3).long(), torch.zeros(0).long()):
        features = torch.randn(len(labels), 4)
        found = neural_collapse(features, labels, num_classes=1, weight=torch.ones(1, 4), bias=torch.zeros(1))
        assert all(value.isnan() for key, value in found.items() if key != "nc4_mismatch")
        assert found["nc4_mismatch"].isnan() if len(labels) == 0 else found["nc4_mismatch"] == 0


def test_classes_without_samples_are_left_out():
    features, labels, weight, bias = cloud([5, 5, 5], 4)
    spread = torch.tensor([0, 2, 3])
    wide, shift = torch.randn(5, 4).double(), torch.full((5,), -1e3).double()
    wide[spread], shift[spread] = weight, bias
    with pytest.warns(UserWarning, match="2 of 5 classes have no samples: NC1 to NC4 are of the others"):
        found = neural_collapse(features, spread[labels], wide, shift)
    assert found == neural_collapse(features, labels, weight, bias)


def test_a_simplex_that_does_not_fit():
    features, labels, _, _ = cloud([4] * 5, 3)
    with pytest.warns(UserWarning, match="A simplex of 5 class means does not fit in 3 dimensions"):
        found = neural_collapse(features, labels)
    assert found["nc2_etf_means"] > 0.1
    neural_collapse(features[labels < 4], labels[labels < 4])  # K − 1 = D fits


def test_a_class_with_one_sample_does_not_vary():
    features, labels, _, _ = cloud([1, 1, 1], 4)
    found = neural_collapse(features, labels)
    assert found["nc1_pinv"] == found["nc1_trace"] == found["nc1_cdnv"] == 0


def test_features_that_are_not_finite():
    features, labels, weight, bias = cloud([5, 5, 5], 4)
    broken = features.clone()
    broken[3, 2] = torch.nan
    found = neural_collapse(broken, labels, weight, bias)
    assert all(value.isnan() for key, value in found.items() if not key.endswith("_weights"))
    with pytest.raises(ValueError, match="`features` should be finite, but 1 of 15 samples are not"):
        neural_collapse(broken, labels, nan_strategy="error")
    rest = torch.arange(15) != 3
    expected = neural_collapse(features[rest], labels[rest], weight, bias)
    assert neural_collapse(broken, labels, weight, bias, nan_strategy="ignore") == expected
    assert neural_collapse(broken, torch.where(rest, labels, -1), weight, bias, ignore_index=-1) == expected
    logits = features @ weight.T + bias
    assert neural_collapse(broken, labels, weight, nan_strategy="ignore", logits=logits) == expected
    with pytest.warns(UserWarning, match="1 of 15 samples of `features` are not finite"):
        neural_collapse(broken, labels, nan_strategy="warn")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype):
    features, labels, weight, bias = (
        tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in cloud([9] * 3, 4)
    )
    found = neural_collapse(features.reshape(27, 2, 2), labels, weight.requires_grad_(), bias)
    assert found == neural_collapse(features.double(), labels, weight.double(), bias.double())
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in found.values())


def test_number_of_classes_where_it_is_not_given():
    features, labels, weight, _ = cloud([5, 5, 5], 4)
    expected = neural_collapse(features, labels, num_classes=3)
    assert neural_collapse(features, labels) == expected
    assert neural_collapse(features, torch.nn.functional.one_hot(labels)) == expected
    assert neural_collapse(features, labels, class_targets=weight) == expected
    assert neural_collapse(torch.cat([features, features]), torch.cat([labels, labels * 0 + 255]), ignore_index=255) == expected
