"""The output Jacobian D as an operator, and the empirical neural tangent kernel Θ = DDᵀ (3.14)-(3.15)."""

from . import functions as functions  # the rules register themselves
from .definition import output_jacobian
from .gram import norm
from .operator import Jacobian, ParameterVector
from .products import OuterProducts
from .rules import register_rule
from .tangent import METHODS, ntk, tangent_jacobian, written, written_if_small
from .uses import Use

__all__ = [
    "METHODS",
    "Jacobian",
    "OuterProducts",
    "ParameterVector",
    "Use",
    "norm",
    "ntk",
    "output_jacobian",
    "register_rule",
    "tangent_jacobian",
    "written",
    "written_if_small",
]
