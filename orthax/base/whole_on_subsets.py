"""`whole_matrices` where there are fewer matrices than devices: several devices on each.

Mesh axes that cut the longer side may stay inside of the matrices (`owners.axes_inside`). Matrices
then travel along the other axes alone, and the compiler divides the work on each along those that
stay. What travels is in another order along the longer side, which commutes with every step: of
orthogonal factors, and of what is done entry by entry.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from orthax.base.exchange import Route, bring, send
from orthax.base.groups import Group, Leaves
from orthax.base.leaves import explicit_sharding
from orthax.base.owners import axes_inside
from orthax.base.placing import laid_out
from orthax.base.whole_matrices import on_owners


def on_owners_or_subsets(run: Callable[..., Any], numbers: Any, leaves: Leaves) -> list[Any]:
    """Updates of leaves and what is then kept of each.

    What has a state, or takes params, is moved whole.
    """
    groups = leaves.groups()
    stateless = all(not kept and param is None for _, kept, param in groups[0].rows)
    inside = [_inside(group) if stateless else () for group in groups]
    whole = [group for group, axes in zip(groups, inside, strict=True) if not axes]
    found = iter(on_owners(run, numbers, leaves.mesh, whole) if whole else ())
    results: list[Any] = [None] * len(leaves.gradients)
    for group, axes in zip(groups, inside, strict=True):
        rows = _together(run, numbers, leaves.mesh, group, axes) if axes else next(found)
        for i, row in zip(group.members, rows, strict=True):
            results[i] = row
    return results


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
) -> list[Any]:
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
        (pieces,) = send([stack], [sum(group.counts(rows))], [route], sizes)
        return [x for x, _ in group.apart((pieces, []), rows)]

    def everywhere(fun: Any, given: Any, results: Any) -> Any:
        return jax.shard_map(fun, mesh=mesh, in_specs=given, out_specs=results, check_vma=False)

    xs = [x for x, *_ in group.rows]
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
    return [(x, []) for x in everywhere(back, (stacked, specs), specs)(stack, xs)]
