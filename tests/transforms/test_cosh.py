import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances
from helpers import normal

import orthax

SHAPES = [(24, 24), (40, 16), (16, 40), (1, 9), (1, 1), (3, 8, 12), (2, 2, 5, 4)]
MODES = ["paper", "code", "rms"]
LARGE = (768, 3072)

every_mode = pytest.mark.parametrize("mode", MODES)


def scaled(x, mode, gamma=1.0):
    transform = orthax.scale_by_cosh_rms(gamma, mode)
    return jax.jit(transform.update)(x, transform.init(x))[0]


def norm(x):
    return np.sqrt((np.abs(oracles.float64(x)) ** 2).sum((-2, -1)))


def spike(shape):
    """One entry a million times larger than the others."""
    x = normal(shape)
    x[..., 0, 0] = 1e6
    return x


# --- the published formulas


@pytest.mark.parametrize("gamma", [0.0, 1.5, 10.0])
@every_mode
def test_it_is_the_transcription(mode, gamma):
    tree = [normal(shape) for shape in (*SHAPES, (3, 128, 256))]
    for actual, x in zip(scaled(tree, mode, gamma), tree, strict=True):
        assert actual.dtype == x.dtype
        expected = oracles.cosh_direction(x, gamma, mode)
        limit = tolerances.rounding(np.float32, gain=1 + 10 * gamma)  # slope of log cosh: gamma z
        assert oracles.relative_error(actual, expected) < limit, x.shape


@pytest.mark.parametrize("gamma", [1.5, 30.0])
@every_mode
def test_it_is_so_in_double_precision(mode, gamma):
    x = np.random.default_rng(0).standard_normal((3, 8, 12))
    expected = oracles.cosh_direction(x, gamma, mode)
    with tolerances.double_precision():
        actual = scaled(jnp.asarray(x), mode, gamma)
    assert actual.dtype == np.float64
    # The guards of the norm differ: here 1e-7 is 6e-9 of it, and of the arguments of cosh.
    limit = 1e-12 if mode == "rms" else 1e-8 * (1 + gamma)
    assert oracles.relative_error(actual, expected) < limit


def test_the_defaults_are_the_papers():
    x = normal((8, 8))
    transform = orthax.scale_by_cosh_rms()
    updates, _ = jax.jit(transform.update)(x, transform.init(x))
    np.testing.assert_array_equal(updates, scaled(x, "paper", 1.0))


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("gamma", [1.0, 1.5])
def test_r_exceeds_one_by_half_gamma_squared_over_the_entries(size, gamma):
    """To first order. At gamma 1.5 that is 1.1e-3 for 32 x 32 and 2.7e-4 for 64 x 64."""
    x = normal((size, size))
    excess = gamma**2 / (2 * size**2)
    for found in (norm(x) / norm(scaled(x, "code", gamma)), 1 / norm(scaled(x, "paper", gamma))):
        assert found - 1 == pytest.approx(excess, rel=0.02, abs=tolerances.eps(np.float32))


@pytest.mark.parametrize("gamma", [1.0, 1.5, 3.0])
def test_in_double_precision_it_does_so_for_large_matrices(gamma):
    """R - 1 is 2e-7 at gamma 1, which float32 has no room for."""
    x = np.random.default_rng(0).standard_normal(LARGE)
    with tolerances.double_precision():
        found = 1 / norm(scaled(jnp.asarray(x), "paper", gamma)) - 1 - 1e-8
    assert found == pytest.approx(gamma**2 / (2 * x.size), rel=1e-4)


def test_the_papers_direction_has_unit_norm_whatever_the_matrix():
    tree = [normal((64, 64)), spike((64, 64)), np.eye(64, dtype=np.float32), normal(LARGE)]
    for actual in scaled(tree, "paper"):
        assert norm(actual) == pytest.approx(1, abs=1e-3)


def test_the_repositorys_direction_is_the_matrix():
    tree = [normal(LARGE), spike(LARGE)]
    for actual, x in zip(scaled(tree, "code", 1.5), tree, strict=True):
        np.testing.assert_allclose(actual, x, rtol=3e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.5])
def test_in_units_of_the_rms_normal_entries_have_the_r_of_a_normal_distribution(gamma):
    """E cosh(gamma z)^2 = (1 + exp(2 gamma^2)) / 2."""
    r = 1 / norm(scaled(normal(LARGE), "rms", gamma))
    assert r == pytest.approx(np.sqrt((1 + np.exp(2 * gamma**2)) / 2), rel=0.02)


def test_in_units_of_the_rms_one_outlier_brakes():
    x = normal(LARGE)
    braked = []
    for largest in (x[0, 0], 10, 20):
        x[0, 0] = largest
        braked.append(1 / norm(scaled(x, "rms")))
    assert braked == pytest.approx([2.05, 7.47, 1.58e5], rel=0.01)


# --- extremes


@pytest.mark.parametrize("gamma", [1.0, 60.0, 100.0])
@every_mode
def test_a_spike_does_not_overflow(mode, gamma):
    x = spike(LARGE)
    actual = np.asarray(scaled(x, mode, gamma))
    assert np.isfinite(actual).all()
    expected = oracles.cosh_direction(x, gamma, mode)
    # exp(gamma) is as many roundings off as gamma is large; an 1 / R that underflows is zero.
    limit = 8 * tolerances.eps(np.float32) * (1 + gamma) * np.abs(expected).max()
    flushed = np.finfo(np.float32).tiny * (x.max() if mode == "code" else 1)
    assert np.abs(actual - expected).max() <= limit + flushed


@pytest.mark.parametrize("gamma", [1e3, 1e30])
@every_mode
def test_a_gamma_without_sense_does_not_overflow(mode, gamma):
    tree = [normal((24, 24)), spike((24, 24)), np.eye(3, dtype=np.float32)]
    for actual in scaled(tree, mode, gamma):
        assert np.isfinite(actual).all()


@pytest.mark.parametrize("power", [-66, -40, 40, 59])
@every_mode
def test_it_follows_the_scale_from_1e_minus_20_to_1e18(mode, power):
    """Not at all, but for the repository's, which keeps it. The brake of a spike is exp(31)."""
    x, scale = spike((3, 24, 40)) / 1e6, np.float32(2.0**power)
    expected = np.asarray(scaled(x, mode)) * (scale if mode == "code" else 1)
    limit = tolerances.rounding(np.float32, gain=31 if mode == "rms" else 1)
    np.testing.assert_allclose(scaled(scale * x, mode), expected, rtol=limit)


@every_mode
def test_entries_near_the_ends_of_float32_stay_finite_and_count(mode):
    for scale in (1e-37, 3e38):
        actual = np.asarray(scaled(np.float32(scale) * np.eye(8, dtype=np.float32), mode))
        assert np.isfinite(actual).all()
        assert (np.diagonal(actual) > 0).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@every_mode
def test_zero_is_exactly_zero_also_beside_others(mode, dtype):
    x = jnp.asarray(normal((3, 8, 12)), dtype).at[1].set(0)
    actual = np.asarray(scaled(x, mode).astype(np.complex64))
    assert np.isfinite(actual).all()
    assert not actual[1].any()
    assert actual[0].any()
    assert actual[2].any()


@every_mode
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_own_matrix(mode, bad):
    x = normal((2, 8, 12))
    expected = np.asarray(scaled(x, mode))
    x[0, 3, 4] = bad
    actual = np.asarray(scaled(x, mode))
    assert np.isnan(actual[0]).all()
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-6)


@every_mode
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4), (2, 0, 4)])
def test_matrices_without_entries_pass(shape, mode):
    assert scaled(jnp.zeros(shape), mode).shape == shape


# --- laws


@every_mode
@pytest.mark.parametrize("shape", [(3, 24, 40), (3, 128, 256)], ids=["small", "large"])
def test_matrices_of_a_stack_are_scaled_each_by_itself(shape, mode):
    x = normal(shape) * np.array([1e-6, 1, 1e6], np.float32)[:, None, None]
    x[2, 0, 0] = 1e7
    expected = np.stack([scaled(matrix, mode) for matrix in x])
    np.testing.assert_allclose(scaled(x, mode), expected, rtol=1e-6)


def test_slopes_are_finite_also_at_zero():
    x = jnp.asarray(normal((3, 8, 12))).at[1].set(0)
    for mode in MODES:
        slopes = jax.grad(lambda x, mode=mode: (scaled(x, mode) ** 2).sum())(x)
        assert np.isfinite(slopes).all(), mode


@every_mode
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_summed_in_float32(mode, dtype):
    x = jnp.asarray(100 * normal((200, 300)), dtype)  # the sum of squares is beyond float16
    actual = scaled(x, mode)
    assert actual.dtype == dtype
    expected = oracles.cosh_direction(x, 1.0, mode)
    assert oracles.relative_error(actual, expected) <= tolerances.eps(dtype)


@every_mode
def test_complex_matrices_are_scaled_by_their_magnitudes(mode):
    x = (normal((3, 8, 12)) + 1j * normal((3, 8, 12), seed=1)).astype(np.complex64)
    turned = oracles.cosh_direction(np.abs(x), 1.0, mode) * (x / np.abs(x))
    assert oracles.relative_error(scaled(x, mode), turned) < 2e-6


@pytest.mark.skipif(
    jax.__version_info__ < (0, 8), reason="XLA of jax 0.7 writes the normalised matrix to memory"
)
@every_mode
def test_nothing_of_the_size_of_the_matrix_is_kept_beside_it(mode):
    transform, x = orthax.scale_by_cosh_rms(mode=mode), jax.ShapeDtypeStruct((256, 512), "float32")
    compiled = jax.jit(lambda x: transform.update(x, None)[0]).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * 256 * 512 / 4
