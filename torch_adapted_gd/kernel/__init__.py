"""The empirical neural tangent kernel Θ = DDᵀ (3.14)-(3.15)."""

from .module_calls import ModuleCall
from .products import OuterProducts
from .rules import register_rule
from .tangent import METHODS, ntk, tangent_kernel

__all__ = ["METHODS", "ModuleCall", "OuterProducts", "ntk", "register_rule", "tangent_kernel"]
