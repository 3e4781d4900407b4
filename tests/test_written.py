"""Kernels and steps of the models that people write, against the dense float64 ones."""

import contextlib
import copy

import pytest
import torch

from torch_adapted_gd import AdaptedGD, ntk

from .cases import MSE, dense_jacobian, flat
from .layers import draw
from .written import WRITTEN

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
LOOSER = {}  # by name and dtype, with the reason: none has one so far, the largest error is 0.4 of its bound
BY_ROWS = {
    "prototypes",  # torch.func's derivative of cdist is another one than autograd's, which is that of finite differences
}
ROWS: set[str] = {"spectral_conv", "global_filter"}  # complex arithmetic
# torch itself says so of the rules that it scripts for forward derivatives, when the first one is taken.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def told(name):
    """Expects the remark that rows are taken where it is due; elsewhere it is an error, as any warning is."""
    if name not in ROWS:
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match="Rows of the output Jacobian are taken")


def made(name, dtype):
    build, shape = WRITTEN[name]
    return build().to(dtype), draw(shape, 5, dtype), draw(shape, 3, dtype)


def oracle(name, model, x):
    """D of a copy, on copies of the inputs: some of these models mark theirs."""
    computed = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    copied = copy.deepcopy(model, {id(value): value.detach() for value in computed})  # the old weight_norm keeps its weight
    return dense_jacobian(copied, *(tensor.clone() for tensor in x), by_rows=name in BY_ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WRITTEN)
def test_kernel_is_that_of_the_dense_jacobian(name, dtype):
    model, x1, x2 = made(name, dtype)
    first, second = oracle(name, model, x1), oracle(name, model, x2)
    bound = LOOSER.get((name, dtype), TOLERANCE[dtype])
    for x, other in (((x1,), first), ((x1, x2), second)):
        with told(name):
            theta = ntk(model, *x)
        expected = first @ other.T
        assert (theta.reshape(expected.shape) - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("name", WRITTEN)
def test_step_is_the_dense_damped_one(name):
    model, x, _ = made(name, torch.float64)
    d, before = oracle(name, model, x), flat(model)
    optimizer = AdaptedGD(model, lr=0.1, damping=1e-3)
    outputs = model(*x)
    outputs.retain_grad()
    MSE(outputs, torch.randn_like(outputs)).backward()
    with told(name):
        optimizer.step()
    assert optimizer.last_step.kernel == "structured" or name in ROWS
    theta = d @ d.T
    damped = theta + 1e-3 * theta.diagonal().mean() * torch.eye(len(theta), dtype=theta.dtype)
    change = -0.1 * d.T @ torch.linalg.solve(damped, outputs.grad.reshape(-1))
    assert (flat(model) - before - change).norm() <= 1e-8 * change.norm()
