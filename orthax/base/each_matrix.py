"""From a function of one matrix to a transformation of trees of matrices, in one place.

`each_matrix` checks leaves, maps the function over them (`stacks`) and, where leaves lie on a mesh
and it pays, lets each device work on whole matrices of its own (`whole_matrices`). `chain` makes
one transformation of several, so that matrices travel once for all of them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.core import Tracer

from orthax.base.given_shardings import shardings_of
from orthax.base.groups import Leaves
from orthax.base.leaves import check_matrix_leaves, check_params, path_text
from orthax.base.placing import alike
from orthax.base.reading import AsItIs, Reading
from orthax.base.stacks import ALL, NONE, SMALL, columns_of, map_matrices
from orthax.base.whole_matrices import entries_of, on_pieces, one_mesh
from orthax.base.whole_on_auto import on_owners_by_constraints
from orthax.base.whole_on_subsets import on_owners_or_subsets

__all__ = ["ALL", "NONE", "SMALL", "EachMatrix", "chain", "each_matrix"]


@dataclasses.dataclass(frozen=True)
class Step:
    """What `each_matrix` was called with."""

    call: str
    run: Callable[..., Any]
    share: float
    needs_params: bool
    numbers: tuple[Any, ...]
    per_shape: Callable[..., jax.Array] | None
    init: Callable[[Any], tuple[jax.Array, ...]] | None
    state_type: Any
    whole: bool

    def start(self, params: optax.Params) -> optax.OptState:
        """The state for some params."""
        if self.init is None or self.state_type is None:
            return optax.EmptyState()
        check_matrix_leaves(self.call, params)
        leaves, structure = jax.tree.flatten(params)
        columns = columns_of(list(map(self.init, leaves)), len(self.state_type._fields))
        return self.state_type(*map(structure.unflatten, columns))

    def update(self, updates: optax.Updates, state: Any, params: Any) -> tuple[optax.Updates, Any]:
        """The step for every leaf, where it lies."""
        if self.needs_params:
            check_params(self.call, params)
            check_matrix_leaves(self.call, params)
        kept = () if self.state_type is None else state
        trees = [updates, *kept, *([params] if self.needs_params else [])]
        results, *new = map_matrices(
            self.call, self.run, trees, 1 + len(kept), self.numbers, self.share, self.per_shape
        )
        return results, state if self.state_type is None else self.state_type(*new)


class EachMatrix(optax.GradientTransformation):
    """A transformation that treats every matrix of a tree alone; made by `each_matrix` or `chain`.

    Attributes:
      steps: What is done to each matrix, in turn.
      is_chain: Whether the state is a tuple of the steps' states, as of `optax.chain`.
      sharding: How leaves lie where their types do not tell.
    """

    steps: tuple[Step, ...]
    is_chain: bool
    sharding: Any

    @property
    def needs_params(self) -> bool:
        """Whether a step takes the params."""
        return any(step.needs_params for step in self.steps)

    @property
    def whole(self) -> bool:
        """Whether matrices of a mesh travel to one device each."""
        return any(step.whole for step in self.steps)

    def may_travel(self, updates: optax.Updates, given: bool) -> bool:
        """Whether a leaf lies on a mesh, or may for all that its type says."""
        if not self.whole:
            return False
        arrays = (x for x in jax.tree.leaves(updates) if isinstance(x, jax.Array))
        meshes = (jax.typeof(x).sharding.mesh for x in arrays)
        return given or any(not mesh.empty for mesh in meshes)

    def staying(self) -> "EachMatrix":
        """The same where nothing travels."""
        steps = tuple(dataclasses.replace(step, whole=False) for step in self.steps)
        return _transformation(steps, is_chain=self.is_chain)

    def __repr__(self) -> str:
        return f"<orthax.{' -> '.join(step.call for step in self.steps)}>"


def each_matrix(
    call: str,
    step: Callable[..., Any],
    *,
    share: float = NONE,
    needs_params: bool = False,
    numbers: tuple[Any, ...] = (),
    per_shape: Callable[..., jax.Array] | None = None,
    init: Callable[[Any], tuple[jax.Array, ...]] | None = None,
    state_type: Any = None,
    whole: bool = False,
    sharding: Any = None,
) -> EachMatrix:
    """Makes a function of one matrix into a transformation.

    Args:
      call: Name of the public function, for error messages.
      step: Function of matrices (..., m, n) to their update, of the same shape and each by itself;
        with a state, of matrices and what the state holds for them to (update, *new state). Results
        are cast to the dtypes of what came. Leaves without entries are not passed.
      share: Entries up to which leaves of one shape share a stack: NONE, SMALL, or ALL. More than
        NONE asks that `step` commutes with transposition and keeps no state.
      needs_params: Whether `step` takes the params, after the state.
      numbers: Last arguments of `step`: those of the public function that may be traced, which on
        Explicit mesh axes must not be closed over.
      per_shape: Function of a leaf and the numbers to an array that `step` takes in their place:
        computed once for all leaves of a shape, which keeps programs of many leaves small.
      init: From zeros in the place of a leaf, or its `ShapeDtypeStruct`, to what the state holds
        for it: arrays (..., a, b) with the leaf's batch axes. None: there is no state.
      state_type: The state's type, of one tree for each entry of that.
      whole: Whether it is so much work that matrices which a mesh cuts travel to one device each.
      sharding: None, or how the leaves lie where their types do not tell (`given_shardings`).
    """
    made = Step(call, step, share, needs_params, numbers, per_shape, init, state_type, whole)
    return _transformation((made,), is_chain=False, sharding=sharding)


def chain(*transformations: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optax.chain`, whose matrices travel once on a mesh if all are made by `each_matrix`."""
    steps: list[Step] = []
    sharding = None
    for tx in transformations:
        if not isinstance(tx, EachMatrix) or tx.is_chain:
            return optax.chain(*transformations)
        steps += tx.steps
        sharding = tx.sharding if sharding is None else sharding
    return _transformation(tuple(steps), is_chain=True, sharding=sharding)


def _transformation(steps: tuple[Step, ...], *, is_chain: bool, sharding: Any = None) -> EachMatrix:
    def init(params: optax.Params) -> optax.OptState:
        states = tuple(step.start(params) for step in steps)
        return states if is_chain else states[0]

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if made.may_travel(updates, sharding is not None):
            check_matrix_leaves(steps[0].call, updates)
            readings = [AsItIs(tuple(range(x.ndim - 2))) for x in jax.tree.leaves(updates)]
            given = shardings_of(steps[0].call, sharding, updates)
            if (found := run_whole(made, updates, state, params, readings, given)) is not None:
                return found
        updates, states = run(steps, updates, state if is_chain else (state,), params)
        return updates, states if is_chain else states[0]

    made = EachMatrix(init, update)
    made.steps, made.is_chain, made.sharding = steps, is_chain, sharding
    return made


def run(
    steps: Sequence[Step], updates: optax.Updates, states: Sequence[Any], params: Any
) -> tuple[optax.Updates, tuple[Any, ...]]:
    """One step after the other, each on leaves where they lie."""
    after = []
    for step, state in zip(steps, states, strict=True):
        updates, state = step.update(updates, state, params)
        after.append(state)
    return updates, tuple(after)


def run_whole(
    made: EachMatrix,
    updates: optax.Updates,
    state: Any,
    params: Any,
    readings: Sequence[Reading],
    given: Sequence[Any],
    call: str | None = None,
    *,
    travel: bool = True,
) -> tuple[optax.Updates, Any] | None:
    """All steps, each device on whole matrices of its own; None where there is nothing to move.

    Args:
      made: The transformation.
      updates: Leaves in their own shape.
      state: Of what they open to.
      params: Leaves in their own shape.
      readings: How each leaf of `updates` is read as matrices.
      given: The sharding of each where its type does not tell, or None.
      call: The user's, for errors.
      travel: Whether matrices do; otherwise each device takes its pieces for matrices.
    """
    leaves, structure = jax.tree.flatten(updates)
    mesh = one_mesh(leaves, given) if made.whole else None
    if mesh is None:
        return None
    keyed = jax.tree_util.tree_leaves_with_path(updates)
    paths = [path_text(keys) for keys, _ in keyed]
    call = call or made.steps[0].call
    entries = entries_of(call, paths, leaves, given, mesh)
    if entries is None and not travel:
        raise ValueError(
            f"{call}: whole_every needs to know how leaves are cut: on Auto axes of a mesh pass "
            "sharding=, such as jax.tree.map(lambda x: x.sharding, params)."
        )
    widths = [len(step.state_type._fields) if step.state_type else 0 for step in made.steps]
    traced = [isinstance(n, jax.Array) for step in made.steps for n in step.numbers]

    def inside(numbers: Any, updates: Any, columns: list[Any], params: Any) -> Any:
        given = iter(numbers)
        is_traced = iter(traced)
        steps = [
            dataclasses.replace(
                step, numbers=tuple(next(given) if next(is_traced) else n for n in step.numbers)
            )
            for step in made.steps
        ]
        updates, states = run(steps, updates, with_columns(columns), params)
        return updates, columns_in(states)

    def with_columns(columns: list[Any]) -> list[Any]:
        ends = list(itertools.accumulate(widths))
        return [
            step.state_type(*columns[end - width : end]) if width else optax.EmptyState()
            for step, width, end in zip(made.steps, widths, ends, strict=True)
        ]

    def columns_in(states: Sequence[Any]) -> list[Any]:
        return [c for s, width in zip(states, widths, strict=True) for c in (s if width else ())]

    states = state if made.is_chain else (state,)
    numbers = [n for step in made.steps for n in step.numbers if isinstance(n, jax.Array)]
    columns = [structure.flatten_up_to(column) for column in columns_in(states)]
    weights = structure.flatten_up_to(params) if made.needs_params else [None] * len(leaves)

    def moved(numbers: Any, gradients: Any, kept: Any, params: Any) -> Any:
        of = Leaves(mesh, gradients, readings, entries, kept, params)
        if entries is None:
            return on_owners_by_constraints(inside, numbers, of)
        return (on_owners_or_subsets if travel else on_pieces)(inside, numbers, of)

    kept = [[column[i] for column in columns] for i in range(len(leaves))]
    # Outside of a program the collectives would run one by one.
    eager = not any(isinstance(x, Tracer) for x in jax.tree.leaves((leaves, kept, numbers)))
    found = (jax.jit(moved) if eager else moved)(numbers, leaves, kept, weights)
    found = alike([*map(tuple, found)], [*zip(leaves, kept, strict=True)])
    results = [x for x, _ in found]
    columns = [[kept[c] for _, kept in found] for c in range(len(columns))]
    after = tuple(with_columns([structure.unflatten(column) for column in columns]))
    return structure.unflatten(results), after if made.is_chain else after[0]
