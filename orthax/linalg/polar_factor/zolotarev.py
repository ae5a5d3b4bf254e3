r"""The polar factor by rational functions: accurate over orders of magnitude, for few products.

Zolotarev's function is the rational function, odd and of given degree, that is nearest to 1 on
[l, 1]. Of a matrix it costs one Gram matrix, and one inverse per pair of its poles.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from orthax.base import check
from orthax.base.leaves import check_matrices, vary_as
from orthax.linalg.elementary import gram, norm_of_scaled, unit_max

# SciPy's elliptic functions take 1 - lower**2, which keeps 4 digits of it here and none at 1e-8.
SMALLEST_LOWER = 1e-6
"""The least `lower`: far below it the error computed in float64 no longer equioscillates."""

DEFAULT_LOWER = 1e-3
"""What `lower=None` stands for, where rounding admits it."""


class SignFunction(NamedTuple):
    r"""Zolotarev's function :math:`f(s) = M s (1 + \sum_j a_j / (s^2 + t_j))`.

    Attributes:
      scale: M; `residues`: the a_j; `shifts`: the t_j, increasing.
      error: Largest :math:`|f(s) - 1|` on [lower, 1]; attained on both sides of 1.
    """

    scale: float
    residues: np.ndarray
    shifts: np.ndarray
    error: float

    def __call__(self, s: ArrayLike) -> np.ndarray:
        """What the function makes of singular values, in float64."""
        s = np.asarray(s, dtype=np.float64)
        fractions = self.residues / (np.square(s)[..., None] + self.shifts)
        return self.scale * s * (1 + fractions.sum(axis=-1))


@functools.cache
def sign_function(degree: int, lower: float) -> SignFunction:
    """The best approximation of 1 on [lower, 1] of type (2 degree + 1, 2 degree), in float64."""
    shifts, zeros = _poles_and_zeros(degree, lower)
    # Partial fractions turn the quotient of products into a sum with one inverse per term, and the
    # terms do not wait for each other. a_j is the residue of the quotient at s^2 = -t_j.
    residues = np.array(
        [
            -np.prod(shift - zeros) / np.prod(shift - np.delete(shifts, j))
            for j, shift in enumerate(shifts)
        ]
    )
    # The extrema of the quotient are found on a grid. The factor M puts the least and the largest
    # value equally far from 1, and the distance is the error of the best approximation.
    unscaled = SignFunction(1.0, residues, shifts, 0.0)(np.geomspace(lower, 1, 20_001))
    least, most = unscaled.min(), unscaled.max()
    error = float((most - least) / (most + least))
    return SignFunction(float(2 / (most + least)), residues, shifts, error)


def _poles_and_zeros(degree: int, lower: float) -> tuple[np.ndarray, np.ndarray]:
    """The function is s prod (s^2 + zeros) / prod (s^2 + poles), but for a factor."""
    import scipy.special  # not at the top: importing orthax shall not take its time

    # Zolotarev's solution: c_i = lower^2 (sn / cn)^2 at i K / (2 degree + 1), K the quarter period.
    # The modulus is the complementary one, k^2 = 1 - lower^2. `ellipkm1` takes 1 - k^2, so that K
    # does not suffer from that difference. c_1, c_3, ... are the poles and c_2, c_4, ... the zeros.
    quarter_period = scipy.special.ellipkm1(lower**2)
    at = np.arange(1, 2 * degree + 1) * quarter_period / (2 * degree + 1)
    sn, cn, _, _ = scipy.special.ellipj(at, 1 - lower**2)
    c = np.square(lower * sn / cn)
    return c[0::2], c[1::2]


@functools.cache
def least_stable_lower(degree: int, rows: int, eps: float) -> float:
    r"""The smallest `lower` whose inverses exist in spite of rounding.

    The Gram matrix of `rows` rows and of spectral norm at most 1 is off by about sqrt(rows) eps, so
    its smallest eigenvalue may be that far below zero; the smallest shift has to be twice that.
    """
    bound = 2 * math.sqrt(rows) * eps
    # By bisection of log(lower): the smallest shift grows with lower, but through elliptic
    # functions that have no closed inverse. 50 halvings reach the rounding of float64.
    low, high = math.log(SMALLEST_LOWER), math.log(0.5)
    for _ in range(50):
        middle = (low + high) / 2
        stable = _poles_and_zeros(degree, math.exp(middle))[0][0] >= bound
        low, high = (low, middle) if stable else (middle, high)
    return math.exp(high)


def zolotarev(
    x: jax.Array, degree: int = 2, *, passes: int = 1, lower: float | None = None
) -> jax.Array:
    r"""Approximates the orthogonal polar factor, small singular values included, by inverses.

    For matrices whose singular values differ by orders of magnitude, as those of momentum do.
    `degree` says how near to 1 they come and `passes` how small they may be; `lower` can stay None.

    With :math:`R = X X^T` of the shorter side and X divided by its Schatten-4 norm (the root of
    R's Frobenius norm), a pass returns :math:`M (I + \sum_j a_j (R + t_j I)^{-1}) X`. It maps a
    singular value s to :math:`M s (1 + \sum_j a_j / (s^2 + t_j))`, Zolotarev's function.
    Reference: Nakatsukasa and Freund, Computing fundamental matrix decompositions accurately via
    the matrix sign function in two iterations, 2016, <https://doi.org/10.1137/140990334>.

    Args:
      x: Matrices, shape (..., m, n), real or complex floating. Any scale.
      degree: Accuracy: the number of inverses in the (last) pass, at least 1. With 2, singular
        values end within 0.2 of 1; with 3, within 0.05.
      passes: Reach: 1, or 2 for singular values 700 times smaller. The first of two passes has
        degree 1, so it adds one inverse and two products.
      lower: The smallest singular value that the last pass shall bring that near to 1; with one
        pass, relative to the Schatten-4 norm. A larger one makes the others more accurate. None:
        1e-3, or the least that rounding admits for degree, shape and dtype if that is more (in
        float32 and 768 rows, 1.0e-3 for degree 2 and 1.9e-3 for degree 3).

    Returns:
      Same shape and dtype; 16-bit input is computed in float32. Finite for every finite input, a
      zero matrix gives exactly zero, a NaN or infinity NaN. Singular values, in float32 at 768
      rows and with `lower=None`, for a smallest of r relative to the Schatten-4 norm
      (benchmarks/orthogonality.py):

      - degree 2, one pass: [0.80, 1.20] for r of at least 1.0e-3, near 800 r below;
      - degree 3, one pass: [0.95, 1.05] for r of at least 1.9e-3, near 500 r below;
      - degree 2, two passes: [0.80, 1.20] for r of at least 1.4e-6;
      - degree 3, two passes: [0.95, 1.05] for r of at least 2.6e-6, as near as float32 comes.

    Raises:
      ValueError: If `x` has fewer than two axes, `degree`, `passes` or `lower` is out of range, or
        `lower` is less than rounding admits; TypeError: if `x` is not floating.

    Example:
      >>> q = zolotarev(jnp.diag(jnp.array([3.0, 1e-5])), 4, passes=2)
      >>> bool(jnp.allclose(q, jnp.eye(2), atol=0.02))
      True
    """
    x = check_matrices("zolotarev", x)
    degree = check.integer("zolotarev: degree", degree)
    passes = check.integer("zolotarev: passes", passes, "[1, 2]")
    if lower is not None:
        lower = check.number("zolotarev: lower", lower, "(0, 1)", static=True)
    return rational(x, degree, passes, lower)


def rational(
    x: jax.Array, degree: int = 2, passes: int = 1, lower: float | None = None
) -> jax.Array:
    """`zolotarev` of checked arguments."""
    if x.size == 0:
        return x
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    polar = functools.partial(_polar, degree=degree, passes=passes, lower=lower)
    if x.ndim == 2:
        result = polar(y)
    else:  # one after the other: each fills the cores of a CPU
        result = lax.map(polar, y.reshape(-1, *y.shape[-2:])).reshape(y.shape)
    return result.mT if tall else result


def _functions(
    y: jax.Array, degree: int, passes: int, lower: float | None
) -> tuple[SignFunction, ...]:
    """The functions to apply in turn to a matrix with no more rows than columns."""
    rows, eps = y.shape[-2], float(jnp.finfo(y.dtype).eps)
    least = least_stable_lower(degree, rows, eps)
    if lower is not None and lower < least:
        accepted = f"[{1.01 * least:.3g}, 1) for degree {degree} and matrices of shape {y.shape}"
        raise ValueError(f"zolotarev: lower must lie in {accepted} in {y.dtype}, got {lower!r}.")
    last = sign_function(degree, float(max(least, DEFAULT_LOWER) if lower is None else lower))
    if passes == 1:
        return (last,)
    # The first pass lifts the smallest singular values. How far is bounded by rounding and not by
    # the degree, so the cheapest degree does; the paper takes the same degree twice instead.
    return sign_function(1, least_stable_lower(1, rows, eps)), last


def _polar(x: jax.Array, degree: int, passes: int, lower: float | None) -> jax.Array:
    """One matrix with no more rows than columns."""
    y, _ = unit_max(x)  # so that neither R nor its norm overflows
    square: jax.Array | float | None = None  # of the number that bounds y's singular values
    for function in _functions(y, degree, passes, lower):
        r = gram(y, lax.Precision.HIGHEST)
        if square is None:  # |R|_F is the square of X's Schatten-4 norm
            square = norm_of_scaled(r)
        # M (I + sum_j a_j (R + t_j I)^-1) X of X over its norm. X is not divided: the small factor
        # takes the reciprocal, which saves a pass over the long matrix.
        scale = function.scale / jnp.sqrt(square)
        factor = _rational_factor(r / _in(r, square), function) * _in(r, scale)
        y = jnp.matmul(factor.astype(y.dtype), y, precision=lax.Precision.HIGHEST)
        # Values now lie up to 1 + error: the next pass divides by what that can be at most.
        square = (1 + function.error) ** 2
    return y.astype(x.dtype)


def _in(x: jax.Array, numbers: ArrayLike) -> jax.Array:
    """Real numbers in the dtype of x, which may be complex."""
    return jnp.asarray(numbers, x.dtype)


def _rational_factor(r: jax.Array, function: SignFunction) -> jax.Array:
    """I + sum_j a_j (r + t_j I)^-1."""
    identity = jnp.eye(r.shape[0], dtype=r.dtype)

    def add(total: jax.Array, pole: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        residue, shift = pole
        return total + residue * inverse(r + shift * identity), None

    poles = (_in(r, function.residues), _in(r, function.shifts))
    total, _ = lax.scan(add, vary_as(identity, r), poles)  # one program for all poles
    return total


# --- inverses of positive definite matrices

LEAF = 31
"""Rows up to which a Cholesky factor is inverted as one; above, by halves, in matrix products.

On CPU a triangular solve of 32 rows or more is spread over threads by OpenBLAS, which then wait
busily for the next one and take cores from XLA: an inverse of 768 rows takes 1.7 times as long.
"""

WHOLE = 192
"""Rows up to which a triangular matrix is multiplied as if it were full."""


def inverse(a: jax.Array) -> jax.Array:
    """Inverse of a Hermitian positive definite matrix, shape (m, m), mostly by matrix products.

    Halves are inverted in turn and pass on the inverse of the Cholesky factor, not the inverse: so
    the recursion stands any condition number that the dtype resolves, on every backend.
    """
    return _gram_of_upper(_inverse_factor(a))


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


@jax.jit  # traced once per size
def _inverse_factor(a: jax.Array) -> jax.Array:
    """Upper triangular u with u u^H = a^-1: the inverse of the Cholesky factor, transposed.

    Upper, because XLA's fast kernels for CPU do not take products with a transposed left factor.
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
    # With a = [[A, B^H], [B, C]] the Cholesky factor is [[L, 0], [B L^-H, S]], where L belongs to A
    # and S to the Schur complement C - (B L^-H)(B L^-H)^H. Its inverse, transposed, is
    # [[L^-H, -L^-H (B L^-H)^H S^-H], [0, S^-H]]: two halves of the size and four products.
    half = m // 2
    top = _inverse_factor(a[:half, :half])
    below = _matmul(a[half:, :half], top)  # B L^-H
    bottom = _inverse_factor(a[half:, half:] - gram(below, lax.Precision.HIGHEST))
    corner = -_matmul(_matmul(top, below.mT.conj()), bottom)
    return jnp.block([[top, corner], [jnp.zeros((m - half, half), a.dtype), bottom]])


@jax.jit
def _gram_of_upper(u: jax.Array) -> jax.Array:
    """U u^H of an upper triangular u, without products by its zero block."""
    m = u.shape[-1]
    if m <= WHOLE:
        return gram(u, lax.Precision.HIGHEST)
    # [[T, K], [0, D]] times its adjoint is [[T T^H + K K^H, K D^H], [D K^H, D D^H]].
    half = m // 2
    top, corner, bottom = u[:half, :half], u[:half, half:], u[half:, half:]
    above = _matmul(corner, bottom.mT.conj())
    upper_left = _gram_of_upper(top) + gram(corner, lax.Precision.HIGHEST)
    return jnp.block([[upper_left, above], [above.mT.conj(), _gram_of_upper(bottom)]])
