"""The table of rules. A rule computes the Jacobian by the parameters that a function was called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .generic import any_function
from .products import OuterProducts
from .uses import Use

Term = Tensor | OuterProducts
RuleFunction = Callable[[Use], Mapping[Any, Term]]
SampleDims = str | int | Callable[[Any], int]


class UnsupportedError(NotImplementedError):
    """Raised by a rule for a use that it does not support: the vector-Jacobian products of the function serve instead."""


@dataclass(frozen=True)
class Rule:
    """The rule of a function; see `register_rule`. ``sample_dims`` may also be a function of the `Note` that returns an int."""

    function: RuleFunction
    names: tuple[str, ...] = ()
    sample_dims: SampleDims = "first"

    def dims(self, note: Any, ndim: int) -> range:
        """The dimensions that may hold the samples, for an output with ``ndim`` dimensions."""
        if self.sample_dims == "first":
            return range(min(1, ndim))
        if self.sample_dims == "any":
            return range(ndim)
        return range(ndim - (self.sample_dims(note) if callable(self.sample_dims) else int(self.sample_dims)))


_TABLE: dict[Callable[..., Any], Rule] = {}
GENERIC = Rule(any_function, sample_dims="any")


def register_rule(
    *functions: Callable[..., Any], names: tuple[str, ...], sample_dims: SampleDims = "first"
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule: a function that computes the Jacobian by the parameters that ``functions`` are called with.

    `ntk` and `AdaptedGD` use it. A rule takes one `Use`. It returns the Jacobian by each operand that was computed from
    parameters, for all samples and outputs, by the operand's name: ``[N, Q, *operand.shape]``, or `OuterProducts` for a sum of
    outer products. Functions without a rule are served by their own vector-Jacobian products, which are exact but slower.
    Every step compares the result with a backward pass, so a wrong rule is detected, and its Jacobian is not used.

    Args:
        functions: Functions that a forward pass calls: torch's functions and methods (``torch.mul``, ``torch.Tensor.mul``), or
            any others that go through ``__torch_function__``.
        names: The names of their arguments, in order.
        sample_dims: The dimensions of the output that may hold the samples: ``"first"`` (as for convolutions), ``"any"``, or an
            int: any but that many at the end (1 for a function that works on the last one, as `torch.nn.functional.linear`).

    Returns:
        A decorator that returns the rule unchanged.

    Raises:
        TypeError: One of ``functions`` is not callable, or is a module type.
        ValueError: ``sample_dims`` is none of the above.

    Example:
        >>> import torch
        >>> @register_rule(torch.sinc, names=("input",), sample_dims="any")
        ... def sinc(use):
        ...     raise NotImplementedError  # sinc of a parameter does not depend on samples
    """
    for function in functions:
        if isinstance(function, type) or not callable(function):
            raise TypeError(
                f"`functions` should be functions that a forward pass calls, but got {function!r}. Rules belong to functions "
                "such as torch.nn.functional.linear, not to module types."
            )
    whole = isinstance(sample_dims, int) and not isinstance(sample_dims, bool) and sample_dims >= 0
    if not whole and not callable(sample_dims) and sample_dims not in ("first", "any"):
        raise ValueError(f"`sample_dims` should be 'first', 'any' or a whole number of at least 0, but got {sample_dims!r}.")

    def register(function: RuleFunction) -> RuleFunction:
        _TABLE.update(dict.fromkeys(functions, Rule(function, tuple(names), sample_dims)))
        return function

    return register


def rule_for(function: Callable[..., Any]) -> Rule:
    """The rule of a function; `GENERIC` if it has none."""
    try:
        return _TABLE.get(function, GENERIC)
    except TypeError:  # not hashable
        return GENERIC
