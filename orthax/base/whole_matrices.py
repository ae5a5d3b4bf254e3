"""Transformations of matrices on a mesh: each device works on whole matrices of its own.

Matrices that mesh axes cut would be multiplied by the compiler with a collective at every product.
Here each stack of equal leaves travels once to the devices that own its matrices and once back
(`exchange`); in between the transformation runs as on one device, without communication:

    gradients, cut as they are       (layers, m / 4, n / 2) on each of 8 devices
    bring: whole matrices            (layers / 8, m, n)
    inner.update                     orthogonalised, neurons normalised, scaled
    send: back in their layout       (layers, m / 4, n / 2)

What the state holds of a leaf travels with it, and is kept beside the leaf: a checkpoint does not
know the mesh.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from orthax.base.exchange import bring, send
from orthax.base.given_shardings import mesh_of, spec_entries
from orthax.base.groups import Group, Leaves, cuts_of, free_axes, run_opened
from orthax.base.leaves import explicit_sharding, spec_of
from orthax.base.reading import Entries, Place


def one_mesh(leaves: Sequence[jax.Array], given: Sequence[Any]) -> Any:
    """The mesh on which all leaves lie, if they lie on one with work to divide.

    By their types, or by the shardings given for them.
    """
    meshes = {jax.typeof(x).sharding.mesh for x in leaves}
    if len(meshes) != 1 or any(x.size == 0 for x in leaves):
        return None
    (mesh,) = meshes
    mesh = mesh_of(given) if mesh.empty else mesh
    return mesh if mesh is not None and free_axes(mesh) else None


def entries_of(
    call: str, paths: Sequence[str], leaves: Sequence[jax.Array], given: Sequence[Any], mesh: Any
) -> list[Entries] | None:
    """How each leaf is cut, by its type, itself or what was given; None if one is unknown."""
    found = []
    for path, x, one in zip(paths, leaves, given, strict=True):
        sharding = explicit_sharding(x) or (None if isinstance(x, Tracer) else x.sharding)
        if isinstance(sharding, NamedSharding):
            found.append(spec_of(sharding, x.ndim))
        elif (entries := spec_entries(call, path, x.shape, one, mesh)) is not None:
            found.append(entries)
        else:
            return None
    return found


def on_owners(
    run: Callable[..., Any], numbers: Any, mesh: Any, groups: Sequence[Group]
) -> list[list[Any]]:
    """Updates of leaves of a mesh, each device on whole matrices of its own.

    Args:
      run: Function of numbers, lists of gradients, of what the state holds for them and of params
        to updates and what the state then holds, all for stacks of whole matrices.
      numbers: Arrays that are the same for all matrices.
      mesh: Where all leaves lie.
      groups: The leaves, and what belongs to them.

    Returns:
      For each group and member the update and what is then kept, laid out as what came.
    """
    sizes = groups[0].sizes
    routes = [group.routes for group in groups]

    def inside(numbers: Any, rows: list[Any]) -> list[Any]:
        """On one device, whose pieces of the leaves are the rows."""
        stacks = [group.stacks(of) for group, of in zip(groups, rows, strict=True)]
        flat, structure = jax.tree.flatten(stacks)
        owned = structure.unflatten(bring(flat, jax.tree.leaves(routes), sizes))

        results = run_opened(run, numbers, [group.reading for group in groups], owned)
        flat, structure = jax.tree.flatten(results)
        back = [jax.tree.leaves(route[:2]) for route in routes]
        counts = [
            count
            for group, of, route in zip(groups, rows, back, strict=True)
            for count in [sum(group.counts(of))] * len(route)
        ]
        back = [way for route in back for way in route]
        stacks = structure.unflatten(send(flat, counts, back, sizes))
        return [
            group.apart(stack, of) for group, stack, of in zip(groups, stacks, rows, strict=True)
        ]

    specs = [jax.tree.map(lambda place: place.spec, group.places) for group in groups]
    everywhere = jax.shard_map(
        inside,
        mesh=mesh,
        in_specs=(PartitionSpec(), specs),
        out_specs=[[row[:2] for row in of] for of in specs],
        check_vma=False,
    )
    return everywhere(numbers, [group.rows for group in groups])


def on_pieces(run: Callable[..., Any], numbers: Any, leaves: Leaves) -> list[Any]:
    """Updates where each device takes its piece of a matrix for one, and nothing is sent.

    For each leaf the update and nothing that is kept: the transformation has no state.
    """
    places = [
        Place(cuts_of(cut, leaves.sizes), reading.batch_axes)
        for cut, reading in zip(leaves.entries or (), leaves.readings, strict=True)
    ]

    def inside(numbers: Any, leaves_here: list[jax.Array]) -> list[jax.Array]:
        stacks, readers = [], []
        for x, place, reading in zip(leaves_here, places, leaves.readings, strict=True):
            readers.append(reading.of_stack(place.apart(x.shape)[1]))
            stacks.append((place.stacked(x), [], None))
        results = run_opened(run, numbers, readers, stacks)
        return [
            place.unstacked(y, x.shape)
            for (y, _), x, place in zip(results, leaves_here, places, strict=True)
        ]

    specs = [place.spec for place in places]
    everywhere = jax.shard_map(
        inside,
        mesh=leaves.mesh,
        in_specs=(PartitionSpec(), specs),
        out_specs=specs,
        check_vma=False,
    )
    return [(x, []) for x in everywhere(numbers, list(leaves.gradients))]
