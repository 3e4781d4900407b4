"""D as a linear operator: what solvers and steps need of it, whatever it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tracking.tape import View
from .gram import ROWS_ELEMENTS, parameter_gram
from .normed import Directions
from .products import OuterProducts

Parts = dict[str, Tensor]  # a vector over all parameters: by name, flat
# A parameter's name, with a view of it if it is used in parts, or what it has along its own rows.
Part = str | tuple[str, View] | Directions
Terms = dict[Part, list[Tensor | OuterProducts]]  # one for each use
Components = list[tuple[set[str], Terms]]  # the terms of parameters that have uses in common, with these parameters' names


@dataclass
class Rows:
    """Some outputs of each sample of one call: the rows (n, q) of D with q in ``outputs``.

    Attributes:
        start: The row of D at which the call's begin.
        n: N, the samples of the call.
        q: Q, the outputs of each.
        outputs: Those that are meant.
    """

    start: int
    n: int
    q: int
    outputs: range

    @property
    def whole(self) -> bool:
        """Whether it has all outputs."""
        return len(self.outputs) == self.q

    def of(self, u: Tensor) -> Tensor:
        """Its part of the rows of a vector or matrix, ``[N, len(outputs), ...]``."""
        by_sample: Tensor = u[self.start : self.start + self.n * self.q].unflatten(0, (self.n, self.q))
        return by_sample[:, self.outputs.start : self.outputs.stop]


@dataclass
class Factors(Rows):
    """What rows of D are made of, apart from where that came from.

    Attributes:
        components: The terms.
    """

    components: Components


class Jacobian(ABC):
    """D = ∂x/∂θ of the outputs of one or more calls, ``[R, K]``; rows are stacked by call, each sample-major (2.9).

    Attributes:
        shapes: N and Q of each call.
        numels: Entries of each parameter, by name, in the order of the columns.
        device: Where it is.
        description: How it came about, for the report.
        remark: What the user should be told of that, or None.
    """

    shapes: list[tuple[int, int]]
    numels: dict[str, int]
    device: torch.device
    description: str
    remark: str | None

    @property
    def shape(self) -> tuple[int, int]:
        """R and K."""
        return sum(n * q for n, q in self.shapes), sum(self.numels.values())

    @abstractmethod
    def mv(self, v: Parts) -> Tensor:
        """Dv in float64, ``[R]``, for v in float64."""

    @abstractmethod
    def rmv(self, u: Tensor) -> Parts:
        """Dᵀu in the dtype of u ``[R]``: in float64, unless rounding of float32 does not matter."""

    @abstractmethod
    def gram(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Θ = DDᵀ, ``[R, R]``, formed in ``dtype``."""

    @abstractmethod
    def cross(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The block of Θ between the first call's rows and the second's, ``[R1, R2]``."""

    @abstractmethod
    def rows(self, limit: int) -> Iterator[Tensor]:
        """D in blocks of whole samples and at most ``limit`` entries, or one sample."""

    @abstractmethod
    def sample_blocks(self) -> list[Tensor]:
        """Θ(x_n, x_n) of all samples of each call, ``[N, Q, Q]`` in float64."""

    @abstractmethod
    def output_blocks(self, rotations: Sequence[Tensor], numbers: Sequence[int], out: Tensor) -> None:
        """Blocks of Θ between all samples for single combinations v_c of their outputs: v_cᵀΘv_c for each c.

        Args:
            rotations: The weights v_c of a sample's outputs, ``[N_i, Q, C]`` for each of some calls.
            numbers: Which calls these are.
            out: Where to write them, ``[C, N, N]`` with N the samples of these calls, in the dtype of the arithmetic: on and
                above the diagonal, what is below is undefined.
        """

    @abstractmethod
    def factors(self) -> Iterator[Factors]:
        """What its rows are made of, for other processes to multiply theirs with."""

    @abstractmethod
    def combined(self, number: int, rotation: Tensor) -> Components:
        """The same for combinations of the outputs of each sample of one call.

        Args:
            number: Which call.
            rotation: Their weights, ``[N, Q, C]``.
        """

    def combinations_at_once(self, count: int) -> int:
        """For how many combinations of the outputs, at most ``count``, what `combined` makes may be held at a time."""
        return count

    def parameter_gram(
        self, vectors: Tensor, weigh: Callable[[Tensor, int], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, float]:
        """DᵀD, DᵀV and |D|², added up over blocks of samples, see `parameter_gram`."""
        return parameter_gram(self.rows(ROWS_ELEMENTS), self.shape[1], vectors, weigh)

    def check_products(self) -> None:  # noqa: B027
        """Hold Dᵀu for a random u against what backward passes give, where that is not what D was made by."""
