"""The loss as a function of the outputs, against autograd: Hessian, its root, and changes."""

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian

from torch_adapted_gd import AdaptedGD, Backtracking, HalfSquaredLoss
from torch_adapted_gd.calls import record
from torch_adapted_gd.curvature import OutputLoss, largest_curvature

N = 6


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def classes(*shape):
    return lambda: torch.randint(4, (N, *shape))


LOSSES = {
    "mse": (nn.MSELoss, {}, (3,), lambda: torch.randn(N, 3, dtype=torch.float64)),
    "half squared": (HalfSquaredLoss, {}, (3, 2), lambda: torch.randn(N, 3, 2, dtype=torch.float64)),
    "cross-entropy": (nn.CrossEntropyLoss, {}, (4,), classes()),
    "cross-entropy smoothed": (nn.CrossEntropyLoss, {"label_smoothing": 0.1}, (4,), classes()),
    "cross-entropy of probabilities": (
        nn.CrossEntropyLoss,
        {},
        (4,),
        lambda: torch.randn(N, 4, dtype=torch.float64).softmax(1),
    ),
    "cross-entropy of pixels, some ignored": (nn.CrossEntropyLoss, {"ignore_index": 1}, (4, 3, 2), classes(3, 2)),
    "cross-entropy with class weights": (nn.CrossEntropyLoss, {"weight": double(0.2, 1, 3, 0)}, (4, 3), classes(3)),
    "binary": (nn.BCEWithLogitsLoss, {}, (4,), lambda: torch.rand(N, 4, dtype=torch.float64)),
    "binary weighted": (
        nn.BCEWithLogitsLoss,
        {"weight": double(0.3, 1, 0, 2), "pos_weight": double(0.2, 1, 3, 5)},
        (4,),
        lambda: torch.rand(N, 4, dtype=torch.float64),
    ),
}


class Given(nn.Module):
    """Its outputs are its parameters."""

    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(x)

    def forward(self, scale):
        return self.x * scale


def setting(name, reduction, size=2.0):
    kind, options, shape, targets = LOSSES[name]
    criterion, y = kind(reduction=reduction, **options), targets()
    model = Given(size * torch.randn(N, *shape, dtype=torch.float64))
    call = record(model, (torch.ones(()),))
    x = next(iter(call.outputs.values())).clone().requires_grad_()
    call.gradients = {place: torch.autograd.grad(criterion(x, y), x)[0] for place in call.outputs}
    return criterion, call, x.detach(), y


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_root_is_that_of_the_hessian(name, reduction):
    criterion, call, x, y = setting(name, reduction)
    h = hessian(lambda z: criterion(z, y), x).reshape(x.numel(), -1)
    loss = OutputLoss(criterion, [call])
    eye = torch.eye(x.numel(), dtype=torch.float64)
    root = loss.hessian_root(eye)
    torch.testing.assert_close(root @ root.T, h, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.hessian_root_transpose(eye), root.T)
    q = x[0].numel()
    torch.testing.assert_close(loss.hessian_root_transpose(eye[q : 3 * q], first=q), root.T[q : 3 * q])  # a part of the samples
    g = next(iter(call.gradients.values())).reshape(-1)
    torch.testing.assert_close(loss.hessian_root(g), root @ g)
    torch.testing.assert_close(root @ loss.hessian_root_inverse(g), g)
    torch.testing.assert_close(loss.hessian_root_inverse(g), torch.linalg.pinv(root, rtol=1e-10) @ g)
    assert torch.linalg.eigvalsh(h)[-1] <= (1 + 1e-12) * largest_curvature(criterion, [call])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("length", [1e-5, 0.3, 30.0])
def test_changes_are_those_of_the_loss(name, reduction, length):
    criterion, call, x, y = setting(name, reduction)
    delta = length * torch.randn_like(x)
    loss = OutputLoss(criterion, [call])
    assert loss.value() == pytest.approx(criterion(x, y).item())
    change = loss.change(delta.reshape(-1))
    expected = float(criterion(x + delta, y) - criterion(x, y))  # of numbers near 1: 1e-16 is lost
    assert change == pytest.approx(expected, rel=1e-10, abs=1e-13 * float(criterion(x, y) + 1))


def test_changes_far_from_the_targets_and_of_extreme_outputs():
    criterion, y = nn.CrossEntropyLoss(), torch.tensor([0, 1])
    model = Given(double([40.0, -40.0], [300.0, -300.0]).view(2, 2))
    call = record(model, (torch.ones(()),))
    x = next(iter(call.outputs.values())).clone().requires_grad_()
    call.gradients = {place: torch.autograd.grad(criterion(x, y), x)[0] for place in call.outputs}
    loss = OutputLoss(criterion, [call])
    assert loss.hessian_root_inverse(call.gradients[0].reshape(-1)).isfinite().all()
    for delta in (double([-80.0, 80.0], [-600.0, 600.0]).view(2, 2), double([1.0, 0.0], [0.0, 1.0]).view(2, 2)):
        expected = float((criterion(x + delta, y) - criterion(x, y)).detach())
        assert loss.change(delta.reshape(-1)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["mse", "cross-entropy with class weights"])
def test_several_calls_and_backward_passes(name):
    """Two calls of one backward pass share a mean; two passes are means that are averaged."""
    for same_pass in (True, False):
        criterion, _, x, y = setting(name, "mean")
        half = N // 2
        calls, passes = [], []
        for number, part in enumerate((slice(0, half), slice(half, N))):
            c = record(Given(x[part].clone()), (torch.ones(()),))
            c.backward_pass = 0 if same_pass else number
            calls.append(c)
            passes.append((x[part], y[part]))

        def total(z, y=y, passes=passes, same_pass=same_pass, criterion=criterion, half=half):
            if same_pass:
                return criterion(z, y)
            return sum(criterion(z[i * half : (i + 1) * half], t) for i, (_, t) in enumerate(passes)) / 2

        z = x.clone().requires_grad_()
        g = torch.autograd.grad(total(z), z)[0]
        for i, c in enumerate(calls):
            c.gradients = {0: 8 * g[i * half : (i + 1) * half]}
        loss = OutputLoss(criterion, calls, loss_scale=8.0)
        root = loss.hessian_root(torch.eye(x.numel(), dtype=torch.float64))
        torch.testing.assert_close(root @ root.T, hessian(total, x).reshape(x.numel(), -1))
        delta = torch.randn_like(x)
        assert loss.change(delta.reshape(-1)) == pytest.approx(float(total(x + delta) - total(x)))


@pytest.mark.parametrize("name", ["cross-entropy smoothed", "cross-entropy of probabilities"])
def test_class_weights_that_are_hidden_are_refused(name):
    kind, options, _, targets = LOSSES[name]
    model = nn.Linear(3, 4)
    criterion = kind(weight=torch.tensor([0.2, 1.0, 3.0, 1.0]), **options)
    optimizer = AdaptedGD(model, criterion=criterion, metric="ggn")
    y = targets()
    before = [p.detach().clone() for p in model.parameters()]
    criterion(model(torch.randn(N, 3)), y.float() if y.is_floating_point() else y).backward()
    with pytest.raises(RuntimeError, match="should be that of `criterion`, a CrossEntropyLoss with class weights"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


def test_class_scores_need_a_batch():
    model = nn.Linear(3, 4)
    optimizer = AdaptedGD(model, criterion=nn.CrossEntropyLoss(), metric="ggn")
    nn.CrossEntropyLoss()(model(torch.randn(3)), torch.tensor(1)).backward()
    with pytest.raises(ValueError, match=r"should be \[N, classes, ...\] for a CrossEntropyLoss, but its shape is \[4\]"):
        optimizer.step()


def test_options_that_need_the_loss_need_to_know_it():
    model = nn.Linear(3, 2)
    for options in ({"metric": "ggn"}, {"damping": Backtracking()}):
        with pytest.raises(ValueError, match='`criterion` should have reduction "mean" or "sum" for'):
            AdaptedGD(model, criterion=nn.MSELoss(reduction="none"), **options)
    with pytest.raises(ValueError, match='`criterion` should be given for metric="ggn".* but got None'):
        AdaptedGD(model, metric="ggn")
    with pytest.raises(ValueError, match="`metric` should be one of 'euclidean', 'ggn', but got 'fisher'"):
        AdaptedGD(model, metric="fisher")
