import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances

import orthax

SHAPES = [(24, 24), (40, 16), (16, 40), (1, 9), (9, 1), (3, 8, 12), (2, 2, 5, 4)]


def with_outliers(shape, seed=0):
    """Normal entries, one in twenty of them a thousand times larger."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.where(rng.random(shape) < 0.05, 1e3, 1)
    return x.astype(np.float32)


def clip(x, quantile=0.9):
    transform = orthax.clip_by_quantile(quantile)
    return jax.jit(transform.update)(x, transform.init(x))[0]


# --- the published operation


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 0.97])
def test_it_is_what_soft_thresholding_takes_away(quantile):
    tree = [with_outliers(shape) for shape in SHAPES]
    for actual, x in zip(clip(tree, quantile), tree, strict=True):
        expected = oracles.clip_by_quantile(x, quantile)
        assert actual.dtype == x.dtype
        np.testing.assert_allclose(actual, expected, rtol=3e-7, atol=0, err_msg=str(x.shape))
        outliers = np.sign(x) * np.maximum(
            np.abs(x) - np.abs(expected).max((-2, -1), None, True), 0
        )
        np.testing.assert_allclose(actual, x - outliers, atol=1e-3)


def test_the_default_is_the_papers_quantile():
    x = with_outliers((24, 40))
    np.testing.assert_array_equal(clip(x), jax.jit(orthax.clip_by_quantile().update)(x, None)[0])
    changed = np.asarray(clip(x)) != x
    assert changed.mean() == pytest.approx(0.1, abs=1 / x.size)


def test_one_clips_nothing_to_the_bit():
    for shape in SHAPES:
        x = with_outliers(shape)
        x.flat[:2] = [1e-45, -0.0]
        np.testing.assert_array_equal(np.asarray(clip(x, 1.0)).view(np.uint32), x.view(np.uint32))


def test_zero_leaves_signs_at_the_smallest_magnitude():
    x = with_outliers((24, 40))
    np.testing.assert_array_equal(clip(x, 0.0), np.sign(x) * np.abs(x).min())


def test_an_entry_however_large_counts_as_one():
    x = with_outliers((24, 40))
    x[3, 4] = 1e5
    larger = x.copy()
    larger[3, 4] = 3e38
    np.testing.assert_array_equal(clip(x, 0.95), clip(larger, 0.95))
    larger[3, 4] = np.inf
    np.testing.assert_array_equal(clip(x, 0.95), clip(larger, 0.95))


# --- laws


@pytest.mark.parametrize("power", [-66, -40, 40, 59])
def test_it_commutes_with_scaling_from_1e_minus_20_to_1e18(power):
    """Powers of two, so exactly."""
    x, scale = with_outliers((3, 24, 40)) / 1e3, np.float32(2.0**power)
    np.testing.assert_array_equal(clip(scale * x), scale * np.asarray(clip(x)))


def test_it_commutes_with_transposition():
    x = with_outliers((3, 24, 40))
    np.testing.assert_array_equal(clip(oracles.mT(x)), oracles.mT(np.asarray(clip(x))))


@pytest.mark.parametrize("shape", [(3, 24, 40), (3, 128, 256)], ids=["small", "large"])
def test_matrices_of_a_stack_are_clipped_each_by_itself(shape):
    scales = np.array([1e-6, 1, 1e6], np.float32)[:, None, None]
    x = with_outliers(shape) * scales
    np.testing.assert_array_equal(clip(x), np.stack([clip(matrix) for matrix in x]))


def test_clipping_again_changes_nothing_where_the_quantile_is_an_entry():
    x = with_outliers((3, 7, 23))  # 0.9 * 160 is whole
    once = clip(x)
    np.testing.assert_array_equal(clip(once), once)


# --- edges


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_zero_is_exactly_zero(dtype):
    x = jnp.zeros((2, 8, 12), dtype)
    for quantile in (0.0, 0.9, 1.0):
        assert not np.asarray(clip(x, quantile)).any()


def test_a_matrix_with_more_zeros_than_the_quantile_becomes_zero():
    x = np.zeros((10, 10), np.float32)
    x[:, 0] = np.arange(1, 11)
    assert not np.asarray(clip(x, 0.89)).any()
    np.testing.assert_allclose(clip(x, 0.93), np.minimum(x, np.quantile(x, 0.93)), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_clipped_in_float32(dtype):
    x = jnp.asarray(with_outliers((24, 40)) / 100, dtype)
    actual, expected = clip(x), oracles.clip_by_quantile(x, 0.9)
    assert actual.dtype == dtype
    assert oracles.relative_error(actual, expected) <= tolerances.eps(dtype)


def test_complex_entries_keep_their_phase():
    x = with_outliers((3, 24, 40)) + 1j * with_outliers((3, 24, 40), seed=1)
    x[0, 0, :5] = 0
    actual, expected = clip(x.astype(np.complex64)), oracles.clip_by_quantile(x, 0.9)
    assert actual.dtype == np.complex64
    assert oracles.relative_error(actual, expected) < 1e-6
    assert not np.asarray(actual)[0, 0, :5].any()


def test_a_nan_spoils_its_own_matrix():
    x = with_outliers((2, 24, 40))
    expected = np.asarray(clip(x))
    x[0, 3, 4] = np.nan
    actual = np.asarray(clip(x))
    assert np.isnan(actual[0]).all()
    np.testing.assert_array_equal(actual[1], expected[1])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4), (2, 0, 4)])
def test_matrices_without_entries_pass(shape):
    assert clip(jnp.zeros(shape)).shape == shape


def test_slopes_are_finite_and_one_where_nothing_is_clipped():
    x = with_outliers((24, 40))
    slopes = jax.grad(lambda x: orthax.clip_by_quantile().update(x, None)[0].sum())(jnp.asarray(x))
    kept = np.asarray(clip(x)) == x
    np.testing.assert_array_equal(slopes, kept.astype(np.float32))


def test_a_complex_entry_whose_magnitude_overflows_keeps_its_phase():
    x = jnp.array([[3e38 + 3e38j, 1.0, 1j, -1.0]])
    actual = clip(x, 0.5)
    np.testing.assert_allclose(actual, [[(1 + 1j) / 2**0.5, 1, 1j, -1]], rtol=1e-6)
