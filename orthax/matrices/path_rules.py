"""Dimension numbers as a user gives them: `PathRules`, one value, a tree, or a callable to one."""

import dataclasses
import re
from typing import Any

import jax
import optax

from orthax.base import check
from orthax.base.leaves import given_for, is_masked
from orthax.matrices.view import DimensionNumbers, Packed


@dataclasses.dataclass(frozen=True)
class PathRules:
    r"""Values chosen by a leaf's path: dimension numbers, `None`, penalties, ...

    A path is the leaf's keys joined by `/`, such as `blocks/0/mlp/up/kernel`, without the `.value`
    that boxes and NNX variables add. It is frozen and not callable, so that
    `optax.inject_hyperparams` does not take it for a schedule.

    `init` warns of a rule that matches no leaf, and `explain` lists it. Leaves that a mask or
    partition around took away are matched too.

    Attributes:
      rules: Pairs of a regular expression and a value; the first found (`re.search`) decides.
      default: Value for a path that no rule matches; `...` leaves it to the default rule.
      strict: Whether `init` raises a `ValueError` in the place of the warning. Rules that several
        models share, of which each has only some of the leaves, leave it False.
      compiled: The expressions, compiled.

    Example:
      >>> from optax.contrib import MuonDimensionNumbers
      >>> experts = MuonDimensionNumbers(-2, -1)  # of (experts, in, out); routers to the fallback
      >>> rules = PathRules(rules=((r"experts/(up|down)$", experts), (r"router", None)))
      >>> rules.lookup("block/experts/up")[0]
      MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    """

    rules: tuple[tuple[str | re.Pattern[str], Any], ...]
    default: Any = ...
    strict: bool = False
    compiled: tuple[re.Pattern[str], ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check.flag("PathRules: strict", self.strict)
        accepted = "pairs (regular expression, value)"
        message = f"PathRules: rules must be {accepted}, got {self.rules!r}."
        try:
            if any(isinstance(rule, str) for rule in self.rules):  # two letters are no pair
                raise TypeError
            rules = tuple((pattern, value) for pattern, value in self.rules)
            compiled = tuple(re.compile(pattern) for pattern, _ in rules)
        except TypeError as error:
            raise TypeError(message) from error
        except (ValueError, re.error) as error:
            raise ValueError(message) from error
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "compiled", compiled)

    def lookup(self, path: str) -> tuple[Any, str]:
        """Returns the value for a path and the rule that gave it (`...`: no rule matches)."""
        if not isinstance(path, str):
            raise TypeError(f"PathRules.lookup: path must be a string, got {path!r}.")
        for compiled, (_, value) in zip(self.compiled, self.rules, strict=True):
            if compiled.search(path):
                return value, f"rule {compiled.pattern!r}"
        return self.default, "default of the rules"


class WrittenForModel(str):
    """A pattern that a function wrote for each leaf of a model, and no user.

    It is not reported where it matches nothing: one may train a part of the model's leaves.
    """


def chosen_values(
    call: str, tree: optax.Params, names: list[str], dimension_numbers: Any
) -> list[tuple[Any, str]]:
    """Returns for each leaf its dimension numbers and the reason; `...` for the default rule."""
    if isinstance(dimension_numbers, PathRules):
        return [dimension_numbers.lookup(name) for name in names]
    given, dimension_numbers = dimension_numbers, given_for(dimension_numbers, tree)
    origin = "the given value" if given is dimension_numbers else "the callable"
    chosen = []

    def spread(dims: Any, subtree: Any) -> None:
        # One value of a prefix stands for all leaves below it.
        dims = None if is_masked(dims) else dims
        chosen.extend([(dims, origin)] * len(jax.tree.leaves(subtree)))

    try:
        jax.tree.map(spread, dimension_numbers, tree, is_leaf=_is_value)
    except ValueError as error:
        raise ValueError(
            f"{call}: dimension_numbers must have the tree structure of the params or be a prefix "
            f"of it. {error}"
        ) from error
    return chosen


def _is_value(x: object) -> bool:
    return x is None or isinstance(x, DimensionNumbers | Packed | optax.MaskedNode)
