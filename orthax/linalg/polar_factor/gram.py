"""Newton-Schulz on the small Gram matrix, for matrices much longer on one side than the other."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from orthax.base.leaves import check_matrices
from orthax.linalg.coefficients import POLAR_EXPRESS
from orthax.linalg.elementary import gram, normalize, symmetric_product, wide
from orthax.linalg.polar_factor.newton_schulz import (
    Coefficients,
    check_iteration,
    in_compute_dtype,
    table_of,
)
from orthax.linalg.polar_factor.tables import Table

LARGEST_ERROR = 0.02
"""Relative error of the smallest singular values that rounding may cause between restarts."""


def gram_newton_schulz(
    x: jax.Array,
    coefficients: Coefficients = POLAR_EXPRESS,
    *,
    restarts: Sequence[int] | None = None,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    eps: float = 0.0,
) -> jax.Array:
    r"""Does what `newton_schulz` does, faster for long matrices: one side at least twice the other.

    A step multiplies :math:`X` by :math:`P = a I + b R + c R^2` with :math:`R = X X^T` of the
    shorter side. As these commute, the small matrices are iterated alone, the product of the steps
    :math:`Q \leftarrow P Q` and the Gram matrix :math:`R \leftarrow P R P`, and X is multiplied by
    Q once at the end: two long products in all instead of two per step.

    Use it in float32: its rounding grows with the steps, and is held in check by restarts, each
    two long products more. In bfloat16 nearly every step needs one, which leaves no gain. Nor is
    there one on TPU, where precise products take several passes, and minutes to compile.
    Reference: Dao AI Lab, Gram Newton-Schulz, 2026,
    <https://github.com/Dao-AILab/gram-newton-schulz>.

    Args:
      x: Matrices, shape (..., m, n), real or complex floating. Any scale.
      coefficients: As in `newton_schulz`.
      restarts: Steps (0 is the first) before which Q is applied to X and R formed anew, increasing.
        None: as few as keep what rounding does below 2e-2 of any singular value.
      dtype: As in `newton_schulz`, of the long products; the others are in at least float32.
      precision: Of the long products, for `jnp.matmul`. None: "highest" for the Gram matrix, whose
        rounding the restarts are chosen for, and the backend's default for the other.
      eps: As in `newton_schulz`.

    Returns:
      As `newton_schulz` with the same coefficients, but for rounding.

    Raises:
      ValueError: If `x` has fewer than two axes, a row of coefficients is not a triple, or
        `restarts` are not increasing steps of the table, from 1; TypeError: if `x` is not floating.

    Example:
      >>> from orthax.linalg import coefficients
      >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, 0.01, 0.0]])
      >>> q = gram_newton_schulz(x, coefficients.minimax(8, 1e-3))
      >>> bool(jnp.allclose(q, jnp.eye(2, 3), atol=1e-3))
      True
    """
    x = check_matrices("gram_newton_schulz", x)
    eps = check_iteration("gram_newton_schulz", dtype, eps)
    table = table_of("gram_newton_schulz", x, coefficients)
    if restarts is not None:
        restarts = _checked_restarts(restarts, len(table))
    if x.size == 0:
        return x
    return in_compute_dtype(_iterated, x, dtype, (table, restarts, precision, eps))


def _iterated(
    x: jax.Array,
    dtype: np.dtype,
    table: Table,
    restarts: tuple[int, ...] | None,
    precision: lax.PrecisionLike,
    eps: float,
) -> jax.Array:
    """`gram_newton_schulz` of checked arguments, in a dtype."""
    if restarts is None:
        restarts = best_restarts(table, float(jnp.finfo(dtype).eps))
    tall = x.shape[-2] > x.shape[-1]
    y = normalize(x.mT if tall else x, eps).astype(dtype)
    # Rounding leaves R with slightly negative eigenvalues, which P R P multiplies by more than a^2
    # each step, until p(r) at them is far from the a that small singular values should be given. A
    # Gram matrix formed anew is off by one rounding only: so each segment starts with one.
    for first, end in itertools.pairwise((0, *restarts, len(table))):
        y = jnp.matmul(
            _factor(y, table[first:end], precision).astype(dtype), y, precision=precision
        )
    return (y.mT if tall else y).astype(x.dtype)


def _factor(y: jax.Array, table: Table, precision: lax.PrecisionLike) -> jax.Array:
    """The matrix by which the steps of a table multiply y from the left."""
    product = functools.partial(symmetric_product, precision=lax.Precision.HIGHEST)
    r = wide(gram(y, lax.Precision.HIGHEST if precision is None else precision))
    identity = jnp.broadcast_to(jnp.eye(y.shape[-2], dtype=r.dtype), r.shape)
    total = identity
    for step, (a, b, c) in enumerate(table):
        # X <- P X makes Q <- P Q and, as P is Hermitian, X X^H <- P R P. The first Q is P itself,
        # and after the last step no Gram matrix is needed.
        p = a * identity + b * r + c * product(r, r)
        total = p if step == 0 else product(p, total)
        if step < len(table) - 1:
            r = product(product(p, r), p)
    return total


@functools.cache
def best_restarts(table: Table, eps: float) -> tuple[int, ...]:
    """The fewest restarts that keep rounding by `eps` within `LARGEST_ERROR`, at best places."""
    # All placements of one restart, then of two, ...: a table has few rows, and this runs once.
    for count in range(len(table)):
        places = itertools.combinations(range(1, len(table)), count)
        best = min(places, key=lambda restarts: rounding_error(table, restarts, eps))
        if rounding_error(table, best, eps) <= LARGEST_ERROR:
            return best
    return tuple(range(1, len(table)))


def rounding_error(table: Table, restarts: Sequence[int], eps: float) -> float:
    """What rounding does to the smallest singular values, relative to their result.

    A zero eigenvalue of the Gram matrix is off by a few units of rounding, to either side; the
    steps of a segment are applied to it in float64. The factor is rounded before it multiplies.
    """
    # The Gram matrix is formed in at least float32, whatever the dtype of the long products.
    off = 4 * min(eps, float(np.finfo(np.float32).eps))
    worst = 0.0
    for first, end in itertools.pairwise((0, *restarts, len(table))):
        for r in (-off, off):
            # `exact` is what the steps multiply a vanishing singular value by, `total` what they
            # multiply it by if its eigenvalue of R, which should be 0, is r.
            total, exact, r = np.float64(1), np.float64(1), np.float64(r)
            with np.errstate(all="ignore"):
                for a, b, c in table[first:end]:
                    p = a + b * r + c * r**2
                    total, exact, r = total * p, exact * a, r * p**2
                error = float(np.maximum(abs(total / exact - 1), eps / 2 * exact))
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def _checked_restarts(restarts: Any, steps: int) -> tuple[int, ...]:
    where, accepted = "gram_newton_schulz: restarts", f"increasing steps from 1 to {steps - 1}"
    places = np.asarray(restarts if len(np.shape(restarts)) else None)
    places = places.astype(int) if places.size == 0 else places
    if not jnp.issubdtype(places.dtype, jnp.integer):
        raise TypeError(f"{where} must be {accepted}, got {restarts!r}.")
    if places.ndim != 1 or not (np.diff(places, prepend=0, append=steps) > 0).all():
        raise ValueError(f"{where} must be {accepted}, got {restarts!r}.")
    return tuple(map(int, places))
