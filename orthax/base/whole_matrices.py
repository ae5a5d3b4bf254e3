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

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from orthax.base.exchange import Cuts, Route, bring, send
from orthax.base.leaves import explicit_sharding, spec_of, vary_as
from orthax.base.reading import AsItIs, Entries, Place, Reading


def free_axes(mesh: Any) -> tuple[str, ...]:
    """The axes of a mesh along which work can be divided: not of one device, nor a user's own."""
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return tuple(name for name, size, kind in axes if size > 1 and kind != AxisType.Manual)


def one_mesh(leaves: Sequence[jax.Array]) -> Any:
    """The mesh on which all leaves lie, if they lie on one with work to divide."""
    meshes = {jax.typeof(x).sharding.mesh for x in leaves}
    if len(meshes) != 1 or any(x.size == 0 for x in leaves):
        return None
    (mesh,) = meshes
    return mesh if free_axes(mesh) else None


def entries_of(leaves: Sequence[jax.Array], shardings: Sequence[Any] | None) -> Any:
    """How each leaf is cut, by its type, by itself, or by what a user says; None if unknown."""
    if shardings is not None:
        return [spec_of(sharding, x.ndim) for x, sharding in zip(leaves, shardings, strict=True)]
    found = []
    for x in leaves:
        sharding = explicit_sharding(x) or (None if isinstance(x, Tracer) else x.sharding)
        if not isinstance(sharding, NamedSharding):
            return None
        found.append(spec_of(sharding, x.ndim))
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
    sizes = {a: dict(mesh.shape)[a] for a in free_axes(mesh)}
    rows, places = [], []
    for i, (x, reading, cut) in enumerate(zip(leaves, readings, entries, strict=True)):
        cuts = cuts_of(cut, sizes)
        opens = None if reading.opened_cuts(cuts) is None else reading
        own = Place(cuts, reading.batch_axes, opens)
        kept = [column[i] for column in columns]
        spec = reading.opened_spec(cut)
        beside = [jax.tree.map(lambda x, s: _beside(x, s, sizes), part, spec) for part in kept]
        rows.append((x, kept, None if params is None else params[i]))
        places.append((own, beside, None if params is None else own))
    groups = _groups(rows, places, readings, sizes)
    routes = [group.routes for group in groups]

    def inside(numbers: Any, rows: list[Any]) -> list[Any]:
        """On one device, whose pieces of the leaves are the rows."""
        flat, structure = jax.tree.flatten([group.stacks(rows) for group in groups])
        owned = structure.unflatten(bring(flat, jax.tree.leaves(routes), sizes))

        gradients = [group.reading.opened(g) for group, (g, *_) in zip(groups, owned, strict=True)]
        held = [[kept[c] for _, kept, _ in owned] for c in range(len(columns))]
        weights = None
        if params is not None:
            weights = [
                group.reading.opened(w) for group, (*_, w) in zip(groups, owned, strict=True)
            ]
        updates, held = run(numbers, gradients, held, weights)

        results = [
            (group.reading.closed(update), [column[i] for column in held])
            for i, (group, update) in enumerate(zip(groups, updates, strict=True))
        ]
        flat, structure = jax.tree.flatten(results)
        back = [jax.tree.leaves(route[:2]) for route in routes]
        counts = [n for g, r in zip(groups, back, strict=True) for n in [g.count(rows)] * len(r)]
        stacks = structure.unflatten(send(flat, counts, [r for of in back for r in of], sizes))
        found = list(rows)
        for group, stack in zip(groups, stacks, strict=True):
            for i, row in zip(group.members, group.rows(stack, rows), strict=True):
                found[i] = row
        return found

    specs = jax.tree.map(lambda place: place.spec, places)
    everywhere = jax.shard_map(
        inside,
        mesh=mesh,
        in_specs=(PartitionSpec(), specs),
        out_specs=[row[:2] for row in specs],
        axis_names=frozenset(name for name in mesh.axis_names if name not in mesh.manual_axes),
        check_vma=False,
    )
    # Without its check `jax.shard_map` forgets over which axes of a user's own results differ.
    found = [
        vary_as(x, row, numbers) for x, row in zip(everywhere(numbers, rows), rows, strict=True)
    ]
    return [x for x, _ in found], [[kept[c] for _, kept in found] for c in range(len(columns))]


@dataclasses.dataclass(frozen=True)
class _Group:
    """Leaves that share a stack: of equal matrices, cut and read in the same way.

    Attributes:
      members: Their positions.
      places: For each those of its gradient, of what the state holds, and of its params.
      reading: Of the stack.
      owners: Mesh axes whose devices share the matrices.
    """

    members: list[int]
    places: list[Any]
    reading: Reading
    owners: tuple[str, ...]

    @property
    def routes(self) -> Any:
        """How the stacks of gradient, state and params travel."""
        gradient, kept, param = self.places[0]
        large = lambda place: Route(place.cuts, self.owners)  # noqa: E731
        # What the state holds beside a matrix is a number for each row or column.
        small = jax.tree.map(lambda place: Route(place.cuts, self.owners, small=True), kept)
        return large(gradient), small, None if param is None else large(param)

    def stacks(self, rows: list[Any]) -> Any:
        """What a device has of gradient, state and params of all members."""
        stacked = [
            jax.tree.map(lambda x, place: place.stacked(x), rows[i], where)
            for i, where in zip(self.members, self.places, strict=True)
        ]
        return jax.tree.map(lambda x, *xs: jnp.concatenate([x, *xs]) if xs else x, *stacked)

    def count(self, rows: list[Any]) -> int:
        """The number of matrices of which a device has something."""
        return sum(self._counts(rows))

    def rows(self, stacks: Any, rows: list[Any]) -> list[Any]:
        """Undoes `stacks`, for gradient and state of each member."""
        counts = self._counts(rows)
        ends = itertools.accumulate(counts)
        found = []
        for i, where, count, end in zip(self.members, self.places, counts, ends, strict=True):

            def part(x: Any, place: Place, stack: Any, start: int = end - count, end: int = end):
                return place.unstacked(stack[start:end], x.shape)

            found.append(jax.tree.map(part, rows[i][:2], where[:2], stacks))
        return found

    def _counts(self, rows: list[Any]) -> list[int]:
        shapes = [rows[i][0].shape for i in self.members]
        return [
            math.prod(place.apart(shape)[0])
            for shape, (place, *_) in zip(shapes, self.places, strict=True)
        ]


def _groups(
    rows: list[Any], places: list[Any], readings: Sequence[Reading], sizes: Mapping[str, int]
) -> list[_Group]:
    found: dict[Any, list[int]] = {}
    for i, (row, where) in enumerate(zip(rows, places, strict=True)):
        arrays, structure = jax.tree.flatten(row)
        own: Place = where[0]
        _, rest = own.apart(row[0].shape)
        reading = readings[i].of_stack(rest)
        if own.opens is not None:
            matrix = jax.eval_shape(
                reading.opened, jax.ShapeDtypeStruct((1, *rest), arrays[0].dtype)
            )
            rest, reading = matrix.shape[1:], AsItIs((0,))
        cuts = tuple(place.cuts for place in jax.tree.leaves(where))
        dtypes = tuple(x.dtype for x in arrays)
        key = (structure, dtypes, cuts, rest, reading, own.batch_cuts)
        found.setdefault(key, []).append(i)
    groups = []
    for (*_, reading, batch_cuts), members in found.items():
        owners = tuple(a for a in sizes if a not in batch_cuts)
        groups.append(_Group(members, [places[i] for i in members], reading, owners))
    return groups


def cuts_of(entries: Entries, sizes: Mapping[str, int]) -> Cuts:
    """For each axis the mesh axes that cut it, of those with a size here."""
    names = (() if e is None else e if isinstance(e, tuple) else (e,) for e in entries)
    return tuple(tuple(name for name in entry if name in sizes) for entry in names)


def _beside(x: jax.Array, spec: PartitionSpec, sizes: Mapping[str, int]) -> Place:
    """Of an array that the state holds: its own, or that of the matrices where it is as long."""
    known = explicit_sharding(x)
    entries = spec_of(known, x.ndim) if known else tuple(spec)
    cut = tuple(None if size == 1 else e for size, e in zip(x.shape, entries, strict=True))
    return Place(cuts_of(cut, sizes), tuple(range(x.ndim - 2)))
