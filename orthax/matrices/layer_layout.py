"""How one layer reads its kernel, found again in a kernel that may be a stack of layers.

What `orthax.nn` and `orthax.eqx` share: they know a layer's type and feature counts, which say what
its kernel is in one layer; axes beyond that are stacked layers (vmap, scan) and count matrices.
"""

import itertools
import re
from typing import Any, NamedTuple

from orthax.matrices.view import DimensionNumbers, Packed

Pattern = str | re.Pattern[str]


class Layout(NamedTuple):
    """How one layer reads its kernel: shapes without stacked axes, and axes of `shape`.

    Attributes:
      shape: Of the kernel of a single layer.
      reduction: Axes that are summed over; `output`: axes of the neurons. Others count matrices.
      sections: Number of matrices side by side, along the last output axis.
      bias: Shape of the layer's bias, which has the same stacked axes.
      has_matrix: False for depthwise kernels, whose neurons have a matrix of one column each.
    """

    shape: tuple[int, ...]
    reduction: tuple[int, ...]
    output: tuple[int, ...]
    sections: int = 1
    bias: tuple[int, ...] = ()
    has_matrix: bool = True


def place(
    where: str,
    shape: tuple[int, ...],
    bias: tuple[int, ...] | None,
    layer: str,
    layout: Layout,
    advice: str,
) -> DimensionNumbers | Packed | None:
    """Turns axes of one layer into axes of the parameter, which may hold a stack of layers.

    `where` is "call: 'path'", `bias` the shape of the bias beside the parameter and `layer` the
    name of the layer's type. Raises a `ValueError` if the shape is not that of such a layer.
    """
    if not (layout.has_matrix and layout.reduction and layout.output):
        return None
    # `kept` numbers the axes of the parameter as the layer alone would have them.
    stack = _stacked_axes(shape, bias, layout)
    if stack is None:
        raise ValueError(
            f"{where} has shape {shape}, but one {layer} has a kernel of shape {layout.shape}; "
            f"which axes are a stack cannot be told. {advice}"
        )
    kept = [axis for axis in range(len(shape)) if axis not in stack]
    reduction = tuple(kept[axis] for axis in layout.reduction)
    output = tuple(kept[axis] for axis in layout.output)
    dims = DimensionNumbers(reduction, output)
    return dims if layout.sections == 1 else Packed(dims, output[-1], layout.sections)


def _stacked_axes(
    shape: tuple[int, ...], bias: tuple[int, ...] | None, layout: Layout
) -> tuple[int, ...] | None:
    """Returns the axes without which the shape is that of a single layer; None: not decided."""
    rank, extra = len(shape), len(shape) - len(layout.shape)
    fits = [
        axes
        for axes in itertools.combinations(range(rank), max(extra, 0))
        if tuple(shape[axis] for axis in range(rank) if axis not in axes) == layout.shape
    ]
    # Several choices fit where the stack is as large as a feature axis. Stacks usually lead; the
    # bias, which has the same stacked axes, tells where they do not.
    if len(fits) == 1:
        return fits[0]
    leading = tuple(range(extra))
    if leading in fits and (bias is None or bias == shape[:extra] + layout.bias):
        return leading
    elsewhere = [axes for axes in fits if axes != leading]
    return elsewhere[0] if len(elsewhere) == 1 else None


def excluded_patterns(call: str, exclude: Any) -> tuple[Pattern, ...]:
    """The regular expressions of an argument `exclude`: none, one or several."""
    single = isinstance(exclude, str | re.Pattern)
    try:
        patterns = (exclude,) if single else () if exclude is None else tuple(exclude)
        for pattern in patterns:
            re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{call}: exclude={exclude!r} is no regular expression: {error}."
        ) from None
    except TypeError:
        raise TypeError(
            f"{call}: exclude must be a regular expression or a sequence of them, got {exclude!r}."
        ) from None
    return patterns
