"""`add_penalty`: the gradient of a penalty on the weights, as `optax.add_decayed_weights` does."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jax.tree_util import KeyPath

from orthax.base import check
from orthax.base.leaves import check_param, check_params, explicit_sharding, path_text, vary_as
from orthax.base.placing import laid_out, replicate_beside
from orthax.base.with_memory import WithMemory, check_measure
from orthax.linalg.elementary import number_for, promoted, wide
from orthax.matrices.path_rules import PathRules
from orthax.matrices.reports import report_unmatched

_CALL = "add_penalty"


class AddPenaltyState(NamedTuple):
    """State of `add_penalty`: a count for schedules, and the memories of penalties, by leaf.

    Where a penalty is no `WithMemory` there is an `optax.MaskedNode`.
    """

    count: jax.Array
    memory: Any


def add_penalty(
    penalty: Callable[[jax.Array], jax.Array] | WithMemory | PathRules,
    strength: optax.ScalarOrSchedule,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds strength times the gradient of a penalty, at the params, to the updates.

    Before the preconditioner it is coupled, as weight decay would be: moments see it as a part of
    the gradient. Between the preconditioner and the learning rate it is decoupled: a step of
    gradient descent on the penalty beside the optimizer's.

    Args:
      penalty: Function of one array to a real scalar, such as those of `orthax.penalties` and
        `orthax.conv_penalties`; a `WithMemory`; or `PathRules` from paths to such, and to None (so
        are paths that no rule matches, without a `default`). In `optax.inject_hyperparams`, list it
        in `static_args`.
      strength: Factor, at least 0, or a schedule of it.
      mask: As in `optax.masked`: a tree of booleans (or prefix), or a callable from params to one;
        False where there is no penalty. None: every leaf has one.

    Returns:
      A transformation whose updates keep shape, dtype and sharding; the gradient is computed in at
      least float32. Of complex params it is the steepest ascent, the conjugate of `jax.grad`'s.
      State: `AddPenaltyState`; memories whole on each device of a mesh (Auto axes: as compiled).
      Sees: any leaf that its penalty takes; needs params. In `orthax.as_matrices`, kernels of any
        rank are matrices; sections of a packed leaf have paths that end in their number.

    Raises:
      ValueError: If `strength` is negative or not finite; at `init` or `update`, what the penalty
        raises, with the leaf's path, and if a rule of `strict` rules matches no leaf (of
        others it warns); at `update`, without params. TypeError: if `penalty` or a value of the
        rules is none, `strength` no number, or a penalty's value no real scalar.

    Example:
      >>> from orthax.penalties import soft_orthogonality
      >>> params = {"kernel": 2 * jnp.eye(2), "bias": jnp.ones(2)}
      >>> tx = add_penalty(PathRules(((r"kernel$", soft_orthogonality),)), strength=0.1)
      >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
      >>> print(updates["kernel"], updates["bias"])
      [[2.4 0. ]
       [0.  2.4]] [0. 0.]
    """
    values = [value for _, value in penalty.rules] if isinstance(penalty, PathRules) else [penalty]
    values += [penalty.default] if isinstance(penalty, PathRules) else []
    accepted = "a function of an array, an orthax.WithMemory, or orthax.PathRules of such and None"
    for value in values:
        if not (isinstance(penalty, PathRules) and (value is None or value is ...)):
            check_measure(f"{_CALL}: penalty", value, accepted)
    check.number_or_schedule(f"{_CALL}: strength", strength, "[0, inf)")

    def penalty_of(keys: KeyPath) -> tuple[str, Any]:
        path = path_text(keys)
        value = penalty.lookup(path)[0] if isinstance(penalty, PathRules) else penalty
        return path, None if value is ... else value

    def init(params: optax.Params) -> AddPenaltyState:
        def memory(keys: KeyPath, leaf: Any) -> Any:
            path, value = penalty_of(keys)
            check_param(_CALL, path, leaf)
            if not isinstance(value, WithMemory):
                return optax.MaskedNode()
            first = _naming(path, value.init, leaf)
            return jax.tree.map(lambda x: vary_as(replicate_beside(x, leaf), leaf), first)

        report_unmatched(_CALL, penalty, params)
        memories = jax.tree_util.tree_map_with_path(memory, params)
        return AddPenaltyState(jnp.zeros([], jnp.int32), memories)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, AddPenaltyState]:
        del extra
        check_params(_CALL, params)
        factor = strength(state.count) if callable(strength) else strength
        keyed, structure = jax.tree_util.tree_flatten_with_path(
            updates, is_leaf=lambda u: u is None
        )
        weights = structure.flatten_up_to(params)
        memories = structure.flatten_up_to(state.memory)
        results, kept = [], []
        for (keys, u), w, memory in zip(keyed, weights, memories, strict=True):
            path, value = penalty_of(keys)
            if value is not None and u is not None:
                # In the gradient's dtype, whatever the penalty's and the strength's are.
                gradient, memory = _naming(path, _gradient, value, w, memory)
                u = jnp.asarray(u)
                sum_of_both = sum(promoted(u, number_for(gradient, factor) * gradient))
                u = jnp.asarray(sum_of_both).astype(u.dtype)
            results.append(u)
            kept.append(memory)
        count = jnp.asarray(optax.safe_increment(state.count))
        return structure.unflatten(results), AddPenaltyState(count, structure.unflatten(kept))

    transformation = optax.GradientTransformationExtraArgs(init, update)
    return transformation if mask is None else optax.masked(transformation, mask)


def _naming(path: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls the function; an error about its argument names the leaf."""
    try:
        return function(*arguments)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        advice = "Leaves without a penalty are left out by mask or by orthax.PathRules."
        raise kind(f"{_CALL}: '{path}': {error} {advice}") from error


def _gradient(penalty: Any, w: Any, memory: Any) -> tuple[jax.Array, Any]:
    """Steepest ascent of the penalty at `w`, where it lies, and the next memory."""
    remembers = isinstance(penalty, WithMemory)
    value_and_memory = penalty.apply if remembers else lambda w, memory: (penalty(w), memory)

    def gradient(w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        # What is not floating is left as it is, for `jax.grad` to refuse.
        floating = jnp.issubdtype(w.dtype, jnp.inexact)
        ascent, after = jax.grad(value_and_memory, has_aux=True)(wide(w) if floating else w, memory)
        # Of complex params `jax.grad` gives the conjugate of the direction of steepest ascent.
        return jnp.conj(ascent), jax.tree.map(lambda x, like: x.astype(like.dtype), after, memory)

    w = jnp.asarray(w)
    sharding, out = explicit_sharding(w), None
    if sharding is not None:
        whole = sharding.update(spec=PartitionSpec())
        out = sharding, jax.tree.map(lambda _: whole, memory)
    return laid_out(gradient, out)(w, memory)
