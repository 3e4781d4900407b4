"""Collapse of classes in tensors that are at hand: exact, in two passes, with torch alone.

For data that come in batches, or in several processes, `collapse.metrics` has the same figures as torchmetrics.
"""

import math
import warnings

import torch
from torch import Tensor

from ..checks import floating_tensor, real_number
from .features import FeatureOptions, Head, Means, collapse_of_features, mismatches
from .labels import ClassTargets, check_settings, read_samples
from .moments import ClassMoments
from .outputs import decompose

__all__ = ["neural_collapse", "output_collapse"]


@torch.no_grad()
def output_collapse(
    preds: Tensor,
    target: Tensor,
    num_classes: int | None = None,
    class_targets: Tensor | None = None,
    *,
    scale: float = 1.0,
    per_class: bool = False,
    ignore_index: int | None = None,
    nan_strategy: str = "propagate",
) -> dict[str, Tensor]:
    """Collapse of a classifier's outputs to the targets of their classes (3.8)-(3.13).

    With class averages x̄_j (3.9), deviations Δx_i = x_i − x̄_c(i) (3.10) and y_j the target of class j, equation (3.11),
    corrected, splits the squared loss exactly:

        (1/N) Σ_i |x_i − y_c(i)|²  =  (1/N) Σ_i |Δx_i|²  +  Σ_j (N_j/N) |x̄_j − y_j|²
               loss                        within                    bias

    It is zero if and only if every class average is at its target and every deviation is zero (3.12)-(3.13); when outputs move
    straight to their targets all three fall like (1 − t)². Norms sum over the outputs: ``loss`` is d times
    `torch.nn.functional.mse_loss`, and ``scale=0.5`` makes it `HalfSquaredLoss`.

    Args:
        preds: Outputs x_i, ``[N, ...]`` with d entries each, of any floating dtype; cast to float64 before anything else. What
            was computed in float32 has been rounded: ``within`` is then not below about d·1e-15 for outputs near 1.
        target: Classes: integers ``[N]``, one-hot rows ``[N, K]``, or rows of ``class_targets``.
        num_classes: K; by default d, or as many as ``class_targets`` has rows.
        class_targets: y_j, ``[K, d]``; by default the unit vectors e_j.
        scale: Multiplies ``loss``, ``within`` and ``bias``.
        per_class: Add ``within_class_{j}`` = (1/N_j) Σ |Δx_i|² and ``bias_class_{j}`` = |x̄_j − y_j|².
        ignore_index: Label of samples to leave out.
        nan_strategy: What becomes of samples that are not finite: ``"propagate"`` (the result is NaN), ``"error"``, or they are
            left out, ``"warn"`` or ``"ignore"``.

    Returns:
        Float64 scalars: ``loss``, ``within``, ``bias``; ``gap`` = |loss − within − bias|/loss, a check; ``within_fraction`` =
        within/loss, constant along straight lines to the targets; ``bias_max`` = max_j |x̄_j − y_j|; ``within_max`` = the
        largest root mean square deviation of a class; ``target_accuracy``, the share of outputs that are nearest to their own
        target; ``num_samples``, ``classes_seen``, ``num_dropped``. NaN where there are no samples.

    Raises:
        TypeError: An argument is of another type.
        ValueError: Shapes do not agree, targets are soft or no classes, or samples are not finite with ``"error"``.

    Example:
        >>> outputs = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.5]])
        >>> found = output_collapse(outputs, torch.tensor([0, 0, 1]))
        >>> [round(float(found[key]), 4) for key in ("loss", "within", "bias")]
        [0.1667, 0.0417, 0.125]
    """
    check_settings(ignore_index, nan_strategy)
    scale = real_number("scale", scale, low=0)
    if num_classes is None and class_targets is None:
        num_classes = math.prod(floating_tensor("preds", preds).shape[1:])
    targets = ClassTargets(num_classes, class_targets)
    kept = read_samples("preds", preds, target, targets, targets.width, ignore_index, nan_strategy)
    residuals = kept.rows - targets.values.to(kept.rows.device)[kept.labels]
    return decompose(
        ClassMoments.of(kept.rows, kept.labels, targets.num_classes, pooled=False).relative_to(targets.values),
        residuals.square().sum(),
        targets.hits(kept.rows, kept.labels),
        kept.dropped,
        scale=scale,
        per_class=per_class,
    )


@torch.no_grad()
def neural_collapse(
    features: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    num_classes: int | None = None,
    *,
    logits: Tensor | None = None,
    weighting: str = "class",
    rtol: float | None = None,
    class_targets: Tensor | None = None,
    hpd_lambda: float | None = None,
    ignore_index: int | None = None,
    nan_strategy: str = "propagate",
) -> dict[str, Tensor]:
    """Neural collapse of the features h_i before a classifier's last layer: NC1 to NC4.

    With class means μ_j, their mean μ_G = Σ_j ω_j μ_j, M the rows μ_j − μ_G, Σ_W = (1/N) Σ_i (h_i − μ_c(i))(h_i − μ_c(i))ᵀ,
    Σ_B = Σ_j ω_j (μ_j − μ_G)(μ_j − μ_G)ᵀ and v_j the mean squared deviation of class j. Only classes that have samples count,
    K' of them; with fewer than two every figure is NaN.

    | key | definition | source | collapsed |
    |---|---|---|---|
    | ``nc1_pinv`` | tr(Σ_W Σ_B⁺)/K' | Papyan, Han & Donoho 2020 | 0 |
    | ``nc1_trace`` | tr Σ_W / tr Σ_B | Tirer et al. 2023 | 0 |
    | ``nc1_cdnv`` | mean over pairs of (v_i + v_j) / (2 |μ_i − μ_j|²) | Galanti et al. 2021 | 0 |
    | ``nc2_equinorm_*`` | std(|V_j|) / mean(|V_j|) | Papyan, Han & Donoho 2020 | 0 |
    | ``nc2_equiangular_*`` | standard deviation of the cosines of pairs | the same | 0 |
    | ``nc2_maxangle_*`` | mean over pairs of |cos + 1/(K'−1)| | the same | 0 |
    | ``nc2_etf_*`` | |VVᵀ/|VVᵀ| − (1 − 11ᵀ/K')/√(K'−1)|, Frobenius | Zhu et al. 2021 | 0 |
    | ``nc3`` | |W/|W| − M/|M||², Frobenius, 0..4 | Papyan, Han & Donoho 2020 | 0 |
    | ``nc3_etf`` | as ``nc2_etf``, with WMᵀ for VVᵀ | Zhu et al. 2021 | 0 |
    | ``nc4_mismatch`` | share with argmax_j (Wh + b)_j ≠ argmin_j |h − μ_j| | Papyan, Han & Donoho 2020 | 0 |
    | ``hpd_nc1`` + ``hpd_nc23`` + ``hpd_perp`` | = ½C + ½λ|[W, b]|² | Han, Papyan & Donoho 2022 | ½λ|[W, b]|² |

    ``_means`` is V = M, ``_weights`` is V = W. A simplex needs K' − 1 ≤ D: with less, NC2 and NC3 cannot reach 0.

    Args:
        features: h_i, ``[N, ...]`` with D entries each; cast to float64 before anything else.
        target: Classes: integers ``[N]`` or one-hot rows ``[N, K]``.
        weight: W of the last layer, ``[K, D]``; without it there is no ``_weights``, no NC3, and NC4 only from ``logits``.
        bias: b of the last layer, ``[K]``.
        num_classes: K; by default the rows of ``weight``, of ``class_targets``, or the largest label plus one.
        logits: The model's own outputs, ``[N, K]``, for NC4; by default Wh + b.
        weighting: ω_j: ``"class"``, 1/K' (Papyan, Han & Donoho 2020), or ``"sample"``, N_j/N, with which Σ_W + Σ_B is the
            covariance of all features. The same where classes have as many samples.
        rtol: Singular values of the means up to rtol times the largest count as zero in Σ_B⁺; by default max(K', D) times
            machine epsilon.
        class_targets: y_j, ``[K, d]``, for ``hpd_lambda``; by default the unit vectors.
        hpd_lambda: λ > 0, the weight decay of the split of Han, Papyan & Donoho, which needs ``weight``.
        ignore_index: Label of samples to leave out.
        nan_strategy: As for `output_collapse`.

    Returns:
        Float64 scalars.

    Raises:
        TypeError: An argument is of another type.
        ValueError: Shapes do not agree, targets are soft or no classes, or samples are not finite with ``"error"``.

    Example:
        >>> corners = torch.eye(3).repeat(4, 1)  # four samples of each class, all at its corner of a simplex
        >>> found = neural_collapse(corners, torch.arange(3).repeat(4), weight=torch.eye(3) - 1 / 3)
        >>> all(float(value) < 1e-14 for value in found.values())
        True
    """
    check_settings(ignore_index, nan_strategy)
    options = FeatureOptions(weighting, rtol, hpd_lambda)
    if num_classes is None:
        num_classes = _num_classes(weight, class_targets, target, ignore_index)
    targets = ClassTargets(num_classes, class_targets)
    width = math.prod(floating_tensor("features", features).shape[1:])
    kept = read_samples("features", features, target, targets, width, ignore_index, nan_strategy)
    head = None if weight is None else Head.of(weight, bias, targets.num_classes, width, kept.rows.device)
    moments = ClassMoments.of(kept.rows, kept.labels, targets.num_classes, pooled=hpd_lambda is not None)
    means = Means.of(moments, weighting)
    if means.caveat:
        warnings.warn(means.caveat, stacklevel=2)

    def within_along(directions: Tensor) -> Tensor:
        return (moments.deviations(kept.rows, kept.labels) @ directions).square().sum(0) / moments.total

    result = collapse_of_features(moments, means, options, targets, head, within_along)
    if logits is not None:
        floating_tensor("logits", logits)
    if logits is None and head is not None:
        logits = head(features.detach().to(kept.rows.device).reshape(len(features), width).double())
    if logits is not None:
        if logits.shape != (len(features), targets.num_classes):
            raise ValueError(
                f"`logits` should have shape {[len(features), targets.num_classes]}, but has {list(logits.shape)}."
            )
        chosen = logits.argmax(1).to(kept.rows.device)[kept.places]
        differs = mismatches(chosen, kept.rows, moments.mean_or_nan)
        result["nc4_mismatch"] = differs.mean()
    return result


def _num_classes(weight: Tensor | None, class_targets: Tensor | None, target: Tensor, ignore_index: int | None) -> int:
    """How many classes there are where the user does not say."""
    for given in (weight, class_targets):
        if isinstance(given, Tensor) and given.ndim:  # what is wrong with another is said where it is used
            return len(given)
    if not isinstance(target, Tensor):
        raise TypeError(f"`target` should be a tensor, but got {type(target).__name__}.")
    if target.ndim == 2:
        return target.shape[1]
    labels = target if ignore_index is None else target[target != ignore_index]
    if labels.numel() == 0:
        raise ValueError("`num_classes` should be given where `weight` is not and there are no labels to tell it by.")
    return max(1, int(labels.max()) + 1)
