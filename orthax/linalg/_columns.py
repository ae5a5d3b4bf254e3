"""The largest columns of a matrix."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from orthax.linalg._norms import unit_max
from orthax.linalg._validate import check_matrices

RANKINGS = ("l1", "l2")


def top_columns(x: jax.Array, rank: int, order: Literal["l1", "l2"] = "l2") -> jax.Array:
    r"""Indices of the columns of largest norm.

    By "l2" the chosen columns hold at least the part rank / n of the energy :math:`\|x\|_F^2`, on
    every input. By "l1", the default of the paper's code, they need not: of a column of a hundred
    entries 0.05 and one with a single entry 1, it takes the first, with a fifth of the energy.

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

    Reference:
      Modoranu et al., 2025, <https://arxiv.org/abs/2505.17967>, section 3.
    """
    check_matrices("top_columns", x)
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)):
        raise TypeError(f"top_columns: rank must be an integer, got {rank!r}.")
    if not 1 <= rank <= x.shape[-1]:
        raise ValueError(f"top_columns: rank must lie in [1, {x.shape[-1]}], got {rank!r}.")
    if order not in RANKINGS:
        raise ValueError(f"top_columns: order must be one of {RANKINGS}, got {order!r}.")
    scaled, _ = unit_max(x)
    sizes = jnp.abs(scaled)
    norms = jnp.sum(sizes if order == "l1" else sizes**2, axis=-2)
    _, indices = jax.lax.top_k(norms, rank)
    return jnp.sort(indices, axis=-1)
