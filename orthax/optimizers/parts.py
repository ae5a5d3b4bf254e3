"""The steps that the optimizers share: momentum, weight decay, learning rate."""

from typing import Any

import jax
import optax

from orthax.base import check
from orthax.base.leaves import needs_params
from orthax.linalg.quantization import BITS
from orthax.matrices.partition import Build
from orthax.transforms.trace_int8 import trace_int8

QUARTER = 0.25
"""The rank of low-rank optimizers if none is given, of the shorter side."""


def momentum_step(
    call: str,
    momentum: jax.typing.ArrayLike | optax.GradientTransformation,
    nesterov: bool,
    mu_dtype: Any,
) -> optax.GradientTransformation:
    """`optax.trace` for a number, in 8 bits for "int8"; a transformation is taken as it is."""
    check.flag(f"{call}: nesterov", nesterov)
    check.floating_dtype(f"{call}: mu_dtype", mu_dtype, names=("int8",))
    if check.is_transformation(momentum):
        return momentum
    decay = check.number(
        f"{call}: momentum", momentum, "[0, 1)", alternative=" or a transformation"
    )
    if isinstance(mu_dtype, str) and mu_dtype == "int8":
        return trace_int8(call, decay, nesterov)
    return optax.trace(decay, nesterov=nesterov, accumulator_dtype=mu_dtype)


def adam_step(
    mu_dtype: Any = None,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` of the fallback; its moments are not quantised with the momentum."""
    quantised = isinstance(mu_dtype, str) and mu_dtype in BITS
    # The root of a moment of zero (an unused row of an embedding) has no derivative, and gradients
    # through the update would be NaN. What is added changes no step: its root is 1e-7 of eps.
    return optax.scale_by_adam(
        b1, b2, eps, eps_root + 1e-30, mu_dtype=None if quantised else mu_dtype
    )


def decay_step(
    call: str, weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation
) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` for a number or schedule; a transformation is taken as it is.

    For the Python number 0 it is `optax.identity()`, which needs no params. (Zero as an array may
    be an injected hyperparameter, which changes.)
    """
    if check.is_transformation(weight_decay):
        return weight_decay
    strength = check.number_or_schedule(f"{call}: weight_decay", weight_decay, "[0, inf)")
    if isinstance(strength, (int, float)) and strength == 0:
        return optax.identity()
    decay = optax.add_decayed_weights(strength)
    return needs_params(f"{call}: with weight_decay={strength!r}", decay)


def rate_step(call: str, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """`optax.scale_by_learning_rate`."""
    check.number_or_schedule(f"{call}: learning_rate", learning_rate, "(-inf, inf)")
    return optax.scale_by_learning_rate(learning_rate)


def fallback_chain(
    call: str,
    fallback: optax.GradientTransformation | None,
    adam: optax.GradientTransformation,
    decay: optax.GradientTransformation,
    mask: Any,
    rate: optax.GradientTransformation,
) -> optax.GradientTransformation | Build:
    """The fallback that a user gave, checked; for None, AdamW of these steps."""
    if fallback is None:
        return lambda leaves: optax.chain(adam, leaves.masked(decay, mask), rate)
    check.transformation(f"{call}: fallback", fallback)
    return fallback
