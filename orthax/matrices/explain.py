"""`explain`: where each leaf of a tree goes and how it is read, as a table."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import optax

from orthax.base.rank import check_rank, rank_of
from orthax.matrices import names, reports
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
      rank: Dimensions that a low-rank optimizer keeps, of each section; empty if not asked.
      destination: `matrices`, `fallback` or `undecided`; `reason`: the rule that decided, and a
        mark on what looks like an output head and is not called so.
    """

    path: str
    shape: tuple[int, ...]
    view: str
    batch: str
    fan_in: str
    fan_out: str
    rank: str
    destination: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` returns: rows and notes, and a text that lines them up when printed.

    Attributes:
      rows: The leaves.
      notes: Sentences on the whole tree: rules that match no leaf, names that are missing, leaves
        that look like output heads.
    """

    rows: tuple[ExplainedLeaf, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        titles = [field.name for field in dataclasses.fields(ExplainedLeaf)]
        if not any(row.rank for row in self.rows):
            titles.remove("rank")
        cells = [titles, *([str(getattr(row, title)) for title in titles] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        widths[-1] = 0
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__


def explain(
    params: optax.Params,
    dimension_numbers: Any = None,
    *,
    rank: int | float | Callable[[int, int], int] | None = None,
) -> Explanation:
    """Shows where each leaf goes and how it is read, without raising for undecided ones.

    The default rule reads names word by word (`LMHead_0`: lm, head). To the fallback go

    * biases, scales and norms, leaves of at most one axis above 1 that are no `kernel`, `w` or
      `weight`, and, beside stacked weights, what is called `b`, `beta`, `gamma`, `offset` or
      `A_log`;
    * embeddings: `embed`, `embedding`, `emb`, `wte`, `wpe`, `pos` in the name of the leaf or of its
      module. `patch_embed/kernel` is one; `patch_embed/proj/kernel` and
      `time_embedding/linear_1/kernel` are linear layers, and matrices;
    * output heads: `logits`, `classifier` or `unembed` in any component of the path, `head` or
      `heads` as its last word, in `lm_head`, and before `dense`, `linear` or `proj`, unless the
      component speaks of attention (`multi`, `attention`, `attn`, `mha`, `num`). `out` and
      `fc_out` are layers inside of blocks too, so they are only marked where they look like heads;
    * depthwise convolutions, by their name (`depthwise`, `dwconv`, `dw`) or as a `conv` of two
      axes. Any other kernel of one input channel is a convolution of one channel;
    * two axes, one of them below 8, without `kernel`, `w` or `weight` in the leaf's name: tables of
      coefficients.

    All else is a matrix where its name, rank and bias leave one reading: a bias has the outputs,
    and the stacked axes, of its weight. `kernel` and `w` have the inputs first, as in Flax, Keras
    and Haiku; a `weight` may have the outputs first, as in torch and Equinox, and is undecided
    where its bias does not tell.

    Args:
      params: A tree of arrays or `ShapeDtypeStruct`s.
      dimension_numbers: As in `as_matrices`.
      rank: That of `low_rank`, `trion` or `dct_adamw` (whose default is 0.25), for a column with
        the dimensions that they keep of each matrix: "32 of 128", or "all 128" where nothing is
        saved. None: no such column.

    Returns:
      A printable table: path, shape, view, batch, fan_in, fan_out, destination and the rule that
      decided. A leaf that the optimizers would refuse has the destination `undecided`. Below it,
      notes on rules that match no leaf, on missing names and on what looks like an output head.

    Example:
      >>> import jax
      >>> print(explain({"up": {"kernel": jax.ShapeDtypeStruct((4, 8), "float32")}}))
      path       shape   view    batch  fan_in  fan_out  destination  reason
      up/kernel  (4, 8)  (4, 8)  1      4       8        matrices     two axes: (rows, cols)
    """
    if rank is not None:
        check_rank("explain", rank, injectable=False)
    leaves = resolve("explain", params, dimension_numbers, report=True)
    heads = _heads_of_other_names(leaves)
    rows = (_line(leaf, leaf.path in heads, rank) for leaf in leaves)
    notes = reports.unmatched(dimension_numbers, params)
    if unnamed := reports.missing_names(params, dimension_numbers, ranks=1):
        notes.append(unnamed)
    notes += [
        f"'{path}' looks like an output head: no matrix takes its outputs. To leave it to the "
        f"fallback, as is usual: orthax.PathRules(((r'^{re.escape(path)}$', None),))."
        for path in heads
    ]
    return Explanation(tuple(rows), tuple(notes))


def _heads_of_other_names(leaves: list[Leaf]) -> list[str]:
    """Paths of what looks like an output head, in a tree that has none by name.

    It is one matrix, its number of outputs is no other's, and nothing takes them as inputs. It has
    fewer outputs than inputs, or is called `out` or `output`.
    """
    if any(leaf.reason.startswith("output head") for leaf in leaves):
        return []
    views = {leaf.path: _views(leaf) for leaf in leaves if leaf.view is not None}
    found = []
    for leaf in leaves:
        said = names.last_words(leaf.path)
        if not (said and leaf.by_default and isinstance(leaf.view, MatrixView) and len(views) > 1):
            continue
        view = leaf.view
        others = [v for path, of in views.items() if path != leaf.path for v in of]
        is_fed_on = any(_takes(other, view) for other in others)
        is_alike = view.batch or any(other.fan_out == view.fan_out for other in others)
        is_last = view.fan_out < view.fan_in or not said.isdisjoint({"out", "output", "outputs"})
        if is_last and not (is_fed_on or is_alike or "router" in said):
            found.append(leaf.path)
    return found


def _takes(other: MatrixView, view: MatrixView) -> bool:
    """Whether the inputs of a matrix may be the outputs of another, or features made of them."""
    features = [other.fan_in, *(other.shape[axis] for axis in other.reduction_axes)]
    flattened = len(view.reduction_axes) > 1 and other.fan_in % max(view.fan_out, 1) == 0
    return view.fan_out in features or flattened


def _views(leaf: Leaf) -> tuple[MatrixView, ...]:
    if leaf.view is None or isinstance(leaf.view, MatrixView):
        return () if leaf.view is None else (leaf.view,)
    return leaf.view.sections


def _line(leaf: Leaf, is_head: bool, rank: Any) -> ExplainedLeaf:
    shape = np.shape(leaf.value)
    if leaf.view is None:
        destination = "undecided" if leaf.reason.startswith("undecided") else "fallback"
        return ExplainedLeaf(leaf.path, shape, "", "", "", "", "", destination, leaf.reason)
    views = _views(leaf)
    batch = sum(math.prod(view.batch) for view in views)
    fan_in = " + ".join(str(size) for size in dict.fromkeys(view.fan_in for view in views))
    fan_out = " + ".join(str(view.fan_out) for view in views)
    ranks = "" if rank is None else " + ".join(_rank(leaf.path, view, rank) for view in views)
    reason = f"{leaf.reason}; looks like an output head" if is_head else leaf.reason
    return ExplainedLeaf(
        leaf.path, shape, str(leaf.view), str(batch), fan_in, fan_out, ranks, "matrices", reason
    )


def _rank(path: str, view: MatrixView, rank: Any) -> str:
    shorter = min(view.fan_in, view.fan_out)
    kept = rank_of("explain", rank, path, (view.fan_in, view.fan_out))
    return f"{kept} of {shorter}" if kept < shorter else f"all {shorter}"
