"""The polar factor itself, by singular value decomposition: the oracle of all approximations."""

import jax
import jax.numpy as jnp

from orthax.linalg._norms import unit_max
from orthax.linalg._validate import check_matrices


def polar_svd(x: jax.Array) -> jax.Array:
    r"""Orthogonal polar factor :math:`U V^T` of each matrix :math:`x = U S V^T`.

    It is the orthonormal matrix nearest to `x`, and what the faster methods approximate. Singular
    values below the rounding error of the decomposition (max(m, n) eps times the largest) count as
    zero and stay zero, so the result is a partial isometry for rank-deficient input.

    Args:
      x: Matrices, shape (..., m, n), real or complex floating. Any scale.

    Returns:
      Same shape and dtype; 16-bit input is computed in float32. Zero for a zero matrix. A NaN or
      infinity gives NaN. Gradients are those of `jnp.linalg.svd`: not finite where singular values
      repeat.

    Raises:
      ValueError: If `x` has fewer than two axes.
      TypeError: If `x` is not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> print(polar_svd(jnp.array([[0.0, 5.0], [-2.0, 0.0]])).round(6) + 0.0)
      [[ 0.  1.]
       [-1.  0.]]
    """
    check_matrices("polar_svd", x)
    if x.size == 0:
        return x
    scaled, _ = unit_max(x)
    u, s, vh = jnp.linalg.svd(scaled, full_matrices=False)
    negligible = max(x.shape[-2:]) * jnp.finfo(s.dtype).eps * s[..., :1]
    kept = u * jnp.where(s > negligible, 1, 0)[..., None, :].astype(u.dtype)
    return (kept @ vh).astype(x.dtype)
