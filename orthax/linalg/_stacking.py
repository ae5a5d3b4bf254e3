"""Calling a method on matrices once per stack of equal shapes instead of once per matrix.

A model has few shapes and many layers. Stacks make the compiled program as large as the number of
shapes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orthax.linalg._explicit import explicit_sharding, on_auto_axes, run_in_auto_mode

Method = Callable[[jax.Array], jax.Array]

MAX_STACK = 256
"""Matrices in one stack, unless a single array holds more."""

MAPPED_BACKENDS = ("cpu",)
"""Backends on which a stack is mapped over, one matrix after the other, instead of batched.

On CPU one matrix fills the cores and a mapped one stays in the cache (benchmarks/stacking.py).
"""


def apply_per_leaf(method: Method, xs: Sequence[jax.Array]) -> list[jax.Array]:
    """Calls `method` on each array of matrices, shape (..., m, n); one without entries stays."""
    return [_run([x], lambda y: (method(y),))[0] if x.size else x for x in xs]


def apply_stacked(method: Method, xs: Sequence[jax.Array]) -> list[jax.Array]:
    """Calls `method` once per stack of matrices of one dtype and shape, up to transposition.

    Args:
      method: Function of matrices (..., m, n) to matrices of the same shape and dtype that commutes
        with transposition.
      xs: Arrays of matrices, shape (..., m, n) each, in any order and mix of shapes.

    Returns:
      The results, in order, each with the shape and the sharding of its argument. Arrays on Auto
      mesh axes are not stacked: their shardings may differ, and a stack would mix them.
    """
    results: list[Any] = [x if _to_be_stacked(x) else apply_per_leaf(method, [x])[0] for x in xs]
    for group in _groups(xs):
        stacked = _run([xs[i] for i in group], lambda *ys: _through_stack(method, ys))
        for i, result in zip(group, stacked, strict=True):
            results[i] = result
    return results


def _run(xs: list[jax.Array], fun: Callable[..., tuple[jax.Array, ...]]) -> tuple[jax.Array, ...]:
    """Calls `fun` on arrays that are all on Explicit mesh axes or all not."""
    shardings = tuple(explicit_sharding(x) for x in xs)
    if shardings[0] is not None:
        fun = run_in_auto_mode(fun, shardings)
    return fun(*xs)


def _to_be_stacked(x: jax.Array) -> bool:
    return x.size > 0 and not on_auto_axes(x)


def _groups(xs: Sequence[jax.Array]) -> list[list[int]]:
    """Positions of the arrays that share a stack, of those that are stacked at all."""
    groups: dict[Any, list[int]] = {}
    sizes: dict[Any, int] = {}
    chunks: dict[Any, int] = {}
    for i, x in enumerate(xs):
        if not _to_be_stacked(x):
            continue
        sharding = explicit_sharding(x)
        spec = (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))) if sharding else ()
        if x.shape[-2] > x.shape[-1]:
            spec = (*spec[:-2], *reversed(spec[-2:]))
        key = (x.dtype, *sorted(x.shape[-2:]), sharding and sharding.mesh, spec)
        count = math.prod(x.shape[:-2])
        if sizes.get(key, 0) + count > MAX_STACK:
            chunks[key] = chunks.get(key, 0) + 1
            sizes[key] = 0
        sizes[key] = sizes.get(key, 0) + count
        groups.setdefault((key, chunks.get(key, 0)), []).append(i)
    return list(groups.values())


def _through_stack(method: Method, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    wide = [x.mT if x.shape[-2] > x.shape[-1] else x for x in xs]
    if len(xs) == 1 and math.prod(xs[0].shape[:-2]) == 1:
        results = [method(wide[0])]
    else:
        matrices = [jnp.reshape(y, (-1, *y.shape[-2:])) for y in wide]
        stack = _map_or_batch(method, jnp.concatenate(matrices))
        parts = _split(stack, [y.shape[0] for y in matrices])
        results = [jnp.reshape(part, y.shape) for part, y in zip(parts, wide, strict=True)]
    return tuple(
        result.mT if x.shape[-2] > x.shape[-1] else result
        for result, x in zip(results, xs, strict=True)
    )


def _split(stack: jax.Array, sizes: list[int]) -> list[jax.Array]:
    """Cuts a stack into consecutive parts.

    XLA compiles equal kernels once, but a slice's offset is part of its kernel: on CPU 192 slices
    take 3.7 s to compile, and 0.1 s when the offsets are data. A conditional with two equal
    branches is what keeps the compiler from seeing them as constants.
    """
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    if jax.default_backend() != "cpu" or len(sizes) < 8:
        return [stack[start : start + n] for start, n in zip(starts, sizes, strict=True)]

    def offsets() -> list[jax.Array]:
        return [jnp.uint32(i) for i in (0, *starts)]

    unknown = jnp.real(stack[0, 0, 0]) > 0
    zero, *begins = jax.lax.cond(unknown, offsets, offsets)
    return [
        jax.lax.dynamic_slice(stack, (begin, zero, zero), (n, *stack.shape[1:]))
        for begin, n in zip(begins, sizes, strict=True)
    ]


def _map_or_batch(method: Method, stack: jax.Array) -> jax.Array:
    if jax.default_backend() in MAPPED_BACKENDS:
        return map_in_place(method, stack)
    return method(stack)


def map_in_place(method: Method, stack: jax.Array) -> jax.Array:
    """`jax.lax.map` without a second stack: pages of fresh memory take time to get."""

    def replace(i: jax.Array, stack: jax.Array) -> jax.Array:
        matrix = jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(stack, method(matrix), i, 0)

    # An unsigned index needs no code for negative ones.
    return jax.lax.fori_loop(np.uint32(0), np.uint32(stack.shape[0]), replace, stack)
