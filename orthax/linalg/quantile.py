"""A quantile of a matrix's magnitudes without sorting: an order statistic, digit by digit."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from orthax.linalg.elementary import wide


def quantile_of_magnitude(x: jax.Array, quantile: ArrayLike) -> jax.Array:
    """Quantile of |x| over each matrix, as `jnp.quantile(abs(x), quantile, method="linear")`.

    Bit patterns of non-negative floats are in the order of the floats, so the largest pattern with
    at most k entries below it is entry k of the sorted matrix. Its digits in base four are found
    from the highest down, each by counting the entries below three candidates in one pass: 16
    passes in float32, exact for ties, zeros and any range of magnitudes.

    Matrices (..., m, n) of at least one entry give (..., 1, 1), real, in at least float32; NaN if
    an entry is NaN. `quantile` may be a tracer. The result is a constant to differentiation.
    """
    magnitudes = jnp.abs(x)
    bits = 8 * magnitudes.dtype.itemsize
    unsigned = np.dtype(f"uint{bits}").type
    patterns = lax.bitcast_convert_type(magnitudes, unsigned)
    rank, weight = _position(quantile, math.prod(x.shape[-2:]))

    # `known` holds the digits found so far, above zeros. The wanted pattern is at least known + d
    # units iff no more than `rank` entries lie below that; the count grows with d, so the digit is
    # the number of candidates d for which it holds. Two bits a pass: one pass for three candidates
    # reads the matrix once, where bit by bit it would be read twice.
    def next_digit(i: ArrayLike, known: jax.Array | np.unsignedinteger) -> jax.Array:
        unit = unsigned(1) << jnp.asarray(bits - 2 - 2 * i, unsigned)
        below = [patterns < known + unit * unsigned(digit) for digit in (1, 2, 3)]
        counts = _reduce([lax.add] * 3, [b.astype(jnp.int32) for b in below], [0] * 3)
        return known + unit * sum((count <= rank).astype(unsigned) for count in counts)

    # The first digit outside the loop makes `known` an array of the shape that the loop carries.
    pattern = lax.fori_loop(1, bits // 2, next_digit, next_digit(0, unsigned(0)))

    # One more pass: the next larger entry, and the largest, as NaNs have patterns above infinity.
    up_to, larger = (patterns <= pattern).astype(jnp.int32), np.iinfo(unsigned).max
    count, above, largest = _reduce(
        [lax.add, lax.min, lax.max],
        [up_to, jnp.where(patterns > pattern, patterns, unsigned(larger)), patterns],
        [0, larger, 0],
    )
    # With ties, the entry at rank + 1 is equal to the one at rank.
    above = jnp.where(count > rank + 1, pattern, above)

    def value(pattern: jax.Array) -> jax.Array:
        return wide(lax.bitcast_convert_type(pattern, magnitudes.dtype))

    lower, upper = value(pattern), value(above)
    weight = jnp.asarray(weight, lower.dtype)
    # Equal entries are not interpolated, so that infinities and exact values come out as they are.
    between = jnp.where(
        (weight > 0) & (upper > lower), (1 - weight) * lower + weight * upper, lower
    )
    return jnp.where(jnp.isnan(value(largest)), jnp.nan, between)


def _position(quantile: ArrayLike, size: int) -> tuple[ArrayLike, ArrayLike]:
    """Position of a quantile among `size` sorted entries: a whole part and the rest."""
    last = size - 1
    if isinstance(quantile, (int, float, np.number)):
        position = float(quantile) * last  # in double precision
        return math.floor(position), position - math.floor(position)
    # Counted from the nearer end: float32 does not hold every whole number up to a large size.
    up, down = jnp.clip(quantile, 0, 1) * last, (1 - jnp.clip(quantile, 0, 1)) * last
    whole_up, whole_down = jnp.floor(up), jnp.ceil(down)
    rank = jnp.where(up < down, whole_up.astype(jnp.int32), last - whole_down.astype(jnp.int32))
    return rank, jnp.where(up < down, up - whole_up, whole_down - down)


def _reduce(
    combine: list[Callable[..., Any]], operands: list[jax.Array], initial: list[int]
) -> list[jax.Array]:
    """Reductions over each matrix that share one pass, each to shape (..., 1, 1)."""
    start = [np.asarray(i, x.dtype) for i, x in zip(initial, operands, strict=True)]

    def together(xs: Any, ys: Any) -> list[Any]:
        return [f(x, y) for f, x, y in zip(combine, xs, ys, strict=True)]

    results = lax.reduce(operands, start, together, (operands[0].ndim - 2, operands[0].ndim - 1))
    return [result[..., None, None] for result in results]
