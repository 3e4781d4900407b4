"""The paper's loss, and the output curvature of the losses that a learning rate can be measured in."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import one_of


class HalfSquaredLoss(nn.Module):
    """The paper's squared loss C = (1/2N) |x − y|², equation (2.48).

    N counts samples, not entries: `torch.nn.MSELoss` divides by N·Q and has no ½. Its output gradient is (x − y)/N, the
    one for which s = −N ln(1 − t) turns the adapted flow into a straight line (2.52)-(2.57).

    Args:
        reduction: ``"mean"`` over samples (the paper's, default), ``"sum"`` (½|x − y|²) or ``"none"`` (½|x_i − y_i|² for
            each sample, shape ``[N]``).

    Shape:
        Input and target ``[N, ...]``, the same; output a scalar, or ``[N]`` with ``reduction="none"``.

    Raises:
        ValueError: An unknown reduction; or, when called, input and target of different shapes.

    Example:
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


Criterion = nn.MSELoss | HalfSquaredLoss | nn.CrossEntropyLoss | nn.BCEWithLogitsLoss


def check_criterion(criterion: object) -> Criterion | None:
    """Return ``criterion`` if its output curvature is known, or if it is None.

    Raises:
        TypeError: It is something else.
        ValueError: No class of a CrossEntropyLoss has a positive weight.
    """
    if criterion is not None and not isinstance(criterion, Criterion):
        raise TypeError(
            "`criterion` should be a MSELoss, HalfSquaredLoss, CrossEntropyLoss or BCEWithLogitsLoss instance, but got "
            f"{criterion!r}. For any other loss leave it out: `lr` then acts on the loss's gradient as it is."
        )
    if isinstance(criterion, nn.CrossEntropyLoss) and criterion.weight is not None and not (criterion.weight > 0).any():
        raise ValueError("`criterion` should have a positive weight for some class, but has none.")
    return criterion


def require_reduced(criterion: Criterion | None) -> None:
    """Make sure that the criterion says how its terms add up to the loss.

    Raises:
        ValueError: Its reduction is left to the user.
    """
    if criterion is not None and criterion.reduction == "none":
        raise ValueError(
            '`criterion` should have reduction "mean" or "sum" for metric="ggn", LevenbergMarquardt() and `line_search`, which '
            'need the loss itself, but has "none".'
        )


def output_curvature(criterion: Criterion, gradients: list[Tensor]) -> float:
    """Largest curvature c of a loss in its outputs: no eigenvalue of its Hessian ∇²ₓC exceeds c.

    A step of length 1/c in output space is the full Gauss–Newton step of a quadratic loss (∇²ₓC = c·1), and the longest
    one that is sure to descend for the others.

    | criterion, ``sum`` | c |
    |---|---|
    | MSELoss | 2 |
    | HalfSquaredLoss | 1 |
    | CrossEntropyLoss | ½ · largest class weight |
    | BCEWithLogitsLoss | ¼ · largest weight · max(1, largest ``pos_weight``) |

    ``mean`` divides by what the loss divides by: entries (MSELoss, BCEWithLogitsLoss), samples (HalfSquaredLoss), targets
    that are not ignored (CrossEntropyLoss; with class weights, by the least that their sum can be, or by their number if that
    is less, as for targets that are probabilities). ``none`` leaves the
    reduction to the user and counts as ``sum``.

    Args:
        criterion: The loss.
        gradients: Its gradient in one output of the model, ``[N_i, ...]`` for each call.
    """
    if isinstance(criterion, nn.MSELoss):
        curvature, divisor = 2.0, float(counted_entries(criterion, gradients))
    elif isinstance(criterion, HalfSquaredLoss):
        curvature, divisor = 1.0, float(sum(g.shape[0] for g in gradients))
    elif isinstance(criterion, nn.BCEWithLogitsLoss):
        largest = 1.0 if criterion.weight is None else float(criterion.weight.max())
        positive = 1.0 if criterion.pos_weight is None else max(1.0, float(criterion.pos_weight.max()))
        curvature, divisor = 0.25 * largest * positive, float(counted_entries(criterion, gradients))
    else:
        weight = torch.ones(1) if criterion.weight is None else criterion.weight
        curvature = 0.5 * float(weight.max())
        # A target with ignore_index, or of a class without weight, sends back exact zeros to all classes.
        targets = sum(int((g != 0).any(dim=min(1, g.ndim - 1)).sum()) for g in gradients)
        divisor = max(1, targets) * min(1.0, float(weight[weight > 0].min()))
    return curvature / divisor if criterion.reduction == "mean" else curvature


def counted_entries(criterion: Criterion, gradients: list[Tensor]) -> int:
    """How many entries of an output a criterion's mean is over: those that it was given, in whose place a gradient came back.

    Args:
        criterion: The loss, entry by entry.
        gradients: Its gradient in the output, ``[N_i, ...]`` for each call.
    """
    if getattr(criterion, "weight", None) is not None:  # a weight may be zero, and its entry counts
        return sum(g.numel() for g in gradients)
    reached = torch.stack([(g != 0).any(0) for g in gradients]).any(0)
    samples = sum(g.shape[0] for g in gradients)
    return samples * (int(reached.sum()) or reached.numel())
