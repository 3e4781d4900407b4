"""Neural collapse of the features before the last layer, NC1 to NC4, from counts, means and scatters of classes.

Definitions and names are those of Papyan, Han & Donoho (2020, PHD20), with the variants of Galanti et al. (2021, CDNV), Zhu et
al. (2021, distance from the simplex), Tirer et al. (2023, ratio of traces) and Han, Papyan & Donoho (2022, HPD22, split of the
squared loss at the best linear head). `collapse.neural_collapse` lists the equations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import a_tensor, one_of, real_number
from .labels import ClassTargets, distances
from .moments import ClassMoments

NC2 = ("equinorm", "equiangular", "maxangle", "etf")


@dataclass(frozen=True)
class FeatureOptions:
    """Options of `collapse.neural_collapse`, checked."""

    weighting: str = "class"
    rtol: float | None = None
    hpd_lambda: float | None = None

    def __post_init__(self) -> None:
        one_of("weighting", self.weighting, ("class", "sample"))
        if self.rtol is not None:
            real_number("rtol", self.rtol, low=0.0, below=1.0)
        if self.hpd_lambda is not None:
            real_number("hpd_lambda", self.hpd_lambda, low=1e-300)


class Head(NamedTuple):
    """The last layer: W, ``[K, D]``, and b, ``[K]``, float64."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(
        cls, weight: Tensor | None, bias: Tensor | None, num_classes: int, width: int, device: torch.device
    ) -> "Head | None":
        """Check and cast a weight, and a bias (None for zero). Without a weight there is no head."""
        if weight is None:
            return None
        parts = []
        for name, given, shape in (("weight", weight, (num_classes, width)), ("bias", bias, (num_classes,))):
            given = weight.new_zeros(num_classes) if given is None else a_tensor(name, given)
            if given.shape != shape:
                raise ValueError(f"`{name}` should have shape {list(shape)}, but has {list(given.shape)}.")
            parts.append(given.detach().to(device).double())
        return cls(*parts)


@dataclass(frozen=True)
class Means:
    """Means of the K' classes that have samples, and their spread."""

    seen: Tensor  # [K], which classes have samples
    share: Tensor  # [K'], N_j/N
    variance: Tensor  # [K'], v_j, the mean squared deviation in each class
    centred: Tensor  # [K', D], μ_j − μ_G
    weights: Tensor  # [K'], ω_j, the weights of μ_G

    @classmethod
    def of(cls, moments: ClassMoments, weighting: str) -> "Means":
        """The means in moments of features."""
        seen = moments.count > 0
        count = moments.count[seen]
        share = count / count.sum()
        pivot, offset = moments.pivot[seen], moments.offset[seen]
        weights = share if weighting == "sample" else torch.full_like(share, 1 / max(len(share), 1))
        # Pivots and offsets are subtracted before they are added, because a mean is rounded to its own size.
        from_first = (pivot - pivot[:1]) + (offset - offset[:1])
        return cls(seen, share, moments.scatter[seen] / count, from_first - weights @ from_first, weights)

    @property
    def count(self) -> int:
        """K', the number of classes that have samples."""
        return len(self.share)

    def directions(self, rtol: float | None) -> tuple[Tensor, Tensor]:
        """Eigenvectors ``[D, r]`` of Σ_B = Σ_j ω_j (μ_j − μ_G)(μ_j − μ_G)ᵀ with eigenvalues ``[r]`` above zero, r < K'.

        They come from the singular values of [√ω_j (μ_j − μ_G)], because Σ_B has their squares and so half of the digits.
        """
        rows = self.weights.sqrt()[:, None] * self.centred
        if not torch.isfinite(rows).all():
            return rows.new_full((rows.shape[1], 1), torch.nan), rows.new_full((1,), torch.nan)
        _, sigma, directions = torch.linalg.svd(rows, full_matrices=False)
        limit = max(rows.shape) * torch.finfo(rows.dtype).eps if rtol is None else rtol
        rank = min(int((sigma > limit * sigma[:1]).sum()), max(self.count - 1, 0))
        return directions[:rank].T, sigma[:rank].square()


def caveat(moments: ClassMoments) -> str | None:
    """What a reader of the figures should know about the classes, if anything."""
    total, width = moments.pivot.shape
    count = int((moments.count > 0).sum())
    if 0 < count < total:
        return f"{total - count} of {total} classes have no samples: NC1 to NC4 are of the others."
    if count - 1 > width:
        return f"A simplex of {count} class means does not fit in {width} dimensions: NC2 and NC3 cannot reach 0."
    return None


def variability(means: Means, along: Tensor | None, eigenvalues: Tensor) -> dict[str, Tensor]:
    """NC1, variation within classes relative to that between them, from u_kᵀ Σ_W u_k and the eigenvalues of Σ_B, ``[r]``."""
    result = {}
    if along is not None:
        coincide = along.new_tensor(torch.inf)  # without a direction all means are the same
        result["nc1_pinv"] = (along / eigenvalues).sum() / means.count if len(eigenvalues) else coincide
    between = (means.weights * means.centred.square().sum(1)).sum()
    result["nc1_trace"] = (means.share * means.variance).sum() / between
    squares = distances(means.centred, means.centred).square()
    i, j = torch.triu_indices(means.count, means.count, 1, device=squares.device)
    result["nc1_cdnv"] = ((means.variance[i] + means.variance[j]) / (2 * squares[i, j])).mean()
    return result


def geometry(rows: Tensor, name: str) -> dict[str, Tensor]:
    """NC2: how far centred means, or the rows of the head's weight, ``[K, D]``, are from the corners of a simplex around 0."""
    norms = rows.norm(dim=1)
    unit = rows / norms[:, None]
    i, j = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    cosines = (unit @ unit.T)[i, j]
    values = (
        norms.std() / norms.mean(),
        cosines.std(correction=0),
        (cosines + 1 / (len(rows) - 1)).abs().mean(),
        _off_simplex(rows @ rows.T),
    )
    return {f"nc2_{key}_{name}": value for key, value in zip(NC2, values, strict=True)}


def duality(means: Means, weight: Tensor) -> dict[str, Tensor]:
    """NC3: how far the head's weight ``[K', D]`` is from the centred means, up to a factor."""
    return {
        "nc3": (weight / weight.norm() - means.centred / means.centred.norm()).square().sum(),
        "nc3_etf": _off_simplex(weight @ means.centred.T),
    }


def _off_simplex(products: Tensor) -> Tensor:
    count = len(products)
    simplex = (torch.eye(count).to(products) - 1 / count) / math.sqrt(count - 1)
    distance: Tensor = (products / products.norm() - simplex).norm()
    return distance


def best_head_split(moments: ClassMoments, targets: Tensor, lam: float, head: Head) -> dict[str, Tensor]:
    """HPD22: half the squared loss of a linear head, ½C + ½λ|W̃|², split at the least-squares head W_LS, for any class sizes.

    With h̃ = [h; 1], Σ̃_W and μ̃_j its moments, W̃ = [W, b] and A = Σ̃_W + Σ_j π_j μ̃_j μ̃_jᵀ + λ: W_LS = (Σ_j π_j y_j μ̃_jᵀ) A⁻¹,
    ``hpd_nc1`` = ½ tr W_LS(Σ̃_W + λ)W_LSᵀ, ``hpd_nc23`` = ½ Σ_j π_j |W_LS μ̃_j − y_j|² and
    ``hpd_perp`` = ½ tr (W̃ − W_LS) A (W̃ − W_LS)ᵀ.
    """
    assert moments.pooled is not None
    share = moments.count / moments.total
    width = moments.pooled.shape[0]
    extended = torch.cat([moments.mean, torch.ones_like(share)[:, None]], dim=1)  # [K, D+1], zero share without samples
    weighted = extended * share[:, None]
    scatter = moments.pooled.new_zeros(width + 1, width + 1)
    scatter[:width, :width] = moments.pooled / moments.total
    scatter.diagonal().add_(lam)
    gram = scatter + weighted.T @ extended
    best = torch.linalg.solve(gram, weighted.T @ targets).T  # [K, D+1]
    rest = torch.cat([head.weight, head.bias[:, None]], dim=1) - best
    return {
        "hpd_nc1": ((best @ scatter) * best).sum() / 2,
        "hpd_nc23": (share * (extended @ best.T - targets).square().sum(1)).sum() / 2,
        "hpd_perp": ((rest @ gram) * rest).sum() / 2,
    }


def mismatches(chosen: Tensor, features: Tensor, means: Tensor) -> Tensor:
    """NC4 of each sample: 1 if the chosen class is not that of the nearest mean, else 0; NaN for features that are not finite.

    Means ``[K, D]`` are NaN for a class without samples. In a tie the lowest class is nearest.
    """
    seen = (~means.isnan().any(1)).nonzero().flatten()
    nearest = seen[distances(features, means[seen]).argmin(1)] if len(seen) else torch.full_like(chosen, -1)
    return torch.where(features.isfinite().all(1), (chosen != nearest).double(), torch.nan)


def collapse_of_features(
    moments: ClassMoments,
    options: FeatureOptions,
    targets: ClassTargets,
    head: Head | None,
    within_along: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    """All figures of features but NC4, which needs each sample.

    ``within_along`` maps directions ``[D, r]`` to u_kᵀ Σ_W u_k, ``[r]``; without it there is no ``nc1_pinv``.
    """
    num_classes = len(moments.count)
    if options.hpd_lambda is not None and (head is None or targets.width != num_classes):
        raise ValueError(
            "`hpd_lambda` should come with the `weight` of the last layer, and targets with an entry for each class, but got "
            + ("no weight." if head is None else f"targets of width {targets.width} for {num_classes} classes.")
        )
    means = Means.of(moments, options.weighting)
    directions, eigenvalues = means.directions(options.rtol)
    along = None if within_along is None else within_along(directions)
    if means.count < 2:
        names = ["nc1_pinv", "nc1_trace", "nc1_cdnv"][along is None :] + [f"nc2_{key}_means" for key in NC2]
        if head is not None:
            names += [f"nc2_{key}_weights" for key in NC2] + ["nc3", "nc3_etf"]
        result = dict.fromkeys(names, means.share.new_tensor(torch.nan))
    else:
        result = variability(means, along, eigenvalues) | geometry(means.centred, "means")
        if head is not None:
            weight = head.weight[means.seen]
            result |= geometry(weight, "weights") | duality(means, weight)
    if head is not None and options.hpd_lambda is not None:
        result |= best_head_split(moments, targets.values.to(head.weight), options.hpd_lambda, head)
    return result
