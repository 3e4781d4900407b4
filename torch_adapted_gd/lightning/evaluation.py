"""One evaluation of a network's collapse: outputs and features of a set of batches, in one pass or two."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..collapse.features import FeatureOptions, Head, Means, collapse_of_features
from ..collapse.labels import ClassTargets
from ..collapse.metrics import FinalLayerCollapse, NearestClassMeanAgreement, NeuralCollapse
from ..collapse.moments import ClassMoments
from ..collapse.outputs import of_classes
from .scatter import WithinScatterAlong

Figures = dict[str, Tensor]
SecondPass = Callable[[ClassMoments, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Watched:
    """What a module was given and gave, each time it was called."""

    module: nn.Module
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take calls down."""
        handle = self.module.register_forward_hook(self.take, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The hook."""
        del module
        given = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)), None)
        self.calls.append(tuple(value.detach() if isinstance(value, Tensor) else value for value in (given, output)))

    def only_call(self, name: str) -> tuple[Tensor, Tensor]:
        """Input and output of the one call since this was last asked.

        Args:
            name: Of the module, for the message.

        Raises:
            RuntimeError: There was none, or were several.
        """
        calls, self.calls = self.calls, []
        if len(calls) != 1:
            raise RuntimeError(
                f"{name} should be called once for each batch, but was called {len(calls) or 'no'} times. Name the layer that "
                "gives the outputs by `head`, or say by `step_fn` how outputs come about."
            )
        given, output = calls[0]
        if not isinstance(given, Tensor) or not isinstance(output, Tensor):
            raise RuntimeError(f"{name} should be given a tensor and give a tensor, but gave {type(output).__name__}.")
        return given, output


@dataclass(frozen=True)
class Seen:
    """A batch as the second pass needs it.

    Attributes:
        target: Classes, as the user has them.
        features: What went into the last layer.
        chosen: The class that the last layer chose, ``[B]``.
    """

    target: Tensor
    features: Tensor
    chosen: Tensor

    @property
    def nbytes(self) -> int:
        """How much it takes to keep."""
        return sum(part.nbytes for part in (self.target, self.features, self.chosen))


class Evaluation:
    """The figures of a classifier on batches, of its outputs and, if its last layer is known, of the features before it.

    Args:
        targets: The classes.
        head: The last layer, linear; None for outputs alone.
        options: Of the features' figures.
        cache_bytes: Features up to so many bytes are kept for the second pass, which otherwise runs the network again.
        one_pass: There will be no second pass: the scatter within classes is gathered in the first, and there is no NC4.
        ignore_index: Label of samples to leave out.
    """

    def __init__(
        self,
        targets: ClassTargets,
        head: nn.Linear | None,
        options: FeatureOptions,
        *,
        cache_bytes: int = 0,
        one_pass: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        self.targets = targets
        self.head = head
        self.options = options
        self.cache_bytes = cache_bytes
        self._told = False
        given = targets.values if targets.given else None
        self.outputs = FinalLayerCollapse(targets.num_classes, given, ignore_index=ignore_index)
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
        """Add a batch.

        Args:
            outputs: ``[B, ...]``.
            target: Classes.
            features: What went into the last layer; of no matter where that is not known.
        """
        self.outputs.update(outputs, target)
        if self.features is not None:
            self.features.update(features, target)

    def figures(self, second_pass: SecondPass | None = None) -> Figures:
        """What the batches of all processes say; each process has to ask.

        Args:
            second_pass: From the features' moments and directions ``[D, r]`` to the scatter within classes along them,
                ``[r]``, and the share that the nearest mean classifies differently; None without a second pass.

        Returns:
            Float64 scalars, and ``within_class`` and ``bias_class``, ``[K]``.
        """
        moments = self.outputs.synced_moments().relative_to(self.targets.values)
        result = self.outputs.compute()
        assert isinstance(result, dict)
        result |= {f"{name}_class": values for name, values in of_classes(moments).items()}
        if self.features is None or self.head is None:
            return result
        if second_pass is None:
            return result | self.features.compute(self.head.weight, self.head.bias)
        moments = self.features.synced_moments()
        means = Means.of(moments, self.options.weighting)
        if means.caveat and not self._told:
            self._told = True
            warnings.warn(means.caveat, stacklevel=2)
        found: Figures = {}

        def within_along(directions: Tensor) -> Tensor:
            along, found["nc4_mismatch"] = second_pass(moments, directions)
            return along

        head = Head.of(self.head.weight, self.head.bias, self.targets.num_classes, self.head.in_features, moments.count.device)
        result |= collapse_of_features(moments, means, self.options, self.targets, head, within_along)
        return result | found

    def run(
        self, batches: Callable[[], Iterable[Any]], step: Callable[[Any], tuple[Tensor, Tensor]], device: torch.device
    ) -> Figures:
        """Evaluate the network on batches.

        Args:
            batches: Begins a pass over them.
            step: From a batch to outputs and target.
            device: Where the network is.

        Raises:
            RuntimeError: The last layer is not called just once for a batch.
            ValueError: Outputs and targets do not fit.
        """
        self.reset(device)
        kept: list[Seen] | None = []
        size = 0
        for outputs, seen in _joined(self._pass(batches(), step)):
            self.add(outputs, seen.target, seen.features)
            if self.head is not None and kept is not None:
                size += seen.nbytes
                kept.append(seen)
                if size > self.cache_bytes:
                    kept = None

        def second_pass(moments: ClassMoments, directions: Tensor) -> tuple[Tensor, Tensor]:
            assert self.features is not None
            agreement = NearestClassMeanAgreement(moments.mean_or_nan).to(device)
            along = WithinScatterAlong(moments, directions)
            for seen in kept if kept is not None else (seen for _, seen in _joined(self._pass(batches(), step))):
                samples = self.features.read(seen.features, seen.target)
                along.update(samples.rows, samples.labels)
                agreement.update(samples.rows, seen.chosen[samples.places])
            return along.compute(), agreement.compute()

        return self.figures(second_pass)

    def _pass(self, batches: Iterable[Any], step: Callable[[Any], tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Seen]]:
        """Outputs of each batch, and what the second pass needs of it."""
        watched = Watched(self.head) if self.head is not None else None
        with watched.watching() if watched else nullcontext():
            for batch in batches:
                outputs, target = step(batch)
                if watched is None:
                    yield outputs, Seen(target, outputs, target)
                else:
                    features, logits = watched.only_call("`head`")
                    yield outputs, Seen(target, features, logits.argmax(1))


def _joined(passed: Iterable[tuple[Tensor, Seen]], most: int = 2**25) -> Iterator[tuple[Tensor, Seen]]:
    """Batches of one shape put together up to ``most`` bytes: an update of a metric costs as much as a small network."""
    pending: list[tuple[Tensor, Seen]] = []
    size = 0
    for outputs, seen in passed:
        if pending and (size > most or _shapes(*pending[0]) != _shapes(outputs, seen)):
            yield _join(pending)
            pending, size = [], 0
        pending.append((outputs, seen))
        size += outputs.nbytes + seen.nbytes
    if pending:
        yield _join(pending)


def _shapes(outputs: Tensor, seen: Seen) -> list[tuple[torch.Size, torch.dtype]]:
    return [(part.shape[1:], part.dtype) for part in (outputs, seen.target, seen.features)]


def _join(pending: list[tuple[Tensor, Seen]]) -> tuple[Tensor, Seen]:
    if len(pending) == 1:
        return pending[0]
    parts = ([outputs for outputs, _ in pending], *zip(*((s.target, s.features, s.chosen) for _, s in pending), strict=True))
    outputs, target, features, chosen = (torch.cat(list(part)) for part in parts)
    return outputs, Seen(target, features, chosen)
