"""Putting arrays where others lie: results, copies, the zeros that a state starts with."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.experimental.shard_alike import shard_alike
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from orthax.base.leaves import explicit_sharding, on_auto_axes, spec_of, vary_as

_groups = itertools.count()


def alike(tree: Any, like: Any) -> Any:
    """Arrays that the compiler lays out as others, on Auto axes, where it decides.

    What is None or masked in the first tree stays so.
    """

    def beside(x: Any, other: Any) -> Any:
        arrays = isinstance(x, jax.Array) and isinstance(other, jax.Array)
        if not arrays or x is other or x.shape != other.shape:
            return x
        if AxisType.Auto not in jax.typeof(other).sharding.mesh.axis_types:
            return x
        if not isinstance(x, Tracer) and not isinstance(other, Tracer):
            return jax.device_put(x, other.sharding)
        # JAX lowers equal calls once, and all pairs would be one group: each is marked as another.
        with set_xla_metadata(orthax_group=next(_groups)):
            return shard_alike(x, other)[0]

    # Inside a user's `jax.shard_map` over other axes the compiler would abort.
    if jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    absent = (type(None), optax.MaskedNode)
    return jax.tree.map(beside, tree, like, is_leaf=lambda x: isinstance(x, absent))


def all_alike(new: Any, old: Any) -> Any:
    """A state whose arrays lie as those of the state before; one of another structure as it is."""
    return alike(new, old) if jax.tree.structure(new) == jax.tree.structure(old) else new


def replicate_beside(x: jax.Array, like: object) -> jax.Array:
    """Returns `x` whole on every device of the mesh that `like` lies on, if it lies on one."""
    if isinstance(like, Tracer):
        sharding, put = explicit_sharding(like), jax.sharding.reshard
    else:
        sharding, put = getattr(like, "sharding", None), jax.device_put
    if not isinstance(sharding, NamedSharding):
        return x
    return put(x, sharding.update(spec=PartitionSpec()))


def laid_out(fun: Callable[..., Any], out_sharding: Any) -> Callable[..., Any]:
    """`fun` run on Explicit axes as if they were Auto, with its results laid out as told.

    `out_sharding` has the structure of the results; it is None if there are no Explicit axes.
    """
    if out_sharding is None:
        return fun
    mesh = jax.tree.leaves(out_sharding)[0].mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    # Not the Manual axes of a `jax.shard_map` around, which stay what they are.
    axes = tuple(name for name, kind in kinds if kind != AxisType.Manual)
    return jax.sharding.auto_axes(fun, axes=axes, out_sharding=out_sharding)


def cond(which: jax.Array, *branches: Callable[[], Any]) -> Any:
    """`jax.lax.cond` of two functions without arguments, whose results may vary over other axes."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return jax.lax.cond(which, *branches)
    results = [jax.eval_shape(branch) for branch in branches]

    def varied(branch: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: jax.tree.map(lambda x, *like: vary_as(x, like, which), branch(), *results)

    return jax.lax.cond(which, *map(varied, branches))


def zeros_beside(
    x: Any, shape: tuple[int, ...], axes: tuple[int | None, ...], dtype: Any
) -> jax.Array:
    """Zeros that lie along the axes of an array, or a `ShapeDtypeStruct`, as it does.

    `axes` has for each axis of the zeros that of `x` which it follows, or None where it is whole on
    each device. The values of `x` are not read: a state starts without work between devices.
    """
    traced = isinstance(x, Tracer)
    sharding = explicit_sharding(x) if traced else getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding):
        spec = spec_of(sharding, len(x.shape))
        return zeros_at(x, shape, [None if axis is None else spec[axis] for axis in axes], dtype)
    if traced:
        zeros = vary_as(jnp.zeros(shape, dtype), x)
        if not on_auto_axes(x) or len(shape) != x.ndim:
            return zeros
        # The compiler knows how what is cut out of the array lies.
        sizes = [min(pair) for pair in zip(shape, x.shape, strict=True)]
        part = jax.lax.slice(x, [0] * x.ndim, sizes)
        return alike(zeros, part) if part.shape == shape else zeros
    return jnp.zeros(shape, dtype, device=sharding if getattr(x, "committed", False) else None)


def zeros_at(x: Any, shape: tuple[int, ...], entries: Iterable[Any], dtype: Any) -> jax.Array:
    """Zeros on the mesh of an array, or a `ShapeDtypeStruct`, cut by these mesh axes."""
    if isinstance(x, Tracer):
        sharding = jax.typeof(x).sharding.update(spec=PartitionSpec(*entries))
        return vary_as(constrained(jnp.zeros(shape, dtype), sharding), x)
    return jnp.zeros(shape, dtype, device=x.sharding.update(spec=PartitionSpec(*entries)))


def constrained(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """An array that is traced, laid out anew."""
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    place = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
    return place(x, sharding)


def zeros_like(x: Any, dtype: Any = None) -> jax.Array:
    """Zeros in the place of an array, or where a `ShapeDtypeStruct` says; None: of its dtype."""
    return zeros_beside(x, x.shape, tuple(range(len(x.shape))), dtype or x.dtype)


def resized_zeros(x: Any, axis: int, size: int, dtype: Any) -> jax.Array:
    """Zeros beside x of another size along one axis, which is whole on each device."""
    shape, axes = list(x.shape), list(range(len(x.shape)))
    shape[axis] = size
    followed = tuple(None if a == axis % len(shape) else a for a in axes)
    return zeros_beside(x, tuple(shape), followed, dtype)
