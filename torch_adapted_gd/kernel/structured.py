"""Θ summed over layers, each by its own rule, and Dᵀu from the same factors: D itself is never held."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..calls import Call, underlying
from ..jacobian import call_jacobian, dtype_and_device, product, transpose_product
from ..memory import available_bytes
from ..replay import precision
from .blocks import BLOCK_ELEMENTS, KernelBlock, Parts
from .capture import Capture, exactly
from .chunks import Chunk
from .dense import ROWS_ELEMENTS, new_kernel, norm
from .module_calls import ModuleCall
from .verify import verify_rules

_CHUNK_BYTES = 2**29  # what B and its like may take even where Θ is smaller


class MismatchError(RuntimeError):
    """The structured kernel is wrong for a model, or there is none."""


class StructuredKernel:
    """Θ of the outputs of one or more calls, without D.

    Args:
        model: The network.
        calls: Its calls.
        names: The parameters θ.
        chunk_size: See `ntk`.
        verified: Whether each rule is checked first. Without that, what `rows` finds wrong cannot be told apart.

    Attributes:
        device: Where it is.
        unserved: Parameters that have to be served by their Jacobian, and why.
        remarks: What the user should know of these.
        methods: How their Jacobians were computed.
    """

    def __init__(
        self, model: nn.Module, calls: list[Call], names: list[str], *, chunk_size: int | None, verified: bool = True
    ) -> None:
        model = underlying(model)
        parameters = {name: p for name, p in model.named_parameters() if name in set(names)}
        self._numels = {name: parameters[name].numel() for name in names}
        self._dtype, self.device = dtype_and_device(list(parameters.values()))
        self.unserved: dict[str, str] = {}
        self.remarks: list[str] = []
        self._captures = [Capture(model, call, names) for call in calls]
        for capture in self._captures:
            unserved, remarks = verify_rules(capture, self._dtype) if verified else ({}, [])
            self.unserved |= capture.unserved | unserved
            self.remarks += remarks
        self._size = max(c.replay.n for c in self._captures), max(c.replay.q for c in self._captures)
        rows = sum(c.replay.n * c.replay.q for c in self._captures)
        free = available_bytes(self.device) if 8 * rows**2 > _CHUNK_BYTES else None  # Θ may never be formed
        self._budget = max(_CHUNK_BYTES, 8 * rows**2 if free is None else min(8 * rows**2, free // 4))
        self._chunks = list(self._planned(chunk_size))
        if len(self._chunks) == len(calls):
            for chunk in self._chunks:
                chunk.held = chunk.module_calls()
                chunk.capture.release()
        left = [name for name in names if name in self.unserved]
        self._left = {name: self._numels[name] for name in left}
        self._dense: list[Tensor] = []
        methods = set()
        for call, capture in zip(calls if left else [], self._captures, strict=False):
            if capture.probe_product.keys().isdisjoint(left):  # a call that uses none of them
                size = capture.replay.n * capture.replay.q, sum(self._left.values())
                self._dense.append(torch.zeros(size, dtype=self._dtype, device=self.device))
                continue
            part = call_jacobian(model, call, left, chunk_size=chunk_size)
            self._dense.append(part.matrix)
            methods.add(part.method)
        self.methods = sorted(methods)
        coupled = [capture.coupled for capture in self._captures if capture.coupled is not None]
        if coupled and self.methods != ["per_sample"]:  # else it is something computed once for all samples
            self.remarks.insert(0, f"the samples of a batch interact behind {coupled[0]}")

    @property
    def gradient(self) -> dict[str, Tensor]:
        """Dᵀg by plain backward passes, by parameter; one that is not there has none."""
        return _added([capture.gradient for capture in self._captures])

    @property
    def description(self) -> str:
        """How Θ comes about, for the report."""
        if not self.unserved:
            return "structured"
        by = f"jacobian ({', '.join(self.methods)})"
        if len(self.unserved) == len(self._numels):
            return by
        return f"structured, and {len(self.unserved)} of {len(self._numels)} parameters by {by}"

    def require_rules(self) -> None:
        """Make sure that rules serve the model, with per-sample Jacobians of the model for single parameters at most.

        Raises:
            MismatchError: They do not.
        """
        if self.remarks or self.methods not in ([], ["per_sample"]) or len(self.unserved) == len(self._numels):
            raise MismatchError("; ".join(self.remarks) or next(iter(self.unserved.values())))

    def chunks_of(self, number: int) -> list[Chunk]:
        """The chunks of one of the calls."""
        return [chunk for chunk in self._chunks if chunk.number == number]

    def written_of(self, number: int) -> list[Tensor]:
        """The Jacobian of what rules do not serve, ``[N·Q, numel]``, in a list that is empty where they serve all."""
        return self._dense[number : number + 1]

    def combinations_at_once(self, count: int) -> int:
        """For how many combinations of the outputs B may be held at a time."""
        if all(chunk.whole for chunk in self._chunks):
            return count
        entries = sum(2 * capture.elements for capture in self._captures)
        return max(1, min(count, self._budget // max(1, self._dtype.itemsize * entries)))

    def check_products(self) -> None:
        """Hold Dᵀu for the probe against what backward passes give.

        Raises:
            MismatchError: They differ.
        """
        found = self.transpose_product(torch.cat([capture.replay.probe for capture in self._captures]))
        self._check_probe(found)

    def gram(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Θ, ``[R, R]`` for all rows of all calls, formed in ``dtype``.

        Raises:
            MismatchError: uᵀΘu differs from what a backward pass gives for |Dᵀu|², u random.
        """
        size = sum(capture.replay.n * capture.replay.q for capture in self._captures)
        theta = new_kernel(size, size, self.device, dtype)
        with exactly(self.device):
            for i, first in enumerate(self._chunks):
                row_calls = first.module_calls()
                self._fill(theta, first, first, row_calls, row_calls)
                for second in self._chunks[i + 1 :]:
                    self._fill(theta, first, second, row_calls, second.module_calls())
                    _view(theta, second, first).copy_(_view(theta, first, second).permute(2, 3, 0, 1))
            probe = torch.cat([capture.replay.probe for capture in self._captures]).to(dtype)
            self._check(float(probe @ (theta @ probe)), self._captures, self._captures, dtype)
        return theta

    def cross(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The block of Θ between the first call's rows and the second's, ``[R1, R2]``.

        Raises:
            MismatchError: uᵀΘv differs from what backward passes give for ⟨D₁ᵀu, D₂ᵀv⟩, u and v random.
        """
        rows, columns = (capture.replay.n * capture.replay.q for capture in self._captures)
        theta = new_kernel(rows, columns, self.device, dtype)
        with exactly(self.device):
            firsts, seconds = self.chunks_of(0), self.chunks_of(1)
            for first in firsts:
                row_calls = first.module_calls()
                for second in seconds:
                    self._fill(theta, first, second, row_calls, second.module_calls(), columns_from=rows)
            u, v = (capture.replay.probe.to(dtype) for capture in self._captures)
            self._check(float(u @ (theta @ v)), self._captures[:1], self._captures[1:], dtype)
        return theta

    def transpose_product(self, u: Tensor) -> dict[str, Tensor]:
        """Dᵀu in float64 for u of shape ``[R]``, by parameter, flat, from the factors that Θ was made of.

        A backward pass with u would be the same in exact arithmetic. But for ψ = Θ⁻¹g its rounding in float32, |D||ψ|ε,
        can be of the size of Dᵀψ where D is ill-conditioned. These factors are those of a matrix near D, whose Gram matrix
        Θ is to float64's precision: so the rounding of D costs κ(D)ε, not κ(D)²ε.
        """
        sums: list[dict[str, Tensor]] = []
        with exactly(self.device):
            for chunk in self._chunks:
                part = chunk.of(u)
                for place, (_, calls) in enumerate(chunk.components(chunk.module_calls())):
                    sums.append(self._products(chunk.parts(place, calls), part))
            start = 0
            for matrix in self._dense:
                product = transpose_product(matrix, u[start : start + len(matrix)])
                sums.append(dict(zip(self._left, product.split(list(self._left.values())), strict=True)))
                start += len(matrix)
        total = _added(sums)
        return {name: total[name] if name in total else u.new_zeros(numel) for name, numel in self._numels.items()}

    def product(self, v: dict[str, Tensor]) -> Tensor:
        """Dv in float64, ``[R]``, for v by parameter, flat, from the factors that Θ was made of."""
        total = torch.zeros(sum(c.replay.n * c.replay.q for c in self._captures), dtype=torch.float64, device=self.device)
        with exactly(self.device):
            for chunk in self._chunks:
                part = chunk.of(total)
                for place, (_, calls) in enumerate(chunk.components(chunk.module_calls())):
                    parts = chunk.parts(place, calls)
                    for name, (jacobian, _) in parts.written.items():
                        part += product(jacobian.flatten(0, 1), v[name]).view_as(part)
                    for names, family in parts.families:
                        written = family.explicit_is_cheaper(self._size)
                        part += family.product([v[name] for name in names], written, BLOCK_ELEMENTS)
            if self._dense:
                vector = torch.cat([v[name] for name in self._left])
                total += torch.cat([product(matrix, vector) for matrix in self._dense])
        return total

    def rows(self, limit: int = ROWS_ELEMENTS) -> Iterator[Tensor]:
        """D written out in float64, in blocks of whole samples and at most ``limit`` entries, or one sample.

        Args:
            limit: Entries of a block.

        Raises:
            MismatchError: Dᵀu differs from what a backward pass gives, u random.
        """
        ends = dict(zip(self._numels, itertools.accumulate(self._numels.values()), strict=True))
        columns = {name: slice(end - self._numels[name], end) for name, end in ends.items()}
        size = sum(self._numels.values())
        found = torch.zeros(size, dtype=torch.float64, device=self.device)
        for number, capture in enumerate(self._captures):
            n, q = capture.replay.n, capture.replay.q
            step = max(1, limit // max(1, q * size))
            for first in range(0, n, step):
                samples = slice(first, min(first + step, n))
                block = torch.zeros(samples.stop - first, q, size, dtype=torch.float64, device=self.device)
                with exactly(self.device):
                    for chunk in self.chunks_of(number):
                        part = block[:, chunk.outputs.start : chunk.outputs.stop]
                        for place, (_, calls) in enumerate(chunk.components(chunk.module_calls())):
                            for name, jacobian in chunk.parts(place, calls).rows(samples):
                                part[..., columns[name]] = jacobian
                    start = 0
                    for name, numel in self._left.items() if self._dense else ():
                        dense = self._dense[number].view(n, q, -1)[samples, :, start : start + numel]
                        block[..., columns[name]] = dense
                        start += numel
                    rows = block.flatten(0, 1)
                    found.addmv_(rows.T, capture.replay.probe[first * q : samples.stop * q])
                yield rows
        self._check_probe({name: found[part] for name, part in columns.items()})

    def _check_probe(self, found: dict[str, Tensor]) -> None:
        """Compare Dᵀu for the probes with that of plain backward passes."""
        u = _added([capture.probe_product for capture in self._captures])
        apart = {name: part - u[name].reshape(-1) if name in u else part for name, part in found.items()}
        difference = norm(apart)
        if not difference <= min(1e3 * self._precision(torch.float64), 0.05) * norm(u):
            raise MismatchError(f"Dᵀu differs by {difference:.6g} for random u from that of backward passes, {norm(u):.6g}")

    def _products(self, parts: Parts, u: Tensor) -> dict[str, Tensor]:
        """Σ_nq u[n, q] D[n, q] of some parameters."""
        sums = {name: transpose_product(jacobian.flatten(0, 1), u.reshape(-1)) for name, (jacobian, _) in parts.written.items()}
        for names, family in parts.families:
            written = family.explicit_is_cheaper(self._size)
            sums |= zip(names, family.weighted_sums(u, written, BLOCK_ELEMENTS), strict=True)
        return sums

    def _planned(self, chunk_size: int | None) -> Iterator[Chunk]:
        """The outputs in as many chunks as memory asks for; the caller's ``chunk_size`` is in samples' worth of rows."""
        costs = []  # of one output of all samples: B, what is made of it, and the largest Jacobian of a module if written out
        for capture in self._captures:
            modules = [call for call in capture.module_calls if call.rule.runs_module]
            numels = [sum(self._numels[name] for name in call.parameters.values()) for call in modules]
            entries = 2 * capture.elements + 3 * capture.replay.n * max(numels, default=0)
            costs.append(max(1, self._dtype.itemsize * entries))
        at_once = sum(cost * c.replay.q for cost, c in zip(costs, self._captures, strict=True)) <= self._budget
        start = 0
        for number, (cost, capture) in enumerate(zip(costs, self._captures, strict=True)):
            n, q = capture.replay.n, capture.replay.q
            if chunk_size is not None:
                step = max(1, chunk_size * q // n)
            else:
                step = q if at_once else max(1, self._budget // (2 * cost))
            for first in range(0, q, step):
                outputs = range(first, min(first + step, q))
                yield Chunk(capture, number, start, n, q, outputs, self.unserved, self._budget // 2)
            start += n * q

    def _fill(
        self,
        theta: Tensor,
        first: Chunk,
        second: Chunk,
        row_calls: list[ModuleCall],
        column_calls: list[ModuleCall],
        columns_from: int = 0,
    ) -> None:
        """Write the block of Θ between two chunks."""
        symmetric = first is second
        view = _view(theta, first, second, columns_from)  # [N, Q, M, R]
        n, q, m, r = view.shape
        whole = first.whole and second.whole
        target = view.flatten(2).flatten(0, 1) if whole else theta.new_empty(n * q, m * r)
        block = KernelBlock(target, (n, q, m, r), symmetric, self._size)
        others = [] if symmetric else second.components(column_calls)
        for place, (names, calls) in enumerate(first.components(row_calls)):
            parts = first.parts(place, calls)
            if not symmetric:
                theirs = [call for other, members in others if other & names for call in members]
                parts = Parts.of(parts.terms, second.terms(theirs))
            block.add(parts)
        if self._dense:
            rows, columns = self._dense_rows(first), None if symmetric else self._dense_rows(second)
            block.add_jacobians(rows, columns)
        block.finish()
        if not whole:
            view.copy_(target.view(n, q, m, r))

    def _dense_rows(self, chunk: Chunk) -> Tensor:
        """The chunk's rows of the Jacobian of what is not served."""
        matrix, (n, q) = self._dense[chunk.number], chunk.shape
        if chunk.whole:
            return matrix
        by_sample: Tensor = matrix.unflatten(0, (n, -1))
        return by_sample[:, chunk.outputs.start : chunk.outputs.stop].reshape(n * q, -1)

    def _check(self, value: float, first: list[Capture], second: list[Capture], dtype: torch.dtype) -> None:
        """Compare uᵀΘv for the probes with ⟨Dᵀu, Dᵀv⟩ of plain backward passes."""
        u = _added([capture.probe_product for capture in first])
        v = u if second is first else _added([capture.probe_product for capture in second])
        size = norm(u) * (norm(u) if second is first else norm(v))
        eps = self._precision(dtype)
        expected = (
            size if second is first else sum(float(u[name].reshape(-1) @ v[name].reshape(-1)) for name in u.keys() & v.keys())
        )
        if not abs(value - expected) <= min(1e3 * eps, 0.05) * size:
            raise MismatchError(f"uᵀΘv is {value:.6g} for random u and v where backward passes give {expected:.6g}")

    def _precision(self, dtype: torch.dtype) -> float:
        """Machine epsilon of the coarsest arithmetic that products went through, ``dtype`` being the last."""
        return max(torch.finfo(dtype).eps, *(precision(capture.replay.call, self._dtype) for capture in self._captures))


def _added(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sums by name."""
    sums: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            sums[name] = sums[name] + tensor if name in sums else tensor
    return sums


def _view(theta: Tensor, first: Chunk, second: Chunk, columns_from: int = 0) -> Tensor:
    """The block of Θ between two chunks, ``[N, outputs, M, outputs]``."""
    m, r = second.n, second.q
    start = second.start - columns_from
    columns = first.of(theta[:, start : start + m * r]).unflatten(2, (m, r))
    view: Tensor = columns[..., second.outputs.start : second.outputs.stop]
    return view
