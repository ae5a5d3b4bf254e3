"""Which leaf is a matrix: `PathRules`, the default rule, and their resolution over a tree.

A rule sees the leaf's path, its shape and the shapes of the other leaves, never values.
"""

import contextlib
import contextvars
import dataclasses
import re
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from orthax._default_rule import Shapes, Undecided, default_rule, path_name
from orthax._views import DimensionNumbers, MatrixView, Packed, PackedView, make_view


@dataclasses.dataclass(frozen=True)
class PathRules:
    r"""Values chosen by a leaf's path: dimension numbers, `None`, penalties, ...

    A path is the leaf's keys joined by `/`, such as `blocks/0/mlp/up/kernel`; the attribute
    `.value` that boxes and NNX variables add is left out. It is a frozen dataclass and not
    callable, so that `optax.inject_hyperparams` does not take it for a schedule.

    Attributes:
      rules: Pairs of a regular expression and a value. The first whose expression is found in the
        path (`re.search`; anchor with `^` and `$`) gives the value.
      default: Value for a path that no rule matches; `...` leaves it to the default rule.

    Example:
      >>> from optax.contrib import MuonDimensionNumbers
      >>> rules = PathRules(
      ...     rules=(
      ...         (r"experts/(up|down)$", MuonDimensionNumbers(-2, -1)),  # (experts, in, out)
      ...         (r"router", None),  # to the fallback
      ...     )
      ... )
      >>> rules.lookup("block/experts/up")[0]
      MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    """

    rules: tuple[tuple[str | re.Pattern[str], Any], ...]
    default: Any = ...
    _compiled: tuple[re.Pattern[str], ...] = dataclasses.field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        try:
            rules = tuple((pattern, value) for pattern, value in self.rules)
            compiled = tuple(re.compile(pattern) for pattern, _ in rules)
        except (TypeError, ValueError, re.error) as error:
            raise ValueError(
                f"PathRules: rules must be pairs (regular expression, value), got {self.rules!r}."
            ) from error
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "_compiled", compiled)

    def lookup(self, path: str) -> tuple[Any, str]:
        """Returns the value for a path and the rule that gave it (`...`: no rule matches)."""
        for compiled, (_, value) in zip(self._compiled, self.rules, strict=True):
            if compiled.search(path):
                return value, f"rule {compiled.pattern!r}"
        return self.default, "default of the rules"


class Leaf(NamedTuple):
    """One leaf of a tree and what was decided about it."""

    path: str
    value: Any
    view: MatrixView | PackedView | None
    reason: str


def resolve(
    call: str, tree: Any, dimension_numbers: Any = None, *, report: bool = False
) -> list[Leaf]:
    """Decides for each leaf of a tree whether and how it is a matrix.

    Args:
      call: Name of the public call, for error messages.
      tree: Arrays or `ShapeDtypeStruct`s.
      dimension_numbers: None (the default rule), one value, a tree or prefix of one, a callable
        from the tree to such a tree, or `PathRules`.
      report: Whether an undecided leaf is listed (view None, the message as reason) or raises.

    Returns:
      One `Leaf` per leaf, in the order of `jax.tree.leaves`; `view` is None for the fallback.

    Raises:
      ValueError: For an undecided leaf, axes that do not fit, a wrong tree; it names the leaf.
      TypeError: For a matrix leaf that is not floating.
    """
    keyed = jax.tree_util.tree_leaves_with_path(tree)
    paths = [leaf_path(keys) for keys, _ in keyed]
    names = [path_name(path) for path in paths]
    shapes = {
        **_surrounding_shapes.get(),
        **{name: np.shape(leaf) for name, (_, leaf) in zip(names, keyed, strict=True)},
    }
    chosen = _chosen_values(call, tree, names, dimension_numbers)

    resolved = []
    for name, path, (_, leaf), (dims, reason) in zip(names, paths, keyed, chosen, strict=True):
        try:
            if dims is ...:
                dims, reason = default_rule(path, shapes)
            view = None if dims is None else make_view(call, name, leaf, dims)
        except Undecided as error:
            if not report:
                raise Undecided(f"{call}: {error}") from None
            view, reason = None, "undecided: names and shapes leave several readings"
        resolved.append(Leaf(name, leaf, view, reason))
    return resolved


def _chosen_values(
    call: str, tree: Any, names: list[str], dimension_numbers: Any
) -> list[tuple[Any, str]]:
    """Returns for each leaf its dimension numbers and the reason; `...` for the default rule."""
    if dimension_numbers is None or not names:
        return [(..., "")] * len(names)
    if isinstance(dimension_numbers, PathRules):
        return [dimension_numbers.lookup(name) for name in names]
    if callable(dimension_numbers):
        dimension_numbers, origin = dimension_numbers(tree), "the callable"
    else:
        origin = "the given value"
    chosen = []

    def spread(dims: Any, subtree: Any) -> None:
        dims = None if isinstance(dims, optax.MaskedNode) else dims
        chosen.extend([(dims, origin)] * len(jax.tree.leaves(subtree)))

    try:
        jax.tree.map(spread, dimension_numbers, tree, is_leaf=_is_value)
    except ValueError as error:
        raise ValueError(
            f"{call}: dimension_numbers must have the tree structure of the params or be a prefix "
            f"of it. {error}"
        ) from error
    return chosen


def _is_value(x: Any) -> bool:
    return x is None or isinstance(x, DimensionNumbers | Packed | optax.MaskedNode)


_surrounding_shapes: contextvars.ContextVar[Shapes] = contextvars.ContextVar(
    "surrounding_shapes", default=types.MappingProxyType({})
)


@contextlib.contextmanager
def surrounding_leaves(tree: Any) -> Iterator[None]:
    """Lets rules inside see all leaves of `tree`, also those that a partition then masks away.

    A bias tells which axes of its kernel are outputs; it goes to the fallback, so the
    transformation that handles the kernel would not see it otherwise.
    """
    shapes = {
        path_name(leaf_path(keys)): np.shape(leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    token = _surrounding_shapes.set({**_surrounding_shapes.get(), **shapes})
    try:
        yield
    finally:
        _surrounding_shapes.reset(token)


def leaf_path(keys: tuple[Any, ...]) -> tuple[str | int, ...]:
    """Returns the components of a JAX key path, without the `.value` of boxes and NNX variables."""
    return tuple(_component(key) for at, key in enumerate(keys) if not _is_box(keys, at))


def _is_box(keys: tuple[Any, ...], at: int) -> bool:
    """Whether a key is the `.value` of a box: the last one, or the first attribute in a container.

    Other attributes of this name belong to the model, such as the value projection of attention.
    """
    if getattr(keys[at], "name", None) != "value":
        return False
    return at == len(keys) - 1 or (at > 0 and not hasattr(keys[at - 1], "name"))


def _component(key: Any) -> str | int:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            value = getattr(key, attribute)
            return value if isinstance(value, int) else str(value)
    return str(key)
