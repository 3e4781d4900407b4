import pytest
import torch
from torch import nn

from torch_adapted_gd import HalfSquaredLoss, LossFunction


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


def test_a_function_is_a_criterion():
    criterion = LossFunction(nn.functional.huber_loss, delta=0.5)
    assert criterion(torch.ones(4), torch.zeros(4)).item() == pytest.approx(0.375)
    assert repr(criterion) == "LossFunction(huber_loss)"
    with pytest.raises(TypeError, match="`function` should be a function that returns a loss, but got <class"):
        LossFunction(nn.MSELoss)
