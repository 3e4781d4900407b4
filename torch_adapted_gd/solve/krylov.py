"""Θψ = Pg by preconditioned conjugate gradients: Θ is never held, only applied."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checks import one_of, positive_integer, real_number, true_or_false

PRECONDITIONERS = ("outputs", "samples", "none")
# Relative to the mean of diag Θ:
_ZERO = 1e-8  # the shift of the systems by which a singular one is solved, and the least one of the preconditioner
_ROUNDS = 30  # most of these systems
_INNER = 0.1  # of the tolerance, for these systems
_PATIENCE = 60  # iterations without progress of the residual after which a system without shift counts as singular
_RESTARTS = 3  # of the recurrence from the true residual, which rounding has taken it away from


@dataclass(frozen=True)
class ConjugateGradients:
    """Solve for steps by preconditioned conjugate gradients, for N·Q of tens or hundreds of thousands: Θ need not fit.

    Each iteration applies Θ = DDᵀ once, in float64, from the layers' factors. Neither Θ nor D is formed. Iterations end when
    |g − (Θ + λ1)ψ| ≤ ``rtol``·|g|. The predicted motion of the outputs, Θψ, is then within ``rtol``·|g| of the exact one,
    because Θ(Θ + λ1)⁻¹ shortens every vector: rtol=1e-2 sends the outputs where they should go to within 1 %.

    For λ = 0 and a singular Θ, part of g may be out of reach, and the residual cannot become small. The solver notices this
    and approaches D⁺g = lim Dᵀ(Θ + μ1)⁻¹g by iterated Tikhonov regularization: it solves repeatedly with μ = 10⁻⁸ of the
    mean of diag Θ, each time for what is left, until Θψ settles to within the tolerance. The report's status is then
    ``"rank_deficient"``: singular values of D far below √μ count as zero. A tolerance below 10⁻⁶ is beyond rounding there.
    If iterations run out, the status is ``"not_converged"``, a warning says so once, and the step uses the ψ reached so far.
    This is common for singular systems, except where inputs are simply duplicated; use damping.

    Preconditioners:

    - ``"outputs"`` (default): rotate the outputs into the eigenbasis of the mean of Θ(x_n, x_n) over samples, and for each
      of the Q rotated outputs form and factor the block of Θ between all samples, in float32. The blocks take 4 Q N² bytes (Θ
      takes 8 Q² N²). The nearest Kronecker product K ⊗ C is the special case of blocks that are multiples of one another.
      If memory is short, outputs with close eigenvalues share a block; if not even one block fits, ``"samples"`` is used.
    - ``"samples"``: Θ(x_n, x_n) of each sample, exact, and nothing between samples.
    - ``"none"``.

    Args:
        rtol: Largest relative residual |g − (Θ + λ1)ψ|/|g|.
        max_iter: Most iterations of one solution.
        preconditioner: ``"outputs"``, ``"samples"`` or ``"none"``.
        warm_start: Begin with the best multiple of the last step's ψ, if the number of outputs is the same. This costs one
            application of Θ, and helps if steps are short and samples are the same, in the same order. ψ is kept in the
            optimizer's state.

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
    """A ψ found by conjugate gradients.

    Attributes:
        psi: ψ.
        image: Θψ.
        residual: |g − (Θ + λ1)ψ|/|g|; for a singular system, how far Θψ may still be from where it settles, over |g|.
        iterations: Iterations made.
        converged: Whether the residual is within the tolerance.
        singular: Whether the system was found singular, and g to have a part out of its range.
    """

    psi: Tensor
    image: Tensor
    residual: float
    iterations: int
    converged: bool
    singular: bool = False


def solve_by_cg(
    product: Callable[[Tensor], Tensor],
    g: Tensor,
    *,
    shift: float,
    scale: float,
    precondition: Callable[[float], Callable[[Tensor], Tensor]],
    options: ConjugateGradients,
    start: Tensor | None = None,
    agreed: Callable[[float], float] = float,
) -> Iterate:
    """ψ = (Θ + λ1)⁻¹g; for λ = 0 a ψ with Dᵀψ = D⁺g.

    Args:
        product: v ↦ Θv for v ``[R]`` in float64.
        g: ``[R]``.
        shift: λ.
        scale: The mean of diag Θ.
        precondition: Makes an approximation r ↦ (Θ + μ1)⁻¹r for a μ.
        options: When to stop.
        start: Begin with a multiple of this ψ.
        agreed: Makes a number the same in all processes that solve together, because it decides when to stop.
    """
    size = float(torch.linalg.vector_norm(g))
    begin = Iterate(torch.zeros_like(g), torch.zeros_like(g), 0.0, 0, True)
    if size == 0 or scale == 0:
        return begin
    if start is not None and float(torch.linalg.vector_norm(start)):
        image = product(start)
        energy = float(start @ image) + shift * float(start @ start)
        if energy > 0:  # the multiple that is nearest to ψ in the energy: never farther than zero
            factor = float(start @ g) / energy
            begin = Iterate(factor * start, factor * image, 1.0, 1, False)
    system = _System(product, shift, precondition(max(shift, _ZERO * scale)), options.max_iter, agreed)
    found = system.solve(g, options.rtol * size, begin)
    if not (found.converged or shift > 0 or found.iterations >= options.max_iter):
        regular = replace(system, shift=_ZERO * scale)
        found = regular.solve_in_rounds(g, options.rtol * size, found.iterations)
    return replace(found, residual=found.residual / size)


@dataclass(frozen=True)
class _System:
    """(Θ + λ1)ψ = g with a preconditioner; residuals and goals are absolute here."""

    product: Callable[[Tensor], Tensor]
    shift: float
    inverse: Callable[[Tensor], Tensor]
    max_iter: int
    agreed: Callable[[float], float]

    def size(self, v: Tensor) -> float:
        """|v|, the same in all processes."""
        return self.agreed(float(torch.linalg.vector_norm(v)))

    def solve_in_rounds(self, g: Tensor, goal: float, spent: int) -> Iterate:
        """Iterated Tikhonov regularization: ψ ← ψ + (Θ + μ1)⁻¹(g − Θψ), so that Dᵀψ → D⁺g, and Θψ → Pg.

        A round counts only if its residual is small in all directions, those out of reach too: then nothing above μ was missed.
        """
        psi, image = torch.zeros_like(g), torch.zeros_like(g)
        for number in range(_ROUNDS):
            zero = Iterate(torch.zeros_like(g), torch.zeros_like(g), 0.0, spent, True)
            part = self.solve(g - image, _INNER * goal, zero)
            psi, image, spent = psi + part.psi, image + part.image, part.iterations
            moved = self.size(part.image) if number else math.inf  # what the first round moves is the step itself
            if moved <= goal or not part.converged:
                break
        left = max(moved if number else 0.0, part.residual)
        return Iterate(psi, image, left, spent, moved <= goal and part.converged, singular=True)

    def solve(self, g: Tensor, goal: float, begin: Iterate) -> Iterate:
        """Conjugate gradients until the residual is at most ``goal``.

        The true residual is tested, not that of the recurrence, which drifts away from it by rounding.
        """
        psi, image, spent = begin.psi, begin.image, begin.iterations
        residual = g - image - self.shift * psi
        left, exhausted = self.size(residual), False
        for _ in range(_RESTARTS):
            if left <= goal or exhausted:
                break
            psi, spent, exhausted = self._recur(psi, residual, goal, spent)
            image = self.product(psi)
            residual = g - image - self.shift * psi
            left = self.size(residual)
        return Iterate(psi, image, left, spent, left <= goal)

    def _recur(self, psi: Tensor, residual: Tensor, goal: float, spent: int) -> tuple[Tensor, int, bool]:
        """The recurrence from a ψ and its residual: the best ψ, the iterations spent, and whether more would be of no use."""
        descent = self.inverse(residual)
        direction = descent.clone()
        energy = float(residual @ descent)
        best, best_size = psi, float(torch.linalg.vector_norm(residual))
        lowest, since = math.inf, 0  # residuals grow at first
        while spent < self.max_iter:
            image = self.product(direction)
            if self.shift:
                image.add_(direction, alpha=self.shift)
            curvature = float(direction @ image)
            if not (curvature > 0 and energy > 0 and math.isfinite(curvature)):  # singular, as far as rounding shows it
                break
            step = energy / curvature
            psi = psi + step * direction
            residual = residual - step * image
            spent += 1
            size = self.size(residual)
            since = 0 if size < 0.99 * lowest else since + 1
            lowest = min(lowest, size)
            if size < best_size:
                best, best_size = psi, size
            if size <= goal:
                return psi, spent, False
            if self.shift == 0 and since > _PATIENCE:
                break
            descent = self.inverse(residual)
            before, energy = energy, float(residual @ descent)
            direction = descent.add_(direction, alpha=energy / before)
        return best, spent, True
