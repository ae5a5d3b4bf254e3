"""`whole_matrices` where there are fewer matrices than devices: several devices on each.

Mesh axes that cut the longer side may stay inside of the matrices (`owners.axes_inside`). Matrices
then travel along the other axes alone, and the compiler divides the work on each along those that
stay. What travels is in another order along the longer side, which commutes with every step: of
orthogonal factors, and of what is done entry by entry.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from orthax.base.exchange import Route, bring, send
from orthax.base.groups import Group, prepared
from orthax.base.leaves import explicit_sharding
from orthax.base.owners import axes_inside
from orthax.base.placing import laid_out
from orthax.base.reading import Entries, Reading
from orthax.base.whole_matrices import on_owners


def on_owners_or_subsets(
    run: Callable[..., Any],
    numbers: Any,
    mesh: Any,
    leaves: Sequence[jax.Array],
    readings: Sequence[Reading],
    entries: Sequence[Entries],
    columns: Sequence[Sequence[Any]],
    params: Sequence[jax.Array] | None,
) -> tuple[list[jax.Array], list[list[Any]]]:
    """As `on_owners`; a transformation with a state, or with params, takes whole matrices."""
    _, _, groups, _ = prepared(mesh, leaves, readings, entries, columns, params)
    shared = []
    if not columns and params is None:
        found = [(group, _inside(group)) for group in groups]
        shared = [(group, inside) for group, inside in found if inside]
    apart = {i for group, _ in shared for i in group.members}
    whole = [i for i in range(len(leaves)) if i not in apart]
    results: list[Any] = [None] * len(leaves)
    after: list[list[Any]] = [[] for _ in columns]
    if whole:
        chosen: Any = ([of[i] for i in whole] for of in (leaves, readings, entries))
        found, after = on_owners(run, numbers, mesh, *chosen, columns=columns, params=params)
        for i, x in zip(whole, found, strict=True):
            results[i] = x
    for group, inside in shared:
        xs = [leaves[i] for i in group.members]
        found = _together(run, numbers, mesh, group, inside, xs)
        for i, x in zip(group.members, found, strict=True):
            results[i] = x
    return results, after


def _inside(group: Group) -> tuple[str, ...]:
    """Mesh axes that stay inside of the matrices of a group."""
    own = group.places[0][0]
    if own.opens is None:
        return ()
    m, n = group.shape
    return axes_inside(group.matrices, (m, n), own.cuts[int(n >= m)], group.axes, group.sizes)


def _together(
    run: Callable[..., Any],
    numbers: Any,
    mesh: Any,
    group: Group,
    inside: tuple[str, ...],
    xs: list[jax.Array],
) -> list[jax.Array]:
    """Updates of a group's leaves, the devices along some mesh axes on one matrix together."""
    places = [own for own, *_ in group.places]
    owners, sizes = group.owners(inside), group.sizes
    cuts = tuple(tuple(a for a in cut if a not in inside) for cut in places[0].cuts)
    route = Route(cuts, owners)
    apart = (*places[0].batch_cuts, *owners)
    stays = [tuple(a for a in cut if a in inside) or None for cut in places[0].cuts]
    stacked = PartitionSpec(apart or None, *stays)
    specs = [place.spec for place in places]

    def to_owners(xs: list[jax.Array]) -> jax.Array:
        stacks = [place.stacked(x) for place, x in zip(places, xs, strict=True)]
        return bring([jnp.concatenate(stacks)], [route], sizes)[0]

    def work(numbers: Any, stack: jax.Array) -> jax.Array:
        return run(numbers, [stack], [], None)[0][0]

    def back(stack: jax.Array, xs: list[jax.Array]) -> list[jax.Array]:
        rows = [(x, []) for x in xs]
        (pieces,) = send([stack], [group.count(rows)], [route], sizes)
        return [x for x, *_ in group.rows((pieces, []), rows)]

    def everywhere(fun: Any, given: Any, results: Any) -> Any:
        return jax.shard_map(fun, mesh=mesh, in_specs=given, out_specs=results, check_vma=False)

    stack = everywhere(to_owners, (specs,), stacked)(xs)
    # The axes that stay are the compiler's, on Explicit axes too.
    explicit = explicit_sharding(stack)
    if apart:
        along = PartitionSpec(apart)
        work = jax.shard_map(
            work,
            mesh=None if explicit else mesh,  # there it is the one of the context
            in_specs=(PartitionSpec(), along),
            out_specs=along,
            axis_names=frozenset(apart),
            check_vma=False,
        )
    stack = laid_out(work, explicit)(numbers, stack)
    return everywhere(back, (stacked, specs), specs)(stack, xs)
