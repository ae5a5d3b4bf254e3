"""Matrices in 8 or 4 bits an entry: each row has its own scale."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from orthax.base.placing import resized_zeros, zeros_like
from orthax.linalg.elementary import wide, wide_dtype

BITS = {"int8": 8, "int4": 4}
"""What users call them."""


class Quantized(NamedTuple):
    """Matrices, shape (..., m, n), as integers: an entry is `code * scale + zero`.

    Attributes:
      codes: uint8; shape (..., m, n) for 8 bits. For 4 bits (..., m, ceil(n / 2)): entry j of a row
        in the low half of byte j, entry j + ceil(n / 2) in the high half.
      scale: Spacing of each row's levels, shape (..., m, 1), float32 (float64 for float64).
      zero: Smallest entry of each row, as `scale`.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array


def quantize(x: jax.Array, bits: int, key: jax.Array | None = None) -> Quantized:
    """Rounds every entry to one of 2**bits levels between the row's smallest and largest.

    Of real matrices, 8 or 4 bits. With a key rounding is stochastic, its expectation the entry;
    without, to the nearest. Rows of equal entries are exact; one with a NaN or an infinity is NaN.
    """
    # low + (high - low) k / levels for k = 0 ... levels. Everything is computed of halves, because
    # high - low may exceed the largest float where both ends are finite.
    x = wide(x)
    levels = 2**bits - 1
    low, high = (
        reduce(x, axis=-1, keepdims=True) if x.size else jnp.zeros((*x.shape[:-1], 1), x.dtype)
        for reduce in (jnp.min, jnp.max)
    )
    scale = high / levels - low / levels  # the difference itself may overflow
    # floor(place + u) with u uniform in [0, 1) rounds up with the probability of the fraction.
    offset = 0.5 if key is None else jax.random.uniform(key, x.shape, x.dtype)
    # A row of equal entries has scale 0: its codes are 0 and `zero` holds the entry.
    place = (0.5 * x - 0.5 * low) / jnp.where(scale > 0, 0.5 * scale, 1)
    codes = jnp.clip(jnp.floor(place + offset), 0, levels).astype(jnp.uint8)
    if bits == 4:
        # Halves side by side and not neighbours, so that packing takes slices without strides.
        half = (x.shape[-1] + 1) // 2
        second = jnp.pad(codes[..., half:], [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] % 2)])
        codes = codes[..., :half] | (second << 4)
    return Quantized(codes, scale, low)


def quantized_zeros(x: Any, bits: int) -> Quantized:
    """What `quantize` makes of zeros in the place of x, without reading it."""
    half = (x.shape[-1] + 1) // 2
    codes = zeros_like(x, jnp.uint8) if bits == 8 else resized_zeros(x, -1, half, jnp.uint8)
    scale, zero = (resized_zeros(x, -1, 1, wide_dtype(x.dtype)) for _ in range(2))
    return Quantized(codes, scale, zero)


def dequantize(x: Quantized, bits: int, columns: int) -> jax.Array:
    """The matrices, shape (..., m, columns), in the dtype of `scale`."""
    codes = x.codes
    if bits == 4:
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1)[..., :columns]
    half = 0.5 * x.scale * codes.astype(x.scale.dtype)
    return x.zero + half + half  # the range of a row may overflow
