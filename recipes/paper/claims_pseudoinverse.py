"""Claims of appendix A, on Jacobians of full and of short rank."""

from collections.abc import Callable

import torch
from claims import Context, Finding, apart, largest, registry
from torch import Tensor

CLAIMS, claim = registry()
NETS = ("small", "narrow")  # full rank, and short


def on_both(c: Context, check: Callable[[Tensor, Tensor], float], computed: str, power: int = 1) -> Finding:
    """Check something of D and the package's D⁺ on both networks.

    Args:
        c: The objects.
        check: Error from D and D⁺.
        computed: What it compares.
        power: Of the condition number in the bound.
    """
    error = largest(*(check(c[f"{name}.D"], c[f"{name}.lstsq_pinv.once"]) for name in NETS))
    return Finding(computed, error, c.nets["narrow"].rounding(power))


def pseudoinverse(a: Tensor) -> Tensor:
    """A⁺ by torch, singular values that rounding makes of zero cut off."""
    found: Tensor = torch.linalg.pinv(a, rtol=1e-10)
    return found


@claim
def against_torch(c: Context) -> Finding:
    """A⁺: the one that torch finds."""
    error = largest(*(apart(c[f"{name}.lstsq_pinv.once"], c[f"{name}.pinv"]) for name in NETS))
    return Finding(
        "rank_revealing_lstsq, torch's pinv", error, c.nets["narrow"].rounding(2)
    )  # Wedin: κ² for what is not in range


@claim
def first_condition(c: Context) -> Finding:
    """(A.1): AA⁺A = A."""
    return on_both(c, lambda a, b: apart(a @ b @ a, a), "rank_revealing_lstsq")


@claim
def second_condition(c: Context) -> Finding:
    """(A.2): A⁺AA⁺ = A⁺."""
    return on_both(c, lambda a, b: apart(b @ a @ b, b), "rank_revealing_lstsq")


@claim
def third_condition(c: Context) -> Finding:
    """(A.3): AA⁺ is symmetric."""
    return on_both(c, lambda a, b: apart((a @ b).T, a @ b), "rank_revealing_lstsq")


@claim
def fourth_condition(c: Context) -> Finding:
    """(A.4): A⁺A is symmetric."""
    return on_both(c, lambda a, b: apart((b @ a).T, b @ a), "rank_revealing_lstsq")


@claim
def full_rank(c: Context) -> Finding:
    """A⁺: Aᵀ(AAᵀ)⁻¹ for a wide A of full rank, (AᵀA)⁻¹Aᵀ for a tall one."""
    net, a = c.nets["small"], c["small.D"]
    inverse = torch.linalg.inv(a @ a.T)
    wide = apart(c["small.lstsq_pinv.once"], a.T @ inverse)
    tall = apart(c["small.lstsq_pinv.of_transpose"], inverse @ a)
    return Finding("rank_revealing_lstsq, torch's inv", largest(wide, tall), net.rounding(2))


@claim
def involution(c: Context) -> Finding:
    """(A.5): (A⁺)⁺ = A."""
    error = largest(*(apart(c[f"{name}.lstsq_pinv.twice"], c[f"{name}.D"]) for name in NETS))
    return Finding("rank_revealing_lstsq, twice", error, c.nets["narrow"].rounding(1))


@claim
def of_transpose(c: Context) -> Finding:
    """(A.6): (Aᵀ)⁺ = (A⁺)ᵀ."""
    error = largest(*(apart(c[f"{name}.lstsq_pinv.of_transpose"], c[f"{name}.lstsq_pinv.once"].T) for name in NETS))
    return Finding("rank_revealing_lstsq of A and of Aᵀ", error, c.nets["narrow"].rounding(2))


@claim
def of_gram(c: Context) -> Finding:
    """(A.7): (AᵀA)⁺ = A⁺(Aᵀ)⁺."""
    errors = (
        apart(c[f"{name}.lstsq_pinv.once"] @ c[f"{name}.lstsq_pinv.of_transpose"], c[f"{name}.gram_pinv"]) for name in NETS
    )
    return Finding("rank_revealing_lstsq, pinv(DᵀD)", largest(*errors), c.nets["narrow"].rounding(2))


def range_of(a: Tensor, rank: int) -> Tensor:
    """Projector onto ran A, by singular vectors."""
    u: Tensor = torch.linalg.svd(a, full_matrices=False)[0][:, :rank]
    return u @ u.T


@claim
def onto_range(c: Context) -> Finding:
    """(A.8): AA⁺ is the projector onto ran A."""
    return on_both(c, lambda a, b: apart(a @ b, range_of(a, _rank(a))), "rank_revealing_lstsq, SVD")


@claim
def onto_range_of_transpose(c: Context) -> Finding:
    """(A.9): A⁺A is the projector onto ran Aᵀ."""
    return on_both(c, lambda a, b: apart(b @ a, range_of(a.T, _rank(a))), "rank_revealing_lstsq, SVD")


def _rank(a: Tensor) -> int:
    return int(torch.linalg.matrix_rank(a, rtol=1e-10))


@claim
def one_range(c: Context) -> Finding:
    """(A.10): ran A⁺ = ran Aᵀ."""
    return on_both(c, lambda a, b: apart(range_of(b, _rank(b)), range_of(a.T, _rank(a))), "rank_revealing_lstsq, SVD of each")


@claim
def one_kernel(c: Context) -> Finding:
    """(A.11): ker A⁺ = ker Aᵀ."""
    a, b, found = c["narrow.D"], c["narrow.lstsq_pinv.once"], []  # of short rank: else both are {0}
    for matrix in (b, a.T):
        rows = torch.linalg.svd(matrix)[2][_rank(matrix) :]
        found.append(rows.T @ rows)
    return Finding("rank_revealing_lstsq, SVD of each", apart(found[0], found[1]), c.nets["narrow"].rounding(1))


@claim
def identity(c: Context) -> Finding:
    """(A.12): A = AAᵀ(Aᵀ)⁺ = (Aᵀ)⁺AᵀA, and with A⁺ or Aᵀ in the place of A."""

    def check(a: Tensor, b: Tensor) -> float:
        errors = []
        for one, plus in ((a, b), (a.T, b.T), (b, a), (b.T, a.T)):
            errors += [apart(one @ (one.T @ plus.T), one), apart(plus.T @ one.T @ one, one)]
        return largest(*errors)

    return on_both(c, check, "rank_revealing_lstsq", 2)


@claim
def commuting(c: Context) -> Finding:
    """(A.12): A⁺A = AA⁺ for a symmetric A, but not for any."""
    net, theta = c.nets["narrow"], c["narrow.kernel"]
    plus = pseudoinverse(theta)
    general = c["narrow.D"][:, -net.num_outputs :]
    other = pseudoinverse(general)
    off = apart(other @ general, general @ other)
    error = largest(apart(plus @ theta, theta @ plus), apart(plus, c["narrow.pinv"].T @ c["narrow.pinv"]))
    return Finding("ntk, torch's pinv", error, net.rounding(2), off=off, amount=0.1)


@claim
def one_way(c: Context) -> Finding:
    """(A.13)-(A.14): AᵀA = AᵀAA⁺A, so ker A⁺A lies in ker AᵀA."""

    def check(a: Tensor, b: Tensor) -> float:
        inside = torch.eye(a.shape[1]).to(a) - b @ a  # onto ker A⁺A
        gram = a.T @ a
        return largest(apart(gram @ (b @ a), gram), apart(gram @ inside, torch.zeros_like(gram), size=gram.norm()))

    return on_both(c, check, "rank_revealing_lstsq")


@claim
def other_way(c: Context) -> Finding:
    """(A.15)-(A.16): A⁺A = A⁺(Aᵀ)⁺AᵀA, so ker AᵀA lies in ker A⁺A."""

    def check(a: Tensor, b: Tensor) -> float:
        gram, once = a.T @ a, b @ a
        vectors = torch.linalg.eigh(gram)[1][:, : len(gram) - _rank(a)]
        return largest(apart(b @ (b.T @ gram), once), float((once @ vectors).norm()) / len(gram) ** 0.5)

    return on_both(c, check, "rank_revealing_lstsq", 2)


@claim
def lemma(c: Context) -> Finding:
    """Lemma A.2: ker AᵀA = ker A⁺A."""

    def check(a: Tensor, b: Tensor) -> float:
        vectors = torch.linalg.eigh(a.T @ a)[1][:, : a.shape[1] - _rank(a)]
        return apart(vectors @ vectors.T, torch.eye(a.shape[1]).to(a) - b @ a)

    return on_both(c, check, "rank_revealing_lstsq, eigenvectors", 2)
