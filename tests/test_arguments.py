"""Bad arguments: refused when they are given, not first in a step."""

import copy
import inspect
import math

import numpy as np
import pytest
import torch
from torch import nn

import torch_adapted_gd
from torch_adapted_gd import AdaptedGD, ConjugateGradients, Dense

from .cases import mlp

MSE = nn.MSELoss()

FLOW = {"method": "dopri5", "rtol": 1e-8, "atol": 1e-10, "steps": 20, "rank_rtol": None}
DEFAULTS = {
    "AdaptedGD": {"lr": 1.0, "criterion": None, "params": None, "alpha": 1.0, "damping": None, "momentum": 0.0}
    | {"weight_decay": 0.0, "metric": "euclidean", "solver": "auto", "process_group": None},
    "Backtracking": {"damping": 0.0, "judge": "auto", "smallest": 1e-12, "second_order": True},
    "ConjugateGradients": {"rtol": 1e-2, "max_iter": 500, "preconditioner": "outputs", "warm_start": True},
    "Dense": {"space": "auto", "rtol": None, "factorization": "auto", "kernel": "auto", "chunk_size": None},
    "LevenbergMarquardt": {"initial": 0.1, "increase": 2.0, "decrease": 1 / 3, "good": 0.75, "poor": 0.25, "accept": 1e-4}
    | {"carry_over": 0.5, "smallest": 1e-15, "num_trials": 10, "second_order": True, "judge": "auto"},
    "StraightLine": {"tolerance": 0.02, "smallest": 1e-6, "damping": 0.0},
    "adapted_flow": {"alpha": 1.0, "time": "t", "t_end": None, "load": False} | FLOW,
    "effective_kernel": {"alpha": 1.0, "step": 1e-4, "rank_rtol": None},
    "follow_path": {"s_end": 1.0, "correction": 0.0, "load": False} | FLOW,
    "interpolation_deviation": {"t_end": 0.99} | FLOW,
    "line_losses": {"steps": 50},
    "solve_kernel": {"damping": 0.0, "rtol": None, "method": "auto"},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_do_not_change_unnoticed(name):
    """Figures of the documentation were measured with them, and the changelog has to tell of a change (docs/stability.md)."""
    found = inspect.signature(getattr(torch_adapted_gd, name)).parameters.items()
    assert {key: p.default for key, p in found if p.default is not p.empty} == DEFAULTS[name]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"lr": math.nan}, ValueError, "`lr` should be at least 0 and finite, but got nan"),
        ({"lr": -0.1}, ValueError, "`lr` should be at least 0 and finite, but got -0.1"),
        ({"lr": math.inf}, ValueError, "`lr` should be at least 0 and finite, but got inf"),
        ({"lr": "fast"}, TypeError, "`lr` should be a number, but got 'fast' of type str"),
        ({"lr": None}, TypeError, "`lr` should be a number, but got None"),
        ({"lr": True}, TypeError, "`lr` should be a number, but got True of type bool"),
        ({"alpha": 1.1}, ValueError, "`alpha` should be at least 0 and at most 1, but got 1.1"),
        ({"alpha": math.nan}, ValueError, "`alpha` should be at least 0 and at most 1, but got nan"),
        ({"damping": -1e-9}, ValueError, "`damping` should be at least 0 and finite, but got -1e-09"),
        ({"damping": math.nan}, ValueError, "`damping` should be"),
        ({"weight_decay": -1}, ValueError, "`weight_decay` should be at least 0 and finite, but got -1"),
        ({"solver": "qr"}, TypeError, r"`solver` should be \"auto\", Dense\(\) or ConjugateGradients\(\), but got 'qr'"),
        ({"solver": ConjugateGradients}, TypeError, r"`solver` should be .*, but got the class. Write ConjugateGradients\(\)"),
        ({"criterion": "mse"}, TypeError, "`criterion` should be a loss module, or several in a tuple, .* but got 'mse'"),
        ({"criterion": nn.MSELoss}, TypeError, r"`criterion` should be a loss module.* Write MSELoss\(\)"),
        ({"criterion": (nn.MSELoss(), nn.functional.mse_loss)}, TypeError, r"Write LossFunction\(function\)"),
        ({"params": []}, ValueError, "empty parameter list"),
        ({"params": [nn.Parameter(torch.ones(2))]}, ValueError, r"`params` should belong to `model`, but .* shape \[2\]"),
        ({"params": [torch.ones(2)]}, ValueError, "should belong to `model`"),
    ],
)
def test_construction(options, error, match):
    model = mlp()
    with pytest.raises(error, match=match):
        AdaptedGD(model, **options)
    assert not model._forward_hooks
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rtol": 1.0}, ValueError, "`rtol` should be at least 0 and below 1, but got 1.0"),
        ({"rtol": math.nan}, ValueError, "`rtol` should be at least 0 and below 1, but got nan"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` should be at least 1, but got 0"),
        ({"chunk_size": 1.5}, TypeError, "`chunk_size` should be a whole number, but got 1.5"),
        ({"kernel": "fast"}, ValueError, "`kernel` should be one of 'auto', 'structured', 'jacobian', but got 'fast'"),
        ({"factorization": "qr"}, ValueError, "`factorization` should be one of 'auto', 'eigh', 'svd', but got 'qr'"),
    ],
)
def test_options_of_the_matrix(options, error, match):
    with pytest.raises(error, match=match):
        Dense(**options)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_scripted_models_are_refused():
    for scripted in (torch.jit.script(nn.Linear(3, 2)), torch.jit.trace(nn.Linear(3, 2), torch.randn(4, 3))):
        with pytest.raises(TypeError, match="should not be scripted or traced, .* Pass the model that it was made from"):
            AdaptedGD(scripted)


def test_the_model_is_asked_for():
    with pytest.raises(TypeError, match=r"but got generator. Pass the model itself, not model.parameters\(\)"):
        AdaptedGD(mlp().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="should have trainable parameters, but none requires a gradient"):
        AdaptedGD(nn.Tanh())
    with pytest.raises(ValueError, match="should have trainable parameters"):
        AdaptedGD(mlp().requires_grad_(False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_parameters_of_other_dtypes(dtype):
    model = nn.Linear(2, 2).to(dtype)
    with pytest.raises(ValueError, match=f"Parameter 'weight' should be float32 or float64, but is {dtype}.*autocast"):
        AdaptedGD(model)


def test_numbers_of_other_types_are_numbers():
    optimizer = AdaptedGD(mlp(), lr=1, damping=np.float32(0.5), solver=Dense(chunk_size=np.int64(3)))
    assert optimizer.param_groups[0]["damping"] == 0.5


def test_add_param_group_is_all_or_nothing():
    model = mlp()
    optimizer = AdaptedGD(model, params=model[0].parameters())
    for group, error, match in (
        ({"params": model[2].parameters(), "lr": math.nan}, ValueError, "`lr` should be"),
        ({"params": model[2].parameters(), "damping": 0.1}, ValueError, "`damping` should be the same in all parameter groups"),
        ({"params": nn.Linear(2, 2).parameters()}, ValueError, "should belong to `model`"),
        ({"params": model[0].parameters()}, ValueError, "some parameters appear in more than one parameter group"),
        ("group", TypeError, "dict"),
    ):
        with pytest.raises(error, match=match):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [], "damping": 0.2})
    MSE(model(torch.ones(2, 4)), torch.ones(2, 3)).backward()
    with pytest.raises(
        ValueError, match=r"`damping` should be the same in all parameter groups, but they have \['0.0', '0.2'\]"
    ):
        optimizer.step()


def test_state_of_another_optimizer_is_refused():
    model = mlp()
    optimizer = AdaptedGD(model)
    state = torch.optim.SGD(model.parameters(), lr=0.3).state_dict()
    with pytest.raises(ValueError, match="should come from an AdaptedGD, but a parameter group has no alpha, damping"):
        optimizer.load_state_dict(state)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["alpha"] = 7.0
    with pytest.raises(ValueError, match="`alpha` should be"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_lazy_parameters():
    with pytest.raises(ValueError, match="Parameter 'weight' is not initialized yet. Call the model on a batch first"):
        AdaptedGD(nn.LazyLinear(3))
