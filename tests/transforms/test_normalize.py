import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from helpers import normal

import orthax

# Flax kernels (fan_in, fan_out). More neurons than inputs is "tall" in PyTorch's (out, in).
EXPANDING, CONTRACTING, SQUARE = (16, 40), (40, 16), (24, 24)
SHAPES = [EXPANDING, CONTRACTING, SQUARE, (3, 8, 12)]


def long_axis(shape):
    """Axis that the mean runs over: one number for every vector along the longer side."""
    fan_in, fan_out = shape[-2:]
    return -2 if fan_out >= fan_in else -1


def sequence(shape, steps=4, seed=0):
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.standard_normal((*shape[:-2], 1, shape[-1])))
    return [(rng.standard_normal(shape) * scale).astype(np.float32) for _ in range(steps)]


def run(transformation, updates):
    state = transformation.init(updates[0])
    update = jax.jit(transformation.update)
    for x in updates:
        out, state = update(x, state)
        yield out, state


def norms(x, axis):
    return np.sqrt((oracles.float64(x) ** 2).sum(axis))


def trees(steps=4):
    """Updates of all shapes at once, one tree a step."""
    return list(zip(*(sequence(shape, steps) for shape in SHAPES), strict=True))


def mean_axis(axis, shape):
    return -2 if axis == "output" else long_axis(shape)


@pytest.mark.parametrize("decay", [0.9, 0.0])
@pytest.mark.parametrize("axis", ["output", "long"])
def test_it_is_the_published_normalisation(decay, axis):
    updates, moments = trees(), [0.0] * len(SHAPES)
    outputs = run(orthax.normalize_neurons(decay, axis=axis), updates)
    for tree, (actual, state) in zip(updates, outputs, strict=True):
        for i, (x, shape) in enumerate(zip(tree, SHAPES, strict=True)):
            expected, moments[i] = oracles.normalize_neurons(
                x, moments[i], decay, axis=mean_axis(axis, shape)
            )
            assert actual[i].dtype == x.dtype
            assert oracles.relative_error(actual[i], expected) < 2e-6, shape
            np.testing.assert_allclose(
                norms(actual[i], (-2, -1)), norms(x, (-2, -1)), rtol=1e-6, err_msg=str(shape)
            )
            # The state is the root of the second moment, one number a neuron.
            assert state.rms[i].shape == moments[i].shape
            assert oracles.relative_error(state.rms[i], np.sqrt(moments[i])) < 1e-6
        assert sum(leaf.size for leaf in jax.tree.leaves(state)) == sum(v.size for v in moments)


def test_the_defaults_are_those_of_the_paper():
    updates, v = sequence(CONTRACTING), 0.0
    for x, (actual, _) in zip(updates, run(orthax.normalize_neurons(), updates), strict=True):
        expected, v = oracles.normalize_neurons(x, v, 0.95)
        assert oracles.relative_error(actual, expected) < 2e-6


def test_without_memory_all_neurons_get_the_same_norm():
    (x,) = sequence((64, 256), steps=1)
    assert oracles.spread(x, -2) > 0.5
    ((actual, _),) = run(orthax.normalize_neurons(decay=0.0), [x])
    assert oracles.spread(actual, -2) < 1e-6
    assert oracles.spread(actual, -1) > 0.01


def test_the_first_step_equalises_whatever_the_decay():
    """A missing bias correction is one factor for all neurons, which the norm takes out again."""
    (x,) = sequence(EXPANDING, steps=1)
    ((slow, _),) = run(orthax.normalize_neurons(decay=0.999), [x])
    expected = x / norms(x, -2) * norms(x, (-2, -1)) / EXPANDING[1] ** 0.5
    assert oracles.relative_error(slow, expected) < 2e-6


def test_orthonormal_neurons_are_left_alone_by_output_but_not_by_long():
    """With no more neurons than inputs, an exact polar factor has neurons of norm one."""
    rng = np.random.default_rng(0)
    x = oracles.orthogonal(rng, 256, 64).astype(np.float32)
    ((output, _),) = run(orthax.normalize_neurons(axis="output"), [x])
    assert oracles.relative_error(output, x) < 1e-6
    ((long, _),) = run(orthax.normalize_neurons(axis="long"), [x])
    assert oracles.relative_error(long, x) > 0.05
    assert oracles.spread(x, -1) > 0.05
    assert oracles.spread(long, -1) < 1e-6


def test_orthonormal_inputs_are_changed_by_both_alike():
    rng = np.random.default_rng(0)
    x = oracles.orthogonal(rng, 64, 256).astype(np.float32)
    ((output, _),) = run(orthax.normalize_neurons(axis="output"), [x])
    ((long, _),) = run(orthax.normalize_neurons(axis="long"), [x])
    assert oracles.spread(x, -2) > 0.05
    assert oracles.spread(output, -2) < 1e-6
    np.testing.assert_array_equal(output, long)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_layer_without_gradient_stays_zero_and_finite(dtype):
    x = jnp.asarray(sequence(EXPANDING, steps=1)[0]).astype(dtype)
    updates = [jnp.zeros_like(x), x, jnp.zeros_like(x), x]
    outputs = [out for out, _ in run(orthax.normalize_neurons(), updates)]
    for out in outputs:
        assert out.dtype == dtype
        assert np.isfinite(oracles.float64(out)).all()
    assert not oracles.float64(outputs[0]).any()
    assert not oracles.float64(outputs[2]).any()
    np.testing.assert_allclose(
        norms(outputs[3], (-2, -1)), norms(x, (-2, -1)), rtol=4 * jnp.finfo(dtype).eps
    )


def test_a_dead_neuron_stays_dead_and_leaves_the_others_finite():
    (x,) = sequence(EXPANDING, steps=1)
    x[:, 3] = 0
    for out, _ in run(orthax.normalize_neurons(), [x, x]):
        assert np.isfinite(out).all()
        assert not np.asarray(out)[:, 3].any()
        alive = np.delete(norms(out, -2), 3)
        np.testing.assert_allclose(alive, alive.mean(), rtol=1e-6)


def test_a_neuron_that_wakes_up_gets_a_bounded_step():
    (x,) = sequence(EXPANDING, steps=1)
    asleep = x.copy()
    asleep[:, 3] = 0
    *_, (out, _) = run(orthax.normalize_neurons(decay=0.9), [asleep, asleep, x])
    v = 0.0
    for g in (asleep, asleep, x):
        expected, v = oracles.normalize_neurons(g, v, 0.9)
    assert oracles.relative_error(out, expected) < 2e-6
    np.testing.assert_allclose(norms(out, (-2, -1)), norms(x, (-2, -1)), rtol=1e-6)


def test_trees_with_none_and_masked_leaves_are_kept():
    (x,), (y,) = sequence(EXPANDING, 1), sequence(CONTRACTING, 1, seed=1)
    tree = {"a": x, "b": None, "c": optax.MaskedNode(), "d": {"e": y}}
    ((actual, _),) = run(orthax.normalize_neurons(), [tree])
    assert jax.tree.structure(actual) == jax.tree.structure(tree)
    for found, g in ((actual["a"], x), (actual["d"]["e"], y)):
        assert oracles.relative_error(found, oracles.normalize_neurons(g, 0.0)[0]) < 2e-6


def test_a_dead_neuron_does_not_touch_the_gradient_of_the_others():
    g = normal((5, 4), seed=3)
    dead = np.insert(g, 2, 0, axis=1)
    tx = orthax.normalize_neurons(decay=0.8)

    def loss(g):
        updates, state = tx.update(g, tx.init(g))
        updates, _ = tx.update(jnp.cos(g) * (g != 0), state)
        return jnp.sum(updates**3)

    expected, found = jax.grad(loss)(jnp.asarray(g)), jax.grad(loss)(jnp.asarray(dead))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.delete(found, 2, axis=1), expected, rtol=1e-4, atol=1e-5)


def test_without_eps_a_dead_neuron_stays_zero():
    g = jnp.asarray(np.insert(normal((5, 4)), 2, 0, axis=1))
    tx = orthax.normalize_neurons(eps=0)
    updates, _ = tx.update(g, tx.init(g))
    assert np.isfinite(updates).all()
    assert not np.asarray(updates)[:, 2].any()
