"""Reading one array as matrices: `MatrixView`, `Packed` and how dimension numbers become views."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from orthax.base.exchange import Cuts
from orthax.base.leaves import explicit_sharding, on_auto_axes, spec_of
from orthax.base.placing import alike, laid_out

DimensionNumbers: TypeAlias = optax.contrib.MuonDimensionNumbers


@dataclasses.dataclass(frozen=True)
class Packed:
    """Dimension numbers of a leaf that holds several matrices side by side (fused QKV, gate + up).

    Each section is orthogonalised, normalised and scaled alone, as if it were a leaf of its own.

    Attributes:
      dims: Dimension numbers of the whole leaf; every section is read with them.
      axis: The axis of the leaf along which the sections lie.
      sections: The number of equal sections, or the size of each (unequal heads, as in GQA).

    Example:
      >>> import jax, orthax
      >>> from optax.contrib import MuonDimensionNumbers
      >>> fused = orthax.Packed(MuonDimensionNumbers(0, 1), axis=1, sections=(64, 16, 16))
      >>> params = {"qkv": {"kernel": jax.ShapeDtypeStruct((64, 96), "float32")}}
      >>> rules = orthax.PathRules(((r"qkv/kernel", fused),))
      >>> print(orthax.explain(params, rules).rows[0].view)
      (64, 64) + (64, 16) + (64, 16)
    """

    dims: DimensionNumbers
    axis: int
    sections: int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A static reading of one array as `(*batch, rows, cols)`.

    Rows are the fan-in (the axes that `x @ W` sums over), columns the neurons. Several reduction or
    output axes are merged; batch axes stay apart, in their order. The view of an `(m, n)` or
    `(L, m, n)` array with the matrix in its last axes changes nothing.

    Attributes:
      shape: Shape of the array.
      batch_axes: Axes that count matrices.
      reduction_axes: Axes merged into the rows.
      output_axes: Axes merged into the columns.
      is_identity: Whether the matrix is in the array's last axes already.
    """

    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    reduction_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    is_identity: bool = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        in_order = self._permutation == tuple(range(len(self.shape)))
        in_place = in_order and self.matrix_shape == self.shape
        object.__setattr__(self, "is_identity", in_place)

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.shape[a] for a in self.batch_axes)

    @property
    def fan_in(self) -> int:
        """Number of rows."""
        return math.prod(self.shape[a] for a in self.reduction_axes)

    @property
    def fan_out(self) -> int:
        """Number of columns."""
        return math.prod(self.shape[a] for a in self.output_axes)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of the opened view, `(*batch, fan_in, fan_out)`."""
        return (*self.batch, self.fan_in, self.fan_out)

    @property
    def _permutation(self) -> tuple[int, ...]:
        return self.batch_axes + self.reduction_axes + self.output_axes

    def _of_stack(self, rest: tuple[int, ...]) -> "MatrixView":
        """The view of a stack of any size, whose axes but the first are those of one matrix."""
        chosen = sorted(self.reduction_axes + self.output_axes)
        at = {axis: 1 + i for i, axis in enumerate(chosen)}
        reduction, output = (
            tuple(at[a] for a in axes) for axes in (self.reduction_axes, self.output_axes)
        )
        return MatrixView((-1, *rest), (0,), reduction, output)

    def _opened(self, x: jax.Array) -> jax.Array:
        """The array as matrices, on one device."""
        return jnp.reshape(jnp.transpose(x, self._permutation), self.matrix_shape)

    def _closed(self, y: jax.Array) -> jax.Array:
        """The array whose opened view is `y`."""
        permuted = [self.shape[a] for a in self._permutation]
        return jnp.transpose(jnp.reshape(y, permuted), np.argsort(self._permutation).tolist())

    def _opened_spec(self, entries: tuple[Any, ...]) -> PartitionSpec:
        """Spec of the opened view: a merged axis keeps the mesh axes of its first, major part."""
        merged = [entries[axes[0]] for axes in (self.reduction_axes, self.output_axes)]
        return PartitionSpec(*(entries[a] for a in self.batch_axes), *merged)

    def _opened_cuts(self, cuts: Cuts) -> Cuts | None:
        """How rows and columns are cut, if only the major part of a merged axis is; else None."""
        merged = (self.reduction_axes, self.output_axes)
        if any(cuts[a] for axes in merged for a in axes[1:]):
            return None
        return tuple(cuts[axes[0]] for axes in merged)

    def __str__(self) -> str:
        return str(self.matrix_shape)


@dataclasses.dataclass(frozen=True)
class PackedView:
    """The views of the sections of one leaf, along an axis of it; opens to a tuple of matrices."""

    shape: tuple[int, ...]
    axis: int
    sections: tuple[MatrixView, ...]

    is_identity = False

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """Axes that count matrices, of every section."""
        return self.sections[0].batch_axes

    def _of_stack(self, rest: tuple[int, ...]) -> "PackedView":
        """The view of a stack of any size, whose axes but the first are those of one leaf."""
        axis = 1 + self.axis - sum(a < self.axis for a in self.batch_axes)

        def section(view: MatrixView) -> MatrixView:
            size = view.shape[self.axis]
            return view._of_stack((*rest[: axis - 1], size, *rest[axis:]))

        return PackedView((-1, *rest), axis, tuple(map(section, self.sections)))

    def _opened(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """The sections as matrices, on one device."""
        ends = np.cumsum([view.shape[self.axis] for view in self.sections])
        parts = jnp.split(x, ends[:-1].tolist(), axis=self.axis)
        return tuple(view._opened(part) for view, part in zip(self.sections, parts, strict=True))

    def _closed(self, ys: tuple[jax.Array, ...]) -> jax.Array:
        """The leaf whose opened sections are `ys`."""
        parts = [view._closed(y) for view, y in zip(self.sections, ys, strict=True)]
        return jnp.concatenate(parts, axis=self.axis)

    def _opened_spec(self, entries: tuple[Any, ...]) -> tuple[PartitionSpec, ...]:
        """Specs of the opened sections."""
        whole = list(entries)
        whole[self.axis] = None  # a section's size need not divide by the mesh axis
        return tuple(view._opened_spec(tuple(whole)) for view in self.sections)

    def _opened_cuts(self, cuts: Cuts) -> None:  # noqa: ARG002 as in other views
        """Sections end where no mesh axis cuts."""
        return None

    def __str__(self) -> str:
        return " + ".join(str(view) for view in self.sections)


@dataclasses.dataclass(frozen=True)
class ViewReading:
    """A view for what moves whole matrices of meshes: `orthax.base.reading.Reading`."""

    view: MatrixView | PackedView

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """Axes that count matrices."""
        return self.view.batch_axes

    def of_stack(self, rest: tuple[int, ...]) -> "ViewReading":
        """The view of a stack of any size, whose axes but the first are those of one leaf."""
        return ViewReading(self.view._of_stack(rest))

    def opened(self, x: jax.Array) -> Any:
        """The leaf as matrices."""
        return self.view._opened(x)

    def closed(self, y: Any) -> jax.Array:
        """Undoes `opened`."""
        return self.view._closed(y)

    def opened_spec(self, entries: tuple[Any, ...]) -> Any:
        """A `PartitionSpec` for each array that the leaf opens to."""
        return self.view._opened_spec(entries)

    def opened_cuts(self, cuts: Cuts) -> Cuts | None:
        """How rows and columns are cut, if each device can open its own piece of a leaf."""
        return self.view._opened_cuts(cuts)


def open_view(view: MatrixView | PackedView, x: Any) -> Any:
    """Returns `x` (array or `ShapeDtypeStruct`) as `(*batch, rows, cols)`, or a tuple of such."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.eval_shape(view._opened, x)
    sharding = explicit_sharding(x)
    if sharding is None:
        return view._opened(x)
    specs = view._opened_spec(spec_of(sharding, x.ndim))
    is_spec = lambda spec: type(spec) is PartitionSpec  # noqa: E731
    out = jax.tree.map(lambda spec: sharding.update(spec=spec), specs, is_leaf=is_spec)
    return laid_out(view._opened, out)(x)


def close_view(view: MatrixView | PackedView, y: Any, like: jax.Array) -> jax.Array:
    """Undoes `open_view`. The result has the sharding of `like`, the array that was opened."""
    x = laid_out(view._closed, explicit_sharding(like))(y)
    return alike(x, like) if on_auto_axes(like) else x


def make_view(call: str, path: str, leaf: jax.Array, dims: object) -> MatrixView | PackedView:
    """Builds the view of a leaf, or raises a `ValueError`/`TypeError` that names call and leaf."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        has = f"'{path}' has dtype {dtype}"
        raise TypeError(f"{call}: {has}; a matrix must be real or complex floating.")
    if isinstance(dims, Packed):
        return _packed_view(call, path, np.shape(leaf), dims)
    return _matrix_view(call, path, np.shape(leaf), dims)


def _matrix_view(call: str, path: str, shape: tuple[int, ...], dims: object) -> MatrixView:
    if not isinstance(dims, DimensionNumbers):
        accepted = "MuonDimensionNumbers, orthax.Packed of such, and None"
        given = f"dimension numbers of '{path}' are {dims!r}"
        raise TypeError(f"{call}: {given}; accepted are {accepted}.")
    given = f"(reduction_axis={dims.reduction_axis}, output_axis={dims.output_axis})"
    where = f"{call}: '{path}' has shape {shape} but dimension numbers {given}"
    reduction = _axes(where, shape, dims.reduction_axis)
    output = _axes(where, shape, dims.output_axis)
    chosen = reduction + output
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"{where} name an axis twice; reduction and output axes must be disjoint.")
    batch = tuple(a for a in range(len(shape)) if a not in chosen)
    return MatrixView(shape, batch, reduction, output)


def _packed_view(call: str, path: str, shape: tuple[int, ...], packed: Packed) -> PackedView:
    where = f"{call}: '{path}' has shape {shape} but {packed}"
    (axis,) = _axes(where, shape, (packed.axis,))
    size, sections = shape[axis], packed.sections
    if _is_int(sections):
        if sections < 1 or size % sections:
            raise ValueError(f"{where} asks for {sections} equal sections of {size} entries.")
        sections = (size // sections,) * int(sections)
    if not (isinstance(sections, tuple | list) and all(map(_is_int, sections))):
        raise TypeError(f"{where}: sections are an int, or a tuple of ints, the size of each.")
    if sum(sections) != size or min(sections, default=0) < 1:
        raise ValueError(f"{where} has sections of {sum(sections)} entries in all, not {size}.")
    views = tuple(
        _matrix_view(call, path, (*shape[:axis], part, *shape[axis + 1 :]), packed.dims)
        for part in sections
    )
    return PackedView(shape, axis, views)


def _axes(where: str, shape: tuple[int, ...], axes: Any) -> tuple[int, ...]:
    axes = tuple(axes) if isinstance(axes, Iterable) else (axes,)
    if not axes:
        raise ValueError(f"{where} name no axis; at least one is needed.")
    for axis in axes:
        if not _is_int(axis):
            raise TypeError(f"{where} name axis {axis!r}; an axis is an int.")
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"{where} name axis {axis}.")
    return tuple(int(axis) % len(shape) for axis in axes)


def _is_int(x: object) -> TypeGuard[int]:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)
