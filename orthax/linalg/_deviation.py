"""How far a matrix is from orthogonal: its Gram matrix less the identity."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from orthax.linalg._symmetric import gram, less_identity


def gram_deviation(x: jax.Array) -> jax.Array:
    """The Gram matrix of the shorter side less the identity; zero iff `x` is orthogonal.

    Of the columns where `x` is tall or square, of the rows where it is wide: the other Gram matrix
    has not the rank to be an identity. Products are exact to the dtype on every backend.

    Args:
      x: Matrices, shape (..., m, n), real or complex floating.

    Returns:
      Hermitian, shape (..., k, k) with k = min(m, n); float32 for 16-bit input, else the dtype of
      `x`. Its derivative, in either mode, takes one product of the size of the Gram matrix's.
    """
    return gram_less_identity(short_side_first(x))


def short_side_first(x: jax.Array) -> jax.Array:
    """Tall and square matrices transposed, so that columns are rows; in at least float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x.mT if x.shape[-2] >= x.shape[-1] else x


@jax.custom_jvp
def gram_less_identity(y: jax.Array) -> jax.Array:
    """Y y^H - I for wide matrices y, shape (..., k, n) to (..., k, k)."""
    return less_identity(gram(y, lax.Precision.HIGHEST))


@gram_less_identity.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # t y^H + y t^H as one product: what autodiff would make two, forwards and backwards.
    (y,), (t,) = primals, tangents
    half = jnp.matmul(t, y.mT.conj(), precision=lax.Precision.HIGHEST)
    return gram_less_identity(y), half + half.mT.conj()
