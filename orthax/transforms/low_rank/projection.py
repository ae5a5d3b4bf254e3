"""The algorithm of `low_rank`: see `transformation`, where its arguments are explained."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from orthax.base import check
from orthax.base.each_matrix import EachMatrix
from orthax.base.leaves import keep_dtypes, on_auto_axes
from orthax.base.placing import all_alike, cond
from orthax.base.rank import check_rank
from orthax.base.turned import lay, lay_back
from orthax.linalg.elementary import RANKINGS, number_for, wide
from orthax.linalg.quantization import BITS, quantized_zeros
from orthax.transforms.low_rank.frames import (
    Frame,
    check_kept,
    make_frames,
    random_matrices,
)
from orthax.transforms.low_rank.inner_state import (
    check_inner_state,
    move_inner_state,
    place_inner_state,
)
from orthax.transforms.low_rank.quantized import (
    ROUNDINGS,
    dequantize_leaves,
    in_one,
    quantize_leaves,
    with_quantized_mu,
    with_whole_mu,
)
from orthax.transforms.low_rank.subspaces import BASES, Kind


class LowRankState(NamedTuple):
    """State of `low_rank`.

    Attributes:
      count: Number of updates, int32.
      subspaces: For each leaf the indices of its columns in the basis, int32 (..., r), increasing;
        for the bases "svd" and "subspace" the columns, (..., n, r).
      bases: The basis "random", n x n, once for each n, in the place of the first leaf with it.
      residuals: The buffer, like the params, or for "int8" and "int4" a `Quantized` of trees. On a
        mesh its projected axis is whole on each device, unless it is quantised.
      inner: State of the inner transformation, for leaves of rank r.
    """

    count: jax.Array
    subspaces: optax.Updates
    bases: optax.Updates | None
    residuals: Any
    inner: optax.OptState


def projected(
    call: str,
    inner: optax.GradientTransformation,
    rank: int | float | Callable[[int, int], int],
    *,
    basis: str = "dct",
    ranking: Literal["l1", "l2"] = "l2",
    retain: jax.typing.ArrayLike | None = None,
    update_every: int = 1,
    buffer_dtype: Any = None,
    buffer_argument: str = "buffer_dtype",
    rounding: str = "nearest",
    seed: int = 0,
    mu_bits: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`low_rank`, for a call whose name, and name of the buffer's dtype, stand in errors.

    With `mu_bits`, `inner` is Adam, and its first moment is kept in so many bits an entry.
    """
    check.transformation(f"{call}: inner", inner)
    check_rank(call, rank)
    check.choice(f"{call}: basis", basis, BASES)
    check.choice(f"{call}: ranking", ranking, RANKINGS)
    if retain is not None:
        check.number(f"{call}: retain", retain, "[0, 1)")
    check.integer(f"{call}: update_every", update_every)
    check.floating_dtype(f"{call}: {buffer_argument}", buffer_dtype, names=tuple(BITS))
    check.choice(f"{call}: rounding", rounding, ROUNDINGS)
    check.integer(f"{call}: seed", seed, "[0, inf)")
    bits = BITS.get(buffer_dtype) if isinstance(buffer_dtype, str) else None
    sees_params = not isinstance(inner, EachMatrix) or inner.needs_params
    inner = optax.with_extra_args_support(inner)

    kind = Kind(call, basis, ranking, seed)

    def check_complex(frames: list[Frame], xs: list[jax.Array], argument: str, dtype: Any) -> None:
        """Raises, naming the leaf, if what is kept would lose the imaginary part."""
        if dtype is None or jnp.issubdtype(dtype, jnp.complexfloating):
            return
        for frame, x in zip(frames, xs, strict=True):
            if jnp.issubdtype(x.dtype, jnp.complexfloating):
                raise TypeError(
                    f"{call}: '{frame.path}' is complex, and {argument}={dtype!r} is not."
                )

    def save(
        frames: list[Frame], xs: list[jax.Array], dtypes: list[Any], structure: Any, count: Any
    ) -> Any:
        check_complex(frames, xs, buffer_argument, buffer_dtype)
        if bits is not None:
            stochastic = seed if rounding == "stochastic" else None
            return quantize_leaves(frames, xs, structure, bits=bits, seed=stochastic, count=count)
        kept = [x.astype(dtype) for x, dtype in zip(xs, dtypes, strict=True)]
        return structure.unflatten(kept)

    def load(frames: list[Frame], saved: Any, structure: Any) -> list[jax.Array]:
        if bits is not None:
            return dequantize_leaves(frames, saved, structure, bits)
        return structure.flatten_up_to(saved)

    def init(params: optax.Params) -> Any:
        leaves, structure = jax.tree.flatten(params)
        bases = random_matrices(params, rank, kind) if basis == "random" else None
        frames = make_frames(params, rank, kind, bases)
        if retain is not None:
            check_complex(frames, leaves, buffer_argument, buffer_dtype)
        if mu_bits is not None:
            check_complex(frames, leaves, "mu_dtype", f"int{mu_bits}")
        kept = [*map(Frame.first, frames, leaves)]
        # What inner keeps is as large as the coordinates, not as the params.
        lows = structure.unflatten(map(Frame.first_low, frames, leaves))
        inner_state = inner.init(lows)
        check_inner_state(call, inner, inner_state, structure.unflatten(frames))
        inner_state = place_inner_state(inner, inner_state, lows)
        if mu_bits is not None:
            inner_state = with_quantized_mu(inner_state, mu_bits, start=True)
        count = jnp.zeros([], jnp.int32)
        residuals = None
        if retain is not None:
            if bits is None:
                zeros = [
                    frame.first_buffer(x, buffer_dtype)
                    for frame, x in zip(frames, leaves, strict=True)
                ]
                residuals = structure.unflatten(zeros)
            else:
                residuals = in_one([quantized_zeros(x, bits) for x in leaves], structure)
        return LowRankState(count, structure.unflatten(kept), bases, residuals, inner_state)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        gradients, structure = jax.tree.flatten(updates)
        frames = make_frames(updates, rank, kind, state.bases)
        old = structure.flatten_up_to(state.subspaces)
        check_kept(call, frames, old)

        # b = buffer + g: Trion's momentum (Algorithm 1), DCT-AdamW's gradient with its error. On a
        # mesh the projected axis is whole from here on; so it is in the buffer of a state, unless
        # that is quantised, by rows.
        ways = [frame.way for frame in frames]
        xs = [wide(g) for g in gradients]
        saved = [] if retain is None else load(frames, state.residuals, structure)
        if retain is not None and bits is not None:
            xs = [x + residual.astype(x.dtype) for x, residual in zip(xs, saved, strict=True)]
        xs = lay(xs, ways)
        if retain is not None and bits is None:
            laid = lay(saved, ways)
            xs = [x + residual.astype(x.dtype) for x, residual in zip(xs, laid, strict=True)]

        held = state.inner if mu_bits is None else with_whole_mu(state.inner, mu_bits)

        def choose() -> tuple[Any, Any, Any]:
            # The r columns where b Q is largest, and b's coordinates there, low = b Q_r. What the
            # inner state holds for a column that stays goes where the column is now.
            pairs = [*map(Frame.choose, frames, xs, old)]
            new, low = [kept for kept, _ in pairs], [coordinates for _, coordinates in pairs]
            moved = held
            if jax.tree.leaves(held):
                trees = structure.unflatten(frames), state.subspaces, structure.unflatten(new)
                moved = move_inner_state(inner, held, *trees, start=state.count == 0)
            return new, low, moved

        def keep() -> tuple[Any, Any, Any]:
            return old, [*map(Frame.project, frames, xs, old)], held

        if update_every == 1:
            new, low, inner_state = choose()
        else:  # between choices, as GaLore does, only the coordinates are new
            new, low, inner_state = cond(state.count % update_every == 0, choose, keep)

        # inner sees gradients and params of rank r, in the dtypes that it would see of whole ones.
        low = [x.astype(g.dtype) for x, g in zip(low, gradients, strict=True)]
        low_params = None
        if params is not None and sees_params:
            whole = lay([jnp.asarray(x) for x in structure.flatten_up_to(params)], ways)
            low_params = structure.unflatten(map(_projected, frames, whole, new))
        directions, inner_state = inner.update(
            structure.unflatten(low), inner_state, low_params, **extra
        )
        if mu_bits is not None:
            inner_state = with_quantized_mu(inner_state, mu_bits)

        # inner(low) Q_r^T, back in the shape of the leaf.
        directions = structure.flatten_up_to(directions)
        results = [
            frame.expand(wide(direction), kept).astype(g.dtype)
            for frame, direction, kept, g in zip(frames, directions, new, gradients, strict=True)
        ]

        # buffer = b - (1 - retain) low Q_r^T: only what was used decays.
        left: list[jax.Array] = []
        if retain is not None:
            left = [
                x - (1 - number_for(x, retain)) * frame.expand(wide(coordinates), kept)
                for frame, x, coordinates, kept in zip(frames, xs, low, new, strict=True)
            ]
        likes: list[Any] = [*gradients]
        if params is not None:  # on Auto axes what is no argument of a step follows what is
            likes = [*map(_on_auto, gradients, structure.flatten_up_to(params))]
        # Both at once, as they go the same way. On Auto axes a buffer that is not quantised stays.
        likes += [None if bits is None and on_auto_axes(x) else x for x in saved]
        back = lay_back([*results, *left], [*ways, *ways[: len(left)]], likes)
        results, left = back[: len(frames)], back[len(frames) :]

        residuals = None
        if retain is not None:
            # In the dtype it had: gradients may come in another one than the params.
            dtypes = [x.dtype for x in saved]
            residuals = save(frames, left, dtypes, structure, state.count)
        count, subspaces = optax.safe_increment(state.count), structure.unflatten(new)
        after = LowRankState(jnp.asarray(count), subspaces, state.bases, residuals, inner_state)
        return structure.unflatten(results), all_alike(after, state)

    return keep_dtypes(optax.GradientTransformationExtraArgs(init, update), matrices_of=call)


def _on_auto(g: jax.Array, param: jax.Array) -> jax.Array:
    """The param if both lie on Auto axes, else the gradient."""
    return param if on_auto_axes(g) and on_auto_axes(param) else g


def _projected(frame: Frame, x: Any, kept: Any) -> Any:
    """Coordinates of params, in their dtype."""
    x = jnp.asarray(x)
    return frame.project(wide(x), kept).astype(x.dtype)
