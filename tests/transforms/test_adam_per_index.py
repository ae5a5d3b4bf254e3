import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import tolerances

import orthax

# The indices are along the shorter axis, of square matrices along the rows.
SHAPES = {
    "tall": ((9, 4), -1),
    "wide": ((4, 9), -2),
    "square": ((6, 6), -2),
    "layers": ((2, 3, 5), -2),
    "tall_layers": ((2, 5, 3), -1),
}


def tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(shape), dtype) for name, (shape, _) in SHAPES.items()
    }


def steps(transformation, updates):
    state = transformation.init(updates[0])
    update = jax.jit(transformation.update)
    for x in updates:
        out, state = update(x, state)
        yield out, state


def adam(updates, b1=0.9, b2=0.999, eps=1e-8):
    """Kingma and Ba, 2014, Algorithm 1."""
    mu = nu = 0.0
    for t, g in enumerate(map(oracles.float64, updates), start=1):
        mu = b1 * mu + (1 - b1) * g
        nu = b2 * nu + (1 - b2) * np.abs(g) ** 2
        yield mu / (1 - b1**t) / (np.sqrt(nu / (1 - b2**t)) + eps)


@pytest.mark.parametrize("kind", [np.float32, np.complex64])
@pytest.mark.parametrize("numbers", [{}, {"b1": 0.8, "b2": 0.95, "eps": 1e-3}])
def test_it_is_adam_where_no_index_changes(numbers, kind):
    updates = [tree(seed) for seed in range(10)]
    if kind == np.complex64:
        updates = [jax.tree.map(jax.lax.complex, x, tree(100 + i)) for i, x in enumerate(updates)]
    expected = {leaf: list(adam([x[leaf] for x in updates], **numbers)) for leaf in SHAPES}
    outputs = steps(orthax.scale_by_adam_per_index(**numbers), updates)
    by_optax = steps(optax.scale_by_adam(**numbers), updates)
    # optax takes 1 - b2**t from a rounded b2**t.
    beside = tolerances.eps(np.float32) / (1 - numbers.get("b2", 0.999))
    for t, ((actual, _), (theirs, _)) in enumerate(zip(outputs, by_optax, strict=True)):
        for leaf in SHAPES:
            assert actual[leaf].dtype == kind
            assert oracles.relative_error(actual[leaf], expected[leaf][t]) < 1e-6, (t, leaf)
            assert oracles.relative_error(actual[leaf], theirs[leaf]) < beside + 1e-6, (t, leaf)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_it_is_adam_for_16_bit_updates(dtype):
    """Moments in bfloat16 drift as those of optax; those of float16 are kept in float32."""
    numbers = {"b1": 0.8, "b2": 0.95}  # 0.999 is 1 in bfloat16
    updates = [tree(seed, dtype) for seed in range(10)]
    outputs = [x for x, _ in steps(orthax.scale_by_adam_per_index(**numbers), updates)]
    for leaf in SHAPES:
        expected = adam([x[leaf] for x in updates], **numbers)
        for actual, exact in zip(outputs, expected, strict=True):
            assert actual[leaf].dtype == dtype
            assert oracles.relative_error(actual[leaf], exact) < 8 * tolerances.eps(dtype), leaf


@pytest.mark.parametrize("leaf", SHAPES)
def test_an_index_whose_state_is_zero_makes_a_first_step_of_one(leaf):
    """This is how `low_rank` takes an index in; the others go on as they were."""
    transformation = orthax.scale_by_adam_per_index()
    updates = [tree(seed)[leaf] for seed in range(12)]
    *_, (_, state) = steps(transformation, updates[:-1])
    axis = SHAPES[leaf][1]
    fresh = np.arange(updates[0].shape[axis]) == 1
    fresh = fresh[:, None] if axis == -2 else fresh[None, :]
    fresh = jnp.broadcast_to(fresh, (*updates[0].shape[:-2], *fresh.shape))
    zeroed = jax.tree.map(lambda x: jnp.where(jnp.broadcast_to(fresh, x.shape), 0, x), state)
    actual, new = transformation.update(updates[-1], zeroed)
    unchanged, _ = transformation.update(updates[-1], state)
    fresh_entries = np.broadcast_to(fresh, actual.shape)
    expected = np.where(fresh_entries, np.sign(updates[-1]), unchanged)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    np.testing.assert_allclose(new.mu_weight, np.where(fresh, 0.1, 1 - 0.9**12), rtol=1e-5)
    np.testing.assert_allclose(new.nu_weight, np.where(fresh, 0.001, 1 - 0.999**12), rtol=1e-4)


def test_the_weights_have_an_entry_for_each_index_of_the_shorter_axis():
    state = orthax.scale_by_adam_per_index().init(tree(0))
    for leaf, (shape, axis) in SHAPES.items():
        expected = [*shape[:-2], 1, 1]
        expected[axis] = shape[axis]
        for weight in (state.mu_weight[leaf], state.nu_weight[leaf]):
            assert weight.shape == tuple(expected), leaf
            assert not weight.any()
        assert state.mu[leaf].shape == state.nu[leaf].shape == shape


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_of_16_bit_updates_are_float32(dtype):
    """In 16 bits, 1 - b2 would be lost beside 1."""
    transformation = orthax.scale_by_adam_per_index(mu_dtype=jnp.float32)
    updates = [tree(seed, dtype) for seed in range(2)]
    for out, state in steps(transformation, updates):
        assert all(x.dtype == dtype for x in jax.tree.leaves(out))
        weights = jax.tree.leaves((state.mu_weight, state.nu_weight))
        assert {x.dtype for x in weights} == {jnp.dtype(jnp.float32)}
        assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype(jnp.float32)}
    for weight in jax.tree.leaves(state.nu_weight):
        np.testing.assert_allclose(weight, 1 - 0.999**2, rtol=1e-4)


@pytest.mark.parametrize("leaf", SHAPES)
def test_no_gradient_makes_no_step(leaf):
    zeros = jnp.zeros(SHAPES[leaf][0])
    for out, _ in steps(orthax.scale_by_adam_per_index(), [zeros, zeros]):
        assert not out.any()


@pytest.mark.parametrize("eps_root", [0.0, 1e-4])
def test_the_slope_of_the_first_update_is_that_of_its_formula(eps_root):
    """g over sqrt(g^2 + eps_root) + eps; at g = 0 without `eps_root` the limit is 1 / eps."""
    tx = orthax.scale_by_adam_per_index(eps=0.01, eps_root=eps_root)
    g = np.array([[0.0, 0.3], [-0.2, 0.0]])
    root = np.sqrt(g**2 + eps_root)
    bend = np.divide(g**2, root, out=np.zeros_like(g), where=root > 0)
    expected = 1 / (root + 0.01) - bend / (root + 0.01) ** 2
    found = jax.grad(lambda g: jnp.sum(tx.update(g, tx.init(g))[0]))(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    updates, _ = tx.update(jnp.asarray(g, jnp.float32), tx.init(jnp.asarray(g, jnp.float32)))
    np.testing.assert_allclose(updates, g / (root + 0.01), rtol=2e-6)
