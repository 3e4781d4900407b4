"""The empirical neural tangent kernel Θ = DDᵀ (3.14)-(3.15)."""

from .dense import norm
from .module_calls import ModuleCall
from .products import OuterProducts
from .rules import register_rule
from .tangent import METHODS, Factors, ntk, tangent_factors, tangent_gram, tangent_kernel

__all__ = [
    "METHODS",
    "Factors",
    "ModuleCall",
    "OuterProducts",
    "norm",
    "ntk",
    "register_rule",
    "tangent_factors",
    "tangent_gram",
    "tangent_kernel",
]
