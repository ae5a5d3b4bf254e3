import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import tolerances

import orthax

SHAPES = [(16, 64), (64, 16), (24, 24), (3, 8, 18), (1, 9), (9, 1)]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)

FACTORS = {
    "width": (orthax.scale_by_width, {}, oracles.width_factor),
    "unit rms": (orthax.scale_by_unit_rms, {}, oracles.unit_rms_factor),
    "adam rms": (orthax.scale_by_adam_rms, {}, oracles.adam_rms_factor),
    "adam rms of 0.3": (
        orthax.scale_by_adam_rms,
        {"rms": 0.3},
        lambda fan_in, fan_out: 0.3 * max(fan_in, fan_out) ** 0.5,
    ),
    "adam rms of a unit norm": (
        orthax.scale_by_adam_rms,
        {"direction": "unit_norm"},
        lambda fan_in, fan_out: 0.2 * (fan_in * fan_out) ** 0.5,
    ),
}
MEASURED_BY_HAND = {
    ("width", (16, 64)): 2.0,
    ("width", (64, 16)): 1.0,
    ("unit rms", (16, 64)): 2.0,
    ("unit rms", (64, 16)): 0.5,
    ("adam rms", (16, 64)): 1.6,
    ("adam rms", (64, 16)): 1.6,
    ("adam rms of 0.3", (64, 16)): 2.4,
    ("adam rms of a unit norm", (16, 64)): 6.4,
}


def apply(transformation, updates):
    return transformation.update(updates, transformation.init(updates))[0]


def rms(x):
    return np.sqrt((oracles.float64(x) ** 2).mean((-2, -1)))


@by_shape
@pytest.mark.parametrize("name", FACTORS)
def test_the_factor_is_the_formula_and_nothing_else(name, shape):
    make, options, factor = FACTORS[name]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    actual = apply(make(**options), {"w": jnp.asarray(x)})["w"]
    assert actual.dtype == x.dtype
    expected = oracles.float64(x) * factor(*shape[-2:])
    np.testing.assert_allclose(actual, expected, rtol=2 * tolerances.eps(np.float32))


@pytest.mark.parametrize(("name", "shape"), MEASURED_BY_HAND)
def test_the_factor_has_the_value_computed_by_hand(name, shape):
    make, options, _ = FACTORS[name]
    actual = apply(make(**options), jnp.ones(shape))
    np.testing.assert_allclose(actual, MEASURED_BY_HAND[name, shape], rtol=1e-6)


@by_shape
def test_an_orthogonal_direction_gets_the_root_mean_square_of_adam(shape):
    rng = np.random.default_rng(0)
    q = oracles.polar(rng.standard_normal(shape)).astype(np.float32)
    for options, expected in (({}, 0.2), ({"rms": 0.5}, 0.5)):
        actual = apply(orthax.scale_by_adam_rms(**options), jnp.asarray(q))
        np.testing.assert_allclose(rms(actual), expected, rtol=1e-6)


@by_shape
def test_a_direction_of_unit_norm_gets_the_root_mean_square_of_adam(shape):
    x = np.random.default_rng(0).standard_normal(shape)
    x = (x / np.linalg.norm(x, axis=(-2, -1), keepdims=True)).astype(np.float32)
    actual = apply(orthax.scale_by_adam_rms(direction="unit_norm"), jnp.asarray(x))
    np.testing.assert_allclose(rms(actual), 0.2, rtol=1e-6)


def test_the_unit_rms_scale_keeps_the_root_mean_square_of_a_vector():
    rng = np.random.default_rng(0)
    q = oracles.orthogonal(rng, 16, 64)
    w = oracles.float64(apply(orthax.scale_by_unit_rms(), jnp.asarray(q, jnp.float32)))
    x = rng.standard_normal(16)
    assert np.sqrt(((x @ w) ** 2).mean()) == pytest.approx(np.sqrt((x**2).mean()), rel=1e-5)


@by_shape
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e18])
def test_the_measuring_scale_reaches_its_root_mean_square_from_any_norm(shape, scale):
    x = (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)
    for options, target in (({}, 0.2), ({"rms": 0.05}, 0.05)):
        actual = apply(orthax.scale_to_rms(**options), jnp.asarray(x))
        np.testing.assert_allclose(rms(actual), target, rtol=1e-6)
        direction = oracles.float64(x) / rms(x)[..., None, None] * target
        np.testing.assert_allclose(actual, direction, rtol=2e-6)


def test_the_measuring_scale_measures_every_matrix_of_a_batch():
    x = np.random.default_rng(0).standard_normal((3, 4, 6))
    x = (x * np.array([1e-18, 0.0, 1e18])[:, None, None]).astype(np.float32)
    actual = apply(orthax.scale_to_rms(), jnp.asarray(x))
    np.testing.assert_allclose(rms(actual), [0.2, 0.0, 0.2], rtol=1e-6)


def test_the_measuring_scale_makes_up_for_missing_rank():
    rng = np.random.default_rng(0)
    x = oracles.orthogonal(rng, 32, 2) @ oracles.orthogonal(rng, 2, 48)
    x = jnp.asarray(x, jnp.float32)
    assert rms(apply(orthax.scale_by_adam_rms(), x)) < 0.06
    np.testing.assert_allclose(rms(apply(orthax.scale_to_rms(), x)), 0.2, rtol=1e-6)


@pytest.mark.parametrize("make", [make for make, _, _ in FACTORS.values()] + [orthax.scale_to_rms])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_zero_stays_zero_and_the_dtype_stays(make, dtype):
    actual = apply(make(), {"w": jnp.zeros((4, 6), dtype), "n": None, "m": optax.MaskedNode()})
    assert actual["w"].dtype == dtype
    assert not oracles.float64(actual["w"]).any()
    assert actual["n"] is None
    assert actual["m"] == optax.MaskedNode()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_scaled_to_within_its_rounding(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 10)) * 1e3).astype(dtype)
    actual = apply(orthax.scale_to_rms(), x)
    assert actual.dtype == dtype
    np.testing.assert_allclose(rms(actual), 0.2, rtol=tolerances.eps(dtype))


@pytest.mark.parametrize("make", [make for make, _, _ in FACTORS.values()] + [orthax.scale_to_rms])
def test_there_is_no_state_and_it_compiles(make):
    transformation = make()
    tree = {"w": jnp.ones((4, 6)), "v": jnp.ones((6, 4))}
    state = transformation.init(tree)
    assert not jax.tree.leaves(state)
    jitted, _ = jax.jit(transformation.update)(tree, state)
    np.testing.assert_allclose(jitted["w"], apply(transformation, tree)["w"], rtol=1e-6)
