"""The split of the squared distance between outputs and class targets into a part within classes and a part between them."""

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
    """C = within + bias, equation (3.11), corrected: the scalars that `collapse.output_collapse` describes.

    They come from the moments of x_i − y_c(i), Σ_i |x_i − y_c(i)|², and the numbers of samples that are nearest to their own
    target and that were left out.
    """
    count, total = residuals.count, residuals.total
    variance, distance = residuals.scatter / count.clamp_min(1), residuals.mean.square().sum(1)  # [K]
    loss = scale * squares / total  # 0/0 = NaN without samples
    within = scale * residuals.scatter.sum() / total
    bias = scale * (count * distance).sum() / total
    nan = torch.full_like(loss, torch.nan)
    result = {
        "loss": loss,
        "within": within,
        "bias": bias,
        "gap": torch.where(loss == 0, 0.0, (loss - within - bias).abs() / loss),
        "within_fraction": within / loss,
        "bias_max": torch.where(total == 0, nan, distance.max().sqrt()),
        "within_max": torch.where(total == 0, nan, variance.max().sqrt()),
        "target_accuracy": torch.where(loss.isfinite(), hits.double() / total, nan),  # no target is nearest to NaN
        "num_samples": total,
        "classes_seen": (count > 0).sum().double(),
        "num_dropped": dropped.double(),
    }
    if per_class:
        for name, values in (("within", variance), ("bias", distance)):
            of_classes = torch.where(count > 0, scale * values, torch.nan)
            result |= {f"{name}_class_{j}": value for j, value in enumerate(of_classes.unbind())}
    return result
