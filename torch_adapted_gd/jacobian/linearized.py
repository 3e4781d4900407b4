"""Outputs whose graph is alive: the uses of parameters that they depend on, and the gradients B at these uses."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..checks import all_finite
from ..tracking.arguments import Key
from ..tracking.calls import without_autocast
from ..tracking.tape import Note
from .backward import BackwardPasses
from .normed import lengths_and_directions
from .products import SharedLeftFactor
from .rules import GENERIC, Term, rule_for
from .sources import accumulated, written
from .uses import Layout, Use

_ELEMENTS_AT_ONCE = 2**21  # entries of B from one vectorized backward pass on the CPU: about the size of its cache
_COLUMNS = 8  # with more rows for each column, columns of D are cheaper, although each takes two passes
_MADE_BYTES = 2**27  # memory for Jacobians that are kept in place of a smaller B
_PLACES = 8  # with fewer rows of D for each place of a layer, writing its Jacobian out costs much of its products
_ROW_BYTES = 2**28  # memory for rows of D that are differentiated at a time


class Linearized:
    """Outputs of one call with their graph, and the gradients B at the uses of parameters.

    Two plain backward passes come first. One with a random u gives Dᵀu, with which the Jacobians of the rules are compared.
    One with s∘u, with a factor s for each sample, shows which entries of a use belong to which sample: its gradient is scaled
    by s there. If it is not, samples interact. A tensor that was computed from parameters alone can have the samples too, such
    as an embedding of the numbers of a batch, or an expanded parameter. The operation that computed it is the use then.

    Args:
        outputs: Tensors of the graph with the samples first, ``[N, ...]`` each.
        parameters: The tensors to differentiate by, by name.
        notes: The operations with parameters that the outputs depend on.
        eps: Machine epsilon of the arithmetic, as far as the caller knows.
        dtype: The parameters' dtype.
        vectorized: Whether several backward passes may run as one.
        conditions: Returns the context for backward passes and functions.

    Attributes:
        eps: Machine epsilon of the arithmetic, from the gradients at the uses too.
        n: N.
        q: Q, the outputs of each sample.
        uses: The uses of parameters with Σ_q u_q B_q in place of B, as if Q were 1.
        probe: u, ``[NQ]`` in float64.
        probe_product: Dᵀu by a plain backward pass, by parameter, for those that the outputs depend on.
        unsupported: Parameters whose Jacobian comes from rows of D, and the reason.
        remarks: The reasons that the user should know.
        rows: These rows by parameter, ``[N, Q, numel]``.
    """

    def __init__(
        self,
        outputs: list[Tensor],
        parameters: dict[str, Tensor],
        notes: list[Note],
        *,
        eps: float,
        dtype: torch.dtype,
        vectorized: bool = True,
        conditions: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.n = n = outputs[0].shape[0]
        with torch.enable_grad():
            x = torch.cat([x.reshape(n, -1) for x in outputs], 1)
        self._passes = BackwardPasses(x, vectorized=vectorized)
        self.q, self.device = x.shape[1], x.device
        self._parameters, self._dtype, self.eps = parameters, dtype, eps
        self._conditions = conditions
        self.unsupported: dict[str, str] = {}
        self.remarks: list[str] = []
        self._faint: set[str] = set()  # parameters with gradients at a use that are no more than rounding errors
        self._hidden: set[str] = set()  # parameters without a known use
        generator = torch.Generator("cpu").manual_seed(0)  # leaves the user's random numbers alone
        probe = torch.randn(n, self.q, generator=generator, dtype=torch.float64, device="cpu").to(self.device)
        # Equal steps in random order: the ratio of two gradients gives the sample.
        self._order = torch.randperm(n, generator=generator, device="cpu").to(self.device)
        scale = (2 * self._order.double() + 1) / max(1, n) - 1  # s, [N], within (−1, 1)
        self.probe = probe.reshape(-1)
        edges = [edge for note in notes for edge in note.edges.values()]
        with self._running():
            found = self._passes.one(probe, [*parameters.values(), *edges])
            scaled = self._passes.one(probe * scale[:, None], edges)
        # If the model itself enters autocast, the dtypes of the gradients show it.
        lowest = {g.dtype for g in found if g is not None and g.is_floating_point()}
        self.eps = max(eps, *(torch.finfo(t).eps for t in lowest)) if lowest else eps
        self.probe_product = {
            name: product.to_dense() for name, product in zip(parameters, found, strict=False) if product is not None
        }
        self.uses = self._find_uses(notes, found[len(parameters) :], scaled, scale)
        with self._running(), torch.no_grad():
            self._check()
        self.rows: dict[str, Tensor] = {}
        if self.unsupported:
            self.rows = self._rows_of([name for name in parameters if name in self.unsupported])

    @property
    def elements(self) -> int:
        """Entries of the kept tensors of all uses, for one output of all samples."""
        return sum(tensor.numel() for use in self.uses for tensor in use.held.values())

    def release(self) -> None:
        """Release the graph."""
        self._passes.x = self._passes.x.detach()

    def at(self, outputs: range) -> list[Use]:
        """The uses with B for some of the Q outputs of each sample, ``[N, len(outputs), ...]``."""
        edges = [use.note.edges[place] for use in self.uses for place in use.layouts]
        if not edges:
            return []
        limit = _ELEMENTS_AT_ONCE if self.device.type == "cpu" else 2**40
        step = max(1, limit // max(1, self._entries))
        units = torch.eye(self.q, dtype=self._passes.x.dtype, device=self.device)[outputs.start : outputs.stop]
        with self._running():  # Σ_i x_iq for some q at a time
            blocks = [self._with(self._passes.many(some[:, None].repeat(1, self.n, 1), edges)) for some in units.split(step)]
        uses = []
        for parts in zip(*blocks, strict=True):  # of one use
            tensors = zip(*(part.held.values() for part in parts), strict=True)
            uses.append(parts[0].holding(torch.cat(some, 1) if len(some) > 1 else some[0] for some in tensors))
        if self._passes.vectorized and len(outputs) == self.q > 1 and not self._is_sound(uses):
            self._passes.vectorized = False
            return self.at(outputs)
        return uses

    def _with(self, gradients: list[Tensor]) -> list[Use]:
        """The uses with B for some outputs, from the gradients at their edges; or with Jacobians, see `Use.made`."""
        values, same = iter(gradients), dict[Any, Tensor]()
        uses = []
        for probed in self.uses:
            held = {}
            for place, layout in probed.layouts.items():
                b = next(values)
                key = (b.data_ptr(), b.shape, b.stride(), layout)
                if layout.places is not None or key not in same:
                    same[key] = layout.samples_first(b, 1).transpose(0, 1).to(self._dtype)
                held[place] = same[key]
            use = dataclasses.replace(probed, gradients=held, made=None)
            uses.append(use if probed.made is None else self._made(use, self.terms(use)))
        return uses

    @staticmethod
    def _made(use: Use, terms: dict[Key, Term]) -> Use:
        """A use with its Jacobians in place of B."""
        return dataclasses.replace(use, gradients={}, made={key: written(term) for key, term in terms.items()})

    def _is_better_made(self, use: Use, terms: dict[Key, Term]) -> bool:
        """Whether to keep a use's Jacobians in place of B: if they are smaller, or will be written out anyway.

        For T places and R rows, writing them out in float64 takes 2T/R times as long as multiplying them. Here it is done once,
        in the dtype of B.
        """
        if any(lengths_and_directions(source) for source in use.sources.values()):
            return False  # weight norm needs the factors
        entries = sum(term.numel() for term in terms.values())
        if 2 * entries < sum(b.numel() for b in use.gradients.values()):
            return True
        if self.q * entries * self._dtype.itemsize > _MADE_BYTES:
            return False
        for term in terms.values():
            if isinstance(term, Tensor) or _PLACES * term.left.shape[4] < self.n * self.q:
                return False
            whole = [dataclasses.replace(term, left=term.left.expand(-1, self.q, -1, -1, -1))]
            if not SharedLeftFactor(whole, whole).explicit_is_cheaper():
                return False
        return True

    def _is_sound(self, uses: list[Use]) -> bool:
        """Whether Σ_q u_q B_q agrees with the plain backward pass: some of torch's operations are wrong under vmap."""
        u = self.probe.view(self.n, 1, self.q).to(self._dtype)
        for use, probed in zip(uses, self.uses, strict=True):
            for b, expected in zip(use.held.values(), probed.held.values(), strict=True):
                expected = expected.squeeze(1)
                found = torch.bmm(u, b.reshape(self.n, self.q, -1)).view(expected.shape)
                if not self._close(found, expected, 16 * self.eps * float(b.norm())):
                    return False
        return True

    def terms(self, use: Use) -> dict[Key, Term]:
        """The Jacobians by the operands of a use, from its rule."""
        if use.made is not None:
            return dict(use.made)
        if use.rule is not GENERIC:
            try:
                return {use.key(name) if isinstance(name, str) else name: t for name, t in self._run(use).items()}
            except NotImplementedError:
                pass
        found: dict[Key, Term] = dict(self._run(dataclasses.replace(use, rule=GENERIC)))
        return found

    def _run(self, use: Use) -> dict[Any, Term]:
        with torch.no_grad(), without_autocast(self.device.type):
            if use.rule is not GENERIC:
                return dict(use.rule.function(use))
            devices = [self.device.index] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices), warnings.catch_warnings():  # a function may draw random numbers
                warnings.simplefilter("ignore")  # torch warns that vmap runs a loop
                return dict(use.rule.function(use))

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Context of backward passes, without autocast."""
        with self._conditions(), without_autocast(self.device.type):
            yield

    def _find_uses(
        self, notes: list[Note], plain: list[Tensor | None], scaled: list[Tensor | None], scale: Tensor
    ) -> list[Use]:
        """The uses among the notes, with the gradients of u. Parameters of a note that can be no use become unsupported."""
        noise = 4 * self.eps * max((float(g.norm()) for g in plain if g is not None), default=0.0)
        gradients = iter(zip(plain, scaled, strict=True))
        of_samples: set[tuple[int, int]] = set()  # outputs computed from parameters alone that have the samples
        uses = []
        for note in notes:
            both = {place: next(gradients) for place in note.edges}
            reached = {place: (a, b) for place, (a, b) in both.items() if a is not None and b is not None}
            sources = {key: source for key, source in note.sources.items() if (id(source.note), source.place) not in of_samples}
            if not reached or (not note.mixed and self.n == 1) or not any(a.numel() for a, _ in reached.values()):
                continue
            if any(a.is_complex() for a, _ in reached.values()):
                for name in {name for source in sources.values() for name in source.names} if note.mixed else ():
                    self._mark_unsupported(name, f"parameter '{name}' is used with complex numbers")
                continue
            rule = rule_for(note.function)
            if not all(len(rule.dims(note, once.ndim)) for once, _ in reached.values()):
                rule = GENERIC  # called without a batch
            layouts: dict[int, Layout] = {}
            for place, (once, twice) in reached.items():
                layout = self._layout(once, twice, scale, rule.dims(note, once.ndim), any_order=note.mixed)
                if layout is None:
                    break
                layouts[place] = layout
            if len(layouts) < len(reached):
                use = Use(GENERIC, note, sources, {})
                faint = all(float(once.norm()) <= noise for once, _ in reached.values())
                for name in use.names if note.mixed else ():
                    if faint:
                        self._faint.add(name)
                    else:
                        self._mark_unsupported(name, f"the samples of a batch interact behind {use}")
                continue
            if not note.mixed:
                of_samples |= {(id(note), place) for place in reached}
            if not sources:
                continue
            use = Use(rule, note, sources, layouts, shapes={place: note.shapes[place] for place in layouts})
            for place, layout in layouts.items():
                use.gradients[place] = layout.samples_first(reached[place][0]).unsqueeze(1).to(self._dtype)
            uses.append(use)
        return [use for use in uses if not use.names <= self.unsupported.keys()]

    def _mark_unsupported(self, name: str, why: str) -> None:
        """Let the Jacobian by a parameter come from rows of D."""
        self.unsupported.setdefault(name, why)
        if why not in self.remarks:
            self.remarks.append(why)

    def _layout(self, once: Tensor, twice: Tensor, scale: Tensor, dims: range, *, any_order: bool) -> Layout | None:
        """The layout with which ``twice`` is ``once`` times ``scale``; None if there is none."""
        for layout in Layout.candidates(once.shape, self.n, dims):
            expected = layout.samples_first(once)
            expected = expected * scale.to(expected.dtype).view(-1, *[1] * (expected.ndim - 1))
            if self._close(layout.samples_first(twice), expected):
                return layout
        for leading in range(1, len(dims) + 1) if any_order else ():
            places = self._places(once.flatten(0, leading - 1), twice.flatten(0, leading - 1), scale)
            if places is not None:
                return Layout(0, self.n, places=places, leading=leading)
        return None

    def _places(self, once: Tensor, twice: Tensor, scale: Tensor) -> Tensor | None:
        """The places of each sample along the first dimension, ``[N, S]``, −1 for none; None if a place has several samples."""
        if not once.numel():
            return None
        once, twice = (t.reshape(len(t), -1) for t in (once, twice))
        if not all_finite(once) or not all_finite(twice) or 80 * self.n * self.eps > 1:
            return None  # also if rounding hides the step of s
        size, strongest = once.abs().max(1)
        rows = torch.arange(len(once), device=self.device)
        there = size > max(self.eps * float(size.max()) / len(once), torch.finfo(once.dtype).tiny)
        ratio = twice[rows, strongest].double() / torch.where(there, once[rows, strongest].double(), 1.0)
        step = ((ratio + 1) * self.n - 1) / 2
        rank = step.round().clamp(0, self.n - 1).long()
        owner = torch.argsort(self._order)[rank]
        expected = once * scale[owner].to(once.dtype)[:, None]
        if not self._close(twice[there], expected[there]) or bool(((step - rank).abs() > 0.1)[there].any()):
            return None
        owner = torch.where(there, owner, self.n)
        order = torch.argsort(owner, stable=True)
        counts = torch.bincount(owner, minlength=self.n + 1)[: self.n]
        width = max(1, int(counts.max()))
        if width * self.n > 8 * len(once) + self.n:  # nearly all would be empty
            return None
        places = torch.full((self.n, width), -1, dtype=torch.long, device=self.device)
        sorted_owner = owner[order]
        starts = counts.cumsum(0) - counts
        kept = sorted_owner < self.n
        column = torch.arange(len(order), device=self.device)[kept] - starts[sorted_owner[kept]]
        places[sorted_owner[kept], column] = order[kept]
        return places

    def _close(self, found: Tensor, expected: Tensor, noise: float = 0.0) -> bool:
        # Numbers that are not finite pass: the step reports them.
        apart, size = (float(torch.linalg.vector_norm(t)) for t in (found - expected, expected))
        return not apart > min(1e3 * self.eps, 0.05) * size + noise

    def _check(self) -> None:
        """Compare Dᵀu by the rules with the backward pass; parameters for which they differ become unsupported."""
        terms = [(use, self.terms(use)) for use in self.uses]
        total = accumulated(terms, self._parameters, self._dtype)
        self._entries = self.elements
        self.uses = [self._made(use, found) if self._is_better_made(use, found) else use for use, found in terms]
        whole = math.hypot(*(float(product.norm()) for product in self.probe_product.values()))
        for name, p in self._parameters.items():
            expected = self.probe_product.get(name)
            got = total.get(name)
            if name in self.unsupported or (expected is None and got is None):
                continue
            expected = (
                torch.zeros(p.shape, dtype=self._dtype, device=self.device) if expected is None else expected.to(self._dtype)
            )
            difference = expected.reshape(-1) if got is None else got.sub_(expected.reshape(-1))
            apart = float(difference.norm())
            if not apart > min(1e3 * self.eps, 0.05) * float(expected.norm()) + 16 * self.eps * whole:
                continue
            if name in self._faint:
                self._mark_unsupported(
                    name, f"the gradients where parameter '{name}' is used are too small to tell the samples apart"
                )
                continue
            using = [use for use in self.uses if name in use.names]
            where = f" ({', '.join(str(use) for use in using[:2])})" if using else ""
            if not using:
                self._hidden.add(name)
            share = apart / max(float(expected.norm()), 1e-300)
            self._mark_unsupported(
                name,
                f"parameter '{name}' has a use that AdaptedGD cannot see, or a wrong rule{where}: the Jacobian from its known "
                f"uses differs from a backward pass by {share:.2g} of its size",
            )
        self.uses = [use for use in self.uses if not use.names <= self.unsupported.keys()]

    def _rows_of(self, names: list[str]) -> dict[str, Tensor]:
        """D by some parameters: by columns if these are few, else by rows, with a backward pass for each output of a sample."""
        tensors = [self._parameters[name] for name in names]
        width = sum(t.numel() for t in tensors)
        total = self.n * self.q
        if _COLUMNS * width <= total:
            with self._running():
                columns = self._passes.columns(tensors)
            if columns is not None:
                self.remarks = [why for name, why in self.unsupported.items() if name not in self._hidden]  # columns are fast
                return {name: part.to(self._dtype) for name, part in zip(names, columns, strict=True)}
        step = max(1, min(total, 64, _ROW_BYTES // max(1, self._dtype.itemsize * width)))
        rows = torch.empty(total, width, dtype=self._dtype, device=self.device)
        with self._running():
            self._passes.rows(tensors, step, out=rows)
        parts = rows.view(self.n, self.q, width).split([t.numel() for t in tensors], 2)
        return dict(zip(names, parts, strict=True))
