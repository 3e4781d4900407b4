"""The loss along straight lines between two states, in parameter space (4.1) and in output space (2.51)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_adapted_gd import adapted_flow, line_losses

from .cases import flat, mlp, move
from .tangents import assert_close, random, taken_down


def ends(model, reach=1.0):
    start, other = copy.deepcopy(model), copy.deepcopy(model)
    move(other, reach * random(len(flat(model))))
    return start.state_dict(), other.state_dict()


def test_both_lines():
    model, x, y = mlp(sizes=(3, 5, 2)).double(), random(4, 3), random(4, 2)
    start, end = ends(model)
    move(model, random(len(flat(model))))  # the model is at neither end
    before = taken_down(model)
    found = line_losses(model, x, y, start, end, steps=4)
    assert taken_down(model) == before
    assert found.t.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    outputs = []
    for t in found.t.tolist():
        model.load_state_dict({name: (1 - t) * start[name] + t * end[name] for name in start})
        outputs.append(model(x).detach())
    losses = [float((out - y).square().sum()) / 8 for out in outputs]
    assert_close(found.parameter_outputs, torch.stack(outputs), 1e-13)
    assert found.parameter_line.tolist() == pytest.approx(losses, rel=1e-12)
    straight = [(1 - t) * outputs[0] + t * outputs[-1] for t in found.t.tolist()]
    assert found.output_line.tolist() == pytest.approx([float((out - y).square().sum()) / 8 for out in straight], rel=1e-12)
    assert found.output_line.dtype == found.parameter_line.dtype == torch.float64
    rises = [losses[k] - min(losses[: k + 1]) for k in range(5)]
    assert found.rise == pytest.approx(max(rises), abs=1e-15)
    assert found.monotone == (max(rises) == 0)


def test_monotone_between_a_start_and_its_least_squares_solution():
    """Linear in θ: the loss is a parabola with its minimum at the end, and both lines agree."""
    model, x, y = nn.Linear(3, 1, bias=False).double(), random(6, 3), random(6, 1)
    start = model.state_dict()
    end = {"weight": torch.linalg.lstsq(x, y).solution.T}
    found = line_losses(model, x, y, start, end)
    assert len(found.t) == 51
    assert found.monotone
    assert found.rise == 0.0
    assert_close(found.output_line, found.parameter_line, 1e-12)
    beyond = {"weight": start["weight"] + 2 * (end["weight"] - start["weight"])}  # past the minimum, to the same height
    found = line_losses(model, x, y, start, beyond)
    assert not found.monotone
    assert found.rise == pytest.approx(float(found.parameter_line[0] - found.parameter_line[25]))


def test_a_barrier():
    """Exchanged hidden units: the same function at both ends, another in between."""
    model, x = mlp(sizes=(2, 4, 1)).double(), random(8, 2)
    start = model.state_dict()
    order = torch.tensor([1, 0, 3, 2])
    end = {"0.weight": start["0.weight"][order], "0.bias": start["0.bias"][order], "2.weight": start["2.weight"][:, order]}
    found = line_losses(model, x, model(x), start, {**end, "2.bias": start["2.bias"]}, steps=10)
    assert found.parameter_line[[0, -1]].tolist() == pytest.approx([0.0, 0.0], abs=1e-25)
    assert float(found.output_line.max()) < 1e-25
    assert not found.monotone
    assert found.rise == pytest.approx(float(found.parameter_line.max()))
    assert found.rise > 1e-4


def test_output_line_to_zero_loss():
    """(1−t)² C₀, the loss along the adapted flow (2.57)."""
    model, x, y = mlp(sizes=(3, 6, 1)).double(), random(4, 3), random(4, 1)
    start = copy.deepcopy(model.state_dict())
    flow = adapted_flow(model, x, y, steps=8, rtol=1e-6, atol=1e-8, load=True)
    found = line_losses(model, x, y, start, model.state_dict(), steps=8)
    first = float(found.output_line[0])
    assert found.output_line.tolist() == pytest.approx(((1 - found.t) ** 2 * first).tolist(), abs=1e-5 * first)
    assert found.output_line.tolist() == pytest.approx(flow.losses.tolist(), abs=1e-4 * first)
    assert found.parameter_line[-1] == found.output_line[-1]


def test_other_losses():
    model, x, labels = mlp(sizes=(3, 5, 2)).double(), random(4, 3), torch.tensor([0, 1, 1, 0])
    start, end = ends(model)
    found = line_losses(model, x, lambda out: F.cross_entropy(out, labels), start, end, steps=3)
    expected = [float(F.cross_entropy(out, labels)) for out in found.parameter_outputs]
    assert found.parameter_line.tolist() == pytest.approx(expected)
    # The loss is convex in outputs, so there its line is below the chord.
    chord = torch.lerp(found.output_line[:1], found.output_line[-1:], found.t)
    assert (found.output_line <= chord + 1e-12).all()


def test_one_state_twice_is_flat():
    model, x, y = mlp(sizes=(3, 5, 2)), torch.randn(4, 3), torch.randn(4, 2)
    found = line_losses(model, x, y, model.state_dict(), model.state_dict(), steps=1)
    assert found.monotone
    assert found.parameter_line.tolist() == found.output_line.tolist()
    assert found.parameter_outputs.shape == (2, 4, 2)


def test_only_trained_parameters_are_read():
    """Frozen ones and buffers are the model's own."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double().eval()
    model[0].requires_grad_(False)
    x, y = random(5, 3), random(5, 1)
    start = copy.deepcopy(model.state_dict())
    end = {name: t + 1 for name, t in start.items()}
    found = line_losses(model, x, y, start, end, steps=1)
    only = {**start, **{name: end[name] for name, p in model.named_parameters() if p.requires_grad}}
    model.load_state_dict(only)
    assert_close(found.parameter_outputs[-1], model(x).detach(), 1e-12)


ERRORS = {
    "missing": (
        lambda state: {"0.weight": state["0.weight"]},
        {},
        ValueError,
        r"`end` should have the parameter '0.bias' of shape \[5\], but has none",
    ),
    "shape": (
        lambda state: {**state, "2.weight": torch.zeros(5, 2)},
        {},
        ValueError,
        r"`end` should have the parameter '2.weight' of shape \[2, 5\], but has \[5, 2\]",
    ),
    "steps": (lambda state: state, {"steps": 0}, ValueError, "`steps` should be at least 1, but got 0"),
    "labels": (
        lambda state: state,
        {"y_or_loss": torch.zeros(4).long()},
        ValueError,
        r"Targets should have the outputs' shape \[4, 2\], but have \[4\]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    change, options, error, message = ERRORS[case]
    model, x = mlp(sizes=(3, 5, 2)), torch.randn(4, 3)
    before = taken_down(model)
    state = copy.deepcopy(model.state_dict())
    arguments = {"y_or_loss": torch.zeros(4, 2), **options}
    with pytest.raises(error, match=message):
        line_losses(model, x, start=state, end=change(state), **arguments)
    assert taken_down(model) == before
