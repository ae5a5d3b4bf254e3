r"""Newton-Schulz tables fitted to the singular values that matrices of one shape usually have.

The quintic of a step rises to a crest, dips, and rises to `high`, the end of its interval, to just
as high a value as at the crest. That value is where the next interval ends, so nothing leaves it.
But for scale one number, high over crest, fixes such a quintic: a table is one number per step and
the largest value (the peak) of the last. Least squares fit them, from the best `minimax` table.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from jax.typing import ArrayLike

from orthax.base import check
from orthax.linalg.polar_factor.shipped_tables import NUMBERS, STEPS
from orthax.linalg.polar_factor.tables import Row, Table, minimax

PEAK = 1.3  # no singular value in [0, 1] may end above it
FLOOR = 0.7  # nor below it, if it is beyond the first row's crest
FLOOR_WEIGHT = 3.0  # of falling short of it, against errors
ROUNDING = 0.01  # of its largest value that a step may be off; bfloat16 was 0.7 % off at worst
CUSHION = 0.02  # of the `minimax` tables to start from; modded-nanogpt runs it in bfloat16
MOST = 2.6692  # high over crest with that cushion: the dip between is 8 % as high as either
FITTED = 6  # numbers from the end; those before them matter too little to be determined
NEGLIGIBLE = 1e-6  # mean square error below which nothing is fitted
NARROWEST = 1 / 16  # aspect ratio; spectra of longer matrices are taken to be no narrower
SMALLEST = 1e-5  # of the unlikely singular values
UNLIKELY = 0.0015  # their share in the mean square error
GIVEN = 0.25  # share of given spectra in the rest
DECIMALS = 6  # of the numbers, so that every machine gives the same table

Weighted: TypeAlias = tuple[np.ndarray, np.ndarray]  # singular values and their shares


def for_shape(
    m: int,
    n: int,
    steps: int = 5,
    *,
    shared: bool = False,
    spectra: Sequence[ArrayLike] | None = None,
) -> Table:
    r"""Makes the step table that is most accurate on random matrices of one shape.

    For `newton_schulz(x, for_shape)`. The longer a random matrix, the nearer its singular values
    lie to each other, and a table for where they lie serves them better than one for all of [0, 1].
    It has the least mean square distance of singular values from 1 after all steps. They are
    those of a Gaussian matrix over its Frobenius norm (the Marchenko-Pastur law, with a side ratio
    of 1:16 for longer matrices too), but a share of 0.0015 is spread evenly in log over [1e-5, 1],
    or tables of wide shapes would lose small singular values.

    No singular value in [0, 1] ends above 1.3, and none beyond the first row's crest below 0.7,
    even (0.69) if every step is off by 1 % of its largest value: bfloat16 was seen to be 0.7 % off.
    There is no safety factor. All steps but the last map [0, 1] into itself.
    Reference: He et al., ROOT, 2025, <https://arxiv.org/abs/2511.20626>, for coefficients by shape
    (AdaNewton); the spectrum, the constraints and the fit are not from there.

    Args:
      m: Size of one side.
      n: Size of the other; their order does not matter.
      steps: Number of rows.
      shared: Whether all rows are the same, the form of ROOT: values below 1.3 as well, without the
        floor of 0.7, and an error on Gaussian matrices 1.1 to 12 times smaller than that of `ROOT`.
        But one triple cannot be accurate and lift small singular values too: the slope at zero is
        116 to 412 (`MUON`: 485), and real momentum ends up to 2.3 times as far from orthogonal.
      spectra: Singular values that the table shall serve as well, one array per matrix, of any
        length and scale. They take over a quarter of the law's weight, in equal parts.

    Returns:
      `steps` rows (a, b, c), the same on every machine. Computed on the host in float64, in about
      0.05 s and once per shape; looked up for common shapes.

      With five steps, the error on Gaussian matrices is 2.8, 2090, 190 and 510 times smaller than
      with the four tables of `ROOT`, in their order, and 0.95, 0.034, 0.035 and 0.035 of that with
      `minimax(5, 2e-3, cushion=0, safety=1)`, which diverges in bfloat16. Real momentum is far from
      Gaussian: these tables leave it 0.50 to 0.55 from orthogonal (root mean square of the stored
      spectra), `MUON` 0.58, `POLAR_EXPRESS` 0.48, `minimax(8, 1e-4)` 0.17. tests/linalg checks it.

    Raises:
      ValueError: If a side or the number of steps is less than 1, or a spectrum is not a 1-D array
        of finite numbers, none negative and one positive.
      TypeError: If a side or the number of steps is no integer, or `shared` no bool.

    Example:
      >>> from orthax.linalg.coefficients import scalar_map
      >>> table = for_shape(512, 2048)
      >>> likely = np.linspace(0.5, 1.5, 101) / 512**0.5
      >>> bool(np.all(abs(scalar_map(table, likely) - 1) < 0.01))
      True
    """
    short, long = sorted((check.integer("for_shape: m", m), check.integer("for_shape: n", n)))
    steps = check.integer("for_shape: steps", steps)
    check.flag("for_shape: shared", shared)
    if spectra is None:
        return _without_spectra(short, long, steps, shared)
    return _rows(fit(short, long, steps, shared, _check_spectra(spectra)), steps, shared)


@functools.cache
def _without_spectra(short: int, long: int, steps: int, shared: bool) -> Table:
    shipped = NUMBERS.get((short, long)) if steps == STEPS and not shared else None
    return _rows(shipped or fit(short, long, steps, shared), steps, shared)


def _check_spectra(spectra: Sequence[ArrayLike]) -> list[np.ndarray]:
    """Every spectrum divided by its Frobenius norm."""
    accepted = "a 1-D array of finite numbers, none negative and one positive"
    if isinstance(spectra, str) or not isinstance(spectra, Iterable):
        raise TypeError(f"for_shape: spectra must be a sequence of arrays, got {spectra!r}.")
    relative = []
    for index, spectrum in enumerate(spectra):
        values = check.numbers(f"for_shape: spectra[{index}]", spectrum, accepted)
        finite = values.ndim == 1 and np.isfinite(values).all()
        if not (finite and (values >= 0).all() and values.any()):
            raise ValueError(f"for_shape: spectra[{index}] must be {accepted}; got {spectrum!r}.")
        values = values / values.max()  # so that squares neither overflow nor vanish
        relative.append(values / np.linalg.norm(values))
    if not relative:
        raise ValueError(f"for_shape: spectra must hold at least one array, got {spectra!r}.")
    return relative


def fit(
    short: int, long: int, steps: int, shared: bool = False, spectra: Sequence[np.ndarray] = ()
) -> tuple[float, ...]:
    """The numbers of the table for a shape."""
    from scipy.optimize import least_squares

    values, shares = _assumed_spectrum(short, long, spectra)

    # Their sum of squares is the mean square error and a penalty on dips below the floor. Signs are
    # those of real parts, because the numbers have imaginary ones in a complex step.
    def errors(numbers: np.ndarray) -> np.ndarray:
        y = values
        for a, b, c in _rows(numbers, steps, shared):
            y = y * (a + y**2 * (b + y**2 * c))
        missing = np.zeros(1) if shared else FLOOR - _dips(numbers)
        return np.append(np.sqrt(shares) * (y - 1), FLOOR_WEIGHT * missing * (missing.real > 0))

    def mean_square(numbers: np.ndarray) -> float:
        return float(np.sum(errors(numbers) ** 2))

    starts, least, most = _shared_starts() if shared else _starts(steps)
    starts = list(np.clip(starts, least, most))
    accurate = [start for start in starts if mean_square(start) < NEGLIGIBLE]
    if accurate:  # the first lifts the smallest singular values
        return _rounded(accurate[0])
    # The fit is a local search. `minimax` tables differ in one number, the lower end, so that the
    # best of a few is soon found; and the search never ends above its start.
    start = min(starts, key=mean_square)
    kept, fitted = start[:-FITTED], start[-FITTED:]
    # Slopes by complex steps, f(x + ih).imag / h, have no cancellation as differences do: the fit
    # gets further than DECIMALS, and every machine finds the same table. Dogbox is for few numbers
    # with bounds; the first ones usually end on theirs.
    solution = least_squares(
        lambda fitted: errors(np.concatenate([kept, fitted])),
        fitted,
        jac="cs",
        bounds=(least[-FITTED:], most[-FITTED:]),
        method="dogbox",
        x_scale="jac",
        xtol=1e-11,
        ftol=1e-13,
        gtol=1e-13,
        max_nfev=200,
    )
    return _rounded(np.concatenate([kept, solution.x]))


def _rounded(numbers: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(number), DECIMALS) for number in numbers)


def _assumed_spectrum(short: int, long: int, spectra: Sequence[np.ndarray]) -> Weighted:
    """Singular values relative to the norm: of random matrices, given ones, and unlikely ones."""
    # Shares sum to 1: UNLIKELY is one of the whole, GIVEN of the rest.
    given = GIVEN if spectra else 0.0
    gaussian, shares = _marchenko_pastur(short, long)
    parts = [(gaussian, (1 - given) * shares)]
    parts += [(one, np.full(one.size, given / len(spectra) / one.size)) for one in spectra]
    values, shares = (np.concatenate(column) for column in zip(*parts, strict=True))
    unlikely = np.geomspace(SMALLEST, 1, 101)
    unlikely_shares = np.full(unlikely.size, UNLIKELY / unlikely.size)
    return np.append(values, unlikely), np.append((1 - UNLIKELY) * shares, unlikely_shares)


def _marchenko_pastur(short: int, long: int, points: int = 500) -> Weighted:
    """Nodes and weights of the Marchenko-Pastur law, for Gaussian matrices over their norm.

    With y the aspect ratio, squares are ((1 - sqrt(y))^2 + 4 sqrt(y) sin(t/2)^2) / short where t in
    [0, pi] has density 2 sin(t)^2 / (pi short square). The midpoint rule in sqrt(t) is fine where
    the smallest singular values are. A vector's is 1.
    """
    root = np.sqrt(max(short / long, NARROWEST) if short > 1 else NARROWEST)
    u = (np.arange(points) + 0.5) / points
    t = np.pi * u**2
    square = (1 - root) ** 2 + 4 * root * np.sin(t / 2) ** 2
    return np.sqrt(np.minimum(square / short, 1)), 4 * u * np.sin(t) ** 2 / square / points


def _rows(numbers: Sequence[float] | np.ndarray, steps: int, shared: bool) -> Table:
    """The table: in every row the largest value is 1 / (1 + ROUNDING), in the last the peak."""
    if shared:  # one row that maps [0, high] into itself and may end before its second maximum
        end, stretch, high = numbers
        return (_row(end, stretch / high, high / (1 + ROUNDING)),) * steps
    # Intervals are [0, 1]: what ends at 1 / (1 + ROUNDING) stays inside after a rounding error.
    *ends, peak = numbers
    tops = [1 / (1 + ROUNDING)] * (steps - 1) + [peak]
    return tuple(_row(end, 1.0, top) for end, top in zip(ends, tops, strict=True))


def _row(end: Any, stretch: Any, top: Any) -> Row:
    """`_quintic` of `stretch` s, times `top`."""
    a, b, c = _quintic(end)
    return top * a * stretch, top * b * stretch**3, top * c * stretch**5


def _quintic(end: Any) -> Row:
    """Odd quintic that takes its largest value on [0, 1], which is 1, at 1 / end and at 1.

    Its derivative is a multiple of (1 - x^2) (q - x^2) with x = end s and q = `_dip_square`.
    """
    # The integral of 15 (1 - x^2) (q - x^2) is 15 q x - 5 (1 + q) x^3 + 3 x^5, at x = 1 `scale`.
    q = _dip_square(end)
    scale = 10 * q - 2
    return 15 * q * end / scale, -5 * (1 + q) * end**3 / scale, 3 * end**5 / scale


def _dip_square(end: Any) -> Any:
    """Square of where `_quintic` dips, over the square of where it crests."""
    # Equal values at x = 1 and x = end are a linear equation for q: divided by (end - 1)^2, this.
    return (3 * end**3 + 6 * end**2 + 4 * end + 2) / (5 * (end + 2))


def _dips(numbers: np.ndarray) -> np.ndarray:
    """Where what falls into the dip of each row ends, if every step is off by ROUNDING."""
    *ends, peak = numbers
    lows = np.empty(0)
    for end in ends:  # each row maps what fell into the dips before, and adds its own
        a, b, c = _quintic(end)
        lows = np.append(lows, np.sqrt(_dip_square(end)) / end)
        lows = (lows * (a + lows**2 * (b + lows**2 * c)) - ROUNDING) / (1 + ROUNDING)
    return lows * (1 + ROUNDING) * peak


def _starts(steps: int) -> tuple[list[list[float]], list[float], list[float]]:
    """The numbers of `minimax` tables, and the least and the most that each may be."""
    starts = []
    for lower in np.geomspace(1e-7, 0.3, 22):
        ends, high, top = [], 1 + ROUNDING, 1.0
        for a, b, c in minimax(steps, float(lower), cushion=CUSHION, safety=1 + ROUNDING):
            # The crest is where a + 3 b s^2 + 5 c s^4 first vanishes; `high` ends the interval.
            root = np.sqrt(max(9 * b**2 - 20 * a * c, 0))
            crest = min(np.sqrt((-3 * b - root) / (10 * c)), high)
            top = crest * (a + crest**2 * (b + crest**2 * c))
            ends.append(high / crest)
            high = top * (1 + ROUNDING)
        starts.append([*ends, top])
    return starts, [1.0] * steps + [0.5], [MOST] * steps + [PEAK / (1 + ROUNDING)]


def _shared_starts() -> tuple[list[tuple[float, float, float]], list[float], list[float]]:
    """The same for one row: high over crest, the part of the interval that is used, and high."""
    ends, parts, highs = (1.5, 1.8, 2.1, 2.4), (0.8, 1.0), (1.1, 1.25)
    starts = [(end, part, high) for end in ends for part in parts for high in highs]
    return starts, [1.0, 0.5, 1.0], [MOST, 1.0, PEAK]
