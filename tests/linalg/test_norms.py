import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances

from orthax.linalg import frobenius_norm, normalize

SHAPES = [(5, 5), (2, 3, 4), (1, 6)]
SCALES = [1e-30, 1e-20, 1.0, 1e18, 1e30]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_scale = pytest.mark.parametrize("scale", SCALES)


def matrices(shape, scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.standard_normal(shape)
    return (x * scale).astype(dtype)


def norm(x):
    return np.sqrt((np.abs(oracles.float64(x)) ** 2).sum((-2, -1), keepdims=True))


@by_shape
@by_scale
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_the_norm_is_right_at_every_scale(shape, scale, dtype):
    x = matrices(shape, scale, dtype)
    actual = frobenius_norm(jnp.asarray(x))
    assert actual.shape == (*shape[:-2], 1, 1)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, norm(x), rtol=tolerances.rounding(np.float32))


@by_shape
@by_scale
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_a_normalised_matrix_has_norm_one_and_the_same_direction(shape, scale, dtype):
    x = matrices(shape, scale, dtype)
    actual = normalize(jnp.asarray(x))
    assert actual.dtype == dtype
    np.testing.assert_allclose(norm(actual), 1.0, rtol=tolerances.rounding(np.float32))
    expected = oracles.float64(x) / norm(x)
    np.testing.assert_allclose(actual, expected, rtol=tolerances.rounding(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_entries_near_the_largest_float_count(dtype):
    """The reciprocal of 3e38 is no normal number."""
    actual = normalize(jnp.asarray(3e38 * np.eye(8), dtype))
    np.testing.assert_allclose(actual, np.eye(8) / np.sqrt(8), rtol=tolerances.rounding(np.float32))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_norms_of_half_precision_are_float32(dtype, scale):
    x = jnp.asarray(matrices((30, 40), scale)).astype(dtype)
    for actual, expected in (
        (frobenius_norm(x), norm(x)),
        (normalize(x), oracles.float64(x) / norm(x)),
    ):
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, rtol=tolerances.rounding(np.float32))


def test_norms_of_double_precision_are_float64():
    x = matrices((4, 6), dtype=np.float64)
    with tolerances.double_precision():
        actual = np.asarray(frobenius_norm(jnp.asarray(x)))
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, norm(x), rtol=tolerances.rounding(np.float64))


def test_every_matrix_of_a_batch_has_its_own_norm():
    x = matrices((2, 3, 4)) * np.float32([1e-25, 1e25])[:, None, None]
    np.testing.assert_allclose(frobenius_norm(jnp.asarray(x)), norm(x), rtol=1e-6)
    normalised = normalize(jnp.asarray(x))
    np.testing.assert_allclose(np.ravel(norm(normalised)), 1.0, rtol=1e-6)
    x[1] = 0
    np.testing.assert_allclose(np.ravel(norm(normalize(jnp.asarray(x)))), [1, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
@by_shape
def test_zero_has_norm_zero_and_stays_zero(shape, dtype):
    zero = jnp.zeros(shape, dtype)
    for actual in (frobenius_norm(zero), normalize(zero)):
        assert not np.asarray(actual).any()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 0)], ids=str)
def test_an_empty_matrix_has_norm_zero(shape):
    x = jnp.zeros(shape)
    np.testing.assert_array_equal(frobenius_norm(x), np.zeros((*shape[:-2], 1, 1)))
    assert normalize(x).shape == shape


def test_a_single_entry_is_its_own_norm():
    x = np.zeros((3, 4), np.float32)
    x[1, 2] = -3e-30
    np.testing.assert_allclose(frobenius_norm(jnp.asarray(x)), [[3e-30]], rtol=1e-6)
    np.testing.assert_array_equal(normalize(jnp.asarray(x)), np.sign(x))


def test_a_matrix_below_eps_counts_as_zero():
    x = matrices((3, 4), 1e-9)
    assert not np.asarray(normalize(jnp.asarray(x), eps=1e-7)).any()
    np.testing.assert_allclose(norm(normalize(jnp.asarray(x), eps=1e-12)), 1.0, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_the_derivative_of_the_norm_is_the_normalised_matrix(scale):
    x = matrices((3, 4), scale)
    gradient = jax.jit(jax.grad(lambda x: frobenius_norm(x)[0, 0]))(x)
    np.testing.assert_allclose(gradient, oracles.float64(x) / norm(x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("function", [frobenius_norm, normalize])
def test_the_gradient_is_finite_at_zero(function):
    gradient = jax.jit(jax.grad(lambda x: function(x).sum()))(jnp.zeros((3, 4)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("function", [frobenius_norm, normalize])
def test_a_nan_is_not_hidden(function):
    x = jnp.asarray(matrices((3, 4))).at[1, 1].set(jnp.nan)
    assert np.isnan(function(x)).any()


def test_a_complex_entry_whose_magnitude_overflows_counts():
    actual = normalize(jnp.array([[3e38 + 3e38j, 0.0]]))
    np.testing.assert_allclose(
        actual, [[(1 + 1j) / 2**0.5, 0]], rtol=tolerances.rounding(np.float32)
    )
