"""`low_rank`: any transformation, run in the few dimensions that hold most of each gradient.

`low_rank(inner, rank, retain=...)` shows `inner` the coordinates of a buffer, b = buffer + g, in r
columns Q of an orthonormal basis, and keeps what was left out:

    low = b Q;  update = inner(low) Q^T;  buffer = b - (1 - retain) low Q^T

  * Trion is `low_rank(orthogonalize(), rank, retain=0.95)`: the buffer is its momentum.
  * DCT-AdamW is `low_rank(scale_by_adam_per_index(), rank)`, with `retain=0.0` for error feedback.
  * GaLore is `low_rank(optax.scale_by_adam(), rank, basis="svd", update_every=200)`.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from orthax.transforms.low_rank.projection import projected


def low_rank(
    inner: optax.GradientTransformation,
    rank: int | float | Callable[[int, int], int],
    *,
    basis: Literal["dct", "dct3", "random", "hadamard", "columns", "svd", "subspace"] = "dct",
    ranking: Literal["l1", "l2"] = "l2",
    retain: jax.typing.ArrayLike | None = None,
    update_every: int = 1,
    buffer_dtype: Any = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs a transformation on the coordinates of each matrix in r columns of a basis.

    The shorter side of a matrix is projected, of a square one the rows (fan-in): `inner` sees
    updates and params of shape (..., m, r) or (..., r, n). Its state follows when the columns
    change: in a fixed basis, the entries of kept indices move along and those of new ones start at
    zero; in "svd" and "subspace", first moments are rotated, and second moments by the squares, so
    that none turns negative (a moment of unknown name with no negative entry counts as second).
    Reference: Modoranu et al., 2025, <https://arxiv.org/abs/2505.17967>; the retained momentum from
    Ahn et al., Dion, 2025, <https://arxiv.org/abs/2504.05295>; projected moments from Zhao et
    al., GaLore, 2024, <https://arxiv.org/abs/2403.03507>.

    Args:
      inner: Transformation whose state follows the shape of the updates, or is one scalar for all:
        `optax.trace`, `scale_by_adam`, `scale_by_lion`, `orthogonalize`, a `chain`, ...
      rank: Dimensions r: an integer, a fraction of the shorter side in (0, 1], or a function of
        (m, n) to an integer. A matrix whose shorter side is at most r is not projected.
      basis: "dct" and "dct3", the cosines of DCT-II and DCT-III, computed where they are needed and
        never stored; "hadamard" likewise, for sizes that have a Hadamard matrix; "random", one
        orthogonal matrix for each size, from `seed`; "columns", the identity: plain selection;
        "svd", the leading singular vectors; "subspace", one step of subspace iteration to them.
      ranking: Norm by which the r columns of largest coordinates are chosen; see
        `orthax.linalg.top_columns`. "svd" and "subspace" have nothing to rank.
      retain: None: no buffer; what is outside the subspace is lost. A number in [0, 1): the buffer
        keeps it, and this part of what is inside: 0 is error feedback, a momentum makes it one. At
        0, with `optax.identity()` as inner, updates so far and buffer are the sum of gradients.
      update_every: Updates between choices of the subspace.
      buffer_dtype: Of the buffer: None (the params'; float32 for float16), a dtype, or "int8" or
        "int4" for so many bits an entry and two float32 numbers a row.
      rounding: Of "int8" and "int4": "nearest", or "stochastic", right on average.
      seed: Of random bases and of stochastic rounding.

    Returns:
      A transformation; updates keep shape and dtype, and on meshes their sharding. There, with a
      fixed basis, state and buffer are cut along the axis that is not projected.
      With "l2" ranking and a fixed basis, the coordinates hold at least the part r / n of the
      buffer's energy. 16-bit matrices are projected in float32.
      State: `LowRankState`: inner's, r / min(m, n) of its full size; r indices; the buffer.
      Sees: trees whose leaves' last two axes are the matrix; needs params if `inner` does.

    Raises:
      ValueError: For an argument out of range or unknown; at `init`, for a leaf of fewer than two
        axes, a size without a Hadamard matrix, or a state of `inner` that cannot follow a change of
        subspace (Adafactor's factored moments), by name.
      TypeError: For an argument of the wrong type (in `optax.inject_hyperparams` all but `retain`
        belong into `static_args`); for an integer leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = low_rank(optax.identity(), rank=1, basis="columns", retain=0.0)
      >>> g = jnp.array([[1.0, 2.0], [2.0, 2.0]])
      >>> updates, state = tx.update(g, tx.init(g))
      >>> print(updates)
      [[0. 0.]
       [2. 2.]]
      >>> print(state.residuals)
      [[1. 2.]
       [0. 0.]]
    """
    return projected(
        "low_rank",
        inner,
        rank,
        basis=basis,
        ranking=ranking,
        retain=retain,
        update_every=update_every,
        buffer_dtype=buffer_dtype,
        rounding=rounding,
        seed=seed,
    )
