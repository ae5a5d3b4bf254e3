import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances
from helpers import normal

from orthax.linalg.quantization import dequantize, quantize

SHAPES = [(24, 40), (40, 17), (1, 9), (3, 8, 12), (2, 2, 5, 7)]
by_bits = pytest.mark.parametrize("bits", [8, 4])
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)

save = jax.jit(quantize, static_argnums=1)
load = jax.jit(dequantize, static_argnums=(1, 2))


def there_and_back(x, bits, key=None):
    return np.asarray(load(save(x, bits, key), bits, x.shape[-1]))


def spacing(x, bits):
    x = oracles.float64(x)
    return (x.max(-1, keepdims=True) - x.min(-1, keepdims=True)) / (2**bits - 1)


def oracle(x, bits):
    """Codes, levels and exact places among them of each row: q = floor((x - min) / u + 1/2).

    A row of equal entries has one level.
    """
    x, u = oracles.float64(x), spacing(x, bits)
    low = x.min(-1, keepdims=True)
    place = (x - low) / np.where(u == 0, 1, u)
    codes = np.floor(place + 0.5)
    return codes, low + u * codes, place


def rounding(x):
    """Of a row whose entries are up to its largest magnitude."""
    size = np.abs(oracles.float64(x)).max(-1, keepdims=True)
    return tolerances.rounding(np.float32) * size


def unpacked(saved, bits, columns):
    """Codes of whole bytes, or of low halves and then of high halves."""
    codes = np.asarray(saved.codes)
    if bits == 8:
        return codes
    return np.concatenate([codes % 16, codes // 16], axis=-1)[..., :columns]


# --- nearest


@by_bits
@by_shape
def test_codes_are_those_of_the_nearest_level(shape, bits):
    x = normal(shape)
    saved = save(x, bits)
    codes, levels, place = oracle(x, bits)
    between = np.abs(place % 1 - 0.5) < 1e-4  # either is right
    actual = unpacked(saved, bits, shape[-1])
    np.testing.assert_array_equal(actual[~between], codes[~between])
    assert between.mean() < 0.01
    expected = np.where(between, x, levels)
    off = np.where(between, 0.501 * spacing(x, bits), rounding(x))
    assert (np.abs(there_and_back(x, bits) - expected) <= off).all()


@by_bits
@by_shape
def test_the_error_is_at_most_half_a_level(shape, bits):
    x = normal(shape) * 10.0 ** np.random.default_rng(1).integers(-9, 9, (*shape[:-1], 1))
    x = x.astype(np.float32)
    actual = there_and_back(x, bits)
    assert (actual.shape, actual.dtype) == (shape, np.float32)
    assert (np.abs(actual - oracles.float64(x)) <= spacing(x, bits) / 2 + rounding(x)).all()


@by_bits
@pytest.mark.parametrize("offset", [1.0, 1e3, 1e7])
def test_rows_far_from_zero_lose_no_more_than_their_own_rounding(bits, offset):
    x = normal((24, 40)) + np.float32(offset)
    error = np.abs(there_and_back(x, bits) - oracles.float64(x))
    assert (error <= spacing(x, bits) / 2 + rounding(x)).all()


@by_bits
def test_the_relative_error_on_normal_entries_is_the_oracles(bits):
    """Of a row of 256: 6 standard deviations over 255 or 15, uniform within half of that."""
    x = normal((64, 256))
    norm = np.linalg.norm(x)
    actual = np.linalg.norm(there_and_back(x, bits) - oracles.float64(x)) / norm
    expected = np.linalg.norm(oracle(x, bits)[1] - oracles.float64(x)) / norm
    assert actual == pytest.approx(expected, rel=1e-3)
    assert expected == pytest.approx(np.sqrt((spacing(x, bits) ** 2).mean() / 12), rel=0.02)


@by_bits
def test_the_ends_of_a_row_are_kept(bits):
    x = normal((24, 40))
    actual, low, high = there_and_back(x, bits), x.argmin(-1), x.argmax(-1)
    rows = np.arange(24)
    np.testing.assert_array_equal(actual[rows, low], x[rows, low])
    off = rounding(x)[:, 0]
    assert (np.abs(actual[rows, high] - oracles.float64(x[rows, high])) <= off).all()


@by_bits
def test_doing_it_again_changes_nothing_but_rounding(bits):
    x = normal((24, 40))
    once = there_and_back(x, bits)
    assert (np.abs(there_and_back(once, bits) - oracles.float64(once)) <= 2 * rounding(x)).all()


@by_bits
@pytest.mark.parametrize("value", [0.0, -0.1, 1e-30, 3.0, -3e38])
@pytest.mark.parametrize("stochastic", [False, True])
def test_rows_of_equal_entries_are_kept_exactly(bits, value, stochastic):
    x = np.full((2, 7), value, np.float32)
    x[1] = normal(7)
    key = jax.random.key(0) if stochastic else None
    np.testing.assert_array_equal(there_and_back(x, bits, key)[0], x[0])


@by_bits
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_single_column_is_kept_exactly(bits, stochastic):
    x = normal((3, 8, 1))
    key = jax.random.key(0) if stochastic else None
    np.testing.assert_array_equal(there_and_back(x, bits, key), x)


# --- stochastic


@by_bits
@by_shape
def test_the_error_of_stochastic_rounding_is_at_most_a_level(shape, bits):
    x = normal(shape)
    for seed in range(3):
        error = np.abs(there_and_back(x, bits, jax.random.key(seed)) - oracles.float64(x))
        assert (error <= spacing(x, bits) + rounding(x)).all()
    assert (error > 0.5 * spacing(x, bits) + rounding(x)).any()


@by_bits
def test_stochastic_rounding_is_right_on_average(bits):
    """The error of one draw is below a level, with a deviation of at most half of one."""
    x, draws = normal((5, 16)), 4000
    keys = jax.random.split(jax.random.key(0), draws)
    drawn = jax.jit(jax.vmap(lambda key: dequantize(quantize(x, bits, key), bits, 16)))(keys)
    bias = oracles.float64(drawn).mean(0) - x
    assert (np.abs(bias) <= 5 * 0.5 * spacing(x, bits) / draws**0.5 + rounding(x)).all()
    nearest = there_and_back(x, bits) - x
    assert np.abs(bias).max() < 0.2 * np.abs(nearest).max()


@by_bits
def test_one_key_gives_one_result_and_another_key_another(bits):
    x = normal((24, 40))
    first, again, other = (there_and_back(x, bits, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


# --- storage


@by_bits
@pytest.mark.parametrize("columns", [1, 2, 7, 12, 33])
def test_codes_take_a_byte_for_8_bits_and_for_two_of_4(bits, columns):
    x = normal((3, 8, columns))
    saved = save(x, bits)
    assert saved.codes.dtype == np.uint8
    assert saved.codes.nbytes == 24 * (columns if bits == 8 else -(-columns // 2))
    assert saved.scale.shape == saved.zero.shape == (3, 8, 1)
    assert saved.scale.dtype == saved.zero.dtype == np.float32
    error = np.abs(there_and_back(x, bits) - oracles.float64(x))
    assert (error <= spacing(x, bits) / 2 + rounding(x)).all()


def test_halves_of_a_byte_are_columns_half_a_row_apart():
    """Five columns: 0 and 3 in the first byte, 1 and 4 in the second, 2 alone in the third."""
    x = np.float32([[0, 1, 2, 14, 15]])
    np.testing.assert_array_equal(save(x, 4).codes, [[0 + 16 * 14, 1 + 16 * 15, 2]])
    np.testing.assert_allclose(there_and_back(x, 4), x, rtol=1e-6)


@by_bits
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
def test_matrices_without_entries_pass(bits, shape, stochastic):
    key = jax.random.key(0) if stochastic else None
    actual = there_and_back(np.zeros(shape, np.float32), bits, key)
    assert (actual.shape, actual.dtype) == (shape, np.float32)


@by_bits
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_16_bits_have_float32_levels(bits, dtype):
    x = jnp.asarray(normal((24, 40))).astype(dtype)
    saved = save(x, bits)
    assert saved.scale.dtype == saved.zero.dtype == np.float32
    error = np.abs(there_and_back(x, bits) - oracles.float64(x))
    assert (error <= spacing(x, bits) / 2 + rounding(x)).all()


@by_bits
def test_double_precision_is_kept(bits):
    x = np.random.default_rng(0).standard_normal((24, 40))
    with tolerances.double_precision():
        saved = quantize(jnp.asarray(x), bits)
        actual = np.asarray(dequantize(saved, bits, 40))
        assert saved.scale.dtype == saved.zero.dtype == np.float64
    np.testing.assert_allclose(actual, oracle(x, bits)[1], rtol=0, atol=1e-14)


# --- edges


@by_bits
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_range_of_a_row_may_be_beyond_the_largest_float(bits, stochastic):
    x = np.float32([[-3e38, 0, 1e38, 3e38], [-3e38, -3e38, 3e38, 3e38], [0, 0, 0, 3e38]])
    actual = there_and_back(x, bits, jax.random.key(0) if stochastic else None)
    assert np.isfinite(actual).all()
    off = spacing(x, bits) * (1 if stochastic else 0.5) + rounding(x)
    assert (np.abs(oracles.float64(actual) - oracles.float64(x)) <= off).all()


@by_bits
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e37])
def test_it_commutes_with_scaling(bits, scale):
    x = normal((24, 40))
    scaled = (x * np.float64(scale)).astype(np.float32)
    error = np.abs(there_and_back(scaled, bits) - oracles.float64(scaled))
    assert (error <= spacing(scaled, bits) / 2 + rounding(scaled)).all()


@by_bits
def test_rows_do_not_touch_each_other(bits):
    x = normal((3, 8, 12)) * 10.0 ** np.arange(-12, 12).reshape(3, 8, 1)
    x = x.astype(np.float32)
    alone = np.stack([there_and_back(row[None], bits)[0] for row in x.reshape(24, 12)])
    np.testing.assert_array_equal(there_and_back(x, bits), alone.reshape(x.shape))


@by_bits
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_row_that_is_not_finite_becomes_nan_and_no_other(bits, value, stochastic):
    x, key = normal((3, 12)), jax.random.key(0) if stochastic else None
    expected = there_and_back(x, bits, key)
    x[1, 4] = value
    actual = there_and_back(x, bits, key)
    assert np.isnan(actual[1]).all()
    np.testing.assert_array_equal(actual[[0, 2]], expected[[0, 2]])
