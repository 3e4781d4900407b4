"""What `check.py` is made of: claims in the paper's order, each a row; and the objects they are about, computed once."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

EPS = torch.finfo(torch.float64).eps
WEAKEST = 0.1  # a bound above this proves nothing: the row fails
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Finding:
    """What a claim found.

    Attributes:
        computed: What was held against what.
        error: By how much they differ, relative to the size of what they are.
        bound: What rounding, differences or integration explain.
        off: For a formula that is to be shown wrong: by how much it is off. ``error`` is then that of the corrected formula
            on the same objects, so that the slip and nothing else is to blame.
        amount: What ``off`` has to exceed.
    """

    computed: str
    error: float
    bound: float
    off: float | None = None
    amount: float = 0.0


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        equation: Number in the paper.
        statement: What it says.
        finding: What was found.
        reads: Names of the objects that it was found from.
    """

    equation: str
    statement: str
    finding: Finding
    reads: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the claim holds; for a formula as printed, whether it does not. NaN is no pass."""
        found = self.finding
        holds = found.error <= found.bound <= WEAKEST
        return holds and (found.off is None or found.off > found.amount)

    @property
    def cells(self) -> tuple[str, str, str, str, str, str]:
        """Equation, statement, what was computed, error, bound, verdict."""
        found = self.finding
        measured, bound = found.error, f"{found.bound:.0e}"
        if found.off is not None:
            measured, bound = found.off, f"above {found.amount:g}"
        return self.equation, self.statement, found.computed, f"{measured:.1e}", bound, "pass" if self.passed else "FAIL"


@dataclass
class Net:
    """A network on its data, at its start.

    Attributes:
        name: What objects of it are called by.
        model: float64.
        x: Inputs ``[N, M]``.
        labels: Classes ``[N]``.
        y: Targets ``[N, Q]``, one-hot.
        tolerance: rtol and atol of its flows.
    """

    name: str
    model: nn.Module
    x: Tensor
    labels: Tensor
    y: Tensor
    tolerance: tuple[float, float]

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.x)

    @property
    def num_outputs(self) -> int:
        """QN."""
        return self.y.numel()

    @cached_property
    def theta(self) -> Tensor:
        """θ₀ ``[K]``."""
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def outputs(self, theta: Tensor | None = None) -> Tensor:
        """x(θ) ``[QN]``, of θ₀ by default (2.9)."""
        with torch.no_grad():
            outputs: Tensor = torch.func.functional_call(self.model, self.parameters(theta), (self.x,))
        return outputs.flatten()

    def parameters(self, theta: Tensor | None = None) -> dict[str, Tensor]:
        """θ ``[K]`` by name and shape."""
        own = {name: p.detach() for name, p in self.model.named_parameters()}
        parts = (self.theta if theta is None else theta).split([p.numel() for p in own.values()])
        return {name: part.view_as(p) for (name, p), part in zip(own.items(), parts, strict=True)}

    def at(self, theta: Tensor) -> "Net":
        """The same with other parameters θ ``[K]``."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.parameters(theta))
        return replace(self, model=model)

    def only(self, i: int) -> "Net":
        """One sample alone."""
        return replace(self, x=self.x[i][None], labels=self.labels[i][None], y=self.y[i][None])

    @cached_property
    def start(self) -> Tensor:
        """x₀ ``[QN]``."""
        return self.outputs()

    @cached_property
    def way(self) -> Tensor:
        """x₀ − y ``[QN]``."""
        return self.start - self.y.flatten()

    @property
    def g(self) -> Tensor:
        """∇ₓC = (x₀ − y)/N ``[QN]`` of (2.48)."""
        return self.way / self.num_samples

    @cached_property
    def jacobian(self) -> Tensor:
        """D by one backward pass for each output: what scales and projectors are taken from."""
        names, values = zip(*self.parameters().items(), strict=True)
        leaves = [value.clone().requires_grad_() for value in values]
        outputs = torch.func.functional_call(self.model, dict(zip(names, leaves, strict=True)), (self.x,)).flatten()
        rows = [torch.autograd.grad(outputs[k], leaves, retain_graph=True) for k in range(len(outputs))]
        return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])

    @cached_property
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, σ, Vᵀ of D, those of σ above 1e-10 σ_max."""
        u, s, v = torch.linalg.svd(self.jacobian, full_matrices=False)
        rank = int((s > 1e-10 * s[0]).sum())
        return u[:, :rank], s[:rank], v[:rank]

    @property
    def rank(self) -> int:
        """Rank of D."""
        return len(self.svd[1])

    @property
    def largest(self) -> float:
        """σ_max of D."""
        return float(self.svd[1][0])

    @property
    def condition(self) -> float:
        """σ_max/σ_min of D, of those that are not zero."""
        return self.largest / float(self.svd[1][-1])

    def rounding(self, power: int = 0) -> float:
        """10·QN·ε·κ(D)^power: products of QN terms (0), solutions of Dδ = g (1), those by way of Θ or DᵀD (2)."""
        return 10 * self.num_outputs * EPS * self.condition**power

    def integration(self) -> float:
        """What an integrator's tolerances allow, relative to |x₀ − y|.

        Each of at most 100 steps may err by |rtol|θ| + atol|, in norm, which D (here twice as large as at the start) makes
        |D| times as much of in the outputs. The flows in output space contract, so that steps add up at most.
        """
        rtol, atol = self.tolerance
        local = rtol * float(self.theta.norm()) + atol * math.sqrt(len(self.theta) + self.num_outputs)
        return 100 * (2 * self.largest + 1) * local / float(self.way.norm())


Computation = Callable[["Context", Net], object]
COMPUTATIONS: dict[str, Computation] = {}


def computed(function: Computation) -> Computation:
    """Register how an object is computed; it is called by the function's name."""
    COMPUTATIONS[function.__name__] = function
    return function


@dataclass
class Context:
    """The objects that claims are about, by name: ``net.object`` or ``net.object.part``.

    Attributes:
        nets: Networks by name.
        replaced: Objects to take in the place of what was computed, by name.
        reads: Names in the order in which they were asked for.
    """

    nets: dict[str, Net]
    replaced: dict[str, Tensor] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    _cache: dict[str, object] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.reads:
            self.reads.append(name)
        if name in self.replaced:
            return self.replaced[name]
        return self.original(name)

    def original(self, name: str) -> Tensor:
        """The object that was computed, whatever takes its place in claims."""
        net, key, *parts = name.split(".")
        whole = self._cache.get(f"{net}.{key}")
        if whole is None:
            whole = self._cache[f"{net}.{key}"] = COMPUTATIONS[key](self, self.nets[net])
        for part in parts:
            whole = whole[part] if isinstance(whole, dict) else bool(whole) if part == "bool" else getattr(whole, part)
        return whole if isinstance(whole, Tensor) else torch.tensor(whole, dtype=torch.float64)

    @property
    def pristine(self) -> "Context":
        """What was computed, for bounds."""
        return self.fork({})

    def fork(self, replaced: dict[str, Tensor]) -> "Context":
        """The same objects, some of them replaced; what was computed is shared."""
        return Context(self.nets, replaced, [], self._cache)


Finder = Callable[[Context], Finding]


@dataclass(frozen=True)
class Claim:
    """One claim, whose docstring is "equation: statement."; call it with a context for its row."""

    find: Finder

    def __call__(self, context: Context) -> Row:
        """Find out."""
        equation, statement = (self.find.__doc__ or "").removesuffix(".").split(": ", 1)
        context.reads.clear()
        finding = self.find(context)
        return Row(equation, statement, finding, tuple(context.reads))


def registry() -> tuple[list[Claim], Callable[[Finder], Claim]]:
    """A list of claims, in the order of the table, and the decorator that adds to it."""
    claims: list[Claim] = []

    def claim(find: Finder) -> Claim:
        claims.append(Claim(find))
        return claims[-1]

    return claims, claim


def apart(found: Tensor, expected: Tensor, size: float | Tensor | None = None) -> float:
    """|found − expected| relative to |expected|, or to ``size``."""
    scale = torch.linalg.vector_norm(expected) if size is None else size
    return float(torch.linalg.vector_norm(found - expected) / scale)


def largest(*errors: float) -> float:
    """The largest, NaN if one is."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def slopes(values: Tensor, h: float, stride: int = 1) -> Tensor:
    """∂_s of values in equal steps h, ``[T, n]``, all but the first and the last four: ``[T - 8, n]``.

    Args:
        values: Records, ``[T, n]``.
        h: The steps.
        stride: 1 or 2: how many steps lie between the values that differences are taken of, which err by (stride·h)⁴∂_s⁵/30.
    """
    count, near, far = len(values), stride, 2 * stride

    def shifted(by: int) -> Tensor:
        return values[4 + by : count - 4 + by]

    return (shifted(-far) - 8 * shifted(-near) + 8 * shifted(near) - shifted(far)) / (12 * stride * h)


def doubt(values: Tensor, h: float) -> float:
    """By how much `slopes` of single and of double steps differ, relatively: some 15 times the error of the former."""
    return apart(slopes(values, h, 2), slopes(values, h))
