"""Small matrices take longer to compile one by one than to stack; large ones longer to copy."""

from collections.abc import Callable
from typing import Any

import jax

from orthax.linalg._stacking import apply_stacked
from orthax.transforms._trees import check_matrix_leaves

SMALL = 2**15
"""Entries. On CPU 192 leaves of (64, 64) compile in a tenth of the time if stacked; stacks run as
long as single matrices for 128 x 128, 1.2 times as long for 256 x 256, twice for 768 x 768."""


def map_matrices_stacking_small(call: str, fun: Callable[[jax.Array], jax.Array], tree: Any) -> Any:
    """Maps `fun` over the leaves of a tree of matrices, and once over all small ones of a shape.

    Args:
      call: Name of the transformation, for error messages.
      fun: Function of matrices (..., m, n) to matrices of the same shape and dtype that takes each
        matrix by itself and commutes with transposition. Leaves without entries are not passed.
      tree: Tree of matrices; `None` and masked leaves stay.

    Returns:
      The tree of results.
    """
    check_matrix_leaves(call, tree)
    leaves, structure = jax.tree.flatten(tree)
    small = [i for i, leaf in enumerate(leaves) if leaf.size <= SMALL]
    results = [leaf if leaf.size <= SMALL else fun(leaf) for leaf in leaves]
    for i, result in zip(small, apply_stacked(fun, [leaves[i] for i in small]), strict=True):
        results[i] = result
    return structure.unflatten(results)
