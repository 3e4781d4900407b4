"""Outputs and features near collapse, with their figures in rational numbers or by the papers' definitions."""

from fractions import Fraction

import torch
from torch import Tensor


def near_targets(targets: Tensor, counts: list[int], bias: float, deviation: float) -> tuple[Tensor, Tensor]:
    """Outputs ``[N, d]`` whose class averages are about ``bias`` from their targets, in random order, and their labels."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[torch.randperm(sum(counts))]
    shift = torch.nn.functional.normalize(torch.randn_like(targets))
    return targets[labels] + bias * shift[labels] + deviation * torch.randn(len(labels), targets.shape[1]).double(), labels


def grid(*shape: int) -> Tensor:
    """Float64 multiples of 1/8, so that sums and differences are exact."""
    return torch.randint(-24, 25, shape).double() / 8


def exact_split(outputs: Tensor, labels: Tensor, targets: Tensor) -> dict[str, Fraction]:
    """C = within + bias of (3.11), corrected, in rational arithmetic."""
    rows = [[Fraction(float(value)) for value in row] for row in outputs]
    goals = [[Fraction(float(value)) for value in row] for row in targets]
    total = {"loss": Fraction(0), "within": Fraction(0), "bias": Fraction(0)}
    for j, goal in enumerate(goals):
        own = [row for row, label in zip(rows, labels.tolist(), strict=True) if label == j]
        if not own:
            continue
        average = [sum(column) / len(own) for column in zip(*own, strict=True)]
        total["loss"] += sum((x - y) ** 2 for row in own for x, y in zip(row, goal, strict=True))
        total["within"] += sum((x - y) ** 2 for row in own for x, y in zip(row, average, strict=True))
        total["bias"] += len(own) * sum((x - y) ** 2 for x, y in zip(average, goal, strict=True))
    return {key: value / len(rows) for key, value in total.items()}


def apart(found: Tensor, exact: Fraction) -> float:
    """Relative error, computed without rounding."""
    return float(abs(Fraction(float(found)) - exact) / exact)


def simplex(classes: int, width: int, norm: float) -> Tensor:
    """Corners of a regular simplex around 0, ``[K, D]``, in a random position."""
    corners = torch.eye(classes).double() - 1 / classes
    rotation = torch.linalg.qr(torch.randn(width, width).double())[0]
    return norm * corners / corners[0].norm() @ rotation[:classes]


def _scatter(rows: Tensor, weights: Tensor) -> Tensor:
    total = torch.zeros(rows.shape[1], rows.shape[1]).double()
    for row, weight in zip(rows, weights, strict=True):
        total += weight * torch.outer(row, row)
    return total


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def _simplex_error(products: Tensor) -> Tensor:
    k = len(products)
    best = torch.eye(k).double() - torch.ones(k, k).double() / k
    return torch.linalg.matrix_norm(products / torch.linalg.matrix_norm(products) - best / torch.linalg.matrix_norm(best))


def published(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None, *, weighting: str = "class"
) -> dict[str, float]:
    """NC1 to NC4 as the papers write them: matrices in full, sums as loops. All classes have samples."""
    k = len(weight)
    own = [features[labels == j] for j in range(k)]
    means = torch.stack([rows.mean(0) for rows in own])
    omega = torch.tensor([len(rows) / len(features) if weighting == "sample" else 1 / k for rows in own], dtype=torch.float64)
    centred = means - sum(omega[j] * means[j] for j in range(k))
    within = _scatter(features - means[labels], torch.full((len(features),), 1 / len(features), dtype=torch.float64))
    between = _scatter(centred, omega)
    spread = [float((own[j] - means[j]).square().sum() / len(own[j])) for j in range(k)]
    cdnv = [
        (spread[i] + spread[j]) / (2 * float((means[i] - means[j]).square().sum()))
        for i in range(k)
        for j in range(k)
        if i != j
    ]
    found = {
        "nc1_pinv": torch.trace(within @ torch.linalg.pinv(between, rtol=1e-10, hermitian=True)) / k,
        "nc1_trace": torch.trace(within) / torch.trace(between),
        "nc1_cdnv": sum(cdnv) / len(cdnv),
    }
    for name, rows in (("means", centred), ("weights", weight)):
        norms = [float(row.norm()) for row in rows]
        average = sum(norms) / k
        angles = [_cosine(rows[i], rows[j]) for i in range(k) for j in range(k) if i != j]
        middle = sum(angles) / len(angles)
        found[f"nc2_equinorm_{name}"] = (sum((norm - average) ** 2 for norm in norms) / (k - 1)) ** 0.5 / average
        found[f"nc2_equiangular_{name}"] = (sum((angle - middle) ** 2 for angle in angles) / len(angles)) ** 0.5
        found[f"nc2_maxangle_{name}"] = sum(abs(angle + 1 / (k - 1)) for angle in angles) / len(angles)
        found[f"nc2_etf_{name}"] = _simplex_error(rows @ rows.T)
    unit = [matrix / torch.linalg.matrix_norm(matrix) for matrix in (weight, centred)]
    found["nc3"] = torch.linalg.matrix_norm(unit[0] - unit[1]) ** 2
    found["nc3_etf"] = _simplex_error(weight @ centred.T)
    differ = 0
    for row in features:
        scores = [float(weight[j] @ row + (0 if bias is None else bias[j])) for j in range(k)]
        distances = [float((row - means[j]).norm()) for j in range(k)]
        differ += scores.index(max(scores)) != distances.index(min(distances))
    found["nc4_mismatch"] = differ / len(features)
    return {key: float(value) for key, value in found.items()}
