"""Monitored values as a flat dict of numbers, as loggers take them."""

from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer

from orthax.base.leaves import path_text


def scalars(state: optax.OptState) -> dict[str, float]:
    """What `optax.monitor` and `optax.snapshot` hold in a state, for wandb, TensorBoard or clu.

    Args:
      state: Of an optimizer, outside `jax.jit`: its values are copied to the host.

    Returns:
      Floats by the measure's name and the leaf's path, "error/blocks/0/up/kernel". A value of
      several matrices (a stack, a packed leaf) has one entry for each, "error/experts/kernel/3";
      several axes are counted as one. Empty for a state that holds no measures, or, of
      `optax.monitor`, before the first update. Of names that occur twice in a chain the last.

    Raises:
      TypeError: If a value is no number, such as a tracer's under `jax.jit`.

    Example:
      >>> import jax.numpy as jnp
      >>> from orthax.diagnostics import of_params, orthogonality_error
      >>> tx = optax.chain(optax.sgd(0.1), optax.monitor({"error": of_params(orthogonality_error)}))
      >>> params = {"up": {"kernel": 2 * jnp.eye(1)}}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> scalars(state)
      {'error/up/kernel': 3.0}
    """
    found: dict[str, float] = {}
    for node in jax.tree.leaves(state, is_leaf=_measured):
        if not _measured(node):
            continue
        (measured, *_) = node
        for keys, value in jax.tree_util.tree_leaves_with_path(measured):
            found |= _numbers(path_text(keys), value)
    return found


def _measured(node: Any) -> bool:
    return isinstance(node, (optax.MonitorState, optax.SnapshotState))


def _numbers(name: str, value: Any) -> dict[str, float]:
    if isinstance(value, Tracer):
        raise TypeError(f"scalars: '{name}' is traced; call it outside jax.jit, on the new state.")
    array = np.asarray(value)
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == jax.numpy.bfloat16):
        raise TypeError(f"scalars: '{name}' must be a real number, got {value!r}.")
    if array.ndim == 0:
        return {name: float(array)}
    return {f"{name}/{i}": float(x) for i, x in enumerate(array.ravel())}
