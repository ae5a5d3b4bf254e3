"""Pure functions on matrices, shape (..., m, n): norms, polar factors, transforms, operators."""

from orthax.linalg import coefficients
from orthax.linalg.bases.cosine import dct, dct_matrix, idct
from orthax.linalg.convolution import convolution_matrix, convolution_singular_values
from orthax.linalg.elementary import frobenius_norm, normalize, top_columns
from orthax.linalg.householder import (
    householder_factors,
    householder_product,
    householder_projector,
    householder_vectors,
)
from orthax.linalg.polar_factor.choice import polar, polar_svd
from orthax.linalg.polar_factor.gram import gram_newton_schulz
from orthax.linalg.polar_factor.nearest import nearest_orthogonal
from orthax.linalg.polar_factor.newton_schulz import newton_schulz
from orthax.linalg.polar_factor.zolotarev import zolotarev
from orthax.linalg.spectral import SpectralNorm, spectral_norm

# fmt: off
__all__ = [
    "SpectralNorm", "coefficients", "convolution_matrix", "convolution_singular_values", "dct",
    "dct_matrix", "frobenius_norm", "gram_newton_schulz", "householder_factors",
    "householder_product", "householder_projector", "householder_vectors", "idct",
    "nearest_orthogonal", "newton_schulz", "normalize", "polar", "polar_svd", "spectral_norm",
    "top_columns", "zolotarev",
]
# fmt: on


def __dir__() -> list[str]:
    return __all__
