"""The linear system of a step, and where and how to solve it: in the space of samples or of parameters, with or without Θ."""

import math
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .calls import Call
from .curvature import OutputLoss
from .iterative import KernelOperator
from .jacobian import Jacobian, tangent_gram, tangent_jacobian, written_if_small
from .memory import available_bytes, require_memory
from .solve import ConjugateGradients, Factorization, factorize

SPACES = ("auto", "sample", "parameter")
SOLVERS = ("auto", "eigh", "cg")
_DENSE = 8192  # rows up to which "auto" forms and factors a matrix: one of 8,192 rows takes 0.5 GB, and Cholesky some seconds
_SMALL = 2**18  # entries of D up to which it is written out: its parts would take longer to be called than to be computed
_MATRICES = 5  # as many as Θ that a solution with it may need: its eigenvectors, and LAPACK's workspace


@dataclass(frozen=True)
class System:
    """The linear system of a step: Θ̃ψ̃ = Pg̃ in sample space, M δ = Dᵀg in parameter space.

    With the metric H = SSᵀ of the outputs, Θ̃ = SᵀΘS, g̃ = S⁺g and M = DᵀHD; S = 1 in the Euclidean one.

    Attributes:
        space: ``"sample"`` or ``"parameter"``.
        matrix: Θ̃ ``[R, R]`` or M ``[K, K]``; or Θ̃ without its entries.
        factorization: Its factorization; of the latter, itself.
        right: g̃ ``[R]`` or Dᵀg ``[K]``.
        size: |g̃|.
        scale: The mean of diag Θ̃.
        jacobian: D.
        seconds: Time spent, by part, where it was taken.
    """

    space: Literal["sample", "parameter"]
    matrix: Tensor | KernelOperator
    factorization: Factorization | KernelOperator
    right: Tensor
    size: float
    scale: float
    jacobian: Jacobian
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def projected_fraction(self) -> float:
        """|Pg̃|/|g̃|; without a matrix, |Θ̃ψ̃|/|g̃|."""
        if not self.size:
            return 1.0
        if self.space == "sample":
            part = self.factorization.projected_norm(self.right)
        else:
            part = math.sqrt(max(0.0, float(self.right @ self.factorization.solve(self.right))))
        return min(1.0, part / self.size)


@dataclass(frozen=True)
class Problem:
    """What a system is built from.

    Attributes:
        model: The network.
        calls: Its calls; their rows of D are stacked.
        names: The parameters θ.
        g: ∇ₓC, ``[R]``.
        metric: Where S comes from; None for S = 1.
        kernel: How to come by Θ; like ``chunk_size``, see `ntk`.
        chunk_size: See there.
    """

    model: nn.Module
    calls: list[Call]
    names: list[str]
    g: Tensor
    metric: OutputLoss | None
    kernel: str
    chunk_size: int | None

    def in_sample_space(self, solving: dict[str, Any]) -> tuple[System, float]:
        """The system with Θ̃, and |D|²."""
        rows = len(self.g)
        require_memory(
            _MATRICES * 8 * rows**2,
            self.g.device,
            f"A step on {rows:,} outputs (kernel {8 * rows**2 / 1e9:.3g} GB, and its eigenvectors)",
            'Use a smaller batch, or solver="cg".',
        )
        jacobian = written_if_small(self._jacobian(), _SMALL)
        theta = jacobian.gram()  # [R, R]
        square = float(theta.diagonal().sum())
        if self.metric is not None:  # SᵀΘS, Θ symmetric
            theta = self.metric.hessian_root_transpose(self.metric.hessian_root_transpose(theta).T.contiguous())
        right = self._right()
        system = System(
            space="sample",
            matrix=theta,
            factorization=factorize(theta, **solving),
            right=right,
            size=float(torch.linalg.vector_norm(right)),
            scale=float(theta.diagonal().mean()),
            jacobian=jacobian,
        )
        return system, square

    def in_parameter_space(self, solving: dict[str, Any]) -> tuple[System, float]:
        """The system with M, and |D|²."""
        jacobian = written_if_small(self._jacobian())
        weigh = self.metric.hessian_root_transpose if self.metric else None
        gram, products, square = tangent_gram(jacobian, self.g[:, None], weigh)
        system = System(
            space="parameter",
            matrix=gram,
            factorization=factorize(gram, **solving),
            right=products[:, 0],
            size=float(torch.linalg.vector_norm(self._right())),
            scale=float(gram.diagonal().sum()) / len(self.g),
            jacobian=jacobian,
        )
        return system, square

    def without_matrix(self, options: ConjugateGradients, start: Tensor | None) -> tuple[System, float]:
        """The system with Θ̃ to be applied, and |D|²."""
        started = time.perf_counter()
        jacobian = self._jacobian()
        jacobian.check_products()
        seconds = time.perf_counter() - started
        operator = KernelOperator(jacobian, self.metric, options, start)
        operator.seconds["factors"] = seconds
        right = self._right()
        system = System(
            space="sample",
            matrix=operator,
            factorization=operator,
            right=right,
            size=float(torch.linalg.vector_norm(right)),
            scale=operator.scale,
            jacobian=jacobian,
            seconds=operator.seconds,
        )
        return system, operator.square

    def _jacobian(self) -> Jacobian:
        return tangent_jacobian(self.model, self.calls, self.names, method=self.kernel, chunk_size=self.chunk_size)

    def _right(self) -> Tensor:
        return self.g if self.metric is None else self.metric.hessian_root_inverse(self.g)


def choose_solver(
    space: str, solver: str | ConjugateGradients, rtol: float | None, params: int, rows: int, device: torch.device
) -> tuple[str, ConjugateGradients | None]:
    """The space to solve in, and how to by conjugate gradients if that is to be.

    Args:
        space: One of `SPACES`.
        solver: One of `SOLVERS`, or how to by conjugate gradients; ``"auto"`` takes these where a matrix would be large.
        rtol: What the user gave; a cut on singular values needs a matrix.
        params: K.
        rows: QN.
        device: Where.
    """
    if isinstance(solver, ConjugateGradients):
        return "sample", solver
    if solver == "cg":
        return "sample", ConjugateGradients()
    chosen = ("parameter" if params < rows else "sample") if space == "auto" else space
    if solver == "auto" and rtol is None and space != "parameter":
        size = params if chosen == "parameter" else rows
        free = available_bytes(device) if _MATRICES * 8 * size**2 > 2**26 else None
        if size > _DENSE or (free is not None and _MATRICES * 8 * size**2 > free):
            return "sample", ConjugateGradients()
    return chosen, None
