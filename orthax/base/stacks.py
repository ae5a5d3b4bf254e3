"""A function of one matrix, mapped over trees of matrices: one call for each stack of equal shapes.

A model has few shapes and many layers, and stacks make a compiled program as large as the number of
shapes. Results have the dtypes and shardings of what came.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from orthax.base.leaves import (
    Place,
    explicit_sharding,
    matrix_leaves,
    spec_of,
    vary_as,
    varying_axes,
)
from orthax.base.placing import laid_out
from orthax.base.platform import by_platform

Row = tuple[Any, ...]
"""What belongs to one leaf: the matrices, what the state holds for them, the params."""

NONE = 0
SMALL = 2**15
ALL = math.inf
"""Entries of the largest leaf that shares a stack.

Small matrices take longer to compile one by one than to stack, large ones longer to copy: on CPU
192 leaves of (64, 64) compile in a tenth of the time if stacked; stacks run as long as single
matrices for 128 x 128, 1.2 times as long for 256 x 256, twice for 768 x 768."""

MAX_STACK = 256
"""Matrices in one stack, unless a single array holds more."""

MAPPED_PLATFORMS = ("cpu",)
"""Where a stack is mapped over, one matrix after the other, instead of batched: on CPU one matrix
fills the cores and stays in the cache (benchmarks/stacking.py)."""


def map_matrices(
    call: str,
    fun: Callable[..., Any],
    trees: list[Any],
    outputs: int,
    numbers: tuple[Any, ...],
    share: float,
    per_shape: Callable[..., jax.Array] | None,
) -> list[Any]:
    """Maps `fun` over the leaves of trees of one structure; `None` and masked leaves stay.

    The first tree holds matrices. Result i of `outputs`, a tuple where there are several, takes
    dtype and sharding from argument i. All else is as in `each_matrix`.
    """
    leaves, places, structure = matrix_leaves(call, trees[0])
    rows = list(zip(*map(structure.flatten_up_to, trees), strict=True))
    results: list[Row] = [row[:outputs] for row in rows]  # as they are, without entries
    filled = [i for i, x in enumerate(leaves) if x.size]
    # Leaves on Auto axes share no stack: it would mix shardings that only the compiler knows.
    shared = {i for i in filled if leaves[i].size <= share and not places[i].on_auto_axes}
    groups = [[i] for i in filled if i not in shared] + _groups(rows, places, sorted(shared))

    traced = tuple(number for number in numbers if isinstance(number, Tracer))

    def last_arguments(traced: Row, x: jax.Array) -> Row:
        given = iter(traced)
        last = tuple(next(given) if isinstance(n, Tracer) else n for n in numbers)
        return last if per_shape is None else (per_shape(x, *last),)

    known: dict[Any, Row] = {}
    for group in groups:
        apply = _through_stack if group[0] in shared else _alone
        these = [rows[i] for i in group]
        x = these[0][0]
        if places[group[0]].sharding is None:
            if (x.shape, x.dtype) not in known:
                known[x.shape, x.dtype] = last_arguments(traced, x)
            found = apply(fun, these, known[x.shape, x.dtype])
        else:  # every traced array is an argument: none of Explicit type may be closed over

            def inside(traced: Row, these: list[Row], apply: Any = apply) -> list[Row]:
                return apply(fun, these, last_arguments(traced, these[0][0]))

            out = [tuple(map(explicit_sharding, row[:outputs])) for row in these]
            found = laid_out(inside, out)(traced, these)
        for i, row in zip(group, found, strict=True):
            results[i] = row
    return [structure.unflatten(column) for column in columns_of(results, outputs)]


def _alone(fun: Callable[..., Any], rows: list[Row], last: Row) -> list[Row]:
    """Results of `fun` on one row; they take after its first arrays."""
    (row,) = rows
    found = fun(*row, *last)
    found = found if isinstance(found, tuple) else (found,)
    return [tuple(x.astype(like.dtype) for x, like in zip(found, row, strict=False))]


def columns_of(rows: Sequence[Row], width: int) -> list[list[Any]]:
    """The columns of a table."""
    return [[row[i] for row in rows] for i in range(width)]


# --- stacks of equal shapes


def _groups(rows: list[Row], places: list[Place], chosen: list[int]) -> list[list[int]]:
    """Positions of the leaves that share a stack: of one dtype, shape up to transpose, sharding."""
    groups: dict[Any, list[int]] = {}
    sizes: dict[Any, int] = {}
    chunks: dict[Any, int] = {}
    for i in chosen:
        x, sharding = rows[i][0], places[i].sharding
        spec = spec_of(sharding, x.ndim) if sharding else ()
        if x.shape[-2] > x.shape[-1]:  # it will be transposed
            spec = (*spec[:-2], *reversed(spec[-2:]))
        dtypes = tuple(y.dtype for y in rows[i])
        # A leaf that is the same on all devices would not be so after a stack with others.
        varies = (places[i].varies, *map(varying_axes, rows[i][1:]))
        key = (dtypes, *sorted(x.shape[-2:]), sharding and sharding.mesh, spec, varies)
        count = math.prod(x.shape[:-2])
        # A full stack is closed and the next one opened.
        if sizes.get(key, 0) + count > MAX_STACK:
            chunks[key] = chunks.get(key, 0) + 1
            sizes[key] = 0
        sizes[key] = sizes.get(key, 0) + count
        groups.setdefault((key, chunks.get(key, 0)), []).append(i)
    return list(groups.values())


def _through_stack(fun: Callable[..., Any], rows: list[Row], last: Row) -> list[Row]:
    """Results of `fun` on the stack of some rows' matrices, cut again.

    `fun` takes stacks (k, m, n), one for each array of a row, which are all of one shape, and the
    last arguments; it commutes with transposition.
    """

    def with_last(*matrices: jax.Array) -> jax.Array:
        return fun(*matrices, *last)

    def batched(*stacks: jax.Array) -> jax.Array:  # in the dtype that `map_in_place` has
        return with_last(*stacks).astype(stacks[0].dtype)

    tall = [row[0].shape[-2] > row[0].shape[-1] for row in rows]
    wide = [[x.mT if t else x for x in row] for row, t in zip(rows, tall, strict=True)]
    if len(rows) == 1 and math.prod(rows[0][0].shape[:-2]) == 1:
        results = [with_last(*wide[0])]
    else:
        matrices = [[jnp.reshape(x, (-1, *x.shape[-2:])) for x in row] for row in wide]
        stacks = [jnp.concatenate(column) for column in zip(*matrices, strict=True)]
        stacks = vary_as(stacks, stacks, last)
        mapped = functools.partial(map_in_place, with_last)
        stack = by_platform(dict.fromkeys(MAPPED_PLATFORMS, mapped), batched)(*stacks)
        parts = _split(stack, [len(row[0]) for row in matrices])
        results = [jnp.reshape(y, row[0].shape) for y, row in zip(parts, wide, strict=True)]
    return [
        ((result.mT if t else result).astype(row[0].dtype),)
        for result, row, t in zip(results, rows, tall, strict=True)
    ]


def _split(stack: jax.Array, sizes: list[int]) -> list[jax.Array]:
    """Cuts a stack into consecutive parts.

    XLA compiles equal kernels once, but a slice's offset is part of its kernel: on CPU 192 slices
    take 3.7 s to compile, 0.1 s if the offsets are data. A conditional with two equal branches
    keeps the compiler from seeing them as constants.
    """
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    if len(sizes) < 8:
        return [stack[start : start + n] for start, n in zip(starts, sizes, strict=True)]

    def offsets() -> list[jax.Array]:
        return [jnp.uint32(i) for i in (0, *starts)]

    # Elsewhere the condition is a constant, of which the compiler makes static slices.
    unknown = by_platform({"cpu": lambda entry: entry > 0}, lambda _: jnp.bool_(True))
    which = unknown(jnp.real(stack[0, 0, 0]))
    zero, *begins = jax.lax.cond(which, offsets, offsets)
    return [
        jax.lax.dynamic_slice(stack, (begin, zero, zero), (n, *stack.shape[1:]))
        for begin, n in zip(begins, sizes, strict=True)
    ]


def map_in_place(fun: Callable[..., jax.Array], stack: jax.Array, *rest: jax.Array) -> jax.Array:
    """`jax.lax.map` without a second stack: pages of fresh memory take time to get."""

    def replace(i: jax.Array, stack: jax.Array) -> jax.Array:
        matrices = [jax.lax.dynamic_index_in_dim(s, i, keepdims=False) for s in (stack, *rest)]
        result = fun(*matrices).astype(stack.dtype)
        return jax.lax.dynamic_update_index_in_dim(stack, result, i, 0)

    # An unsigned index needs no code for negative ones.
    return jax.lax.fori_loop(np.uint32(0), np.uint32(len(stack)), replace, stack)
