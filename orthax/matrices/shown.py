"""Showing a transformation the leaves of a tree as matrices."""

import dataclasses
from typing import Any

import jax
import optax

from orthax.base.block_periodic import BlockPeriodic, run_block_periodic
from orthax.base.each_matrix import EachMatrix, run_whole
from orthax.matrices.view import MatrixView, PackedView, ViewReading, close_view, open_view


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of a tree and what was decided about it.

    Attributes:
      path: Components joined by `/`.
      value: The leaf.
      view: How it is read as matrices; None for the fallback.
      reason: The rule that decided.
      by_default: Whether that was the default rule, which reads names and shapes.
      sharding: How it lies on a mesh, if a user told; False if it is to stay there.
    """

    path: str
    value: Any
    view: MatrixView | PackedView | None
    reason: str
    by_default: bool
    sharding: Any = None


def shown_matrices(
    call: str, inner: optax.GradientTransformation, decided: Any
) -> optax.GradientTransformationExtraArgs:
    """Shows `inner` the leaves of a tree as matrices; leaves that are masked away stay so."""
    if isinstance(inner, EachMatrix) and any(
        leaf.sharding is False for leaf in jax.tree.leaves(decided)
    ):
        inner = inner.staying()
    travelling = inner if isinstance(inner, EachMatrix | BlockPeriodic) else None
    inner = optax.with_extra_args_support(inner)

    def masked(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    # A part sees `optax.MaskedNode` in the place of the other's leaves. A gradient may be None
    # where there is a parameter.
    def view_of(x: Any, leaf: Leaf | None) -> MatrixView | PackedView | None:
        if masked(x) or leaf is None or leaf.view is None or leaf.view.is_identity:
            return None
        return leaf.view

    def opened(tree: Any) -> Any:
        def open_leaf(x: Any, leaf: Leaf | None) -> Any:
            view = view_of(x, leaf)
            return x if view is None else open_view(view, x)

        return jax.tree.map(open_leaf, tree, decided, is_leaf=masked)

    def closed(results: Any, like: Any) -> Any:
        def close_leaf(x: Any, result: Any, leaf: Leaf) -> Any:
            view = view_of(x, leaf)
            return result if view is None else close_view(view, result, x)

        return jax.tree.map(close_leaf, like, results, decided, is_leaf=masked)

    def on_owners(updates: Any, state: Any, params: Any) -> Any:
        """On a mesh leaves are opened by the devices that own them: cut heads would be gathered."""
        if travelling is None:
            return None
        present = jax.tree.map(
            lambda x, leaf: x if masked(x) else leaf, updates, decided, is_leaf=masked
        )
        leaves = jax.tree.leaves(present)
        if not travelling.may_travel(updates, any(leaf.sharding for leaf in leaves)):
            return None
        views = [leaf.view for leaf in leaves]
        if any(isinstance(view, PackedView) and view.axis in view.batch_axes for view in views):
            return None  # sections of several numbers of matrices; they travel one by one, opened
        given = [leaf.sharding for leaf in leaves]
        readings = [ViewReading(view) for view in views]
        if isinstance(travelling, BlockPeriodic):
            return run_block_periodic(travelling, updates, state, params, readings, given, call)
        return run_whole(travelling, updates, state, params, readings, given, call)

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(opened(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        if (found := on_owners(updates, state, params)) is not None:
            return found
        opened_params = None if params is None else opened(params)
        results, state = inner.update(opened(updates), state, opened_params, **extra)
        return closed(results, like=updates), state

    return optax.GradientTransformationExtraArgs(init, update)
