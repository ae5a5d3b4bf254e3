"""What `init` warns of and `explain` lists: rules that match nothing, kernels without names."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from orthax.base.leaves import Path, is_masked, joined, path_of, path_text
from orthax.base.warn import warn
from orthax.matrices.path_rules import PathRules, WrittenForModel

_LEAF_NAMES = frozenset({"kernel", "bias", "scale", "embedding", "weight", "w", "b"})


def report_unmatched(call: str, rules: Any, tree: Any) -> None:
    """At `init`: warns of rules that match no leaf of the tree, or raises if they are strict."""
    found = unmatched(rules, tree)
    if found and rules.strict:
        raise ValueError(f"{call}: {' '.join(found)} The rules are strict.")
    for message in found:
        warn(f"{call}: {message}")


def unmatched(rules: Any, tree: Any) -> list[str]:
    """A sentence for each of `PathRules` that matches no leaf, with the path that comes nearest."""
    if not isinstance(rules, PathRules):
        return []
    keyed = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked)
    leaves = [path_text(keys) for keys, leaf in keyed if not is_masked(leaf)]
    masked = [path_text(keys) for keys, leaf in keyed if is_masked(leaf)]
    if not leaves:  # a tree without arrays, or all masked away, has nothing that a rule could name
        return []
    said = []
    for compiled, (pattern, _) in zip(rules.compiled, rules.rules, strict=True):
        if isinstance(pattern, WrittenForModel) or any(map(compiled.search, leaves)):
            continue
        text = _literal(compiled.pattern)
        if any(_may_match_below(compiled, text, path, leaves) for path in masked):
            continue
        near = difflib.get_close_matches(text, [*leaves, *masked], 1, cutoff=0.0)
        nearest = f"; the nearest path is '{near[0]}'" if near else ""
        said.append(f"rule {compiled.pattern!r} matches no leaf{nearest}.")
    return said


def _may_match_below(
    compiled: re.Pattern[str], text: str, path: str, leaves: Sequence[str]
) -> bool:
    """Whether a rule matches a path that was masked away, or one below it.

    A mask may take a whole module away and leave its path alone; what was in it is not known.
    """
    if compiled.search(path):
        return True
    last = path.rpartition("/")[2]
    is_leaf = any(leaf.rpartition("/")[2] == last for leaf in leaves) or last in _LEAF_NAMES
    return not is_leaf and compiled.search(f"{path}/{_after(path, text)}") is not None


def _after(path: str, text: str) -> str:
    """What a rule's text says below a path that it begins with; else the whole text."""
    return text[len(path) + 1 :] if text.startswith(f"{path}/") else text


def _literal(pattern: str) -> str:
    """A regular expression's text without its signs, near enough to compare it with paths."""
    return re.sub(r"\\(.)|[\^$()|?*+]|\[[^]]*\]", lambda found: found.group(1) or "", pattern)


def report_missing_names(call: str, dimension_numbers: Any, params: Any) -> None:
    """At `init`: warns where the default rule reads kernels of several ranks that have no names."""
    if advice := missing_names(params, dimension_numbers):
        warn(f"{call}: {advice}")


def missing_names(params: Any, dimension_numbers: Any, ranks: int = 2) -> str | None:
    """What to say of kernels of so many ranks or more that have no names, or None."""
    shapes: dict[int, tuple[int, ...]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(keys)
        if np.ndim(leaf) < 2 or any(isinstance(part, str) for part in path):
            continue
        if _is_left_to_the_default_rule(path, dimension_numbers):
            shapes.setdefault(np.ndim(leaf), np.shape(leaf))
    if len(shapes) < ranks:
        return None
    such = " and ".join(str(shapes[rank]) for rank in sorted(shapes))
    return (
        f"leaves such as {such} have no names, so each is read as matrices in its last two axes: "
        "embeddings and heads are not told apart, and a convolution becomes a stack. Give a dict "
        "by path, for Keras {v.path: v.value for v in model.trainable_variables}, or "
        "dimension_numbers."
    )


def _is_left_to_the_default_rule(path: Path, dimension_numbers: Any) -> bool:
    if isinstance(dimension_numbers, PathRules):
        return dimension_numbers.lookup(joined(path))[0] is ...
    return dimension_numbers is None
