"""One evaluation of a network's collapse: outputs and features of a set of batches, in one pass or two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..collapse.features import FeatureOptions
from ..collapse.labels import ClassTargets, Samples
from ..collapse.metrics import FinalLayerCollapse, NearestClassMeanAgreement, NeuralCollapse
from ..collapse.moments import ClassMoments
from .batches import WatchedModule

Figures = dict[str, Tensor]
StepOnBatch = Callable[[Any], tuple[Tensor, Tensor]]


class Evaluated(NamedTuple):
    """A batch that the network has seen: outputs, targets, inputs of the last layer, and the classes ``[B]`` that it chose.

    Without a known last layer, outputs and targets stand in for the last two.
    """

    outputs: Tensor
    target: Tensor
    features: Tensor
    chosen: Tensor


class SecondPass(NearestClassMeanAgreement):
    """What needs the class means first: u_kᵀ Σ_W u_k for directions ``[D, r]``, without the D² entries of Σ_W, and NC4."""

    squares: Tensor

    def __init__(self, moments: ClassMoments, directions: Tensor) -> None:
        super().__init__(moments.mean_or_nan)
        self.moments, self.directions = moments, directions
        self.add_state("squares", directions.new_zeros(directions.shape[1]), dist_reduce_fx="sum")
        self.to(directions.device)

    def add(self, samples: Samples, chosen: Tensor) -> None:
        """Add features and their classes, and the classes ``[B]`` that the last layer chose."""
        self.update(samples.rows, chosen)
        deviations = self.moments.deviations(samples.rows, samples.labels)
        self.squares = self.squares + (deviations @ self.directions).square().sum(0)

    def compute(self) -> Tensor:
        """``[r + 1]``: the scatter along the directions, and NC4."""
        return torch.cat([self.squares / self.seen, super().compute()[None]])


class Evaluation:
    """The figures of a classifier on batches: of its outputs and, if its last layer is known, of the features before it.

    Batches are kept for the second pass up to ``cache_bytes``; beyond, the network runs again. With ``one_pass``, the first
    pass sums the scatter within classes, and there is no NC4.
    """

    def __init__(
        self,
        targets: ClassTargets,
        head: nn.Linear | None,
        options: FeatureOptions,
        *,
        cache_bytes: int,
        one_pass: bool,
        ignore_index: int | None,
    ) -> None:
        self.head = head
        self.cache_bytes = cache_bytes
        given = targets.values if targets.given else None
        self.outputs = FinalLayerCollapse(targets.num_classes, given, per_class=True, ignore_index=ignore_index)
        self.features: NeuralCollapse | None = None
        if head is not None:
            pooled = one_pass or options.hpd_lambda is not None
            self.features = NeuralCollapse(
                targets.num_classes, head.in_features, cov="auto" if pooled else "trace", hpd_lambda=options.hpd_lambda,
                weighting=options.weighting, rtol=options.rtol, class_targets=given, ignore_index=ignore_index,
            )  # fmt: skip

    def reset(self, device: torch.device) -> None:
        """Forget all batches."""
        for metric in (self.outputs, self.features):
            if metric is not None:
                metric.reset()
                metric.to(device)

    def add(self, outputs: Tensor, target: Tensor, features: Tensor) -> None:
        """Add a batch: outputs, targets, and inputs of the last layer, which are not read if it is not known."""
        self.outputs.update(outputs, target)
        if self.features is not None:
            self.features.update(features, target)

    def figures(self) -> Figures:
        """The figures of the batches that all processes added."""
        outputs: Any = self.outputs.compute()
        result: Figures = {**outputs}
        if self.features is not None and self.head is not None:
            result |= self.features.compute(self.head.weight, self.head.bias)
        return result

    def run(self, batches: Callable[[], Iterable[Any]], step: StepOnBatch, device: torch.device) -> Figures:
        """Evaluate the network, on a device, in two passes if its last layer is known.

        ``batches()`` begins a pass over the batches, and ``step`` returns outputs and target of a batch.
        """
        self.reset(device)
        kept: list[Evaluated] = []
        size = 0
        for batch in joined(self._pass(batches(), step)):
            self.add(batch.outputs, batch.target, batch.features)
            size += _nbytes(batch)
            if self.features is not None and size <= self.cache_bytes:
                kept.append(batch)
            else:
                kept.clear()
        if self.features is None or self.head is None:
            return self.figures()
        features, moments = self.features, self.features.synced_moments()
        nc4: Figures = {}

        def within_along(directions: Tensor) -> Tensor:
            second = SecondPass(moments, directions)
            for batch in kept if size <= self.cache_bytes else joined(self._pass(batches(), step)):
                samples = features.reader(batch.features, batch.target)
                second.add(samples, batch.chosen[samples.places])
            found = second.compute().reshape(-1)  # torchmetrics squeezes a single entry
            nc4["nc4_mismatch"] = found[-1]
            return found[:-1]

        outputs: Any = self.outputs.compute()
        result: Figures = {**outputs}
        return result | features._figures_of(moments, self.head.weight, self.head.bias, within_along) | nc4

    def _pass(self, batches: Iterable[Any], step: StepOnBatch) -> Iterator[Evaluated]:
        """Run the network on batches."""
        watched = None if self.head is None else WatchedModule(self.head, "`head`")
        with nullcontext() if watched is None else closing(watched):
            for batch in batches:
                if watched is None:
                    outputs, target = step(batch)
                    yield Evaluated(outputs, target, outputs, target)
                else:
                    watched.begin()
                    outputs, target = step(batch)
                    features, logits = watched.only_call()
                    yield Evaluated(outputs, target, features, logits.argmax(1))


def _nbytes(batch: Evaluated) -> int:
    return sum(part.nbytes for part in batch)


def joined(batches: Iterable[Evaluated], most: int = 2**25) -> Iterator[Evaluated]:
    """Batches joined to about ``most`` bytes, because an update of a metric costs as much as a small network."""

    def together() -> Evaluated:
        return Evaluated(*map(torch.cat, zip(*pending, strict=True))) if len(pending) > 1 else pending[0]

    pending: list[Evaluated] = []
    size = 0
    for batch in batches:
        if size > most:
            yield together()
            pending, size = [], 0
        pending.append(batch)
        size += _nbytes(batch)
    if pending:
        yield together()
