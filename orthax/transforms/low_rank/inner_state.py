"""The state of a transformation inside `low_rank`, when its subspaces change."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from orthax.base.leaves import is_masked, on_auto_axes
from orthax.base.placing import alike
from orthax.transforms.low_rank.frames import Frame
from orthax.transforms.low_rank.subspaces import Adaptive, Whole

SIGNED = ("mu", "trace", "ema")
SQUARED = ("nu", "nu_max", "sum_of_squares", "e_g", "e_x", "rms", "mu_weight", "nu_weight")
"""Names of moments in the states of optax and orthax, by their nature."""


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf of a state with its path, which `optax.tree.map_params` does not tell."""

    keys: tuple[Any, ...]
    value: Any


def move_inner_state(
    inner: Any, state: Any, frames: Any, old: Any, new: Any, *, start: jax.Array
) -> Any:
    """Moves every leaf of the state of `inner` that depends on the subspace, from old to new ones.

    `frames`, `old`, `new` are trees like the params. At the `start` the state stays as it is.
    """

    def moved(leaf: _Leaf, frame: Frame, old: Any, new: Any) -> Any:
        if not _follows(leaf.value, frame):
            return leaf.value
        return frame.move(start, old, new, leaf.value, signed=_signed(leaf.keys))

    leaves = jax.tree_util.tree_map_with_path(_Leaf, state)
    return optax.tree.map_params(
        inner,
        lambda leaf, *rest: leaf if is_masked(leaf) else moved(leaf, *rest),
        leaves,
        frames,
        old,
        new,
        transform_non_params=lambda leaf: leaf.value,
        is_leaf=is_masked,
    )


def place_inner_state(inner: Any, state: Any, lows: Any) -> Any:
    """Lays a first state that is traced, on Auto axes of a mesh, where the coordinates lie."""
    if not any(isinstance(low, Tracer) and on_auto_axes(low) for low in jax.tree.leaves(lows)):
        return state

    def placed(x: Any, low: Any) -> Any:
        return x if is_masked(x) or x.shape != low.shape else alike(x, low)

    return optax.tree.map_params(inner, placed, state, lows, is_leaf=is_masked)


def check_inner_state(call: str, inner: Any, state: Any, frames: Any) -> None:
    """Raises a `ValueError` that names a leaf of the state which cannot change its subspace."""
    try:
        verdicts = optax.tree.map_params(
            inner,
            _problem,
            state,
            frames,
            transform_non_params=_problem_of_others,
            is_leaf=is_masked,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{call}: optax.tree.map_params does not find what in the state of inner follows the "
            f"params, so it cannot follow a change of subspace: {error}"
        ) from error
    for keys, verdict in jax.tree_util.tree_leaves_with_path(verdicts):
        if verdict:
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise ValueError(f"{call}: '{name}' in the state of inner {verdict}.")


def _problem(x: Any, frame: Frame) -> str:
    """Why a leaf that follows params cannot follow a change of subspace; empty if it can."""
    if not _follows(x, frame):
        return ""
    along = x.shape[frame.axis] if x.ndim == len(frame.shape) else None
    if along != frame.rank:
        return (
            f"has shape {x.shape} where '{frame.path}' is projected to {frame.low_shape}; only an "
            f"entry for each coordinate along axis {frame.axis}, or one for all, can follow a "
            "change of subspace"
        )
    if isinstance(frame.subspace, Adaptive) and not jnp.issubdtype(x.dtype, jnp.inexact):
        return f"has dtype {x.dtype}, which cannot be rotated to another subspace"
    return ""


def _problem_of_others(x: Any) -> str:
    if np.ndim(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return (
            f"has shape {np.shape(x)} and is not in the shape of the params, so it cannot follow a "
            "change of subspace"
        )
    return ""


def _follows(x: Any, frame: Frame) -> bool:
    """Whether a leaf of the state depends on the subspace: not if it is one number for all."""
    if is_masked(x) or isinstance(frame.subspace, Whole):
        return False
    if x.ndim != len(frame.shape):
        return x.size != 1
    return x.shape[frame.axis] != 1 or frame.rank == 1


def _signed(keys: tuple[Any, ...]) -> bool | None:
    """Whether a leaf has signs by nature; None if its name does not tell."""
    names = [getattr(key, "name", None) for key in keys]
    return next((name in SIGNED for name in names if name in SIGNED + SQUARED), None)
