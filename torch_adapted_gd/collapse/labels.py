"""Class targets, and how a batch is read: which class each sample belongs to, and which samples are left out."""

import hashlib
import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import a_tensor, floating_tensor, one_of, positive_integer


def distances(rows: Tensor, points: Tensor) -> Tensor:
    """|x_i − p_j|, ``[B, K]``, from the differences: |x|² − 2x·p + |p|² would lose those that decide."""
    return torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")


class ClassTargets:
    """The targets y_j of K classes, ``[K, d]``, float64, on the CPU: the unit vectors, or the user's, which may repeat.

    ``first_equal``, ``[K]``, has the first class with the same target.
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
            a_tensor("class_targets", class_targets, "[classes, outputs]")
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
        self.first_equal = first[groups]
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
        """A hash of these targets and of settings that a state depends on."""
        content = self.values.numpy().tobytes() + repr((self.values.shape, settings)).encode()
        return hashlib.sha256(content).hexdigest()[:12]

    def hits(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The number of outputs ``[B, d]`` that are nearest to their own target; in a tie the lowest class is nearest."""
        same = self.first_equal.to(outputs.device)
        return (same[distances(outputs, self.values.to(outputs.device)).argmin(1)] == same[labels]).sum()

    def labels(self, target: Tensor, ignore_index: int | None = None) -> Tensor:
        """The class of each sample, ``[B]``, int64; −1 where the label is ``ignore_index``.

        Args:
            target: Integers ``[B]``; one-hot rows ``[B, K]`` of any dtype; or rows ``[B, d]`` equal to those of the class
                targets, to 1e-6 of the largest entry.
            ignore_index: Label of samples without a class.
        """
        if a_tensor("target", target).ndim == 2:
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
                f"`target` should be in 0..{self.num_classes - 1}, but has {int(target[wrong][0])}. Pass `ignore_index` to "
                "leave out samples without a label."
            )
        return labels

    def _from_rows(self, target: Tensor) -> Tensor:
        rows = target.detach().double()
        own = self.values.to(rows.device)
        readings = []
        for values, readable in ((own, self.distinct), (torch.eye(self.num_classes).to(own), self.given)):
            if readable and rows.shape[1] == values.shape[1]:
                nearest, labels = torch.cdist(rows, values, p=torch.inf).min(1)
                if rows.isfinite().all() and (nearest <= 1e-6 * values.abs().max()).all():  # cdist ignores NaN
                    readings.append(labels)
        if len(readings) == 2 and not torch.equal(*readings):
            raise ValueError(
                "`target` should have one meaning, but its rows are `class_targets` of some classes and one-hot rows of "
                "others. Pass integer labels."
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
    """The samples of a batch that count."""

    rows: Tensor  # [B', width], float64: outputs or features
    labels: Tensor  # [B']
    places: Tensor | slice  # [B'], their places in the batch, or a slice for all
    dropped: Tensor  # a scalar, the number of samples that were left out


@dataclass(frozen=True)
class SampleReader:
    """Reads batches of values and targets, as `collapse.output_collapse` describes its options."""

    name: str  # of the values, in messages
    targets: ClassTargets
    width: int  # the number of entries that each sample should have
    ignore_index: int | None
    nan_strategy: str

    def __post_init__(self) -> None:
        one_of("nan_strategy", self.nan_strategy, ("propagate", "error", "warn", "ignore"))
        if self.ignore_index is not None and (isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int)):
            raise TypeError(f"`ignore_index` should be an integer or None, but got {self.ignore_index!r}.")

    def __call__(self, values: Tensor, target: Tensor) -> Samples:
        """Read values ``[B, ...]`` of any floating dtype, and a target as `ClassTargets.labels` takes it."""
        rows = float64_rows(self.name, values, self.width)
        labels = self.targets.labels(target, self.ignore_index)
        if len(labels) != len(values):
            raise ValueError(
                f"`{self.name}` and `target` should have as many samples, but got {len(values)} and {len(labels)}."
            )
        labels = labels.to(rows.device)
        keep = labels >= 0
        if self.nan_strategy == "propagate":
            if self.ignore_index is None:
                return Samples(rows, labels, slice(None), torch.zeros((), dtype=torch.int64, device=rows.device))
        else:
            finite = torch.isfinite(rows).all(1)
            lost = int((keep & ~finite).sum())
            if lost and self.nan_strategy == "error":
                raise ValueError(f"`{self.name}` should be finite, but {lost} of {len(rows)} samples are not.")
            if lost and self.nan_strategy == "warn":
                warnings.warn(f"{lost} of {len(rows)} samples of `{self.name}` are not finite and were left out.", stacklevel=3)
            keep = keep & finite
        places = keep.nonzero().flatten()
        return Samples(rows[places], labels[places], places, (~keep).sum())


def float64_rows(name: str, values: Tensor, width: int) -> Tensor:
    """Values as ``[B, width]``, float64, cast before anything is subtracted; on the CPU where MPS has no float64."""
    floating_tensor(name, values)
    if values.ndim == 0 or (len(values) and math.prod(values.shape[1:]) != width):
        raise ValueError(
            f"`{name}` should have the batch first and {width} entries for each sample, but has shape {list(values.shape)}."
        )
    rows = values.detach().reshape(len(values), width)
    return rows.cpu().double() if rows.device.type == "mps" else rows.double()
