"""Norms of matrices that neither overflow nor underflow where the matrix itself does not."""

import jax
import jax.numpy as jnp


def frobenius_norm(x: jax.Array) -> jax.Array:
    r"""Frobenius norm of each matrix, :math:`\|x\|_F = \sqrt{\sum_{ij} |x_{ij}|^2}`.

    The sum runs over entries divided by the largest one, so the result is right for every scale
    that the accumulating dtype holds: 1e-30 and 1e30 in float32 are fine.

    Args:
      x: Matrices, shape (..., m, n), real or complex floating.

    Returns:
      Shape (..., 1, 1), real; float32 for 16-bit input, else the precision of `x`. Zero for a zero
      or empty matrix, NaN if an entry is NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> print(frobenius_norm(jnp.array([[3e-30, 4e-30]])))
      [[5.e-30]]
    """
    scaled, scale = unit_max(x)
    return scale * norm_of_scaled(scaled)


def normalize(x: jax.Array, eps: float = 0.0) -> jax.Array:
    """Divides each matrix by its Frobenius norm.

    Args:
      x: Matrices, shape (..., m, n), real or complex floating. Any scale.
      eps: A matrix whose largest entry is at most this counts as zero.

    Returns:
      Same shape; float32 for 16-bit input, else the dtype of `x`. Zero for a matrix that counts as
      zero.

    Example:
      >>> import jax.numpy as jnp
      >>> print(normalize(jnp.array([[3e-30, 4e-30]])))
      [[0.6 0.8]]
    """
    scaled, _ = unit_max(x, eps)
    return scaled / norm_of_scaled(scaled)


def unit_max(x: jax.Array, eps: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Divides each matrix by its largest absolute entry, of complex ones by the largest part.

    Args:
      x: Matrices, shape (..., m, n), real or complex floating.
      eps: A largest entry of at most this, or below the smallest normal number, counts as zero.

    Returns:
      The scaled matrices (zero where they count as zero) and the largest entries, shape (..., 1,
      1); in float32 for 16-bit input, else the precision of `x`.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = _largest(x, eps)
    return divided(x, scale), scale


def constant_unit_max(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`unit_max` with a scale that is constant for differentiation.

    What is computed from the quotient and multiplied by the scale again has the right gradient, and
    the squares of the scale in that of `unit_max` do not overflow.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = jax.lax.stop_gradient(_largest(x, 0.0))
    return divided(x, scale), scale


def _largest(x: jax.Array, eps: float) -> jax.Array:
    # Not the magnitude of a complex entry, which may overflow.
    size = jnp.maximum(abs(x.real), abs(x.imag)) if jnp.iscomplexobj(x) else jnp.abs(x)
    scale = jnp.max(size, axis=(-2, -1), keepdims=True, initial=0)
    return scale * (scale > max(eps, float(jnp.finfo(x.dtype).tiny)))  # a NaN stays


def divided(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Quotient of an array and sizes of any magnitude, zero where the size is zero."""
    # XLA multiplies by the reciprocal, which is flushed to zero for a scale beyond 2**126.
    less = 1 - 0.75 * (scale > 1)
    divisor = jax.lax.select(scale == 0, jnp.full_like(scale, jnp.inf), scale * less)
    return (x * less) / divisor


def norm_of_scaled(scaled: jax.Array) -> jax.Array:
    """Frobenius norm of each matrix that `unit_max` returns; 1 for a zero matrix."""
    squares = jnp.sum(jnp.real(scaled * jnp.conj(scaled)), axis=(-2, -1), keepdims=True)
    return jnp.sqrt(squares + (squares == 0))


def norm_with_gradient(x: jax.Array) -> jax.Array:
    """Frobenius norm of each matrix, shape (...,), whose gradient at zero is zero and not NaN."""
    scaled, scale = constant_unit_max(x)
    squares = jnp.sum(jnp.square(scaled.real) + jnp.square(scaled.imag), axis=(-2, -1))
    return scale[..., 0, 0] * jnp.sqrt(jnp.where(squares == 0, 1, squares))
