"""Momentum in 8 bits an entry, in the place of `optax.trace`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from orthax.base.each_matrix import each_matrix
from orthax.base.leaves import check_matrix_leaves, in_dtypes_of
from orthax.linalg.quantization import Quantized, dequantize, quantize, quantized_zeros

BITS = 8


def trace_int8(
    call: str, decay: jax.typing.ArrayLike, nesterov: bool
) -> optax.GradientTransformation:
    """`optax.trace(decay, nesterov)` whose sum is rounded to 256 levels a row after each update.

    Checked arguments; `call` is the optimizer's name for errors. A row is the leaf's last axis, and
    its levels lie between its smallest and its largest entry.
    State: `Quantized`: a byte an entry and two float32 numbers a row.
    """

    def step(g: Any, codes: Any, scale: Any, zero: Any, decay: Any) -> tuple[Any, ...]:
        # M <- mu M + G, of which G + mu M or M itself goes on in full precision.
        m = g + decay * dequantize(Quantized(codes, scale, zero), BITS, g.shape[-1])
        return g + decay * m if nesterov else m, *quantize(m, BITS)

    made = each_matrix(
        call,
        step,
        numbers=(decay,),
        init=functools.partial(quantized_zeros, bits=BITS),
        state_type=Quantized,
    )

    def init(params: optax.Params) -> optax.OptState:
        check_matrix_leaves(f"{call}: with mu_dtype='int8'", params, kind=jnp.floating)
        return made.init(params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        # A float32 sum of bfloat16 gradients is what optax.trace hands on where params are float32.
        return made.update(in_dtypes_of(updates, updates, params), state)

    return optax.GradientTransformation(init, update)
