"""The final layer (3.8)-(3.13): the squared distance to the class targets, split into what is within and what is between."""

import torch
from torch import Tensor

from .moments import ClassMoments

OUTPUT_KEYS = (
    "loss", "within", "bias", "gap", "within_fraction", "bias_max", "within_max", "target_accuracy", "num_samples",
    "classes_seen", "num_dropped",
)  # fmt: skip


def decompose(
    residuals: ClassMoments,
    squares: Tensor,
    hits: Tensor,
    dropped: Tensor,
    *,
    scale: float = 1.0,
    per_class: bool = False,
) -> dict[str, Tensor]:
    """C = within + bias, equation (3.11), corrected, from moments of each class.

    Args:
        residuals: Moments of x_i − y_c(i), whose scatter is that of x_i.
        squares: Σ_i |x_i − y_c(i)|² over all samples, a scalar.
        hits: How many samples are nearest to their own target.
        dropped: How many samples were left out.
        scale: Multiplies ``loss``, ``within``, ``bias`` and their values for each class.
        per_class: Add those values.

    Returns:
        Float64 scalars by the names of `OUTPUT_KEYS`; NaN where there are no samples.
    """
    count, scatter, total = residuals.count, residuals.scatter, residuals.total
    seen = count > 0
    at_least_one = count.clamp_min(1)
    distance = residuals.mean.square().sum(1)  # [K], |x̄_j − y_j|²
    loss = scale * squares / total  # 0/0 = NaN without samples
    within = scale * scatter.sum() / total
    bias = scale * torch.where(seen, count * distance, 0.0).sum() / total
    nothing = total == 0
    nan = torch.full_like(loss, torch.nan)
    result = {
        "loss": loss,
        "within": within,
        "bias": bias,
        "gap": torch.where(loss == 0, 0.0, (loss - within - bias).abs() / loss),
        "within_fraction": within / loss,
        "bias_max": torch.where(nothing, nan, torch.where(seen, distance, 0.0).max().sqrt()),
        "within_max": torch.where(nothing, nan, (scatter / at_least_one).max().sqrt()),
        "target_accuracy": torch.where(loss.isfinite(), hits.double() / total, nan),  # NaN is near to no target
        "num_samples": total.clone(),
        "classes_seen": seen.sum().double(),
        "num_dropped": dropped.double(),
    }
    if per_class:
        for name, values in of_classes(residuals).items():
            result |= {f"{name}_class_{j}": value for j, value in enumerate((scale * values).unbind())}
    return result


def of_classes(residuals: ClassMoments) -> dict[str, Tensor]:
    """``within``, (1/N_j) Σ |Δx_i|², and ``bias``, |x̄_j − y_j|², of each class, ``[K]``; NaN for a class without samples.

    Args:
        residuals: Moments of x_i − y_c(i).
    """
    seen = residuals.count > 0
    values = {"within": residuals.scatter / residuals.count, "bias": residuals.mean.square().sum(1)}
    return {name: torch.where(seen, value, torch.nan) for name, value in values.items()}
