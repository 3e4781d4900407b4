import math

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian

from torch_adapted_gd import HalfSquaredLoss
from torch_adapted_gd.losses import output_curvature

LOSSES = [nn.MSELoss, HalfSquaredLoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss]


def test_half_squared_loss_is_the_papers():
    x, y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, dtype=torch.float64)
    loss = HalfSquaredLoss()(x, y)
    assert loss.item() == pytest.approx(((x - y) ** 2).sum().item() / 8)
    loss.backward()
    torch.testing.assert_close(x.grad, (x - y).detach() / 4)  # (x − y)/N, (2.49) corrected
    assert HalfSquaredLoss("sum")(x, y).item() == pytest.approx(4 * loss.item())
    each = HalfSquaredLoss("none")(x, y)
    assert each.shape == (4,)
    assert each.mean().item() == pytest.approx(loss.item())


def test_half_squared_loss_refuses():
    with pytest.raises(ValueError, match="`reduction` should be one of 'mean', 'sum', 'none', but got 'avg'"):
        HalfSquaredLoss("avg")
    with pytest.raises(ValueError, match=r"the same shape with the batch first, but got \[4, 3\] and \[4\].*one_hot"):
        HalfSquaredLoss()(torch.ones(4, 3), torch.ones(4))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_curvature_bounds_the_hessian_and_is_it_for_squares(loss, reduction):
    criterion = loss(reduction=reduction)
    for scale in (0.0, 1.0, 5.0):
        x = scale * torch.randn(5, 3, dtype=torch.float64)
        y = torch.randint(3, (5,)) if loss is nn.CrossEntropyLoss else torch.rand(5, 3, dtype=torch.float64)
        eigenvalues = torch.linalg.eigvalsh(hessian(lambda z, c=criterion, y=y: c(z, y), x).reshape(15, 15))
        c = output_curvature(criterion, [torch.ones_like(x)])
        assert eigenvalues.max() <= c * (1 + 1e-12)
        if loss in (nn.MSELoss, HalfSquaredLoss):
            torch.testing.assert_close(eigenvalues, torch.full((15,), c, dtype=torch.float64))
        if loss is nn.BCEWithLogitsLoss and scale == 0:
            assert eigenvalues.max() == pytest.approx(c)


def test_the_bound_of_cross_entropy_is_reached():
    x = torch.tensor([[0.0, 0.0, -40.0]], dtype=torch.float64)  # p = (½, ½, 0)
    matrix = hessian(lambda z: nn.CrossEntropyLoss()(z, torch.tensor([0])), x).reshape(3, 3)
    assert torch.linalg.eigvalsh(matrix).max() == pytest.approx(output_curvature(nn.CrossEntropyLoss(), [torch.ones(1, 3)]))


@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 3)])
def test_ignored_targets_and_class_weights(shape):
    weight = torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64)
    y = torch.tensor([0, 1, -100, 2, 0, 3]).reshape(shape[0], *shape[2:])
    for criterion in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight), nn.CrossEntropyLoss(weight, label_smoothing=0.1)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        g = torch.autograd.grad(criterion(x, y), x)[0]
        c = output_curvature(criterion, [g])
        largest = torch.linalg.eigvalsh(hessian(lambda z, k=criterion: k(z, y), x).reshape(24, 24)).max()
        assert largest <= c
        if criterion.weight is None:
            assert c == pytest.approx(0.5 / 5)  # five targets count


def test_weights_of_binary_cross_entropy():
    criterion = nn.BCEWithLogitsLoss(weight=torch.tensor([1.0, 3.0]), pos_weight=torch.tensor([0.5, 4.0]))
    assert output_curvature(criterion, [torch.ones(5, 2)]) == pytest.approx(0.25 * 3 * 4 / 10)


def test_none_counts_as_sum_and_calls_add_up():
    for loss in LOSSES:
        ones = torch.ones(5, 3)
        assert output_curvature(loss(reduction="none"), [ones]) == output_curvature(loss(reduction="sum"), [ones])
        whole = output_curvature(loss(), [torch.ones(8, 3)])
        assert math.isclose(output_curvature(loss(), [ones, ones[:3]]), whole)
