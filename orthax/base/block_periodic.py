"""Whole matrices at some updates, and at all others what each device has of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orthax.base.each_matrix import EachMatrix, run_whole
from orthax.base.placing import cond
from orthax.base.reading import Reading
from orthax.base.whole_matrices import one_mesh


class BlockPeriodicState(NamedTuple):
    """State of a block-periodic transformation.

    Attributes:
      count: Number of updates, int32.
      inner: State of the transformation.
    """

    count: jax.Array
    inner: Any


class BlockPeriodic(optax.GradientTransformation):
    """Made by `block_periodic`.

    Attributes:
      inner: The transformation.
      every: Updates from one of whole matrices to the next.
    """

    inner: EachMatrix
    every: int

    def may_travel(self, updates: optax.Updates, given: bool) -> bool:
        """As of `EachMatrix`."""
        return self.inner.may_travel(updates, given)


def block_periodic(call: str, inner: optax.GradientTransformation, every: int) -> BlockPeriodic:
    """`inner` on whole matrices every so many updates; else each device on its pieces alone.

    Pieces are as the mesh cuts each matrix, so nothing is sent for them, and a step that depends on
    the shape sees theirs. Where nothing is cut, all updates are of whole matrices.
    Reference: MuonBP, 2025, <https://arxiv.org/abs/2510.16981>.
    """
    if not isinstance(inner, EachMatrix) or any(step.state_type for step in inner.steps):
        raise TypeError(
            f"{call}: whole_every={every} needs an orthogonalizer and a shape_scale of orthax, "
            "which treat every matrix alone and have no state."
        )

    def init(params: optax.Params) -> BlockPeriodicState:
        return BlockPeriodicState(jnp.zeros([], jnp.int32), inner.init(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, BlockPeriodicState]:
        updates, after = inner.update(updates, state.inner, params)
        return updates, BlockPeriodicState(_next(state.count), after)

    made = BlockPeriodic(init, update)
    made.inner, made.every = inner, every
    return made


def run_block_periodic(
    made: BlockPeriodic,
    updates: optax.Updates,
    state: Any,
    params: Any,
    readings: Sequence[Reading],
    given: Sequence[Any],
    call: str,
) -> tuple[optax.Updates, Any] | None:
    """As `run_whole`."""

    def results(*, travel: bool) -> Any:
        found = run_whole(
            made.inner, updates, state.inner, params, readings, given, call, travel=travel
        )
        return found and found[0]

    if one_mesh(jax.tree.leaves(updates), given) is None:
        return None
    found = cond(
        state.count % made.every == 0,
        lambda: results(travel=True),
        lambda: results(travel=False),
    )
    return found, BlockPeriodicState(_next(state.count), state.inner)


def _next(count: jax.Array) -> jax.Array:
    return jnp.asarray(optax.safe_increment(count))
