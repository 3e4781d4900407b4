"""Collapse of classes as torchmetrics: in one pass over batches, exact near collapse, the same for any number of processes.

States are float64 whatever becomes of the module that holds them, and have one merge for `update`, `forward`, ``merge_state``
and processes, in the order of ranks. Needs torchmetrics: ``pip install 'torch_adapted_gd[lightning]'``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
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

from ..checks import floating_tensor, one_of, positive_integer, real_number, true_or_false
from .features import FeatureOptions, Head, Means, collapse_of_features, mismatches
from .labels import ClassTargets, Samples, check_settings, read_samples
from .moments import ClassMoments, merge_packed
from .outputs import OUTPUT_KEYS, decompose

__all__ = ["FinalLayerCollapse", "NearestClassMeanAgreement", "NeuralCollapse"]

FULL_SCATTER_WIDTH = 2048


class Float64Metric(Metric):
    """A metric whose states stay float64, and on the CPU where the device has no float64 (MPS)."""

    is_differentiable = False
    higher_is_better: bool | None = False
    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        def keeping_the_dtype(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=tensor.device)).device
            return tensor if device.type == "mps" else tensor.to(device)

        return super()._apply(keeping_the_dtype, exclude_state)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric has gathered.

        Args:
            incoming_state: The other, or its ``metric_state``.

        Raises:
            ValueError: It is of other targets or settings.
        """
        super().merge_state(incoming_state)
        # Metric leaves both as they were: `compute` would give what it gave before, or warn that there are no data.
        self._computed = None
        self._update_count += incoming_state.update_count if isinstance(incoming_state, Metric) else 1

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot values on a log axis.

        Args:
            val: From `compute` or ``forward``, one or a list of them; by default what `compute` gives now.
            ax: Matplotlib axes to draw on; by default new ones.

        Returns:
            Figure and axes, as torchmetrics has them.
        """
        figure, axes = self._plot(val, ax)
        for one in axes.flat if hasattr(axes, "flat") else [axes]:
            one.set_yscale("log")
        return figure, axes


class _ClassMomentsMetric(Float64Metric):
    """A metric from the moments of classes, in one state with one merge."""

    values_name = "preds"

    def __init__(
        self,
        targets: ClassTargets,
        width: int,
        *,
        pooled: bool,
        ignore_index: int | None,
        nan_strategy: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_settings(ignore_index, nan_strategy)
        self.targets = targets  # not a buffer: those are cast with the module
        self.width = width
        self.pooled = pooled
        self.ignore_index = ignore_index
        self.nan_strategy = nan_strategy
        # A MetricCollection shares states that have the same names and are close, as all are near collapse.
        self._state = f"moments_{targets.digest(width, pooled, ignore_index, nan_strategy)}"
        merge = partial(merge_packed, num_classes=targets.num_classes, width=width)
        device = torch.empty(0).device  # torch.get_default_device() of torch 2.6 knows nothing of `with torch.device(…)`
        nothing = ClassMoments.zeros(targets.num_classes, width, pooled=pooled, device=device)
        self.add_state(self._state, nothing.packed(), dist_reduce_fx=merge)

    @property
    def moments(self) -> ClassMoments:
        """Of all samples so far: in this process, but for while `compute` runs."""
        return ClassMoments.unpacked(getattr(self, self._state), self.targets.num_classes, self.width)

    def synced_moments(self) -> ClassMoments:
        """Of all samples in all processes; each has to call it."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=True):
            return self.moments

    def read(self, values: Tensor, target: Tensor) -> Samples:
        """Samples of a batch that count.

        Args:
            values: What `update` takes.
            target: Their classes.
        """
        return read_samples(self.values_name, values, target, self.targets, self.width, self.ignore_index, self.nan_strategy)

    def _add(self, values: Tensor, labels: Tensor) -> None:
        state = getattr(self, self._state)
        batch = ClassMoments.of(values, labels, self.targets.num_classes, pooled=self.pooled).packed()
        both = torch.stack([state, batch.to(state.device)])
        setattr(self, self._state, merge_packed(both, self.targets.num_classes, self.width))


class FinalLayerCollapse(_ClassMomentsMetric):
    """Collapse of a classifier's outputs to the targets of their classes, (3.8)-(3.13), as `collapse.output_collapse`.

    Exact to about 1e-15, relative, down to deviations of 1e-12 beside outputs near 1; but ``bias`` has the accuracy that its
    own condition allows where class averages are much nearer to their targets than outputs are to their averages.

    Args:
        num_classes: K.
        class_targets: y_j, ``[K, d]``; by default the unit vectors e_j.
        output: ``"dict"``, or the one key that `compute` is to give, as a scalar for ``self.log`` and ``MetricCollection``.
        scale: Multiplies ``loss``, ``within`` and ``bias``: 0.5 for `HalfSquaredLoss`.
        per_class: Add ``within_class_{j}`` and ``bias_class_{j}``.
        ignore_index: Label of samples to leave out and to count in ``num_dropped``.
        nan_strategy: What becomes of samples that are not finite: ``"propagate"`` (NaN, and nothing is looked at),
            ``"error"``, or they are left out and counted, ``"warn"`` or ``"ignore"``.
        kwargs: For `torchmetrics.Metric`.

    Raises:
        TypeError: An argument is of another type.
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
        super().__init__(targets, targets.width, pooled=False, ignore_index=ignore_index, nan_strategy=nan_strategy, **kwargs)
        self.scale = real_number("scale", scale, low=0)
        self.per_class = true_or_false("per_class", per_class)
        of_classes = [f"{key}_class_{j}" for key in ("within", "bias") for j in range(targets.num_classes)] if per_class else []
        self.output = one_of("output", output, ("dict", *OUTPUT_KEYS, *of_classes))
        self.add_state("squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("hits", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("dropped", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: Outputs, ``[B, ...]`` with d entries each.
            target: Integer labels ``[B]``, one-hot rows ``[B, K]``, or rows of ``class_targets``.

        Raises:
            TypeError: These are no tensors of numbers.
            ValueError: Shapes do not agree, targets are soft or no classes, or samples are not finite with ``"error"``.
        """
        kept = self.read(preds, target)
        residuals = kept.rows - self.targets.values.to(kept.rows.device)[kept.labels]
        self._add(kept.rows, kept.labels)
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

    NC4 compares each feature vector with means that have to be known first: `NearestClassMeanAgreement`, in a second pass.

    Args:
        num_classes: K.
        num_features: D.
        cov: ``"full"`` holds the scatter within classes, D² numbers, which ``nc1_pinv`` is of; ``"trace"`` does without and
            leaves that out; ``"auto"`` is ``"full"`` for D up to 2048.
        weighting: ω_j in the mean over classes: ``"class"`` (1/K) or ``"sample"`` (N_j/N).
        rtol: Singular values of the means up to rtol times the largest count as zero.
        class_targets: y_j, ``[K, K]``, for ``hpd_lambda``; by default the unit vectors.
        hpd_lambda: λ > 0, to add the split of Han, Papyan & Donoho where `compute` is given a weight.
        ignore_index: Label of samples to leave out.
        nan_strategy: As for `FinalLayerCollapse`.
        kwargs: For `torchmetrics.Metric`.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of its range.

    Example:
        >>> metric = NeuralCollapse(num_classes=3, num_features=3)
        >>> metric.update(torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4))
        >>> float(metric.compute()["nc1_pinv"])
        0.0
    """

    values_name = "features"

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
        super().__init__(
            ClassTargets(num_classes, class_targets),
            num_features,
            pooled=pooled,
            ignore_index=ignore_index,
            nan_strategy=nan_strategy,
            compute_with_cache=False,  # what it gives depends on the weight
            **kwargs,
        )
        self.options = FeatureOptions(weighting, rtol, hpd_lambda)
        self._told = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch; gives the figures of that batch alone."""
        told, self._told = self._told, True  # a batch need not have all classes
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._told = told

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            features: h, ``[B, ...]`` with D entries each.
            target: Integer labels ``[B]`` or one-hot rows ``[B, K]``.

        Raises:
            TypeError: These are no tensors of numbers.
            ValueError: Shapes do not agree, targets are soft or no classes, or samples are not finite with ``"error"``.
        """
        kept = self.read(features, target)
        self._add(kept.rows, kept.labels)

    def compute(self, weight: Tensor | None = None, bias: Tensor | None = None) -> dict[str, Tensor]:
        """The figures of all batches.

        Args:
            weight: W of the last layer, ``[K, D]``; without it there are no ``_weights``, no NC3 and no split.
            bias: b, ``[K]``.

        Raises:
            TypeError: They are no tensors.
            ValueError: Their shapes do not fit.
        """
        moments = self.moments
        head = None
        if weight is not None:
            head = Head.of(weight, bias, self.targets.num_classes, self.width, moments.count.device)
        options = self.options if head is not None else FeatureOptions(self.options.weighting, self.options.rtol)
        along = None if moments.pooled is None else moments.within_along
        means = Means.of(moments, options.weighting)
        if means.caveat and not self._told:
            self._told = True
            warnings.warn(means.caveat, stacklevel=2)
        return collapse_of_features(moments, means, options, self.targets, head, along)

    def class_means(self) -> Tensor:
        """μ_j of all batches and processes, ``[K, D]``, NaN for a class without samples: for `NearestClassMeanAgreement`."""
        return self.synced_moments().mean_or_nan


class NearestClassMeanAgreement(Float64Metric):
    """NC4: the share of samples on which the classifier and the nearest class mean differ, argmax Wh + b ≠ argmin |h − μ_j|.

    Args:
        means: μ_j, ``[K, D]``, of the training set also where it is test samples that are classified; NaN for classes that
            have none: `NeuralCollapse.class_means` gives both.
        kwargs: For `torchmetrics.Metric`.

    Raises:
        TypeError: ``means`` is no tensor.
        ValueError: It is not two-dimensional.

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
        if not isinstance(means, Tensor):
            raise TypeError(f"`means` should be a tensor [classes, features], but got {type(means).__name__}.")
        if means.ndim != 2:
            raise ValueError(f"`means` should have shape [classes, features], but has {list(means.shape)}.")
        self.means = means.detach().cpu().double()
        self.add_state("mismatches", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")  # float: NaN stays
        self.add_state("seen", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, features: Tensor, logits: Tensor) -> None:
        """Add a batch.

        Args:
            features: h, ``[B, ...]`` with D entries each.
            logits: What the classifier says, ``[B, K]``, or the classes that it chooses, integers ``[B]``.

        Raises:
            TypeError: Features are no floating tensor, or logits no tensor.
            ValueError: Shapes do not fit.
        """
        floating_tensor("features", features)
        if not isinstance(logits, Tensor):
            raise TypeError(f"`logits` should be a tensor, but got {type(logits).__name__}.")
        classes, width = self.means.shape
        if features.ndim == 0 or features.numel() != len(features) * width:
            raise ValueError(f"`features` should have {width} entries a sample, but has shape {list(features.shape)}.")
        chosen = logits.argmax(1) if logits.shape == (len(features), classes) else logits
        if chosen.shape != (len(features),) or chosen.is_floating_point():
            raise ValueError(
                f"`logits` should have shape {[len(features), classes]}, or be classes {[len(features)]}, but has "
                f"{list(logits.shape)} and {logits.dtype}."
            )
        rows = features.detach().reshape(-1, width)
        rows = (rows.cpu() if rows.device.type == "mps" else rows).double()
        differs = mismatches(chosen.to(rows.device), rows, self.means.to(rows.device))
        self.mismatches = self.mismatches + differs.sum().to(self.mismatches.device)
        self.seen = self.seen + len(rows)

    def compute(self) -> Tensor:
        """The share of all samples; NaN without any, or where features are not finite."""
        return self.mismatches.double() / self.seen
