"""What a call accepts: checks of arguments, all in one form of words.

A value of the wrong kind is a `TypeError`, one out of range a `ValueError`; both name the call, the
argument, what came and what is accepted. `where` is "call: argument", such as "muon: momentum".
Values of tracers are not known, so a tracer of a number passes as a number.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

NUMBER = (int, float, np.number, np.ndarray, jax.Array)  # a tracer is a `jax.Array`


def number(
    where: str, x: object, interval: str, *, alternative: str = "", static: bool = False
) -> Any:
    """The number that came, or an error unless it is in an interval such as "[0, 1)"; NaN never is.

    `alternative` is what else was accepted before, such as " or a schedule"; `static`: no tracers.
    """
    if not is_number(x) or (static and isinstance(x, Tracer)):
        _refuse(TypeError, where, f"a number in {interval}{alternative}", x)
    if not isinstance(x, Tracer) and not _lies_in(float(x), interval):
        _refuse(ValueError, where, f"a number in {interval}{alternative}", x)
    return x


def integer(where: str, x: object, interval: str = "[1, inf)") -> int:
    """The integer that came, of Python or NumPy, or an error unless it lies in the interval."""
    accepted = f"an integer in {interval}"
    if isinstance(x, bool) or not isinstance(x, (int, np.integer)):
        _refuse(TypeError, where, accepted, x)
    if not _lies_in(int(x), interval):
        _refuse(ValueError, where, accepted, x)
    return int(x)


def choice(where: str, x: object, options: Sequence[str]) -> None:
    """Raises unless `x` is one of some words."""
    accepted = "one of " + ", ".join(map(repr, options))
    if not isinstance(x, str):
        _refuse(TypeError, where, accepted, x)
    if x not in options:
        _refuse(ValueError, where, accepted, x)


def flag(where: str, x: object) -> None:
    """Raises unless `x` is True or False."""
    if not isinstance(x, (bool, np.bool_)):
        _refuse(TypeError, where, "True or False", x)


def number_or_schedule(where: str, x: object, interval: str) -> Any:
    """The number or schedule, a function of the count, that came, or an error."""
    return x if callable(x) else number(where, x, interval, alternative=" or a schedule")


def function(where: str, x: object, accepted: str = "a function of matrices") -> None:
    """Raises unless `x` can be called."""
    if not callable(x):
        _refuse(TypeError, where, accepted, x)


def transformation(where: str, x: object) -> None:
    """Raises unless `x` is an optax transformation."""
    if not is_transformation(x):
        _refuse(TypeError, where, "an optax transformation, such as optax.identity()", x)


def floating_dtype(where: str, x: Any, *, names: Sequence[str] = ()) -> None:
    """Raises unless `x` is None, a floating dtype or one of some names."""
    if x is None or (isinstance(x, str) and x in names):
        return
    accepted = ", ".join(["None", "a floating dtype", *map(repr, names)])
    try:
        floating = jnp.issubdtype(jnp.dtype(x), jnp.inexact)
    except TypeError:
        _refuse(TypeError, where, f"one of {accepted}", x)
    if not floating:
        _refuse(ValueError, where, f"one of {accepted}", x)


def is_number(x: object) -> TypeGuard[Any]:
    """Whether `x` is one real number: of Python, NumPy or JAX, or a tracer of one; True is none."""
    if not isinstance(x, NUMBER) or isinstance(x, bool) or np.ndim(x):
        return False
    return not isinstance(x, (np.ndarray, np.number, jax.Array)) or x.dtype.kind not in "bcO"


def is_transformation(x: object) -> TypeGuard[optax.GradientTransformation]:
    """Whether `x` is a transformation: any object with `init` and `update`."""
    return hasattr(x, "init") and hasattr(x, "update")


def _refuse(kind: Callable[[str], Exception], where: str, accepted: str, x: object) -> NoReturn:
    # What inject_hyperparams turns into an array is no longer a word or an integer.
    hint = ""
    if isinstance(x, jax.Array) and "number" not in accepted:
        hint = " In optax.inject_hyperparams, list it in static_args."
    raise kind(f"{where} must be {accepted}, got {x!r}.{hint}")


def _lies_in(x: float, interval: str) -> bool:
    low, high, with_low, with_high = _ends(interval)
    return (low < x or (with_low and x == low)) and (x < high or (with_high and x == high))


@functools.cache
def _ends(interval: str) -> tuple[float, float, bool, bool]:
    low, high = (float(end) for end in interval[1:-1].split(","))
    assert low <= high or math.isnan(low)
    return low, high, interval[0] == "[", interval[-1] == "]"
