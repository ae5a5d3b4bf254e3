import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances

from orthax.linalg import coefficients, newton_schulz, polar_svd

SHAPES = [(8, 8), (12, 5), (5, 12), (2, 2, 7, 4), (1, 9), (9, 1)]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def tolerance(shape, dtype=np.float32):
    """The polar factor enlarges an error by at most 1 over the smallest singular value, here 2."""
    return tolerances.rounding(dtype, min(shape[-2:]), 2.0)


@by_shape
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_it_is_the_polar_factor(shape, dtype):
    x = oracles.well_conditioned(shape, dtype)
    actual = polar_svd(jnp.asarray(x))
    assert actual.shape == shape
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual, oracles.polar(x), rtol=0, atol=tolerance(shape))


@by_shape
def test_the_other_factor_is_symmetric_and_positive(shape):
    """X = Q H with H = Q^T X symmetric, positive semi-definite: the definition, without an SVD."""
    x = oracles.well_conditioned(shape)
    q = oracles.float64(polar_svd(jnp.asarray(x)))
    if shape[-2] < shape[-1]:
        q, x = oracles.mT(q), oracles.mT(x)
    factor = oracles.mT(q) @ x
    atol = 2 * tolerance(shape)
    np.testing.assert_allclose(factor, oracles.mT(factor), atol=atol)
    np.testing.assert_allclose(q @ factor, x, atol=atol)
    assert np.linalg.eigvalsh(factor).min() > 0.4


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_double_precision_is_kept(dtype):
    x = oracles.well_conditioned((12, 5), dtype)
    with tolerances.double_precision():
        actual = polar_svd(jnp.asarray(x))
        assert actual.dtype == dtype
        actual = np.asarray(actual)
    np.testing.assert_allclose(
        actual, oracles.polar(x), rtol=0, atol=tolerance(x.shape, np.float64)
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_half_precision_costs_only_the_rounding_of_the_result(scale, dtype):
    x = jnp.asarray(oracles.well_conditioned((12, 5)) * np.float32(scale)).astype(dtype)
    actual = polar_svd(x)
    assert actual.dtype == dtype
    expected = oracles.polar(oracles.float64(x))
    np.testing.assert_allclose(
        oracles.float64(actual), expected, rtol=tolerances.eps(dtype), atol=1e-6
    )


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e18])
@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (2, 2, 7, 4)], ids=str)
def test_the_scale_of_the_input_does_not_matter(shape, scale):
    x = (oracles.well_conditioned(shape).astype(np.float64) * scale).astype(np.float32)
    np.testing.assert_allclose(
        polar_svd(jnp.asarray(x)), oracles.polar(x), rtol=0, atol=tolerance(shape)
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (1, 9)], ids=str)
def test_zero_is_mapped_to_exactly_zero(shape, dtype):
    actual = polar_svd(jnp.zeros(shape, dtype))
    assert actual.dtype == dtype
    assert not np.asarray(actual, np.complex64).any()


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
def test_zero_singular_values_stay_zero(shape, rank, scale):
    rng = np.random.default_rng(3)
    left, right = oracles.orthogonal(rng, shape[0], rank), oracles.orthogonal(rng, rank, shape[1])
    x = ((left * np.linspace(1.0, 0.5, rank)) @ right * scale).astype(np.float32)
    np.testing.assert_allclose(
        polar_svd(jnp.asarray(x)),
        left @ right,
        rtol=0,
        atol=tolerances.rounding(np.float32, 1, 2.0),
    )


def test_a_batch_is_its_slices():
    x = oracles.well_conditioned((2, 2, 7, 4))
    x[0, 1] = 0
    whole = polar_svd(jnp.asarray(x))
    for index in np.ndindex(2, 2):
        np.testing.assert_allclose(
            whole[index], oracles.polar(x[index]) * (index != (0, 1)), atol=tolerance(x.shape)
        )


@by_shape
def test_its_root_mean_square_is_one_over_the_root_of_the_longer_side(shape):
    """Lemma 1 of Moonlight (2502.16982)."""
    q = oracles.float64(polar_svd(jnp.asarray(oracles.well_conditioned(shape))))
    rms = np.sqrt((q**2).mean((-2, -1)))
    np.testing.assert_allclose(rms, max(shape[-2:]) ** -0.5, rtol=1e-6)


def test_an_orthogonal_matrix_is_a_fixed_point():
    q = oracles.orthogonal(np.random.default_rng(0), 12, 5).astype(np.float32)
    np.testing.assert_allclose(polar_svd(jnp.asarray(q)), q, rtol=0, atol=tolerance(q.shape))


def test_it_can_be_compiled_and_vectorised():
    x = oracles.well_conditioned((2, 5, 12))
    expected = oracles.polar(x)
    for function in (jax.jit(polar_svd), jax.vmap(polar_svd)):
        np.testing.assert_allclose(function(x), expected, rtol=0, atol=tolerance(x.shape))


@by_shape
def test_newton_schulz_with_an_accurate_table_finds_the_same_factor(shape):
    x = oracles.well_conditioned(shape)
    table = coefficients.minimax(8, 1e-2)
    actual = newton_schulz(jnp.asarray(x), table)
    np.testing.assert_allclose(actual, oracles.polar(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_fewer_than_two_axes_are_refused(shape):
    with pytest.raises(ValueError, match=r"axes|axis|dimension"):
        polar_svd(jnp.ones(shape))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="int32"):
        polar_svd(jnp.ones((2, 2), jnp.int32))
