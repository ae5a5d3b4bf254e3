"""What a step table of `orthax.linalg.coefficients` does, and the best one for an interval."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from jax.typing import ArrayLike

from orthax.base import check

Row: TypeAlias = tuple[float, float, float]
Table: TypeAlias = tuple[Row, ...]


def check_table(call: str, coefficients: Any) -> Table:
    """Returns a table as tuples of floats, or raises an error that names the call."""
    accepted = "at least one row of three finite numbers (a, b, c), one row per step"
    table = check.numbers(f"{call}: coefficients", coefficients, accepted)
    if table.ndim != 2 or len(table) == 0 or table.shape[1] != 3 or not np.isfinite(table).all():
        raise ValueError(f"{call}: coefficients must be {accepted}; got {coefficients!r}.")
    return tuple((float(a), float(b), float(c)) for a, b, c in table)


def scalar_map(coefficients: Sequence[Row], singular_values: ArrayLike) -> np.ndarray:
    """Applies a table to singular values in float64: what `newton_schulz` does to each of them.

    Args:
      coefficients: One (a, b, c) per step.
      singular_values: Array of any shape, relative to the norm that the matrix is divided by.

    Returns:
      float64 array of the same shape.

    Example:
      >>> from orthax.linalg.coefficients import MUON
      >>> round(float(scalar_map(MUON, 1.0)), 4)
      0.6964
    """
    s = check.numbers("scalar_map: singular_values", singular_values, "numbers")
    for a, b, c in check_table("scalar_map", coefficients):
        s = s * (a + s**2 * (b + s**2 * c))
    return s


def minimax(
    steps: int, lower: float, *, cushion: float = 0.02407327424182761, safety: float = 1.01
) -> Table:
    r"""Makes the step table whose worst error on singular values in [lower, 1] is least.

    Each step takes the best odd quintic for the interval that the steps before leave; no other
    table of as many steps comes nearer to 1 (Polar Express, Theorem 3.1). Computed in float64.
    Reference: Amsel et al., The Polar Express, 2025, <https://arxiv.org/abs/2505.16932>,
    Algorithm 1 and Appendix G.

    Args:
      steps: Number of rows, at least 1.
      lower: Smallest singular value, relative to the Frobenius norm, that shall reach 1; in (0, 1).
      cushion: Each step is designed for no less than this fraction of its upper end and then
        recentred, so that small singular values lose no ground in low precision. In exact
        arithmetic 0 is optimal.
      safety: Every row but the last is built for singular values this factor larger, so that
        rounding pushes none out of the basin. 1 is optimal in exact arithmetic.

    Returns:
      The table. The error is largest on `lower` and 1; `scalar_map` tells it.

    Raises:
      ValueError: If an argument is out of range; TypeError: if one is of the wrong kind.

    Example:
      >>> table = minimax(5, 1e-3, cushion=0.0, safety=1.0)
      >>> s = np.geomspace(1e-3, 1, 1000)
      >>> round(float(abs(scalar_map(table, s) - 1).max()), 3)
      0.113
    """
    steps = check.integer("minimax: steps", steps)
    lower = check.number("minimax: lower", lower, "(0, 1)", static=True)
    cushion = check.number("minimax: cushion", cushion, "[0, 1)", static=True)
    safety = check.number("minimax: safety", safety, "[1, inf)", static=True)

    powers = np.array([1, 3, 5])
    rows = []
    low, high = float(lower), 1.0
    for step in range(steps):
        # The greedy choice, which Theorem 3.1 proves optimal. The quintic for a very small lower
        # end dips deep inside the interval; the cushion keeps that end away from zero.
        designed = max(low, cushion * high)
        row = _best_quintic(designed, high)
        if designed > low:
            # Recentred: values below `designed` come out lower than the quintic's least extremum,
            # so the factor puts the values of both ends of [low, high] equally far from 1.
            row = row * 2 / (_odd(row, low) + _odd(row, high))
        if step < steps - 1:  # nothing follows the last, which it could push out of its interval
            row = row / safety**powers
        # The error oscillates about 1 with equal extrema, one at `low`: 2 - low bounds all values.
        low = _odd(row, low)
        high = 2 - low
        rows.append(row)
    return tuple((float(a), float(b), float(c)) for a, b, c in rows)


def _best_quintic(low: float, high: float) -> np.ndarray:
    """Best odd quintic approximation of 1 on [low, high]; its error has four equal extrema."""
    if low / high >= 1 - 1e-4:  # the system below is near singular; Taylor polynomial, 3e-13 off
        return np.array([15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5])
    # Remez exchange: three coefficients and the error E are four unknowns, fixed by errors of -E,
    # E, -E, E at four points; then the inner two points move to the extrema of that quintic, until
    # E stays. The ends are extrema throughout. p'(s) = a + 3 b s^2 + 5 c s^4 is quadratic in s^2,
    # so its roots need no search. The first inner points are the quarters of the interval.
    inner = np.array([3 * low + high, low + 3 * high]) / 4
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    error = np.inf
    for _ in range(100):
        points = np.array([low, *inner, high])
        system = np.stack([points, points**3, points**5, signs], axis=1)
        *row, new_error = np.linalg.solve(system, np.ones(4))
        a, b, c = row
        if abs(new_error - error) < 1e-15:
            break
        error = new_error
        root = np.sqrt(9 * b**2 - 20 * a * c)
        inner = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
    return np.array(row)


def _odd(row: np.ndarray, s: float) -> float:
    a, b, c = row
    return float(s * (a + s**2 * (b + s**2 * c)))
