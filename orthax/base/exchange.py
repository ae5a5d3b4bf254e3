"""Cut matrices travel between devices: the collectives of `whole_matrices` and `turned`.

All functions run inside `jax.shard_map`, on what one device holds. Of a stack of matrices, its
first axis counting them, a device has a piece of each, where mesh axes cut the other axes, or a
copy. Owners are the devices along some mesh axes: each gets as many whole matrices as the others.
`turn` leaves every device a piece of each matrix, cut along another axis.
Stacks whose pieces are of one size travel together, however they are cut, so there are as many
exchanges as sizes of matrices.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

Cuts = tuple[tuple[str, ...], ...]
"""For each axis of a matrix the mesh axes that cut it, the major one first."""


@dataclasses.dataclass(frozen=True)
class Route:
    """How one stack travels.

    Attributes:
      cuts: How mesh axes cut the axes of its matrices.
      owners: Mesh axes whose devices share the matrices; those that cut are among them.
      small: Whether it is so small that, back where it is cut along some axes and copied along
        others, one exchange of more bytes is better than two.
    """

    cuts: Cuts
    owners: tuple[str, ...]
    small: bool = False

    @property
    def moved(self) -> tuple[str, ...]:
        """The owners' axes along which pieces travel."""
        cutting = {a for cut in self.cuts for a in cut}
        return tuple(a for a in self.owners if a in cutting)

    @property
    def copies(self) -> tuple[str, ...]:
        """The owners' axes along which every device holds the same."""
        return tuple(a for a in self.owners if a not in self.moved)


@dataclasses.dataclass(frozen=True)
class Turn:
    """How the cut of one array turns from an axis, which is whole then, to another.

    Attributes:
      axes: Mesh axes that cut the first of the two.
      joined: The axis that becomes whole.
      split: The axis that they cut then, inside what cuts it already.
    """

    axes: tuple[str, ...]
    joined: int
    split: int


def turn(
    xs: Sequence[jax.Array], turns: Sequence[Turn], sizes: Mapping[str, int]
) -> list[jax.Array]:
    """Pieces of arrays that are cut along other axes, of this device's pieces of them."""
    apart, pieces = [], []
    for x, t in zip(xs, turns, strict=True):
        parts = math.prod(sizes[a] for a in t.axes)
        x = x.reshape(*x.shape[: t.split], parts, -1, *x.shape[t.split + 1 :])
        x = jnp.moveaxis(x, t.split, 0)
        pieces.append(x.shape)
        apart.append(x[:, None])
    arrived = _exchanged(apart, [t.axes for t in turns])
    found = []
    for x, t, piece in zip(arrived, turns, pieces, strict=True):
        x = jnp.moveaxis(x.reshape(piece), 0, t.joined)
        found.append(x.reshape(*x.shape[: t.joined], -1, *x.shape[t.joined + 2 :]))
    return found


def bring(
    stacks: Sequence[jax.Array], routes: Sequence[Route], sizes: Mapping[str, int]
) -> list[jax.Array]:
    """Whole matrices, those that this device owns, of stacks of which it has a piece of each.

    Args:
      stacks: Each of shape (k, *piece): the same k matrices on all devices.
      routes: How each travels.
      sizes: Of the mesh axes.

    Returns:
      Each of shape (k / number of owners, *matrix); zeros fill up what does not divide.
    """
    chosen = [_by_owner(x, route, sizes) for x, route in zip(stacks, routes, strict=True)]
    arrived = _exchanged(chosen, [route.moved for route in routes])
    return [
        _joined(x, pieces.shape[1:], route, sizes)
        for x, pieces, route in zip(arrived, stacks, routes, strict=True)
    ]


def send(
    matrices: Sequence[jax.Array],
    counts: Sequence[int],
    routes: Sequence[Route],
    sizes: Mapping[str, int],
) -> list[jax.Array]:
    """Undoes `bring`: a piece of each of the `counts` matrices, of which this device owns some."""
    # Small ones go whole to everyone, and each device cuts its piece itself.
    everywhere = [Route(((),) * len(r.cuts), r.owners) if r.small else r for r in routes]
    whole = _sent(matrices, counts, everywhere, sizes)
    return [_piece(x, r, sizes) if r.small else x for x, r in zip(whole, routes, strict=True)]


def _piece(x: jax.Array, route: Route, sizes: Mapping[str, int]) -> jax.Array:
    """This device's piece of matrices (k, *matrix)."""
    for axis, cut in enumerate(route.cuts, 1):
        parts = math.prod(sizes[a] for a in cut)
        if parts > 1:
            size = x.shape[axis] // parts
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(cut) * size, size, axis)
    return x


def _sent(
    matrices: Sequence[jax.Array],
    counts: Sequence[int],
    routes: Sequence[Route],
    sizes: Mapping[str, int],
) -> list[jax.Array]:
    apart = [_split(x, route, sizes) for x, route in zip(matrices, routes, strict=True)]
    arrived = _exchanged([x for x, _ in apart], [route.moved for route in routes])
    gathered = _gathered(arrived, routes)
    found = []
    for x, (_, piece), count, route in zip(gathered, apart, counts, routes, strict=True):
        # (*copies, *moved, own, *piece) in the order of the owners.
        here = (*route.copies, *route.moved)
        x = x.reshape(*(sizes[a] for a in here), *x.shape[1:])
        x = x.transpose(*map(here.index, route.owners), *range(len(here), x.ndim))
        found.append(x.reshape(-1, *piece)[:count])
    return found


def _by_owner(x: jax.Array, route: Route, sizes: Mapping[str, int]) -> jax.Array:
    """(k, *piece) to (devices along the moved axes, own, *piece)."""
    counts = [sizes[a] for a in route.owners]
    own = -(-x.shape[0] // math.prod(counts))
    missing = own * math.prod(counts) - x.shape[0]
    piece = x.shape[1:]
    x = jnp.pad(x, [(0, missing)] + [(0, 0)] * len(piece)) if missing else x
    x = x.reshape(*counts, own, *piece)
    # Along axes of copies each device takes its own matrices: nothing travels.
    for position, axis in reversed(list(enumerate(route.owners))):
        if axis in route.copies:
            here = jax.lax.axis_index(axis)
            x = jax.lax.dynamic_index_in_dim(x, here, position, keepdims=False)
    return x.reshape(-1, own, *piece)


def _exchanged(xs: Sequence[jax.Array], axes: Sequence[tuple[str, ...]]) -> list[jax.Array]:
    """Part i of each (devices, own, *piece) to device i, for one from each in its place."""
    found = list(xs)
    for moved, together in _alike(xs, axes):
        stack = _side_by_side([xs[i] for i in together])
        stack = jax.lax.all_to_all(stack, moved, 0, 0, tiled=True)
        for i, x in zip(together, _apart(stack, [xs[i] for i in together]), strict=True):
            found[i] = x
    return found


def _gathered(xs: Sequence[jax.Array], routes: Sequence[Route]) -> list[jax.Array]:
    """The same of all devices along axes of copies: (copies * devices, own, *piece)."""
    found = list(xs)
    for copies, together in _alike(xs, [route.copies for route in routes]):
        stack = _side_by_side([xs[i] for i in together])
        stack = jax.lax.all_gather(stack, copies, tiled=True)
        for i, x in zip(together, _apart(stack, [xs[i] for i in together]), strict=True):
            found[i] = x
    return found


def _alike(
    xs: Sequence[jax.Array], axes: Sequence[tuple[str, ...]]
) -> list[tuple[tuple[str, ...], list[int]]]:
    """Positions of arrays with one dtype and one size of pieces that go along the same axes."""
    groups: dict[tuple[tuple[str, ...], int, jnp.dtype, int], list[int]] = {}
    for i, (x, along) in enumerate(zip(xs, axes, strict=True)):
        if along:
            entries = math.prod(x.shape[2:])
            groups.setdefault((along, x.shape[0], x.dtype, entries), []).append(i)
    return [(along, members) for (along, *_), members in groups.items()]


def _side_by_side(xs: Sequence[jax.Array]) -> jax.Array:
    if len(xs) == 1:
        return xs[0]
    # In one row if they must be: on TPUs rows lie in tiles, and unrolling them copies.
    if len({x.shape[2:] for x in xs}) > 1:
        xs = [x.reshape(*x.shape[:2], -1) for x in xs]
    return jnp.concatenate(xs, axis=1)


def _apart(stack: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    ends = [sum(x.shape[1] for x in like[: i + 1]) for i in range(len(like))]
    return [
        stack[:, end - x.shape[1] : end].reshape(-1, *x.shape[1:])
        for x, end in zip(like, ends, strict=True)
    ]


def _joined(
    x: jax.Array, piece: Sequence[int], route: Route, sizes: Mapping[str, int]
) -> jax.Array:
    """Pieces by the devices they came from, (devices, own, *piece), to (own, *matrix)."""
    moved, own = route.moved, x.shape[1]
    x = x.reshape(*(sizes[a] for a in moved), own, *piece)
    order = [len(moved)]  # each device's number next to the axis that it cuts
    for axis, cut in enumerate(route.cuts):
        order += [*map(moved.index, cut), len(moved) + 1 + axis]
    whole = [n * math.prod(sizes[a] for a in c) for n, c in zip(piece, route.cuts, strict=True)]
    return x.transpose(order).reshape(own, *whole)


def _split(
    x: jax.Array, route: Route, sizes: Mapping[str, int]
) -> tuple[jax.Array, tuple[int, ...]]:
    """Undoes `_joined`; the shape of a piece as well."""
    split, place, inner = [x.shape[0]], {}, []
    for size, cut in zip(x.shape[1:], route.cuts, strict=True):
        place |= {a: len(split) + i for i, a in enumerate(cut)}
        parts = [sizes[a] for a in cut]
        split += [*parts, size // math.prod(parts)]
        inner.append(len(split) - 1)
    piece = tuple(split[a] for a in inner)
    x = x.reshape(split).transpose([*(place[a] for a in route.moved), 0, *inner])
    return x.reshape(-1, *x.shape[len(route.moved) :]), piece
