"""Weights in lengths and directions, W = g v/|v| for each row: their Jacobian by v and g in factors.

With u = v/|v| and c = g/|v|, D_v = D_W c(1 − uuᵀ) and D_g = D_W u. So D_v is a layer's Jacobian P, with its left factor times
c, less what of it is along u: S = Pu, a number for each row of the matrix. As u has length 1, D_vD_vᵀ = PPᵀ − SSᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..tracking.tape import Source
from .products import OuterProducts


@dataclass(frozen=True)
class Directions:
    """What a parameter v has along its own rows, less than a layer's matrix in its place would have.

    Attributes:
        name: The parameter.
        unit: u ``[rows, entries]`` in float64.
    """

    name: str
    unit: Tensor = field(compare=False)

    def spread(self, vector: Tensor) -> Tensor:
        """−u times a number for each row, flat."""
        return (vector[..., None] * -self.unit.to(vector.dtype)).flatten(-2)

    def gather(self, vector: Tensor) -> Tensor:
        """−u·v for each row of a flat v."""
        return -(vector.view_as(self.unit) * self.unit).sum(1)


def lengths_and_directions(source: Source) -> tuple[str, str] | None:
    """The names of v and g if it is computed from both, each a parameter, by `torch.nn.utils.parametrizations.weight_norm`."""
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
    """The Jacobian by W as those by v and g.

    Args:
        names: Those of v and g.
        term: By W, not flipped.
        parameters: θ by name.
    """
    v, g = (parameters[name].detach().double() for name in names)
    v = v.flatten(1)
    length = torch.linalg.vector_norm(v, dim=1)
    unit = v / length[:, None]
    n, q, groups, o, _ = term.left.shape
    scale = (g.reshape(-1) / length).view(groups, o, 1)
    scaled = OuterProducts(term.left * scale.to(term.left.dtype), term.right)
    image = term.image(unit.reshape(-1))[:, None]  # [N, 1, G, O, T]

    def along(left: Tensor) -> Tensor:  # in float64, as PPᵀ − SSᵀ has to be that of one matrix
        return (left.double() * image).sum(4).view(n, q, -1)

    return [(names[0], scaled), (Directions(names[0], unit), along(scaled.left)), (names[1], along(term.left))]
