import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import paths
import pytest
from paths import updates_of

import orthax
from orthax.linalg import coefficients, newton_schulz

# Flax kernels (fan_in, fan_out).
SHAPES = {"expanding": (10, 24), "contracting": (24, 10), "layers": (3, 6, 10)}

settings = {
    "orthogonalizer": orthax.orthogonalize(newton_schulz, coefficients=coefficients.MUON),
    "dimension_numbers": optax.contrib.MuonDimensionNumbers(-2, -1),
}
published = functools.partial(orthax.root, **settings)


def heavy_tailed_tree(seed, scale=1.0):
    """Normal numbers, one in twenty of them a hundred times larger."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        x = rng.standard_normal(shape) * np.where(rng.random(shape) < 0.05, 100, 1)
        return (scale * x).astype(np.float32)

    return {name: leaf(shape) for name, shape in SHAPES.items()}


# --- the published algorithm


@pytest.mark.parametrize(
    ("momentum", "quantile", "nesterov", "factor"),
    [
        (0.5, 0.8, True, "adam_rms"),
        (0.9, 0.95, False, "width"),
        (0.9, 0.0, True, "adam_rms"),
    ],
)
def test_it_follows_the_transcription(momentum, quantile, nesterov, factor):
    options = {"quantile": quantile, "nesterov": nesterov, "weight_decay": 0.1}
    scale = {"adam_rms": orthax.scale_by_adam_rms(), "width": orthax.scale_by_width()}[factor]
    params, grads = heavy_tailed_tree(0, 0.1), [heavy_tailed_tree(seed) for seed in range(1, 6)]
    oracle = functools.partial(
        oracles.root,
        learning_rate=0.05,
        momentum=momentum,
        factor=getattr(oracles, f"{factor}_factor"),
        **options,
    )
    optimizer = published(0.05, momentum, shape_scale=scale, **options)
    paths.assert_follows(optimizer, params, grads, oracle)


def test_the_defaults_are_the_published_ones_with_a_table_for_each_shape():
    params, grads = heavy_tailed_tree(0), [heavy_tailed_tree(seed) for seed in (1, 2)]
    options = {"dimension_numbers": settings["dimension_numbers"]}
    by_hand = orthax.root(
        0.1,
        0.95,
        quantile=0.9,
        orthogonalizer=orthax.orthogonalize(newton_schulz, coefficients=coefficients.for_shape),
        shape_scale=orthax.scale_by_adam_rms(),
        **options,
    )
    ours, theirs = (updates_of(tx, params, grads) for tx in (orthax.root(0.1, **options), by_hand))
    for actual, expected in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


# --- beside Muon


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_clipping_it_is_muon_to_the_bit(weight_decay):
    params, grads = heavy_tailed_tree(0), [heavy_tailed_tree(seed) for seed in (1, 2, 3)]
    options = {**settings, "weight_decay": weight_decay}
    ours = updates_of(orthax.root(0.1, quantile=1.0, **options), params, grads)
    theirs = updates_of(orthax.muon(0.1, **options), params, grads)
    for actual, expected in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_an_outlier_turns_the_update_less_than_muons():
    """The update of a gradient with one huge entry, against that of the gradient without it."""
    rng = np.random.default_rng(0)
    clean = {"w": rng.standard_normal((48, 32)).astype(np.float32)}
    spoilt = {"w": clean["w"].copy()}
    spoilt["w"][3, 4] = 1e4

    def agreement(factory):
        optimizer = factory(0.1, **settings)
        a, b = (
            oracles.float64(next(updates_of(optimizer, clean, [g]))["w"]) for g in (clean, spoilt)
        )
        return (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())

    assert agreement(orthax.muon) < 0.85
    assert agreement(orthax.root) > 0.95


# --- the other leaves, dtypes


def test_float16_gradients_with_outliers_stay_finite_and_keep_their_dtype():
    g = jax.tree.map(lambda x: jnp.asarray(100 * x, jnp.float16), heavy_tailed_tree(1))
    optimizer = orthax.root(0.01, **settings)
    *_, updates = updates_of(optimizer, jax.tree.map(jnp.zeros_like, g), [g] * 45)
    for leaf, u in updates.items():
        assert u.dtype == jnp.float16
        rms = np.sqrt((oracles.float64(u) ** 2).mean((-2, -1)))
        np.testing.assert_allclose(rms, 0.002, rtol=0.4, err_msg=leaf)
