"""Targets of classes, and the ways in which users write which class a sample is of."""

import hashlib
import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import floating_tensor, one_of, positive_integer

NAN_STRATEGIES = ("propagate", "error", "warn", "ignore")


class ClassTargets:
    """The target y_j of each class, and labels read against it.

    Args:
        num_classes: K; None to take it from ``class_targets``.
        class_targets: ``[K, d]``, one row a class; by default the unit vectors e_j, d = K. Rows may be equal.

    Attributes:
        values: ``[K, d]``, float64, on the CPU.
        given: Whether they are the user's own.

    Raises:
        TypeError: ``num_classes`` is not an integer, or ``class_targets`` not a tensor.
        ValueError: They do not agree, or a target is not finite.
    """

    def __init__(self, num_classes: int | None = None, class_targets: Tensor | None = None) -> None:
        if num_classes is not None:
            num_classes = positive_integer("num_classes", num_classes)
        self.given = class_targets is not None
        if class_targets is None:
            if num_classes is None:
                raise ValueError("`num_classes` should be given where `class_targets` is not.")
            self.values = torch.eye(num_classes, dtype=torch.float64, device="cpu")
        else:
            if not isinstance(class_targets, Tensor):
                raise TypeError(
                    f"`class_targets` should be a tensor [classes, outputs], but got {type(class_targets).__name__}."
                )
            if class_targets.ndim != 2 or 0 in class_targets.shape or len(class_targets) != (num_classes or len(class_targets)):
                raise ValueError(
                    f"`class_targets` should be a tensor [{num_classes or 'classes'}, outputs], a row for each class, but has "
                    f"shape {list(class_targets.shape)}."
                )
            if not torch.isfinite(class_targets).all():
                raise ValueError("`class_targets` should be finite, but has NaN or infinite entries.")
            self.values = class_targets.detach().cpu().double() + 0.0  # a copy, with 0 for −0
        groups = torch.unique(self.values, dim=0, return_inverse=True)[1]
        places = torch.arange(len(self.values), device="cpu")
        first = torch.full_like(places, len(places)).scatter_reduce_(0, groups, places, "amin")
        self.first_equal = first[groups]  # [K], the first class with the same target
        self.distinct = bool((self.first_equal == places).all())

    @property
    def num_classes(self) -> int:
        """The number of classes, K."""
        return len(self.values)

    @property
    def width(self) -> int:
        """The number of outputs, d."""
        return self.values.shape[1]

    def digest(self, *settings: object) -> str:
        """Name of these targets, and of settings that a state depends on: different for different ones."""
        content = self.values.numpy().tobytes() + repr((self.values.shape, settings)).encode()
        return hashlib.sha256(content).hexdigest()[:12]

    def hits(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """How many outputs ``[B, d]`` are nearest to their own target; of several that are as near, the lowest class counts."""
        # Differences themselves: |x|² − 2x·y + |y|² would lose those that decide.
        distances = torch.cdist(outputs, self.values.to(outputs.device), compute_mode="donot_use_mm_for_euclid_dist")
        same = self.first_equal.to(outputs.device)
        return (same[distances.argmin(1)] == same[labels]).sum()

    def labels(self, target: Tensor, ignore_index: int | None = None) -> Tensor:
        """Read the class of each sample; −1 where it has ``ignore_index`` for a label.

        Args:
            target: Integers ``[B]``; one-hot rows ``[B, K]`` of any dtype; or rows ``[B, d]`` equal to those of the class
                targets, to 1e-6 of the largest entry.
            ignore_index: Label of samples that have none.

        Returns:
            ``[B]``, int64.

        Raises:
            TypeError: ``target`` is not a tensor.
            ValueError: It is none of these: soft or mixed labels, a label that is no class, a dense prediction; or rows are of
                one class as a target and of another as one-hot.
        """
        if not isinstance(target, Tensor):
            raise TypeError(f"`target` should be a tensor, but got {type(target).__name__}.")
        if target.ndim == 2:
            return self._from_rows(target)
        if target.ndim == 1 and target.is_floating_point() and self.given and self.width == 1:
            return self._from_rows(target[:, None])
        if target.ndim != 1 or target.is_floating_point() or target.is_complex():
            raise ValueError(
                f"`target` should be integer labels [batch] or one row for each sample, but has shape {list(target.shape)} "
                f"and {target.dtype}. Flatten dense predictions to one sample for each position first."
            )
        labels = target.long()
        wrong = (labels < 0) | (labels >= self.num_classes)
        if ignore_index is not None:
            ignored = labels == ignore_index
            wrong, labels = wrong & ~ignored, torch.where(ignored, -1, labels)
        if wrong.any():
            raise ValueError(
                f"`target` should be in 0..{self.num_classes - 1}, but has {int(target[wrong][0])}. `ignore_index` leaves out "
                "samples that have no label."
            )
        return labels

    def _from_rows(self, target: Tensor) -> Tensor:
        rows = target.detach().double()
        own = self.values.to(rows.device)
        readings = []
        for values, readable in ((own, self.distinct), (torch.eye(self.num_classes).to(own), self.given)):
            if readable and rows.shape[1] == values.shape[1]:
                distance = torch.cdist(rows, values, p=torch.inf)  # [B, K]
                nearest, labels = distance.min(1)
                if rows.isfinite().all() and (nearest <= 1e-6 * values.abs().max()).all():  # cdist does not see NaN
                    readings.append(labels)
        if len(readings) == 2 and not torch.equal(*readings):
            raise ValueError(
                "`target` should be of one meaning, but its rows are those of `class_targets` of some classes and one-hot rows "
                "of others. Pass integer labels."
            )
        if readings:
            return readings[0]
        why = "" if self.distinct else " Several classes have the same target: pass integer labels."
        raise ValueError(
            "`target` should be integer labels [batch], one-hot rows, or rows equal to those of `class_targets`, but got "
            f"{target.dtype} of shape {list(target.shape)} with other rows. Soft and mixed labels have no class.{why}"
        )


@dataclass(frozen=True)
class Samples:
    """A batch in the form that moments are taken of.

    Attributes:
        rows: Outputs or features of the samples that count, ``[B', width]``, float64.
        labels: Their classes, ``[B']``.
        places: Which of the batch they are, ``[B']``, or all, as a slice.
        dropped: How many samples were left out, a scalar.
    """

    rows: Tensor
    labels: Tensor
    places: Tensor | slice
    dropped: Tensor


def read_samples(
    name: str, values: Tensor, target: Tensor, targets: ClassTargets, width: int, ignore_index: int | None, nan_strategy: str
) -> Samples:
    """Read a batch.

    Args:
        name: What the values are called in messages.
        values: Outputs or features, ``[B, ...]``, of any floating dtype; cast before anything is subtracted.
        target: Classes, as `ClassTargets.labels` reads them.
        targets: The classes.
        width: How many entries a row should have.
        ignore_index: Label of samples that are left out.
        nan_strategy: What becomes of rows that are not finite: ``"propagate"`` (NaN in the result, nothing is looked at),
            ``"error"``, ``"warn"`` and ``"ignore"`` (left out, with a warning or without).

    Raises:
        TypeError: Values are no floating tensor.
        ValueError: Shapes do not agree, labels are none, or a row is not finite with ``"error"``.
    """
    floating_tensor(name, values)
    if values.ndim == 0 or (len(values) and math.prod(values.shape[1:]) != width):
        raise ValueError(
            f"`{name}` should have the batch first and {width} entries a sample, but has shape {list(values.shape)}."
        )
    labels = targets.labels(target, ignore_index)
    if len(labels) != len(values):
        raise ValueError(f"`{name}` and `target` should be of as many samples, but got {len(values)} and {len(labels)}.")
    rows = values.detach().reshape(len(values), width)
    rows = rows.cpu().double() if rows.device.type == "mps" else rows.double()  # MPS has no float64
    labels = labels.to(rows.device)
    if ignore_index is None and nan_strategy == "propagate":
        return Samples(rows, labels, slice(None), torch.zeros((), dtype=torch.int64, device=rows.device))
    keep = labels >= 0
    if nan_strategy != "propagate":
        finite = torch.isfinite(rows).all(1)
        lost = int((keep & ~finite).sum())
        if lost and nan_strategy == "error":
            raise ValueError(f"`{name}` should be finite, but {lost} of {len(rows)} samples are not.")
        if lost and nan_strategy == "warn":
            warnings.warn(f"{lost} of {len(rows)} samples of `{name}` are not finite and were left out.", stacklevel=3)
        keep = keep & finite
    places = keep.nonzero().flatten()
    return Samples(rows[places], labels[places], places, (~keep).sum())


def check_settings(ignore_index: int | None, nan_strategy: str) -> None:
    """Make sure that what is done with odd samples is well defined.

    Raises:
        TypeError: ``ignore_index`` is no integer.
        ValueError: An unknown strategy.
    """
    one_of("nan_strategy", nan_strategy, NAN_STRATEGIES)
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        raise TypeError(f"`ignore_index` should be an integer or None, but got {ignore_index!r}.")
