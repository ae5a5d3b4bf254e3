"""`WithMemory`: a function that carries something from call to call."""

from collections.abc import Callable
from typing import Any, NamedTuple

from orthax.base import check


class WithMemory(NamedTuple):
    """A function of an array that carries something from call to call, as a pair of pure functions.

    `orthax.add_penalty` and `orthax.diagnostics` take one for a function and keep its memory.

    Attributes:
      init: From the array, or a `ShapeDtypeStruct`, to the first memory.
      apply: From the array and the memory to the value and the next memory, of the same type.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax.diagnostics import warm_spectral_norm
      >>> init, apply = warm_spectral_norm(steps=8)
      >>> w = jnp.diag(jnp.array([2.0, 1.0]))
      >>> norm, memory = apply(w, init(w))
      >>> print(norm.round(3))  # the next call takes `memory`
      2.0
    """

    init: Callable[[Any], Any]
    apply: Callable[[Any, Any], tuple[Any, Any]]


def check_measure(where: str, x: Any, accepted: str) -> None:
    """Raises a `TypeError` unless `x` is a function of an array or a `WithMemory` of two."""
    check.function(where, x, accepted, parts=x if isinstance(x, WithMemory) else ())
