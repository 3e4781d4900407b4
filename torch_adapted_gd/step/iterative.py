"""The system of a step without its matrix: Θ applied from the layers' factors, and the preconditioner made of them."""

import math
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..checks import all_finite
from ..jacobian import Jacobian
from ..jacobian.gram import spans
from ..memory import available_bytes, require_memory
from ..solve.krylov import ConjugateGradients, Iterate, solve_by_cg
from ..solve.preconditioner import Identity, Inverse, OutputBlockInverse, Preconditioner, SampleBlockInverse
from ..world import ALONE, World
from .output_metric import Metric

_SHARE = 0.6  # of the memory that is available, for blocks between all samples
_WORKSPACE = 3  # blocks that are needed beside those that stay


class KernelOperator:
    """Θ̃ = SᵀDDᵀS of some calls, to be applied and to be solved with, never formed.

    Args:
        jacobian: D.
        metric: Where S comes from, H = SSᵀ; None for S = 1.
        options: How to solve.
        start: A ψ̃ to begin the first solution with, or None.
        world: The processes that have rows of D, and share the preconditioner.

    Attributes:
        size: R, the rows of Θ̃.
        square: |D|², the trace of Θ.
        scale: The mean of diag Θ̃.
        last: What the last solution for a step came to; None before.
        iterations: Those of all solutions.
        seconds: Time spent, by part: ``"preconditioner"`` and ``"iterations"``.
        rank: None: it is not revealed.
        condition: NaN.
    """

    rank = None
    condition = math.nan

    def __init__(
        self,
        jacobian: Jacobian,
        metric: Metric | None,
        options: ConjugateGradients,
        start: Tensor | None = None,
        world: World = ALONE,
    ) -> None:
        self._world = world
        shapes = jacobian.shapes
        self._jacobian, self._metric, self._shapes, self._options = jacobian, metric, shapes, options
        self._spans = spans([n * q for n, q in shapes])  # the rows of each call
        self.size = self._spans[-1].stop
        self._start = start if start is not None and start.numel() == self.size else None
        self.last: Iterate | None = None
        self.iterations = 0
        self.seconds = {"preconditioner": 0.0, "iterations": 0.0}
        started = time.perf_counter()
        require_memory(
            5 * 8 * sum(n * q * q for n, q in shapes),  # with eigenvectors, and what makes them
            jacobian.device,
            f"Θ of {len(shapes)} calls between the outputs of single samples",
            "Use fewer samples at a time.",
        )
        self._blocks = jacobian.sample_blocks()
        self.square = sum(float(b.diagonal(dim1=1, dim2=2).sum()) for b in self._blocks)
        if metric is not None:
            self._blocks = [self._weighed(b, span.start) for b, span in zip(self._blocks, self._spans, strict=True)]
        self.scale = sum(float(b.diagonal(dim1=1, dim2=2).sum()) for b in self._blocks) / self.size
        self._preconditioner: Preconditioner | None = None
        self._add_time("preconditioner", started)

    @property
    def status(self) -> Literal["converged", "rank_deficient", "not_converged", "not_finite"]:
        """Whether the last solution for a step converged, and if to that of a singular Θ̃; ``"not_finite"`` if it is not."""
        if not math.isfinite(self.scale) or not all(all_finite(b) for b in self._blocks):
            return "not_finite"
        if self.last is not None and not self.last.converged:
            return "not_converged"
        return "rank_deficient" if self.last is not None and self.last.singular else "converged"

    @property
    def method(self) -> str:
        """What solves: ``"cg"``, and with which preconditioner."""
        return f"cg ({self._preconditioner.name})" if self._preconditioner else "cg"

    def __matmul__(self, v: Tensor) -> Tensor:
        """Θ̃v."""
        if self._metric is None:
            return self._jacobian.mv(self._jacobian.rmv(v))
        image = self._jacobian.mv(self._jacobian.rmv(self._metric.root(v)))
        return self._metric.root_transpose(image)

    def solve(self, g: Tensor, shift: float = 0.0, *, beside: bool = False) -> Tensor:
        """ψ̃ = (Θ̃ + λ1)⁻¹g as far as the tolerance; `last` tells how well.

        Args:
            g: ``[R]``.
            shift: λ.
            beside: It is not for the step itself but for something beside it: `last` stays.
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

    def _inverse(self, shift: float) -> Callable[[Tensor], Tensor]:
        started = time.perf_counter()
        if self._preconditioner is None:
            self._preconditioner = self._build()
        inverse = self._preconditioner.at(shift)
        self._add_time("preconditioner", started)
        return inverse

    def _build(self) -> Preconditioner:
        if self._options.preconditioner == "none":
            return Preconditioner([([slice(0, self.size)], Identity())])
        parts: list[tuple[list[slice], Inverse]] = []
        for q in dict.fromkeys(q for _, q in self._shapes):
            numbers = [number for number, (_, outputs) in enumerate(self._shapes) if outputs == q]
            parts.append(([self._spans[number] for number in numbers], self._inverse_of(numbers, q)))
        return Preconditioner(parts)

    def _inverse_of(self, numbers: list[int], q: int) -> Inverse:
        """The preconditioner for some calls with as many outputs each."""
        blocks = torch.cat([self._blocks[number] for number in numbers])
        samples, device = len(blocks), self._jacobian.device
        free = available_bytes(device)
        room = q if free is None else int(_SHARE * free / (4 * samples**2)) - _WORKSPACE
        room = min(self._world.objects(room * self._world.size))  # blocks are dealt
        if self._options.preconditioner == "samples" or room < self._world.size:
            return SampleBlockInverse(blocks)
        values, basis = torch.linalg.eigh(blocks.mean(0))
        values = values.clamp(min=1e-12 * float(values[-1]))
        # Neighbours among the eigenvalues share a block where there is no room for all: that of the one in the middle.
        groups = torch.arange(q).tensor_split(min(q, room))
        chosen = [int(group[len(group) // 2]) for group in groups]
        owner = [number for number, group in enumerate(groups) for _ in group]
        scales = torch.cat([values[group] / values[c] for group, c in zip(groups, chosen, strict=True)])
        mine = chosen[self._world.rank :: self._world.size]
        out = torch.empty(len(mine), samples, samples, dtype=torch.float32, device=device)
        directions = basis[:, mine]  # [Q, C]
        rotations = []
        for number in numbers:
            weights = directions.expand(self._shapes[number][0], q, len(mine))
            if self._metric is not None:
                weights = self._rooted(weights, self._spans[number])
            rotations.append(weights)
        self._jacobian.output_blocks(rotations, numbers, out)
        return OutputBlockInverse(out, basis, owner, scales, self._world)

    def _rooted(self, weights: Tensor, span: slice) -> Tensor:
        """S_n times the weights ``[N, Q, C]`` of each sample of one call."""
        assert self._metric is not None
        padded = weights.new_zeros(self.size, weights.shape[2])
        padded[span] = weights.flatten(0, 1)
        return self._metric.root(padded)[span].view(weights.shape)

    def _weighed(self, blocks: Tensor, start: int) -> Tensor:
        """S_nᵀ Θ(x_n, x_n) S_n, ``[N, Q, Q]``."""
        assert self._metric is not None
        for _ in range(2):
            blocks = self._metric.root_transpose(blocks.flatten(0, 1), start).view(blocks.shape).mT.contiguous()
        return blocks

    def _add_time(self, part: str, started: float, without: float = 0.0) -> None:
        if self._jacobian.device.type == "cuda":
            torch.cuda.synchronize(self._jacobian.device)
        self.seconds[part] += time.perf_counter() - started - without
