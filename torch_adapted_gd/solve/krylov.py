"""Θψ = Pg by preconditioned conjugate gradients: Θ is never held, only applied."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checks import one_of, positive_integer, real_number, true_or_false

PRECONDITIONERS = ("outputs", "samples", "none")
_ZERO = 1e-8  # relative to the mean of diag Θ: the shift of the systems that a singular one is solved by
_ROUNDS = 30  # of these
_PATIENCE = 60  # iterations without any progress of the residual after which a system without shift counts as singular
_LEAST = 1e-6  # relative to that too: the least shift of the preconditioner
_INNER = 0.1  # of the tolerance, for the systems of the rounds
_AGAIN = 3  # times that the recurrence may start again from the residual itself, which rounding has taken it away from


@dataclass(frozen=True)
class ConjugateGradients:
    """Solve for steps by preconditioned conjugate gradients: N·Q of tens or hundreds of thousands, where no Θ would fit.

    An iteration applies Θ = DDᵀ once, in float64, from the layers' factors: neither Θ nor D is formed. It ends when
    r = g − (Θ + λ1)ψ is at most ``rtol``·|g|. The outputs' predicted motion Θψ is then within that of the exact one,
    because Θ(Θ + λ1)⁻¹ shortens everything. So an rtol of 1e-2 means: the outputs are sent where they should go to within
    1 % of the way. For λ = 0 and a Θ whose rank is short the right-hand side has a part out of reach, which no ψ removes from
    r. This is noticed, and D⁺g = lim Dᵀ(Θ + μ1)⁻¹g is approached by repeated solutions with μ = 10⁻⁸ of the mean of diag Θ,
    each for what the last ones left (iterated Tikhonov regularization), until Θψ settles to within the tolerance; the
    report's status is ``"rank_deficient"`` then, as singular values of D far below √μ count as zero, if there are any.
    Tolerances below 10⁻⁶ are beyond rounding there. If the iterations run out before, the report's status is
    ``"not_converged"``, a warning says so once, and the step is taken with what was reached. Singular systems often end so, if
    inputs are not simply there twice: damp.

    ``preconditioner="outputs"``, the default: outputs are turned into the basis of the eigenvectors of the mean of Θ(x_n, x_n)
    over samples, and blocks of Θ between all samples for each of these Q combinations are formed in float32 and factored. They
    take 4 Q N² bytes, where Θ would take 8 Q² N². It contains the nearest Kronecker product K ⊗ C, whose blocks are
    multiples of one another. Where memory is short, combinations with near eigenvalues share a block; where there is none for a
    single one, ``"samples"`` takes its place: Θ(x_n, x_n), exact, and nothing between samples.

    Args:
        rtol: Largest |r|/|g|.
        max_iter: Most iterations of one solution.
        preconditioner: ``"outputs"``, ``"samples"`` or ``"none"``.
        warm_start: Begin a step's solution with a multiple of the last step's ψ, the best one, if the number of outputs is the
            same. It is kept in the optimizer's state, and helps where steps are short and the samples are the same, in the same
            order. It takes one application of Θ, and other samples lose no more than that.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> solver = ConjugateGradients(rtol=1e-6)
        >>> solver.max_iter
        500
    """

    rtol: float = 1e-2
    max_iter: int = 500
    preconditioner: str = "outputs"
    warm_start: bool = True

    def __post_init__(self) -> None:
        real_number("rtol", self.rtol, low=1e-14, below=1.0)
        positive_integer("max_iter", self.max_iter)
        one_of("preconditioner", self.preconditioner, PRECONDITIONERS)
        true_or_false("warm_start", self.warm_start)


@dataclass(frozen=True)
class Iterate:
    """Where conjugate gradients have come to.

    Attributes:
        psi: ψ.
        image: Θψ.
        residual: |g − (Θ + λ1)ψ|/|g|; for a system found singular, how far Θψ may still be from where it settles, over |g|.
        iterations: Iterations made.
        converged: Whether that is within the tolerance.
        singular: Whether the system was found singular, and g to have a part out of its range.
    """

    psi: Tensor
    image: Tensor
    residual: float
    iterations: int
    converged: bool
    singular: bool = False


Product = Callable[[Tensor], Tensor]
Agreed = Callable[[float], float]


def solve_by_cg(
    product: Product,
    g: Tensor,
    *,
    shift: float,
    scale: float,
    precondition: Callable[[float], Product],
    options: ConjugateGradients,
    start: Tensor | None = None,
    agreed: Agreed = float,
) -> Iterate:
    """ψ = (Θ + λ1)⁻¹g; for λ = 0 a ψ with Dᵀψ = D⁺g.

    Args:
        product: v ↦ Θv for v ``[R]`` in float64.
        g: ``[R]``.
        shift: λ.
        scale: The mean of diag Θ.
        precondition: Makes an approximation r ↦ (Θ + μ1)⁻¹r for a μ.
        options: When to stop.
        start: A ψ to begin with a multiple of.
        agreed: Gives processes that solve together the same number, where they decide by it.
    """
    size = float(torch.linalg.vector_norm(g))
    begin = _zero(g, 0)
    if size == 0 or scale == 0:
        return begin
    if start is not None and float(torch.linalg.vector_norm(start)):
        image = product(start)
        energy = float(start @ image) + shift * float(start @ start)
        if energy > 0:  # the multiple that is nearest to ψ in the energy: never farther than zero
            factor = float(start @ g) / energy
            begin = Iterate(factor * start, factor * image, 1.0, 1, False)
    inverse = precondition(max(shift, _LEAST * scale))
    found = _iterate(product, g, shift, inverse, options.rtol * size, options.max_iter, begin, agreed)
    if found.converged or shift > 0 or found.iterations >= options.max_iter:
        return replace(found, residual=found.residual / size)
    return _in_rounds(product, g, _ZERO * scale, precondition, options, found.iterations, agreed)


def _zero(g: Tensor, spent: int) -> Iterate:
    return Iterate(torch.zeros_like(g), torch.zeros_like(g), 0.0, spent, True)


def _in_rounds(
    product: Product,
    g: Tensor,
    shift: float,
    precondition: Callable[[float], Product],
    options: ConjugateGradients,
    spent: int,
    agreed: Agreed,
) -> Iterate:
    """Iterated Tikhonov regularization: ψ ← ψ + (Θ + μ1)⁻¹(g − Θψ), so that Dᵀψ → D⁺g with Pg, and no more, reached.

    Only solutions whose residual is small in all directions count, those out of reach too: then nothing above μ was missed.
    """
    size = float(torch.linalg.vector_norm(g))
    inverse, goal = precondition(shift), _INNER * options.rtol * size
    psi, image = torch.zeros_like(g), torch.zeros_like(g)
    for number in range(_ROUNDS):
        part = _iterate(product, g - image, shift, inverse, goal, options.max_iter, _zero(g, spent), agreed)
        spent = part.iterations
        psi, image = psi + part.psi, image + part.image
        # What the first moved is the step.
        left = agreed(float(torch.linalg.vector_norm(part.image))) if number else part.residual
        settled = number > 0 and left <= options.rtol * size
        if settled or not part.converged:
            break
    left = max(left, part.residual)
    return Iterate(psi, image, left / size, spent, settled and part.converged, singular=True)


def _iterate(
    product: Product,
    g: Tensor,
    shift: float,
    inverse: Product,
    goal: float,
    limit: int,
    begin: Iterate,
    agreed: Agreed,
) -> Iterate:
    """Preconditioned conjugate gradients on (Θ + λ1)ψ = g, until the residual, not over |g| here, is at most ``goal``.

    What counts is the residual itself and not that of the recurrence, which rounding takes away from it.
    """
    psi, image, spent = begin.psi, begin.image, begin.iterations
    residual = g - image - shift * psi
    left, aim, exhausted = agreed(float(torch.linalg.vector_norm(residual))), goal, False
    for _ in range(_AGAIN):
        if left <= goal or exhausted:
            break
        psi, spent, exhausted = _recur(product, psi, residual, shift, inverse, aim, spent, limit, agreed)
        image = product(psi)
        residual = g - image - shift * psi
        left, aim = agreed(float(torch.linalg.vector_norm(residual))), 0.5 * goal
    return Iterate(psi, image, left, spent, left <= goal)


def _recur(
    product: Product,
    psi: Tensor,
    residual: Tensor,
    shift: float,
    inverse: Product,
    goal: float,
    spent: int,
    limit: int,
    agreed: Agreed,
) -> tuple[Tensor, int, bool]:
    """The recurrence from a ψ and its residual; returns the best ψ, iterations spent, and whether there is no use in more."""
    descent = inverse(residual)
    direction = descent.clone()
    energy = float(residual @ descent)
    best, best_size = psi, float(torch.linalg.vector_norm(residual))
    lowest, since = math.inf, 0  # residuals grow at first
    while spent < limit:
        image = product(direction)
        if shift:
            image.add_(direction, alpha=shift)
        curvature = float(direction @ image)
        if not (curvature > 0 and energy > 0 and math.isfinite(curvature)):  # singular, as far as rounding lets it be seen
            return best, spent, True
        step = energy / curvature
        psi = psi + step * direction
        residual = residual - step * image
        spent += 1
        size = agreed(float(torch.linalg.vector_norm(residual)))
        since = 0 if size < 0.99 * lowest else since + 1
        lowest = min(lowest, size)
        if size < best_size:
            best, best_size = psi, size
        if size <= goal:
            return psi, spent, False
        if shift == 0 and since > _PATIENCE:
            return best, spent, True
        descent = inverse(residual)
        before, energy = energy, float(residual @ descent)
        direction = descent.add_(direction, alpha=energy / before)
    return best, spent, True
