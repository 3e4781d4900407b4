"""Checks of arguments: "`name` should <rule>, but got <value>", a TypeError for a type and a ValueError for a value."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def real_number(name: str, value: Any, *, low: float, high: float = math.inf, below: float = math.inf) -> float:
    """Return ``value`` as a float if it is a finite number in ``[low, high]`` and smaller than ``below``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` should be a number, but got {value!r} of type {type(value).__name__}.")
    number = float(value)
    if not (low <= number <= high and number < below):  # written so that NaN fails
        upper = f"at most {high:g}" if math.isfinite(high) else f"below {below:g}" if math.isfinite(below) else "finite"
        raise ValueError(f"`{name}` should be at least {low:g} and {upper}, but got {value!r}.")
    return number


def positive_integer(name: str, value: Any) -> int:
    """Return ``value`` as an int if it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` should be a whole number, but got {value!r} of type {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"`{name}` should be at least 1, but got {value!r}.")
    return int(value)


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of the ``allowed`` words."""
    if value not in allowed:
        raise ValueError(f"`{name}` should be one of {', '.join(map(repr, allowed))}, but got {value!r}.")
    return str(value)


def true_or_false(name: str, value: Any) -> bool:
    """Return ``value`` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` should be True or False, but got {value!r} of type {type(value).__name__}.")
    return value


def a_tensor(name: str, value: Any, shape: str = "") -> Tensor:
    """Return ``value`` if it is a tensor; the error says which shape is expected."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` should be a tensor{shape and f' {shape}'}, but got {type(value).__name__}.")
    return value


def real_tensor(name: str, value: Any, *, precise: bool = False) -> Tensor:
    """Return ``value`` if it is a real tensor; with ``precise``, one of float32 or float64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` should be a tensor, but got {type(value).__name__}. Convert it with torch.as_tensor.")
    if value.dtype not in (torch.float32, torch.float64) and (precise or value.is_complex()):
        raise TypeError(f"`{name}` should be float32 or float64, but is {value.dtype}. Convert it first.")
    return value


def floating_tensor(name: str, value: Any) -> Tensor:
    """Return ``value`` if it is a tensor of floating point numbers."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"`{name}` should be a floating tensor, but got {kind}.")
    return value


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. The sum tells without a temporary, unless it overflows."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def checksum(values: Iterable[Any]) -> float:
    """A number that is the same for the same numbers and tensors, and almost surely another for others."""
    total = 0.0
    for number, value in enumerate(values, start=1):
        if isinstance(value, Tensor) and value.numel():
            flat = torch.view_as_real(value.detach()) if value.is_complex() else value.detach().nan_to_num()
            flat = flat.double().reshape(-1)
            places = torch.arange(1, len(flat) + 1, dtype=torch.float64, device=flat.device)
            total += number * (float(flat @ torch.cos(places)) + 1e-3 * len(flat))
        elif isinstance(value, int | float) and math.isfinite(value):
            total += number * math.cos(number) * float(value)
    return total
