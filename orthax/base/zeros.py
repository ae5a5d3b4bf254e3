"""Zeros to start a state with, that lie on a mesh as the leaves do and read nothing of them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from orthax.base.leaves import explicit_sharding, spec_of
from orthax.base.varying import vary_as


def zeros_beside(
    x: Any, shape: tuple[int, ...], axes: tuple[int | None, ...], dtype: Any
) -> jax.Array:
    """Zeros that lie along the axes of an array, or a `ShapeDtypeStruct`, as it does.

    `axes` has for each axis of the zeros that of `x` which it follows, or None where it is whole on
    each device. The values of `x` are not read: a state starts without work between devices.
    """
    traced = isinstance(x, Tracer)
    sharding = explicit_sharding(x) if traced else getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding):
        spec = spec_of(sharding, len(x.shape))
        spec = [None if axis is None else spec[axis] for axis in axes]
        sharding = sharding.update(spec=PartitionSpec(*spec))
    elif traced or not getattr(x, "committed", False):
        sharding = None
    if traced:
        zeros = jnp.zeros(shape, dtype)
        zeros = zeros if sharding is None else jax.sharding.reshard(zeros, sharding)
        return vary_as(zeros, x)
    return jnp.zeros(shape, dtype, device=sharding)


def zeros_like(x: Any, dtype: Any = None) -> jax.Array:
    """Zeros in the place of an array, or where a `ShapeDtypeStruct` says; None: of its dtype."""
    return zeros_beside(x, x.shape, tuple(range(len(x.shape))), dtype or x.dtype)
