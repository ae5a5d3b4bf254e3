"""Matrices of a mesh laid out anew, so that one of their axes is whole on each device.

What works along one axis, as a transform of each column does, needs no communication where that
axis is whole. Mesh axes that cut it cut the other one instead:

    gradients, cut along their rows     (m / 8, n) on each of 8 devices
    turned: whole columns               (m, n / 8)
    their coordinates, all that is used (r, n / 8)
    turned back: updates                (m / 8, n)

On Auto axes only the compiler knows how a leaf is cut. There all axes of the mesh cut the other
axis: leaves that lie so stay where they are, and the work on copies is divided.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from orthax.base.exchange import Turn, turn
from orthax.base.groups import free_axes
from orthax.base.leaves import explicit_sharding, on_auto_axes, spec_of
from orthax.base.placing import alike
from orthax.base.reading import Entries


@dataclasses.dataclass(frozen=True)
class Turned:
    """How an array on a mesh lies, and how it lies with one axis whole.

    Attributes:
      mesh: Where it lies.
      entries: How it is cut; None if only the compiler knows.
      laid: How it is cut with one axis whole.
      turn: From the first to the second.
    """

    mesh: Any
    entries: Entries | None
    laid: Entries
    turn: Turn

    @property
    def along(self) -> tuple[str, ...]:
        """Mesh axes that cut the other axis then."""
        return _names(self.laid[self.turn.split])

    def run(self, fun: Callable[..., Any], given: Any, results: Any) -> Callable[..., Any]:
        """`fun` on each device, of arrays that are cut as `given` and `results` say."""
        mesh = self.mesh
        return jax.shard_map(
            fun,
            mesh=mesh,
            in_specs=given,
            out_specs=results,
            check_vma=False,
        )


def turned(x: Any, axis: int) -> Turned | None:
    """How a matrix, or its `ShapeDtypeStruct`, lies with an axis whole; None on no mesh.

    None as well if the other axis cannot be cut in so many parts, and inside `jax.shard_map`: over
    which of a user's own axes values differ would be forgotten.
    """
    sharding = _sharding(x)
    if sharding is None or not free_axes(sharding.mesh):
        return None
    mesh, ndim = sharding.mesh.abstract_mesh, len(x.shape)
    if mesh.manual_axes:
        return None
    whole, other = axis % ndim, (-3 - axis) % ndim
    if AxisType.Explicit in mesh.axis_types:
        entries = spec_of(sharding, ndim)
        moved, laid = _names(entries[whole]), list(entries)
        cut = (*_names(entries[other]), *moved)
        if moved:
            laid[whole] = None
    else:
        moved = cut = free_axes(mesh)
        entries, laid = None, [None] * ndim
    laid[other] = _entry(cut)
    if x.shape[other] % math.prod(dict(mesh.shape)[a] for a in cut):
        return None
    return Turned(mesh, entries, tuple(laid), Turn(moved, joined=whole, split=other))


def lay(xs: Sequence[jax.Array], ways: Sequence[Turned | None]) -> list[jax.Array]:
    """Arrays with one axis whole; those without a way as they are."""
    return lay_back(xs, ways, [None] * len(xs))


def lay_back(
    xs: Sequence[jax.Array],
    ways: Sequence[Turned | None],
    likes: Sequence[jax.Array | None],
) -> list[jax.Array]:
    """Arrays that lie as others do, or where there is no other, with one axis whole."""
    found = list(xs)
    turns: dict[Any, list[tuple[int, Any, Any]]] = {}
    stacks: dict[Any, list[int]] = {}
    for i, (x, way, like) in enumerate(zip(xs, ways, likes, strict=True)):
        laid = None if way is None else _at(x, way.laid)
        if (known := explicit_sharding(x)) is not None:
            wanted = explicit_sharding(like) or laid
            if way is None or wanted == known:
                continue
            before, after = (spec_of(at, x.ndim) for at in (known, wanted) if at is not None)
            if {before, after} == {way.entries, way.laid}:
                turns.setdefault(way.mesh, []).append((i, before, after))
            else:  # it was put elsewhere
                found[i] = jax.sharding.reshard(x, wanted)
        elif like is None:
            put = jax.lax.with_sharding_constraint if isinstance(x, Tracer) else jax.device_put
            found[i] = x if laid is None else put(x, laid)
        elif way is not None and isinstance(x, Tracer):
            stacks.setdefault((way, x.shape, x.dtype), []).append(i)
        elif on_auto_axes(like):
            found[i] = alike(x, like)

    for mesh, moves in turns.items():
        these = [ways[i] for i, *_ in moves]
        moved = _turned([xs[i] for i, *_ in moves], these, moves, mesh)
        for (i, *_), x in zip(moves, moved, strict=True):
            found[i] = x
    for (way, *_), members in stacks.items():
        others: list[Any] = [likes[i] for i in members]
        together = _together([xs[i] for i in members], others, way)
        for i, x, like in zip(members, together, others, strict=True):
            found[i] = alike(x, like)
    return found


def _together(xs: list[jax.Array], likes: list[Any], way: Turned) -> list[jax.Array]:
    """Arrays that the compiler moves by one exchange from where their axis is whole to others."""
    stack = jnp.stack(xs)
    spec = PartitionSpec(None, *way.laid)
    stack = jax.lax.with_sharding_constraint(stack, NamedSharding(way.mesh, spec))
    # Open, so that the place before is not the place after; the stack of others says what is.
    spec = PartitionSpec(None, *(PartitionSpec.UNCONSTRAINED for _ in way.laid))
    stack = jax.lax.with_sharding_constraint(stack, NamedSharding(way.mesh, spec))
    return list(alike(stack, jnp.stack(likes)))


def _turned(xs: list[jax.Array], ways: list[Any], moves: list[Any], mesh: Any) -> list[jax.Array]:
    sizes = dict(mesh.shape)
    turns = [
        way.turn if before == way.entries else _reversed(way.turn)
        for way, (_, before, _) in zip(ways, moves, strict=True)
    ]
    specs = [[PartitionSpec(*move[k]) for move in moves] for k in (1, 2)]
    run = ways[0].run(lambda *xs: turn(xs, turns, sizes), tuple(specs[0]), specs[1])
    return run(*xs)


def _reversed(turn: Turn) -> Turn:
    return Turn(turn.axes, joined=turn.split, split=turn.joined)


def _entry(names: Any) -> Any:
    return names if len(names) > 1 else names[0] if names else None


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _at(x: jax.Array, entries: Entries) -> NamedSharding:
    """Where an array that lies on a mesh would be cut so."""
    sharding: Any = jax.typeof(x).sharding if isinstance(x, Tracer) else x.sharding
    return sharding.update(spec=PartitionSpec(*entries))


def _sharding(x: Any) -> NamedSharding | None:
    """Where an array lies, or what a `ShapeDtypeStruct` says."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None
