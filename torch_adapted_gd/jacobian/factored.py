"""D as what the rules make of the uses of parameters: Θ, Dᵀu and Dv without D ever being held."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory import available_bytes
from ..tracking.calls import without_autocast
from ..tracking.tape import Source
from ..world import ALONE, World
from .blocks import KernelBlock, between
from .blocks import Parts as Sorted
from .chunks import Chunk, agreed, views_in
from .diagonal import combined, sample_blocks
from .gram import ROWS_ELEMENTS, new_kernel, norm, product, transpose_product
from .linearized import Linearized
from .local import LocalJacobian
from .normed import Directions
from .operator import Components, Factors, Parts, Rows
from .uses import Use

_MANY_ENTRIES = 2**26  # of rows by weights that are computed from parameters: they take seconds
_CHUNK_BYTES = 2**29  # what B and its like may take even where Θ is smaller


class MismatchError(RuntimeError):
    """What the factors make of D is not what backward passes give."""


@dataclass(frozen=True)
class Piece:
    """Some outputs of a call.

    Attributes:
        linearized: What they are linearized by.
        first: The first of them among the call's Q outputs.
        held: The uses with B for all of them; None where their graph is alive.
    """

    linearized: Linearized
    first: int = 0
    held: list[Use] | None = None


def budget_of(rows: int, device: torch.device) -> int:
    """Bytes that B and what is made of it may take, for R rows in all."""
    free = available_bytes(device) if 8 * rows**2 > _CHUNK_BYTES else None  # Θ may never be formed
    return max(_CHUNK_BYTES, 8 * rows**2 if free is None else min(8 * rows**2, free // 4))


class FactoredJacobian(LocalJacobian):
    """D in factors.

    Args:
        calls: The pieces of each call.
        parameters: θ by name.
        dtype: The parameters'.
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
    def unserved(self) -> dict[str, str]:
        """Parameters that are served by rows of D, and why."""
        return {name: why for piece in self._pieces for name, why in piece.unserved.items() if name in self.numels}

    @property
    def remarks(self) -> list[str]:
        """What the user should know of these."""
        return list(dict.fromkeys(remark for piece in self._pieces for remark in piece.remarks))

    @property
    def remark(self) -> str | None:  # type: ignore[override]
        """What the user should be told of, or None."""
        if not self.remarks:
            return self._remark_on_computed_weights()
        why = "; ".join(self.remarks[:3]) + (f"; and {len(self.remarks) - 3} more" if len(self.remarks) > 3 else "")
        return (
            f"Rows of the output Jacobian are taken for {len(self.unserved)} of {len(self.numels)} parameters: {why}. This is "
            "exact but slower and larger: a backward pass per output. BatchNorm in training mode and all else that mixes a "
            'batch need it. If that is intended, choose solver=Dense(kernel="jacobian"), which does not warn.'
        )

    def _remark_on_computed_weights(self) -> str | None:
        """What to say of weights that are functions of parameters, if their rows are many."""
        names: set[str] = set()
        entries = 0
        for piece in self._pieces:
            sources = [source for use in piece.uses for source in use.sources.values()]
            computed = {id(s): s for s in sources if s.name is None and s.view is None and self._pulls_back(s)}
            names |= {name for source in computed.values() for name in source.names}
            entries += piece.n * piece.q * sum(source.tensor.numel() for source in computed.values())
        if entries <= _MANY_ENTRIES:
            return None
        some = ", ".join(map(repr, sorted(names)[:2]))
        return (
            f"{entries:,} entries of the output Jacobian are written out, as weights are computed from parameters ({some}, "
            f"{len(names)} in all) and their rows have to be pulled back to these. This is exact but slow. Train the weights "
            "themselves (torch.nn.utils.parametrize.remove_parametrizations makes them from a parametrization), or use a "
            "smaller batch."
        )

    def _pulls_back(self, source: Source) -> bool:
        """Whether rows by something computed from parameters are pulled back to these."""
        return any(self._ways.get(name) != "normed" for name in source.names)

    @property
    def description(self) -> str:  # type: ignore[override]
        """How D comes about, for the report."""
        left = len(self.unserved)
        if not left:
            return "structured"
        if left == len(self.numels):
            return "jacobian (rows)" if self.remarks else "jacobian (columns)"
        return f"structured, and {left} of {len(self.numels)} parameters by jacobian ({'rows' if self.remarks else 'columns'})"

    def chunks_of(self, number: int) -> list[Chunk]:
        """The chunks of one of the calls."""
        return [chunk for chunk in self._chunks if chunk.number == number]

    def combinations_at_once(self) -> int:
        """See `LocalJacobian`."""
        if all(chunk.held is not None for chunk in self._chunks):
            return sys.maxsize
        entries = sum(2 * piece.elements for piece in self._pieces)
        return max(1, self._budget // max(1, self._dtype.itemsize * entries))

    def check_products(self) -> None:
        """See `Jacobian`.

        Raises:
            MismatchError: They differ.
        """
        self._check_probe(self.rmv(self._probe()))

    def gram(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """See `Jacobian`.

        Raises:
            MismatchError: uᵀΘu differs from what a backward pass gives for |Dᵀu|², u random.
        """
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
        """See `Jacobian`.

        Raises:
            MismatchError: uᵀΘv differs from what backward passes give for ⟨D₁ᵀu, D₂ᵀv⟩, u and v random.
        """
        rows, columns = (n * q for n, q in self.shapes)
        theta = new_kernel(rows, columns, self.device, dtype)
        with self._computing():
            for first in self.chunks_of(0):
                factors = first.factors()
                for second in self.chunks_of(1):
                    fill(theta, first, second, between(factors, second.factors()), columns_from=rows)
            probe = self._probe().to(dtype)
            self._check(float(probe[:rows] @ (theta @ probe[rows:])), range(1), range(1, 2), dtype)
        return theta

    def rmv(self, u: Tensor) -> Parts:
        """Dᵀu from the factors that Θ was made of.

        A backward pass with u would be the same in exact arithmetic. But for ψ = Θ⁻¹g its rounding in float32, |D||ψ|ε,
        can be of the size of Dᵀψ where D is ill-conditioned. These factors are those of a matrix near D, whose Gram matrix
        Θ is to float64's precision: so the rounding of D costs κ(D)ε, not κ(D)²ε.
        """
        totals: Parts = {}
        with self._computing():
            for chunk in self._chunks:
                part = chunk.of(u)
                for place, (names, uses) in enumerate(chunk.components(chunk.uses())):
                    parts = chunk.parts(place, names, uses)
                    for key, (jacobian, _) in parts.written.items():
                        chunk.scatter(key, transpose_product(jacobian.flatten(0, 1), part.reshape(-1)), totals)
                    for keys, family in parts.families:
                        for key, vector in zip(keys, family.weighted_sums(part), strict=True):
                            chunk.scatter(key, vector, totals)
        return {name: totals[name] if name in totals else u.new_zeros(numel) for name, numel in self.numels.items()}

    def mv(self, v: Parts) -> Tensor:
        """Dv from the factors that Θ was made of."""
        total = torch.zeros(self.shape[0], dtype=torch.float64, device=self.device)
        with self._computing():
            for chunk in self._chunks:
                part = chunk.of(total)
                for place, (names, uses) in enumerate(chunk.components(chunk.uses())):
                    parts = chunk.parts(place, names, uses)
                    for key, (jacobian, _) in parts.written.items():
                        part += product(jacobian.flatten(0, 1), chunk.gather(key, v)).view_as(part)
                    for keys, family in parts.families:
                        part += family.product([chunk.gather(key, v) for key in keys])
        return total

    def rows(self, limit: int = ROWS_ELEMENTS) -> Iterator[Tensor]:
        """See `Jacobian`; in float64.

        Raises:
            MismatchError: Dᵀu differs from what a backward pass gives, u random.
        """
        ends = dict(zip(self.numels, itertools.accumulate(self.numels.values()), strict=True))
        columns = {name: slice(end - self.numels[name], end) for name, end in ends.items()}
        size = sum(self.numels.values())
        found = torch.zeros(size, dtype=torch.float64, device=self.device)
        probe, start = self._probe(), 0
        for number, (n, q) in enumerate(self.shapes):
            step = max(1, limit // max(1, q * size))
            for first in range(0, n, step):
                samples = slice(first, min(first + step, n))
                block = torch.zeros(samples.stop - first, q, size, dtype=torch.float64, device=self.device)
                with self._computing():
                    for chunk in self.chunks_of(number):
                        part = block[:, chunk.outputs.start : chunk.outputs.stop]
                        for place, (names, uses) in enumerate(chunk.components(chunk.uses())):
                            for key, jacobian in chunk.parts(place, names, uses).rows(samples):
                                name, index = chunk.place(key, self.device)
                                if isinstance(key, Directions):
                                    part[..., columns[name]] += key.spread(jacobian)
                                elif index is None:
                                    part[..., columns[name]] += jacobian
                                else:
                                    part[..., columns[name].start + index] = jacobian
                rows = block.flatten(0, 1)
                found.addmv_(rows.T, probe[start + first * q : start + samples.stop * q])
                yield rows
            start += n * q
        self._check_probe({name: found[part] for name, part in columns.items()})

    def sample_blocks(self) -> list[Tensor]:
        """See `Jacobian`."""
        with self._computing():
            return [sample_blocks(self.chunks_of(number), n, q, self.device) for number, (n, q) in enumerate(self.shapes)]

    def factors(self) -> Iterator[Factors]:
        """See `Jacobian`."""
        yield from (chunk.factors() for chunk in self._chunks)

    def combined(self, number: int, rotation: Tensor) -> Components:
        """See `Jacobian`."""
        return combined(self.chunks_of(number), rotation)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Context for products: without a graph, and in no other dtype than they are written in."""
        with torch.no_grad(), without_autocast(self.device.type):
            yield

    def _probe(self) -> Tensor:
        """U of all rows, ``[R]``."""
        of_calls = [
            torch.cat([piece.linearized.probe.view(piece.linearized.n, -1) for piece in pieces], 1) for pieces in self._calls
        ]
        return torch.cat([u.reshape(-1) for u in of_calls])

    def _probe_product(self, numbers: range) -> Parts:
        """Dᵀu by backward passes, of the rows of some calls."""
        totals: Parts = {}
        for number in numbers:
            for piece in self._calls[number]:
                for name, tensor in piece.linearized.probe_product.items():
                    if name in self.numels:
                        totals[name] = totals[name] + tensor if name in totals else tensor
        return totals

    def _check_probe(self, found: Parts) -> None:
        """Compare Dᵀu for the probes with that of plain backward passes."""
        u = self._probe_product(range(len(self._calls)))
        apart = {name: part - u[name].reshape(-1) if name in u else part for name, part in found.items()}
        difference = norm(apart)
        if difference > min(1e3 * self._precision(torch.float64), 0.05) * norm(u):
            raise MismatchError(f"Dᵀu differs by {difference:.6g} for random u from that of backward passes, {norm(u):.6g}")

    def _check(self, value: float, first: range, second: range, dtype: torch.dtype) -> None:
        """Compare uᵀΘv for the probes with ⟨Dᵀu, Dᵀv⟩ of plain backward passes."""
        u = self._probe_product(first)
        v = u if second == first else self._probe_product(second)
        size = norm(u) * norm(v)
        eps = self._precision(dtype)
        expected = size if v is u else sum(float(u[name].reshape(-1) @ v[name].reshape(-1)) for name in u.keys() & v.keys())
        if abs(value - expected) > min(1e3 * eps, 0.05) * size:  # what is not finite is for the solution to say
            raise MismatchError(f"uᵀΘv is {value:.6g} for random u and v where backward passes give {expected:.6g}")

    def _precision(self, dtype: torch.dtype) -> float:
        """Machine epsilon of the coarsest arithmetic that products went through, ``dtype`` being the last."""
        return max(torch.finfo(dtype).eps, *(piece.eps for piece in self._pieces))

    def _planned(self, chunk_size: int | None) -> Iterator[Chunk]:
        """The outputs in as many chunks as memory asks for; the caller's ``chunk_size`` is in samples' worth of rows."""
        costs = [max(1, self._dtype.itemsize * 2 * piece.elements) for piece in self._pieces]
        at_once = sum(cost * piece.q for cost, piece in zip(costs, self._pieces, strict=True)) <= self._budget
        start, cost_of = 0, dict(zip(map(id, self._pieces), costs, strict=True))
        for number, (pieces, (n, q)) in enumerate(zip(self._calls, self.shapes, strict=True)):
            for piece in pieces:
                linearized, whole = piece.linearized, range(piece.first, piece.first + piece.linearized.q)
                if chunk_size is not None:
                    step = max(1, chunk_size * q // max(1, n))
                else:
                    step = len(whole) if at_once else max(1, self._budget // (2 * cost_of[id(linearized)]))
                if piece.held is not None:
                    step = max(1, len(whole))
                for first in range(whole.start, whole.stop, step):
                    outputs = range(first, min(first + step, whole.stop))
                    yield Chunk(
                        start,
                        n,
                        q,
                        outputs,
                        linearized,
                        number,
                        piece.first,
                        self._ways,
                        self._parameters,
                        self._budget // 2,
                        piece.held,
                    )
            start += n * q


def fill(theta: Tensor, first: Rows, second: Rows, components: Iterable[Sorted], columns_from: int = 0) -> None:
    """Write the block of Θ between two sets of rows.

    Args:
        theta: Θ, or some columns of it.
        first: The rows.
        second: The columns; the same object for a symmetric block.
        components: What is between them.
        columns_from: Which column of Θ is the first.
    """
    target_view = view(theta, first, second, columns_from)  # [N, Q, M, R]
    n, q, m, r = target_view.shape
    whole = first.whole and second.whole
    target = target_view.flatten(2).flatten(0, 1) if whole else theta.new_empty(n * q, m * r)
    block = KernelBlock(target, (n, q, m, r), first is second)
    for parts in components:
        block.add(parts)
    block.finish()
    if not whole:
        target_view.copy_(target.view(n, q, m, r))


def view(theta: Tensor, first: Rows, second: Rows, columns_from: int = 0) -> Tensor:
    """The block of Θ between two chunks, ``[N, outputs, M, outputs]``."""
    m, r = second.n, second.q
    start = second.start - columns_from
    columns = first.of(theta[:, start : start + m * r]).unflatten(2, (m, r))
    found: Tensor = columns[..., second.outputs.start : second.outputs.stop]
    return found
