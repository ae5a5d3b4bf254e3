"""What the transformations of matrices share: checked maps over a tree's matrices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orthax._default_rule import path_name
from orthax._dimension_rules import leaf_path


def check_matrix_leaves(call: str, tree: Any) -> None:
    """Raises, naming the leaf, unless all are floating matrices, shape (..., m, n)."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = path_name(leaf_path(keys))
        if np.ndim(leaf) < 2:
            raise ValueError(
                f"{call}: '{path}' has shape {np.shape(leaf)}; its last two axes must be a matrix. "
                "Wrap the transformation in orthax.as_matrices to choose axes."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"{call}: '{path}' has dtype {leaf.dtype}; it must be real or complex floating."
            )


def map_matrices(call: str, fun: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps `fun` over the leaves of a tree of matrices; `None` and masked leaves stay."""
    check_matrix_leaves(call, tree)
    return jax.tree.map(fun, tree, *rest)
