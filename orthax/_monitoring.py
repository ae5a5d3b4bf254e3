"""Measures of matrices as `optax.snapshot` and `optax.monitor` take them, by the leaves' paths."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from orthax._dimension_rules import resolve
from orthax._memory import WithMemory
from orthax._views import PackedView, open_view


def of_updates(
    measure: Callable[[jax.Array], Any] | WithMemory, dimension_numbers: Any = None
) -> Any:
    """A measure of the updates where it stands in a chain, for `optax.snapshot` and `monitor`.

    Args:
      measure: Function of matrices (..., m, n), or a `WithMemory` (for `optax.monitor` only).
      dimension_numbers: Which leaves are matrices and how, as in `orthax.as_matrices`.

    Returns:
      A function from a tree of updates to a dict: the paths of its matrices to their measures,
      those of a `Packed` leaf as a tuple. Of a `WithMemory`, a transformation that gives this dict.
      `optax.tree.get(state, name)` reads it. `optax.monitor` has it from the first update on, so
      its state changes structure there; for `jax.lax.scan` take `optax.snapshot`.

    Raises:
      TypeError: If `measure` is no function.
      ValueError: For a leaf whose names leave its axes undecided, or what `measure` raises.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from orthax.diagnostics import stable_rank
      >>> tx = optax.chain(optax.scale(-0.1), optax.snapshot("rank", of_updates(stable_rank)))
      >>> updates = {"kernel": jnp.eye(3), "bias": jnp.ones(3)}
      >>> _, state = tx.update(updates, tx.init(updates))
      >>> print(optax.tree.get(state, "rank")["kernel"].round(1))
      3.0
    """
    if isinstance(measure, WithMemory):
        return _monitored(measure, slice(0, 1), dimension_numbers)
    _check_measure("of_updates", measure)
    return lambda updates: dict(_measured(measure, (updates,), dimension_numbers))


def of_params(
    measure: Callable[[jax.Array], Any] | WithMemory, dimension_numbers: Any = None
) -> optax.GradientTransformationExtraArgs:
    """A measure of the params before the update, for `optax.monitor`.

    Args:
      measure: Function of matrices (..., m, n), or a `WithMemory`.
      dimension_numbers: Which leaves are matrices and how, as in `orthax.as_matrices`.

    Returns:
      A transformation whose updates are a dict as in `of_updates`; it needs params.
      State: the memories, in a dict by path.

    Raises:
      TypeError: If `measure` is no function.
      ValueError: At `update`, without params; as in `of_updates`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from orthax.diagnostics import orthogonality_error
      >>> tx = optax.chain(optax.sgd(0.1), optax.monitor({"error": of_params(orthogonality_error)}))
      >>> params = {"kernel": 2 * jnp.eye(1)}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> print(optax.tree.get(state, "error"))
      {'kernel': Array(3., dtype=float32)}
    """
    if not isinstance(measure, WithMemory):
        _check_measure("of_params", measure)
    return _monitored(measure, slice(1, 2), dimension_numbers)


def of_both(
    measure: Callable[[jax.Array, jax.Array], Any], dimension_numbers: Any = None
) -> optax.GradientTransformationExtraArgs:
    """A measure of updates and params, for `optax.monitor`.

    Args:
      measure: Function of the update and the params before it, both (..., m, n), such as
        `update_to_weight_ratio`.
      dimension_numbers: Which leaves are matrices and how, as in `orthax.as_matrices`.

    Returns:
      A transformation whose updates are a dict as in `of_updates`; it needs params.

    Raises:
      TypeError: If `measure` is no function.
      ValueError: At `update`, without params; as in `of_updates`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from orthax.diagnostics import update_to_weight_ratio
      >>> measures = {"ratio": of_both(update_to_weight_ratio)}
      >>> tx = optax.chain(optax.sgd(0.1), optax.monitor(measures))
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> print(optax.tree.get(state, "ratio")["kernel"].round(3))
      0.1
    """
    _check_measure("of_both", measure)
    return _monitored(measure, slice(0, 2), dimension_numbers)


def _check_measure(call: str, measure: Any) -> None:
    if not callable(measure):
        raise TypeError(f"{call}: measure must be a function of matrices, got {measure!r}.")


def _monitored(
    measure: Any, arguments: slice, dimension_numbers: Any
) -> optax.GradientTransformationExtraArgs:
    """A transformation whose updates are the measures of the chosen ones of (updates, params)."""
    remembers = isinstance(measure, WithMemory)

    def init(params: Any) -> Any:
        return dict(_measured(measure.init, (params,), dimension_numbers)) if remembers else {}

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[dict[str, Any], Any]:
        del extra
        trees = (updates, params)[arguments]
        if any(tree is None for tree in trees):
            raise ValueError("orthax.diagnostics: update needs params, as its third argument.")
        if not remembers:
            return dict(_measured(measure, trees, dimension_numbers)), state
        both = dict(_measured(measure.apply, trees, dimension_numbers, state))
        return {path: b[0] for path, b in both.items()}, {path: b[1] for path, b in both.items()}

    return optax.GradientTransformationExtraArgs(init, update)


def _measured(
    fun: Callable[..., Any], trees: tuple[Any, ...], dimension_numbers: Any, *memories: Any
) -> Iterator[tuple[str, Any]]:
    """Path and result of `fun` for each matrix leaf of the first tree, opened in all trees.

    Of a packed leaf, a tuple of results or, where there are memories, one of each of their parts.
    """
    leaves = resolve("orthax.diagnostics", trees[0], dimension_numbers)
    structure = jax.tree.structure(trees[0])
    others = [structure.flatten_up_to(tree) for tree in trees]
    for leaf, *values in zip(leaves, *others, strict=True):
        if leaf.view is None:
            continue
        matrices = [open_view(leaf.view, value) for value in values]
        kept = [memory[leaf.path] for memory in memories]
        if not isinstance(leaf.view, PackedView):
            yield leaf.path, fun(*matrices, *kept)
            continue
        results = tuple(fun(*parts) for parts in zip(*matrices, *kept, strict=True))
        yield leaf.path, tuple(zip(*results, strict=True)) if memories else results
