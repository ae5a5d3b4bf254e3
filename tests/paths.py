"""The path of an optimizer through parameters, gradient by gradient."""

import jax
import optax


def updates_of(optimizer, params, grads):
    """Updates for every gradient, at the parameters that the updates before it lead to."""
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        yield updates


def run(optimizer, params, grads):
    """Parameters after every gradient."""
    for updates in updates_of(optimizer, params, grads):
        params = optax.apply_updates(params, updates)
        yield params
