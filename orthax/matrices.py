"""From gradient leaves to matrices and back: `as_matrices`, `partition_matrices`, `explain`.

Muon's family works on matrices `(*batch, rows, cols)`, models hold kernels of any rank, biases and
embeddings. Two wrappers stand between them:

  * `partition_matrices(matrices, rest)` sends each leaf to one of two transformations: what its
    dimension numbers call a matrix to `matrices`, everything else to `rest`.
  * `as_matrices(inner)` shows `inner` every leaf as matrices and turns its updates back.

Muon is `partition_matrices(chain(trace, as_matrices(orthogonalize()), ...), adamw)`. A view is
static, so neither wrapper adds anything to a compiled program but the reshapes.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax

from orthax._dimension_rules import Leaf, PathRules, resolve, surrounding_leaves
from orthax._views import DimensionNumbers, MatrixView, Packed, close_view, open_view

__all__ = [
    "DimensionNumbers",
    "MatrixView",
    "Packed",
    "PathRules",
    "Table",
    "as_matrices",
    "explain",
    "partition_matrices",
]


def as_matrices(
    inner: optax.GradientTransformation, dimension_numbers: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Shows an inner transformation every leaf as `(*batch, rows, cols)`.

    Rows are the fan-in and columns the neurons, as in `x @ W`. Updates and params are opened, at
    `init` and at `update`, and the updates that come back are closed, to their shape, with their
    sharding. A `Packed` leaf is a tuple of matrices inside.

    Args:
      inner: Transformation of trees whose leaves' last two axes are the matrix.
      dimension_numbers: Which axes those are: None (the default rule, see `explain`), one
        `optax.contrib.MuonDimensionNumbers` or `Packed` for all leaves, a tree of them or a prefix
        of it, a callable `params -> tree`, or `PathRules`.

    Returns:
      A transformation with the state of `inner`.
      State: inner's, in the shapes of the opened leaves.
      Sees: leaves of any shape; params and extra arguments are passed on.

    Raises:
      ValueError: At `init` or `update`, for a leaf that its dimension numbers do not call a matrix,
        or whose names leave its axes undecided; it names the leaf.
      TypeError: For an integer leaf.

    Example:
      >>> import jax.numpy as jnp, optax, orthax
      >>> count = optax.stateless(lambda u, _: jax.tree.map(lambda x: 0 * x + x.shape[-1], u))
      >>> tx = as_matrices(count, optax.contrib.MuonDimensionNumbers(0, (1, 2)))
      >>> updates, _ = tx.update(jnp.ones((8, 2, 3)), tx.init(jnp.ones((8, 2, 3))))
      >>> updates.shape, updates[0, 0, 0].item()
      ((8, 2, 3), 6.0)
    """
    inner = optax.with_extra_args_support(inner)

    def views(tree: Any) -> list[Any]:
        leaves = resolve("as_matrices", tree, dimension_numbers)
        for leaf in leaves:
            if leaf.view is None:
                raise ValueError(
                    f"as_matrices: '{leaf.path}' with shape {np.shape(leaf.value)} is not a "
                    f"matrix ({leaf.reason}); send it elsewhere with orthax.partition_matrices or "
                    "give its dimension numbers."
                )
        return [leaf.view for leaf in leaves]

    def opened(tree: Any) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(map(open_view, views(tree), leaves))

    def closed(tree: Any, like: Any) -> Any:
        leaves, structure = jax.tree.flatten(like)
        return structure.unflatten(
            map(close_view, views(like), structure.flatten_up_to(tree), leaves)
        )

    def init(params: Any) -> Any:
        return inner.init(opened(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        opened_params = None if params is None else opened(params)
        results, state = inner.update(opened(updates), state, opened_params, **extra)
        return closed(results, like=updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def partition_matrices(
    matrices: optax.GradientTransformation,
    rest: optax.GradientTransformation,
    dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Sends leaves that are matrices to one transformation and all others to another.

    Args:
      matrices: Transformation for leaves whose dimension numbers are not None. It sees them in
        their own shape; wrap what needs matrices in `as_matrices` with the same dimension numbers.
      rest: Transformation for the other leaves.
      dimension_numbers: As in `as_matrices`; None there means `rest`.

    Returns:
      A transformation with an `optax.PartitionState`.
      State: of both parts, each with `optax.MaskedNode` in the place of the other's leaves.
      Sees: any leaf; params and extra arguments are passed on.

    Raises:
      ValueError: At `init` or `update`, for a leaf whose names leave its axes undecided.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> tx = partition_matrices(optax.scale(0.0), optax.scale(2.0))
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> updates["dense"]["kernel"].sum().item(), updates["dense"]["bias"].sum().item()
      (0.0, 6.0)
    """

    def labels(tree: Any) -> Any:
        leaves = resolve("partition_matrices", tree, dimension_numbers)
        destinations = ["rest" if leaf.view is None else "matrices" for leaf in leaves]
        return jax.tree.structure(tree).unflatten(destinations)

    parts = optax.partition({"matrices": matrices, "rest": rest}, labels)

    def init(params: Any) -> Any:
        with surrounding_leaves(params):
            return parts.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        with surrounding_leaves(updates):
            return parts.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf in the table of `explain`.

    Attributes:
      path: Keys joined by `/`.
      shape: Shape of the leaf.
      view: Shape of the matrices, sections joined by `+`; empty for the fallback.
      batch: Number of matrices.
      fan_in: Rows of each matrix.
      fan_out: Columns of each matrix; the sections' columns for a packed leaf.
      destination: `matrices`, `fallback` or `undecided`.
      reason: The rule that decided.
    """

    path: str
    shape: tuple[int, ...]
    view: str
    batch: str
    fan_in: str
    fan_out: str
    destination: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """What `explain` returns: rows, and a text that lines them up when printed."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        titles = [field.name for field in dataclasses.fields(Row)]
        cells = [titles, *([str(getattr(row, title)) for title in titles] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        widths[-1] = 0
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        )

    __repr__ = __str__


def explain(params: Any, dimension_numbers: Any = None) -> Table:
    """Shows where each leaf goes and how it is read, without raising for undecided ones.

    Args:
      params: A tree of arrays or `ShapeDtypeStruct`s.
      dimension_numbers: As in `as_matrices`.

    Returns:
      A printable table: path, shape, view, batch, fan_in, fan_out, destination and the rule that
      decided. A leaf that the optimizers would refuse has the destination `undecided`.

    Example:
      >>> import jax
      >>> print(explain({"up": {"kernel": jax.ShapeDtypeStruct((4, 8), "float32")}}))
      path       shape   view    batch  fan_in  fan_out  destination  reason
      up/kernel  (4, 8)  (4, 8)  1      4       8        matrices     two axes: (rows, cols)
    """
    return Table(
        tuple(_row(leaf) for leaf in resolve("explain", params, dimension_numbers, report=True))
    )


def _row(leaf: Leaf) -> Row:
    if leaf.view is None:
        undecided = leaf.reason.startswith("undecided")
        destination = "undecided" if undecided else "fallback"
        return Row(leaf.path, np.shape(leaf.value), "", "", "", "", destination, leaf.reason)
    views = leaf.view.sections if not isinstance(leaf.view, MatrixView) else (leaf.view,)
    batch = sum(math.prod(view.batch) for view in views)
    fan_in = " + ".join(str(size) for size in dict.fromkeys(view.fan_in for view in views))
    fan_out = " + ".join(str(view.fan_out) for view in views)
    shape = np.shape(leaf.value)
    return Row(
        leaf.path, shape, str(leaf.view), str(batch), fan_in, fan_out, "matrices", leaf.reason
    )
