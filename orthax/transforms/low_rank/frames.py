"""One leaf of `low_rank` and its subspace: which axis is projected, how far, and on what mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import KeyPath

from orthax.base.leaves import explicit_sharding, matrix_leaves, path_text, spec_of
from orthax.base.placing import (
    laid_out,
    replicate_beside,
    resized_zeros,
    zeros_at,
    zeros_beside,
    zeros_like,
)
from orthax.base.rank import rank_of
from orthax.base.turned import Turned, turned
from orthax.linalg.elementary import wide_dtype
from orthax.transforms.low_rank.subspaces import Kind, Selection, Subspace, Whole, make_subspace


@dataclasses.dataclass(frozen=True)
class Frame:
    """A leaf of matrices (..., m, n) and the subspace of its shorter side, rows if they are equal.

    Attributes:
      path: For error messages.
      shape: Of the leaf.
      rank: Dimensions of the subspace.
      subspace: Its family.
      sharding: That of the leaf on Explicit mesh axes, else None.
      way: How the leaf lies on a mesh with the projected axis whole. `choose`, `project` and
        `expand` then work where it lies so. None: they work where the leaf lies.
    """

    path: str
    shape: tuple[int, ...]
    rank: int
    subspace: Subspace
    sharding: NamedSharding | None
    way: Turned | None

    @property
    def axis(self) -> int:
        """The axis that is projected, -2 or -1."""
        return projected_axis(self.shape)

    def first(self, x: Any) -> Any:
        """What a state keeps of the subspace before there was a gradient, beside the leaf x."""
        one = self.subspace.first(self.shape[self.axis], self.rank, wide_dtype(x.dtype))
        if isinstance(one, optax.MaskedNode):
            return one
        batch, whole = self.shape[:-2], one.shape
        if self.way is not None:
            zeros = zeros_at(x, (*batch, *whole), self._spec[:-2], one.dtype)
        else:
            axes = (*range(len(batch)), *(None for _ in whole))
            zeros = zeros_beside(x, (*batch, *whole), axes, one.dtype)
        return zeros + one.reshape(*(1 for _ in batch), *whole)

    def first_low(self, x: Any) -> Any:
        """Zeros in the place of the coordinates of the leaf x, or x where it is left whole."""
        if isinstance(self.subspace, Whole):
            return x
        if self.way is not None:
            return zeros_at(x, self.low_shape, self._spec, x.dtype)
        return resized_zeros(x, self.axis, self.rank, x.dtype)

    def first_buffer(self, x: Any, dtype: Any) -> Any:
        """Zeros like the leaf x, where the subspace is chosen."""
        if self.way is not None:
            return zeros_at(x, self.shape, self._spec, dtype or x.dtype)
        return zeros_like(x, dtype)

    def choose(self, x: jax.Array, old: Any) -> tuple[Any, jax.Array]:
        """The subspace for x, and the coordinates of x in it."""
        along = {"along": self.way.along} if self.way else {}

        def choose(subspace: Subspace, x: jax.Array, old: Any) -> tuple[Any, jax.Array]:
            new, low = subspace.choose(self._turned(x), old, **along)
            return new, self._turned(low)

        run = self._run(choose, (self._spec, self._kept), (self._kept, self._low))
        return run(self.subspace, x, old)

    def project(self, x: jax.Array, kept: Any) -> jax.Array:
        """Coordinates of x: its shape with `rank` along the projected axis."""

        def project(subspace: Subspace, x: jax.Array, kept: Any) -> jax.Array:
            return self._turned(subspace.project(self._turned(x), kept))

        return self._run(project, (self._spec, self._kept), self._low)(self.subspace, x, kept)

    def expand(self, low: jax.Array, kept: Any) -> jax.Array:
        """The matrices with these coordinates."""

        def expand(subspace: Subspace, low: jax.Array, kept: Any) -> jax.Array:
            n = self.shape[self.axis]
            return self._turned(subspace.expand(self._turned(low), kept, n))

        return self._run(expand, (self._low, self._kept), self._spec)(self.subspace, low, kept)

    def move(
        self, start: jax.Array, old: Any, new: Any, x: jax.Array, *, signed: bool | None
    ) -> jax.Array:
        """What belongs to the coordinates of one subspace, x, for another; as it is at the start.

        x has the shape of the coordinates, or 1 along axes other than `axis`. `signed` tells
        whether it has signs, as a first moment; None if its entries must tell.
        """

        def move(x: jax.Array, start: jax.Array, old: Any, new: Any) -> jax.Array:
            moved = self._turned(self.subspace.move(self._turned(x), old, new, signed))
            return jnp.where(start, x, moved.astype(x.dtype))

        return self._as_on_auto(move, explicit_sharding(x))(x, start, old, new)

    @property
    def low_shape(self) -> tuple[int, ...]:
        """Shape of the coordinates."""
        shape = list(self.shape)
        shape[self.axis] = self.rank
        return tuple(shape)

    def _run(self, fun: Callable[..., Any], given: Any, results: Any) -> Callable[..., Any]:
        """`fun` of the subspace and arrays, on each device if the projected axis is whole there."""
        if self.way is not None:
            return self.way.run(fun, (PartitionSpec(), *given), results)
        sharding = self.sharding
        return self._as_on_auto(
            fun, sharding and jax.tree.map(lambda spec: sharding.update(spec=spec), results)
        )

    def _as_on_auto(self, fun: Callable[..., Any], out_sharding: Any) -> Callable[..., Any]:
        """`fun` of arrays on Explicit axes as if these were Auto."""
        return fun if self.sharding is None else laid_out(fun, out_sharding)

    def _turned(self, x: jax.Array) -> jax.Array:
        return x.mT if self.axis == -2 else x

    @property
    def _spec(self) -> PartitionSpec:
        """Of the leaf where the subspace is chosen."""
        if self.way is not None:
            return PartitionSpec(*self.way.laid)
        axes = len(self.shape)
        return PartitionSpec(*(spec_of(self.sharding, axes) if self.sharding else (None,) * axes))

    @property
    def _low(self) -> PartitionSpec:
        spec = list(self._spec)
        if not isinstance(self.subspace, Whole):
            spec[self.axis] = None
        return PartitionSpec(*spec)

    @property
    def _kept(self) -> PartitionSpec:
        return PartitionSpec(*self._spec[:-2])  # the batch axes


def projected_axis(shape: tuple[int, ...]) -> int:
    """The shorter axis of matrices; rows, the fan-in, of square ones."""
    return -2 if shape[-2] <= shape[-1] else -1


def make_frames(tree: optax.Params, rank: Any, kind: Kind, bases: Any) -> list[Frame]:
    """A frame for each leaf of a tree of matrices, or their shapes; `bases` as a state has them."""
    matrices = {len(matrix): matrix for matrix in jax.tree.leaves(bases)}
    leaves, places, _ = matrix_leaves(kind.call, tree)
    frames = []
    for leaf, (path, sharding, *_) in zip(leaves, places, strict=True):
        n = min(np.shape(leaf)[-2:])
        r = min(n, rank_of(kind.call, rank, path, np.shape(leaf)))
        # A leaf of no more rank than is asked for is left whole.
        projected = r < n and np.size(leaf)
        subspace = make_subspace(path, n, kind, matrices.get(n)) if projected else Whole()
        # Adaptive columns are made from whole matrices.
        way = (
            turned(leaf, projected_axis(np.shape(leaf)))
            if isinstance(subspace, Selection)
            else None
        )
        frames.append(Frame(path, np.shape(leaf), r, subspace, sharding, way))
    return frames


def check_kept(call: str, frames: list[Frame], kept: list[Any]) -> None:
    """Raises a `ValueError` if what a state keeps is not of a leaf's rank."""
    for frame, subspace in zip(frames, kept, strict=True):
        found = 0 if isinstance(subspace, optax.MaskedNode) else np.shape(subspace)[-1]
        if found != (0 if isinstance(frame.subspace, Whole) else frame.rank):
            raise ValueError(
                f"{call}: '{frame.path}' with shape {frame.shape} has a state of rank "
                f"{found or 'full'}, but its rank is now {frame.rank}: a state keeps its rank. "
                "Pass the rank it was made with (128 was the default of trion and dct_adamw before "
                "version 0.2, a quarter of the shorter side is now)."
            )


def random_matrices(tree: Any, rank: Any, kind: Kind) -> Any:
    """A random orthogonal matrix for each n, in the place of the first leaf that needs it."""
    drawn = set()

    def draw(keys: KeyPath, leaf: Any) -> Any:
        shape = np.shape(leaf)
        n = min(shape[-2:])
        if n in drawn or rank_of(kind.call, rank, path_text(keys), shape) >= n:
            return optax.MaskedNode()
        drawn.add(n)
        dtype = jnp.finfo(wide_dtype(leaf.dtype)).dtype
        key = jax.random.fold_in(jax.random.key(kind.seed), n)
        return replicate_beside(jax.random.orthogonal(key, n, dtype=dtype), leaf)

    return jax.tree_util.tree_map_with_path(draw, tree)
