"""The tangent-kernel system Θψ = Pg (2.22), solved with its rank revealed."""

from .api import KernelSolution, solve_kernel
from .choice import factorize
from .equilibrated import equilibrated
from .factorization import Factorization
from .krylov import ConjugateGradients
from .lstsq import LeastSquares, rank_revealing_lstsq
from .singular import SingularValueFactorization, by_singular_values, default_svd_rtol
from .spectrum import default_rtol

__all__ = [
    "ConjugateGradients",
    "Factorization",
    "KernelSolution",
    "LeastSquares",
    "SingularValueFactorization",
    "by_singular_values",
    "default_rtol",
    "default_svd_rtol",
    "equilibrated",
    "factorize",
    "rank_revealing_lstsq",
    "solve_kernel",
]
