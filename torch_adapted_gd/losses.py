"""Losses: the paper's, and any function as one that can be watched."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .checks import one_of


class HalfSquaredLoss(nn.Module):
    """The paper's squared loss C = (1/2N) |x − y|², equation (2.48).

    N counts samples, not entries: `torch.nn.MSELoss` divides by N·Q and has no ½. The output gradient is (x − y)/N, for which
    s = −N ln(1 − t) turns the adapted flow into a straight line (2.52)-(2.57).

    Args:
        reduction: ``"mean"`` over samples (the paper's, default), ``"sum"`` (½|x − y|²) or ``"none"`` (½|x_i − y_i|² for
            each sample, shape ``[N]``).

    Shape:
        Input and target ``[N, ...]``, the same; output a scalar, or ``[N]`` with ``reduction="none"``.

    Raises:
        ValueError: An unknown reduction; or, when called, input and target of different shapes.

    Example:
        >>> import torch
        >>> HalfSquaredLoss()(torch.ones(4, 3), torch.zeros(4, 3))
        tensor(1.5000)
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = one_of("reduction", reduction, ("mean", "sum", "none"))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002, the name that torch's losses use
        """The loss of outputs ``input`` against targets ``target``."""
        if input.shape != target.shape or input.ndim == 0:
            raise ValueError(
                "`input` and `target` should have the same shape with the batch first, but got "
                f"{list(input.shape)} and {list(target.shape)}. For class labels, pass F.one_hot(labels, classes).float()."
            )
        if self.reduction == "none":
            return F.mse_loss(input, target, reduction="none").reshape(input.shape[0], -1).sum(1) / 2
        total = F.mse_loss(input, target, reduction="sum") / 2
        return total / input.shape[0] if self.reduction == "mean" else total


class LossFunction(nn.Module):
    """A function as a criterion, so that `AdaptedGD` can watch it being called.

    Args:
        function: Of outputs, targets and the like, such as ``torch.nn.functional.huber_loss``; returns the loss.
        **options: Keyword arguments that it is always given.

    Raises:
        TypeError: ``function`` cannot be called.

    Example:
        >>> import torch
        >>> criterion = LossFunction(F.huber_loss, delta=0.5)
        >>> criterion(torch.ones(4), torch.zeros(4))
        tensor(0.3750)
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        if not callable(function) or isinstance(function, type):
            raise TypeError(f"`function` should be a function that returns a loss, but got {function!r}.")
        self.function, self.options = function, options

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        return self.function(*args, **{**self.options, **kwargs})

    def extra_repr(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", repr(self.function))


def check_criteria(criterion: Any) -> tuple[nn.Module, ...]:
    """The criteria as a tuple of none, one or several modules."""
    given = () if criterion is None else tuple(criterion) if isinstance(criterion, tuple | list) else (criterion,)
    for each in given:
        if not isinstance(each, nn.Module):
            if isinstance(each, type):
                advice = f"Write {each.__name__}()."
            elif callable(each):
                advice = "Write LossFunction(function), and compute the loss by that."
            else:
                advice = "For a loss that is computed otherwise leave it out."
            raise TypeError(
                f"`criterion` should be a loss module, or several in a tuple, whose calls make the loss, but got {each!r}. "
                f"{advice}"
            )
    return given
