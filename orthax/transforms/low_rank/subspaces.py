"""The subspaces of `low_rank`: r orthonormal columns, applied to (..., m, n) from the right.

* `Selection`, `Transformed`, `Stored`: columns of one fixed orthonormal basis Q, kept as their
  indices, (..., r), increasing. When they change, what belonged to an index moves with it.
* `Adaptive`: columns made from the matrix itself, kept as (..., n, r). When they change, what was
  measured along the old ones is rotated to the new ones.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from orthax.linalg.bases.cosine import check_length, cosine_transform, dct_columns
from orthax.linalg.bases.hadamard import check_hadamard_size, hadamard_columns, hadamard_transform
from orthax.linalg.elementary import largest_columns, promoted, unit_max

SELECTIONS = ("dct", "dct3", "random", "hadamard", "columns")
ADAPTIVE = ("svd", "subspace")
BASES = SELECTIONS + ADAPTIVE


@dataclasses.dataclass(frozen=True)
class Selection:
    """Columns of the identity; other fixed bases override the first three methods.

    `ranking` is the norm by which the largest columns of x Q are chosen.
    """

    ranking: Literal["l1", "l2"]

    def transform(self, x: jax.Array) -> jax.Array:
        """All coordinates, x Q."""
        return x

    def project(self, x: jax.Array, indices: jax.Array) -> jax.Array:
        """Coordinates of x, (..., m, r)."""
        return _take_columns(x, indices)

    def expand(self, low: jax.Array, indices: jax.Array, n: int) -> jax.Array:
        """The matrix with these coordinates, (..., m, n)."""
        zeros = jnp.zeros((*low.shape[:-1], n), low.dtype)
        places = jnp.broadcast_to(indices[..., None, :], low.shape)
        return jnp.put_along_axis(zeros, places, low, axis=-1, inplace=False)

    def first(self, _n: int, rank: int, _dtype: Any) -> Any:
        """What a state holds for a matrix before anything was chosen: the first columns."""
        return np.arange(rank, dtype=np.int32)

    def choose(
        self, x: jax.Array, old: jax.Array, along: tuple[str, ...] = ()
    ) -> tuple[jax.Array, jax.Array]:
        """The indices that suit x best, and the coordinates of x there.

        Inside `jax.shard_map` the rows of x may be cut along mesh axes.
        """
        coordinates = self.transform(x)
        indices = largest_columns(coordinates, old.shape[-1], self.ranking, along)
        return indices, _take_columns(coordinates, indices)

    def move(self, x: jax.Array, old: jax.Array, new: jax.Array, _: bool | None) -> jax.Array:
        """Gathers what x, (..., r), has for each old index; a new one starts with zero."""
        same = old[..., :, None] == new[..., None, :]
        moved = _take_columns(x, jnp.argmax(same, axis=-2))
        return jnp.where(jnp.any(same, axis=-2)[..., None, :], moved, jnp.zeros_like(moved))


@dataclasses.dataclass(frozen=True)
class Transformed(Selection):
    """Columns of a basis that is computed where it is needed.

    `multiply` maps x to x Q; `columns` n, indices (..., r) and a dtype to Q[:, indices].
    """

    multiply: Callable[[jax.Array], jax.Array]
    columns: Callable[[int, jax.Array, jax.typing.DTypeLike], jax.Array]

    def transform(self, x: jax.Array) -> jax.Array:
        """All coordinates, x Q."""
        return self.multiply(x)

    def project(self, x: jax.Array, indices: jax.Array) -> jax.Array:
        """Coordinates of x, (..., m, r)."""
        return _product(x, self.columns(x.shape[-1], indices, x.real.dtype))

    def expand(self, low: jax.Array, indices: jax.Array, n: int) -> jax.Array:
        """The matrix with these coordinates, (..., m, n)."""
        return _product(low, self.columns(n, indices, low.real.dtype).mT)


@dataclasses.dataclass(frozen=True)
class Stored(Selection):
    """Columns of a basis that is kept, Q, as a matrix (n, n)."""

    matrix: jax.Array

    def transform(self, x: jax.Array) -> jax.Array:
        """All coordinates, x Q."""
        return _product(x, self.matrix)

    def project(self, x: jax.Array, indices: jax.Array) -> jax.Array:
        """Coordinates of x, (..., m, r)."""
        return _product(x, self._rows(indices).mT)

    def expand(self, low: jax.Array, indices: jax.Array, _: int) -> jax.Array:
        """The matrix with these coordinates, (..., m, n)."""
        return _product(low, self._rows(indices))

    def _rows(self, indices: jax.Array) -> jax.Array:
        return self.matrix.mT[indices]


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Columns that follow the matrix.

    `refresh` maps x and old ones to new ones, (..., n, r); `key` is of random ones to start from.
    """

    refresh: Callable[[jax.Array, jax.Array], jax.Array]
    key: jax.Array

    def first(self, n: int, rank: int, dtype: Any) -> Any:
        """What a state holds for a matrix before anything was chosen: random columns."""
        columns, _ = jnp.linalg.qr(jax.random.normal(self.key, (n, rank), dtype))
        return columns

    def choose(self, x: jax.Array, old: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The new columns, and the coordinates of x there."""
        columns = self.refresh(unit_max(x)[0], old)
        return columns, self.project(x, columns)

    def project(self, x: jax.Array, columns: jax.Array) -> jax.Array:
        """Coordinates of x, (..., m, r)."""
        return _product(x, columns)

    def expand(self, low: jax.Array, columns: jax.Array, _: int) -> jax.Array:
        """The matrix with these coordinates, (..., m, n)."""
        return _product(low, columns.mT.conj())

    def move(self, x: jax.Array, old: jax.Array, new: jax.Array, signed: bool | None) -> jax.Array:
        """Rotates x, (..., r), to the new columns.

        What has signs turns by R = old^T new, and the variances of uncorrelated coordinates by the
        squares of R's entries. If it is not known which x is, its entries tell.
        """
        rotation = _product(old.mT.conj(), new)
        if jnp.iscomplexobj(x):
            return _product(x, rotation)
        if signed is None:
            squared = jnp.all(x >= 0, axis=(-2, -1), keepdims=True)
        else:
            squared = jnp.asarray(not signed)
        return _product(x, jnp.where(squared, jnp.abs(rotation) ** 2, rotation.real))


@dataclasses.dataclass(frozen=True)
class Whole:
    """No subspace: of matrices whose rank is not above the one that is asked for."""

    def first(self, _n: int, _rank: int, _dtype: Any) -> Any:
        """Nothing is kept."""
        return optax.MaskedNode()

    def choose(self, x: jax.Array, old: Any) -> tuple[Any, jax.Array]:
        """Nothing, and x."""
        return old, x

    def project(self, x: jax.Array, _: Any) -> jax.Array:
        """The same matrix."""
        return x

    def expand(self, low: jax.Array, _kept: Any, _n: int) -> jax.Array:
        """The same matrix."""
        return low

    def move(self, x: jax.Array, _old: Any, _new: Any, _signed: bool | None) -> jax.Array:
        """The same state."""
        return x


Subspace = Selection | Adaptive | Whole

# Arrays in them are arguments of what runs on a mesh.
for _kind in (Selection, Transformed, Stored, Adaptive, Whole):
    _names = [field.name for field in dataclasses.fields(_kind)]
    _data = [name for name in _names if name in ("matrix", "key")]
    jax.tree_util.register_dataclass(_kind, _data, [n for n in _names if n not in _data])


class Kind(NamedTuple):
    """The arguments of `low_rank` that say which subspaces it takes, and its name for errors.

    `seed` is of the columns that adaptive ones start from, and of random bases.
    """

    call: str
    basis: str
    ranking: Literal["l1", "l2"]
    seed: int


def make_subspace(path: str, n: int, kind: Kind, matrix: jax.Array | None) -> Subspace:
    """The family and the functions that a name stands for, for columns of length n.

    `matrix` is the basis "random", which is kept; None for all others.
    """
    call, basis, ranking, seed = kind
    if basis in ADAPTIVE:
        refresh = _singular_vectors if basis == "svd" else _power_step
        return Adaptive(refresh, jax.random.key(seed))
    if basis == "columns":
        return Selection(ranking)
    if basis == "hadamard":
        check_hadamard_size(f"{call}: '{path}'", n)
        return Transformed(ranking, hadamard_transform, hadamard_columns)
    if basis == "random":
        assert matrix is not None
        return Stored(ranking, matrix)
    check_length(f"{call}: '{path}'", n)
    if basis == "dct":
        return Transformed(ranking, cosine_transform, dct_columns)
    inverse = functools.partial(cosine_transform, inverse=True)
    return Transformed(ranking, inverse, functools.partial(dct_columns, transposed=True))


def _take_columns(x: jax.Array, indices: jax.Array) -> jax.Array:
    """The columns (..., m, r) of x, (..., m, n), with indices (..., r)."""
    return jnp.take_along_axis(x, indices[..., None, :], axis=-1)


def _singular_vectors(x: jax.Array, old: jax.Array) -> jax.Array:
    """The right singular vectors of the largest singular values."""
    _, _, vectors = jnp.linalg.svd(x, full_matrices=False)
    return vectors[..., : old.shape[-1], :].mT.conj()


def _power_step(x: jax.Array, old: jax.Array) -> jax.Array:
    """One step of subspace iteration for the same vectors."""
    columns, _ = jnp.linalg.qr(_product(x.mT.conj(), _product(x, old)))
    return columns


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(*promoted(x, y), precision="highest")
