"""Inside `jax.shard_map`: what starts from constants varies over mesh axes as what it is used with.

There the type of an array says over which manual mesh axes its values differ. What a loop carries
must keep its type, and so must both ends of a conditional, but a constant varies over no axis.
"""

from collections.abc import Callable
from typing import Any

import jax


def varying_axes(x: Any) -> frozenset[Any]:
    """The manual mesh axes over which an array, or its `ShapeDtypeStruct`, differs."""
    kind: Any = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    if hasattr(kind, "vma"):  # JAX up to 0.9
        return frozenset(kind.vma or ())
    found = getattr(kind, "manual_axis_type", None)
    return frozenset(() if found is None else found.varying)


def vary_as(tree: Any, *like: Any) -> Any:
    """The arrays of a tree, varying over the mesh axes of all arrays of some others as well.

    Values stay, and outside of `jax.shard_map`, and with `check_vma=False`, all else too.
    """
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(like)))
    if not axes:
        return tree

    def cast(x: Any) -> Any:
        missing = tuple(sorted(axes - varying_axes(x), key=str))
        if not missing:
            return x
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(x, missing, to="varying")
        pvary: Any = getattr(jax.lax, "pvary")  # noqa: B009 JAX up to 0.8; newer stubs lack it
        return pvary(x, missing)

    return jax.tree.map(cast, tree)


def cond(which: jax.Array, *branches: Callable[[], Any]) -> Any:
    """`jax.lax.cond` of two functions without arguments, whose results may vary over other axes."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return jax.lax.cond(which, *branches)
    results = [jax.eval_shape(branch) for branch in branches]

    def varied(branch: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: jax.tree.map(lambda x, *like: vary_as(x, like, which), branch(), *results)

    return jax.lax.cond(which, *map(varied, branches))
