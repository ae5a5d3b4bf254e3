"""Norms and Gram matrices at any scale: the functions of a matrix that all others are made of."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from orthax.base import check
from orthax.base.leaves import check_matrices, on_a_mesh
from orthax.base.platform import by_platform

RANKINGS = ("l1", "l2")


def wide(x: jax.Array) -> jax.Array:
    """The array in at least float32: where sums of 16-bit numbers would be rounded."""
    return x.astype(wide_dtype(x.dtype))


def wide_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of `wide` arrays."""
    # Not `jnp.promote_types`, which refuses two dtypes under jax_numpy_dtype_promotion="strict".
    return jnp.dtype(jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype)


def number_for(x: jax.Array, number: ArrayLike) -> ArrayLike:
    """A number of the user's, which may be an array of any dtype, to compute with x."""
    if isinstance(number, (int, float)):
        return number
    return jnp.asarray(number).astype(jnp.finfo(x.dtype).dtype)


def promoted(*xs: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays in the dtype that products of them have, also where JAX is told to be strict."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*xs)
    return tuple(x.astype(dtype) for x in xs)


def abs_square(x: jax.Array) -> jax.Array:
    """Squared magnitudes, without the root that their magnitude would take."""
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


# --- norms


def frobenius_norm(x: jax.Array) -> jax.Array:
    r"""Frobenius norm of each matrix, :math:`\|x\|_F = \sqrt{\sum_{ij} |x_{ij}|^2}`.

    Entries are divided by the largest one first, so the result is right for every scale that the
    accumulating dtype holds: 1e-30 and 1e30 in float32 are fine.

    Args:
      x: Matrices, shape (..., m, n), real or complex floating.

    Returns:
      Shape (..., 1, 1), real, at least float32. Zero for a zero or empty matrix, NaN for a NaN.

    Raises:
      ValueError: If `x` has fewer than two axes; TypeError: if `x` is not floating.

    Example:
      >>> print(frobenius_norm(jnp.array([[3e-30, 4e-30]])))
      [[5.e-30]]
    """
    x = check_matrices("frobenius_norm", x)
    scaled, scale = unit_max(x)
    return scale * norm_of_scaled(scaled)


def normalize(x: jax.Array, eps: float = 0.0) -> jax.Array:
    """Divides each matrix by its Frobenius norm.

    Args:
      x: Matrices, shape (..., m, n), real or complex floating. Any scale.
      eps: A matrix whose largest entry is at most this counts as zero.

    Returns:
      Same shape, in at least float32. Zero for a matrix that counts as zero.

    Raises:
      ValueError: If `x` has fewer than two axes, or `eps` is negative or not finite.
      TypeError: If `x` is not floating, or `eps` no number.

    Example:
      >>> print(normalize(jnp.array([[3e-30, 4e-30]])))
      [[0.6 0.8]]
    """
    x = check_matrices("normalize", x)
    scaled, _ = unit_max(x, check.number("normalize: eps", eps, "[0, inf)", static=True))
    return scaled / norm_of_scaled(scaled).astype(scaled.dtype)


def unit_max(x: jax.Array, eps: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Divides each matrix by its largest absolute entry, of complex ones by the largest part.

    A largest entry of at most eps, or below the smallest normal number, counts as zero, and the
    matrix becomes zero. Returns that and the largest entries, (..., 1, 1), in at least float32.
    """
    x = wide(x)
    scale = _largest(x, eps)
    return divided(x, scale), scale


def constant_unit_max(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`unit_max` with a scale that is constant for differentiation.

    What is computed from the quotient and scaled back has the right gradient, without overflow.
    """
    x = wide(x)
    scale = lax.stop_gradient(_largest(x, 0.0))
    return divided(x, scale), scale


def _largest(x: jax.Array, eps: float) -> jax.Array:
    # Not the magnitude of a complex entry, which may overflow.
    size = jnp.maximum(abs(x.real), abs(x.imag)) if jnp.iscomplexobj(x) else jnp.abs(x)
    scale = jnp.max(size, axis=(-2, -1), keepdims=True, initial=0)
    counts = scale > max(eps, float(jnp.finfo(x.dtype).tiny))
    return scale * counts.astype(scale.dtype)  # a NaN stays


def divided(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Quotient of an array and sizes of any magnitude, zero where the size is zero."""
    # XLA multiplies by the reciprocal, which is flushed to zero for a scale beyond 2**126: so both
    # are divided by four. An infinite divisor avoids 0 / 0, in the gradient too.
    less = 1 - 0.75 * (scale > 1).astype(scale.dtype)
    divisor = lax.select(scale == 0, jnp.full_like(scale, jnp.inf), scale * less)
    return (x * less.astype(x.dtype)) / divisor.astype(x.dtype)


def norm_of_scaled(scaled: jax.Array) -> jax.Array:
    """Frobenius norm of each matrix that `unit_max` returns; 1 for a zero matrix."""
    squares = jnp.sum(jnp.real(scaled * jnp.conj(scaled)), axis=(-2, -1), keepdims=True)
    return jnp.sqrt(squares + (squares == 0).astype(squares.dtype))


def norm_with_gradient(x: jax.Array) -> jax.Array:
    """Frobenius norm of each matrix, shape (...,), whose gradient at zero is zero and not NaN."""
    scaled, scale = constant_unit_max(x)
    squares = jnp.sum(abs_square(scaled), axis=(-2, -1))
    return scale[..., 0, 0] * root(squares)


def root(x: jax.Array) -> jax.Array:
    """Square roots of numbers of at least zero, with slope zero at zero, where they have none."""
    # The argument is replaced before the root, as the NaN of 0 / 0 passes a `where` after it.
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))


def weighted_hypot(
    a: jax.Array, b: jax.Array, of_a: ArrayLike = 1, of_b: ArrayLike = 1
) -> jax.Array:
    """Root of of_a a^2 + of_b b^2, no square of which overflows; slopes are finite, at zero too."""
    size = lax.stop_gradient(jnp.maximum(jnp.abs(a), jnp.abs(b)))
    a, b = divided(a, size), divided(b, size)
    return size * root(jnp.asarray(of_a * jnp.square(a) + of_b * jnp.square(b)))


def top_columns(x: jax.Array, rank: int, order: Literal["l1", "l2"] = "l2") -> jax.Array:
    r"""Indices of the columns of largest norm.

    By "l2" the chosen columns hold at least the part rank / n of the energy :math:`\|x\|_F^2`, on
    every input. By "l1", the default of the paper's code, they need not: of a column of a hundred
    entries 0.05 and one with a single entry 1, it takes the first, with a fifth of the energy.
    Reference: Modoranu et al., 2025, <https://arxiv.org/abs/2505.17967>, section 3.

    Args:
      x: Matrices, shape (..., m, n), real or complex floating. Any scale.
      rank: How many, between 1 and n.
      order: The norm: "l1" or "l2".

    Returns:
      int32, shape (..., rank), increasing along the last axis. Of columns with equal norms those of
      lower index come first. Columns with a NaN count as largest.

    Raises:
      ValueError: If `x` has fewer than two axes, `rank` is outside [1, n] or `order` is unknown.
      TypeError: If `x` is not floating or `rank` no integer.

    Example:
      >>> print(top_columns(jnp.array([[1.0, -3.0, 2.0, 3.0]]), 2))
      [1 3]
    """
    x = check_matrices("top_columns", x)
    rank = check.integer("top_columns: rank", rank, f"[1, {x.shape[-1]}]")
    check.choice("top_columns: order", order, RANKINGS)
    return largest_columns(x, rank, order)


def largest_columns(
    x: jax.Array, rank: int, order: Literal["l1", "l2"], along: tuple[str, ...] = ()
) -> jax.Array:
    """`top_columns` of checked arguments; inside `jax.shard_map` mesh axes may cut the rows."""
    # The order is that of the matrix at any scale; squares of its entries might vanish.
    x = wide(x)
    scale = _largest(x, 0.0)
    sizes = jnp.abs(divided(x, lax.pmax(scale, along) if along else scale))
    norms = jnp.sum(sizes if order == "l1" else sizes**2, axis=-2)
    norms = lax.psum(norms, along) if along else norms
    _, indices = lax.top_k(norms, rank)
    return jnp.sort(indices, axis=-1)


# --- Gram matrices


class Halving(NamedTuple):
    """Where a Hermitian product is computed from half of its blocks.

    Attributes:
      rows: Of the product, at least.
      method: Function of x, y and a precision to x y^H; those of `half_products`.
    """

    rows: int
    method: Callable[..., jax.Array]


HALVED: dict[str, Halving] = {}
"""By platform; others multiply in full. None was measured to win: on CPU blocks are slower at all
sizes up to 2048, since copies cost more than they save (0.8 to 0.95 of the plain product's speed),
and on GPU and TPU nothing was measured yet (benchmarks/accelerator.py does)."""


def _hermitian(
    whole: Callable[..., jax.Array], x: jax.Array, y: jax.Array, precision: lax.PrecisionLike
) -> jax.Array:
    """A product of two arrays that is known to be Hermitian, by half where the table says so."""
    rules = {name: rule for name, rule in HALVED.items() if x.shape[-2] >= rule.rows}
    if not rules or on_a_mesh(x):  # the compiler cuts no kernel in parts
        return whole(x, y)
    halves = {n: functools.partial(r.method, precision=precision) for n, r in rules.items()}
    return by_platform(halves, whole)(x, y)


def symmetric_product(a: jax.Array, b: jax.Array, precision: lax.PrecisionLike = None) -> jax.Array:
    """Product `a @ b` of polynomials of one Hermitian matrix, which is Hermitian too.

    All such products of `linalg` go through here and `gram`: one half of the blocks would do.
    """
    return _hermitian(functools.partial(jnp.matmul, precision=precision), a, b, precision)


def gram(x: jax.Array, precision: lax.PrecisionLike = None) -> jax.Array:
    """Gram matrix of the rows, x x^H, shape (..., m, m)."""

    def whole(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.matmul(x, y.mT.conj(), precision=precision)

    return _hermitian(whole, x, x, precision)


def less_identity(r: jax.Array) -> jax.Array:
    """Square matrices (..., m, m) less the identity."""
    return r - jnp.broadcast_to(jnp.eye(r.shape[-1], dtype=r.dtype), r.shape)


def gram_deviation(x: jax.Array) -> jax.Array:
    """The Gram matrix of the shorter side less the identity; zero iff `x` is orthogonal.

    Of the columns where `x` is tall or square, of the rows where it is wide: the other one has not
    the rank to be an identity. Hermitian, shape (..., k, k), in at least float32 and exact to the
    dtype on every backend. Its derivative, in either mode, takes one product of that size.
    """
    return gram_less_identity(short_side_first(x))


def short_side_first(x: jax.Array) -> jax.Array:
    """Tall and square matrices transposed, so that columns are rows; in at least float32."""
    x = wide(x)
    return x.mT if x.shape[-2] >= x.shape[-1] else x


@jax.custom_jvp
def gram_less_identity(y: jax.Array) -> jax.Array:
    """Y y^H - I for wide matrices y, shape (..., k, n) to (..., k, k)."""
    return less_identity(gram(y, lax.Precision.HIGHEST))


@gram_less_identity.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # t y^H + y t^H as one product: what autodiff would make two, forwards and backwards.
    (y,), (t,) = primals, tangents
    half = jnp.matmul(t, y.mT.conj(), precision=lax.Precision.HIGHEST)
    return gram_less_identity(y), half + half.mT.conj()
