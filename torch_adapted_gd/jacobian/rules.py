"""The table of rules: function → the Jacobian of its parameters, given what it was applied to and the gradients behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .generic import any_function
from .products import OuterProducts
from .uses import Use

Term = Tensor | OuterProducts
RuleFunction = Callable[[Use], Mapping[str, Term]]
SampleDims = str | int | Callable[[Any], int]


class UnsupportedError(NotImplementedError):
    """What a rule raises for a use that it does not serve: any function's way is taken then."""


@dataclass(frozen=True)
class Rule:
    """How the operands of a function are served.

    Attributes:
        function: Gives each operand's Jacobian, by its name: ``[N, Q, *operand.shape]``, or a factored one.
        names: Those of the function's arguments, in order.
        sample_dims: Which dimensions of its output can be that of the samples: the ``"first"``, ``"any"``, or an int: all but
            that many at the end; or a function of the `Note` that returns that number.
    """

    function: RuleFunction
    names: tuple[str, ...] = ()
    sample_dims: SampleDims = "first"

    def dims(self, note: Any, ndim: int) -> range:
        """The dimensions of an output of ``ndim`` that may be that of the samples."""
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
    """Register a function as the rule by which `ntk` and `AdaptedGD` serve the parameters that a function is given.

    Functions without a rule are served by their own vector-Jacobian products, which is right but slower. A rule is given one
    `Use` and returns the Jacobian of each operand that was computed from parameters, for all samples and outputs, by name:
    ``[N, Q, *operand.shape]``, or `OuterProducts` when it is a sum of outer products that need not be written out. What it
    returns is compared with a backward pass in every step, so that a wrong rule is found out and not stepped on.

    Args:
        functions: What a forward pass calls: torch's functions and methods (``torch.mul``, ``torch.Tensor.mul``), or any other
            that goes through ``__torch_function__``.
        names: The names of its arguments, in order.
        sample_dims: Which dimensions of its output may hold the samples: ``"first"`` (as for convolutions), ``"any"``, or an
            int: any but that many at the end (1 for a function that, like `torch.nn.functional.linear`, works on the last one).

    Returns:
        A decorator, which leaves the function as it is.

    Raises:
        TypeError: What is registered for cannot be called, or is a module type.
        ValueError: ``sample_dims`` is neither of these.

    Example:
        >>> import torch
        >>> @register_rule(torch.sinc, names=("input",), sample_dims="any")
        ... def sinc(use):
        ...     raise NotImplementedError  # that of a parameter does not depend on samples
    """
    for function in functions:
        if isinstance(function, type) or not callable(function):
            raise TypeError(
                f"`functions` should be functions that a forward pass calls, but got {function!r}. Rules belong to functions "
                "such as torch.nn.functional.linear, not to module types."
            )
    words = sample_dims in ("first", "any") if isinstance(sample_dims, str) else False
    if (
        not words
        and not callable(sample_dims)
        and (isinstance(sample_dims, bool) or not isinstance(sample_dims, int) or sample_dims < 0)
    ):
        raise ValueError(f"`sample_dims` should be 'first', 'any' or a whole number of at least 0, but got {sample_dims!r}.")

    def register(function: RuleFunction) -> RuleFunction:
        _TABLE.update(dict.fromkeys(functions, Rule(function, tuple(names), sample_dims)))
        return function

    return register


def rule_for(function: Callable[..., Any]) -> Rule:
    """The rule of a function; the one for any function if it has none."""
    try:
        return _TABLE.get(function, GENERIC)
    except TypeError:  # not hashable
        return GENERIC
