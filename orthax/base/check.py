"""What a call accepts: checks of arguments, all in one form of words.

A value of the wrong kind is a `TypeError`, one out of range a `ValueError`; both name the call, the
argument, what came and what is accepted. `where` is "call: argument", such as "muon: momentum".
Values of tracers are not known, so a tracer of a number passes as a number.
"""

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

    `alternative` names what else is accepted and was ruled out already, such as " or a schedule". A
    `static` value must be known while tracing, and it is a float that comes back.
    """
    if not is_number(x) or (static and isinstance(x, Tracer)):
        _refuse(TypeError, where, f"a number in {interval}{alternative}", x)
    if not isinstance(x, Tracer) and not _lies_in(float(x), interval):
        _refuse(ValueError, where, f"a number in {interval}{alternative}", x)
    return float(x) if static else x


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


def function(
    where: str, x: Any, accepted: str = "a function of matrices", parts: Sequence[Any] = ()
) -> None:
    """Raises unless `x`, or each of its parts, can be called."""
    if not all(map(callable, parts or (x,))):
        _refuse(TypeError, where, accepted, x)


def transformation(where: str, x: object) -> None:
    """Raises unless `x` is an optax transformation."""
    if not is_transformation(x):
        _refuse(TypeError, where, "an optax transformation, such as optax.identity()", x)


def numbers(where: str, x: Any, accepted: str) -> np.ndarray:
    """Real numbers on the host as a float64 array, or an error if they are none."""
    try:
        array = np.asarray(x)
    except ValueError:  # rows of different lengths
        _refuse(ValueError, where, accepted, x)
    if not _is_real(array.dtype):
        _refuse(TypeError, where, accepted, x)
    return array.astype(np.float64)


def floating_dtype(
    where: str, x: Any, *, names: Sequence[str] = (), kind: Any = jnp.inexact, none: bool = True
) -> None:
    """Raises unless `x` is a floating dtype (or of another kind), None or one of some names."""
    if (x is None and none) or (isinstance(x, str) and x in names):
        return
    what = "a floating dtype" if kind is jnp.inexact else "a real floating dtype"
    accepted = ", ".join([*(["None"] if none else []), what, *map(repr, names)])
    if x is None or isinstance(x, (np.ndarray, np.generic, jax.Array)):  # they are no dtypes
        _refuse(TypeError, where, accepted, x)
    try:
        known = jnp.issubdtype(jnp.dtype(x), kind)
    except TypeError:
        _refuse(TypeError, where, accepted, x)
    if not known:
        # An integer dtype would cut off fractions; the word means levels between the ends of a row.
        word = " The string 'int8' means quantisation, the dtype would truncate." if names else ""
        _refuse(ValueError, where, accepted, x, word)


def is_number(x: object) -> TypeGuard[Any]:
    """Whether `x` is one real number: of Python, NumPy or JAX, or a tracer of one; True is none."""
    if not isinstance(x, NUMBER) or isinstance(x, bool) or np.ndim(x):
        return False
    return isinstance(x, (int, float)) or _is_real(x.dtype)


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)


def is_transformation(x: object) -> TypeGuard[optax.GradientTransformation]:
    """Whether `x` is a transformation: any object with `init` and `update`."""
    return hasattr(x, "init") and hasattr(x, "update")


def _refuse(
    kind: Callable[[str], Exception], where: str, accepted: str, x: object, hint: str = ""
) -> NoReturn:
    # What inject_hyperparams turns into an array is no longer a word or an integer.
    if isinstance(x, jax.Array) and "number" not in accepted:
        call, _, argument = where.partition(": ")
        hint = (
            f" In optax.inject_hyperparams, list it in static_args: "
            f"optax.inject_hyperparams(orthax.{call}, static_args=({argument!r},))(...)."
        )
    raise kind(f"{where} must be {accepted}, got {x!r}.{hint}")


def _lies_in(x: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = low <= x if interval[0] == "[" else low < x
    return above and (x <= high if interval[-1] == "]" else x < high)
