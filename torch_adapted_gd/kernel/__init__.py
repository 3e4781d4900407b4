"""The empirical neural tangent kernel Θ = DDᵀ (3.14)-(3.15)."""

from .dense import StackedJacobian, gram, ntk

__all__ = ["StackedJacobian", "gram", "ntk"]
