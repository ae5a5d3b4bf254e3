"""Running a function on arrays whose mesh axes are Explicit as if they were Auto.

On Explicit axes JAX refuses products over sharded axes and some reshapes, because the sharding of
their result is ambiguous. The functions here let the compiler choose inside and fix it at the exit.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def explicit_sharding(x: Any) -> NamedSharding | None:
    """Returns the sharding in the type of `x` if it lies on Explicit mesh axes, else None."""
    if x is None or isinstance(x, jax.ShapeDtypeStruct):
        return None
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return sharding


def on_auto_axes(x: Any) -> bool:
    """Whether `x` lies on Auto mesh axes, so that only the compiler knows how it is sharded."""
    mesh = jax.typeof(x).sharding.mesh
    return any(
        kind == AxisType.Auto and size > 1
        for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    )


def replicate_beside(x: jax.Array, like: Any) -> jax.Array:
    """Returns `x` whole on every device of the mesh that `like` lies on, if it lies on one."""
    if isinstance(like, Tracer):
        sharding, put = explicit_sharding(like), jax.sharding.reshard
    else:
        sharding, put = getattr(like, "sharding", None), jax.device_put
    if not isinstance(sharding, NamedSharding):
        return x
    return put(x, sharding.update(spec=PartitionSpec()))


def run_in_auto_mode(fun: Callable[..., Any], out_sharding: Any) -> Callable[..., Any]:
    """Returns `fun` run with all mesh axes Auto and its results laid out as `out_sharding` says."""
    return jax.sharding.auto_axes(fun, out_sharding=out_sharding)
