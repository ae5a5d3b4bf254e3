"""The polar factor by whichever method is fastest, or exactly by singular value decomposition."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from orthax.base import check
from orthax.base.leaves import check_matrices, value_of
from orthax.base.platform import by_platform
from orthax.linalg.elementary import normalize, unit_max
from orthax.linalg.polar_factor.gram import gram_newton_schulz
from orthax.linalg.polar_factor.newton_schulz import newton_schulz
from orthax.linalg.polar_factor.tables import minimax
from orthax.linalg.polar_factor.zolotarev import rational


class Rule(NamedTuple):
    """One line of the table by which `polar` chooses.

    Attributes:
      accuracy: "fast" or "exact".
      platform: The one that a program is compiled for, or "any".
      bits: Of a real number of the input, at least.
      aspect: Longer over shorter side, at least.
      method: Function of matrices.
    """

    accuracy: str
    platform: str
    bits: int
    aspect: float
    method: Callable[[jax.Array], jax.Array]


# Ten steps lift a singular value of 1e-5 of the norm to 1. They are taken in float32 because the
# rounding of entries in bfloat16 is larger than such a value.
_EXACT_POLYNOMIAL = functools.partial(
    newton_schulz,
    coefficients=minimax(10, 1e-5),
    prescale="schatten",
    dtype=jnp.float32,
    precision="highest",
)

ACCURACIES = ("fast", "exact")

RULES = (
    Rule("fast", "cpu", 16, 1, rational),
    Rule("exact", "cpu", 16, 1, functools.partial(rational, degree=3, passes=2)),
    Rule("fast", "tpu", 16, 1, newton_schulz),
    Rule("fast", "any", 32, 2, gram_newton_schulz),
    Rule("fast", "any", 16, 1, newton_schulz),
    Rule("exact", "any", 16, 1, _EXACT_POLYNOMIAL),
)
"""The first line that fits decides.

CPU: measured from 16 x 16 to 1024 x 8192 (benchmarks/orthogonality.py); the rational form is the
fastest at its accuracy, or within a tenth of it. Others: counted, not measured; what will measure
them is benchmarks/accelerator.py. TPU: at the precision that the Gram form needs, a product takes
six times as long there, and seconds to compile; the iteration itself needs no more than the default
precision (products of bfloat16 factors leave singular values within the same bounds).
"""


def polar(x: jax.Array, accuracy: Literal["fast", "exact"] = "fast") -> jax.Array:
    """Approximates the orthogonal polar factor by the fastest method for shape, dtype and platform.

    On CPU that is `zolotarev`; elsewhere `newton_schulz` or, for long matrices on GPU,
    `gram_newton_schulz`, matrix products alone. The platform is the one that a program is compiled
    for, wherever it is traced; meshes change nothing. Vectors (a side of 1) are divided by their
    norm. To name the method: `orthax.orthogonalize(newton_schulz)`.

    Args:
      x: Matrices, shape (..., m, n), real or complex floating. Any scale.
      accuracy: "fast", or "exact" for about twice the work. On momentum of trained networks,
        whose singular values are mostly tiny, "fast" is 0.2 to 0.8 away from the polar factor
        (relative Frobenius distance) and "exact" at most 0.12. Where an orthogonal or unitary
        matrix is needed take `nearest_orthogonal` or `polar_svd`: "exact" leaves small singular
        values up to 0.07 off.

    Returns:
      Same shape and dtype. Singular values, for a smallest of r relative to the Frobenius norm, in
      float32 and up to 8192 rows: "fast": [0.79, 1.21] for r of at least 2e-3 (1e-3 up to 512
      rows), less below; "exact": [0.93, 1.07] for r of at least 1e-5. Zero gives zero, inf NaN.

    Raises:
      ValueError: For fewer than two axes or an unknown `accuracy`; TypeError: if not floating.

    Example:
      >>> q = polar(jnp.array([[0.0, 5.0], [-2.0, 0.0]]), "exact")
      >>> bool(jnp.allclose(q, jnp.array([[0.0, 1.0], [-1.0, 0.0]]), atol=0.06))
      True
    """
    x = check_matrices("polar", x)
    if accuracy not in ACCURACIES:
        check.choice("polar: accuracy", accuracy, ACCURACIES)
    if min(x.shape[-2:]) <= 1:  # a vector has one singular value, its length
        return normalize(x).astype(x.dtype)
    return _by_rules(x, accuracy)


# Traced once per shape, and without a jit around it the device where x lies decides.
@functools.partial(jax.jit, static_argnames="accuracy")
def _by_rules(x: jax.Array, accuracy: str) -> jax.Array:
    named = {rule.platform for rule in RULES} - {"any"}
    methods = {platform: _method(x, accuracy, platform) for platform in sorted(named)}
    return by_platform(methods, _method(x, accuracy, "any"))(x)


def _method(x: jax.Array, accuracy: str, platform: str) -> Callable[[jax.Array], jax.Array]:
    """That of the first rule that fits."""
    short, long = sorted(x.shape[-2:])
    return next(
        rule.method
        for rule in RULES
        if rule.accuracy == accuracy
        and rule.platform in (platform, "any")
        and rule.bits <= jnp.finfo(x.dtype).bits
        and rule.aspect <= long / short
    )


def polar_svd(x: jax.Array, *, rtol: float | None = None) -> jax.Array:
    r"""Orthogonal polar factor :math:`U V^T` of each matrix :math:`x = U S V^T`.

    It is the orthonormal matrix nearest to `x`, and what the faster methods approximate. Singular
    values that count as zero stay zero: of rank-deficient input it is a partial isometry.

    Args:
      x: Matrices, shape (..., m, n), real or complex floating. Any scale.
      rtol: Singular values of at most rtol times the largest count as zero. None: max(m, n) eps,
        the most that rounding may make of a zero. That cuts off much of real momentum in float32:
        half of the directions of a matrix of width 768 early in training; `rtol=1e-7` nearly none.

    Returns:
      Same shape and dtype; 16-bit input is computed in float32. Zero for a zero matrix. A NaN or
      infinity gives NaN. Gradients (`jnp.linalg.svd`'s) are not finite for equal singular values.

    Raises:
      ValueError: For fewer than two axes or a negative `rtol`; TypeError: if `x` is not floating.

    Example:
      >>> print(polar_svd(jnp.array([[0.0, 5.0], [-2.0, 0.0]])).round(6) + 0.0)
      [[ 0.  1.]
       [-1.  0.]]
    """
    x = check_matrices("polar_svd", x)
    rtol = value_of(rtol)
    if rtol is not None:
        check.number("polar_svd: rtol", rtol, "[0, inf]")
    if x.size == 0:
        return x
    # Directions of negligible singular values are rounding noise; kept, they would count in full.
    scaled, _ = unit_max(x)
    u, s, vh = jnp.linalg.svd(scaled, full_matrices=False)
    negligible = (max(x.shape[-2:]) * jnp.finfo(s.dtype).eps if rtol is None else rtol) * s[..., :1]
    kept = u * jnp.where(s > negligible, 1, 0)[..., None, :].astype(u.dtype)
    return (kept @ vh).astype(x.dtype)
