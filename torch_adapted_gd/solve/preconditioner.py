"""Approximations of (Θ + μ1)⁻¹ for conjugate gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..world import ALONE, World


class OutputBlockInverse:
    """Outputs in another basis, and blocks of Θ between all samples for each of the new outputs.

    With the basis V and T_c the block of its column c, (Θ + μ1)⁻¹ ≈ (1 ⊗ V) diag_c (s_c T_c + μ1)⁻¹ (1 ⊗ Vᵀ). Columns may
    share a block, each with a factor s_c of its own.

    Args:
        blocks: T ``[G, N, N]``, on and above the diagonal; the rest is used to keep factors in.
        rotation: V, ``[Q, Q]``, orthogonal, in float64.
        owner: Which block each of the Q columns uses.
        scales: s, ``[Q]``.
        world: The processes that share the blocks in turn; ``blocks`` are those of this one.
    """

    name = "output blocks"

    def __init__(self, blocks: Tensor, rotation: Tensor, owner: Sequence[int], scales: Tensor, world: World = ALONE) -> None:
        self._blocks, self._rotation, self._scales, self._world = blocks, rotation, scales, world
        numbers = range(world.rank, world.rank + len(blocks) * world.size, world.size)
        self._members = [[c for c, block in enumerate(owner) if block == number] for number in numbers]  # the columns of each
        self._diagonals = blocks.diagonal(dim1=1, dim2=2).clone()  # [G, N]: factors are written over them

    def factor(self, shift: float) -> None:
        """Make the factors for a μ, with a larger one where rounding made a block indefinite."""
        for block, diagonal, members in zip(self._blocks, self._diagonals, self._members, strict=True):
            part = shift / float(self._scales[members].mean())
            extra = 0.0
            while True:
                block.diagonal().copy_(diagonal + (part + extra))
                factor, info = torch.linalg.cholesky_ex(block, upper=True)  # reads what is on and above the diagonal alone
                if not int(info) and bool(torch.isfinite(factor.diagonal()).all()):
                    break
                numbers = torch.finfo(block.dtype)
                extra = max(4 * extra, numbers.eps * float(diagonal.mean()) + numbers.tiny)
                if not extra < numbers.max:
                    raise RuntimeError("A block of the preconditioner has no factor: Θ is not finite, or not that of a D.")
            block.triu_(1).add_(factor.mT)  # the factor is kept on and below the diagonal

    def __call__(self, r: Tensor) -> Tensor:
        """The approximation applied to r ``[N·Q]``, in float64."""
        turned = r.view(-1, len(self._scales)) @ self._rotation
        columns = (turned / self._scales).to(self._blocks.dtype).T.contiguous()  # [Q, N]
        solved = torch.zeros_like(columns)
        for block, members in zip(self._blocks, self._members, strict=True):
            half = torch.linalg.solve_triangular(block, columns[members].T, upper=False)
            solved[members] = torch.linalg.solve_triangular(block.mT, half, upper=True).T
        return (self._world.sum(solved).T.to(r.dtype) @ self._rotation.T).reshape(-1)


class SampleBlockInverse:
    """The blocks of single samples, Θ(x_n, x_n) + μ1, and nothing between samples.

    Args:
        blocks: ``[N, Q, Q]`` in float64.
    """

    name = "sample blocks"

    def __init__(self, blocks: Tensor) -> None:
        self._values, self._vectors = torch.linalg.eigh(blocks)
        self._shift = 0.0

    def factor(self, shift: float) -> None:
        """Take this μ."""
        self._shift = shift

    def __call__(self, r: Tensor) -> Tensor:
        """The approximation applied to r ``[N·Q]``."""
        by_sample = r.view(*self._values.shape, 1)
        turned = self._vectors.mT @ by_sample
        turned /= (self._values.clamp(min=0) + self._shift).unsqueeze(2).clamp(min=torch.finfo(r.dtype).tiny)
        image: Tensor = (self._vectors @ turned).reshape(-1)
        return image


Inverse = OutputBlockInverse | SampleBlockInverse


class Preconditioner:
    """An approximation for each set of rows, such as those of all calls with the same number of outputs.

    Args:
        parts: The rows of each, in slices, and the approximation; none for no preconditioner.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[slice], Inverse]]) -> None:
        self._parts = parts
        self._shift: float | None = None
        self.name = ", ".join(dict.fromkeys(inverse.name for _, inverse in parts)) or "none"

    def factor(self, shift: float) -> None:
        """Make the factors for a μ > 0, unless they are those of the last time."""
        if shift != self._shift:
            for _, inverse in self._parts:
                inverse.factor(shift)
            self._shift = shift

    def __call__(self, r: Tensor) -> Tensor:
        """About (Θ + μ1)⁻¹r."""
        result = r.clone()
        for spans, inverse in self._parts:
            image = inverse(torch.cat([r[span] for span in spans]))
            for span, part in zip(spans, image.split([span.stop - span.start for span in spans]), strict=True):
                result[span] = part
        return result
