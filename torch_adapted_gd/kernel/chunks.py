"""Rows of Θ that are worked on at a time: some outputs of each sample of one call, and what the layers' rules make of them."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .blocks import Parts, Terms
from .capture import Capture
from .module_calls import ModuleCall


@dataclass
class Chunk:
    """Some outputs of each sample of one call: the rows (n, q) of Θ with q in ``outputs``.

    Attributes:
        capture: The replay of the call.
        number: Which of the calls it is.
        start: The row of Θ at which the call's begin.
        n: N, the samples of the call.
        q: Q, the outputs of each.
        outputs: Those in the chunk.
        unserved: Parameters that rules do not serve.
        budget: Bytes that may be kept of parts made of the module calls, if these are held.
        held: The module calls with B, where they need not be made again each time.
        kept: Parts made of these, by the place of the component, as far as they are small.
    """

    capture: Capture
    number: int
    start: int
    n: int
    q: int
    outputs: range
    unserved: Mapping[str, str]
    budget: int
    held: list[ModuleCall] | None = None
    kept: dict[int, Parts] = field(default_factory=dict)

    def module_calls(self) -> list[ModuleCall]:
        """The module calls with B."""
        return self.capture.rows(self.outputs) if self.held is None else self.held

    @property
    def shape(self) -> tuple[int, int]:
        """N and the number of outputs of each sample in the chunk."""
        return self.n, len(self.outputs)

    @property
    def whole(self) -> bool:
        """Whether it has all outputs."""
        return len(self.outputs) == self.q

    def of(self, u: Tensor) -> Tensor:
        """Its part of the rows of a vector or matrix, ``[N, len(outputs), ...]``."""
        by_sample: Tensor = u[self.start : self.start + self.n * self.q].unflatten(0, (self.n, self.q))
        return by_sample[:, self.outputs.start : self.outputs.stop]

    def components(self, calls: list[ModuleCall]) -> list[tuple[set[str], list[ModuleCall]]]:
        """Module calls that share parameters, together, with the parameters' names."""
        groups: list[tuple[set[str], list[ModuleCall]]] = []
        for call in calls:
            names, members = {name for name in call.parameters.values() if name not in self.unserved}, [call]
            if not names:
                continue
            apart = []
            for group in groups:
                if group[0] & names:
                    names, members = names | group[0], group[1] + members
                else:
                    apart.append(group)
            groups = [*apart, (names, members)]
        return groups

    def terms(self, calls: list[ModuleCall]) -> Terms:
        """What the rules give for module calls, by parameter's name in the model; only of those that are served."""
        terms: Terms = {}
        for call in calls:
            given = self.capture.apply_rule(call)
            for local, name in call.parameters.items():
                if name not in self.unserved and local in given:
                    terms.setdefault(name, []).append(given[local])
        return terms

    def parts(self, place: int, calls: list[ModuleCall]) -> Parts:
        """The same of a component, sorted; kept for the next time if it is worth the memory."""
        if place in self.kept:
            return self.kept[place]
        parts = Parts.of(self.terms(calls))
        if self.held is not None and parts.nbytes + sum(p.nbytes for p in self.kept.values()) <= self.budget:
            self.kept[place] = parts
        return parts

    def all_parts(self) -> Iterator[Parts]:
        """Those of all components, one after the other."""
        for place, (_, calls) in enumerate(self.components(self.module_calls())):
            yield self.parts(place, calls)

    def rotated(self, rotation: Tensor) -> list[ModuleCall]:
        """The module calls with B for linear combinations of its outputs.

        Args:
            rotation: ``[N, len(outputs), C]``: column c of sample n has the weights of the outputs in combination c.
        """
        calls = []
        for call in self.module_calls():
            gradients = {}
            for place, b in call.gradients.items():
                weights = rotation.to(b.dtype).transpose(1, 2)
                gradients[place] = torch.bmm(weights, b.flatten(2)).view(b.shape[0], -1, *b.shape[2:])
            calls.append(dataclasses.replace(call, gradients=gradients))
        return calls
