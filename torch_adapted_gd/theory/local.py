"""A network's outputs as a function of its parameters, x(θ), and its tangent at one θ: D, Θ and the projector P."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import positive_integer, real_number
from ..jacobian import Jacobian, tangent_jacobian
from ..jacobian.definition import recorded
from ..solve.choice import factorize
from ..solve.factorization import Factorization
from ..solve.spectrum import default_rtol
from ..tracking.calls import Call, underlying
from ..tracking.replay import batch_and_outputs


def equal_steps(end: float, steps: int) -> Tensor:
    """``steps`` + 1 equally spaced float64 numbers from 0 to an end; ``steps`` is checked."""
    return torch.linspace(0.0, end, positive_integer("steps", steps) + 1, dtype=torch.float64)


@dataclass(frozen=True)
class Tangent:
    """D, Θ = DDᵀ and what follows from them at one θ.

    Vectors are flat and float64: in output space ``[QN]``, sample-major (2.9); in parameter space ``[K]``, in the order of
    ``named_parameters()``.
    """

    outputs: Tensor  # x(θ)
    theta: Tensor  # [QN, QN], Θ
    factorization: Factorization  # of Θ
    jacobian: Jacobian  # D
    names: list[str]  # the parameters in θ, in order

    @property
    def rank(self) -> int:
        """Rank of D."""
        return self.factorization.rank

    def pull(self, u: Tensor) -> Tensor:
        """Dᵀu ``[K]``. For u = ∇ₓC it is the gradient ∇_θC (2.16)."""
        parts = self.jacobian.rmv(u)
        return torch.cat([parts[name].flatten().double() for name in self.names])

    def solve(self, u: Tensor) -> Tensor:
        """ψ = Θ⁺u, the solution of least norm (2.22)."""
        return self.factorization.solve(u)

    def project(self, u: Tensor) -> Tensor:
        """Pu, the part of an output motion that parameters can cause."""
        return self.factorization.project(u)

    def off_range(self, u: Tensor) -> float:
        """|P⊥u|/|u|, the relative size of the other part; 0 for u = 0."""
        size = float(u.norm())
        return float((u - self.project(u)).norm()) / size if size > 0 else 0.0

    def lift(self, u: Tensor) -> Tensor:
        """D⁺u = DᵀΘ⁺u ``[K]``, the smallest parameter motion that moves the outputs by Pu (3.1)."""
        return self.pull(self.solve(u))


class OutputMap:
    """x(θ) of a network in its present mode, on a fixed input; θ are its trainable parameters.

    Singular values of D up to rtol·σ_max count as zero, by default those that rounding of Θ can cause.
    """

    def __init__(self, model: nn.Module, x: Tensor | tuple[Any, ...], rtol: float | None = None) -> None:
        if rtol is not None:
            real_number("rank_rtol", rtol, low=0.0, below=1.0)
        self.model, self.x, self.rtol = model, x, rtol
        call, output, names = self._call()
        self.shape = tuple(output.shape)
        self.num_samples = batch_and_outputs(call)[0]
        self.num_outputs = output.numel()
        if not self.num_outputs:
            raise ValueError(f"`x` should have samples, but the outputs have shape {list(self.shape)}.")
        parameters = dict(underlying(model).named_parameters())
        self._parameters = {name: parameters[name] for name in names}
        self.num_params = sum(p.numel() for p in self._parameters.values())
        self.eps = max(torch.finfo(p.dtype).eps for p in self._parameters.values())

    def values(self) -> Tensor:
        """The network's present θ, ``[K]``, float64."""
        return torch.cat([p.detach().flatten().double() for p in self._parameters.values()])

    def read(self, argument: str, state: Mapping[str, Tensor]) -> Tensor:
        """θ from a ``state_dict``, ``[K]``, float64. Names may have the prefix of ``torch.compile`` or of data parallelism."""
        parts = []
        outer = {id(p): name for name, p in self.model.named_parameters()}
        for name, p in self._parameters.items():
            value = state.get(name, state.get(outer[id(p)]))
            if value is None or value.shape != p.shape:
                found = "none" if value is None else f"{list(value.shape)}"
                raise ValueError(f"`{argument}` should have the parameter '{name}' of shape {list(p.shape)}, but has {found}.")
            parts.append(value.detach().flatten().to(p.device).double())
        return torch.cat(parts)

    @torch.no_grad()
    def load(self, theta: Tensor) -> None:
        """Set the network's parameters to θ ``[K]``, rounded to their dtype."""
        parts = theta.split([p.numel() for p in self._parameters.values()])
        for p, part in zip(self._parameters.values(), parts, strict=True):
            p.copy_(part.view_as(p))

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Context that restores the network's parameters."""
        kept = self.values()  # float64 holds every dtype exactly
        try:
            yield
        finally:
            self.load(kept)

    def outputs(self, theta: Tensor | None = None) -> Tensor:
        """x(θ), ``[QN]``, float64; at the present θ by default. Buffers and random numbers are those of `tangent`."""
        if theta is not None:
            self.load(theta)
        return self._call()[1].flatten().double()

    def tangent(self, theta: Tensor | None = None) -> Tangent:
        """D and Θ at θ; at the present θ by default."""
        if theta is not None:
            self.load(theta)
        call, output, names = self._call()
        with torch.inference_mode(False), torch.enable_grad():
            jacobian = tangent_jacobian(self.model, [call], names)
            gram = jacobian.gram()
        # Θ is float64, but rounded as the parameters are.
        rtol = default_rtol(self.num_outputs, self.eps) if self.rtol is None else self.rtol
        factorization = factorize(gram, rtol=rtol, eps=self.eps)
        if factorization.status in ("not_finite", "not_converged"):
            raise RuntimeError(
                f"The tangent kernel is {factorization.status.replace('_', ' ')} there: the parameters have diverged."
            )
        return Tangent(output.flatten().double(), gram, factorization, jacobian, names)

    def _call(self) -> tuple[Call, Tensor, list[str]]:
        """A call of the network at its present θ, its one output, and the names of the parameters in θ."""
        with torch.inference_mode(False), torch.enable_grad():
            call, names = recorded(self.model, self.x)
        if len(call.outputs) != 1:
            raise ValueError(
                f"`model` should return one tensor here, but returns {len(call.outputs)} that depend on parameters."
            )
        (output,) = call.outputs.values()
        return call, output.detach(), names
