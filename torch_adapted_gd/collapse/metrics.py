"""Collapse of classes as torchmetrics: in one pass over batches, numerically stable near collapse, for any number of processes.

States are float64, also after a cast of the module that holds them. `update`, `forward`, ``merge_state`` and processes use the
same merge, in the order of ranks. Needs torchmetrics: ``pip install 'torch_adapted_gd[lightning]'``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

try:
    from torchmetrics import Metric
except Exception as error:  # RuntimeError too: torchmetrics imports torchvision, which may be for another torch
    raise ImportError(
        "torch_adapted_gd.collapse.metrics needs torchmetrics (and a torchvision, if there is one, that was built for this "
        f"torch): pip install 'torch_adapted_gd[lightning]'. It could not be imported: {error}"
    ) from error

from ..checks import a_tensor, one_of, positive_integer, real_number, true_or_false
from .features import FeatureOptions, Head, caveat, collapse_of_features, mismatches
from .labels import ClassTargets, SampleReader, Samples, float64_rows
from .moments import ClassMoments, merge_packed
from .outputs import OUTPUT_KEYS, decompose

__all__ = ["FinalLayerCollapse", "NearestClassMeanAgreement", "NeuralCollapse"]

FULL_SCATTER_WIDTH = 2048


class Float64Metric(Metric):
    """A metric whose states stay float64, and on the CPU if the device has no float64 (MPS)."""

    is_differentiable = False
    higher_is_better: bool | None = False
    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        def keeping_the_dtype(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=tensor.device)).device
            return tensor if device.type == "mps" else tensor.to(device)

        return super()._apply(keeping_the_dtype, exclude_state)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the samples of another metric, or of its ``metric_state``; a ValueError for other targets or settings."""
        super().merge_state(incoming_state)
        # Metric leaves both as they are: `compute` would return its cached value, or warn that there are no data.
        self._computed = None
        self._update_count += incoming_state.update_count if isinstance(incoming_state, Metric) else 1

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot values as ``Metric.plot`` does, on a log axis; returns figure and axes."""
        figure, axes = self._plot(val, ax)
        for one in axes.flat if hasattr(axes, "flat") else [axes]:
            one.set_yscale("log")
        return figure, axes


class _ClassMomentsMetric(Float64Metric):
    """A metric of moments of classes, which are one state with one merge."""

    def __init__(self, reader: SampleReader, *, pooled: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reader = reader  # the targets are not a buffer, because buffers are cast with the module
        self.targets, self.width, self.pooled = reader.targets, reader.width, pooled
        # A MetricCollection shares states that have the same name and are close, and near collapse all are close.
        name = self.targets.digest(self.width, pooled, reader.ignore_index, reader.nan_strategy)
        self._state = f"moments_{name}"
        device = torch.empty(0).device  # torch.get_default_device() of torch 2.6 ignores `with torch.device(…)`
        nothing = ClassMoments.zeros(self.targets.num_classes, self.width, pooled=pooled, device=device)
        merge = partial(merge_packed, num_classes=self.targets.num_classes, width=self.width)
        self.add_state(self._state, nothing.packed(), dist_reduce_fx=merge)

    @property
    def moments(self) -> ClassMoments:
        """Moments of the samples of this process; within `compute`, of all processes."""
        return ClassMoments.unpacked(getattr(self, self._state), self.targets.num_classes, self.width)

    def synced_moments(self) -> ClassMoments:
        """Moments of the samples of all processes. Each process has to call it."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=True):
            return self.moments

    def _add(self, values: Tensor, target: Tensor) -> Samples:
        """Add a batch to the moments; returns the samples that count."""
        kept = self.reader(values, target)
        batch = ClassMoments.of(kept.rows, kept.labels, self.targets.num_classes, pooled=self.pooled).packed()
        state = getattr(self, self._state)
        merged = merge_packed(torch.stack([state, batch.to(state.device)]), self.targets.num_classes, self.width)
        setattr(self, self._state, merged)
        return kept


class FinalLayerCollapse(_ClassMomentsMetric):
    """Collapse of a classifier's outputs to the targets of their classes, (3.8)-(3.13): see `collapse.output_collapse`.

    Relative errors are about 1e-15, down to deviations of 1e-12 beside outputs near 1. Only ``bias`` is less accurate where
    class averages are much nearer to their targets than outputs are to their averages, because it is ill-conditioned there.

    Args:
        num_classes: K.
        class_targets: y_j, ``[K, d]``; by default the unit vectors e_j.
        output: ``"dict"``, or one key that `compute` returns as a scalar, for ``self.log`` and ``MetricCollection``.
        scale: Multiplies ``loss``, ``within`` and ``bias``: 0.5 for `HalfSquaredLoss`.
        per_class: Add ``within_class_{j}`` and ``bias_class_{j}``.
        ignore_index: Label of samples to leave out; ``num_dropped`` counts them.
        nan_strategy: As for `collapse.output_collapse`; ``"propagate"`` checks nothing.
        kwargs: For `torchmetrics.Metric`.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of its range, or targets do not fit.

    Example:
        >>> metric = FinalLayerCollapse(num_classes=2, output="within")
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.5]]), torch.tensor([0, 0, 1]))
        >>> round(float(metric.compute()), 4)
        0.0417
    """

    squares: Tensor
    hits: Tensor
    dropped: Tensor

    def __init__(
        self,
        num_classes: int,
        class_targets: Tensor | None = None,
        *,
        output: str = "dict",
        scale: float = 1.0,
        per_class: bool = False,
        ignore_index: int | None = None,
        nan_strategy: str = "propagate",
        **kwargs: Any,
    ) -> None:
        targets = ClassTargets(num_classes, class_targets)
        super().__init__(SampleReader("preds", targets, targets.width, ignore_index, nan_strategy), pooled=False, **kwargs)
        self.scale = real_number("scale", scale, low=0)
        self.per_class = true_or_false("per_class", per_class)
        of_classes = [f"{key}_class_{j}" for key in ("within", "bias") for j in range(targets.num_classes)] if per_class else []
        self.output = one_of("output", output, ("dict", *OUTPUT_KEYS, *of_classes))
        self.add_state("squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("hits", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("dropped", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: outputs ``[B, ...]`` with d entries each, and targets, as for `collapse.output_collapse`."""
        kept = self._add(preds, target)
        residuals = kept.rows - self.targets.values.to(kept.rows.device)[kept.labels]
        self.squares = self.squares + residuals.square().sum().to(self.squares.device)
        self.hits = self.hits + self.targets.hits(kept.rows, kept.labels).to(self.hits.device)
        self.dropped = self.dropped + kept.dropped.to(self.dropped.device)

    def compute(self) -> Tensor | dict[str, Tensor]:
        """The figures of all batches: see `collapse.output_collapse`."""
        residuals = self.moments.relative_to(self.targets.values)
        result = decompose(residuals, self.squares, self.hits, self.dropped, scale=self.scale, per_class=self.per_class)
        return result if self.output == "dict" else result[self.output]


class NeuralCollapse(_ClassMomentsMetric):
    """Neural collapse of the features before the last layer, NC1 to NC3, as `collapse.neural_collapse` defines them.

    NC4 compares each feature vector with the class means, so it needs a second pass: `NearestClassMeanAgreement`.

    Args:
        num_classes: K.
        num_features: D.
        cov: ``"full"`` holds the scatter within classes, D² numbers, which ``nc1_pinv`` needs. ``"trace"`` leaves out both.
            ``"auto"`` is ``"full"`` for D up to 2048.
        weighting: ω_j in the mean over classes: ``"class"`` (1/K') or ``"sample"`` (N_j/N).
        rtol: Singular values of the means up to rtol times the largest count as zero.
        class_targets: y_j, ``[K, K]``, for ``hpd_lambda``; by default the unit vectors.
        hpd_lambda: λ > 0, to add the split of Han, Papyan & Donoho if `compute` gets a weight.
        ignore_index: Label of samples to leave out.
        nan_strategy: As for `FinalLayerCollapse`.
        kwargs: For `torchmetrics.Metric`.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of its range.

    Example:
        >>> metric = NeuralCollapse(num_classes=3, num_features=3)
        >>> metric.update(torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4))
        >>> float(metric.compute()["nc1_pinv"])
        0.0
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        *,
        cov: str = "auto",
        weighting: str = "class",
        rtol: float | None = None,
        class_targets: Tensor | None = None,
        hpd_lambda: float | None = None,
        ignore_index: int | None = None,
        nan_strategy: str = "propagate",
        **kwargs: Any,
    ) -> None:
        one_of("cov", cov, ("auto", "full", "trace"))
        positive_integer("num_features", num_features)
        if hpd_lambda is not None and cov == "trace":
            raise ValueError('`cov` should be "full" for `hpd_lambda`, which needs the whole scatter, but got "trace".')
        pooled = cov == "full" or (cov == "auto" and (num_features <= FULL_SCATTER_WIDTH or hpd_lambda is not None))
        targets = ClassTargets(num_classes, class_targets)
        super().__init__(
            SampleReader("features", targets, num_features, ignore_index, nan_strategy),
            pooled=pooled,
            compute_with_cache=False,  # the value depends on the weight
            **kwargs,
        )
        self.options = FeatureOptions(weighting, rtol, hpd_lambda)

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add a batch: features h, ``[B, ...]`` with D entries each, and targets, as for `collapse.neural_collapse`."""
        self._add(features, target)

    def compute(self, weight: Tensor | None = None, bias: Tensor | None = None) -> dict[str, Tensor]:
        """The figures of all batches. ``_weights``, NC3 and the split need W, ``[K, D]``, and b, ``[K]``, of the last layer."""
        moments = self.moments
        return self._figures_of(moments, weight, bias, None if moments.pooled is None else moments.within_along)

    def _figures_of(
        self,
        moments: ClassMoments,
        weight: Tensor | None,
        bias: Tensor | None,
        within_along: Callable[[Tensor], Tensor] | None,
    ) -> dict[str, Tensor]:
        head = Head.of(weight, bias, self.targets.num_classes, self.width, moments.count.device)
        options = self.options if head is not None else replace(self.options, hpd_lambda=None)
        if self._should_unsync and (text := caveat(moments)):  # not in `forward`: a batch need not have all classes
            warnings.warn(text, stacklevel=3)
        return collapse_of_features(moments, options, self.targets, head, within_along)

    def class_means(self) -> Tensor:
        """μ_j of all batches and processes, ``[K, D]``, NaN for a class without samples: for `NearestClassMeanAgreement`."""
        return self.synced_moments().mean_or_nan


class NearestClassMeanAgreement(Float64Metric):
    """NC4: the share of samples with argmax_j (Wh + b)_j ≠ argmin_j |h − μ_j|, so that classifier and nearest mean differ.

    Args:
        means: μ_j of the training set, ``[K, D]``, also for test samples; NaN for a class without samples. See
            `NeuralCollapse.class_means`.
        kwargs: For `torchmetrics.Metric`.

    Raises:
        TypeError: ``means`` is not a tensor.
        ValueError: ``means`` does not have two dimensions.

    Example:
        >>> metric = NearestClassMeanAgreement(torch.eye(2))
        >>> metric.update(torch.tensor([[0.9, 0.2], [0.6, 0.4]]), logits=torch.tensor([[2.0, 1.0], [0.0, 1.0]]))
        >>> float(metric.compute())
        0.5
    """

    mismatches: Tensor
    seen: Tensor

    def __init__(self, means: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if a_tensor("means", means, "[classes, features]").ndim != 2:
            raise ValueError(f"`means` should have shape [classes, features], but has {list(means.shape)}.")
        self.means = means.detach().cpu().double()
        self.add_state("mismatches", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")  # float, to keep NaN
        self.add_state("seen", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, features: Tensor, logits: Tensor) -> None:
        """Add a batch: features ``[B, ...]`` with D entries each, and outputs ``[B, K]`` or the chosen classes ``[B]``."""
        classes, width = self.means.shape
        rows = float64_rows("features", features, width)
        a_tensor("logits", logits)
        chosen = logits.argmax(1) if logits.shape == (len(features), classes) else logits
        if chosen.shape != (len(features),) or chosen.is_floating_point():
            raise ValueError(
                f"`logits` should have shape {[len(features), classes]}, or be classes {[len(features)]}, but has "
                f"{list(logits.shape)} and {logits.dtype}."
            )
        differs = mismatches(chosen.to(rows.device), rows, self.means.to(rows.device))
        self.mismatches = self.mismatches + differs.sum().to(self.mismatches.device)
        self.seen = self.seen + len(rows)

    def compute(self) -> Tensor:
        """The share of all samples; NaN without samples, or if features are not finite."""
        return self.mismatches.double() / self.seen
