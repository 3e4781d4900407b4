"""The check of every rule in every step: its part of Dᵀu against that of a plain backward pass."""

import torch
from torch import Tensor

from ..replay import precision
from . import rules
from .capture import Capture, exactly
from .module_calls import ModuleCall
from .products import OuterProducts


def verify_rules(capture: Capture, dtype: torch.dtype) -> tuple[dict[str, str], list[str]]:
    """Find the module calls that a rule does not serve.

    Args:
        capture: What a replay found.
        dtype: That of the parameters.

    Returns:
        The parameters that are not served and why, and what the user should know of.
    """
    unserved: dict[str, str] = {}
    remarks: list[str] = []
    norms = [p.norm() for by_name in capture.probe_products for p in by_name.values()]
    eps = precision(capture.replay.call, dtype)
    noise = 16 * eps * float(torch.stack(norms).norm()) if norms else 0.0
    for call, expected in zip(capture.module_calls, capture.probe_products, strict=True):
        why, known = None, True
        try:
            got = _products(capture, call, list(expected), dtype)
        except torch.OutOfMemoryError:
            raise
        except NotImplementedError as error:
            why = str(error)
        except Exception as error:
            # Of a rule of our own: the module was called in a way that it does not know of, such as without a batch.
            why, known = (
                f"its rule failed with {type(error).__name__}: {error}",
                call.rule.function.__module__ == rules.__name__,
            )
        else:
            share = _disagreement(got, list(expected.values()), eps, noise)
            if share and not _disagreement(got, capture.through_outputs(call, list(expected)), eps, noise):
                why = "the model's outputs depend on its derivatives, too"
            elif share:
                why, known = f"its rule differs from a backward pass by {share:.2g} of its size", False
        if why:
            for name in call.parameters.values():
                unserved.setdefault(name, f"{call}: {why}")
            if not known:
                remarks.append(f"{call}: {why}")
    return unserved, remarks


def _products(capture: Capture, call: ModuleCall, names: list[str], dtype: torch.dtype) -> list[Tensor]:
    """A module call's part of Dᵀu by its rule."""
    given = capture.apply_rule(call)
    for name in names:
        if name not in given:
            raise NotImplementedError(f"its rule gives no Jacobian of '{name}'")
    with exactly(capture.replay.probe.device):
        return [_total(given[name], dtype).reshape(call.aliases[name].shape) for name in names]


def _total(term: Tensor | OuterProducts, dtype: torch.dtype) -> Tensor:
    """Σ_nq D[n, q]."""
    return term.weighted_sum(None, dtype) if isinstance(term, OuterProducts) else term.to(dtype).sum((0, 1))


def _disagreement(got: list[Tensor], expected: list[Tensor], eps: float, noise: float) -> float:
    """How far gradients are from the expected ones, relative to their size; 0 if within rounding."""
    difference = torch.stack([(a - b.to_dense()).norm() for a, b in zip(got, expected, strict=True)]).norm()
    size = torch.stack([b.norm() for b in expected]).norm()
    return 0.0 if difference <= min(1e3 * eps, 0.05) * size + noise else float(difference / size)
