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
from orthax.base.groups import cuts_of, free_axes, prepared, run_opened
from orthax.base.leaves import explicit_sharding, spec_of
from orthax.base.reading import Entries, Place, Reading


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
    run: Callable[..., Any],
    numbers: Any,
    mesh: Any,
    leaves: Sequence[jax.Array],
    readings: Sequence[Reading],
    entries: Sequence[Entries],
    columns: Sequence[Sequence[Any]],
    params: Sequence[jax.Array] | None,
) -> tuple[list[jax.Array], list[list[Any]]]:
    """Updates of leaves of a mesh, each device on whole matrices of its own.

    Args:
      run: Function of numbers, lists of gradients, of what the state holds for them and of params
        to updates and what the state then holds, all for stacks of whole matrices.
      numbers: Arrays that are the same for all matrices.
      mesh: Where all leaves lie.
      leaves: Gradients, in their own shape.
      readings: How each is read as matrices.
      entries: How each is cut. What is not so costs time, and changes no value.
      columns: What the state holds for each leaf: beside what it opens to.
      params: In their own shape, if `run` needs them.

    Returns:
      Updates and columns, laid out as what came.
    """
    rows, places, groups, sizes = prepared(mesh, leaves, readings, entries, columns, params)
    routes = [group.routes for group in groups]

    def inside(numbers: Any, rows: list[Any]) -> list[Any]:
        """On one device, whose pieces of the leaves are the rows."""
        of = [[rows[i] for i in group.members] for group in groups]
        stacks = [group.stacks(members) for group, members in zip(groups, of, strict=True)]
        flat, structure = jax.tree.flatten(stacks)
        owned = structure.unflatten(bring(flat, jax.tree.leaves(routes), sizes))

        results = run_opened(run, numbers, [group.reading for group in groups], owned)
        flat, structure = jax.tree.flatten(results)
        back = [jax.tree.leaves(route[:2]) for route in routes]
        counts = [
            count
            for group, members, route in zip(groups, of, back, strict=True)
            for count in [group.count(members)] * len(route)
        ]
        stacks = structure.unflatten(
            send(flat, counts, [r for route in back for r in route], sizes)
        )
        found = list(rows)
        for group, members, stack in zip(groups, of, stacks, strict=True):
            for i, row in zip(group.members, group.rows(stack, members), strict=True):
                found[i] = row
        return found

    specs = jax.tree.map(lambda place: place.spec, places)
    everywhere = jax.shard_map(
        inside,
        mesh=mesh,
        in_specs=(PartitionSpec(), specs),
        out_specs=[row[:2] for row in specs],
        check_vma=False,
    )
    found = everywhere(numbers, rows)
    return [x for x, _ in found], [[kept[c] for _, kept in found] for c in range(len(columns))]


def on_pieces(
    run: Callable[..., Any],
    numbers: Any,
    mesh: Any,
    leaves: Sequence[jax.Array],
    readings: Sequence[Reading],
    entries: Sequence[Entries],
) -> tuple[list[jax.Array], list[list[Any]]]:
    """As `on_owners` without a state, but each device takes its piece of a matrix for one.

    Nothing is sent.
    """
    sizes = {a: dict(mesh.shape)[a] for a in free_axes(mesh)}
    places = [
        Place(cuts_of(cut, sizes), reading.batch_axes)
        for cut, reading in zip(entries, readings, strict=True)
    ]

    def inside(numbers: Any, leaves: list[jax.Array]) -> list[jax.Array]:
        readers = [
            reading.of_stack(place.apart(x.shape)[1])
            for x, place, reading in zip(leaves, places, readings, strict=True)
        ]
        stacks = [place.stacked(x) for x, place in zip(leaves, places, strict=True)]
        opened = [reader.opened(x) for reader, x in zip(readers, stacks, strict=True)]
        updates, _ = run(numbers, opened, [], None)
        closed = [reader.closed(y) for reader, y in zip(readers, updates, strict=True)]
        return [
            place.unstacked(y, x.shape) for y, x, place in zip(closed, leaves, places, strict=True)
        ]

    specs = [place.spec for place in places]
    everywhere = jax.shard_map(
        inside, mesh=mesh, in_specs=(PartitionSpec(), specs), out_specs=specs, check_vma=False
    )
    return everywhere(numbers, list(leaves)), []
