r"""Newton-Schulz step tables: one odd quintic a s + b s^3 + c s^5 per row.

A table maps singular values of a matrix of unit Frobenius norm towards 1; its length is the number
of steps. Tables are plain tuples of floats. What they do to a singular value is `scalar_map`; how
to make one for any range is `minimax`, and for random matrices of a given shape `for_shape`.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from orthax.linalg._shape_tables import for_shape as for_shape

Row: TypeAlias = tuple[float, float, float]
Table: TypeAlias = tuple[Row, ...]

MUON: Table = ((3.4445, -4.7750, 2.0315),) * 5
"""The original Muon's triple, five times. Maps [1e-3, 1] into [0.4705, 1.2024]; slope 485 at zero.

No safety factor. Source: Jordan et al., 2024, <https://kellerjordan.github.io/posts/muon/>.
"""

DION: Table = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""You's table, used by Dion and as `dion` by optax. Maps [1e-3, 1] into [0.475, 1.145]; slope 493.

No safety factor. Source: Ahn et al., Dion, 2025, <https://arxiv.org/abs/2504.05295>.
"""

POLAR_EXPRESS: Table = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Polar Express for five steps, as modded-nanogpt runs it; the default.

Maps [1e-3, 1] into [0.859, 1.141]; slope 989.

`minimax(5, 1e-3, cushion=0.02, safety=1.02)`: safety factor 1.02 in all rows but the last. The code
that published it also divides the input by 1.02, against the rounding of a bfloat16 norm; norms are
taken in float32 here and need none.
Source: Amsel et al., 2025, <https://arxiv.org/abs/2505.16932>; rows from modded-nanogpt.
"""

CANS: Table = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)
"""Chebyshev-accelerated Newton-Schulz for five steps.

Maps [1e-3, 1] into [0.884, 1.120]; slope 1049. No safety factor.
Source: Grishina et al., 2025, <https://arxiv.org/abs/2506.10935>.
"""

ROOT: Mapping[tuple[int, int], Table] = MappingProxyType(
    {
        (2048, 2048): ((3.4916, -4.8224, 2.1095),) * 5,
        (2048, 3072): ((3.4509, -4.5790, 1.9325),) * 5,
        (2048, 8192): ((2.9794, -3.6674, 1.6207),) * 5,
        (2048, 16384): ((3.1943, -3.8221, 1.5322),) * 5,
    }
)
"""ROOT's triples by (shorter, longer) side, five times each; its code has `MUON`'s for the rest.

Beware: the one of (2048, 2048) takes singular values in [0, 1] up to 3.31. Slopes at zero are 519,
489, 235 and 333. No safety factor. Tables for any shape are `for_shape`'s.
Source: He et al., 2025, <https://arxiv.org/abs/2511.20626>; triples from the code.
"""


def check_table(call: str, coefficients: Any) -> Table:
    """Returns a table as tuples of floats, or raises a `ValueError` that names the call."""
    accepted = "at least one row of three finite numbers (a, b, c)"
    try:
        table: Any = np.asarray(coefficients, dtype=np.float64)
    except (TypeError, ValueError):
        table = np.empty(0)
    if (
        table.ndim != 2
        or table.shape[0] == 0
        or table.shape[1] != 3
        or not np.isfinite(table).all()
    ):
        raise ValueError(
            f"{call}: coefficients must be {accepted}, one row per step; got {coefficients!r}."
        )
    return tuple((float(a), float(b), float(c)) for a, b, c in table)


def scalar_map(coefficients: Sequence[Row], singular_values: Any) -> np.ndarray:
    """Applies a table to singular values in float64: what `newton_schulz` does to each of them.

    Args:
      coefficients: One (a, b, c) per step.
      singular_values: Array of any shape, relative to the norm that the matrix is divided by.

    Returns:
      float64 array of the same shape.

    Example:
      >>> round(float(scalar_map(MUON, 1.0)), 4)
      0.6964
    """
    s = np.asarray(singular_values, dtype=np.float64)
    for a, b, c in check_table("scalar_map", coefficients):
        s = s * (a + s**2 * (b + s**2 * c))
    return s


def minimax(
    steps: int,
    lower: float,
    *,
    cushion: float = 0.02407327424182761,
    safety: float = 1.01,
) -> Table:
    r"""The composition of odd quintics that maps [lower, 1] closest to 1.

    Each step takes the best odd quintic for the interval that the steps before leave; that greedy
    choice is optimal among all compositions (Polar Express, Theorem 3.1). Computed in float64 NumPy
    by a Remez iteration whose extrema have a closed form.

    Args:
      steps: Number of rows, at least 1.
      lower: Smallest singular value, relative to the Frobenius norm, that shall reach 1; in (0, 1).
      cushion: Each step is designed for no less than this fraction of its upper end and then
        recentred, which keeps small singular values from losing ground in low precision. 0 is the
        optimum in exact arithmetic.
      safety: Every row but the last is built for singular values this factor larger, so that
        rounding cannot push one out of the basin. 1 is the optimum in exact arithmetic.

    Returns:
      The table. The error is largest on `lower` and 1; `scalar_map` tells it.

    Raises:
      ValueError: If an argument is out of range.

    Example:
      >>> table = minimax(5, 1e-3, cushion=0.0, safety=1.0)
      >>> s = np.geomspace(1e-3, 1, 1000)
      >>> round(float(abs(scalar_map(table, s) - 1).max()), 3)
      0.113

    Reference:
      Amsel et al., The Polar Express, 2025, <https://arxiv.org/abs/2505.16932>, Algorithm 1 and
      Appendix G.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"minimax: steps must be an integer of at least 1, got {steps!r}.")
    if not 0 < lower < 1:
        raise ValueError(f"minimax: lower must lie in (0, 1), got {lower!r}.")
    if not 0 <= cushion < 1:
        raise ValueError(f"minimax: cushion must lie in [0, 1), got {cushion!r}.")
    if not safety >= 1:
        raise ValueError(f"minimax: safety must be at least 1, got {safety!r}.")

    powers = np.array([1, 3, 5])
    rows = []
    low, high = float(lower), 1.0
    for step in range(steps):
        designed = max(low, cushion * high)
        row = _best_quintic(designed, high)
        if designed > low:
            row = row * 2 / (_odd(row, low) + _odd(row, high))
        if step < steps - 1:
            row = row / safety**powers
        low = _odd(row, low)
        high = 2 - low
        rows.append(row)
    return tuple((float(a), float(b), float(c)) for a, b, c in rows)


def _best_quintic(low: float, high: float) -> np.ndarray:
    """Best odd quintic approximation of 1 on [low, high]; its error has four equal extrema."""
    if low / high >= 1 - 1e-4:  # the system below is near singular; Taylor polynomial, 3e-13 off
        return np.array([15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5])
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
