"""D held as a matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .gram import ROWS_ELEMENTS, add_products, gram, product, spans, transpose_product
from .local import LocalJacobian
from .operator import Components, Factors, ParameterVector


class DenseJacobian(LocalJacobian):
    """D held as a matrix.

    Args:
        matrix: D ``[R, K]``, the rows of one call after the other.
        shapes: N and Q of each call.
        numels: Entries of each parameter, by name, in the order of the columns.
        description: How D was computed, for the report.
        remark: A warning for the user about that, or None.
    """

    def __init__(
        self,
        matrix: Tensor,
        shapes: list[tuple[int, int]],
        numels: dict[str, int],
        description: str,
        remark: str | None = None,
    ) -> None:
        self.matrix, self.shapes, self.numels, self.device = matrix, shapes, numels, matrix.device
        self.description, self.remark = description, remark
        self._spans = spans([n * q for n, q in shapes])

    def mv(self, v: ParameterVector) -> Tensor:
        return product(self.matrix, self.flat(v))

    def rmv(self, u: Tensor) -> ParameterVector:
        return self.parts(transpose_product(self.matrix, u))

    def gram(self, dtype: torch.dtype = torch.float64) -> Tensor:  # noqa: ARG002
        """See `Jacobian`; in float64."""
        return gram(self.matrix)

    def cross(self, dtype: torch.dtype = torch.float64) -> Tensor:  # noqa: ARG002
        """See `LocalJacobian`; in float64."""
        return gram(*(self.matrix[rows] for rows in self._spans))

    def rows(self, limit: int = ROWS_ELEMENTS) -> Iterator[Tensor]:
        for span, (_, q) in zip(self._spans, self.shapes, strict=True):
            yield from self.matrix[span].split(q * max(1, limit // max(1, q * self.shape[1])))

    def sample_blocks(self) -> list[Tensor]:
        found = []
        for number, (n, q) in enumerate(self.shapes):
            rows = self._of_call(number)
            found.append(torch.zeros(n, q, q, dtype=torch.float64, device=self.device))
            add_products(found[-1], rows, rows)
        return found

    def factors(self) -> Iterator[Factors]:
        for number, (n, q) in enumerate(self.shapes):
            yield Factors(self._spans[number].start, n, q, range(q), self._components(self._of_call(number)))

    def combined(self, number: int, rotation: Tensor) -> Components:
        return self._components(torch.bmm(rotation.to(self.matrix.dtype).transpose(1, 2), self._of_call(number)))

    def combinations_at_once(self) -> int:
        """See `LocalJacobian`. A combination takes N rows of D."""
        return max(1, ROWS_ELEMENTS // max(1, self.shape[1] * sum(n for n, _ in self.shapes)))

    def _of_call(self, number: int) -> Tensor:
        """The rows of a call, ``[N, Q, K]``."""
        return self.matrix[self._spans[number]].view(*self.shapes[number], -1)

    def _components(self, rows: Tensor) -> Components:
        parts = rows.split(list(self.numels.values()), 2)
        return [({name}, {name: [part]}) for name, part in zip(self.numels, parts, strict=True)]
