"""D as a linear operator: the interface that solvers and steps use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory import require_memory
from ..tracking.tape import View
from .gram import ROWS_ELEMENTS, add_gram
from .normed import Directions
from .products import OuterProducts

ParameterVector = dict[str, Tensor]  # a vector over all parameters: by name, flat
Part = str | tuple[str, View] | Directions  # a parameter's name, a view of a parameter, or directions of weight norm
Terms = dict[Part, list[Tensor | OuterProducts]]  # one for each use
Components = list[tuple[set[str], Terms]]  # groups of parameters that have uses in common: their names and terms


@dataclass
class Rows:
    """Rows of D: some outputs of each sample of one call.

    Attributes:
        start: The first row of the call in D.
        n: N, the samples of the call.
        q: Q, the outputs of each sample.
        outputs: The outputs that are meant.
    """

    start: int
    n: int
    q: int
    outputs: range

    @property
    def whole(self) -> bool:
        """Whether all outputs are meant."""
        return len(self.outputs) == self.q

    def of(self, u: Tensor) -> Tensor:
        """These rows of a vector or matrix, ``[N, len(outputs), ...]``."""
        by_sample: Tensor = u[self.start : self.start + self.n * self.q].unflatten(0, (self.n, self.q))
        return by_sample[:, self.outputs.start : self.outputs.stop]


@dataclass
class Factors(Rows):
    """Rows of D, with the terms that they are sums of."""

    components: Components


class Jacobian(ABC):
    """D = ∂x/∂θ of the outputs of one or more calls, ``[R, K]``; rows are stacked by call, each sample-major (2.9).

    Attributes:
        shapes: N and Q of each call.
        numels: Entries of each parameter, by name, in the order of the columns.
        device: The device of D.
        description: How D is computed, for the report.
        remark: A warning for the user about that, or None.
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

    def flat(self, parts: ParameterVector) -> Tensor:
        """A vector over all parameters as one tensor, ``[K]``."""
        return torch.cat([parts[name] for name in self.numels])

    def parts(self, vector: Tensor) -> ParameterVector:
        """A vector ``[K]`` over all parameters by name."""
        return dict(zip(self.numels, vector.split(list(self.numels.values())), strict=True))

    @abstractmethod
    def mv(self, v: ParameterVector) -> Tensor:
        """Dv in float64, ``[R]``, for v in float64."""

    @abstractmethod
    def rmv(self, u: Tensor) -> ParameterVector:
        """Dᵀu in the dtype of u ``[R]``: float64, unless float32 is precise enough."""

    @abstractmethod
    def gram(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Θ = DDᵀ, ``[R, R]``, computed in ``dtype``."""

    @abstractmethod
    def rows(self, limit: int) -> Iterator[Tensor]:
        """D in blocks of whole samples; a block has at most ``limit`` entries, or one sample."""

    @abstractmethod
    def sample_blocks(self) -> list[Tensor]:
        """Θ(x_n, x_n) of all samples of each call, ``[N, Q, Q]`` in float64."""

    @abstractmethod
    def output_blocks(self, rotations: Sequence[Tensor], numbers: Sequence[int], out: Tensor) -> None:
        """The blocks v_cᵀΘv_c of Θ between all samples, for linear combinations v_c of a sample's outputs.

        Args:
            rotations: The weights v_c of a sample's outputs, ``[N_i, Q, C]`` for each of some calls.
            numbers: The numbers of these calls.
            out: Receives the blocks, ``[C, N, N]`` with N the samples of these calls. They are computed in its dtype. Entries
                below the diagonal are undefined.
        """

    def parameter_gram(
        self, vectors: Tensor, weigh: Callable[[Tensor, int], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, float]:
        """DᵀD ``[K, K]``, DᵀV ``[K, v]`` and |D|² in float64, summed over blocks of samples, so that D is never held.

        Args:
            vectors: V, ``[R, v]`` in float64.
            weigh: Makes SᵀD of rows of D and the number of the first. With it, the first result is DᵀSSᵀD.
        """
        size = self.shape[1]
        require_memory(
            2 * 8 * size**2,
            vectors.device,
            f"DᵀD of {size:,} parameters",
            'Use solver=Dense(space="sample"), or a smaller batch, which will choose it.',
        )
        total = torch.zeros(size, size, dtype=torch.float64, device=vectors.device)
        products = vectors.new_zeros(size, vectors.shape[1])
        start, square = 0, 0.0
        for block in self.rows(ROWS_ELEMENTS):
            rows = block.double()
            products.addmm_(rows.T, vectors[start : start + len(rows)])
            add_gram(total, (rows if weigh is None else weigh(rows, start)).T)
            square += float(rows.square().sum())
            start += len(rows)
        return total.triu_().add_(total.triu(1).T), products, square

    def check_products(self) -> None:  # noqa: B027
        """Compare Dᵀu for a random u with backward passes, unless D itself comes from backward passes."""
