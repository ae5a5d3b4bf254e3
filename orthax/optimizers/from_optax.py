"""A run that was begun with `optax.contrib.muon` goes on with `orthax.muon`."""

from typing import Any

import jax
import optax

from orthax.base import check
from orthax.base.leaves import in_dtype_of, is_masked, path_text


def from_optax_muon(
    state: optax.OptState,
    optimizer: optax.GradientTransformation,
    params: optax.Params,
    *,
    momentum: float = 0.95,
) -> optax.OptState:
    """Makes the state of `optax.contrib.muon` one of `orthax.muon`: momentum, moments and counts.

    optax averages gradients where `orthax.muon` sums them, so momentum is divided by 1 - momentum.
    Without Nesterov, with the same table and shape scale, both then make the same updates:

        optimizer = orthax.muon(
            0.02,
            nesterov=False,
            orthogonalizer=orthax.orthogonalize(newton_schulz, coefficients=coefficients.MUON),
            shape_scale=orthax.scale_by_width(),
        )
        state = orthax.from_optax_muon(state, optimizer, params)

    Args:
      state: Of `optax.contrib.muon`.
      optimizer: What `orthax.muon` returned, for the run to go on with.
      params: The parameters, or their `ShapeDtypeStruct`s.
      momentum: The `beta` that optax's had.

    Returns:
      A state of `optimizer`. Dtypes are those of its own.

    Raises:
      ValueError: If a leaf is a matrix for one of both and not for the other, by name (give
        `muon` the `dimension_numbers` that tell), or `momentum` is outside [0, 1).
      TypeError: If one of the states is not of these optimizers.

    Example:
      >>> import jax.numpy as jnp, orthax
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> theirs = optax.contrib.muon(0.1)
      >>> _, state = theirs.update(params, theirs.init(params), params)
      >>> ours = from_optax_muon(state, orthax.muon(0.1), params)
      >>> print(optax.tree.get(ours, "trace")["kernel"].round(3)[0])
      [1. 1. 1.]
    """
    check.transformation("from_optax_muon: optimizer", optimizer)
    check.number("from_optax_muon: momentum", momentum, "[0, 1)", static=True)
    new = optimizer.init(params)
    muon = _only(state, optax.contrib.MuonState, "state must be that of optax.contrib.muon")
    adam = _only(state, optax.ScaleByAdamState, "state must be that of optax.contrib.muon")
    accepted = "optimizer must be an orthax.muon with optax.trace as momentum"
    trace = _only(new, optax.TraceState, accepted)
    _only(new, optax.ScaleByAdamState, accepted + " and AdamW as fallback")

    def summed(keys: Any, ours: Any, theirs: Any) -> Any:
        if is_masked(ours) != is_masked(theirs):
            kept, needed = ("an average", "moments") if is_masked(ours) else ("moments", "a sum")
            raise ValueError(
                f"from_optax_muon: '{path_text(keys)}' has {kept} in optax's state and needs "
                f"{needed} here: give orthax.muon the dimension_numbers that optax's had."
            )
        return ours if is_masked(ours) else in_dtype_of(theirs / (1 - momentum), ours)

    sums = jax.tree_util.tree_map_with_path(summed, trace.trace, muon.mu, is_leaf=is_masked)

    def replaced(node: Any) -> Any:
        if isinstance(node, optax.TraceState):
            return optax.TraceState(sums)
        if isinstance(node, optax.ScaleByAdamState):
            moments = (
                jax.tree.map(in_dtype_of, t, o) for t, o in zip(adam[1:], node[1:], strict=True)
            )
            return optax.ScaleByAdamState(adam.count, *moments)
        if isinstance(node, optax.ScaleByScheduleState):
            return optax.ScaleByScheduleState(muon.count)
        return node

    return jax.tree.map(replaced, new, is_leaf=_is_state)


_STATES = (optax.TraceState, optax.ScaleByAdamState, optax.ScaleByScheduleState)


def _is_state(node: Any) -> bool:
    return isinstance(node, _STATES)


def _only(state: Any, kind: Any, accepted: str) -> Any:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    found = [node for node in nodes if isinstance(node, kind)]
    if len(found) != 1:
        has = f"{len(found)} of {kind.__name__}"
        raise TypeError(f"from_optax_muon: {accepted}; its state has {has}.")
    return found[0]
