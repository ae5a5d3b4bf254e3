"""The steps that every optimizer shares: momentum, weight decay, learning rate, the fallback."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from orthax._numbers import NUMBER
from orthax.matrices import partition_matrices
from orthax.transforms._float16 import accumulate_float16_in_float32


def matrix_optimizer(
    call: str,
    momentum: optax.GradientTransformation,
    direction: optax.GradientTransformation,
    *,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Any,
    fallback: optax.GradientTransformation | None,
    dimension_numbers: Any,
    mu_dtype: Any = None,
    adam: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum, a direction for matrices, decay and learning rate; the rest to a fallback.

    Args:
      call: Name of the optimizer, for error messages.
      momentum: Transformation of leaves of any shape.
      direction: Transformation of leaves of any shape, `as_matrices(...)`.
      learning_rate: Number or schedule.
      weight_decay: Number or schedule; the Python number 0 leaves the step out.
      mask: Tree, or callable to a tree, of bools: which leaves decay.
      fallback: Transformation for leaves that are not matrices; None is AdamW with the same
        learning rate, decay and mask.
      dimension_numbers: As in `orthax.as_matrices`.
      mu_dtype: Dtype of the default fallback's first moment.
      adam: What the default fallback scales by; None: Adam with optax's default moments.

    Returns:
      The optimizer.
    """
    check_number_or_schedule(call, "learning_rate", learning_rate)
    if fallback is not None:
        check_transformation(call, "fallback", fallback)
    decay = weight_decay_step(call, weight_decay, mask)
    rate = optax.scale_by_learning_rate(learning_rate)
    steps = optax.chain(momentum, direction, decay, rate)
    if fallback is None:
        adam = adam or optax.scale_by_adam(mu_dtype=mu_dtype)
        fallback = accumulate_float16_in_float32(optax.chain(adam, decay, rate))
    return partition_matrices(accumulate_float16_in_float32(steps), fallback, dimension_numbers)


def momentum_trace(
    call: str, momentum: Any, nesterov: bool, mu_dtype: Any
) -> optax.GradientTransformation:
    """Returns `optax.trace` for a number, and a transformation as it is."""
    if is_transformation(momentum):
        return momentum
    check_momentum(call, momentum, "a number in [0, 1) or an optax transformation")
    trace = optax.trace(momentum, nesterov=nesterov, accumulator_dtype=mu_dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # An injected momentum is an array, which would widen 16-bit leaves to its own dtype.
        results, new = trace.update(updates, state, params)
        results = jax.tree.map(
            lambda x, g, t: x.astype(jnp.promote_types(g.dtype, t.dtype)),
            results,
            updates,
            state.trace,
        )
        return results, jax.tree.map(lambda x, t: x.astype(t.dtype), new, state)

    return optax.GradientTransformation(trace.init, update)


def adam_moments(
    b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike, eps: jax.typing.ArrayLike, mu_dtype: Any
) -> optax.GradientTransformation:
    """Returns `optax.scale_by_adam` whose state keeps its dtypes when its numbers are injected."""
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        results, new = adam.update(updates, state, params)
        results = jax.tree.map(lambda x, g: x.astype(g.dtype), results, updates)
        return results, jax.tree.map(lambda x, old: x.astype(old.dtype), new, state)

    return optax.GradientTransformation(adam.init, update)


def check_momentum(call: str, momentum: Any, accepted: str = "a number in [0, 1)") -> None:
    """Raises unless `momentum` is a number in [0, 1) or a tracer of one."""
    if not isinstance(momentum, NUMBER):
        raise TypeError(f"{call}: momentum must be {accepted}, got {momentum!r}.")
    if not isinstance(momentum, Tracer) and not 0 <= momentum < 1:
        raise ValueError(f"{call}: momentum must be {accepted}, got {momentum!r}.")


def weight_decay_step(
    call: str, weight_decay: optax.ScalarOrSchedule, mask: Any
) -> optax.GradientTransformation:
    """Returns `optax.add_decayed_weights`, or for the Python number 0 a step without params."""
    check_number_or_schedule(call, "weight_decay", weight_decay)
    if isinstance(weight_decay, (int, float)):
        if not (weight_decay >= 0 and math.isfinite(weight_decay)):
            raise ValueError(f"{call}: weight_decay must be at least 0, got {weight_decay!r}.")
        if weight_decay == 0:
            nothing = optax.identity()
            return nothing if mask is None else optax.masked(nothing, mask)

    decay = optax.add_decayed_weights(weight_decay, mask)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                f"{call}: weight_decay={weight_decay!r} needs the params: call "
                "update(updates, state, params)."
            )
        return decay.update(updates, state, params)

    return optax.GradientTransformation(decay.init, update)


def is_transformation(x: Any) -> bool:
    """Whether `x` is a transformation (any object with `init` and `update`)."""
    return hasattr(x, "init") and hasattr(x, "update")


def check_transformation(call: str, argument: str, x: Any) -> None:
    """Raises a `TypeError` unless `x` is a transformation."""
    if not is_transformation(x):
        raise TypeError(
            f"{call}: {argument} must be an optax transformation, such as "
            f"orthax.orthogonalize() or optax.identity(), got {x!r}."
        )


def check_number_or_schedule(call: str, argument: str, x: Any) -> None:
    """Raises a `TypeError` unless `x` is a number, a tracer of one or a schedule."""
    if not (isinstance(x, NUMBER) or callable(x)):
        raise TypeError(f"{call}: {argument} must be a number or a schedule, got {x!r}.")
