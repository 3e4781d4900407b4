"""The tangent-kernel system Θψ = Pg (2.22), solved with its rank revealed."""

from .api import solve_kernel, solve_symmetric
from .choice import factorize
from .equilibrated import equilibrated
from .factorization import Factorization, Status
from .krylov import ConjugateGradients
from .lstsq import LeastSquares, rank_revealing_lstsq
from .singular import SingularValueFactorization, by_singular_values, default_svd_rtol
from .solution import METHODS, KernelSolution
from .spectrum import default_rtol

__all__ = [
    "METHODS",
    "ConjugateGradients",
    "Factorization",
    "KernelSolution",
    "LeastSquares",
    "SingularValueFactorization",
    "Status",
    "by_singular_values",
    "default_rtol",
    "default_svd_rtol",
    "equilibrated",
    "factorize",
    "rank_revealing_lstsq",
    "solve_kernel",
    "solve_symmetric",
]
