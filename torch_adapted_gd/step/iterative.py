"""The system of a step without its matrix: Θ applied from the layers' factors, and its preconditioner."""

import math
import time
from typing import Literal

import torch
from torch import Tensor

from ..checks import all_finite
from ..jacobian import Jacobian
from ..jacobian.gram import spans
from ..memory import available_bytes, require_memory
from ..solve.krylov import ConjugateGradients, Iterate, solve_by_cg
from ..solve.preconditioner import Inverse, OutputBlockInverse, Preconditioner, SampleBlockInverse
from ..world import ALONE, World
from .output_metric import Metric

_SHARE = 0.6  # of the memory that is available, for blocks between all samples
_WORKSPACE = 3  # blocks that are needed in addition


class KernelOperator:
    """Θ̃ = SᵀDDᵀS, applied and solved with, never formed. It stands for both the matrix of a `System` and its factorization.

    Args:
        jacobian: D.
        metric: S, H = SSᵀ; None for S = 1.
        options: How to solve.
        start: A ψ̃ to begin the first solution with, or None.
        world: The processes that have rows of D, and share the preconditioner.

    Attributes:
        size: R, the rows of Θ̃.
        square: |D|², the trace of Θ.
        scale: The mean of diag Θ̃ over the rows that the loss depends on.
        last: The last solution for a step; None before.
        iterations: Those of all solutions.
        seconds: Time spent, by part: ``"preconditioner"`` and ``"iterations"``.
    """

    rank = None  # it is not revealed
    condition = math.nan

    def __init__(
        self,
        jacobian: Jacobian,
        metric: Metric | None,
        options: ConjugateGradients,
        start: Tensor | None = None,
        world: World = ALONE,
    ) -> None:
        started = time.perf_counter()
        self._jacobian, self._metric, self._options, self._world = jacobian, metric, options, world
        self.warm_start = options.warm_start
        self._spans = spans([n * q for n, q in jacobian.shapes])  # the rows of each call
        self.size = self._spans[-1].stop
        self._start = start if start is not None and start.numel() == self.size else None
        self._preconditioner: Preconditioner | None = None
        self.last: Iterate | None = None
        self.iterations = 0
        self.seconds = {"preconditioner": 0.0, "iterations": 0.0}
        require_memory(
            5 * 8 * sum(n * q * q for n, q in jacobian.shapes),  # with eigenvectors and workspace
            jacobian.device,
            f"Θ of {len(jacobian.shapes)} calls between the outputs of single samples",
            "Use fewer samples at a time.",
        )
        self._blocks = jacobian.sample_blocks()
        self.square = self._trace()
        if metric is not None:  # S_nᵀ Θ(x_n, x_n) S_n, [N, Q, Q]
            for number, span in enumerate(self._spans):
                block = self._blocks[number]
                for _ in range(2):
                    block = metric.root_transpose(block.flatten(0, 1), span.start).view(block.shape).mT.contiguous()
                self._blocks[number] = block
        self.scale = self._trace() / (self.size if metric is None else max(1, metric.rows))
        self._add_time("preconditioner", started)

    def _trace(self) -> float:
        return sum(float(b.diagonal(dim1=1, dim2=2).sum()) for b in self._blocks)

    @property
    def status(self) -> Literal["converged", "rank_deficient", "not_converged", "not_finite"]:
        """Of the last solution for a step: ``"rank_deficient"`` if it converged for a singular Θ̃."""
        if not math.isfinite(self.scale) or not all(all_finite(b) for b in self._blocks):
            return "not_finite"
        if self.last is not None and not self.last.converged:
            return "not_converged"
        return "rank_deficient" if self.last is not None and self.last.singular else "converged"

    @property
    def method(self) -> str:
        """``"cg"``, with the preconditioner."""
        return f"cg ({self._preconditioner.name})" if self._preconditioner else "cg"

    def __matmul__(self, v: Tensor) -> Tensor:
        """Θ̃v."""
        if self._metric is None:
            return self._jacobian.mv(self._jacobian.rmv(v))
        return self._metric.root_transpose(self._jacobian.mv(self._jacobian.rmv(self._metric.root(v))))

    def solve(self, g: Tensor, shift: float = 0.0, *, beside: bool = False) -> Tensor:
        """ψ̃ = (Θ̃ + λ1)⁻¹g to within the tolerance; `last` has the residual.

        Args:
            g: ``[R]``.
            shift: λ.
            beside: It is not the solution of the step itself: `last` stays.
        """
        started, before = time.perf_counter(), self.seconds["preconditioner"]
        found = solve_by_cg(
            self.__matmul__,
            g,
            shift=shift,
            scale=self.scale,
            precondition=self._inverse,
            options=self._options,
            start=None if beside else self._start,
            agreed=self._world.same,
        )
        self._add_time("iterations", started, without=self.seconds["preconditioner"] - before)
        self.iterations += found.iterations
        if not beside:
            self.last, self._start = found, found.psi
        return found.psi

    def projected_norm(self, g: Tensor) -> float:  # noqa: ARG002
        """|Θ̃ψ̃| of the last solution, which is |Pg| for λ = 0 and a small tolerance."""
        return float(torch.linalg.vector_norm(self.last.image)) if self.last else math.nan

    def _inverse(self, shift: float) -> Preconditioner:
        """The preconditioner for a shift."""
        started = time.perf_counter()
        if self._preconditioner is None:
            parts: list[tuple[list[slice], Inverse]] = []
            outputs = [q for _, q in self._jacobian.shapes]
            for q in dict.fromkeys(outputs) if self._options.preconditioner != "none" else ():
                numbers = [number for number, each in enumerate(outputs) if each == q]
                parts.append(([self._spans[number] for number in numbers], self._inverse_of(numbers, q)))
            self._preconditioner = Preconditioner(parts)
        self._preconditioner.factor(shift)
        self._add_time("preconditioner", started)
        return self._preconditioner

    def _inverse_of(self, numbers: list[int], q: int) -> Inverse:
        """The preconditioner for calls with q outputs each."""
        blocks = torch.cat([self._blocks[number] for number in numbers])
        samples, device = len(blocks), self._jacobian.device
        free = available_bytes(device)
        room = q if free is None else int(_SHARE * free / (4 * samples**2)) - _WORKSPACE
        room = min(self._world.objects(room * self._world.size))  # processes share the blocks
        if self._options.preconditioner == "samples" or room < self._world.size:
            return SampleBlockInverse(blocks)
        values, basis = torch.linalg.eigh(blocks.mean(0))
        values = values.clamp(min=1e-12 * float(values[-1]))
        # If there is no room for all, neighbours among the eigenvalues share the block of the middle one.
        groups = torch.arange(q).tensor_split(min(q, room))
        chosen = [int(group[len(group) // 2]) for group in groups]
        owner = [number for number, group in enumerate(groups) for _ in group]
        scales = torch.cat([values[group] / values[c] for group, c in zip(groups, chosen, strict=True)])
        mine = chosen[self._world.rank :: self._world.size]
        rotations = []
        for number in numbers:
            span, n = self._spans[number], self._jacobian.shapes[number][0]
            weights = basis[:, mine].expand(n, q, len(mine))  # [N, Q, C]
            if self._metric is not None:  # S_n times these
                padded = weights.new_zeros(self.size, len(mine))
                padded[span] = weights.flatten(0, 1)
                weights = self._metric.root(padded)[span].view(weights.shape)
            rotations.append(weights)
        out = torch.empty(len(mine), samples, samples, dtype=torch.float32, device=device)
        self._jacobian.output_blocks(rotations, numbers, out)
        return OutputBlockInverse(out, basis, owner, scales, self._world)

    def _add_time(self, part: str, started: float, without: float = 0.0) -> None:
        if self._jacobian.device.type == "cuda":
            torch.cuda.synchronize(self._jacobian.device)
        self.seconds[part] += time.perf_counter() - started - without
