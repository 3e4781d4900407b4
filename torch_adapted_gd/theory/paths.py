"""Paths of outputs to follow (3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

OutputPath = Callable[[Tensor], Tensor]


class LinearPath:
    """x(s) = (1−s) x₀ + s y, the straight line in output space (2.51).

    Args:
        start: x₀, ``[N, ...]``: the network's outputs.
        target: y, of the same shape.

    Raises:
        ValueError: The shapes differ.
    """

    def __init__(self, start: Tensor, target: Tensor) -> None:
        if start.shape != target.shape:
            raise ValueError(
                f"`start` and `target` should have one shape, but got {list(start.shape)} and {list(target.shape)}."
            )
        with torch.inference_mode(False):  # autograd refuses inference tensors, but not their copies
            self.start, self.target = start.detach().clone().double(), target.detach().clone().double()

    def __call__(self, s: Tensor) -> Tensor:
        """The outputs at s."""
        return self.start + s * (self.target - self.start)


class DetourPath(LinearPath):
    """x(s) = (1−s) x₀ + s y + sin(πs) b, a bent path to the same end.

    Args:
        start: x₀, ``[N, ...]``: the network's outputs.
        target: y, of the same shape.
        bend: b, the distance from the line at s = 1/2, of a shape that can be expanded to x₀'s.

    Raises:
        ValueError: The shapes differ, or do not fit.
    """

    def __init__(self, start: Tensor, target: Tensor, bend: Tensor) -> None:
        super().__init__(start, target)
        try:
            with torch.inference_mode(False):
                self.bend = bend.detach().clone().to(self.start).expand_as(self.start)
        except RuntimeError as error:
            fitting = f"`bend` should fit outputs of shape {list(start.shape)}, but has shape {list(bend.shape)}."
            raise ValueError(fitting) from error

    def __call__(self, s: Tensor) -> Tensor:
        """The outputs at s."""
        return super().__call__(s) + torch.sin(math.pi * s) * self.bend


def motion(path: OutputPath, at: float, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Place x(s) and velocity ∂_s x(s) at s = ``at``, flat and float64, for outputs of a shape."""

    def checked(s: Tensor) -> Tensor:
        place = path(s)
        if not isinstance(place, Tensor) or tuple(place.shape) != shape:
            found = list(place.shape) if isinstance(place, Tensor) else type(place).__name__
            raise ValueError(f"`path` should give outputs of shape {list(shape)}, but gave {found}.")
        return place

    with torch.inference_mode(False):
        place, velocity = torch.autograd.functional.jvp(checked, torch.tensor(at, dtype=torch.float64))
    return place.flatten().double(), velocity.flatten().double()
