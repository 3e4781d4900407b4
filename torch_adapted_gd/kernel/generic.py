"""The rule for modules that have none of their own: the per-sample Jacobian of the module alone."""

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .module_calls import ModuleCall

State = dict[str, Tensor]


def module_jacobian(call: ModuleCall) -> State:
    """Jacobians ``[N, Q, *parameter.shape]`` of a module's parameters: its own vector-Jacobian products, sample by sample.

    Raises:
        NotImplementedError: The module's call cannot be repeated for one sample at a time.
    """
    work = _OneAtATime(call)
    try:
        return work.vectorized()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # torch.func refuses with many types
        try:
            return work.looped()
        except (NotImplementedError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise NotImplementedError(f"its call cannot be repeated for one sample: {error}") from error


class _OneAtATime:
    """A module's call as a function of one sample."""

    def __init__(self, call: ModuleCall) -> None:
        self.call = call
        if any(layout.spread for layout in call.layouts.values()):
            raise NotImplementedError("it was given several entries for each sample as one long batch")
        (n,) = {layout.samples for layout in call.layouts.values()}
        leaves, self.structure = tree_flatten((call.args, call.kwargs))
        dtype = next(iter(call.gradients.values())).dtype  # autocast is off: inputs of a lower precision are raised to that
        leaves = [leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf for leaf in leaves]
        self.leaves = leaves
        dims = [layout.dim for layout in call.layouts.values()]
        self.dims: list[int | None] = [_sample_dim(leaf, n, dims) for leaf in leaves]
        if all(dim is None for dim in self.dims):
            raise NotImplementedError(f"none of its inputs has a dimension of the batch size {n}")
        self.samples = [leaf.movedim(dim, 0) for leaf, dim in zip(leaves, self.dims, strict=True) if dim is not None]
        everything = dict(call.module.named_parameters(remove_duplicate=False))
        self.state = {name: p.detach().clone() for name, p in everything.items()}  # which a forward pass may change
        self.moving = {name: self.state.pop(name) for name in call.parameters}
        self.gradients = tuple(call.gradients.values())  # [N, Q, ...] each
        self.reference = tuple(layout.samples_first(call.outputs[i]) for i, layout in call.layouts.items())

    def outputs(self, moving: State, *sample: Tensor) -> tuple[Tensor, ...]:
        """The outputs of one sample."""
        rest = iter(sample)
        leaves = [leaf if dim is None else next(rest).unsqueeze(dim) for leaf, dim in zip(self.leaves, self.dims, strict=True)]
        args, kwargs = tree_unflatten(leaves, self.structure)
        buffers = {name: b.clone() for name, b in self.call.buffers.items()}
        found: list[Any] = tree_leaves(
            functional_call(self.call.module, {**self.state, **moving, **buffers}, args, kwargs, tie_weights=False)
        )
        return tuple(found[i].squeeze(layout.dim) for i, layout in self.call.layouts.items())

    def vectorized(self) -> State:
        """``vmap`` over samples and outputs."""

        def of_sample(gradients: tuple[Tensor, ...], *sample: Tensor) -> tuple[State, tuple[Tensor, ...]]:
            z, pull = vjp(lambda moving: self.outputs(moving, *sample), self.moving)  # type: ignore[misc]
            given = tuple(b.to(output.dtype) for b, output in zip(gradients, z, strict=True))
            (products,) = vmap(pull)(given)
            return products, z

        jacobians, z = vmap(of_sample)(self.gradients, *self.samples)
        self._check(z)
        return jacobians

    def looped(self) -> State:
        """A forward pass for each sample, a backward pass for each of its outputs."""
        rows: list[tuple[Tensor, ...]] = []
        z: list[tuple[Tensor, ...]] = []
        with torch.enable_grad():
            for i in range(len(self.samples[0])):
                moving = {name: p.clone().requires_grad_() for name, p in self.moving.items()}
                found = self.outputs(moving, *(sample[i] for sample in self.samples))
                z.append(tuple(output.detach() for output in found))
                for q in range(self.gradients[0].shape[1]):
                    given = [b[i, q].to(output.dtype) for b, output in zip(self.gradients, found, strict=True)]
                    rows.append(
                        torch.autograd.grad(found, list(moving.values()), given, retain_graph=True, materialize_grads=True)
                    )
        self._check(tuple(torch.stack(parts) for parts in zip(*z, strict=True)))
        n, q = self.gradients[0].shape[:2]
        stacked = (torch.stack(parts).unflatten(0, (n, q)) for parts in zip(*rows, strict=True))
        return dict(zip(self.moving, stacked, strict=True))

    def _check(self, z: tuple[Tensor, ...]) -> None:
        """Compare with the outputs that the module returned in the call."""
        for got, expected in zip(z, self.reference, strict=True):
            eps = max(torch.finfo(t.dtype).eps for t in (got, expected))
            if got.shape != expected.shape or not torch.allclose(
                got.double(), expected.double(), rtol=0, atol=min(1e3 * eps, 0.05) * float(expected.abs().max())
            ):
                raise NotImplementedError(
                    "its outputs for one sample are not those for the batch (random numbers, or coupling)"
                )


def _sample_dim(leaf: Any, n: int, likely: list[int]) -> int | None:
    """The dimension of an input that holds the samples: where the outputs have them, if it has their size; else the first."""
    if not isinstance(leaf, Tensor):
        return None
    dims = [dim for dim in (*likely, *range(leaf.ndim)) if dim < leaf.ndim and leaf.shape[dim] == n]
    return dims[0] if dims else None
