"""Shardings that a user gives where a program does not tell how its arrays are cut.

On Auto axes of a mesh a traced array does not know its spec. What is given is where leaves are
brought from and back to: a wrong spec costs time, and changes no value.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from orthax.base.leaves import given_for, path_text

_ACCEPTED = "None, False, a tree of shardings like the params, or a function of params to one"


def check_sharding(call: str, sharding: Any) -> None:
    """Raises a `TypeError` for what can be neither a tree of shardings nor stand for one."""
    words = (bool, int, float, complex, str, bytes)
    if isinstance(sharding, words) and sharding is not False:
        raise TypeError(f"{call}: sharding must be {_ACCEPTED}, got {sharding!r}.")


def shardings_of(call: str, sharding: Any, tree: Any) -> list[Any]:
    """What was given for each leaf of a tree: a sharding, a `PartitionSpec`, or None: unknown."""
    keyed, structure = jax.tree_util.tree_flatten_with_path(tree)
    if sharding is None or sharding is False:
        return [None] * len(keyed)
    try:
        given = structure.flatten_up_to(given_for(sharding, tree))
    except ValueError as error:
        raise ValueError(
            f"{call}: sharding must have the tree structure of the params. {error}"
        ) from error
    for (keys, _), one in zip(keyed, given, strict=True):
        if one is not None and not isinstance(one, Sharding | PartitionSpec):
            raise TypeError(
                f"{call}: sharding of '{path_text(keys)}' must be a NamedSharding or a "
                f"PartitionSpec, got {one!r}."
            )
    return given


def mesh_of(given: Sequence[Any]) -> Any:
    """The mesh of the first sharding that has one."""
    return next((one.mesh for one in given if isinstance(one, NamedSharding)), None)


def spec_entries(call: str, path: str, shape: Sequence[int], given: Any, mesh: Any) -> Any:
    """The entries of a given spec, one for each axis of a leaf; None if it tells nothing.

    An axis that the mesh lacks, and one that does not divide a leaf, raise a `ValueError`.
    """
    spec = given.spec if isinstance(given, NamedSharding) else given
    if not isinstance(spec, PartitionSpec):  # None, or of a single device
        return None
    where = f"{call}: sharding of '{path}', {spec},"
    if len(spec) > len(shape):
        raise ValueError(f"{where} has {len(spec)} entries for an array of shape {tuple(shape)}.")
    sizes = dict(mesh.shape)
    entries = (*spec, *(None for _ in range(len(shape) - len(spec))))
    for size, entry in zip(shape, entries, strict=True):
        names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        for name in names:
            if name not in sizes:
                raise ValueError(f"{where} names axis {name!r}; the mesh has {tuple(sizes)}.")
        parts = math.prod(sizes[name] for name in names)
        if size % parts:
            raise ValueError(f"{where} cuts an axis of size {size} in {parts}: it must divide it.")
    return entries
