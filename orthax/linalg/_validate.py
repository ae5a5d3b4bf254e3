"""Checks that the functions of `linalg` share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_matrices(call: str, x: Any) -> None:
    """Raises unless `x` is an array of real or complex floating matrices, shape (..., m, n)."""
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"{call}: x must be an array, got {type(x).__name__}.")
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"{call}: x has dtype {x.dtype}; it must be real or complex floating.")
    if x.ndim < 2:
        raise ValueError(f"{call}: x has shape {x.shape}; matrices need at least two axes.")
