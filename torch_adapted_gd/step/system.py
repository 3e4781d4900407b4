"""The linear system of a step, in the space of samples or of parameters, with or without a matrix."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import all_finite, one_of, positive_integer, real_number
from ..jacobian import METHODS, Jacobian, ParameterVector, tangent_jacobian, written, written_if_small
from ..memory import fits, require_memory
from ..solve import (
    ConjugateGradients,
    Factorization,
    SingularValueFactorization,
    by_singular_values,
    default_rtol,
    default_svd_rtol,
    equilibrated,
    factorize,
)
from ..world import ALONE, World
from .iterative import KernelOperator
from .output_metric import Metric
from .recorded import Recorded

DENSE = 8192  # largest matrix that "auto" forms and factors: 8,192 rows take 0.5 GB, and Cholesky some seconds
_SMALL = 2**18  # D with at most so many entries is written out, because calls would take longer than the arithmetic
COPIES = 4  # memory for the singular values of D, in multiples of D
_MATRICES = 5  # memory for a solution with Θ, in multiples of Θ: eigenvectors and LAPACK's workspace


@dataclass(frozen=True)
class Dense:
    """Solve with a matrix, Θ = DDᵀ or DᵀD. It is formed and factored in float64, and its rank is revealed.

    Args:
        space: ``"sample"`` solves with Θ, QN×QN; ``"parameter"`` with DᵀD, K×K, summed over blocks of samples; ``"auto"`` with
            the smaller one.
        rtol: Singular values of D up to rtol·σ_max count as zero, unless λ is far above their rounding error. The default is
            √(QN·ε) with ε of float64, or the machine epsilon of the forward pass (autocast's, under autocast) if that is
            larger. For ``"svd"`` it is max(QN, K)·ε, or that machine epsilon.
        factorization: ``"auto"`` takes Cholesky where an estimate of the condition number allows it, pivoted Cholesky where D
            is rank-deficient with a clear gap, and else ``"eigh"``, the eigenvalue decomposition; see `solve_kernel`. ``"svd"``
            writes D out, R·K numbers in float64, and takes its singular values. It resolves singular values down to 1e-12 of
            the largest, where Θ and DᵀD resolve 1e-7. Use it for undamped steps if the spectrum of D has no gap.
        kernel: How to compute Θ, see `ntk`: ``"structured"`` sums it over the uses of parameters and raises for a model that
            this does not support, ``"jacobian"`` builds it from D, ``"auto"`` is structured where that is correct.
        chunk_size: The number of samples whose rows of D are differentiated at a time, see `ntk`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> Dense(space="parameter").rtol is None
        True
    """

    space: str = "auto"
    rtol: float | None = None
    factorization: str = "auto"
    kernel: str = "auto"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        one_of("space", self.space, ("auto", "sample", "parameter"))
        one_of("factorization", self.factorization, ("auto", "eigh", "svd"))
        one_of("kernel", self.kernel, METHODS)
        if self.rtol is not None:
            real_number("rtol", self.rtol, low=0.0, below=1.0)
        if self.chunk_size is not None:
            positive_integer("chunk_size", self.chunk_size)


@dataclass(frozen=True)
class Direction:
    """The direction of a step for one damping."""

    adapted: ParameterVector  # φ = D⁺g, damped and with momentum: the step is −η φ at α = 1
    weights: Tensor | None  # ψ̃ in sample space, None in parameter space
    size: float  # |Dᵀψ|, without momentum
    damping: float  # λ in the units of the kernel


class System:
    """The linear system of a step: Θ̃ψ̃ = Pg̃ in sample space, M δ = Dᵀg in parameter space.

    With the metric H = SSᵀ of the outputs, Θ̃ = SᵀΘS, g̃ = S⁺g and M = DᵀHD; S = 1 in the Euclidean metric.

    Args:
        jacobian: D.
        matrix: Θ̃ ``[R', R']`` or M ``[K, K]``; or an operator that multiplies like Θ̃, or by ``"svd"`` like M.
        factorization: The factorization of the matrix; an operator is its own.
        g: ∇ₓC, ``[R]``.
        metric: S, None for 1.
        scale: The mean of diag Θ̃.
        square: |D|².
        products: Dᵀg in parameter space, else None.
        least: How small a damping still makes a difference, relative to one that does where parameters have the same units.

    Attributes:
        space: ``"sample"`` or ``"parameter"``.
        right: The right-hand side, g̃ ``[R']`` or Dᵀg ``[K]``.
        size: |g̃|.
        rows: R', the rows of x that the loss depends on.
    """

    def __init__(
        self,
        jacobian: Jacobian,
        matrix: Tensor | KernelOperator | SingularValueFactorization,
        factorization: Factorization | KernelOperator,
        g: Tensor,
        metric: Metric | None,
        *,
        scale: float,
        square: float,
        products: Tensor | None = None,
        least: float = 1.0,
    ) -> None:
        self.jacobian, self.matrix, self.factorization, self.metric = jacobian, matrix, factorization, metric
        self.scale, self.square, self.least = scale, square, least
        weighed = g if metric is None else metric.root_inverse(g)
        self.space = "sample" if products is None else "parameter"
        self.right, self.size = weighed if products is None else products, float(torch.linalg.vector_norm(weighed))
        self.rows = len(g) if metric is None else metric.rows

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

    @property
    def iterative(self) -> KernelOperator | None:
        """The operator that is solved by iteration, None if there is a matrix."""
        return self.matrix if isinstance(self.matrix, KernelOperator) else None

    @property
    def status(self) -> str:
        """The rank of D: ``"full_rank"`` (QN), ``"rank_deficient"`` or ``"zero"``; or whether iterations converged."""
        if self.iterative:
            return self.iterative.status
        rank = self.factorization.rank
        return "full_rank" if rank == self.rows else "rank_deficient" if rank else "zero"

    def solve(self, right: Tensor, shift: float, *, beside: bool = False) -> tuple[ParameterVector, Tensor | None]:
        """The step for a right-hand side and the damping ``shift``; and ψ̃, None if there is none.

        With ``beside`` it is not the step itself, so that an iterative solution is not kept as a start.
        """
        by_parameter = self.space == "parameter"
        if self.iterative:
            solution = self.iterative.solve(right, shift, beside=beside)
        elif isinstance(self.factorization, SingularValueFactorization):
            solution, by_parameter = self.factorization.step(right, shift), True
        else:
            solution = self.factorization.solve(right, shift)
        if not all_finite(solution):
            raise RuntimeError(
                f"The linear system of {self.jacobian.shape[0]} outputs has no finite solution in float64, so nothing was "
                "changed. Its entries are near the limits of float64. Check the scale of outputs and inputs."
            )
        if by_parameter:
            return self.jacobian.parts(solution), None
        return self.jacobian.rmv(self.unweigh(solution)), solution

    def check_solved(self) -> None:
        """Raise a RuntimeError if the matrix could not be factored."""
        if self.factorization.status in ("not_finite", "not_converged"):
            bad = ""
            if isinstance(self.matrix, Tensor):
                bad = f" ({int((~torch.isfinite(self.matrix)).sum())} entries are not finite)"
            raise RuntimeError(
                f"The kernel Θ of {self.jacobian.shape[0]} outputs could not be solved{bad}, so nothing was changed. A "
                "derivative that is infinite at a finite output causes this (sqrt or norm at 0). Check the inputs, then lower "
                "`lr`."
            )

    def weigh(self, v: Tensor) -> Tensor:
        """Sᵀv."""
        return v if self.metric is None else self.metric.root_transpose(v)

    def unweigh(self, v: Tensor) -> Tensor:
        """Sv."""
        return v if self.metric is None else self.metric.root(v)

    def right_of(self, v: Tensor) -> Tensor:
        """The right-hand side for a motion v ``[R]`` of the outputs: Sᵀv in sample space, DᵀHv in parameter space."""
        weighed = self.weigh(v)
        if self.space == "sample":
            return weighed
        return self.jacobian.flat(self.jacobian.rmv(self.unweigh(weighed)))

    def identity_gap(self, direction: Direction) -> float:
        """|ψᵀΘψ − |Dᵀψ|²| / |Dᵀψ|², or |δᵀDᵀDδ − |Dδ|²| / |Dδ|²: zero if the matrix and the products agree."""
        if (psi := direction.weights) is not None:
            size = direction.size
        else:
            psi = self.jacobian.flat(direction.adapted)
            size = float(torch.linalg.vector_norm(self.weigh(self.jacobian.mv(direction.adapted))))
        square = size * size
        return abs(float(psi @ (self.matrix @ psi)) - square) / square if square else 0.0


@dataclass(frozen=True)
class Problem:
    """What a system is built from."""

    recorded: Recorded
    g: Tensor  # ∇ₓC, [R]
    metric: Metric | None  # S, None for 1
    solver: Dense | ConjugateGradients | None  # None for a choice by size
    eps: float  # machine epsilon of the arithmetic of x
    start: Tensor | None  # a ψ̃ to start iterations with
    # The smallest λ that will be used, relative to the mean of diag Θ. If it is large enough, the Cholesky factor of Θ + λ1
    # serves, and the rank is an estimate.
    damping: float

    def system(self) -> System:
        """The system, factored.

        Raises:
            ValueError: The solver does not suit the metric.
            MemoryError: The Jacobian or the kernel would not fit.
        """
        params, local = self.recorded.num_params, self.metric is None or self.metric.local
        space, solver = choose_solver(self.solver, params, self._rows, self.g.device, self._world, local=local)
        if isinstance(solver, ConjugateGradients):
            return self._without_matrix(solver)
        if solver.factorization == "svd":
            return self._on_jacobian(default_svd_rtol((self._rows, params), self.eps) if solver.rtol is None else solver.rtol)
        solving = {
            "rtol": default_rtol(self._rows, self.eps) if solver.rtol is None else solver.rtol,
            "method": solver.factorization,
            "truncate": solver.rtol is not None,
        }
        return self._in_parameter_space(solving) if space == "parameter" else self._in_sample_space(solving)

    def _in_sample_space(self, solving: dict[str, Any]) -> System:
        """The system with Θ̃."""
        rows = len(self.g)
        require_memory(
            _MATRICES * 8 * rows**2,
            self.g.device,
            f"A step on {rows:,} outputs (kernel {8 * rows**2 / 1e9:.3g} GB, and its eigenvectors)",
            "Use a smaller batch, or solver=ConjugateGradients().",
        )
        jacobian = written_if_small(self._jacobian(), _SMALL)
        theta = jacobian.gram()  # [R, R]
        square = float(theta.diagonal().sum())
        if self.metric is not None:  # SᵀΘS, Θ symmetric
            theta = self.metric.root_transpose(self.metric.root_transpose(theta).T.contiguous())
        scale = float(theta.diagonal().mean())
        found = factorize(theta, **solving, least_shift=self.damping * scale)
        return System(jacobian, theta, found, self.g, self.metric, scale=scale, square=square)

    def _in_parameter_space(self, solving: dict[str, Any]) -> System:
        """The system with M."""
        jacobian = written_if_small(self._jacobian())
        weigh = self.metric.root_transpose if self.metric else None
        m, products, square = jacobian.parameter_gram(self.g[:, None], weigh)
        scale = float(m.diagonal().sum()) / max(1, self._rows)
        found = equilibrated(m, factorize(m, **solving, least_shift=self.damping * scale), **solving)
        least = float(m.diagonal().min() / m.diagonal().mean()) if len(m) else 1.0
        right = products[:, 0]
        return System(jacobian, m, found, self.g, self.metric, scale=scale, square=square, products=right, least=least)

    def _on_jacobian(self, rtol: float) -> System:
        """The system with the singular values of SᵀD."""
        factored = self._jacobian()
        rows, params = factored.shape
        require_memory(
            COPIES * 8 * rows * params,
            self.g.device,
            f"The Jacobian of {rows:,} outputs by {params:,} parameters, and its singular vectors",
            'Use factorization="auto", or a smaller batch.',
        )
        jacobian = written(factored)
        d = jacobian.matrix.double()
        square = float(torch.linalg.vector_norm(d)) ** 2
        if self.metric is not None:
            d = self.metric.root_transpose(d)
        scale = float(torch.linalg.vector_norm(d)) ** 2 / max(1, len(d))
        found = by_singular_values(d, rtol)
        return System(jacobian, found, found, self.g, self.metric, scale=scale, square=square)

    def _without_matrix(self, options: ConjugateGradients) -> System:
        """The system with an operator that applies Θ̃."""
        started = time.perf_counter()
        jacobian = self._jacobian()
        jacobian.check_products()
        elapsed = time.perf_counter() - started
        metric = None if self.metric is None else self.metric.padded()
        found = KernelOperator(jacobian, metric, options, self.start if options.warm_start else None, self._world)
        found.seconds["factors"] = elapsed
        return System(jacobian, found, found, self.g, metric, scale=found.scale, square=found.square)

    @property
    def _rows(self) -> int:
        """R'."""
        return len(self.g) if self.metric is None else self.metric.rows

    @property
    def _world(self) -> World:
        return self.recorded.shares.world

    def _jacobian(self) -> Jacobian:
        given = self.solver if isinstance(self.solver, Dense) else Dense()
        return tangent_jacobian(
            self.recorded.model,
            self.recorded.stacked_from,
            list(self.recorded.trained),
            method=given.kernel,
            chunk_size=given.chunk_size,
            world=self._world,
        )


def choose_solver(
    solver: Dense | ConjugateGradients | None,
    params: int,
    rows: int,
    device: torch.device,
    world: World = ALONE,
    *,
    local: bool,
) -> tuple[str, Dense | ConjugateGradients]:
    """The space to solve in, and the solver: by default conjugate gradients if a matrix would be large.

    Args:
        solver: The user's solver, or None.
        params: K.
        rows: The rows of x that the loss depends on.
        device: The device of the matrix.
        world: The processes, which have to choose the same.
        local: Whether the metric couples no samples. If it does, DᵀHD is no sum over blocks of samples.

    Raises:
        ValueError: ``space="parameter"`` for a metric that couples samples.
    """
    if isinstance(solver, ConjugateGradients):
        return "sample", solver
    given = solver or Dense()
    if given.space == "parameter" and not local:
        raise ValueError('`space` should be "sample" for metric="ggn" of a loss that couples samples, but got "parameter".')
    space = ("parameter" if params < rows and local else "sample") if given.space == "auto" else given.space
    if solver is None:
        size = params if space == "parameter" else rows
        if size > DENSE or world.any(not fits(_MATRICES * 8 * size**2, device)):
            return "sample", ConjugateGradients()
    return space, given
