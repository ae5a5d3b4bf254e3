import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import tolerances

import orthax
from orthax.linalg import newton_schulz, polar, polar_svd

TABLE = oracles.MUON_TABLE


def atol(shape, dtype=np.float32):
    r = min(shape[-2:])
    return tolerances.rounding(dtype, r, oracles.gain(TABLE, 0.4 / r**0.5))


MIXED = {
    "square": (6, 6),
    "another_square": (6, 6),
    "wide": (4, 12),
    "tall": (12, 4),
    "batched_wide": (3, 4, 12),
    "batched_tall": (2, 2, 12, 4),
    "row": (1, 12),
    "column": (12, 1),
    "second_wide": (4, 12),
}


def mixed_tree():
    return {
        name: np.float32(10.0**seed) * oracles.well_conditioned(shape, seed=seed)
        for seed, (name, shape) in enumerate(MIXED.items())
    }


def apply(transformation, updates, params=None):
    state = transformation.init(updates if params is None else params)
    return jax.jit(transformation.update)(updates, state, params)[0]


@pytest.mark.parametrize("stack", [True, False])
def test_every_matrix_of_a_mixed_tree_is_orthogonalised_on_its_own(stack):
    tree = mixed_tree()
    transformation = orthax.orthogonalize(newton_schulz, stack=stack, coefficients=TABLE)
    actual = apply(transformation, jax.tree.map(jnp.asarray, tree))
    assert actual.keys() == tree.keys()
    for name, x in tree.items():
        assert actual[name].shape == x.shape
        np.testing.assert_allclose(
            actual[name], oracles.newton_schulz(x, TABLE), rtol=0, atol=atol(x.shape), err_msg=name
        )


@pytest.mark.parametrize("stack", [True, False])
def test_leaves_of_different_dtypes_keep_their_dtypes(stack):
    dtypes = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64, jnp.bfloat16]
    tree = [
        jnp.asarray(oracles.well_conditioned((4, 6), seed=seed)).astype(dtype)
        for seed, dtype in enumerate(dtypes)
    ]
    tree[3] = tree[3] * jnp.complex64(1j)
    transformation = orthax.orthogonalize(newton_schulz, stack=stack, coefficients=TABLE)
    for actual, x, dtype in zip(apply(transformation, tree), tree, dtypes, strict=True):
        assert actual.dtype == dtype
        error = np.abs(
            oracles.float64(actual) - oracles.newton_schulz(oracles.float64(x), TABLE)
        ).max()
        assert error < atol(x.shape, dtype)


@pytest.mark.parametrize("stack", [True, False])
def test_none_and_masked_leaves_and_the_nesting_are_kept(stack):
    x, y = oracles.well_conditioned((4, 6)), oracles.well_conditioned((6, 4), seed=1)
    tree = {"b": [x, None, optax.MaskedNode()], "a": (optax.MaskedNode(), {"k": y})}
    transformation = orthax.orthogonalize(newton_schulz, stack=stack, coefficients=TABLE)
    actual = apply(transformation, tree)
    assert jax.tree.structure(actual) == jax.tree.structure(tree)
    assert actual["b"][1] is None
    assert actual["b"][2] == optax.MaskedNode()
    np.testing.assert_allclose(actual["b"][0], oracles.newton_schulz(x), atol=atol(x.shape))
    np.testing.assert_allclose(actual["a"][1]["k"], oracles.newton_schulz(y), atol=atol(y.shape))


def test_more_matrices_of_a_shape_than_fit_a_stack_come_back_in_order():
    batches = [(100,), (), (5, 40), (300,), (), (90,), *[()] * 10]
    rng = np.random.default_rng(0)
    rotations = []
    for batch in batches:
        angle = rng.uniform(-np.pi, np.pi, batch)
        rows = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        rotations.append(np.moveaxis(np.array(rows, np.float32), (0, 1), (-2, -1)))
    tree = [x * rng.uniform(1, 1000, (*x.shape[:-2], 1, 1)).astype(np.float32) for x in rotations]
    for actual, expected in zip(
        apply(orthax.orthogonalize(polar_svd), tree), rotations, strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


def test_leaves_come_back_in_their_order():
    tree = [oracles.well_conditioned(shape, seed=seed) for seed, shape in enumerate(MIXED.values())]
    actual = apply(orthax.orthogonalize(polar_svd), tree)
    for found, x in zip(actual, tree, strict=True):
        np.testing.assert_allclose(found, oracles.polar(x), rtol=0, atol=1e-5)


def test_a_stack_gathers_leaves_of_one_shape_up_to_transposition():
    shapes = []

    def method(x):
        shapes.append(x.shape)
        return 2 * x

    tree = mixed_tree()
    stacked = apply(orthax.orthogonalize(method), tree)
    calls_with_stacks = len(shapes)
    shapes.clear()
    apply(orthax.orthogonalize(method, stack=False), tree)
    assert calls_with_stacks < len(shapes) == len(tree)
    for name, x in tree.items():
        np.testing.assert_array_equal(stacked[name], 2 * x)


def test_options_reach_the_method():
    def method(x, *, factor, shift=0.0):
        return factor * x + shift

    x = oracles.well_conditioned((3, 4))
    actual = apply(orthax.orthogonalize(method, factor=3.0, shift=1.0), {"w": x})
    np.testing.assert_allclose(actual["w"], 3 * x + 1, rtol=1e-6)


def test_the_default_brings_singular_values_near_one():
    tree = {name: x for name, x in mixed_tree().items() if min(x.shape[-2:]) > 1}
    for x in jax.tree.leaves(apply(orthax.orthogonalize(), tree)):
        s = np.linalg.svd(oracles.float64(x), compute_uv=False)
        assert s.min() > 0.4
        assert s.max() < 1.3


@pytest.mark.parametrize("options", [{}, {"accuracy": "exact"}], ids=str)
def test_the_default_method_is_polar_with_its_options(options):
    tree = {name: x for name, x in mixed_tree().items() if name in ("wide", "tall", "row")}
    actual = apply(orthax.orthogonalize(**options), tree)
    for name, x in tree.items():
        np.testing.assert_allclose(
            actual[name], polar(jnp.asarray(x), **options), rtol=0, atol=atol(x.shape), err_msg=name
        )
    with pytest.raises(TypeError, match=r"polar has no option 'coefficients'; it has accuracy\."):
        orthax.orthogonalize(coefficients=TABLE)


@pytest.mark.parametrize("stack", [True, False])
def test_zero_matrices_stay_zero_beside_others(stack):
    x = oracles.well_conditioned((4, 6))
    tree = {"a": x, "b": np.zeros_like(x), "c": np.stack([x, np.zeros_like(x)])}
    actual = apply(orthax.orthogonalize(newton_schulz, stack=stack, coefficients=TABLE), tree)
    assert not np.asarray(actual["b"]).any()
    assert not np.asarray(actual["c"][1]).any()
    for found in (actual["a"], actual["c"][0]):
        np.testing.assert_allclose(found, oracles.newton_schulz(x), atol=atol(x.shape))


def test_leaves_of_very_different_scale_share_a_stack():
    x = oracles.well_conditioned((4, 6)).astype(np.float64)
    tree = [(x * scale).astype(np.float32) for scale in (1e-20, 1.0, 1e18)]
    for actual in apply(orthax.orthogonalize(newton_schulz, coefficients=TABLE), tree):
        np.testing.assert_allclose(actual, oracles.newton_schulz(x), atol=atol(x.shape))


@pytest.mark.parametrize("tree", [{}, {"a": None}, {"a": optax.MaskedNode()}], ids=repr)
def test_a_tree_without_matrices_passes(tree):
    assert apply(orthax.orthogonalize(), tree) == tree


def test_there_is_no_state_and_params_are_not_needed():
    transformation = orthax.orthogonalize()
    state = transformation.init({"w": jnp.ones((3, 4))})
    assert not jax.tree.leaves(state)
    updates, new_state = transformation.update({"w": jnp.ones((3, 4))}, state)
    assert updates["w"].shape == (3, 4)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


def test_a_stack_holds_at_most_256_matrices():
    calls = []

    def method(x):
        calls.append(x.shape)
        return x

    leaves = [np.ones((100, 2, 3), np.float32)] * 3 + [np.ones((2, 3), np.float32)] * 60
    updates = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    jax.eval_shape(lambda u: orthax.orthogonalize(method).update(u, optax.EmptyState()), updates)
    # For platforms that map over a stack the method is traced for a single matrix as well.
    assert [shape[0] for shape in calls if len(shape) == 3] == [200, 160]
