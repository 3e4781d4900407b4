"""The gradient fields V_α of Theorem 2.3, in parameter space and in output space, their metric and their equilibria."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import real_number
from ..losses import HalfSquaredLoss
from ..solve.choice import factorize
from ..solve.spectrum import default_rtol
from .local import OutputMap, Tangent

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss of the outputs, C(x)."""

    loss: Loss  # from outputs [N, ...] to a scalar
    shape: tuple[int, ...]  # of the outputs
    target: Tensor | None  # [QN], y for C = |x − y|²/2N (2.48); None for another loss

    @classmethod
    def of(cls, y_or_loss: Tensor | Loss, network: OutputMap) -> Objective:
        """The loss for targets, or the loss itself."""
        if isinstance(y_or_loss, Tensor):
            if tuple(y_or_loss.shape) != network.shape:
                raise ValueError(
                    f"Targets should have the outputs' shape {list(network.shape)}, but have {list(y_or_loss.shape)}. For "
                    "class labels, pass F.one_hot(labels, classes)."
                )
            if not torch.isfinite(y_or_loss).all():
                raise ValueError("Targets should be finite, but have NaN or infinite entries.")
            with torch.inference_mode(False):
                y = y_or_loss.detach().clone().double()  # autograd refuses inference tensors, but not a copy
            criterion = HalfSquaredLoss()
            return cls(lambda outputs: criterion(outputs, y), network.shape, y.flatten())
        if not callable(y_or_loss):
            raise TypeError(
                f"`y_or_loss` should be targets or a function from outputs to a loss, but got {type(y_or_loss).__name__}."
            )
        return cls(y_or_loss, network.shape, None)

    def value(self, outputs: Tensor) -> float:
        """C of outputs ``[QN]``."""
        return float(self.loss(outputs.reshape(self.shape)))

    def gradient(self, outputs: Tensor) -> Tensor:
        """The gradient g = ∇ₓC at outputs ``[QN]``, float64."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = outputs.detach().clone().reshape(self.shape).requires_grad_()
            value = self.loss(leaf)
            if not isinstance(value, Tensor):
                raise TypeError(f"The loss should be a scalar tensor, but got {type(value).__name__}.")
            if value.numel() != 1:
                raise ValueError(f"The loss should be a scalar, but has shape {list(value.shape)}. Sum it or take its mean.")
            gradient = torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None
        if gradient is None:
            raise ValueError("The loss should be a differentiable function of the outputs, but has no gradient in them.")
        return gradient.flatten()

    def field(self, tangent: Tangent, alpha: float) -> Tensor:
        """V_α in parameter space, −Dᵀ[α ψ + (1−α) g] ``[K]`` (2.31)."""
        g = self.gradient(tangent.outputs)
        return -tangent.pull(alpha * tangent.solve(g) + (1 - alpha) * g if alpha else g)


@dataclass(frozen=True)
class GradientField:
    """V_α at one θ; all float64.

    Attributes:
        parameters: In parameter space, ``[K]`` (2.31), in the order of ``named_parameters()``.
        outputs: In output space, ``[N, ...]`` (2.41).
        slope: V_α·∇_θC, the rate of change of the loss along the field; never positive.
        rank: Rank of D.
        off_range: |P⊥g|/|g|.
    """

    parameters: Tensor
    outputs: Tensor
    slope: float
    rank: int
    off_range: float


def gradient_field(
    model: nn.Module,
    x: Tensor | tuple[Any, ...],
    y_or_loss: Tensor | Loss,
    alpha: float = 1.0,
    *,
    rank_rtol: float | None = None,
) -> GradientField:
    """The field V_α of Theorem 2.3 at the network's present parameters.

    V_α = −[α (DᵀD)⁺ + (1−α) 1] ∇_θC (2.31) in parameter space, and −(α 1 + (1−α) Θ) P ∇ₓC (2.41) in output space. Both are
    computed independently; D maps the first to the second (2.39). α = 0 is gradient descent (2.33), α = 1 the adapted flow
    (2.34).

    Args:
        model: The network.
        x: Input with the batch first, or a tuple of positional inputs.
        y_or_loss: Targets, for C = |x − y|²/2N (2.48), or a function from outputs to a scalar loss.
        alpha: α in [0, 1].
        rank_rtol: Singular values of D up to this times the largest count as zero; by default those that rounding can cause.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of its range, or shapes do not fit.

    Example:
        >>> model = torch.nn.Linear(2, 1).double()
        >>> field = gradient_field(model, torch.ones(1, 2).double(), torch.zeros(1, 1), alpha=1.0)
        >>> bool(torch.allclose(field.outputs, -model(torch.ones(1, 2).double())))  # straight to the target
        True
    """
    alpha = real_number("alpha", alpha, low=0.0, high=1.0)
    network = OutputMap(model, x, rank_rtol)
    objective = Objective.of(y_or_loss, network)
    tangent = network.tangent()
    g = objective.gradient(tangent.outputs)
    parameters, reached = objective.field(tangent, alpha), tangent.project(g)
    return GradientField(
        parameters=parameters,
        outputs=-(alpha * reached + (1 - alpha) * (tangent.theta @ reached)).reshape(network.shape),
        slope=float(parameters @ tangent.pull(g)),
        rank=tangent.rank,
        off_range=tangent.off_range(g),
    )


@dataclass(frozen=True)
class Equilibrium:
    """Whether θ is an equilibrium of one field V_α, and so of all (Theorem 2.3). ``bool()`` of it is the answer.

    Attributes:
        gradient: |∇_θC|, which is |V_0|.
        adapted: |V_1| = |Dᵀψ|.
        reach: |P∇ₓC|, which is |V_1| in output space (2.44).
        off_range: |P⊥∇ₓC|, which can be above zero at an equilibrium if rank D < QN.
        bound: The tolerance times |D|·|∇ₓC|; θ is an equilibrium if ``gradient`` is at most this.
    """

    gradient: float
    adapted: float
    reach: float
    off_range: float
    bound: float

    def __bool__(self) -> bool:
        """The answer."""
        return self.gradient <= self.bound


def is_equilibrium(
    model: nn.Module,
    x: Tensor | tuple[Any, ...],
    y_or_loss: Tensor | Loss,
    *,
    tolerance: float | None = None,
    rank_rtol: float | None = None,
) -> Equilibrium:
    """Whether the network's present θ is an equilibrium of the fields V_α: for all α in [0, 1] or for none (2.36), (2.44).

    Args:
        model: The network.
        x: Input with the batch first, or a tuple of positional inputs.
        y_or_loss: Targets, for C = |x − y|²/2N (2.48), or a function from outputs to a scalar loss.
        tolerance: |∇_θC| up to this times |D|·|∇ₓC| counts as zero; by default the square root of the parameters' machine
            epsilon. If |∇ₓC| = 0, the answer is yes.
        rank_rtol: Singular values of D up to this times the largest count as zero.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of its range, or shapes do not fit.

    Example:
        >>> model = torch.nn.Linear(2, 1).double()
        >>> x = torch.ones(1, 2).double()
        >>> bool(is_equilibrium(model, x, model(x).detach())), bool(is_equilibrium(model, x, torch.ones(1, 1)))
        (True, False)
    """
    network = OutputMap(model, x, rank_rtol)
    share = network.eps**0.5 if tolerance is None else real_number("tolerance", tolerance, low=0.0, below=1.0)
    objective = Objective.of(y_or_loss, network)
    tangent = network.tangent()
    g = objective.gradient(tangent.outputs)
    largest = float(torch.linalg.matrix_norm(tangent.theta, 2)) ** 0.5
    return Equilibrium(
        gradient=float(tangent.pull(g).norm()),
        adapted=float(tangent.lift(g).norm()),
        reach=float(tangent.project(g).norm()),
        off_range=float((g - tangent.project(g)).norm()),
        bound=share * largest * float(g.norm()),
    )


def metric_tensor(theta: Tensor, alpha: float, *, rank_rtol: float | None = None) -> Tensor:
    """The metric h_α for which V_α is the negative gradient: (α 1 + (1−α) Θ)⁻¹ on ran Θ (2.45)-(2.46), zero on its complement.

    Args:
        theta: Θ, ``[n, n]`` or ``[N, Q, N, Q]``.
        alpha: α in [0, 1].
        rank_rtol: Singular values of D up to this times the largest count as zero.

    Returns:
        ``[n, n]``, float64, symmetric, positive definite on ran Θ.

    Raises:
        ValueError: α or ``rank_rtol`` is out of its range, or Θ is not square or not finite.

    Example:
        >>> metric_tensor(torch.diag(torch.tensor([3.0, 0.0])), alpha=0.5)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.0000]], dtype=torch.float64)
    """
    alpha = real_number("alpha", alpha, low=0.0, high=1.0)
    rows, columns = theta.shape[: theta.ndim // 2], theta.shape[theta.ndim // 2 :]
    if theta.ndim not in (2, 4) or rows != columns:
        raise ValueError(f"`theta` should be square, [n, n] or [N, Q, N, Q], but has shape {list(theta.shape)}.")
    if not torch.isfinite(theta).all():
        raise ValueError("`theta` should be finite, but has NaN or infinite entries.")
    n = rows.numel()
    matrix = theta.reshape(n, n).double()
    cut = default_rtol(n) if rank_rtol is None else real_number("rank_rtol", rank_rtol, low=0.0, below=1.0)
    factorization = factorize(matrix, rtol=cut, method="eigh")
    projector = factorization.project(torch.eye(n, dtype=torch.float64, device=matrix.device))
    shifted = alpha * torch.eye(n).to(matrix) + (1 - alpha) * matrix
    inverse = factorization.solve(projector) if alpha == 0 else torch.linalg.solve(shifted, projector)
    metric = projector @ inverse
    return (metric + metric.T) / 2
