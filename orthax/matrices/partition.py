"""Which leaf is a matrix: decided once, over the whole tree, and handed to what needs it.

Models hold kernels of any rank, biases and embeddings; Muon's family works on matrices `(*batch,
rows, cols)`. `resolve` decides for each leaf whether and how it is one. Views are static, so
nothing is added to a compiled program but the reshapes.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import optax

from orthax.base import check
from orthax.base.given_shardings import check_sharding, shardings_of
from orthax.base.leaves import given_for, keep_dtypes, params_of
from orthax.base.placing import alike, all_alike
from orthax.matrices.default_rule import Undecided, Verdict, default_verdicts
from orthax.matrices.path_rules import chosen_values
from orthax.matrices.reports import report_missing_names, report_unmatched
from orthax.matrices.shown import Leaf, shown_matrices
from orthax.matrices.view import make_view


@dataclasses.dataclass(frozen=True)
class DecidedLeaves:
    """What a partition decided, for the function that builds one of its chains.

    Called with a transformation, it returns one that shows it the matrices: rows are the fan-in and
    columns the neurons, as in `x @ W`, and a `Packed` leaf is a tuple of matrices.

    Attributes:
      tree: The whole tree, as the user has it.
      decided: For each of its leaves, what was decided.
      call: The user's, for errors.
    """

    tree: Any
    decided: Any
    call: str

    def __call__(
        self, inner: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation, seeing matrices; its updates come back in the leaves' own shape."""
        return shown_matrices(self.call, inner, self.decided)

    def masked(
        self, inner: optax.GradientTransformation, mask: Any
    ) -> optax.GradientTransformation:
        """`optax.masked`, but a callable mask sees the whole tree, not only one chain's leaves."""
        if mask is None:
            return inner
        return optax.masked(inner, lambda _: given_for(mask, self.tree))


_SEVERAL = "names and shapes leave several readings"
Build: TypeAlias = Callable[[DecidedLeaves], optax.GradientTransformation]


def as_matrices(
    inner: optax.GradientTransformation, dimension_numbers: Any = None, *, sharding: Any = None
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
      sharding: How leaves lie on a mesh where their types do not tell, and whether matrices travel
        to one device each if `inner` orthogonalises; see `orthogonalize`.

    Returns:
      A transformation with the state of `inner`.
      State: inner's, in the shapes of the opened leaves.
      Sees: leaves of any shape; params and extra arguments are passed on.

    Raises:
      ValueError: At `init` or `update`, for a leaf that its dimension numbers do not call a matrix,
        or whose names leave its axes undecided; it names the leaf.
      TypeError: For an integer leaf, or one that is no array.

    Example:
      >>> import jax.numpy as jnp, optax, orthax
      >>> count = optax.stateless(lambda u, _: jax.tree.map(lambda x: 0 * x + x.shape[-1], u))
      >>> tx = as_matrices(count, optax.contrib.MuonDimensionNumbers(0, (1, 2)))
      >>> updates, _ = tx.update(jnp.ones((8, 2, 3)), tx.init(jnp.ones((8, 2, 3))))
      >>> updates.shape, updates[0, 0, 0].item()
      ((8, 2, 3), 6.0)
    """
    check.transformation("as_matrices: inner", inner)
    check_sharding("as_matrices", sharding)

    def shown(tree: Any) -> optax.GradientTransformationExtraArgs:
        decided = _placed("as_matrices", tree, dimension_numbers, sharding)
        for leaf in decided:
            if leaf.view is None:
                raise ValueError(
                    f"as_matrices: '{leaf.path}' with shape {np.shape(leaf.value)} is not a "
                    f"matrix ({leaf.reason}); send it elsewhere with orthax.partition_matrices or "
                    "give its dimension numbers."
                )
        leaves = jax.tree.structure(tree).unflatten(decided)
        return shown_matrices("as_matrices", inner, leaves)

    return _built_for_each_tree("as_matrices", dimension_numbers, shown)


def partition_matrices(
    matrices: optax.GradientTransformation | Build,
    rest: optax.GradientTransformation | Build,
    dimension_numbers: Any = None,
    *,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Sends leaves that are matrices to one transformation and all others to another.

    Args:
      matrices: Transformation for the leaves whose dimension numbers are not None. It sees them in
        their own shape. Usually a function that builds it: called with `leaves`, it returns a chain
        in which `leaves(inner)` shows `inner` the matrices, as this call decided them, and
        `leaves.masked(inner, mask)` is `optax.masked` whose callable mask sees the whole tree.
      rest: Transformation for the other leaves, or a function that builds it.
      dimension_numbers: As in `as_matrices`; None there means `rest`. A callable sees the whole
        tree.
      sharding: As in `as_matrices`, for what a function shows the matrices.

    Returns:
      A transformation with an `optax.PartitionState`. Where a function builds a chain, float16 is
      accumulated in float32, and updates and state keep their dtypes.
      State: of both parts, each with `optax.MaskedNode` in the place of the other's leaves.
      Sees: any leaf; params and extra arguments are passed on.

    Raises:
      ValueError: At `init` or `update`, for a leaf whose names leave its axes undecided.
      TypeError: If a part is neither a transformation nor a function.

    Example:
      >>> import jax.numpy as jnp, optax, orthax
      >>> params = {"dense": {"kernel": 3 * jnp.eye(2), "bias": jnp.ones(2)}}
      >>> tx = partition_matrices(
      ...     lambda leaves: optax.chain(optax.trace(0.9), leaves(orthax.orthogonalize())),
      ...     optax.scale(2.0),
      ... )
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> print(updates["dense"]["kernel"].round(1), updates["dense"]["bias"])
      [[1.1 0. ]
       [0.  1.1]] [2. 2.]
    """
    return partition("partition_matrices", matrices, rest, dimension_numbers, sharding)


def partition(
    call: str,
    matrices: optax.GradientTransformation | Build,
    rest: optax.GradientTransformation | Build,
    dimension_numbers: Any,
    sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`partition_matrices` for an optimizer, whose name stands in error messages."""
    given: dict[Hashable, Any] = {"matrices": matrices, "rest": rest}
    check_sharding(call, sharding)
    built = [name for name, part in given.items() if not check.is_transformation(part)]
    for name in built:
        accepted = "an optax transformation or a function to one"
        check.function(f"{call}: {name}", given[name], accepted)

    def parts(tree: Any) -> optax.GradientTransformationExtraArgs:
        # Built for the tree at hand: what is decided is handed to the chains as a value.
        structure = jax.tree.structure(tree)
        decided = _placed(call, tree, dimension_numbers, sharding)
        labels = ["rest" if leaf.view is None else "matrices" for leaf in decided]
        leaves = DecidedLeaves(tree, structure.unflatten(decided), call)
        chains = {name: part(leaves) if name in built else part for name, part in given.items()}
        for name, chain in chains.items():
            if not hasattr(chain, "update"):
                check.transformation(f"{call}: what {name} returns", chain)
        # A function, as labels in the form of a model that can be called would be taken for one.
        both = optax.partition(chains, lambda _: structure.unflatten(labels))
        return _beside_what_came(keep_dtypes(both)) if built else both

    return _built_for_each_tree(call, dimension_numbers, parts)


def _built_for_each_tree(
    call: str, dimension_numbers: Any, build: Callable[[Any], optax.GradientTransformationExtraArgs]
) -> optax.GradientTransformationExtraArgs:
    """The transformation that `build` makes of the tree at hand: of params, or of updates."""

    def init(params: optax.Params) -> optax.OptState:
        report_unmatched(call, dimension_numbers, params)
        report_missing_names(call, dimension_numbers, params)
        return build(params).init(params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        return build(updates).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _beside_what_came(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """On Auto axes, updates that lie as the params (or gradients) and a state that stays in place.

    Stacks of leaves that lie in several ways have one layout, which the compiler would hand on.
    """

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        results, new = inner.update(updates, state, params, **extra)
        results = alike(results, updates if params is None else params)
        return results, all_alike(new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _placed(call: str, tree: Any, dimension_numbers: Any, sharding: Any) -> list[Leaf]:
    """What was decided of each leaf, and how it lies."""
    decided = resolve(call, tree, dimension_numbers)
    if sharding is None:
        return decided
    given = [False] * len(decided) if sharding is False else shardings_of(call, sharding, tree)
    return [dataclasses.replace(leaf, sharding=s) for leaf, s in zip(decided, given, strict=True)]


def resolve(call: str, tree: Any, dimension_numbers: Any, *, report: bool = False) -> list[Leaf]:
    """Decides for each leaf of a tree, in the order of `jax.tree.leaves`, how it is a matrix.

    A rule sees the leaf's path, its shape and the shapes of all other leaves, never values: the
    bias of a kernel, itself no matrix, may tell which axes are outputs.

    The tree is of arrays or `ShapeDtypeStruct`s; `dimension_numbers` are as in `as_matrices`. A
    leaf that is no array and a matrix that is not floating raise a `TypeError`; an undecided leaf,
    axes that do not fit and a wrong tree a `ValueError`. With `report` an undecided leaf is listed
    instead, without a view.
    """
    paths, names, values = params_of(call, tree)
    chosen = [(..., "")] * len(names)  # `...`: no rule of the user's, so names and shapes decide
    if dimension_numbers is not None and names:
        chosen = chosen_values(call, tree, names, dimension_numbers)
    verdicts: Sequence[Verdict] = [Undecided()] * len(names)
    if any(dims is ... for dims, _ in chosen):
        verdicts = default_verdicts(tuple(paths), tuple(map(np.shape, values)))

    def decide(name: str, value: Any, choice: tuple[Any, str], by_default: Verdict) -> Leaf:
        is_default = choice[0] is ...
        verdict = by_default if is_default else choice
        if isinstance(verdict, Undecided):
            if not report:
                raise Undecided(f"{call}: {verdict}")
            return Leaf(name, value, None, f"undecided: {_SEVERAL}", by_default=True)
        dims, reason = verdict
        view = None if dims is None else make_view(call, name, value, dims)
        return Leaf(name, value, view, reason, by_default=is_default)

    return list(map(decide, names, values, chosen, verdicts))
