"""Neural collapse of the features before the last layer, NC1 to NC4, from counts, means and scatters of classes.

Definitions and names are those of Papyan, Han & Donoho (2020, PHD20), with the variants of Galanti et al. (2021, CDNV), Zhu et
al. (2021, distance from the simplex), Tirer et al. (2023, ratio of traces) and Han, Papyan & Donoho (2022, HPD22, split of the
squared loss at the best linear head). The mean over classes has the weights ω_j: 1/K, or N_j/N.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import one_of, real_number
from .labels import ClassTargets
from .moments import ClassMoments

GEOMETRY = ("equinorm", "equiangular", "maxangle", "etf")
WEIGHTINGS = ("class", "sample")


@dataclass(frozen=True)
class FeatureOptions:
    """How the figures of features are taken.

    Attributes:
        weighting: ω_j: ``"class"``, 1/K', or ``"sample"``, N_j/N.
        rtol: What counts as zero in Σ_B; None for max(K', D) times machine epsilon.
        hpd_lambda: λ of the split of HPD22; None to leave it out.

    Raises:
        TypeError: A number is none.
        ValueError: A value is out of its range.
    """

    weighting: str = "class"
    rtol: float | None = None
    hpd_lambda: float | None = None

    def __post_init__(self) -> None:
        one_of("weighting", self.weighting, WEIGHTINGS)
        if self.rtol is not None:
            real_number("rtol", self.rtol, low=0.0, below=1.0)
        if self.hpd_lambda is not None:
            real_number("hpd_lambda", self.hpd_lambda, low=1e-300)


@dataclass(frozen=True)
class Head:
    """The last layer, a linear one, in float64.

    Attributes:
        weight: W, ``[K, D]``.
        bias: b, ``[K]``.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, num_classes: int, width: int, device: torch.device) -> "Head":
        """Take it over, if it fits.

        Args:
            weight: W.
            bias: b, or None for zero.
            num_classes: K.
            width: D.
            device: Where the features are.

        Raises:
            TypeError: One is no tensor.
            ValueError: Shapes do not agree.
        """
        bias = weight.new_zeros(num_classes) if bias is None and isinstance(weight, Tensor) else bias
        for name, given, shape in (("weight", weight, (num_classes, width)), ("bias", bias, (num_classes,))):
            if not isinstance(given, Tensor):
                raise TypeError(f"`{name}` should be a tensor, but got {type(given).__name__}.")
            if given.shape != shape:
                raise ValueError(f"`{name}` should have shape {list(shape)}, but has {list(given.shape)}.")
        assert bias is not None
        return cls(weight.detach().to(device).double(), bias.detach().to(device).double())

    def __call__(self, features: Tensor) -> Tensor:
        """Wh + b for features ``[B, D]``."""
        return features @ self.weight.T + self.bias


@dataclass(frozen=True)
class Means:
    """Means of the classes that have samples, and how they are spread.

    Attributes:
        seen: Which classes have samples, ``[K]``.
        share: N_j/N of those, ``[K']``.
        variance: v_j, the mean squared deviation of each, ``[K']``.
        centred: μ_j − μ_G, ``[K', D]``.
        weights: ω_j, ``[K']``, which μ_G is taken with.
    """

    seen: Tensor
    share: Tensor
    variance: Tensor
    centred: Tensor
    weights: Tensor

    @classmethod
    def of(cls, moments: ClassMoments, weighting: str) -> "Means":
        """Read them off.

        Args:
            moments: Of the features.
            weighting: ``"class"``, ω_j = 1/K', or ``"sample"``, ω_j = N_j/N.
        """
        seen = moments.count > 0
        count = moments.count[seen]
        share = count / count.sum()
        pivot, offset = moments.pivot[seen], moments.offset[seen]
        weights = share if weighting == "sample" else torch.full_like(share, 1 / max(len(share), 1))
        # Differences from one of the means first, of pivots and of offsets: a mean itself is rounded to its own size.
        from_first = (pivot - pivot[:1]) + (offset - offset[:1])
        return cls(seen, share, moments.scatter[seen] / count, from_first - weights @ from_first, weights)

    @property
    def caveat(self) -> str | None:
        """What a reader of the figures should know of the classes, if anything."""
        count, width = self.centred.shape
        missing = len(self.seen) - count
        if count and missing:
            return f"{missing} of {count + missing} classes have no samples: NC1 to NC4 are of the others."
        if count - 1 > width:
            return f"A simplex of {count} class means does not fit in {width} dimensions: NC2 and NC3 cannot reach 0."
        return None

    @property
    def count(self) -> int:
        """K', the number of classes that have samples."""
        return len(self.share)

    def directions(self, rtol: float | None) -> tuple[Tensor, Tensor]:
        """Eigenvectors of Σ_B = Σ_j ω_j (μ_j − μ_G)(μ_j − μ_G)ᵀ and its eigenvalues, those that are not zero.

        From the singular values of [√ω_j (μ_j − μ_G)]: squares of them in Σ_B would lose half of the digits.

        Args:
            rtol: Singular values up to rtol·σ_max count as zero; by default max(K', D) times machine epsilon.

        Returns:
            ``[D, r]`` and ``[r]``, r ≤ min(K' − 1, D).
        """
        rows = self.weights.sqrt()[:, None] * self.centred
        if not torch.isfinite(rows).all():
            return rows.new_full((rows.shape[1], 1), torch.nan), rows.new_full((1,), torch.nan)
        _, sigma, directions = torch.linalg.svd(rows, full_matrices=False)
        limit = max(rows.shape) * torch.finfo(rows.dtype).eps if rtol is None else rtol
        rank = min(int((sigma > limit * sigma[:1]).sum()), max(self.count - 1, 0))
        return directions[:rank].T, sigma[:rank].square()


def variability(means: Means, along: Tensor | None, strength: Tensor) -> dict[str, Tensor]:
    """NC1: variation within classes beside that between them.

    Args:
        means: Of the classes.
        along: u_kᵀ Σ_W u_k for each direction that the means spread in, ``[r]``; None where it is not known.
        strength: The eigenvalue of Σ_B there, ``[r]``.

    Returns:
        ``nc1_pinv`` = tr(Σ_W Σ_B⁺)/K (PHD20), if ``along`` is given; ``nc1_trace`` = tr Σ_W / tr Σ_B; ``nc1_cdnv`` = mean over
        pairs of (v_i + v_j) / (2 |μ_i − μ_j|²).
    """
    result: dict[str, Tensor] = {}
    nan = means.share.new_tensor(torch.nan)
    few = means.count < 2
    if along is not None:
        result["nc1_pinv"] = nan if few else _within_over_between(along, strength) / means.count
    between = (means.weights * means.centred.square().sum(1)).sum()
    within = (means.share * means.variance).sum()
    result["nc1_trace"] = nan if few else within / between
    apart = torch.cdist(means.centred, means.centred, compute_mode="donot_use_mm_for_euclid_dist").square()
    i, j = torch.triu_indices(means.count, means.count, 1, device=apart.device)
    pairs = (means.variance[i] + means.variance[j]) / (2 * apart[i, j])
    result["nc1_cdnv"] = nan if few else pairs.mean()
    return result


def _within_over_between(along: Tensor, strength: Tensor) -> Tensor:
    if len(strength) == 0:  # all means coincide
        return along.new_tensor(torch.inf)
    return (along / strength).sum()


def geometry(rows: Tensor, name: str) -> dict[str, Tensor]:
    """NC2: how far K vectors are from the corners of a simplex around 0: equal norms, equal angles, cos = −1/(K−1).

    Args:
        rows: Centred class means, or the rows of the head's weight, ``[K, D]``.
        name: ``"means"`` or ``"weights"``, the end of each key.

    Returns:
        ``nc2_equinorm`` = std(|V_j|)/mean(|V_j|); ``nc2_equiangular`` = the standard deviation of the cosines of all pairs,
        without Bessel's correction (one pair has 0); ``nc2_maxangle`` = mean |cos + 1/(K−1)|; ``nc2_etf`` =
        |VVᵀ/|VVᵀ| − (1 − 11ᵀ/K)/√(K−1)|, all Frobenius.
    """
    count = len(rows)
    if count < 2:
        return {f"nc2_{key}_{name}": rows.new_tensor(torch.nan) for key in GEOMETRY}
    norms = rows.norm(dim=1)
    unit = rows / norms[:, None]
    i, j = torch.triu_indices(count, count, 1, device=rows.device)
    cosines = (unit @ unit.T)[i, j]
    values = (
        norms.std() / norms.mean(),
        cosines.std(correction=0),
        (cosines + 1 / (count - 1)).abs().mean(),
        _off_simplex(rows @ rows.T),
    )
    return {f"nc2_{key}_{name}": value for key, value in zip(GEOMETRY, values, strict=True)}


def _off_simplex(products: Tensor) -> Tensor:
    count = len(products)
    simplex = (torch.eye(count).to(products) - 1 / count) / math.sqrt(count - 1)
    distance: Tensor = (products / products.norm() - simplex).norm()
    return distance


def duality(means: Means, weight: Tensor) -> dict[str, Tensor]:
    """NC3: how far the head's weight W is from the centred means M, up to a factor.

    Args:
        means: Of the classes.
        weight: W, ``[K, D]``.

    Returns:
        ``nc3`` = |W/|W| − M/|M||² in 0..4 (PHD20), and ``nc3_etf``, the distance of WMᵀ from the simplex as in ``nc2_etf``.
    """
    nan = means.share.new_tensor(torch.nan)
    if means.count < 2:
        return {"nc3": nan, "nc3_etf": nan}
    rows = weight[means.seen]
    return {
        "nc3": (rows / rows.norm() - means.centred / means.centred.norm()).square().sum(),
        "nc3_etf": _off_simplex(rows @ means.centred.T),
    }


def best_head_split(moments: ClassMoments, targets: Tensor, lam: float, head: Head) -> dict[str, Tensor]:
    """HPD22: half the squared loss of a linear head, ½C + ½λ|W̃|², split at the least-squares head W_LS, for any class sizes.

    With h̃ = [h; 1], Σ̃_W and μ̃_j its moments and A = Σ̃_W + Σ_j π_j μ̃_j μ̃_jᵀ + λ: W_LS = (Σ_j π_j y_j μ̃_jᵀ) A⁻¹.

    Args:
        moments: Of the features, with the pooled scatter.
        targets: y_j, ``[K, K]``.
        lam: λ > 0.
        head: W̃ = [W, b].

    Returns:
        ``hpd_nc1`` = ½ tr W_LS(Σ̃_W + λ)W_LSᵀ, ``hpd_nc23`` = ½ Σ_j π_j |W_LS μ̃_j − y_j|² and ``hpd_perp`` =
        ½ tr (W̃ − W_LS) A (W̃ − W_LS)ᵀ.
    """
    assert moments.pooled is not None
    share = moments.count / moments.total
    width = moments.pooled.shape[0]
    extended = torch.cat([moments.mean, torch.ones_like(share)[:, None]], dim=1)  # [K, D+1], classes without samples weigh 0
    scatter = moments.pooled.new_zeros(width + 1, width + 1)
    scatter[:width, :width] = moments.pooled / moments.total
    scatter.diagonal().add_(lam)
    gram = scatter + (extended * share[:, None]).T @ extended
    best = torch.linalg.solve(gram, (extended * share[:, None]).T @ targets).T  # [K, D+1]
    apart = torch.cat([head.weight, head.bias[:, None]], dim=1) - best
    return {
        "hpd_nc1": ((best @ scatter) * best).sum() / 2,
        "hpd_nc23": (share * (extended @ best.T - targets).square().sum(1)).sum() / 2,
        "hpd_perp": ((apart @ gram) * apart).sum() / 2,
    }


def nearest_mean(features: Tensor, means: Tensor) -> Tensor:
    """Class whose mean is nearest to each feature vector; the lowest of several, −1 where there are no means.

    Args:
        features: ``[B, D]``.
        means: ``[K, D]``; NaN for a class that has none.
    """
    seen = ~means.isnan().any(1)
    if not seen.any():
        return torch.full((len(features),), -1, device=features.device)
    # Differences themselves: |h|² − 2h·μ + |μ|² would lose those that decide.
    distances = torch.cdist(features, means[seen], compute_mode="donot_use_mm_for_euclid_dist")
    return seen.nonzero().flatten()[distances.argmin(1)]


def mismatches(chosen: Tensor, features: Tensor, means: Tensor) -> Tensor:
    """NC4 of each sample: 1 where the nearest class mean is not the class chosen, else 0; NaN for features that are not finite.

    Args:
        chosen: Classes, ``[B]``.
        features: ``[B, D]``.
        means: As for `nearest_mean`.
    """
    differs = (chosen != nearest_mean(features, means)).double()
    return torch.where(features.isfinite().all(1), differs, torch.nan)


def collapse_of_features(
    moments: ClassMoments,
    means: Means,
    options: FeatureOptions,
    targets: ClassTargets,
    head: Head | None,
    within_along: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    """All figures of features but NC4, which needs them one by one.

    Args:
        moments: Of the features.
        means: From them.
        options: How.
        targets: The classes, and y_j for HPD22.
        head: The last layer; None leaves out what needs it.
        within_along: u_kᵀ Σ_W u_k, ``[r]``, for directions ``[D, r]``; None leaves out ``nc1_pinv``.

    Raises:
        ValueError: ``hpd_lambda`` without a head, or with targets of another width.
    """
    num_classes = len(moments.count)
    if options.hpd_lambda is not None and (head is None or targets.width != num_classes):
        raise ValueError(
            "`hpd_lambda` should come with the `weight` of the last layer, and targets with an entry for each class, but got "
            + ("no weight." if head is None else f"targets of width {targets.width} for {num_classes} classes.")
        )
    directions, strength = means.directions(options.rtol)
    along = None if within_along is None else within_along(directions)
    result = variability(means, along, strength) | geometry(means.centred, "means")
    if head is not None:
        result |= geometry(head.weight[means.seen], "weights") | duality(means, head.weight)
        if options.hpd_lambda is not None:
            result |= best_head_split(moments, targets.values.to(head.weight), options.hpd_lambda, head)
    return result
