"""float16 gradients are accumulated in float32, whatever transformation does it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def accumulate_float16_in_float32(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Shows `inner` float16 leaves in float32 and casts its updates back; other dtypes as they are.

    A heavy-ball sum of float16 gradients near 1e3 overflows within 40 steps, their squares at once.
    """
    inner = optax.with_extra_args_support(inner)

    def widened(leaf: Any) -> Any:
        dtype = jnp.result_type(leaf)  # a Python number is a leaf too
        dtype = jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        return jnp.asarray(leaf, dtype)  # strong: a weakly typed state would change its type

    def init(params: Any) -> Any:
        return inner.init(jax.tree.map(widened, params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        wide_params = None if params is None else jax.tree.map(widened, params)
        wide, state = inner.update(jax.tree.map(widened, updates), state, wide_params, **extra)
        return jax.tree.map(lambda u, like: u.astype(jnp.result_type(like)), wide, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
