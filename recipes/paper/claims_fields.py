"""Claims of section 2.1: the step, the family of fields of Theorem 2.3, its equilibria and its metric."""

import torch
from claims import ALPHAS, EPS, Context, Finding, apart, largest, registry
from torch import Tensor

CLAIMS, claim = registry()


def differences(c: Context, name: str) -> float:
    """By how much differences along the short flows may err: what they differ by from those of double steps."""
    return float(c.pristine[f"{name}.short.doubt"])


@claim
def chain_rule(c: Context) -> Finding:
    """(2.15): outputs move by D times the motion of the parameters."""
    net = c.nets["wide"]
    v = torch.randn(len(net.theta), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    h = 1e-5 * float(net.theta.norm() / v.norm())
    moved = (net.outputs(net.theta + h * v) - net.outputs(net.theta - h * v)) / (2 * h)
    # Differences err by the square of a relative step of 1e-5 times higher derivatives, and by ε/1e-5.
    return Finding("output_jacobian, differences", apart(c["wide.D"] @ v, moved), 1e-8)


@claim
def gradients(c: Context) -> Finding:
    """(2.16): ∇_θC = Dᵀ∇ₓC."""
    net, d = c.nets["wide"], c["wide.D"]
    error = apart(d.T @ net.g, c["wide.gradient.half"])
    return Finding("output_jacobian, backward()", error, net.rounding())


@claim
def gradients_of_cross_entropy(c: Context) -> Finding:
    """(2.16): the same for cross-entropy."""
    net = c.nets["wide"]
    g = (net.start.view_as(net.y).softmax(1) - net.y).flatten() / net.num_samples
    return Finding("output_jacobian, backward()", apart(c["wide.D"].T @ g, c["wide.gradient.entropy"]), net.rounding())


@claim
def standard_flow(c: Context) -> Finding:
    """(2.18): gradient descent moves outputs by −DDᵀ∇ₓC."""
    net, theta, d = c.nets["wide"], c["wide.short.theta"][0], c["wide.short_D"][0]
    g = (net.outputs(theta) - net.y.flatten()) / net.num_samples
    return Finding("adapted_flow(alpha=0), dense D", apart(c["wide.short.velocity"][0], -d @ (d.T @ g)), differences(c, "wide"))


@claim
def full_rank(c: Context) -> Finding:
    """(2.19)-(2.20): at full rank D takes (DᵀD)⁺∇_θC to ∇ₓC."""
    net = c.nets["small"]
    v = c["small.gram_pinv"] @ c["small.gradient.half"]
    error = largest(apart(c["small.D"] @ v, net.g), apart(c["small.fields.parameters"][-1], -v))
    return Finding("gradient_field, pinv(DᵀD)", error, net.rounding(2))


@claim
def euclidean_flow(c: Context) -> Finding:
    """(2.20): outputs of the adapted flow descend ∇ₓC itself."""
    net = c.nets["wide"]
    g = (net.outputs(c["wide.short.theta"][2]) - net.y.flatten()) / net.num_samples
    return Finding("adapted_flow, differences", apart(c["wide.short.velocity"][2], -g), differences(c, "wide"))


@claim
def rank_loss(c: Context) -> Finding:
    """(2.21)-(2.23): with rank loss Θψ = Pg can be solved, and −Dᵀψ moves outputs by −Pg."""
    net, psi, p = c.nets["twins"], c["twins.solution.psi"].flatten(), c["twins.P"] @ c.nets["twins"].g
    error = largest(
        apart(c["twins.kernel"] @ psi, p),
        apart(c["twins.D"] @ (c["twins.D"].T @ psi), p),
        abs(float(c["twins.solution.rank"]) - net.rank),
    )
    return Finding("solve_kernel, ntk, P of the SVD", error, net.rounding(2))


def psi_of(c: Context, name: str) -> Tensor:
    """ψ̃ of (2.24) by pseudoinverses alone."""
    d_pinv = c[f"{name}.pinv"]
    d, once = c.nets[name].jacobian, d_pinv.T @ c[f"{name}.gradient.half"]
    inverse: Tensor = torch.linalg.pinv(d @ d.T, rtol=1e-10, hermitian=True)
    return d @ (d_pinv @ (inverse @ once))


@claim
def psi_tilde(c: Context) -> Finding:
    """(2.24)-(2.25): ψ̃ = DD⁺(DDᵀ)⁺(Dᵀ)⁺∇_θC solves Θψ = Pg."""
    net, psi = c.nets["narrow"], psi_of(c, "narrow")
    found = c["narrow.solution.psi"].flatten()
    error = largest(apart(c["narrow.kernel"] @ psi, c["narrow.P"] @ net.g), apart(found, psi))
    return Finding("solve_kernel, ntk, torch's pinv", error, net.rounding(2))


@claim
def chain(c: Context) -> Finding:
    """(2.26): (DᵀD)⁺∇_θC = Dᵀψ̃, by each line of the chain."""
    net, grad, gram, once = c.nets["narrow"], c["narrow.gradient.half"], c["narrow.gram_pinv"], c["narrow.pinv"]
    d = net.jacobian
    expected = -c["narrow.fields.parameters"][-1]
    by_lines = (
        gram @ grad,
        gram @ (d.T @ (d @ (gram @ grad))),
        d.T @ (d @ (gram @ (gram @ grad))),
        d.T @ (d @ (once @ (once.T @ (once @ (once.T @ grad))))),
        d.T @ psi_of(c, "narrow"),
    )
    # The third line divides by σ⁴ before it multiplies by σ²: κ⁴ ε in the worst case, of which directions see little.
    return Finding("gradient_field, pinv(DᵀD)", largest(*(apart(line, expected) for line in by_lines)), net.rounding(2))


@claim
def constrained_flow(c: Context) -> Finding:
    """(2.27)-(2.28): with rank loss the adapted flow moves outputs by −P∇ₓC."""
    net, d = c.nets["narrow"], c["narrow.short_D"][2]
    g = (net.outputs(c["narrow.short.theta"][2]) - net.y.flatten()) / net.num_samples
    p = d @ torch.linalg.lstsq(d, g[:, None], driver="gelsd", rcond=1e-10).solution.flatten()
    return Finding("adapted_flow, lstsq of dense D", apart(c["narrow.short.velocity"][2], -p), differences(c, "narrow"))


@claim
def family(c: Context) -> Finding:
    """(2.31)-(2.32): V_α = −[α(DᵀD)⁺ + (1−α)1]∇_θC."""
    net, gram, grad = c.nets["narrow"], c["narrow.gram_pinv"], c["narrow.gradient.half"]
    one = torch.eye(len(gram)).to(gram)
    fields = zip(ALPHAS, c["narrow.fields.parameters"], strict=True)
    errors = (apart(v, -((alpha * gram + (1 - alpha) * one) @ grad)) for alpha, v in fields)
    return Finding("gradient_field, pinv(DᵀD), 5 α", largest(*errors), net.rounding(2))


@claim
def positive(c: Context) -> Finding:
    """(2.32): A_α is positive definite for α < 1, its smallest eigenvalue 1 − α."""
    gram, net = c["narrow.gram_pinv"], c.nets["narrow"]
    one = torch.eye(len(gram)).to(gram)
    least = (float(torch.linalg.eigvalsh(alpha * gram + (1 - alpha) * one)[0]) - (1 - alpha) for alpha in ALPHAS[:-1])
    size = float(gram.norm())
    return Finding(
        "eigenvalues of A_α", largest(*(abs(value) / size for value in least)), len(gram) * EPS * 10 + net.rounding()
    )


@claim
def first_of_family(c: Context) -> Finding:
    """(2.33), (2.42): V₀ is gradient descent, −∇_θC and −DDᵀ∇ₓC."""
    net = c.nets["twins"]
    error = largest(
        apart(c["twins.fields.parameters"][0], -c["twins.gradient.half"]),
        apart(c["twins.fields.outputs"][0], -c["twins.D"] @ (c["twins.D"].T @ net.g)),
    )
    return Finding("gradient_field, backward()", error, net.rounding(1))


@claim
def last_of_family(c: Context) -> Finding:
    """(2.34), (2.43): V₁ is the adapted flow, −D⁺∇ₓC and −P∇ₓC."""
    net = c.nets["twins"]
    error = largest(
        apart(c["twins.fields.parameters"][-1], -c["twins.pinv"] @ net.g),
        apart(c["twins.fields.outputs"][-1], -c["twins.P"] @ net.g),
    )
    return Finding("gradient_field, torch's pinv", error, net.rounding(2))


@claim
def in_range(c: Context) -> Finding:
    """(2.35): ∇_θC lies in ran Dᵀ: D⁺D leaves it as it is."""
    net, grad = c.nets["narrow"], c["narrow.gradient.half"]
    return Finding("backward(), torch's pinv", apart(c["narrow.pinv"] @ (c["narrow.D"] @ grad), grad), net.rounding(1))


def kernel_of(matrix: Tensor, rank: int) -> Tensor:
    """Projector onto ker A of a symmetric matrix whose rank is known."""
    values, vectors = torch.linalg.eigh(matrix)
    basis: Tensor = vectors[:, values.abs().argsort()[: len(matrix) - rank]]
    return basis @ basis.T


@claim
def kernels(c: Context) -> Finding:
    """(2.36): (DᵀD)⁺, DᵀD and D⁺D have one kernel."""
    net, d = c.nets["narrow"], c["narrow.D"]
    found = [kernel_of((m + m.T) / 2, net.rank) for m in (c["narrow.gram_pinv"], d.T @ d, c["narrow.pinv"] @ d)]
    errors = [apart(one, found[0]) for one in found[1:]]
    return Finding("eigenvectors of dense matrices", largest(*errors), net.rounding(2))


@claim
def common_equilibrium(c: Context) -> Finding:
    """(2.17), (2.36): all V_α vanish together, where ∇ₓC need not: conflicting labels, fitted as far as they can be."""
    net, d = c.nets["twins"], c["twins.equilibrium.D"]
    g = (c["twins.equilibrium.outputs"] - net.y.flatten()) / net.num_samples
    size = float(g.norm())
    reached = torch.linalg.lstsq(d, g[:, None], driver="gelsd", rcond=1e-10).solution.flatten()
    flags = (bool(c["twins.equilibrium.before.bool"]), bool(c["twins.equilibrium.after.bool"]), size > 0.01)
    error = largest(
        float((d.T @ g).norm()) / (net.largest * size),
        float(reached.norm()) * net.largest / net.condition / size,
        abs(float(c["twins.equilibrium.after.off_range"]) - size) / size,
        0.0 if flags == (False, True, True) else 1.0,
    )
    # Gauss–Newton steps end where rounding of the step, κ² QN ε, holds them.
    return Finding("is_equilibrium, dense D", error, net.rounding(2))


@claim
def descent(c: Context) -> Finding:
    """(2.36): elsewhere none of them vanishes, and all descend: V_α·∇_θC = −α|Pg|² − (1−α)|∇_θC|²."""
    net = c.nets["twins"]
    u, s, v = net.svd
    reach, steep = float(net.g @ (c["twins.P"] @ net.g)), float(c["twins.gradient.half"] @ (v.T @ (s * (u.T @ net.g))))
    slopes = torch.tensor([-alpha * reach - (1 - alpha) * steep for alpha in ALPHAS], dtype=torch.float64)
    adapted = float((c["twins.pinv"] @ net.g) @ (v.T @ (u.T @ net.g / s)))
    error = largest(
        apart(c["twins.fields.slope"], slopes),
        abs(float(c["twins.equilibrium.before.gradient"]) - steep**0.5) / abs(steep) ** 0.5,
        abs(float(c["twins.equilibrium.before.reach"]) - reach**0.5) / abs(reach) ** 0.5,
        abs(float(c["twins.equilibrium.before.adapted"]) - adapted**0.5) / abs(adapted) ** 0.5,
    )
    return Finding("gradient_field, is_equilibrium", error, net.rounding(2))


@claim
def flows(c: Context) -> Finding:
    """(2.37)-(2.38): along ∂_sθ = V_α outputs move by DV_α, for α = 0, ½, 1."""
    net, errors = c.nets["small"], []
    for k, alpha in enumerate((0.0, 0.5, 1.0)):
        d = c["small.short_D"][k]
        g = (net.outputs(c["small.short.theta"][k]) - net.y.flatten()) / net.num_samples
        v = -alpha * torch.linalg.pinv(d) @ g - (1 - alpha) * d.T @ g
        errors += [apart(c["small.short.drift"][k], v), apart(c["small.short.velocity"][k], d @ v)]
    return Finding("adapted_flow, torch's pinv", largest(*errors), differences(c, "small"))


@claim
def pushed(c: Context) -> Finding:
    """(2.39): D takes V_α to −(α1 + (1−α)DDᵀ)P∇ₓC."""
    errors = []
    for name in ("wide", "narrow"):
        d, p = c[f"{name}.D"], c[f"{name}.P"] @ c.nets[name].g
        for alpha, v in zip(ALPHAS, c[f"{name}.fields.parameters"], strict=True):
            errors.append(apart(d @ v, -alpha * p - (1 - alpha) * (d @ (d.T @ p))))
    return Finding("gradient_field, dense D and P, 5 α", largest(*errors), c.nets["narrow"].rounding(2))


@claim
def in_outputs(c: Context) -> Finding:
    """(2.40)-(2.41): V_α in output space, from Θ, is DV_α."""
    errors = []
    for name in ("wide", "narrow", "twins"):
        pairs = zip(c[f"{name}.fields.parameters"], c[f"{name}.fields.outputs"], strict=True)
        errors += [apart(c[f"{name}.D"] @ v, w) for v, w in pairs]
    return Finding("gradient_field's two fields", largest(*errors), c.nets["narrow"].rounding(2))


@claim
def injective(c: Context) -> Finding:
    """(2.44): V_α in output space vanishes only with Pg: its part along −Pg is between the extremes of α + (1−α)σ²."""
    errors = [0.0]
    for name in ("narrow", "wide"):
        net = c.nets[name]
        p, squares = c[f"{name}.P"] @ net.g, net.svd[1].square()
        for alpha, w in zip(ALPHAS, c[f"{name}.fields.outputs"], strict=True):
            share = float(-(w @ p) / (p @ p))
            least, most = (alpha + (1 - alpha) * float(value) for value in (squares[-1], squares[0]))
            errors += [(least - share) / least, (share - most) / most, apart(c[f"{name}.P"] @ w, w)]
    return Finding("gradient_field, singular values", largest(*errors), c.nets["narrow"].rounding(2))


@claim
def metric(c: Context) -> Finding:
    """(2.45): at full rank V_α is the gradient for the metric (α1 + (1−α)DDᵀ)⁻¹."""
    net, d, errors = c.nets["small"], c["small.D"], []
    one = torch.eye(net.num_outputs, dtype=torch.float64)
    for alpha, w, h in zip(ALPHAS, c["small.fields.outputs"], c["small.metrics"], strict=True):
        errors += [apart(h, torch.linalg.inv(alpha * one + (1 - alpha) * d @ d.T)), apart(h @ w, -net.g)]
    return Finding("metric_tensor, torch's inv", largest(*errors), net.rounding(2))


@claim
def bundle_metric(c: Context) -> Finding:
    """(2.46): with rank loss the same on ran DDᵀ."""
    net, errors = c.nets["narrow"], []
    p = c["narrow.P"]
    values, vectors = torch.linalg.eigh(p)
    basis = vectors[:, values > 0.5]
    inside = basis.T @ net.jacobian @ net.jacobian.T @ basis
    one = torch.eye(basis.shape[1]).to(p)
    for alpha, w, h in zip(ALPHAS, c["narrow.fields.outputs"], c["narrow.metrics"], strict=True):
        expected = basis @ torch.linalg.inv(alpha * one + (1 - alpha) * inside) @ basis.T
        errors += [apart(h, expected), apart(h @ w, -p @ net.g)]
    return Finding("metric_tensor, inv on a basis", largest(*errors), net.rounding(2))
