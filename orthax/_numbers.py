"""Numbers as arguments: plain, of NumPy, arrays, or tracers of `inject_hyperparams`."""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

# A tracer is a `jax.Array`.
NUMBER = (int, float, np.number, np.ndarray, jax.Array)


def check_number(
    call: str, argument: str, x: Any, accepted: str, valid: Callable[[Any], bool]
) -> None:
    """Raises a `TypeError` unless `x` is a number, a `ValueError` if it is known to be invalid.

    Args:
      call: Name of the function, for error messages.
      argument: Name of the argument.
      x: What came. The value of a tracer is not known and passes.
      accepted: Ends "... must", such as "lie in [0, 1]".
      valid: Whether a number is accepted; false for NaN.
    """
    if not isinstance(x, NUMBER) or isinstance(x, bool) or np.ndim(x):
        raise TypeError(f"{call}: {argument} must be a number, got {x!r}.")
    if not isinstance(x, Tracer) and not valid(x):
        raise ValueError(f"{call}: {argument} must {accepted}, got {x!r}.")


def check_integer(call: str, argument: str, x: Any, *, least: int) -> None:
    """Raises unless `x` is an integer, of Python or NumPy, and at least `least`."""
    if not isinstance(x, numbers.Integral) or isinstance(x, bool):
        raise TypeError(
            f"{call}: {argument} must be an integer of at least {least}, got {x!r}. In "
            "optax.inject_hyperparams, list it in static_args."
        )
    if x < least:
        raise ValueError(f"{call}: {argument} must be at least {least}, got {x!r}.")
