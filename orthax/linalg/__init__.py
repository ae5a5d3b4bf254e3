"""Pure functions on matrices, shape (..., m, n): norms, polar factors, cosine transforms."""

from orthax.linalg import coefficients as coefficients
from orthax.linalg._columns import top_columns as top_columns
from orthax.linalg._dct import dct as dct
from orthax.linalg._dct import dct_matrix as dct_matrix
from orthax.linalg._dct import idct as idct
from orthax.linalg._gram import gram_newton_schulz as gram_newton_schulz
from orthax.linalg._newton_schulz import newton_schulz as newton_schulz
from orthax.linalg._norms import frobenius_norm as frobenius_norm
from orthax.linalg._norms import normalize as normalize
from orthax.linalg._polar import polar as polar
from orthax.linalg._polar import polar_svd as polar_svd
from orthax.linalg._zolotarev import zolotarev as zolotarev
