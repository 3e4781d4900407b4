"""Adapted gradient descent for PyTorch: outputs move straight to their targets.

The method is that of Chen & Muñoz Ewald, "Gradient flow in parameter space is equivalent to linear interpolation in
output space" (2024); equation numbers in this package are the paper's.
"""

from importlib.metadata import PackageNotFoundError, version

from .damping import LevenbergMarquardt
from .jacobian import output_jacobian
from .kernel import ModuleCall, OuterProducts, ntk, register_rule
from .loss import HalfSquaredLoss
from .optimizer import AdaptedGD
from .report import StepReport
from .schedule import LinearInterpolationLR
from .solve import KernelSolution, LeastSquares, rank_revealing_lstsq, solve_kernel

try:
    __version__ = version("torch_adapted_gd")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "AdaptedGD",
    "HalfSquaredLoss",
    "KernelSolution",
    "LeastSquares",
    "LevenbergMarquardt",
    "LinearInterpolationLR",
    "ModuleCall",
    "OuterProducts",
    "StepReport",
    "ntk",
    "output_jacobian",
    "rank_revealing_lstsq",
    "register_rule",
    "solve_kernel",
]
