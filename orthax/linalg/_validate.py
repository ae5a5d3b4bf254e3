"""Checks that the functions of `linalg` share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_matrices(call: str, x: Any, argument: str = "x") -> None:
    """Raises unless `x` is an array of real or complex floating matrices, shape (..., m, n)."""
    if not isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        raise TypeError(f"{call}: {argument} must be an array, got {type(x).__name__}.")
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{call}: {argument} has dtype {x.dtype}; it must be real or complex floating."
        )
    if x.ndim < 2:
        raise ValueError(
            f"{call}: {argument} has shape {x.shape}; matrices need at least two axes."
        )


def integer_of(call: str, argument: str, x: Any, *, least: int = 1, most: int | None = None) -> int:
    """The integer that came, of Python or NumPy, or an error unless it lies in [least, most]."""
    if isinstance(x, bool) or not isinstance(x, (int, np.integer)):
        raise TypeError(f"{call}: {argument} must be an integer of at least {least}, got {x!r}.")
    if x < least or (most is not None and x > most):
        accepted = f"be at least {least}" if most is None else f"lie in [{least}, {most}]"
        raise ValueError(f"{call}: {argument} must {accepted}, got {x!r}.")
    return int(x)
