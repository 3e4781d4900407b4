"""The linear system of a step, and where and how to solve it: in the space of samples or of parameters, with or without Θ."""

import math
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import one_of, positive_integer, real_number
from ..jacobian import METHODS, Jacobian, tangent_jacobian, written, written_if_small
from ..memory import available_bytes, require_memory
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
from ..tracking.calls import Outputs
from ..world import ALONE, World
from .iterative import KernelOperator
from .output_metric import Metric

SPACES = ("auto", "sample", "parameter")
FACTORIZATIONS = ("auto", "eigh", "svd")
_DENSE = 8192  # rows up to which "auto" forms and factors a matrix: one of 8,192 rows takes 0.5 GB, and Cholesky some seconds
_SMALL = 2**18  # entries of D up to which it is written out: its parts would take longer to be called than to be computed
_LARGE = 2**21  # entries of D above which a step by its singular values takes half a second or more
_REFINING = 10.0  # what the cut of the singular values of such a D is divided by where steps have come to its end
_COPIES = 4  # as many as D that its singular values may need
_MATRICES = 5  # as many as Θ that a solution with it may need: its eigenvectors, and LAPACK's workspace


@dataclass(frozen=True)
class Dense:
    """Solve for steps with a matrix: Θ = DDᵀ, or DᵀD, formed and factored in float64, its rank revealed.

    Args:
        space: Where to solve: ``"sample"``, with Θ, QN×QN; ``"parameter"``, with DᵀD, K×K, added up over blocks of samples; or
            ``"auto"``, whichever is smaller.
        rtol: Singular values of D up to rtol·σ_max count as zero. By default √(QN·ε) with ε of float64, or the machine epsilon
            of the forward pass (autocast's, under autocast) where that is larger; a λ far above that rounding makes them count.
            By ``"svd"`` max(QN, K)·ε, or that machine epsilon.
        factorization: ``"auto"``: Cholesky where an estimate of the condition allows it, pivoted Cholesky where the rank is
            short and unambiguous, else ``"eigh"``, the eigenvalue decomposition, which may be had always; see `solve_kernel`.
            ``"svd"`` writes D out, R·K numbers in float64, and takes its singular values: those down to 1e-12 of the largest
            count, where Θ and DᵀD lose what is below 1e-7. It is for undamped steps on D without a gap in its spectrum.
        kernel: How to come by Θ, see `ntk`: ``"structured"`` sums it over the uses of parameters and raises for a model
            that this does not fit, ``"jacobian"`` builds it from D, ``"auto"`` is structured where that is right.
        chunk_size: Samples' worth of rows of D that are differentiated at a time, see `ntk`.

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
        one_of("space", self.space, SPACES)
        one_of("factorization", self.factorization, FACTORIZATIONS)
        one_of("kernel", self.kernel, METHODS)
        if self.rtol is not None:
            real_number("rtol", self.rtol, low=0.0, below=1.0)
        if self.chunk_size is not None:
            positive_integer("chunk_size", self.chunk_size)


@dataclass(frozen=True)
class System:
    """The linear system of a step: Θ̃ψ̃ = Pg̃ in sample space, M δ = Dᵀg in parameter space.

    With the metric H = SSᵀ of the outputs, Θ̃ = SᵀΘS, g̃ = S⁺g and M = DᵀHD; S = 1 in the Euclidean one.

    Attributes:
        space: ``"sample"`` or ``"parameter"``.
        matrix: Θ̃ ``[R, R]`` or M ``[K, K]``; or something that multiplies like Θ̃, or by ``"svd"`` like M.
        factorization: Its factorization; of the latter, itself.
        right: g̃ ``[R]`` or Dᵀg ``[K]``.
        size: |g̃|.
        scale: The mean of diag Θ̃.
        jacobian: D.
        seconds: Time spent, by part, where it was taken.
        least: How small a damping still makes a difference, relative to one that does where parameters have the same units.
    """

    space: Literal["sample", "parameter"]
    matrix: Tensor | KernelOperator | SingularValueFactorization
    factorization: Factorization | KernelOperator
    right: Tensor
    size: float
    scale: float
    jacobian: Jacobian
    seconds: dict[str, float] = field(default_factory=dict)
    least: float = 1.0

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
        stacked_from: What x is stacked from, its calls and others; their rows of D are stacked.
        names: The parameters θ.
        g: ∇ₓC, ``[R]``.
        metric: Where S comes from; None for S = 1.
        solver: How to solve.
        damping: The least λ that will be asked for, relative to the mean of diag Θ: if it is large enough, the Cholesky factor
            of Θ + λ1 does, and the rank is an estimate.
        world: The processes that have other rows.
    """

    model: nn.Module
    stacked_from: list[Outputs]
    names: list[str]
    g: Tensor
    metric: Metric | None
    solver: Dense | ConjugateGradients
    damping: float = 0.0
    world: World = ALONE

    def in_sample_space(self, solving: dict[str, Any]) -> tuple[System, float]:
        """The system with Θ̃, and |D|²."""
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
        factorization = factorize(theta, **solving, least_shift=self.damping * scale)
        return self._system(jacobian, theta, factorization, scale), square

    def in_parameter_space(self, solving: dict[str, Any]) -> tuple[System, float]:
        """The system with M, and |D|²."""
        jacobian = written_if_small(self._jacobian())
        weigh = self.metric.root_transpose if self.metric else None
        gram, products, square = jacobian.parameter_gram(self.g[:, None], weigh)
        scale = float(gram.diagonal().sum()) / max(1, len(self._right()))
        found = equilibrated(gram, factorize(gram, **solving, least_shift=self.damping * scale), **solving)
        least = float(gram.diagonal().min() / gram.diagonal().mean()) if len(gram) else 1.0
        return self._system(jacobian, gram, found, scale, space="parameter", right=products[:, 0], least=least), square

    def on_jacobian(self, rtol: float) -> tuple[System, float]:
        """The system with the singular values of SᵀD, and |D|².

        Raises:
            MemoryError: D would not fit.
        """
        factored = self._jacobian()
        rows, params = factored.shape
        require_memory(
            _COPIES * 8 * rows * params,
            self.g.device,
            f"The Jacobian of {rows:,} outputs by {params:,} parameters, and its singular vectors",
            'Use factorization="auto", or a smaller batch.',
        )
        jacobian = written(factored)
        d = torch.cat([block.double() for block in jacobian.blocks])
        square = float(torch.linalg.vector_norm(d)) ** 2
        if self.metric is not None:
            d = self.metric.root_transpose(d)
        scale = float(torch.linalg.vector_norm(d)) ** 2 / max(1, len(d))
        factorization = by_singular_values(d, rtol)
        return self._system(jacobian, factorization, factorization, scale), square

    def without_matrix(self, options: ConjugateGradients, start: Tensor | None) -> tuple[System, float]:
        """The system with Θ̃ to be applied, and |D|²."""
        started = time.perf_counter()
        jacobian = self._jacobian()
        jacobian.check_products()
        seconds = time.perf_counter() - started
        operator = KernelOperator(jacobian, self.metric, options, start, self.world)
        operator.seconds["factors"] = seconds
        return self._system(jacobian, operator, operator, operator.scale, seconds=operator.seconds), operator.square

    def _system(
        self,
        jacobian: Jacobian,
        matrix: Tensor | KernelOperator | SingularValueFactorization,
        factorization: Factorization | KernelOperator,
        scale: float,
        *,
        space: Literal["sample", "parameter"] = "sample",
        right: Tensor | None = None,
        **more: Any,
    ) -> System:
        """A system; its right-hand side is g̃, unless it is another one."""
        g = self._right()
        size = float(torch.linalg.vector_norm(g))
        return System(space, matrix, factorization, g if right is None else right, size, scale, jacobian, **more)

    def _jacobian(self) -> Jacobian:
        given = self.solver if isinstance(self.solver, Dense) else Dense()
        return tangent_jacobian(
            self.model,
            self.stacked_from,
            self.names,
            method=given.kernel,
            chunk_size=given.chunk_size,
            world=self.world,
        )

    def _right(self) -> Tensor:
        return self.g if self.metric is None else self.metric.root_inverse(self.g)


def for_undamped(rows: int, trained: list[nn.Parameter], world: World = ALONE, refined: int = 0) -> Dense | None:
    """How to solve without damping where D's spectrum has no gap; None where D, of so many rows, is too large for that.

    Steps by all singular values above rounding at first move the parameters far and the loss little. Where D is large, so that
    a step takes long, only those count at first that Θ would show, down to √(R·ε) of the largest, and tenfold smaller ones each
    time that the cut is ``refined``: the first digits come in fewer steps, the last ones in more. docs/pinns.md has figures.
    """
    params = sum(p.numel() for p in trained)
    size = _COPIES * 8 * rows * params
    too_large = size > 2**26 and size > (available_bytes(trained[0].device) or size) // 2
    if min(rows, params) > _DENSE or world.any(too_large):
        return None
    rtol = default_rtol(rows) / _REFINING**refined
    coarse = rows * params > _LARGE and trained[0].dtype == torch.float64 and rtol > default_svd_rtol((rows, params))
    return Dense(factorization="svd", rtol=rtol if coarse else None)


def choose_solver(
    solver: Dense | ConjugateGradients | None,
    params: int,
    rows: int,
    device: torch.device,
    world: World = ALONE,
    *,
    local: bool,
) -> tuple[str, Dense | ConjugateGradients]:
    """The space to solve in, and how.

    Args:
        solver: What the user gave; None for conjugate gradients where a matrix would be large, else with one.
        params: K.
        rows: The rows of x that the loss looks at.
        device: Where.
        world: The processes that have to choose alike.
        local: Whether the metric does not couple samples; where it does, blocks of samples cannot be added up one by one.

    Raises:
        ValueError: They cannot, but the user asked for it.
    """
    if isinstance(solver, ConjugateGradients):
        return "sample", solver
    given = solver or Dense()
    if given.space == "parameter" and not local:
        raise ValueError('`space` should be "sample" for metric="ggn" of a loss that couples samples, but got "parameter".')
    space = ("parameter" if params < rows and local else "sample") if given.space == "auto" else given.space
    if solver is None:
        size = params if space == "parameter" else rows
        free = available_bytes(device) if _MATRICES * 8 * size**2 > 2**26 else None
        if size > _DENSE or world.any(free is not None and _MATRICES * 8 * size**2 > free):
            return "sample", ConjugateGradients()
    return space, given
