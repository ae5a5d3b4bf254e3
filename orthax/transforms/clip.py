"""`clip_by_quantile`: ROOT's soft threshold, which takes a matrix's outliers off."""

import jax
import jax.numpy as jnp
import optax

from orthax.base import check
from orthax.base.each_matrix import SMALL, each_matrix
from orthax.linalg.elementary import wide
from orthax.linalg.quantile import quantile_of_magnitude


def clip_by_quantile(quantile: jax.typing.ArrayLike = 0.9) -> optax.GradientTransformation:
    r"""Clips the entries of each matrix at a quantile of their own magnitudes.

    With t the quantile of :math:`|M_{ij}|` over the matrix, the update is
    :math:`\mathrm{sign}(M_{ij}) \min(|M_{ij}|, t)`, what soft thresholding at t takes away: a few
    huge entries no longer decide the singular vectors, at any scale of the matrix.
    Reference: He et al., ROOT, 2025, <https://arxiv.org/abs/2511.20626>.

    Args:
      quantile: Part of the entries that stay, in [0, 1]: 1 clips nothing, 0 at the smallest.

    Returns:
      A stateless transformation; complex entries keep their phase. Quantiles are each matrix's own,
      linear between neighbours and exact for ties, zeros and any range of magnitudes. A matrix
      becomes zero if more than the part `quantile` of it is zero, and NaN if an entry is NaN;
      infinities are clipped like other entries (complex ones, without a phase, become NaN).
      State: none. Sees: trees whose leaves' last two axes are the matrix; needs no params.

    Raises:
      ValueError: If `quantile` is outside [0, 1]; at `update`, for a leaf of fewer than two axes.
      TypeError: If `quantile` is no number; at `update`, for an integer leaf.

    Example:
      >>> tx = clip_by_quantile(0.75)
      >>> outlier = jnp.array([[1.0, -2.0, 3.0, -4.0, 500.0]])
      >>> updates, _ = tx.update(outlier, tx.init(outlier))
      >>> print(updates)
      [[ 1. -2.  3. -4.  4.]]
    """
    check.number("clip_by_quantile: quantile", quantile, "[0, 1]")

    def clipped(x: jax.Array, quantile: jax.typing.ArrayLike) -> jax.Array:
        limit = quantile_of_magnitude(x, quantile)
        x = wide(x)
        size = jnp.abs(x)
        if jnp.iscomplexobj(x):
            # Neither the magnitude of what is left overflows nor its reciprocal underflows.
            less = x * (1 - 15 / 16 * (size > 1).astype(x.dtype))
            factor = limit / jnp.where(size > 0, jnp.abs(less), 1)
            outside = less * factor.astype(x.dtype)
        else:
            outside = jnp.copysign(limit, x)
        # With a NaN as limit every entry is outside.
        return jnp.where(size <= limit, x, outside)

    return each_matrix("clip_by_quantile", clipped, numbers=(quantile,), share=SMALL)
