"""The loss along straight lines between two states of a network, in parameter space (4.1) and in output space (2.51)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .field import Loss, Objective
from .local import OutputMap, equal_steps


@dataclass(frozen=True)
class LineLosses:
    """The loss along two straight lines with the same ends; all float64.

    Attributes:
        t: From 0 to 1, ``[T]``.
        parameter_line: C(x((1−t) θ₀ + t θ₁)), ``[T]`` (4.1).
        output_line: C((1−t) x(θ₀) + t x(θ₁)), ``[T]``.
        parameter_outputs: x((1−t) θ₀ + t θ₁), ``[T, N, ...]``.
    """

    t: Tensor
    parameter_line: Tensor
    output_line: Tensor
    parameter_outputs: Tensor

    @property
    def monotone(self) -> bool:
        """Whether the loss never rises along the line in parameter space, the question of (4.1)."""
        return self.rise == 0.0

    @property
    def rise(self) -> float:
        """Largest height of the loss above an earlier value along the line in parameter space; 0 if it is monotone."""
        lowest = torch.cummin(self.parameter_line, dim=0).values
        return float((self.parameter_line - lowest).max())


def line_losses(
    model: nn.Module,
    x: Tensor | tuple[Any, ...],
    y_or_loss: Tensor | Loss,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    *,
    steps: int = 50,
) -> LineLosses:
    """The loss between two states of a network, along the line in parameter space (4.1) and along the line in output space.

    Args:
        model: The network; it is left as it was. Buffers and frozen parameters are its own.
        x: Input with the batch first, or a tuple of positional inputs.
        y_or_loss: Targets, for C = |x − y|²/2N (2.48), or a function from outputs to a scalar loss.
        start: θ₀ as a ``state_dict``; only trainable parameters are read.
        end: θ₁.
        steps: T; the loss is computed at T + 1 equally spaced places.

    Raises:
        TypeError: An argument has another type.
        ValueError: ``steps`` is smaller than 1, a parameter is missing, or shapes do not fit.

    Example:
        >>> model = torch.nn.Linear(2, 1).double()
        >>> start = {name: p.clone() for name, p in model.state_dict().items()}
        >>> end = {name: torch.zeros_like(p) for name, p in start.items()}
        >>> x, y = torch.eye(2).double(), torch.zeros(2, 1)
        >>> found = line_losses(model, x, y, start, end)  # linear in θ: both lines agree
        >>> found.monotone, torch.allclose(found.parameter_line, found.output_line)
        (True, True)
    """
    network = OutputMap(model, x)
    objective = Objective.of(y_or_loss, network)
    first, last = network.read("start", start), network.read("end", end)
    t = equal_steps(1.0, steps)
    with network.borrowed():
        outputs = torch.stack([network.outputs(torch.lerp(first, last, float(at))) for at in t])
    line = torch.stack([torch.lerp(outputs[0], outputs[-1], float(at)) for at in t])
    return LineLosses(
        t=t,
        parameter_line=torch.tensor([objective.value(x) for x in outputs], dtype=torch.float64),
        output_line=torch.tensor([objective.value(x) for x in line], dtype=torch.float64),
        parameter_outputs=outputs.reshape(-1, *network.shape),
    )
