"""Weight norm, W = g v/|v| for each row of W: the Jacobian by v and g in factors.

With u = v/|v| and c = g/|v|, D_v = D_W c(1 − uuᵀ) and D_g = D_W u. With P = cD_W, a layer's Jacobian whose left factor is
multiplied by c, and S = Pu, one number for each row of W, D_v = P − Suᵀ. Because |u| = 1, D_vD_vᵀ = PPᵀ − SSᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..tracking.tape import Source
from .products import OuterProducts


@dataclass(frozen=True)
class Directions:
    """The part −Suᵀ of the Jacobian by a parameter v, with u ``[rows, entries]`` in float64."""

    name: str
    unit: Tensor = field(compare=False)

    def spread(self, vector: Tensor) -> Tensor:
        """−u times a number for each row, flat."""
        return (vector[..., None] * -self.unit.to(vector.dtype)).flatten(-2)

    def gather(self, vector: Tensor) -> Tensor:
        """−u·v for each row of a flat v."""
        return -(vector.view_as(self.unit) * self.unit).sum(1)


def lengths_and_directions(source: Source) -> tuple[str, str] | None:
    """The names of v and g if `torch.nn.utils.parametrizations.weight_norm` computed it from these parameters; else None."""
    note = source.note
    if note is None or source.view is not None or note.function is not torch._weight_norm or note.kwargs:
        return None
    names = [note.sources[place].name if place in note.sources else None for place in (0, 1)]
    if names[0] is None or names[1] is None or (note.args[2] if len(note.args) > 2 else 0) != 0:
        return None
    return names[0], names[1]


def in_factors(
    names: tuple[str, str], term: OuterProducts, parameters: dict[str, Tensor]
) -> list[tuple[str | Directions, Tensor | OuterProducts]]:
    """The Jacobians by v and g, with these names, from the one by W, which is not flipped."""
    v, g = (parameters[name].detach().double() for name in names)
    v = v.flatten(1)
    length = torch.linalg.vector_norm(v, dim=1)
    unit = v / length[:, None]
    n, q, groups, o, _ = term.left.shape
    scale = (g.reshape(-1) / length).view(groups, o, 1)
    scaled = OuterProducts(term.left * scale.to(term.left.dtype), term.right)
    image = term.image(unit.reshape(-1))[:, None]  # [N, 1, G, O, T]

    def along(left: Tensor) -> Tensor:  # in float64, because P and S cancel in PPᵀ − SSᵀ
        return (left.double() * image).sum(4).view(n, q, -1)

    return [(names[0], scaled), (Directions(names[0], unit), along(scaled.left)), (names[1], along(term.left))]
