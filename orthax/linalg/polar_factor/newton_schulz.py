"""Newton-Schulz iterations: the polar factor of a matrix by matrix products alone."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from orthax.base import check
from orthax.base.leaves import check_matrices
from orthax.base.platform import by_platform
from orthax.linalg.coefficients import POLAR_EXPRESS
from orthax.linalg.elementary import (
    frobenius_norm,
    gram,
    normalize,
    symmetric_product,
    wide,
    wide_dtype,
)
from orthax.linalg.polar_factor.tables import Row, Table, check_table

Coefficients: TypeAlias = Sequence[Row] | Callable[[int, int], Sequence[Row]]

_PRESCALES = ("frobenius", "schatten", "aol")


def newton_schulz(
    x: jax.Array,
    coefficients: Coefficients = POLAR_EXPRESS,
    *,
    prescale: Literal["frobenius", "schatten", "aol"] = "frobenius",
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    eps: float = 0.0,
) -> jax.Array:
    r"""Approximates the orthogonal polar factor by matrix products alone.

    The matrix is divided by its Frobenius norm; then each step maps every singular value s to
    :math:`a s + b s^3 + c s^5`, nearer to 1, and leaves singular vectors alone:
    :math:`X \leftarrow a X + (b A + c A^2) X` with :math:`A = X X^T` on the shorter side.
    Reference: Jordan et al., Muon, 2024, <https://kellerjordan.github.io/posts/muon/>; Amsel et
    al., The Polar Express, 2025, <https://arxiv.org/abs/2505.16932>.

    Args:
      x: Matrices, shape (..., m, n), real or complex floating. Any scale.
      coefficients: One (a, b, c) per step; its length is the number of steps. Or a callable
        `(m, n) -> table` of shorter and longer side, while tracing, as `coefficients.for_shape`.
      prescale: How the singular values are brought below 1 before the first step; the nearer to 1
        they start, the nearer they end. None costs a product: A is what the first step needs.

        - "frobenius": division by the Frobenius norm.
        - "schatten": by the Schatten-4 norm :math:`\|A\|_F^{1/2}`, smaller by up to rank^(1/4).
        - "aol": each row of the shorter side times :math:`(\sum_j |A_{ij}|)^{-1/2}`. The smallest
          singular values start 5 to 50 times larger, but the result is the polar factor of the
          matrix with other row lengths: 0.006 away for Gaussian rows, 0.2 for very different ones.
      dtype: Dtype of the iteration. None: that of `x`, but float32 for 16-bit input where a program
        is compiled for CPU, whose 16-bit products are no faster. bfloat16 halves the cost on
        accelerators, with 1e-2 errors.
      precision: Passed to `jnp.matmul`, such as "highest" on TPU.
      eps: A matrix whose largest absolute entry is at most this counts as zero.

    Returns:
      Same shape and dtype. A singular value that is r of the Frobenius norm becomes
      `coefficients.scalar_map(table, r)`: with `POLAR_EXPRESS` it lies in [0.859, 1.141] for r of
      at least 1e-3 and near 989 r below (benchmarks/coefficients.py). A NaN or infinity gives NaN.
      Differentiable, also at rank-deficient input; a zero matrix and its gradient are zero.

    Raises:
      ValueError: For fewer than two axes or a row that is no triple; TypeError: if not floating.

    Example:
      >>> from orthax.linalg import coefficients
      >>> q = newton_schulz(jnp.diag(jnp.array([3.0, 0.01])), coefficients.minimax(8, 1e-3))
      >>> bool(jnp.allclose(q, jnp.eye(2), atol=1e-5))
      True
    """
    x = check_matrices("newton_schulz", x)
    check.choice("newton_schulz: prescale", prescale, _PRESCALES)
    eps = check_iteration("newton_schulz", dtype, eps)
    table = table_of("newton_schulz", x, coefficients)
    if x.size == 0:
        return x
    return in_compute_dtype(_iterated, x, dtype, (table, prescale, precision, eps))


def _iterated(
    x: jax.Array,
    dtype: DTypeLike,
    table: Table,
    prescale: str,
    precision: lax.PrecisionLike,
    eps: float,
) -> jax.Array:
    """`newton_schulz` of checked arguments, in a dtype."""
    # On the shorter side the Gram matrix is smallest. The norm is taken before rounding to `dtype`:
    # in bfloat16 its error would push singular values beyond 1, where a table may diverge.
    tall = x.shape[-2] > x.shape[-1]
    y = normalize(x.mT if tall else x, eps).astype(dtype)
    first: jax.Array | None = None  # the Gram matrix of the first step, if a prescale has formed it
    if prescale != "frobenius":
        y, first = _rescaled(y, gram(y, precision), prescale)

    def step(y: jax.Array, row: Any, r: jax.Array) -> jax.Array:
        # Y <- a Y + (b R + c R^2) Y: three products, of which only the first and the last are long.
        a, b, c = row
        cubic = isinstance(c, float) and c == 0
        polynomial = b * r if cubic else b * r + c * symmetric_product(r, r, precision)
        return a * y + jnp.matmul(polynomial, y, precision=precision)

    def unrolled(y: jax.Array) -> jax.Array:
        for row in table[1:]:
            y = step(y, row, gram(y, precision))
        return y

    def looped(y: jax.Array) -> jax.Array:
        rows = jnp.asarray(table[1:]).astype(y.dtype)
        return lax.scan(lambda y, row: (step(y, row, gram(y, precision)), None), y, rows)[0]

    y = step(y, table[0], gram(y, precision) if first is None else first)
    # On TPU a float32 product at "highest" takes seconds to compile, each one anew: so few of them.
    few = looped if precision is not None and len(table) > 2 else unrolled
    y = by_platform({"tpu": few}, unrolled)(y)
    return (y.mT if tall else y).astype(x.dtype)


def table_of(call: str, x: jax.Array, coefficients: Coefficients) -> Table:
    """The step table for the shape of `x`, checked."""
    if callable(coefficients):
        coefficients = coefficients(*sorted(x.shape[-2:]))
    return check_table(call, coefficients)


def check_iteration(call: str, dtype: DTypeLike | None, eps: float) -> float:
    """Raises unless the settings that Newton-Schulz iterations share are possible."""
    check.floating_dtype(f"{call}: dtype", dtype)
    return check.number(f"{call}: eps", eps, "[0, inf)", static=True)


def in_compute_dtype(
    iterated: Callable[..., jax.Array],
    x: jax.Array,
    requested: DTypeLike | None,
    settings: tuple[Any, ...],
) -> jax.Array:
    """`iterated(x, dtype, *settings)` in the dtype that the argument `dtype` says.

    `iterated` is a function of a module, and the settings are hashable.
    """
    if requested is None and jnp.finfo(x.dtype).bits < 32:
        return _by_platform(iterated, x, settings)
    used = x.dtype if requested is None else requested
    if jnp.issubdtype(x.dtype, jnp.complexfloating):  # a real dtype means that of the parts
        used = np.result_type(wide_dtype(jnp.finfo(used).dtype), np.complex64)
    return iterated(x, jnp.dtype(used), *settings)


# Traced once per shape, and without a jit around it the device where x lies decides.
@functools.partial(jax.jit, static_argnums=(0, 2))
def _by_platform(
    iterated: Callable[..., jax.Array], x: jax.Array, settings: tuple[Any, ...]
) -> jax.Array:
    def in_dtype(dtype: DTypeLike) -> Callable[[jax.Array], jax.Array]:
        return lambda x: iterated(x, jnp.dtype(dtype), *settings)

    return by_platform({"cpu": in_dtype(wide_dtype(x.dtype))}, in_dtype(x.dtype))(x)


def _rescaled(y: jax.Array, r: jax.Array, prescale: str) -> tuple[jax.Array, jax.Array]:
    """Matrices and their Gram matrices, rescaled as the latter say; norms in float32."""
    if prescale == "schatten":
        # |R|_F = (sum s^4)^(1/2) is the square of the Schatten-4 norm. R scales as Y Y^H.
        square = frobenius_norm(r)
        root = jnp.sqrt(jnp.where(square == 0, 1, square))
        return (y / root).astype(y.dtype), (r / jnp.square(root)).astype(r.dtype)
    # Turbo-Muon's almost orthogonal layer scaling: with row sums of |R| in D, D^-1/2 R D^-1/2 has
    # no eigenvalue above 1 (Gershgorin's bound for the similar matrix D^-1 R). Zero rows stay zero.
    sums = jnp.sum(jnp.abs(wide(r)), axis=-1, keepdims=True)
    scale = lax.rsqrt(jnp.where(sums == 0, 1, sums))
    return (scale * y).astype(y.dtype), (scale * r * scale.mT).astype(r.dtype)
