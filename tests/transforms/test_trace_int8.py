"""Momentum in 8 bits: optax.trace, rounded to 256 levels of each row after every update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import array_bytes, normal, says
from oracles import rows_in_256_levels

import orthax
from orthax.transforms.trace_int8 import trace_int8

DECAY = 0.9
QUANTISING = ("muon", "normuon", "root", "auon", "hybrid_auon", "trion")


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 5)], ids=str)
def test_it_follows_its_definition(shape, nesterov):
    tx = trace_int8("muon", DECAY, nesterov)
    gradients = [normal(shape, seed=seed) for seed in range(4)]
    state, kept = tx.init(jnp.zeros(shape)), np.zeros(shape)
    for g in gradients:
        updates, state = jax.jit(tx.update)(g, state)
        m = g + DECAY * kept
        np.testing.assert_allclose(updates, g + DECAY * m if nesterov else m, atol=2e-6)
        kept = rows_in_256_levels(m)


def test_rows_of_equal_entries_are_exact_for_ever():
    params = {"kernel": jnp.ones((3, 4))}
    exact, tx = optax.trace(0.95), trace_int8("muon", 0.95, False)
    expected, state = exact.init(params), tx.init(params)
    for value in (0.3, -0.1, 0.7, 0.3, 0.2):
        g = {"kernel": jnp.full((3, 4), value)}
        theirs, expected = exact.update(g, expected)
        ours, state = tx.update(g, state)
        np.testing.assert_allclose(ours["kernel"], theirs["kernel"], rtol=1e-6)


@pytest.mark.parametrize("name", QUANTISING)
def test_every_optimizer_with_momentum_keeps_a_byte_an_entry(name):
    params = {"dense": {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.float32)}}
    optimizer = getattr(orthax, name)
    state = jax.eval_shape(optimizer(0.1, mu_dtype="int8").init, params)
    more = {"normuon": 4 * 256, "trion": 4 * 128}.get(
        name, 0
    )  # neurons; indices, none at full rank
    assert 64 * 256 + 8 * 64 <= array_bytes(state) <= 64 * 256 + 8 * 64 + more


@pytest.mark.parametrize("params_dtype", ["float32", "bfloat16"])
def test_what_goes_on_is_as_wide_as_params(params_dtype):
    params, g = jnp.zeros((4, 8), params_dtype), normal((4, 8)).astype(jnp.bfloat16)
    tx = trace_int8("muon", DECAY, nesterov=True)
    updates, _ = tx.update(g, tx.init(params), params)
    assert updates.dtype == params_dtype


def test_complex_leaves_are_refused_in_the_name_of_the_optimizer():
    params = {"dense": {"kernel": jnp.zeros((4, 8), jnp.complex64)}}
    with pytest.raises(TypeError, match=says("muon", "int8", "dense/kernel", "complex64", "real")):
        orthax.muon(0.1, mu_dtype="int8").init(params)


@pytest.mark.parametrize("dtype", [jnp.int8, np.dtype("int8"), "int16", "int4"])
def test_integer_dtypes_are_refused_with_a_word_about_the_string(dtype):
    with pytest.raises(ValueError, match=says("muon: mu_dtype", "'int8'", "truncate")):
        orthax.muon(0.1, mu_dtype=dtype)
