"""Measures of matrices as `optax.snapshot` and `optax.monitor` take them, by the leaves' paths."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import optax

from orthax.base import check
from orthax.base.leaves import check_params, path_text
from orthax.base.with_memory import WithMemory, check_measure
from orthax.matrices.partition import resolve
from orthax.matrices.path_rules import PathRules
from orthax.matrices.reports import report_unmatched
from orthax.matrices.view import PackedView, open_view

Measures: TypeAlias = dict[str, Any]  # by path; of a packed leaf, a tuple


def of_updates(
    measure: Callable[[jax.Array], Any] | WithMemory | PathRules, dimension_numbers: Any = None
) -> Any:
    """Measures the updates where it stands in a chain, for `optax.snapshot` and `optax.monitor`.

    Args:
      measure: Function of matrices (..., m, n); or a `WithMemory` (for `optax.monitor` only); or
        `orthax.PathRules` from paths to functions of the leaf as it is, such as
        `convolution_orthogonality`, and to None where nothing is measured.
      dimension_numbers: Which leaves are matrices and how, as in `orthax.as_matrices`. By the
        default rule, output heads, embeddings and biases are none. Not used with `PathRules`.

    Returns:
      A function from updates to a dict of the measures by path, of a `Packed` leaf a tuple. Of a
      `WithMemory`, a transformation that gives this dict. `optax.tree.get(state, name)` reads it.
      `optax.monitor` has it after the first update only: under `jax.lax.scan`, `optax.snapshot`.

    Raises:
      TypeError: If `measure` is no function; ValueError: for undecided leaves, or as `measure`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from orthax.diagnostics import stable_rank
      >>> tx = optax.chain(optax.scale(-0.1), optax.snapshot("rank", of_updates(stable_rank)))
      >>> updates = {"kernel": jnp.eye(3), "bias": jnp.ones(3)}
      >>> _, state = tx.update(updates, tx.init(updates))
      >>> print(optax.tree.get(state, "rank")["kernel"].round(1))
      3.0
    """
    _check_measure("of_updates", measure)
    if isinstance(measure, WithMemory):
        return _monitored("of_updates", measure, slice(0, 1), dimension_numbers)
    return lambda updates: dict(_measured("of_updates", measure, (updates,), dimension_numbers))


def of_params(
    measure: Callable[[jax.Array], Any] | WithMemory | PathRules, dimension_numbers: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Measures the params before the update, for `optax.monitor`.

    Args:
      measure: As in `of_updates`.
      dimension_numbers: As in `of_updates`.

    Returns:
      A transformation whose updates are a dict as in `of_updates`; it needs params.
      State: the memories, in a dict by path.

    Raises:
      TypeError: If `measure` is no function; ValueError: without params; as in `of_updates`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from orthax.diagnostics import orthogonality_error
      >>> tx = optax.chain(optax.sgd(0.1), optax.monitor({"error": of_params(orthogonality_error)}))
      >>> params = {"kernel": 2 * jnp.eye(1)}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> print(optax.tree.get(state, "error"))
      {'kernel': Array(3., dtype=float32)}
    """
    _check_measure("of_params", measure)
    return _monitored("of_params", measure, slice(1, 2), dimension_numbers)


def of_both(
    measure: Callable[[jax.Array, jax.Array], Any] | PathRules, dimension_numbers: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Measures updates and params together, for `optax.monitor`.

    Args:
      measure: Function of the update and the params before it, both (..., m, n), such as
        `update_to_weight_ratio`; or `orthax.PathRules` from paths to such, of leaves as they are.
      dimension_numbers: As in `of_updates`.

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
    if isinstance(measure, WithMemory):  # of one array
        check.function("of_both: measure", measure)
    _check_measure("of_both", measure)
    return _monitored("of_both", measure, slice(0, 2), dimension_numbers)


def _check_measure(call: str, measure: Any) -> None:
    if not isinstance(measure, PathRules):
        check_measure(f"{call}: measure", measure, "a function of matrices")
        return
    for value in (*(value for _, value in measure.rules), measure.default):
        if value is not None and value is not ...:
            check.function(f"{call}: measure", value)


def _monitored(
    call: str, measure: Any, arguments: slice, dimension_numbers: Any
) -> optax.GradientTransformationExtraArgs:
    """A transformation whose updates are the measures of the chosen ones of (updates, params)."""
    remembers = isinstance(measure, WithMemory)

    # For `optax.monitor` the updates that come out are the measures; it passes the chain's own on.
    def init(params: optax.Params) -> Measures:
        for rules in (measure, dimension_numbers):
            report_unmatched(call, rules, params)
        if not remembers:
            return {}
        return dict(_measured(call, measure.init, (params,), dimension_numbers))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[Measures, Measures]:
        del extra
        trees = (updates, params)[arguments]
        for tree in trees:
            check_params(call, tree)
        if not remembers:
            return dict(_measured(call, measure, trees, dimension_numbers)), state
        # Pairs of value and next memory, each to its own dict.
        both = dict(_measured(call, measure.apply, trees, dimension_numbers, state))
        return {path: b[0] for path, b in both.items()}, {path: b[1] for path, b in both.items()}

    return optax.GradientTransformationExtraArgs(init, update)


def _measured(
    call: str,
    fun: Callable[..., Any] | PathRules,
    trees: tuple[optax.Params | None, ...],
    dimension_numbers: Any,
    *memories: Measures,
) -> Iterator[tuple[str, Any]]:
    """Path and result of `fun` for each matrix leaf of the first tree, opened in all trees.

    Rules choose a function for each leaf and it sees the leaf as it is.
    Of a packed leaf, a tuple of results or, where there are memories, one of each of their parts.
    """
    # The first tree decides which leaves are matrices; the others are taken apart as it is.
    structure = jax.tree.structure(trees[0])
    others = [structure.flatten_up_to(tree) for tree in trees]
    if isinstance(fun, PathRules):
        keyed = jax.tree_util.tree_leaves_with_path(trees[0])
        for (keys, _), *values in zip(keyed, *others, strict=True):
            path = path_text(keys)
            measure, _ = fun.lookup(path)
            if measure is not None and measure is not ...:
                yield path, measure(*values)
        return
    leaves = resolve(call, trees[0], dimension_numbers)
    for leaf, *values in zip(leaves, *others, strict=True):
        if leaf.view is None:
            continue
        matrices = [open_view(leaf.view, value) for value in values]
        # A packed leaf opens to several matrices: each is measured, and remembered, by itself.
        kept = [memory[leaf.path] for memory in memories]
        if not isinstance(leaf.view, PackedView):
            yield leaf.path, fun(*matrices, *kept)
            continue
        results = tuple(fun(*parts) for parts in zip(*matrices, *kept, strict=True))
        yield leaf.path, tuple(zip(*results, strict=True)) if memories else results
