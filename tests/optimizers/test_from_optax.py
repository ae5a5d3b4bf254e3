"""States of optax.contrib.muon go on as states of orthax.muon, with the same updates."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal_tree, says
from optax.contrib import MuonDimensionNumbers

import orthax
from orthax.linalg import coefficients, newton_schulz

SHAPES = {
    "up": {"kernel": (8, 16), "bias": (16,)},
    "down": {"kernel": (16, 8), "bias": (8,)},
    "head": {"kernel": (8, 3)},
}
RATE = optax.linear_schedule(0.02, 0.0, 100)


def theirs_dims(params):
    """Heads are no matrices, as in orthax.muon."""
    return {
        name: {
            leaf: MuonDimensionNumbers(0, 1) if leaf == "kernel" and name != "head" else None
            for leaf in layer
        }
        for name, layer in params.items()
    }


def theirs(**options):
    dims = options.pop("dims", theirs_dims)
    return optax.contrib.muon(RATE, nesterov=False, muon_weight_dimension_numbers=dims, **options)


ours = functools.partial(
    orthax.muon,
    RATE,
    nesterov=False,
    orthogonalizer=orthax.orthogonalize(newton_schulz, coefficients=coefficients.MUON),
    shape_scale=orthax.scale_by_width(),
)


def steps(optimizer, params, state, seeds):
    update = jax.jit(optimizer.update)
    for seed in seeds:
        updates, state = update(normal_tree(SHAPES, seed=seed), state, params)
        yield updates, state


@pytest.mark.parametrize("beta", [0.95, 0.8])
def test_the_next_ten_updates_are_those_that_optax_would_have_made(beta):
    params = normal_tree(SHAPES)
    before = theirs(beta=beta, adam_b1=0.9, adam_b2=0.999)
    *_, (_, state) = steps(before, params, before.init(params), range(1, 6))
    after = ours(momentum=beta)
    converted = orthax.from_optax_muon(state, after, params, momentum=beta)
    chex.assert_trees_all_equal_structs(converted, after.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, after.init(params))
    for (expected, _), (actual, _) in zip(
        steps(before, params, state, range(6, 16)),
        steps(after, params, converted, range(6, 16)),
        strict=True,
    ):
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, e, atol=1e-5 * np.abs(e).max() + 1e-9, rtol=0)


def test_momentum_keeps_the_dtype_of_the_new_optimizer():
    params = normal_tree(SHAPES)
    state = theirs().init(params)
    converted = orthax.from_optax_muon(state, ours(mu_dtype=jnp.bfloat16), params)
    dtypes = {x.dtype for x in jax.tree.leaves(optax.tree.get(converted, "trace"))}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}


def test_a_leaf_that_is_a_matrix_for_one_only_is_named():
    params = normal_tree(SHAPES)
    state = theirs(dims=None).init(params)  # heads too
    with pytest.raises(ValueError, match=says("'head/kernel'", "dimension_numbers")):
        orthax.from_optax_muon(state, ours(), params)
    state = theirs().init(params)
    every = ours(
        dimension_numbers=lambda p: jax.tree.map(
            lambda x: MuonDimensionNumbers(0, 1) if x.ndim == 2 else None, p
        )
    )
    with pytest.raises(ValueError, match=says("'head/kernel'", "dimension_numbers")):
        orthax.from_optax_muon(state, every, params)


def test_states_of_other_optimizers_are_refused():
    params = normal_tree(SHAPES)
    with pytest.raises(TypeError, match=says("from_optax_muon", "state", "optax.contrib.muon")):
        orthax.from_optax_muon(optax.adamw(0.1).init(params), ours(), params)
    with pytest.raises(TypeError, match=says("from_optax_muon", "optimizer", "orthax.muon")):
        orthax.from_optax_muon(theirs().init(params), optax.adamw(0.1), params)
    with pytest.raises(TypeError, match=says("from_optax_muon", "optimizer", "trace")):
        orthax.from_optax_muon(theirs().init(params), ours(mu_dtype="int8"), params)
