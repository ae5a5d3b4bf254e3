"""Pure functions on matrices, shape (..., m, n): norms, polar factors, transforms, operators."""

from orthax.linalg import coefficients as coefficients
from orthax.linalg._columns import top_columns as top_columns
from orthax.linalg._convolution import convolution_matrix as convolution_matrix
from orthax.linalg._convolution import convolution_singular_values as convolution_singular_values
from orthax.linalg._dct import dct as dct
from orthax.linalg._dct import dct_matrix as dct_matrix
from orthax.linalg._dct import idct as idct
from orthax.linalg._gram import gram_newton_schulz as gram_newton_schulz
from orthax.linalg._householder import householder_factors as householder_factors
from orthax.linalg._householder import householder_product as householder_product
from orthax.linalg._householder import householder_projector as householder_projector
from orthax.linalg._householder import householder_vectors as householder_vectors
from orthax.linalg._newton_schulz import newton_schulz as newton_schulz
from orthax.linalg._norms import frobenius_norm as frobenius_norm
from orthax.linalg._norms import normalize as normalize
from orthax.linalg._polar import polar as polar
from orthax.linalg._polar import polar_svd as polar_svd
from orthax.linalg._retraction import nearest_orthogonal as nearest_orthogonal
from orthax.linalg._spectral import SpectralNorm as SpectralNorm
from orthax.linalg._spectral import spectral_norm as spectral_norm
from orthax.linalg._zolotarev import zolotarev as zolotarev
