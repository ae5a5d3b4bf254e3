"""The leaves of a tree: their paths as text, their checks, and the parts of their type that stay.

A JAX array's type is its shape, its dtype and, on a mesh with Explicit axes, its sharding.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.tree_util import KeyPath

Path = tuple[str | int, ...]
"""Components of a leaf's path; integers are positions in lists and tuples."""


def path_of(keys: KeyPath) -> Path:
    """The components of a JAX key path, without the `.value` of boxes and NNX variables."""
    return tuple(_component(key) for at, key in enumerate(keys) if not _is_box(keys, at))


def joined(path: Path) -> str:
    """A path as rules and error messages show it: components joined by `/`."""
    return "/".join(map(str, path))


def path_text(keys: KeyPath) -> str:
    """A JAX key path as rules and error messages show it."""
    return joined(path_of(keys))


def _is_box(keys: KeyPath, at: int) -> bool:
    """Whether a key is the `.value` of a box: the last one, or the first attribute in a container.

    Other attributes of this name belong to the model, such as attention's value projection.
    """
    if getattr(keys[at], "name", None) != "value":
        return False
    return at == len(keys) - 1 or (at > 0 and not hasattr(keys[at - 1], "name"))


def _component(key: object) -> str | int:
    # Keys of dicts, of attributes and of sequences keep their value under different names.
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            value = getattr(key, attribute)
            return value if isinstance(value, int) else str(value)
    return str(key)


# --- checks


def check_matrix_leaves(call: str, tree: Any, *, kind: Any = jnp.inexact) -> None:
    """Raises, naming the leaf, unless all are floating matrices (of a kind), shape (..., m, n)."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        check_array(call, leaf, f"'{path_text(keys)}'", kind=kind)
        if leaf.ndim < 2:
            raise ValueError(
                f"{call}: '{path_text(keys)}' has shape {leaf.shape}; its last two axes must be a "
                "matrix. Wrap the transformation in orthax.as_matrices to choose axes."
            )


def matrix_leaves(call: str, tree: optax.Params) -> tuple[list[Any], list["Place"], Any]:
    """The leaves of a tree of matrices, checked, the place of each, and the tree's structure."""
    check_matrix_leaves(call, tree)
    keyed, structure = jax.tree_util.tree_flatten_with_path(tree)
    places = [
        Place(path_text(keys), explicit_sharding(x), on_auto_axes(x), varying_axes(x))
        for keys, x in keyed
    ]
    return [x for _, x in keyed], places, structure


def check_matrices(call: str, x: Any, argument: str = "x", *, kind: Any = jnp.inexact) -> Any:
    """The array that came, or an error unless it is of floating matrices (of a kind)."""
    x = value_of(x)
    check_array(call, x, argument, kind=kind)
    if x.ndim < 2:
        has = f"{argument} has shape {x.shape}"
        raise ValueError(f"{call}: {has}; matrices need at least two axes.")
    return x


def value_of(x: Any) -> Any:
    """The array in an `nnx.Param` or whatever else has `__jax_array__`; all else as it is."""
    if isinstance(x, (jax.Array, type)) or not hasattr(x, "__jax_array__"):
        return x
    return value_of(x.__jax_array__())


def check_param(call: str, path: str, x: Any) -> None:
    """Raises a `TypeError` if a leaf of params is no number: a function, a word, a random key."""
    dtype = getattr(x, "dtype", None)
    if dtype is not None:
        if not jnp.issubdtype(dtype, jax.dtypes.extended):
            return
        what = f"has dtype {dtype}"
    elif hasattr(x, "__jax_array__") or (np.isscalar(x) and not isinstance(x, (str, bytes, bool))):
        return
    else:
        what = "is a function" if callable(x) else f"is of type {type(x).__name__}"
    raise TypeError(f"{call}: '{path}' {what}; params are arrays only. {_FILTER}")


def params_of(call: str, tree: optax.Params) -> tuple[list[Path], list[str], list[Any]]:
    """The paths of a tree's leaves, the same as text, and the leaves, of which each is a number."""
    keyed = jax.tree_util.tree_leaves_with_path(tree)
    paths, values = [path_of(keys) for keys, _ in keyed], [value for _, value in keyed]
    names = list(map(joined, paths))
    for name, value in zip(names, values, strict=True):
        check_param(call, name, value)
    return paths, names, values


# Equinox models are trees that hold activation functions and flags beside arrays.
_FILTER = "Of an Equinox model, pass eqx.filter(model, eqx.is_inexact_array)."


def given_for(given: Any, tree: Any) -> Any:
    """What a user gave for a tree: a tree in its form, a value, or what a function makes of it.

    A tree can be a model that is called, as in Equinox; then what has its form can be called too.
    """
    return given(tree) if callable(given) and type(given) is not type(tree) else given


def check_array(call: str, x: Any, argument: str, *, kind: Any = jnp.inexact) -> None:
    """Raises a `TypeError` unless `x` is a floating array (of a kind), or the shape of one."""
    if not isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        hint = f" {_FILTER}" if callable(x) else ""
        raise TypeError(f"{call}: {argument} must be an array, got {type(x).__name__}.{hint}")
    if not jnp.issubdtype(x.dtype, kind):
        accepted = "real or complex floating" if kind is jnp.inexact else "real floating"
        raise TypeError(f"{call}: {argument} has dtype {x.dtype}; it must be {accepted}.")


def check_params(call: str, x: optax.Params | None) -> None:
    """Raises a `ValueError` if the params that a transformation needs are missing."""
    if x is None:
        raise ValueError(f"{call}: update needs params: call update(updates, state, params).")


# --- dtypes


def needs_params(call: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, with an error that names the call if the params are missing."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        check_params(call, params)
        return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def is_masked(x: object) -> bool:
    """Whether `x` stands for a leaf that a partition or mask took away."""
    return isinstance(x, optax.MaskedNode)


def keep_dtypes(
    inner: optax.GradientTransformation, matrices_of: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Lets `inner` compute where numbers do not overflow, and keeps the dtypes that came.

    float16 leaves are shown in float32: a heavy-ball sum of float16 gradients near 1e3 overflows
    within 40 updates, their squares at once. Updates come back in the wider dtype of gradients and
    params, as optax's do (of the gradients alone without params), and what the state holds in the
    dtype it had: an injected hyperparameter, an array, would widen it.
    With the name of a call, leaves are checked to be matrices first.
    """
    inner = optax.with_extra_args_support(inner)

    def widened(leaf: Any) -> Any:
        dtype = jnp.result_type(leaf)  # a Python number is a leaf too
        dtype = jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        return jnp.asarray(leaf, dtype)  # strong: a weakly typed state would change its type

    def init(params: optax.Params) -> optax.OptState:
        if matrices_of is not None:
            check_matrix_leaves(matrices_of, params)
        return inner.init(jax.tree.map(widened, params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        if matrices_of is not None:
            check_matrix_leaves(matrices_of, updates)
        wide_params = None if params is None else jax.tree.map(widened, params)
        wide, new = inner.update(jax.tree.map(widened, updates), state, wide_params, **extra)
        if jax.tree.structure(new) == jax.tree.structure(state):  # not so for `optax.monitor`
            new = jax.tree.map(in_dtype_of, new, state)
        return in_dtypes_of(wide, updates, params), new

    return optax.GradientTransformationExtraArgs(init, update)


def in_dtypes_of(results: Any, updates: optax.Updates, params: optax.Params | None) -> Any:
    """Results in the wider dtype of updates and params, or of updates alone without params."""

    def cast(result: Any, update: Any, param: Any = None) -> Any:
        if result is None or is_masked(result):
            return result
        param = update if param is None or is_masked(param) else param
        return result.astype(jnp.promote_types(jnp.result_type(update), jnp.result_type(param)))

    trees = [results, updates] if params is None else [results, updates, params]
    return jax.tree.map(cast, *trees, is_leaf=lambda x: x is None or is_masked(x))


def in_dtype_of(x: Any, old: Any) -> Any:
    """`x` in the dtype of what it takes the place of."""
    return x if getattr(x, "dtype", None) == getattr(old, "dtype", None) else x.astype(old.dtype)


# --- meshes
#
# On Explicit axes JAX refuses products over sharded axes and some reshapes, because the sharding of
# their result is ambiguous (see `placing.laid_out`). On Auto axes only the compiler knows how an
# array is sharded. On Manual axes, inside `jax.shard_map`, the type of an array says over which its
# values differ. What a loop carries must keep its type, but a constant varies over no axis.


class Place(NamedTuple):
    """Where an array lies: path, sharding on Explicit mesh axes, and on axes of the other kinds."""

    path: str
    sharding: NamedSharding | None
    on_auto_axes: bool
    varies: frozenset[Any]  # the Manual axes over which it differs


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding in the type of `x` if it lies on Explicit mesh axes, else None."""
    if x is None or isinstance(x, jax.ShapeDtypeStruct):
        return None
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def on_auto_axes(x: Any) -> bool:
    """Whether `x` lies on Auto mesh axes, so that only the compiler knows how it is sharded."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return False
    mesh = jax.typeof(x).sharding.mesh
    axes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(kind == AxisType.Auto and size > 1 for kind, size in axes)


def on_a_mesh(x: jax.Array) -> bool:
    """Whether `x` lies on axes of a mesh, of either kind."""
    return explicit_sharding(x) is not None or on_auto_axes(x)


def spec_of(sharding: NamedSharding, axes: int) -> tuple[Any, ...]:
    """The entries of a sharding's spec, one for each of an array's axes."""
    return (*sharding.spec, *(None,) * (axes - len(sharding.spec)))


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
