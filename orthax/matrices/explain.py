"""`explain`: where each leaf of a tree goes and how it is read, as a table."""

import dataclasses
import math
from typing import Any

import numpy as np
import optax

from orthax.matrices.partition import Leaf, resolve
from orthax.matrices.view import MatrixView


@dataclasses.dataclass(frozen=True)
class ExplainedLeaf:
    """One line in the table of `explain`: a leaf.

    Attributes:
      path: Keys joined by `/`.
      shape: Shape of the leaf.
      view: Shape of the matrices, sections joined by `+`; empty for the fallback.
      batch: Number of matrices.
      fan_in: Rows of each matrix; `fan_out`: columns, of each section of a packed leaf.
      destination: `matrices`, `fallback` or `undecided`; `reason`: the rule that decided.
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
class Explanation:
    """What `explain` returns: rows, and a text that lines them up when printed."""

    rows: tuple[ExplainedLeaf, ...]

    def __str__(self) -> str:
        titles = [field.name for field in dataclasses.fields(ExplainedLeaf)]
        cells = [titles, *([str(getattr(row, title)) for title in titles] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        widths[-1] = 0
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        )

    __repr__ = __str__


def explain(params: optax.Params, dimension_numbers: Any = None) -> Explanation:
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
    leaves = resolve("explain", params, dimension_numbers, report=True)
    return Explanation(tuple(map(_line, leaves)))


def _line(leaf: Leaf) -> ExplainedLeaf:
    shape = np.shape(leaf.value)
    if leaf.view is None:
        destination = "undecided" if leaf.reason.startswith("undecided") else "fallback"
        return ExplainedLeaf(leaf.path, shape, "", "", "", "", destination, leaf.reason)
    views = leaf.view.sections if not isinstance(leaf.view, MatrixView) else (leaf.view,)
    batch = sum(math.prod(view.batch) for view in views)
    fan_in = " + ".join(str(size) for size in dict.fromkeys(view.fan_in for view in views))
    fan_out = " + ".join(str(view.fan_out) for view in views)
    return ExplainedLeaf(
        leaf.path, shape, str(leaf.view), str(batch), fan_in, fan_out, "matrices", leaf.reason
    )
