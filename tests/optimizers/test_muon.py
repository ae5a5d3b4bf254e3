import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import paths
import pytest
import tolerances
from helpers import normal_tree
from paths import run, updates_of

import orthax
from orthax.linalg import coefficients, newton_schulz, polar_svd

SHAPES = {"expanding": (10, 24), "contracting": (24, 10)}

# Keller Jordan's settings: his triple, five times, and his shape factor.
published = functools.partial(
    orthax.muon,
    orthogonalizer=orthax.orthogonalize(newton_schulz, coefficients=coefficients.MUON),
    shape_scale=orthax.scale_by_width(),
)
plain = functools.partial(
    orthax.muon, orthogonalizer=optax.identity(), shape_scale=optax.identity()
)


def gradients(steps=5, shapes=SHAPES):
    return [normal_tree(shapes, 100 + step) for step in range(steps)]


def assert_follows(optimizer, oracle, shapes=SHAPES):
    paths.assert_follows(optimizer, normal_tree(shapes, 0, 0.1), gradients(5, shapes), oracle)


def rms(x):
    return np.sqrt((oracles.float64(x) ** 2).mean())


# --- the published algorithm


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.95, False), (0.5, True)])
def test_it_follows_the_transcription_with_and_without_nesterov(momentum, nesterov):
    options = {"nesterov": nesterov, "weight_decay": 0.1}
    assert_follows(
        published(0.05, momentum, **options),
        lambda p, g: oracles.muon(p, g, 0.05, momentum=momentum, **options),
    )


def test_nesterov_is_the_default_and_differs_from_none():
    (params, grads) = normal_tree(SHAPES), gradients(2)
    *_, default = updates_of(published(1.0), params, grads)
    *_, without = updates_of(published(1.0, nesterov=False), params, grads)
    for leaf in params:
        difference = np.linalg.norm(default[leaf] - without[leaf])
        assert difference > 0.05 * np.linalg.norm(without[leaf])


@pytest.mark.parametrize(
    ("shape_scale", "factor"),
    [
        (orthax.scale_by_unit_rms(), oracles.unit_rms_factor),
        (orthax.scale_by_adam_rms(), oracles.adam_rms_factor),
        (optax.identity(), lambda *_: 1.0),
    ],
    ids=["unit rms", "adam rms", "none"],
)
def test_the_shape_scale_multiplies_the_direction_and_not_the_decay(shape_scale, factor):
    assert_follows(
        published(0.05, weight_decay=0.3, shape_scale=shape_scale),
        lambda p, g: oracles.muon(p, g, 0.05, weight_decay=0.3, factor=factor),
    )


def test_scanned_stacks_of_layers_are_batches_of_matrices():
    shapes = {"layers": (3, 6, 10)}
    with_names = published(
        0.05, weight_decay=0.1, dimension_numbers=optax.contrib.MuonDimensionNumbers(-2, -1)
    )
    assert_follows(
        with_names, lambda p, g: oracles.muon(p, g, 0.05, weight_decay=0.1), shapes=shapes
    )


def test_it_equals_muon_of_optax_where_the_two_formulas_agree():
    with tolerances.double_precision():
        params = jax.tree.map(oracles.float64, normal_tree(SHAPES, 0, 0.1))
        grads = jax.tree.map(oracles.float64, gradients())
        theirs = optax.contrib.muon(0.05, weight_decay=0.1, nesterov=False)
        ours = published(0.05, weight_decay=0.1, nesterov=False)
        for actual, expected in zip(
            updates_of(ours, params, grads), updates_of(theirs, params, grads), strict=True
        ):
            for leaf in params:
                assert oracles.relative_error(actual[leaf], expected[leaf]) < 1e-6


def test_nesterov_of_optax_is_another_formula():
    """It corrects the bias of the average: 0.089 at the second step here, less at later ones."""
    shapes = {"w": (64, 256)}
    params, grads = normal_tree(shapes), gradients(2, shapes)
    *_, theirs = updates_of(optax.contrib.muon(1.0), params, grads)
    *_, ours = updates_of(published(1.0), params, grads)
    difference = np.linalg.norm(ours["w"] - theirs["w"]) / np.linalg.norm(theirs["w"])
    assert 0.05 < difference < 0.15


# --- reductions


@pytest.mark.parametrize("nesterov", [True, False])
def test_without_orthogonalisation_it_is_sgd_with_momentum(nesterov):
    params, grads = normal_tree(SHAPES), gradients()
    ours = updates_of(plain(0.1, 0.9, nesterov=nesterov), params, grads)
    theirs = updates_of(optax.sgd(0.1, 0.9, nesterov=nesterov), params, grads)
    for actual, expected in zip(ours, theirs, strict=True):
        for leaf in params:
            np.testing.assert_allclose(actual[leaf], expected[leaf], rtol=1e-6, atol=1e-7)


def test_momentum_may_be_a_transformation():
    assert_follows(
        published(0.05, optax.ema(0.95, debias=False)),
        lambda p, g: oracles.muon(p, g, 0.05, nesterov=False),
    )
    params, grads = normal_tree(SHAPES), gradients(2)
    path = updates_of(plain(0.1, optax.identity()), params, grads)
    for updates, g in zip(path, grads, strict=True):
        for leaf in params:
            np.testing.assert_allclose(updates[leaf], -0.1 * g[leaf], rtol=1e-6)


def test_a_rotated_gradient_gives_the_rotated_update():
    rng = np.random.default_rng(3)
    q, p = oracles.orthogonal(rng, 12), oracles.orthogonal(rng, 8)
    spectrum = np.linspace(0.5, 1.0, 8)
    grads = [{"w": oracles.matrix_with_spectrum(rng, 12, 8, spectrum)} for _ in range(3)]
    rotated = [{"w": (q @ g["w"] @ p).astype(np.float32)} for g in grads]
    grads = [{"w": g["w"].astype(np.float32)} for g in grads]
    params = {"w": np.zeros((12, 8), np.float32)}
    optimizer = published(0.1)
    for straight, turned in zip(
        updates_of(optimizer, params, grads), updates_of(optimizer, params, rotated), strict=True
    ):
        expected = q @ oracles.float64(straight["w"]) @ p
        assert oracles.relative_error(turned["w"], expected) < 1e-4


@pytest.mark.parametrize("weight", [1e-12, 1e-3, 1e6])
def test_the_scale_of_the_loss_does_not_matter(weight):
    shapes = {"w": (8, 12)}
    params, grads = normal_tree(shapes), gradients(3, shapes)
    scaled = [{"w": g["w"] * np.float32(weight)} for g in grads]
    path = oracles.muon(params["w"], [g["w"] for g in grads], 0.1)
    for after, expected in zip(run(published(0.1), params, scaled), path, strict=True):
        np.testing.assert_allclose(after["w"], expected, atol=5e-5)


# --- the scale of AdamW


def test_an_exact_direction_moves_every_matrix_by_a_fifth_of_the_learning_rate():
    """Lemma 1 of Moonlight (2502.16982)."""
    optimizer = orthax.muon(0.01, orthogonalizer=orthax.orthogonalize(polar_svd))
    for updates in updates_of(optimizer, normal_tree(SHAPES), gradients(3)):
        for u in updates.values():
            assert rms(u) == pytest.approx(0.2 * 0.01, rel=1e-5)


def test_the_default_direction_comes_near_that_scale():
    for updates in updates_of(orthax.muon(0.01), normal_tree(SHAPES), gradients(3)):
        for u in updates.values():
            assert rms(u) == pytest.approx(0.2 * 0.01, rel=0.25)


# --- the other leaves


MODEL = {
    "Embed_0": {"embedding": (11, 8)},
    "Dense_0": {"kernel": (8, 12), "bias": (12,)},
    "LayerNorm_0": {"scale": (12,), "bias": (12,)},
    "lm_head": {"kernel": (12, 11)},
}
MATRICES = [("Dense_0", "kernel")]


def others(tree):
    """Leaves that are not matrices, by name."""
    return {
        (module, name): leaf
        for module, leaves in tree.items()
        for name, leaf in leaves.items()
        if (module, name) not in MATRICES
    }


def not_vectors(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "mask", [None, not_vectors, not_vectors(normal_tree(MODEL))], ids=["none", "function", "tree"]
)
def test_leaves_that_are_not_matrices_follow_adamw_exactly(weight_decay, mask):
    params, grads = normal_tree(MODEL), [normal_tree(MODEL, seed) for seed in (1, 2, 3)]
    ours = plain(0.01, weight_decay=weight_decay, mask=mask)
    theirs = optax.adamw(0.01, weight_decay=weight_decay, mask=mask)
    for actual, expected in zip(
        updates_of(ours, params, grads, compiled=False),
        updates_of(theirs, params, grads, compiled=False),
        strict=True,
    ):
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        expected = others(expected)
        assert len(expected) == 5
        for name, update in others(actual).items():
            np.testing.assert_array_equal(update, expected[name], err_msg=str(name))


def test_the_matrices_of_a_model_follow_muon_beside_the_fallback():
    params, grads = normal_tree(MODEL), [normal_tree(MODEL, seed) for seed in (1, 2, 3)]
    path = oracles.muon(
        params["Dense_0"]["kernel"],
        [g["Dense_0"]["kernel"] for g in grads],
        0.02,
        weight_decay=0.1,
    )
    for after, expected in zip(
        run(published(0.02, weight_decay=0.1), params, grads), path, strict=True
    ):
        np.testing.assert_allclose(after["Dense_0"]["kernel"], expected, atol=1e-5)


def test_the_mask_spares_matrices_from_decay():
    params, grads = normal_tree(MODEL), [jax.tree.map(np.zeros_like, normal_tree(MODEL))]

    def only_head(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "lm_head", params)

    (spared,) = updates_of(plain(0.1, weight_decay=0.5, mask=only_head), params, grads)
    assert not np.asarray(spared["Dense_0"]["kernel"]).any()
    (decayed,) = updates_of(plain(0.1, weight_decay=0.5), params, grads)
    np.testing.assert_allclose(
        decayed["Dense_0"]["kernel"], -0.05 * params["Dense_0"]["kernel"], rtol=1e-6
    )


# --- parameters, schedules, dtypes


def matrix_dtypes(state, shape):
    return [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape == shape]


@pytest.mark.parametrize(
    ("dtype", "mu_dtype", "kept"),
    [
        (jnp.float32, None, jnp.float32),
        (jnp.bfloat16, None, jnp.bfloat16),
        (jnp.float16, None, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.float32),
    ],
)
def test_momentum_is_kept_in_its_dtype_and_updates_in_that_of_the_gradient(dtype, mu_dtype, kept):
    params = {"w": jnp.asarray(normal_tree(SHAPES)["expanding"]).astype(dtype)}
    grads = {"w": jnp.asarray(normal_tree(SHAPES, 1)["expanding"]).astype(dtype)}
    optimizer = plain(0.01, mu_dtype=mu_dtype)
    state = optimizer.init(params)
    assert matrix_dtypes(state, params["w"].shape) == [kept]
    updates, state = optimizer.update(grads, state, params)
    assert matrix_dtypes(state, params["w"].shape) == [kept]
    assert updates["w"].dtype == dtype


def test_sixty_large_float16_gradients_do_not_overflow():
    params = {"w": jnp.zeros((8, 8), jnp.float16)}
    g = oracles.orthogonal(np.random.default_rng(0), 8)
    g = {"w": jnp.asarray(5e3 * g / np.abs(g).max(), jnp.float16)}
    assert 20 * g["w"].max() == np.inf
    expected = -oracles.polar(oracles.float64(g["w"])) * 0.2 * 8**0.5
    optimizer = orthax.muon(1.0, orthogonalizer=orthax.orthogonalize(polar_svd))
    *_, updates = updates_of(optimizer, params, [g] * 60)
    np.testing.assert_allclose(oracles.float64(updates["w"]), expected, rtol=2e-3, atol=1e-4)
