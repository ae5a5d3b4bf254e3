"""`low_rank`: any transformation, run in the few dimensions that hold most of each gradient.

`low_rank(inner, rank, retain=...)` shows `inner` the coordinates of a buffer, b = buffer + g, in r
columns Q of an orthonormal basis, and keeps what was left out:

    low = b Q;  update = inner(low) Q^T;  buffer = b - (1 - retain) low Q^T

  * Trion is `low_rank(orthogonalize(), rank, retain=0.95)`: the buffer is its momentum.
  * DCT-AdamW is `low_rank(scale_by_adam_per_index(), rank)`; with `retain=0.0` the buffer is its
    error feedback.
  * GaLore is `low_rank(optax.scale_by_adam(), rank, basis="svd", update_every=200)`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orthax._numbers import check_integer, check_number
from orthax.linalg._columns import RANKINGS
from orthax.transforms._float16 import accumulate_float16_in_float32
from orthax.transforms._frames import Frame, check_rank, make_frames, random_matrices
from orthax.transforms._inner_state import check_inner_state, move_inner_state
from orthax.transforms._residuals import Residuals
from orthax.transforms._subspaces import BASES, Subspace, make_subspace
from orthax.transforms._trees import check_matrix_leaves


class LowRankState(NamedTuple):
    """State of `low_rank`.

    Attributes:
      count: Number of updates, int32.
      subspaces: For each leaf the indices of its columns in the basis, int32 (..., r), increasing;
        for the bases "svd" and "subspace" the columns, (..., n, r).
      bases: The dense basis "random", n x n, once for each n, in the place of the first leaf with
        it; None for all other bases.
      residuals: The buffer, like the gradients, or for "int8" and "int4" a `Quantized` of trees;
        None for `retain=None`.
      inner: State of the inner transformation, for leaves of rank r.
    """

    count: jax.Array
    subspaces: optax.Updates
    bases: optax.Updates | None
    residuals: Any
    inner: optax.OptState


def low_rank(
    inner: optax.GradientTransformation,
    rank: int | float | Callable[[int, int], int],
    *,
    basis: Literal["dct", "dct3", "random", "hadamard", "columns", "svd", "subspace"] = "dct",
    ranking: Literal["l1", "l2"] = "l2",
    retain: jax.typing.ArrayLike | None = None,
    update_every: int = 1,
    buffer_dtype: Any = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs a transformation on the coordinates of each matrix in r columns of a basis.

    The shorter side of a matrix is projected, of a square one the rows (fan-in): `inner` sees
    updates and params of shape (..., m, r) or (..., r, n). What its state holds for each coordinate
    follows when the columns change: in a fixed basis, the entries of kept indices move with them
    and those of new ones start at zero; in "svd" and "subspace", first moments are rotated,
    and second moments by the squares, so that none turns negative (a moment of unknown name counts
    as second if it has no negative entry).

    Args:
      inner: Transformation whose state follows the shape of the updates, or is one scalar for all:
        `optax.trace`, `scale_by_adam`, `scale_by_lion`, `orthogonalize`, a `chain`, ...
      rank: Dimensions r: an integer, a fraction of the shorter side in (0, 1], or a function of
        (m, n) to an integer. A matrix whose shorter side is at most r is not projected.
      basis: "dct" and "dct3", the cosines of DCT-II and DCT-III, are computed where they are needed
        and never stored; "hadamard" likewise, for sizes that have a Hadamard matrix; "random", one
        random orthogonal matrix for each size, from `seed`; "columns", the identity: plain
        selection; "svd", the leading singular vectors; "subspace", one step of subspace iteration
        towards them.
      ranking: Norm by which the r columns of largest coordinates are chosen, "l1" or "l2"; see
        `orthax.linalg.top_columns`. "svd" and "subspace" have nothing to rank.
      retain: None: no buffer; what is outside the subspace is lost. A number in [0, 1): the buffer
        keeps it, and this part of what is inside: 0 is error feedback, a momentum makes the buffer
        a momentum. At 0, with `optax.identity()` as inner, the updates so far and the buffer add
        up to the gradients so far.
      update_every: Updates between choices of the subspace.
      buffer_dtype: Of the buffer: None (the gradient's; float32 for float16), a dtype, or "int8" or
        "int4" for so many bits an entry and two float32 numbers a row.
      rounding: Of "int8" and "int4": "nearest", or "stochastic", right on average.
      seed: Of random bases and of stochastic rounding.

    Returns:
      A transformation; updates keep shape and dtype, and on Explicit meshes their sharding (on Auto
      axes the compiler may lay them out in its own way; `optax.apply_updates` and `out_shardings`
      bring them back). With "l2" ranking and a fixed basis, the coordinates hold at least the part
      r / n of the buffer's energy. 16-bit matrices are projected in float32.
      State: `LowRankState`: inner's, r / min(m, n) of its size without projection; r indices; the
      buffer.
      Sees: trees whose leaves' last two axes are the matrix; needs params if `inner` does.

    Raises:
      ValueError: For an argument out of range or unknown; at `init`, for a leaf of fewer than two
        axes, a size without a Hadamard matrix, or a state of `inner` that cannot follow a change of
        subspace (Adafactor's factored moments), by name.
      TypeError: For an argument of the wrong type (in `optax.inject_hyperparams` all but `retain`
        belong into `static_args`); for an integer leaf.

    Example:
      >>> tx = low_rank(optax.identity(), rank=1, basis="columns", retain=0.0)
      >>> g = jnp.array([[1.0, 2.0], [0.0, 0.0], [2.0, 2.0]])
      >>> updates, state = tx.update(g, tx.init(g))
      >>> print(updates)
      [[0. 2.]
       [0. 0.]
       [0. 2.]]
      >>> print(state.residuals)
      [[1. 0.]
       [0. 0.]
       [2. 0.]]

    Reference:
      Modoranu et al., 2025, <https://arxiv.org/abs/2505.17967>; the retained momentum from Ahn et
      al., Dion, 2025, <https://arxiv.org/abs/2504.05295>; projected moments from Zhao et al.,
      GaLore, 2024, <https://arxiv.org/abs/2403.03507>.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"low_rank: inner must be an optax transformation, got {inner!r}.")
    check_rank(rank)
    if basis not in BASES:
        raise ValueError(f"low_rank: basis must be one of {BASES}, got {basis!r}.")
    if ranking not in RANKINGS:
        raise ValueError(f"low_rank: ranking must be one of {RANKINGS}, got {ranking!r}.")
    if retain is not None:
        check_number("low_rank", "retain", retain, "lie in [0, 1)", lambda x: 0 <= x < 1)
    check_integer("low_rank", "update_every", update_every, least=1)
    check_integer("low_rank", "seed", seed, least=0)
    buffer = Residuals(buffer_dtype, rounding, seed)
    inner = optax.with_extra_args_support(inner)

    def frames_of(tree: Any, bases: Any) -> list[Frame]:
        check_matrix_leaves("low_rank", tree)
        matrices = {len(matrix): matrix for matrix in jax.tree.leaves(bases)}

        def subspace_of(path: str, n: int) -> Subspace:
            return make_subspace(path, n, basis, ranking, seed, matrices.get(n))

        return make_frames(tree, rank, subspace_of)

    def init(params: Any) -> Any:
        leaves, structure = jax.tree.flatten(params)
        bases = random_matrices(params, rank, seed) if basis == "random" else None
        frames = frames_of(params, bases)
        zeros = [_wide(_zeros(x)) for x in leaves]
        kept = [frame.first(x) for frame, x in zip(frames, zeros, strict=True)]
        low = structure.unflatten(map(_projected, frames, leaves, kept))
        inner_state = inner.init(low)
        check_inner_state(inner, inner_state, structure.unflatten(frames))
        count = jnp.zeros([], jnp.int32)
        residuals = None
        if retain is not None:
            residuals = buffer.save(frames, zeros, leaves, structure, count)
        return LowRankState(count, structure.unflatten(kept), bases, residuals, inner_state)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        gradients, structure = jax.tree.flatten(updates)
        frames = frames_of(updates, state.bases)
        old = structure.flatten_up_to(state.subspaces)
        for frame, kept in zip(frames, old, strict=True):
            frame.check(kept)
        xs = [_wide(g) for g in gradients]
        if retain is not None:
            residuals = buffer.load(frames, state.residuals, structure)
            xs = [x + residual.astype(x.dtype) for x, residual in zip(xs, residuals, strict=True)]

        def choose() -> tuple[Any, Any, Any]:
            pairs = [*map(Frame.choose, frames, xs, old)]
            new, low = [kept for kept, _ in pairs], [coordinates for _, coordinates in pairs]
            moved = move_inner_state(
                inner,
                state.inner,
                structure.unflatten(frames),
                state.subspaces,
                structure.unflatten(new),
                start=state.count == 0,
            )
            return new, low, moved

        def keep() -> tuple[Any, Any, Any]:
            return old, [*map(Frame.project, frames, xs, old)], state.inner

        if update_every == 1:
            new, low, inner_state = choose()
        else:
            new, low, inner_state = jax.lax.cond(state.count % update_every == 0, choose, keep)

        low = [x.astype(g.dtype) for x, g in zip(low, gradients, strict=True)]
        low_params = None
        if params is not None:
            low_params = structure.unflatten(
                map(_projected, frames, structure.flatten_up_to(params), new)
            )
        directions, inner_state = inner.update(
            structure.unflatten(low), inner_state, low_params, **extra
        )
        results = [
            frame.expand(_wide(direction), kept).astype(g.dtype)
            for frame, direction, kept, g in zip(
                frames, structure.flatten_up_to(directions), new, gradients, strict=True
            )
        ]
        residuals = None
        if retain is not None:
            left = [
                x - (1 - retain) * frame.expand(_wide(coordinates), kept)
                for frame, x, coordinates, kept in zip(frames, xs, low, new, strict=True)
            ]
            residuals = buffer.save(frames, left, gradients, structure, state.count)
        return structure.unflatten(results), LowRankState(
            jnp.asarray(optax.safe_increment(state.count)),
            structure.unflatten(new),
            state.bases,
            residuals,
            inner_state,
        )

    return accumulate_float16_in_float32(optax.GradientTransformationExtraArgs(init, update))


def _projected(frame: Frame, x: Any, kept: Any) -> Any:
    """Coordinates of params, in their dtype; of a `ShapeDtypeStruct`, the same of them."""

    def projected(x: jax.Array, kept: Any) -> jax.Array:
        return frame.project(_wide(x), kept).astype(x.dtype)

    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.eval_shape(projected, x, kept)
    return projected(jnp.asarray(x), kept)


def _zeros(x: Any) -> jax.Array:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jnp.zeros(x.shape, x.dtype, device=x.sharding)
    return jnp.zeros_like(x)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
