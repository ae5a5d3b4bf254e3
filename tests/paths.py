"""The path of an optimizer through parameters, gradient by gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tolerances


def updates_of(optimizer, params, grads, *, compiled=True):
    """Updates for every gradient, at the parameters that the updates before it lead to."""
    state = optimizer.init(params)
    update = jax.jit(optimizer.update) if compiled else optimizer.update
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        yield updates


def run(optimizer, params, grads):
    """Parameters after every gradient."""
    for updates in updates_of(optimizer, params, grads):
        params = optax.apply_updates(params, updates)
        yield params


def assert_follows(optimizer, params, grads, oracle, *, limit=tolerances.GOLDEN_STEP, floor=0.0):
    """The path of every leaf is the oracle's, within a part of the largest entry of each step.

    `oracle(p, grads)` gives the parameters after each gradient; `floor` is a part of the largest
    parameter that is allowed as well.
    """
    paths = {leaf: [p, *oracle(p, [g[leaf] for g in grads])] for leaf, p in params.items()}
    for t, after in enumerate(run(optimizer, params, grads)):
        for leaf, path in paths.items():
            step = np.abs(path[t + 1] - path[t]).max()
            error = np.abs(after[leaf] - path[t + 1]).max()
            assert error < limit * step + floor * np.abs(path[t]).max(), (t, leaf, error / step)


def slice_by_slice(oracle, p, grads):
    """The path of a leaf that may be a stack of matrices."""
    if p.ndim == 2:
        return oracle(p, grads)
    slices = [oracle(x, [g[i] for g in grads]) for i, x in enumerate(p)]
    return [np.stack(step) for step in zip(*slices, strict=True)]


def part_of_the_loss_left(optimizer, steps):
    """By a least squares problem with a kernel (16, 12), from zero."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((64, 16)).astype(np.float32)
    targets = inputs @ rng.standard_normal((16, 12)).astype(np.float32)

    def loss(params):
        return jnp.mean((inputs @ params["kernel"] - targets) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = {"kernel": jnp.zeros((16, 12))}
    state, start = optimizer.init(params), loss(params)
    for _ in range(steps):
        params, state = step(params, state)
    return loss(params) / start
