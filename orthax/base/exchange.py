"""Cut matrices travel to the devices that own them, and back: the collectives of `whole_matrices`.

All functions run inside `jax.shard_map`, on what one device holds. A stack has its matrices along
the first axis; a device has a piece of each, because mesh axes cut the other axes, or a copy.
Owners are the devices along some mesh axes: each gets as many whole matrices as the others. Whole
stacks travel, so there is one exchange for a stack, however its matrices are cut.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

Cuts = tuple[tuple[str, ...], ...]
"""For each axis of a matrix the mesh axes that cut it, the major one first."""


def bring(
    pieces: jax.Array, cuts: Cuts, owners: Sequence[str], sizes: Mapping[str, int]
) -> jax.Array:
    """Whole matrices, those that this device owns, of a stack of which it has a piece of each.

    Args:
      pieces: Shape (k, *piece): the same k matrices on all devices.
      cuts: How mesh axes cut the other axes.
      owners: Mesh axes whose devices share the matrices; those that cut are among them.
      sizes: Of the mesh axes.

    Returns:
      Shape (k / number of owners, *matrix); zeros fill up what does not divide.
    """
    counts = [sizes[a] for a in owners]
    own = -(-pieces.shape[0] // math.prod(counts))
    missing = own * math.prod(counts) - pieces.shape[0]
    x = jnp.pad(pieces, [(0, missing)] + [(0, 0)] * (pieces.ndim - 1)) if missing else pieces
    x = x.reshape(*counts, own, *x.shape[1:])
    # Along axes of copies each device takes its own matrices: nothing travels.
    moved = _moved(cuts, owners)
    for position, axis in reversed(list(enumerate(owners))):
        if axis not in moved:
            here = jax.lax.axis_index(axis)
            x = jax.lax.dynamic_index_in_dim(x, here, position, keepdims=False)
    if moved:  # each device sends its pieces of other owners' matrices, and gets those of its own
        x = x.reshape(-1, *x.shape[len(moved) :])
        x = jax.lax.all_to_all(x, moved, 0, 0, tiled=True)
    # Pieces by the devices they came from, (*moved, own, *piece), next to the axes that they cut.
    x = x.reshape(*(sizes[a] for a in moved), own, *pieces.shape[1:])
    order = [len(moved)]
    for axis, cut in enumerate(cuts):
        order += [*map(moved.index, cut), len(moved) + 1 + axis]
    return x.transpose(order).reshape(own, *_whole(pieces.shape[1:], cuts, sizes))


def send(
    matrices: jax.Array, cuts: Cuts, owners: Sequence[str], sizes: Mapping[str, int], count: int
) -> jax.Array:
    """Undoes `bring`: a piece of each of `count` matrices, of which this device owns some."""
    moved = _moved(cuts, owners)
    own, *whole = matrices.shape
    split, place, inner = [own], {}, []
    for size, cut in zip(whole, cuts, strict=True):
        place |= {a: len(split) + i for i, a in enumerate(cut)}
        parts = [sizes[a] for a in cut]
        split += [*parts, size // math.prod(parts)]
        inner.append(len(split) - 1)
    x = matrices.reshape(split).transpose([*(place[a] for a in moved), 0, *inner])
    piece = x.shape[len(moved) + 1 :]
    if moved:
        x = x.reshape(-1, own, *piece)
        x = jax.lax.all_to_all(x, moved, 0, 0, tiled=True)
    copies = tuple(a for a in owners if a not in moved)
    if copies:
        x = jax.lax.all_gather(x, copies)
    # (*copies, *moved, own, *piece) in the order of the owners.
    x = x.reshape(*(sizes[a] for a in (*copies, *moved)), own, *piece)
    order = [(*copies, *moved).index(a) for a in owners]
    x = x.transpose(*order, *range(len(order), x.ndim))
    return x.reshape(-1, *piece)[:count]


def _moved(cuts: Cuts, owners: Sequence[str]) -> tuple[str, ...]:
    """The owners' axes that cut the matrices; along the others, devices hold copies."""
    cutting = {a for cut in cuts for a in cut}
    return tuple(a for a in owners if a in cutting)


def _whole(piece: Sequence[int], cuts: Cuts, sizes: Mapping[str, int]) -> list[int]:
    return [size * math.prod(sizes[a] for a in cut) for size, cut in zip(piece, cuts, strict=True)]
