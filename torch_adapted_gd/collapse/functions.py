"""Collapse of classes, from whole tensors. `collapse.metrics` computes the same from batches, in any number of processes."""

import math
import warnings

import torch
from torch import Tensor

from ..checks import a_tensor, floating_tensor, real_number
from .features import FeatureOptions, Head, caveat, collapse_of_features, mismatches
from .labels import ClassTargets, SampleReader
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

    It is zero if and only if every class average is at its target and every deviation is zero (3.12)-(3.13). When outputs move
    straight to their targets, all three fall like (1 − t)². Norms are sums over the d outputs: ``loss`` is d times
    `torch.nn.functional.mse_loss`, and ``scale=0.5`` makes it `HalfSquaredLoss`.

    Args:
        preds: Outputs x_i, ``[N, ...]`` with d entries each, of any floating dtype; cast to float64 first. The rounding of
            float32 outputs near 1 makes ``within`` at least about d·1e-15.
        target: Classes: integers ``[N]``, one-hot rows ``[N, K]``, or rows of ``class_targets``.
        num_classes: K; by default d, or as many as ``class_targets`` has rows.
        class_targets: y_j, ``[K, d]``; by default the unit vectors e_j.
        scale: Multiplies ``loss``, ``within`` and ``bias``.
        per_class: Add ``within_class_{j}`` = (1/N_j) Σ |Δx_i|² and ``bias_class_{j}`` = |x̄_j − y_j|².
        ignore_index: Label of samples to leave out.
        nan_strategy: What to do with samples that are not finite: ``"propagate"`` (the result is NaN), ``"error"``, or leave
            them out, with a warning (``"warn"``) or without (``"ignore"``).

    Returns:
        Float64 scalars: ``loss``, ``within``, ``bias``; ``gap`` = |loss − within − bias|/loss, a check; ``within_fraction`` =
        within/loss, constant along straight lines to the targets; ``bias_max`` = max_j |x̄_j − y_j|; ``within_max``, the
        largest root mean square deviation of a class; ``target_accuracy``, the share of outputs that are nearest to their own
        target; ``num_samples``, ``classes_seen``, ``num_dropped``. NaN where there are no samples.

    Raises:
        TypeError: An argument has another type.
        ValueError: Shapes do not agree, targets are soft or not classes, or samples are not finite with ``"error"``.

    Example:
        >>> outputs = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.5]])
        >>> found = output_collapse(outputs, torch.tensor([0, 0, 1]))
        >>> [round(float(found[key]), 4) for key in ("loss", "within", "bias")]
        [0.1667, 0.0417, 0.125]
    """
    scale = real_number("scale", scale, low=0)
    if num_classes is None and class_targets is None:
        num_classes = math.prod(floating_tensor("preds", preds).shape[1:])
    targets = ClassTargets(num_classes, class_targets)
    kept = SampleReader("preds", targets, targets.width, ignore_index, nan_strategy)(preds, target)
    moments = ClassMoments.of(kept.rows, kept.labels, targets.num_classes, pooled=False).relative_to(targets.values)
    squares = (kept.rows - targets.values.to(kept.rows.device)[kept.labels]).square().sum()
    hits = targets.hits(kept.rows, kept.labels)
    return decompose(moments, squares, hits, kept.dropped, scale=scale, per_class=per_class)


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

    The symbols are: class means μ_j, their mean μ_G = Σ_j ω_j μ_j, the matrix M of rows μ_j − μ_G,
    Σ_W = (1/N) Σ_i (h_i − μ_c(i))(h_i − μ_c(i))ᵀ, Σ_B = Σ_j ω_j (μ_j − μ_G)(μ_j − μ_G)ᵀ, and v_j, the mean squared deviation in
    class j. Only the K' classes that have samples count; with fewer than two, NC1 to NC3 are NaN.

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

    ``_means`` has V = M, and ``_weights`` has V = W. If K' − 1 > D, NC2 and NC3 cannot reach 0, because no simplex fits.

    Args:
        features: h_i, ``[N, ...]`` with D entries each; cast to float64 first.
        target: Classes: integers ``[N]`` or one-hot rows ``[N, K]``.
        weight: W of the last layer, ``[K, D]``. ``_weights`` and NC3 need it, and so does NC4 without ``logits``.
        bias: b of the last layer, ``[K]``.
        num_classes: K; by default the rows of ``weight``, of ``class_targets``, or the largest label plus one.
        logits: The model's own outputs, ``[N, K]``, for NC4; by default Wh + b.
        weighting: ω_j: ``"class"``, 1/K' (Papyan, Han & Donoho 2020), or ``"sample"``, N_j/N, with which Σ_W + Σ_B is the
            covariance of all features. Both agree if all classes have as many samples.
        rtol: Singular values of the means up to rtol times the largest count as zero in Σ_B⁺; by default max(K', D) times
            machine epsilon.
        class_targets: y_j, ``[K, d]``, for ``hpd_lambda``; by default the unit vectors.
        hpd_lambda: λ > 0, the weight decay in the split of Han, Papyan & Donoho, which needs ``weight``.
        ignore_index: Label of samples to leave out.
        nan_strategy: As for `output_collapse`.

    Returns:
        Float64 scalars.

    Raises:
        TypeError: An argument has another type.
        ValueError: Shapes do not agree, targets are soft or not classes, or samples are not finite with ``"error"``.

    Example:
        >>> corners = torch.eye(3).repeat(4, 1)  # four samples of each class, all at its corner of a simplex
        >>> found = neural_collapse(corners, torch.arange(3).repeat(4), weight=torch.eye(3) - 1 / 3)
        >>> all(float(value) < 1e-14 for value in found.values())
        True
    """
    options = FeatureOptions(weighting, rtol, hpd_lambda)
    if num_classes is None:
        num_classes = _num_classes(weight, class_targets, target, ignore_index)
    targets = ClassTargets(num_classes, class_targets)
    width = math.prod(floating_tensor("features", features).shape[1:])
    kept = SampleReader("features", targets, width, ignore_index, nan_strategy)(features, target)
    head = Head.of(weight, bias, targets.num_classes, width, kept.rows.device)
    moments = ClassMoments.of(kept.rows, kept.labels, targets.num_classes, pooled=hpd_lambda is not None)
    if text := caveat(moments):
        warnings.warn(text, stacklevel=2)

    def within_along(directions: Tensor) -> Tensor:
        return (moments.deviations(kept.rows, kept.labels) @ directions).square().sum(0) / moments.total

    result = collapse_of_features(moments, options, targets, head, within_along)
    if logits is not None:
        shape = [len(features), targets.num_classes]
        if list(floating_tensor("logits", logits).shape) != shape:
            raise ValueError(f"`logits` should have shape {shape}, but has {list(logits.shape)}.")
        chosen = logits.argmax(1).to(kept.rows.device)[kept.places]
    elif head is not None:
        chosen = (kept.rows @ head.weight.T + head.bias).argmax(1)
    else:
        return result
    return result | {"nc4_mismatch": mismatches(chosen, kept.rows, moments.mean_or_nan).mean()}


def _num_classes(weight: Tensor | None, class_targets: Tensor | None, target: Tensor, ignore_index: int | None) -> int:
    """The number of classes where the user does not give it."""
    for given in (weight, class_targets):
        if isinstance(given, Tensor) and given.ndim:  # other values raise where they are used
            return len(given)
    if a_tensor("target", target).ndim == 2:
        return target.shape[1]
    labels = target if ignore_index is None else target[target != ignore_index]
    if labels.numel() == 0:
        raise ValueError("`num_classes` should be given where there is no `weight` and no label.")
    return max(1, int(labels.max()) + 1)
