import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances
from hypothesis import given, settings
from hypothesis import strategies as st

from orthax.linalg.quantile import quantile_of_magnitude

SHAPES = [(40, 16), (1, 9), (9, 1), (1, 1), (3, 8, 12), (2, 2, 5, 4)]
QUANTILES = (0.0, 0.1, 1 / 3, 0.5, 0.9, 0.999, 1.0)

quantile = jax.jit(quantile_of_magnitude, static_argnums=1)


def expected(x, q):
    return np.quantile(np.abs(oracles.float64(x)), q, axis=(-2, -1), keepdims=True)


def heavy_tailed(shape, seed=0):
    """Magnitudes over thirty decades."""
    rng = np.random.default_rng(seed)
    return rng.choice([-1, 1], shape) * 10 ** rng.uniform(-15, 15, shape)


def assert_is_the_quantile(x, q):
    """To two roundings: the products and the sum of the interpolation."""
    actual = quantile(x, q)
    dtype = jnp.promote_types(jnp.abs(x).dtype, jnp.float32)
    assert actual.dtype == dtype
    limit = 2 * tolerances.eps(dtype)
    np.testing.assert_allclose(oracles.float64(actual), expected(x, q), rtol=limit, atol=0)


@pytest.mark.parametrize("q", QUANTILES)
def test_it_is_numpys_linear_quantile(q):
    x = np.random.default_rng(0).standard_normal((24, 40)).astype(np.float32)
    assert_is_the_quantile(x, q)
    assert_is_the_quantile(heavy_tailed((24, 40)).astype(np.float32), q)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_taken_over_each_matrix_of_any_shape(shape):
    assert_is_the_quantile(heavy_tailed(shape).astype(np.float32), 0.9)


@pytest.mark.parametrize("q", [1 / 3, 0.9, 1.0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64"])
def test_it_takes_every_dtype(dtype, q):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 8, 12)) + 1j * rng.standard_normal((3, 8, 12))
    x = x if dtype == "complex64" else x.real
    x = jnp.asarray(x, dtype)
    size = jnp.abs(x)  # rounded to the dtype, as the quantile is one of the entries
    assert_is_the_quantile(size if dtype == "complex64" else x, q)
    np.testing.assert_array_equal(quantile(x, q), quantile(size, q))


@pytest.mark.parametrize("q", [1 / 3, 1.0])
def test_it_is_as_exact_in_double_precision(q):
    with tolerances.double_precision():
        x = jnp.asarray(heavy_tailed((3, 8, 12)))
        assert x.dtype == np.float64
        assert_is_the_quantile(x, q)


LARGEST = 0x7F7FFFFF  # bits of the largest float32


@settings(deadline=None, database=None, derandomize=True, max_examples=500)
@given(
    seed=st.integers(0, 2**32 - 1),
    distinct=st.sampled_from([1, 2, 3, 8, 100]),
    span=st.sampled_from([5, 50, 2**23, LARGEST]),  # neighbours, a binade, all of float32
    from_zero=st.booleans(),
    zeros=st.sampled_from([0.0, 0.0, 0.5, 0.95]),
    q=st.sampled_from(QUANTILES),
)
def test_any_35_numbers_have_their_quantile(seed, distinct, span, from_zero, zeros, q):
    """Ties, many zeros, subnormal numbers and neighbours among them."""
    rng = np.random.default_rng(seed)
    low = 0 if from_zero else rng.integers(0, LARGEST - span + 1)
    bits = rng.choice(low + rng.integers(0, span, distinct), 35) * (rng.random(35) >= zeros)
    magnitudes = bits.astype(np.uint32).view(np.float32)
    x = (magnitudes * rng.choice([-1, 1], 35)).astype(np.float32).reshape(5, 7)
    actual, exact = np.asarray(quantile(x, q))[0, 0], expected(x, q)[0, 0]
    position = q * (x.size - 1)
    if position.is_integer():  # an entry, to the bit
        assert actual.view(np.uint32) == np.sort(bits)[int(position)]
    flushed = np.finfo(np.float32).tiny  # results below it may be zero
    assert abs(float(actual) - exact) <= 2 * tolerances.eps(np.float32) * exact + flushed


def test_a_traced_quantile_is_the_constant_one():
    x = heavy_tailed((3, 8, 12)).astype(np.float32)
    traced = jax.jit(quantile_of_magnitude)
    for q in (0.0, 0.5, 1.0):  # positions that are whole or halves
        np.testing.assert_array_equal(traced(x, jnp.float32(q)), quantile(x, q))
    # 0.9 rounded to float32 is a neighbour's part off.
    below, above = np.sort(np.abs(x[0]), axis=None)[[85, 86]]
    found = float(traced(x[0], jnp.float32(0.9))[0, 0])
    assert abs(found - expected(x[0], 0.9)[0, 0]) <= 1e-5 * (above - below)


def test_the_last_traced_quantile_of_a_long_matrix_is_its_largest_entry():
    """Positions beyond 2**24 are not whole numbers of float32, and must not run past the end."""
    x = np.ones((1, 2**24 + 2), np.float32)
    x[0, 7] = 3
    assert jax.jit(quantile_of_magnitude)(x, jnp.float32(1)) == 3


def test_infinities_are_the_largest_entries():
    x = jnp.array([[jnp.inf, 1.0, -2.0, -jnp.inf]])
    assert quantile(x, 1 / 6) == 1.5
    assert quantile(x, 1 / 3) == 2
    assert quantile(x, 0.5) == jnp.inf
    assert quantile(x, 1.0) == jnp.inf


@pytest.mark.parametrize("q", [0.0, 0.9, 1.0])
def test_a_nan_takes_its_matrix_with_it_and_no_other(q):
    x = np.random.default_rng(0).standard_normal((2, 5, 7)).astype(np.float32)
    spoilt = x.copy()
    spoilt[0, 3, 4] = np.nan
    actual = np.asarray(quantile(spoilt, q))
    assert np.isnan(actual[0]).all()
    np.testing.assert_array_equal(actual[1], quantile(x, q)[1])


def test_to_differentiation_it_is_a_constant():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 7)), jnp.float32)
    slope = jax.grad(lambda x: (x * quantile_of_magnitude(x, 0.9)).sum())(x)
    np.testing.assert_allclose(slope, jnp.broadcast_to(quantile(x, 0.9), x.shape), rtol=1e-6)


def test_no_mask_is_written_to_memory_and_nothing_sorted():
    """Beyond a copy of the bits of |x| the program needs no memory that grows with the matrix."""
    x = jax.ShapeDtypeStruct((256, 512), jnp.float32)
    compiled = quantile.lower(x, 0.9).compile()
    assert "sort(" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * 256 * 512 + 20_000
