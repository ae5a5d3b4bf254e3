"""`whole_matrices` where only the compiler knows how leaves are cut: Auto axes of a mesh.

Constraints say where stacks shall be, and the compiler finds the exchanges. A stack lies as its
leaves do; then one mesh axis after the other moves to the stack's first axes, each by one
all-to-all (asked for all at once, the compiler gathers), the transformation runs on each device's
own matrices, and all goes back in reverse. What lies there already, as experts may, stays. Layouts
pass from leaves to stacks only (`one_way`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from orthax.base.groups import Group, Leaves, free_axes, run_opened
from orthax.base.one_way import backward, forward
from orthax.base.reading import Place

OPEN = PartitionSpec.UNCONSTRAINED


def on_owners_by_constraints(run: Callable[..., Any], numbers: Any, leaves: Leaves) -> list[Any]:
    """Updates of leaves and what is then kept of each."""
    mesh, axes, groups = leaves.mesh, free_axes(leaves.mesh), leaves.groups()

    def stacked(group: Group) -> Any:
        parts = [
            jax.tree.map(lambda x, place: place.stacked(forward(x)), row, where)
            for row, where in zip(group.rows, group.places, strict=True)
        ]
        return jax.tree.map(lambda *xs: _to_owners(xs, mesh, axes), *parts)

    def inside(numbers: Any, stacks: list[Any]) -> list[Any]:
        """On one device, with matrices of its own."""
        stacks = jax.tree.map(lambda x: x.reshape(x.shape[len(axes) :]), stacks)
        results = run_opened(run, numbers, [group.reading for group in groups], stacks)
        return jax.tree.map(lambda x: x.reshape(*(1 for _ in axes), *x.shape), results)

    spec = PartitionSpec(*axes)
    found = jax.shard_map(
        inside, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec, check_vma=False
    )(numbers, [stacked(group) for group in groups])

    results: list[Any] = [None] * len(leaves.gradients)
    for group, stack in zip(groups, found, strict=True):
        stack = jax.tree.map(lambda x: _from_owners(x, mesh, axes), stack)
        counts = group.counts(group.rows)
        for at, i in enumerate(group.members):

            def part(x: Any, place: Place, stack: Any, counts: list[int] = counts, at: int = at):
                return backward(place.unstacked(_part(stack, counts, at, axes), x.shape))

            results[i] = jax.tree.map(part, group.rows[at][:2], group.places[at][:2], stack)
    return results


def _to_owners(parts: Sequence[jax.Array], mesh: Any, axes: tuple[str, ...]) -> jax.Array:
    """The stack of some parts, (*sizes of mesh axes, own, *rest), each device with its own."""
    counts = [dict(mesh.shape)[a] for a in axes]
    if any(x.shape[0] % math.prod(counts) for x in parts):
        stack = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
        missing = -stack.shape[0] % math.prod(counts)
        stack = jnp.pad(stack, [(0, missing)] + [(0, 0)] * (stack.ndim - 1))
        parts = [stack]
    # Each device has as many of each leaf: those of experts may be there already.
    parts = [x.reshape(*counts, -1, *x.shape[1:]) for x in parts]
    stack = jnp.concatenate(parts, axis=len(counts)) if len(parts) > 1 else parts[0]
    for moved in _stages(axes):
        stack = _laid(forward(stack), mesh, moved, OPEN)
    return _laid(forward(stack), mesh, axes, None)


def _from_owners(stack: jax.Array, mesh: Any, axes: tuple[str, ...]) -> jax.Array:
    stack = _laid(stack, mesh, axes, None)
    for moved in reversed(_stages(axes)):
        stack = _laid(backward(stack), mesh, moved, OPEN)
    return backward(stack)


def _part(stack: jax.Array, counts: Sequence[int], at: int, axes: tuple[str, ...]) -> jax.Array:
    """The matrices of one leaf, of leaves with so many, in what `_from_owners` returns."""
    sizes, rest = stack.shape[: len(axes)], stack.shape[len(axes) + 1 :]
    end = sum(counts[: at + 1])
    if any(count % math.prod(sizes) for count in counts):
        return stack.reshape(-1, *rest)[end - counts[at] : end]
    start, end = (n // math.prod(sizes) for n in (end - counts[at], end))
    return jax.lax.slice_in_dim(stack, start, end, axis=len(axes)).reshape(-1, *rest)


def _stages(axes: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """What lies along the stack's first axes, before the last one is moved.

    The minor one of two mesh axes that cut one axis moves first: then what stays lies in blocks.
    """
    return [(*(OPEN for _ in axes[:at]), *axes[at:]) for at in range(len(axes), 0, -1)]


def _laid(x: jax.Array, mesh: Any, moved: tuple[Any, ...], others: Any) -> jax.Array:
    spec = PartitionSpec(*moved, None, *(others for _ in x.shape[len(moved) + 1 :]))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
