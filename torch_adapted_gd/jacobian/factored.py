"""D in factors, from the rules of the uses of parameters: Θ, Dᵀu and Dv without holding D."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..memory import available_bytes
from ..tracking.calls import without_autocast
from ..world import ALONE, World
from .blocks import SortedTerms, between, fill_block
from .chunks import Chunk, agreed, views_in
from .diagonal import combined, sample_blocks
from .gram import ROWS_ELEMENTS, new_kernel, norm, product, ranges, spans, transpose_product
from .linearized import Linearized
from .local import LocalJacobian
from .normed import Directions
from .operator import Components, Factors, ParameterVector, Rows
from .uses import Use

_MANY_ENTRIES = 2**26  # with more entries, rows by weights that are computed from parameters take seconds
_CHUNK_BYTES = 2**29  # memory for B, even if Θ is smaller


@dataclass(frozen=True)
class Piece:
    """Some outputs of a call: ``linearized``, and the number of the first among the call's Q outputs.

    ``held`` has the uses with B for all of them; it is None while their graph is alive.
    """

    linearized: Linearized
    first: int = 0
    held: list[Use] | None = None


def budget_of(rows: int, device: torch.device) -> int:
    """Bytes that B and tensors of its size may take, for R rows in all."""
    free = available_bytes(device) if 8 * rows**2 > _CHUNK_BYTES else None  # Θ may not be formed
    return max(_CHUNK_BYTES, 8 * rows**2 if free is None else min(8 * rows**2, free // 4))


class FactoredJacobian(LocalJacobian):
    """D in factors.

    Args:
        calls: The pieces of each call.
        parameters: θ by name.
        dtype: The parameters' dtype.
        chunk_size: See `ntk`.
        world: The processes that have other rows of D.
    """

    def __init__(
        self,
        calls: list[list[Piece]],
        parameters: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        chunk_size: int | None = None,
        world: World = ALONE,
    ) -> None:
        self._calls, self._dtype = calls, dtype
        self.numels = {name: p.numel() for name, p in parameters.items()}
        self.shapes = [(pieces[0].linearized.n, sum(piece.linearized.q for piece in pieces)) for pieces in calls]
        self.device = calls[0][0].linearized.device
        self._pieces = [piece.linearized for pieces in calls for piece in pieces]
        self._budget = budget_of(self.shape[0], self.device)
        self._ways = agreed(world, views_in(self._pieces, self.numels), self.numels)
        self._parameters = dict(parameters)
        self._chunks = list(self._planned(chunk_size))
        if len(self._chunks) == len(self._pieces):
            for chunk in self._chunks:
                if chunk.held is None:
                    chunk.held = chunk.uses()
                chunk.piece.release()

    @property
    def unsupported(self) -> dict[str, str]:
        """Parameters whose Jacobian comes from rows of D, and the reason."""
        return {name: why for piece in self._pieces for name, why in piece.unsupported.items() if name in self.numels}

    @property
    def remarks(self) -> list[str]:
        """The reasons that the user should know."""
        return list(dict.fromkeys(remark for piece in self._pieces for remark in piece.remarks))

    @property
    def remark(self) -> str | None:  # type: ignore[override]
        """A warning for the user, or None."""
        if not self.remarks:
            return self._remark_on_computed_weights()
        why = "; ".join(self.remarks[:3]) + (f"; and {len(self.remarks) - 3} more" if len(self.remarks) > 3 else "")
        return (
            f"Rows of the output Jacobian are taken for {len(self.unsupported)} of {len(self.numels)} parameters: {why}. This "
            "is exact, but needs a backward pass per output and more memory. BatchNorm in training mode and all that mixes "
            'the samples of a batch needs it. To choose it without this warning, use solver=Dense(kernel="jacobian").'
        )

    def _remark_on_computed_weights(self) -> str | None:
        """A warning about weights that are computed from parameters, if their rows are many."""
        names: set[str] = set()
        entries = 0
        for piece in self._pieces:
            sources = [source for use in piece.uses for source in use.sources.values()]
            derived = {id(s): s for s in sources if s.name is None and s.view is None}
            computed = {key: s for key, s in derived.items() if any(self._ways.get(name) != "normed" for name in s.names)}
            names |= {name for source in computed.values() for name in source.names}
            entries += piece.n * piece.q * sum(source.tensor.numel() for source in computed.values())
        if entries <= _MANY_ENTRIES:
            return None
        some = ", ".join(map(repr, sorted(names)[:2]))
        return (
            f"{entries:,} entries of the output Jacobian are written out, because weights are computed from parameters "
            f"({some}, {len(names)} in all). This is exact but slow. Train the weights themselves "
            "(torch.nn.utils.parametrize.remove_parametrizations makes them from a parametrization), or use a smaller batch."
        )

    @property
    def description(self) -> str:  # type: ignore[override]
        """How D is computed, for the report."""
        left = len(self.unsupported)
        if not left:
            return "structured"
        if left == len(self.numels):
            return "jacobian (rows)" if self.remarks else "jacobian (columns)"
        return f"structured, and {left} of {len(self.numels)} parameters by jacobian ({'rows' if self.remarks else 'columns'})"

    def chunks_of(self, number: int) -> list[Chunk]:
        """The chunks of one of the calls."""
        return [chunk for chunk in self._chunks if chunk.number == number]

    def combinations_at_once(self) -> int:
        if all(chunk.held is not None for chunk in self._chunks):
            return sys.maxsize
        entries = sum(2 * piece.elements for piece in self._pieces)
        return max(1, self._budget // max(1, self._dtype.itemsize * entries))

    def check_products(self) -> None:
        self._check_probe(self.rmv(self._probe()))

    def gram(self, dtype: torch.dtype = torch.float64) -> Tensor:
        size = self.shape[0]
        theta = new_kernel(size, size, self.device, dtype)
        with self._computing():
            for i, first in enumerate(self._chunks):
                fill(theta, first, first, [parts for _, parts in first.sorted()])
                rows = first.factors() if i + 1 < len(self._chunks) else None
                for second in self._chunks[i + 1 :]:
                    assert rows is not None
                    fill(theta, first, second, between(rows, second.factors()))
                    view(theta, second, first).copy_(view(theta, first, second).permute(2, 3, 0, 1))
            probe = self._probe().to(dtype)
            self._check(float(probe @ (theta @ probe)), range(len(self._calls)), range(len(self._calls)), dtype)
        return theta

    def cross(self, dtype: torch.dtype = torch.float64) -> Tensor:
        rows, others = (n * q for n, q in self.shapes)
        theta = new_kernel(rows, others, self.device, dtype)
        with self._computing():
            for first in self.chunks_of(0):
                factors = first.factors()
                for second in self.chunks_of(1):
                    columns = replace(second.factors(), start=second.start - rows)
                    fill(theta, first, columns, between(factors, columns))
            probe = self._probe().to(dtype)
            self._check(float(probe[:rows] @ (theta @ probe[rows:])), range(1), range(1, 2), dtype)
        return theta

    def rmv(self, u: Tensor) -> ParameterVector:
        """Dᵀu from the same factors as Θ.

        A backward pass with u is the same in exact arithmetic. But for ψ = Θ⁻¹g its rounding error in float32 is |D||ψ|ε, which
        can be as large as Dᵀψ if D is ill-conditioned. The factors are those of a matrix close to D, and Θ is the Gram matrix
        of this same matrix to the precision of float64. So rounding costs κ(D)ε and not κ(D)²ε.
        """
        totals: ParameterVector = {}
        with self._computing():
            for chunk in self._chunks:
                part = chunk.of(u)
                for _, parts in chunk.sorted():
                    for key, (jacobian, _) in parts.written.items():
                        chunk.scatter(key, transpose_product(jacobian.flatten(0, 1), part.reshape(-1)), totals)
                    for keys, shared in parts.shared_left:
                        for key, vector in zip(keys, shared.weighted_sums(part), strict=True):
                            chunk.scatter(key, vector, totals)
        return {name: totals[name] if name in totals else u.new_zeros(numel) for name, numel in self.numels.items()}

    def mv(self, v: ParameterVector) -> Tensor:
        """Dv from the same factors as Θ."""
        total = torch.zeros(self.shape[0], dtype=torch.float64, device=self.device)
        with self._computing():
            for chunk in self._chunks:
                part = chunk.of(total)
                for _, parts in chunk.sorted():
                    for key, (jacobian, _) in parts.written.items():
                        part += product(jacobian.flatten(0, 1), chunk.gather(key, v)).view_as(part)
                    for keys, shared in parts.shared_left:
                        part += shared.product([chunk.gather(key, v) for key in keys])
        return total

    def rows(self, limit: int = ROWS_ELEMENTS) -> Iterator[Tensor]:
        columns = dict(zip(self.numels, spans(list(self.numels.values())), strict=True))
        size = self.shape[1]
        found = torch.zeros(size, dtype=torch.float64, device=self.device)
        probe, start = self._probe(), 0
        for number, (n, q) in enumerate(self.shapes):
            for samples in ranges(n, q * size, limit):
                block = torch.zeros(samples.stop - samples.start, q, size, dtype=torch.float64, device=self.device)
                with self._computing():
                    for chunk in self.chunks_of(number):
                        part = block[:, chunk.outputs.start : chunk.outputs.stop]
                        for _, parts in chunk.sorted():
                            for key, jacobian in parts.rows(samples):
                                name, index = chunk.place(key, self.device)
                                if isinstance(key, Directions):
                                    part[..., columns[name]] += key.spread(jacobian)
                                elif index is None:
                                    part[..., columns[name]] += jacobian
                                else:
                                    part[..., columns[name].start + index] = jacobian
                rows = block.flatten(0, 1)
                found.addmv_(rows.T, probe[start + samples.start * q : start + samples.stop * q])
                yield rows
            start += n * q
        self._check_probe({name: found[part] for name, part in columns.items()})

    def sample_blocks(self) -> list[Tensor]:
        with self._computing():
            return [sample_blocks(self.chunks_of(number), n, q, self.device) for number, (n, q) in enumerate(self.shapes)]

    def factors(self) -> Iterator[Factors]:
        yield from (chunk.factors() for chunk in self._chunks)

    def combined(self, number: int, rotation: Tensor) -> Components:
        return combined(self.chunks_of(number), rotation)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Context for products: without a graph and without autocast."""
        with torch.no_grad(), without_autocast(self.device.type):
            yield

    def _probe(self) -> Tensor:
        """The random u of all rows, ``[R]``."""
        of_calls = [
            torch.cat([piece.linearized.probe.view(piece.linearized.n, -1) for piece in pieces], 1) for pieces in self._calls
        ]
        return torch.cat([u.reshape(-1) for u in of_calls])

    def _probe_product(self, numbers: range) -> ParameterVector:
        """Dᵀu by backward passes, of the rows of some calls."""
        totals: ParameterVector = {}
        for number in numbers:
            for piece in self._calls[number]:
                for name, tensor in piece.linearized.probe_product.items():
                    if name in self.numels:
                        totals[name] = totals[name] + tensor if name in totals else tensor
        return totals

    def _check_probe(self, found: ParameterVector) -> None:
        """Compare Dᵀu for the random u with backward passes."""
        u = self._probe_product(range(len(self._calls)))
        apart = norm({name: part - u[name].reshape(-1) if name in u else part for name, part in found.items()})
        self._check_close("Dᵀu", apart, norm(u), torch.float64)

    def _check(self, value: float, first: range, second: range, dtype: torch.dtype) -> None:
        """Compare uᵀΘv for random u and v with ⟨Dᵀu, Dᵀv⟩ from backward passes."""
        u = self._probe_product(first)
        v = u if second == first else self._probe_product(second)
        size = norm(u) * norm(v)
        expected = size if v is u else sum(float(u[name].reshape(-1) @ v[name].reshape(-1)) for name in u.keys() & v.keys())
        self._check_close("uᵀΘv", abs(value - expected), size, dtype)

    def _check_close(self, what: str, apart: float, size: float, dtype: torch.dtype) -> None:
        if apart > min(1e3 * self._precision(dtype), 0.05) * size:  # the solver reports what is not finite
            raise RuntimeError(
                f"{what} differs by {apart:.3g} for random u and v from that of backward passes, whose size is {size:.3g}: a "
                "rule of AdaptedGD, or one that you registered, is wrong. Take rows of the Jacobian instead, by "
                'ntk(method="jacobian") or solver=Dense(kernel="jacobian").'
            )

    def _precision(self, dtype: torch.dtype) -> float:
        """Machine epsilon of the coarsest arithmetic in the products, the last of which is in ``dtype``."""
        return max(torch.finfo(dtype).eps, *(piece.eps for piece in self._pieces))

    def _planned(self, chunk_size: int | None) -> Iterator[Chunk]:
        """The outputs in as few chunks as memory allows; a ``chunk_size`` counts samples' worth of rows."""
        costs = [max(1, self._dtype.itemsize * 2 * piece.elements) for piece in self._pieces]  # of one output
        at_once = sum(cost * piece.q for cost, piece in zip(costs, self._pieces, strict=True)) <= self._budget
        start, cost_of = 0, iter(costs)
        for number, (pieces, (n, q)) in enumerate(zip(self._calls, self.shapes, strict=True)):
            for piece in pieces:
                whole, cost = range(piece.first, piece.first + piece.linearized.q), next(cost_of)
                if piece.held is not None or (at_once and chunk_size is None):
                    step = max(1, len(whole))
                elif chunk_size is not None:
                    step = max(1, chunk_size * q // max(1, n))
                else:
                    step = max(1, self._budget // (2 * cost))
                for first in range(whole.start, whole.stop, step):
                    yield Chunk(
                        start=start,
                        n=n,
                        q=q,
                        outputs=range(first, min(first + step, whole.stop)),
                        piece=piece.linearized,
                        number=number,
                        first=piece.first,
                        ways=self._ways,
                        parameters=self._parameters,
                        budget=self._budget // 2,
                        held=piece.held,
                    )
            start += n * q


def fill(theta: Tensor, first: Rows, second: Rows, components: Iterable[SortedTerms]) -> None:
    """Write the block of Θ between two sets of rows; for a symmetric block they are the same object.

    ``components`` are the sorted terms of the block.
    """
    target_view = view(theta, first, second)  # [N, Q, M, R]
    n, q, m, r = target_view.shape
    whole = first.whole and second.whole
    target = target_view.flatten(2).flatten(0, 1) if whole else theta.new_empty(n * q, m * r)
    fill_block(target, (n, q, m, r), first is second, components)
    if not whole:
        target_view.copy_(target.view(n, q, m, r))


def view(theta: Tensor, first: Rows, second: Rows) -> Tensor:
    """The block of Θ between two sets of rows, ``[N, outputs, M, outputs]``."""
    m, r = second.n, second.q
    columns = first.of(theta[:, second.start : second.start + m * r]).unflatten(2, (m, r))
    found: Tensor = columns[..., second.outputs.start : second.outputs.stop]
    return found
