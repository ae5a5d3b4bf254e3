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
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from orthax.base.exchange import Cuts, bring, send
from orthax.base.leaves import explicit_sharding, spec_of

Entries = tuple[Any, ...]
"""Of a `PartitionSpec`: for each axis of an array None, a mesh axis, or a tuple of such."""


class Reading(Protocol):
    """How a leaf is read as matrices: the views of `orthax.matrices`, or `AsItIs`."""

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """Axes that count matrices."""
        ...

    def of_stack(self, rest: tuple[int, ...]) -> "Reading":
        """The reading of a stack (k, *rest), whose axes but the first are those of one matrix."""
        ...

    def opened(self, x: jax.Array) -> Any:
        """The leaf as matrices (*batch, m, n), or a tuple of such."""
        ...

    def closed(self, y: Any) -> jax.Array:
        """Undoes `opened`."""
        ...

    def opened_spec(self, entries: Entries) -> Any:
        """A `PartitionSpec` for each array that the leaf opens to."""
        ...


@dataclasses.dataclass(frozen=True)
class AsItIs:
    """The reading of a leaf whose last two axes are the matrix."""

    batch_axes: tuple[int, ...]

    def of_stack(self, rest: tuple[int, ...]) -> "AsItIs":  # noqa: ARG002 as in the protocol
        """The same for a stack."""
        return AsItIs((0,))

    def opened(self, x: jax.Array) -> jax.Array:
        """The leaf."""
        return x

    def closed(self, y: jax.Array) -> jax.Array:
        """The leaf."""
        return y

    def opened_spec(self, entries: Entries) -> PartitionSpec:
        """Its own."""
        return PartitionSpec(*entries)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one array lies: the mesh axes that cut each of its axes, the major one first."""

    entries: Cuts
    batch_axes: tuple[int, ...]

    @property
    def spec(self) -> PartitionSpec:
        """As `jax.shard_map` takes it."""
        return PartitionSpec(*(entry or None for entry in self.entries))

    @property
    def cuts(self) -> Cuts:
        """Of the axes of one matrix."""
        return tuple(e for a, e in enumerate(self.entries) if a not in self.batch_axes)

    @property
    def batch_cuts(self) -> tuple[str, ...]:
        """Mesh axes whose devices have different matrices already."""
        return tuple(name for a in self.batch_axes for name in self.entries[a])

    def stacked(self, x: jax.Array) -> jax.Array:
        """What one device has of the array, with one batch axis in front."""
        front = range(len(self.batch_axes))
        x = jnp.moveaxis(x, self.batch_axes, front)
        return x.reshape(-1, *x.shape[len(front) :])

    def unstacked(self, y: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Undoes `stacked`, for an array of this shape on one device."""
        batch = self.batch(shape)
        return jnp.moveaxis(y.reshape(*batch, *y.shape[1:]), range(len(batch)), self.batch_axes)

    def batch(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(shape[a] for a in self.batch_axes)


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
        own = layout_of(cut, reading.batch_axes, sizes)
        kept = [column[i] for column in columns]
        spec = reading.opened_spec(cut)
        beside = [jax.tree.map(lambda x, s: _kept_layout(x, s, sizes), part, spec) for part in kept]
        rows.append((x, kept, None if params is None else params[i]))
        places.append((own, beside, None if params is None else own))
    groups = _groups(rows, places, readings, sizes)

    def inside(numbers: tuple[Any, ...], rows: list[Any]) -> list[Any]:
        """On one device, whose pieces of the leaves are the rows."""
        owned = [group.bring(rows) for group in groups]
        gradients, kept, weights = zip(*owned, strict=True)
        held = [[part[c] for part in kept] for c in range(len(columns))]
        weights = None if params is None else list(weights)
        updates, held = run(numbers, list(gradients), held, weights)
        after = zip(*held, strict=True) if columns else ((),) * len(groups)
        results = list(rows)
        for group, update, part in zip(groups, updates, after, strict=True):
            for i, row in zip(group.members, group.send(update, list(part), rows), strict=True):
                results[i] = row
        return results

    specs = jax.tree.map(lambda place: place.spec, places)
    everywhere = jax.shard_map(
        inside,
        mesh=mesh,
        in_specs=(PartitionSpec(), specs),
        out_specs=[row[:2] for row in specs],
        axis_names=frozenset(name for name in mesh.axis_names if name not in mesh.manual_axes),
        check_vma=False,
    )
    found = everywhere(numbers, rows)
    return [x for x, _ in found], [[kept[c] for _, kept in found] for c in range(len(columns))]


@dataclasses.dataclass(frozen=True)
class _Group:
    """Leaves that share a stack: of equal matrices, cut and read in the same way.

    Attributes:
      members: Their positions.
      places: For each the layouts of its gradient, of what the state holds, and of its params.
      reading: Of the stack.
      owners: Mesh axes whose devices share the matrices.
      sizes: Of mesh axes.
    """

    members: list[int]
    places: list[Any]
    reading: Reading
    owners: tuple[str, ...]
    sizes: Mapping[str, int]

    def bring(self, rows: list[Any]) -> tuple[Any, list[Any], Any]:
        """Of what a device has of each leaf: its own whole matrices, opened."""
        stacks = [
            jax.tree.map(lambda x, place: place.stacked(x), rows[i], where)
            for i, where in zip(self.members, self.places, strict=True)
        ]

        def whole(place: Layout, *pieces: jax.Array) -> jax.Array:
            stack = jnp.concatenate(pieces) if len(pieces) > 1 else pieces[0]
            return bring(stack, place.cuts, self.owners, self.sizes)

        gradient, kept, param = jax.tree.map(whole, self.places[0], *stacks)
        param = None if param is None else self.reading.opened(param)
        return self.reading.opened(gradient), kept, param

    def send(self, update: Any, kept: list[Any], rows: list[Any]) -> list[Any]:
        """Of a device's own matrices: its part of each leaf's update and state."""
        shapes = [rows[i][0].shape for i in self.members]
        counts = [
            math.prod(place.batch(x)) for x, (place, *_) in zip(shapes, self.places, strict=True)
        ]
        ends = list(itertools.accumulate(counts))

        def pieces(place: Layout, matrices: jax.Array) -> jax.Array:
            return send(matrices, place.cuts, self.owners, self.sizes, ends[-1])

        whole = (self.reading.closed(update), kept)
        stacks = jax.tree.map(pieces, self.places[0][:2], whole)

        def part(i: int, start: int, end: int, where: Any) -> Any:
            cut = jax.tree.map(lambda stack: stack[start:end], stacks)
            return jax.tree.map(
                lambda x, place, y: place.unstacked(y, x.shape), rows[i][:2], where[:2], cut
            )

        starts = [0, *ends[:-1]]
        return list(map(part, self.members, starts, ends, self.places))


def _groups(
    rows: list[Any], places: list[Any], readings: Sequence[Reading], sizes: Mapping[str, int]
) -> list[_Group]:
    found: dict[Any, list[int]] = {}
    for i, (row, where) in enumerate(zip(rows, places, strict=True)):
        arrays, structure = jax.tree.flatten(row)
        cuts = tuple(place.cuts for place in jax.tree.leaves(where))
        dtypes = tuple(x.dtype for x in arrays)
        key = (structure, dtypes, cuts, _of_stack(row[0], readings[i]), where[0].batch_cuts)
        found.setdefault(key, []).append(i)
    groups = []
    for (*_, reading, batch_cuts), members in found.items():
        owners = tuple(a for a in sizes if a not in batch_cuts)
        groups.append(_Group(members, [places[i] for i in members], reading, owners, sizes))
    return groups


def _of_stack(x: jax.Array, reading: Reading) -> Reading:
    rest = tuple(n for a, n in enumerate(x.shape) if a not in reading.batch_axes)
    return reading.of_stack(rest)


def layout_of(entries: Entries, batch_axes: tuple[int, ...], sizes: Mapping[str, int]) -> Layout:
    """The layout of an array with these entries in its spec; axes of no size here cut nothing."""
    names = (() if e is None else e if isinstance(e, tuple) else (e,) for e in entries)
    return Layout(tuple(tuple(n for n in entry if n in sizes) for entry in names), batch_axes)


def _kept_layout(x: jax.Array, spec: PartitionSpec, sizes: Mapping[str, int]) -> Layout:
    """Of an array that the state holds: its own, or that of the matrices where it is as long."""
    known = explicit_sharding(x)
    spec = spec_of(known, x.ndim) if known else tuple(spec)
    cut = tuple(None if size == 1 else e for size, e in zip(x.shape, spec, strict=True))
    return layout_of(cut, tuple(range(x.ndim - 2)), sizes)
