"""Leaves of a mesh that share a stack: what belongs to each, where it lies, who are the owners."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from orthax.base.exchange import Cuts, Route
from orthax.base.leaves import explicit_sharding, spec_of
from orthax.base.owners import axes_of_owners
from orthax.base.reading import AsItIs, Entries, Place, Reading


def free_axes(mesh: Any) -> tuple[str, ...]:
    """The axes of a mesh along which work can be divided: none inside a user's `jax.shard_map`."""
    if AxisType.Manual in mesh.axis_types:
        return ()
    axes = zip(mesh.axis_names, mesh.axis_sizes, strict=True)
    return tuple(name for name, size in axes if size > 1)


@dataclasses.dataclass(frozen=True)
class Leaves:
    """Leaves of a mesh that one transformation updates together.

    Attributes:
      mesh: Where all lie.
      gradients: In their own shape.
      readings: How each is read as matrices.
      entries: How each is cut, None where only the compiler knows. What is not so costs time, and
        changes no value.
      kept: What the state holds for each, beside what it opens to.
      params: In their own shape, or None for each.
    """

    mesh: Any
    gradients: Sequence[jax.Array]
    readings: Sequence[Reading]
    entries: Sequence[Entries] | None
    kept: Sequence[list[Any]]
    params: Sequence[jax.Array | None]

    @property
    def sizes(self) -> dict[str, int]:
        """Of the mesh axes along which work is divided."""
        return {a: dict(self.mesh.shape)[a] for a in free_axes(self.mesh)}

    def groups(self) -> list["Group"]:
        """Those that share a stack, together."""
        sizes = self.sizes
        rows = [*zip(self.gradients, self.kept, self.params, strict=True)]
        places = []
        for i, ((x, kept, param), reading) in enumerate(zip(rows, self.readings, strict=True)):
            cut = (None,) * x.ndim if self.entries is None else self.entries[i]
            cuts = cuts_of(cut, sizes)
            # What only the compiler has cut it opens on one device, where nothing is cut.
            opens = None if self.entries is None or reading.opened_cuts(cuts) is None else reading
            own = Place(cuts, reading.batch_axes, opens)
            spec = reading.opened_spec(cut)
            beside = [jax.tree.map(lambda x, s: _beside(x, s, sizes), part, spec) for part in kept]
            places.append((own, beside, None if param is None else own))
        return _groups(rows, places, self.readings, sizes)


def run_opened(
    run: Callable[..., Any], numbers: Any, readings: Sequence[Reading], stacks: Sequence[Any]
) -> list[tuple[Any, list[Any]]]:
    """`run` on a device's own stacks: of gradients and params, opened, and of what is kept of each.

    For each stack the update, closed, and what is then kept.
    """
    width = len(stacks[0][1])
    gradients = [r.opened(g) for r, (g, *_) in zip(readings, stacks, strict=True)]
    held = [[kept[c] for _, kept, _ in stacks] for c in range(width)]
    weights = None
    if stacks[0][2] is not None:
        weights = [r.opened(w) for r, (*_, w) in zip(readings, stacks, strict=True)]
    updates, held = run(numbers, gradients, held, weights)
    return [
        (reading.closed(update), [column[i] for column in held])
        for i, (reading, update) in enumerate(zip(readings, updates, strict=True))
    ]


@dataclasses.dataclass(frozen=True)
class Group:
    """Leaves that share a stack: of equal matrices, cut and read in the same way.

    Attributes:
      members: Their positions.
      rows: The gradient of each, what the state holds for it, and its params.
      places: For each those of its gradient, of what the state holds, and of its params.
      reading: Of the stack.
      shape: Of what the stack counts.
      matrices: How many that is, of those that the same devices have something of.
      axes: Mesh axes whose devices may share the matrices.
      sizes: Of mesh axes.
    """

    members: list[int]
    rows: list[Any]
    places: list[Any]
    reading: Reading
    shape: tuple[int, ...]
    matrices: int
    axes: tuple[str, ...]
    sizes: Mapping[str, int]

    def owners(self, inside: Sequence[str] = ()) -> tuple[str, ...]:
        """Mesh axes whose devices share the matrices, if some stay inside of these."""
        cutting = [a for cut in self.places[0][0].cuts for a in cut]
        copies = [a for a in self.axes if a not in cutting]
        moved = [a for a in cutting if a not in inside]
        chosen = axes_of_owners(self.matrices, moved, copies, self.sizes)
        return tuple(a for a in self.axes if a in chosen)

    @property
    def routes(self) -> Any:
        """How the stacks of gradient, state and params travel."""
        owners = self.owners()
        gradient, kept, param = self.places[0]
        routes = jax.tree.map(lambda place: Route(place.cuts, owners), (gradient, param))
        # What the state holds beside a matrix is a number for each row or column.
        small = jax.tree.map(lambda place: Route(place.cuts, owners, small=True), kept)
        return routes[0], small, routes[1]

    def stacks(self, rows: list[Any]) -> Any:
        """The stacks of gradient, state and params, of what a device has of the rows."""
        stacked = [
            jax.tree.map(lambda x, place: place.stacked(x), row, where)
            for row, where in zip(rows, self.places, strict=True)
        ]

        def joined(*xs: jax.Array) -> jax.Array:
            return xs[0] if len(xs) == 1 else jnp.concatenate(xs)

        return jax.tree.map(joined, *stacked)

    def counts(self, rows: list[Any]) -> list[int]:
        """The number of matrices of each row of which a device has something."""
        return [
            math.prod(place.apart(x.shape)[0])
            for (x, *_), (place, *_) in zip(rows, self.places, strict=True)
        ]

    def apart(self, stacks: Any, rows: list[Any]) -> list[Any]:
        """Undoes `stacks`, for gradient and state of each member."""
        counts = self.counts(rows)
        ends = itertools.accumulate(counts)
        found = []
        for row, where, count, end in zip(rows, self.places, counts, ends, strict=True):

            def part(x: Any, place: Place, stack: Any, start: int = end - count, end: int = end):
                return place.unstacked(stack[start:end], x.shape)

            found.append(jax.tree.map(part, row[:2], where[:2], stacks))
        return found


def _groups(
    rows: list[Any], places: list[Any], readings: Sequence[Reading], sizes: Mapping[str, int]
) -> list[Group]:
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
    for (*_, shape, reading, batch_cuts), members in found.items():
        counts = [math.prod(places[i][0].apart(rows[i][0].shape)[0]) for i in members]
        matrices = sum(counts) // math.prod(sizes[a] for a in batch_cuts)
        axes = tuple(a for a in sizes if a not in batch_cuts)
        where = [places[i] for i in members]
        own_rows = [rows[i] for i in members]
        groups.append(Group(members, own_rows, where, reading, shape, matrices, axes, sizes))
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
