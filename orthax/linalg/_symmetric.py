"""Products that are known to be Hermitian, and inverses of positive definite matrices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LEAF = 31
"""Rows up to which a Cholesky factor is inverted as one; above, by halves, in matrix products.

On CPU a triangular solve of 32 rows or more is spread over threads by OpenBLAS, which then wait
busily for the next one and take cores from XLA: an inverse of 768 rows takes 1.7 times as long.
"""

WHOLE = 192
"""Rows up to which a triangular matrix is multiplied as if it were full."""


def symmetric_product(a: jax.Array, b: jax.Array, precision: Any = None) -> jax.Array:
    """Product `a @ b` that is known to be Hermitian, such as a Gram matrix or a polynomial of one.

    All such products of `linalg` go through here: the place for a kernel that computes one half.
    XLA has none. On CPU, cutting the product into blocks and leaving one out costs more in copies
    than it saves, at all sizes up to 2048 (0.8 to 0.95 of the plain product's speed).

    Args:
      a: Shape (..., m, k).
      b: Shape (..., k, m).
      precision: Passed to `jnp.matmul`.

    Returns:
      Shape (..., m, m).
    """
    return jnp.matmul(a, b, precision=precision)


def gram(x: jax.Array, precision: Any = None) -> jax.Array:
    """Gram matrix of the rows, x x^H, shape (..., m, m)."""
    return symmetric_product(x, x.mT.conj(), precision)


def less_identity(r: jax.Array) -> jax.Array:
    """Square matrices (..., m, m) less the identity."""
    return r - jnp.broadcast_to(jnp.eye(r.shape[-1], dtype=r.dtype), r.shape)


def inverse(a: jax.Array) -> jax.Array:
    """Inverse of a Hermitian positive definite matrix, shape (m, m), mostly by matrix products.

    Halves are inverted in turn and pass on the inverse of the Cholesky factor, not the inverse
    itself: so the recursion stands any condition number that the dtype resolves. Products are exact
    to the dtype on every backend.
    """
    return _gram_of_upper(_inverse_factor(a))


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


@jax.jit  # traced once per size
def _inverse_factor(a: jax.Array) -> jax.Array:
    """Upper triangular u with u u^H = a^-1: the inverse of the Cholesky factor, transposed.

    Upper, because then no product has its left factor transposed: XLA's fast kernels for CPU do not
    take those.
    """
    m = a.shape[-1]
    if m <= LEAF:
        factor = lax.linalg.cholesky(a, symmetrize_input=False)
        return lax.linalg.triangular_solve(
            factor,
            jnp.eye(m, dtype=a.dtype),
            left_side=True,
            lower=True,
            transpose_a=True,
            conjugate_a=True,
        )
    half = m // 2
    top = _inverse_factor(a[:half, :half])
    below = _matmul(a[half:, :half], top)  # of the Cholesky factor
    bottom = _inverse_factor(a[half:, half:] - gram(below, lax.Precision.HIGHEST))
    corner = -_matmul(_matmul(top, below.mT.conj()), bottom)
    return jnp.block([[top, corner], [jnp.zeros((m - half, half), a.dtype), bottom]])


@jax.jit
def _gram_of_upper(u: jax.Array) -> jax.Array:
    """U u^H of an upper triangular u, without products by its zero block."""
    m = u.shape[-1]
    if m <= WHOLE:
        return gram(u, lax.Precision.HIGHEST)
    half = m // 2
    top, corner, bottom = u[:half, :half], u[:half, half:], u[half:, half:]
    above = _matmul(corner, bottom.mT.conj())
    upper_left = _gram_of_upper(top) + gram(corner, lax.Precision.HIGHEST)
    return jnp.block([[upper_left, above], [above.mT.conj(), _gram_of_upper(bottom)]])
