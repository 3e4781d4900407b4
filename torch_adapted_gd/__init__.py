"""Adapted gradient descent for PyTorch: outputs move straight to their targets.

The method is that of Chen & Muñoz Ewald, "Gradient flow in parameter space is equivalent to linear interpolation in
output space" (2024); equation numbers in this package are the paper's.
"""

from importlib.metadata import PackageNotFoundError, version

from .jacobian import OuterProducts, Use, ntk, output_jacobian, register_rule
from .losses import HalfSquaredLoss, LossFunction
from .optimizer import AdaptedGD
from .policies import Backtracking, LevenbergMarquardt, StraightLine
from .report import StepReport
from .schedule import LinearInterpolationLR
from .solve import ConjugateGradients, KernelSolution, LeastSquares, rank_revealing_lstsq, solve_kernel
from .step.system import Dense
from .theory.definite import Definiteness, effective_kernel, is_positive_definite, kernel_block
from .theory.field import Equilibrium, GradientField, gradient_field, is_equilibrium, metric_tensor
from .theory.flow import FlowResult, InterpolationDeviation, PathResult, adapted_flow, follow_path, interpolation_deviation
from .theory.lines import LineLosses, line_losses
from .theory.paths import DetourPath, LinearPath
from .warning import AdaptedWarning

try:
    __version__ = version("torch_adapted_gd")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "AdaptedGD",
    "AdaptedWarning",
    "Backtracking",
    "ConjugateGradients",
    "Definiteness",
    "Dense",
    "DetourPath",
    "Equilibrium",
    "FlowResult",
    "GradientField",
    "HalfSquaredLoss",
    "InterpolationDeviation",
    "KernelSolution",
    "LeastSquares",
    "LevenbergMarquardt",
    "LineLosses",
    "LinearInterpolationLR",
    "LinearPath",
    "LossFunction",
    "OuterProducts",
    "PathResult",
    "StepReport",
    "StraightLine",
    "Use",
    "adapted_flow",
    "effective_kernel",
    "follow_path",
    "gradient_field",
    "interpolation_deviation",
    "is_equilibrium",
    "is_positive_definite",
    "kernel_block",
    "line_losses",
    "metric_tensor",
    "ntk",
    "output_jacobian",
    "rank_revealing_lstsq",
    "register_rule",
    "solve_kernel",
]
