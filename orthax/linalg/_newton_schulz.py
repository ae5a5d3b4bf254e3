"""Newton-Schulz iterations: the polar factor of a matrix by matrix products alone."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from orthax.linalg._norms import normalize
from orthax.linalg._validate import check_matrices
from orthax.linalg.coefficients import POLAR_EXPRESS, Row, check_table


def newton_schulz(
    x: jax.Array,
    coefficients: Sequence[Row] | Callable[[int, int], Sequence[Row]] = POLAR_EXPRESS,
    *,
    dtype: Any = None,
    precision: Any = None,
    eps: float = 0.0,
) -> jax.Array:
    r"""Approximates the orthogonal polar factor by odd polynomials of the matrix.

    The matrix is divided by its Frobenius norm; then each step maps every singular value s to
    :math:`a s + b s^3 + c s^5` and leaves singular vectors alone:
    :math:`X \leftarrow a X + (b A + c A^2) X` with :math:`A = X X^T` on the shorter side.

    Args:
      x: Matrices, shape (..., m, n), real or complex floating. Any scale.
      coefficients: One (a, b, c) per step; its length is the number of steps. Or a callable
        `(m, n) -> table` of the shorter and the longer side, evaluated while tracing.
      dtype: Dtype of the iteration. None: that of `x`, but float32 for 16-bit input on CPU, where
        16-bit products are no faster. bfloat16 halves the cost on accelerators and leaves singular
        values about 1e-2 off.
      precision: Passed to `jnp.matmul`, such as "highest" on TPU.
      eps: A matrix whose largest absolute entry is at most this counts as zero.

    Returns:
      Same shape and dtype. A singular value that is r of the Frobenius norm becomes
      `coefficients.scalar_map(table, r)`: with `POLAR_EXPRESS` it lies in [0.859, 1.141] for r of
      at least 1e-3 and near 989 r below (benchmarks/coefficients.py). A zero matrix gives exactly
      zero, a NaN or infinity NaN. Differentiable, also at rank-deficient input; not at zero, where
      the gradient is zero.

    Raises:
      ValueError: If `x` has fewer than two axes, or a row of coefficients is not a triple.
      TypeError: If `x` is not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax.linalg import coefficients
      >>> q = newton_schulz(jnp.diag(jnp.array([3.0, 0.01])), coefficients.minimax(8, 1e-3))
      >>> bool(jnp.allclose(q, jnp.eye(2), atol=1e-5))
      True

    Reference:
      Jordan et al., Muon, 2024, <https://kellerjordan.github.io/posts/muon/>; Amsel et al., The
      Polar Express, 2025, <https://arxiv.org/abs/2505.16932>.
    """
    check_matrices("newton_schulz", x)
    m, n = x.shape[-2:]
    short, long = sorted((m, n))
    table = check_table(
        "newton_schulz", coefficients(short, long) if callable(coefficients) else coefficients
    )
    if x.size == 0:
        return x

    y = normalize(x.mT if m > n else x, eps).astype(_compute_dtype(x.dtype, dtype))
    for a, b, c in table:
        gram = jnp.matmul(y, y.mT.conj(), precision=precision)
        polynomial = b * gram + c * jnp.matmul(gram, gram, precision=precision)
        y = a * y + jnp.matmul(polynomial, y, precision=precision)
    return (y.mT if m > n else y).astype(x.dtype)


def _compute_dtype(x_dtype: Any, requested: Any) -> Any:
    if requested is None:
        on_cpu = jax.default_backend() == "cpu"
        return jnp.promote_types(x_dtype, jnp.float32) if on_cpu else x_dtype
    if jnp.issubdtype(x_dtype, jnp.complexfloating):
        return jnp.promote_types(requested, jnp.complex64)
    return requested
