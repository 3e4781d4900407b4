"""The loss as a function of the outputs: its curvature, the root of its Hessian, and what a change of outputs does to it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calls import Call
from .loss import Criterion, HalfSquaredLoss, counted_entries, output_curvature
from .replay import batch_and_outputs


class _Elementwise:
    """A loss Σ_i ℓ_i(x_i): its Hessian is a diagonal h.

    Args:
        h: ``[N, M]``.
        remainder: ℓ(x + δ) − ℓ(x) − ℓ'(x)δ as a function of δ, entry by entry.
        value: ℓ(x) as a function of ℓ'(x), entry by entry.
    """

    def __init__(self, h: Tensor, remainder: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor]) -> None:
        self._root = h.sqrt()
        self.remainder = remainder
        self.value = value

    def root(self, v: Tensor, samples: slice) -> Tensor:
        return self._root[samples, :, None] * v

    root_transpose = root

    def root_inverse(self, v: Tensor) -> Tensor:
        root = self._root[:, :, None]
        return torch.where(root > 0, v / root, 0.0)


class _Softmax:
    """Σ_n W_n (log Σ_c exp x_nc − …): its Hessian is W (diag(p) − ppᵀ) = SSᵀ, S = √W (diag(√p) − p√pᵀ), for each n.

    Args:
        x: ``[N, C, D]``: softmax over C.
        weight: W, ``[N, 1, D]``.
    """

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self._x, self._weight = x, weight
        self._p = torch.softmax(x, 1)
        self._sqrt_p, self._sqrt_weight = self._p.sqrt(), weight.sqrt()

    def root(self, v: Tensor, samples: slice) -> Tensor:
        v = v.reshape(v.shape[0], *self._p.shape[1:], -1)  # [n, C, D, k]
        s, p, w = (t[samples, ..., None] for t in (self._sqrt_p, self._p, self._sqrt_weight))
        return (w * (s * v - p * (s * v).sum(1, keepdim=True))).flatten(1, 2)

    def root_transpose(self, v: Tensor, samples: slice) -> Tensor:
        v = v.reshape(v.shape[0], *self._p.shape[1:], -1)
        s, p, w = (t[samples, ..., None] for t in (self._sqrt_p, self._p, self._sqrt_weight))
        return (w * s * (v - (p * v).sum(1, keepdim=True))).flatten(1, 2)

    def root_inverse(self, v: Tensor) -> Tensor:
        """S⁺v = v/√(Wp), exact where v sums to zero over the classes: S(v/√p) = √W v and √p spans ker S."""
        root = (self._sqrt_p * self._sqrt_weight).flatten(1)[:, :, None]
        return torch.where(root > 0, v / root, 0.0)

    def value(self, g: Tensor) -> Tensor:
        """W log Σ exp(x) − t·x with the targets t = Wp − g, ``[N, 1, D]``."""
        targets = self._weight * self._p - g.reshape(self._p.shape)
        return self._weight * torch.logsumexp(self._x, 1, keepdim=True) - (targets * self._x).sum(1, keepdim=True)

    def remainder(self, delta: Tensor) -> Tensor:
        """W (log Σ p exp(δ) − p·δ), ``[N, 1, D]``."""
        delta = delta.reshape(self._p.shape)
        mean = (self._p * delta).sum(1, keepdim=True)
        centered = delta - mean
        small = centered.abs().amax(1, keepdim=True) < 0.1  # where log Σ p exp would cancel
        series = (self._p * torch.expm1(centered)).sum(1, keepdim=True).clamp(min=-0.5)
        logs = torch.logsumexp(torch.log(self._p) + centered, 1, keepdim=True)
        return self._weight * torch.where(small, torch.log1p(series), logs)


@dataclass(frozen=True)
class _Piece:
    """One output of one call.

    Attributes:
        rows: The call's rows among the R.
        columns: The output's entries among the Q of a sample.
        outputs: Q.
        loss: What the loss is there.
        gradient: g there, ``[N, M]``.
    """

    rows: slice
    columns: slice
    outputs: int
    loss: _Elementwise | _Softmax
    gradient: Tensor


class OutputLoss:
    """A criterion's loss C as a function of the stacked outputs x, as far as x, g = ∇ₓC and the criterion tell.

    The Hessian H = ∇²ₓC of these losses depends on targets only through weights, which g reveals, and so does the remainder
    C(x + Δ) − C(x) − g·Δ that begins with it. So the loss need not be called again.

    Args:
        criterion: The loss, of the model's outputs as they are, with reduction ``"mean"`` or ``"sum"``.
        calls: The calls that the loss went through.
        loss_scale: What the loss was multiplied by beside that.

    Raises:
        RuntimeError: The gradient is not that of a CrossEntropyLoss with class weights and class indices.
        ValueError: A CrossEntropyLoss was given class scores without a batch.
    """

    def __init__(self, criterion: Criterion, calls: list[Call], loss_scale: float = 1.0) -> None:
        for gradient in (gradient for call in calls for gradient in call.gradients.values()):
            if isinstance(criterion, nn.CrossEntropyLoss) and gradient.ndim < 2:
                raise ValueError(
                    "The model's output should be [N, classes, ...] for a CrossEntropyLoss, but its shape is "
                    f"{list(gradient.shape)}."
                )
        groups, share = _by_loss(criterion, calls)
        divisors = {key: share * _divisor(criterion, gradients) for key, gradients in groups.items()}
        self._pieces: list[_Piece] = []
        start = 0
        for call in calls:
            n, q = batch_and_outputs(call)
            column = 0
            for place in call.places:
                x, g = call.outputs[place].double(), call.gradients[place] / loss_scale
                entries = x[0].numel()
                loss = _loss(criterion, x, g, divisors[call.backward_pass, place])
                rows, columns = slice(start, start + n * q), slice(column, column + entries)
                self._pieces.append(_Piece(rows, columns, q, loss, g.reshape(n, entries)))
                column += entries
            start += n * q

    def hessian_root(self, v: Tensor) -> Tensor:
        """Sv for H = SSᵀ, block by block of samples: ``[R]`` or ``[R, k]``."""
        return self._mapped(v, lambda piece, part, samples: piece.loss.root(part, samples))

    def hessian_root_transpose(self, v: Tensor, first: int = 0) -> Tensor:
        """Sᵀv, where v may be some rows alone: those of whole samples of one call, from number ``first`` on."""
        return self._mapped(v, lambda piece, part, samples: piece.loss.root_transpose(part, samples), first)

    def hessian_root_inverse(self, v: Tensor) -> Tensor:
        """S⁺v for v in ran H, as g is."""
        return self._mapped(v, lambda piece, part, _samples: piece.loss.root_inverse(part))

    def value(self) -> float:
        """C(x)."""
        return sum(float(piece.loss.value(piece.gradient).sum()) for piece in self._pieces)

    def change(self, difference: Tensor) -> float:
        """C(x + Δ) − C(x) for Δ of shape ``[R]``."""
        total = 0.0
        for piece in self._pieces:
            delta = difference[piece.rows].view(-1, piece.outputs)[:, piece.columns]
            total += float((piece.gradient * delta).sum() + piece.loss.remainder(delta).sum())
        return total

    def _mapped(self, v: Tensor, apply: Callable[[_Piece, Tensor, slice], Tensor], first: int = 0) -> Tensor:
        result = torch.empty_like(v)
        for piece in self._pieces:
            start, stop = max(piece.rows.start, first), min(piece.rows.stop, first + len(v))
            if start >= stop:
                continue
            q = piece.outputs
            samples = slice((start - piece.rows.start) // q, (stop - piece.rows.start) // q)
            part = v[start - first : stop - first].reshape(-1, q, v[0].numel())[:, piece.columns]  # [n, M, k]
            image = result[start - first : stop - first].view(-1, q, v[0].numel())
            image[:, piece.columns] = apply(piece, part, samples)
        return result


def largest_curvature(criterion: Criterion, calls: list[Call]) -> float:
    """The largest curvature c of a criterion in any of the calls' outputs, see `output_curvature`.

    Where backward passes differ in size, the smallest has the largest curvature.
    """
    groups, share = _by_loss(criterion, calls)
    return max(output_curvature(criterion, gradients) for gradients in groups.values()) / share


def _by_loss(criterion: Criterion, calls: list[Call]) -> tuple[dict[tuple[int, int], list[Tensor]], int]:
    """The gradients of each loss by backward pass and place of the output, and what each loss is divided by beside its mean.

    One output's rows in all calls of a backward pass belong to one loss. Several passes are gradient accumulation, each loss
    divided by their number.
    """
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for call in calls:
        for place, gradient in call.gradients.items():
            groups.setdefault((call.backward_pass, place), []).append(gradient)
    return groups, len({number for number, _ in groups}) if criterion.reduction == "mean" else 1


def _divisor(criterion: Criterion, gradients: list[Tensor]) -> float:
    """What the sum over samples is divided by; exact, while `output_curvature` is content with a bound."""
    if criterion.reduction != "mean":
        return 1.0
    if isinstance(criterion, HalfSquaredLoss):
        return float(sum(g.shape[0] for g in gradients))
    if isinstance(criterion, nn.CrossEntropyLoss):
        return max(1e-300, sum(float(_class_weights(criterion, g).sum()) for g in gradients))
    return float(counted_entries(criterion, gradients))


def _class_weights(criterion: nn.CrossEntropyLoss, g: Tensor) -> Tensor:
    """The weight of each target's class, ``[N, D...]`` for g ``[N, C, D...]``; zero where the target is ignored."""
    reached = (g != 0).any(1)
    if criterion.weight is None:
        return reached.double()
    return criterion.weight.double()[g.argmin(1)] * reached  # the target's entry is the one that is negative


def _loss(criterion: Criterion, x: Tensor, g: Tensor, divisor: float) -> _Elementwise | _Softmax:
    """The loss of one output of one call: x and g ``[N, ...]`` in float64."""
    if isinstance(criterion, nn.CrossEntropyLoss):
        return _cross_entropy(criterion, x, g, divisor)
    flat = x.reshape(len(x), -1)
    reached = (g != 0).reshape(flat.shape).any(0).expand_as(flat).to(flat)  # else the loss was given some of the outputs
    if not reached.any() or getattr(criterion, "weight", None) is not None:
        reached = torch.ones_like(flat)
    if isinstance(criterion, nn.MSELoss | HalfSquaredLoss):
        c = (2.0 if isinstance(criterion, nn.MSELoss) else 1.0) / divisor
        return _Elementwise(c * reached, lambda delta: 0.5 * c * reached * delta**2, lambda g: 0.5 / c * g**2)
    weight = (reached.view_as(x) if criterion.weight is None else reached.view_as(x) * criterion.weight) / divisor
    p = torch.sigmoid(x)
    if criterion.pos_weight is not None:  # y·pos_weight·softplus(−x) + (1−y)·softplus(x)
        positive = criterion.pos_weight.double()
        y = ((p - torch.where(weight > 0, g / weight, 0.0)) / (p + positive * (1 - p))).clamp(0, 1)
        weight = weight * (1 - y + y * positive)
    p, weight = p.reshape(flat.shape), weight.reshape(flat.shape)
    _require_targets(weight * p - g.reshape(flat.shape), weight, "BCEWithLogitsLoss")
    return _Elementwise(
        weight * p * (1 - p),
        lambda delta: weight * (F.softplus(flat + delta) - F.softplus(flat) - p * delta).clamp(min=0),
        lambda g: weight * F.softplus(flat) - (weight * p - g) * flat,
    )


_UNFIT = (
    "The loss's gradient is not that of `criterion`, a {}, of the model's outputs as they are: it was given part of them, in "
    "another shape, multiplied, or something else was added. Give AdaptedGD a module that returns what the criterion is given; "
    'or a number for `damping` (with metric="euclidean"), or trials="closure" and a closure to `step`.'
)


def _require_targets(targets: Tensor, weight: Tensor, what: str) -> None:
    """Make sure that targets times their weights, as the gradient tells them, are probabilities.

    Raises:
        RuntimeError: They are not.
    """
    if not (targets >= -1e-2 * weight).all() or not (targets <= 1.01 * weight).all():
        raise RuntimeError(_UNFIT.format(what))


def _cross_entropy(criterion: nn.CrossEntropyLoss, x: Tensor, g: Tensor, divisor: float) -> _Softmax:
    weight = (_class_weights(criterion, g) / divisor).reshape(len(x), 1, -1)
    x, g = (t.reshape(len(t), t.shape[1], -1) for t in (x, g))
    if criterion.weight is not None:
        expected = weight * torch.softmax(x, 1)
        expected.scatter_add_(1, g.argmin(1, keepdim=True), -weight)
        if not (expected - g).norm() <= 1e-2 * expected.norm():
            raise RuntimeError(
                "The loss's gradient should be that of `criterion`, a CrossEntropyLoss with class weights, for class indices, "
                "but is not. With class weights, label smoothing and targets that are probabilities hide what the Hessian is, "
                "and so does a factor before the loss. Leave them out, or use a number for `damping` (with "
                'metric="euclidean"), or trials="closure" and a closure to `step`.'
            )
    else:
        _require_targets(weight * torch.softmax(x, 1) - g, weight, "CrossEntropyLoss")
        if not (g.sum(1).abs() <= 1e-2 * weight[:, 0]).all():
            raise RuntimeError(_UNFIT.format("CrossEntropyLoss"))
    return _Softmax(x, weight)
