"""The polar factor to rounding, by as many Newton-Schulz steps as that takes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from orthax.base.leaves import check_matrices
from orthax.linalg.elementary import (
    frobenius_norm,
    gram,
    less_identity,
    symmetric_product,
    unit_max,
)

MAX_STEPS = 40
"""Enough for singular values of 1e-8 of the largest."""

STEP = (15 / 8, -10 / 8, 3 / 8)
"""Odd quintic with value 1 and two vanishing derivatives at 1: errors are cubed."""


def nearest_orthogonal(x: jax.Array) -> jax.Array:
    r"""Finds the orthogonal matrix nearest to each matrix, exact to rounding.

    Meant for weights that shall stay orthogonal, after an update. The steps :math:`Y \leftarrow (15
    I - 10 R + 3 R^2) Y / 8`, :math:`R = Y Y^T` of the shorter side, cube the distance of every
    singular value from 1. A nearly orthogonal matrix needs one or two, of three products. Others
    are divided by their Schatten-4 norm first and take more, about four for every factor of ten
    between their largest and smallest singular value.
    Reference: Higham, Functions of Matrices, 2008, chapter 8 (a Padé iteration).

    Args:
      x: Matrices, shape (..., m, n), real or complex floating. Any scale.

    Returns:
      Same shape and dtype; 16-bit input is computed in float32. Columns (rows of a wide matrix) are
      orthonormal to rounding: in float32 the spectral norm of :math:`Q^T Q - I` is below 5e-6 up to
      1024 columns. Singular values below 1e-8 of the largest stay short of 1, those that are zero
      zero; a NaN or infinity gives NaN. As steps depend on values, it has no reverse-mode gradient.

    Raises:
      ValueError: If `x` has fewer than two axes; TypeError: if `x` is not floating.

    Example:
      >>> print(nearest_orthogonal(jnp.array([[3.0, 0.0], [0.0, -0.1]])).round(6))
      [[ 1.  0.]
       [ 0. -1.]]
    """
    x = check_matrices("nearest_orthogonal", x)
    if x.size == 0:
        return x
    tall = x.shape[-2] > x.shape[-1]
    y, units = unit_max(x.mT if tall else x)
    units = units.astype(y.dtype)
    tolerance = float(jnp.finfo(y.dtype).eps) * math.sqrt(y.shape[-2])

    def step(y: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step, and a bound on the Frobenius norm of y y^H - I after it."""
        e = frobenius_norm(less_identity(r))[..., 0, 0]
        # Where the step leads is known without another Gram matrix, and |(r - I)^k| <= e^k:
        # r' - I is 5/8 (r - I)^3 + 15/64 (r - I)^4 + 9/64 (r - I)^5.
        after = jnp.where(e < 1, e**3 * (5 / 8 + e * (15 / 64 + e * (9 / 64))), jnp.inf)
        a, b, c = STEP
        polynomial = b * r + c * symmetric_product(r, r, lax.Precision.HIGHEST)
        return a * y + jnp.matmul(polynomial, y, precision=lax.Precision.HIGHEST), after

    # The first Gram matrix tells whether to rescale and serves the first step. If it is within 1 of
    # the identity, the steps converge from the matrix as it came. Others are divided by the
    # Schatten-4 norm |r|_F^(1/2), which bounds their singular values by 1.
    r = gram(y, lax.Precision.HIGHEST)
    size = frobenius_norm(r)
    near = frobenius_norm(less_identity(jnp.square(units) * r)) < 1
    root = jnp.sqrt(jnp.where(size == 0, 1, size))
    factor = jnp.where(near, units, (1 / root).astype(y.dtype))
    state = (1, *step(factor * y, jnp.square(factor) * r))

    def unfinished(state: Any) -> jax.Array:
        count, _, bound = state
        return (count < MAX_STEPS) & jnp.any(bound > tolerance)

    def again(state: Any) -> Any:
        count, y, _ = state  # the Gram matrix is new each time: errors of an updated one would grow
        return count + 1, *step(y, gram(y, lax.Precision.HIGHEST))

    _, y, _ = lax.while_loop(unfinished, again, state)
    return (y.mT if tall else y).astype(x.dtype)
