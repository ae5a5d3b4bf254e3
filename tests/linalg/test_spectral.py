"""spectral_norm: a lower bound that grows, an error that holds, a vector that follows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.sparse.linalg
import tolerances
from helpers import normal

from orthax.linalg import SpectralNorm, spectral_norm

estimate = jax.jit(spectral_norm, static_argnames="steps")
SHAPES = [(40, 16), (16, 40), (1, 9), (9, 1), (1, 1), (3, 8, 8), (2, 2, 5, 7)]
ROUNDING = 4 * tolerances.eps(np.float32)  # of a norm: of its vectors, two products and the length


def with_a_gap(shape, dtype=np.float32, seed=0):
    """Matrices whose second singular value is half the first."""
    rng = np.random.default_rng(seed)
    *batch, m, n = shape
    spectrum = np.r_[1.0, np.linspace(0.5, 0.1, min(m, n))][: min(m, n)]
    count = int(np.prod(batch))
    x = [oracles.matrix_with_spectrum(rng, m, n, spectrum, dtype) for _ in range(count)]
    return np.reshape(x, shape)


def svd(x):
    return np.linalg.svd(oracles.float64(x), full_matrices=False)


def leading(x):
    """Norm and right singular vector in float64."""
    _, s, vh = svd(x)
    return s[..., 0], vh[..., 0, :].conj()


def assert_bounded(x, result):
    """Never above the norm; a singular value within the error."""
    s = svd(x)[1]
    norm, error = oracles.float64(result.norm)[..., None], oracles.float64(result.error)[..., None]
    slack = ROUNDING * s[..., :1]
    assert (norm <= s[..., :1] + slack).all()
    assert (np.abs(s - norm).min(-1, keepdims=True) <= error + slack).all()
    assert (error >= 0).all()


def by_recursion(x, v, steps):
    """The iteration in float64: v <- X^H X v, and the norm of X^H u with the unit vector u."""
    x, v = oracles.float64(x), oracles.float64(v)
    for _ in range(steps):
        u = x @ v
        w = x.conj().T @ (u / np.linalg.norm(u))
        norm, v = np.linalg.norm(w), w / np.linalg.norm(w)
    return norm, v


# --- against the decomposition


CASES = [(shape, np.float32) for shape in SHAPES] + [((3, 12, 8), np.complex64)]


@pytest.mark.parametrize(
    ("shape", "dtype"), CASES, ids=lambda value: getattr(value, "__name__", None)
)
def test_it_converges_to_the_largest_singular_value_and_its_right_vector(shape, dtype):
    x = with_a_gap(shape, dtype)
    norm, vector, error = estimate(x, steps=30)
    expected, right = leading(x)
    assert norm.shape == error.shape == shape[:-2]
    assert vector.shape == (*shape[:-2], shape[-1])
    assert norm.dtype == error.dtype == np.float32
    assert vector.dtype == dtype
    np.testing.assert_allclose(norm, expected, rtol=ROUNDING)
    np.testing.assert_allclose(np.linalg.norm(vector, axis=-1), 1, rtol=ROUNDING)
    cosine = np.abs((np.conj(vector) * right).sum(-1))
    np.testing.assert_allclose(cosine, 1, rtol=ROUNDING)
    assert (np.asarray(error) < 1e-5).all()


def test_the_result_has_names():
    result = estimate(with_a_gap((40, 16)), steps=30)
    assert isinstance(result, SpectralNorm)
    assert result._fields == ("norm", "vector", "error")


@pytest.mark.parametrize(("steps", "dtype"), [(1, np.float32), (4, np.float32), (2, np.complex64)])
def test_each_step_multiplies_by_the_matrix_and_its_adjoint(steps, dtype):
    x, v = normal((12, 8), dtype), normal(8, dtype, seed=1)
    norm, vector, _ = estimate(x, v, steps)
    expected, right = by_recursion(x, v, steps)
    np.testing.assert_allclose(norm, expected, rtol=ROUNDING)
    np.testing.assert_allclose(vector, right, atol=5 * ROUNDING)


def test_double_precision_is_kept():
    with tolerances.double_precision():
        x = with_a_gap((12, 8), np.float64)
        norm, vector, error = estimate(jnp.asarray(x), steps=40)
        assert norm.dtype == vector.dtype == error.dtype == np.float64
        assert norm == pytest.approx(leading(x)[0], rel=1e-14)
        assert error < 1e-10


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_computed_in_float32(dtype):
    x = jnp.asarray(with_a_gap((3, 12, 8)), dtype)
    result = estimate(x, steps=30)
    assert {a.dtype for a in result} == {jnp.dtype("float32")}
    np.testing.assert_allclose(result.norm, leading(x)[0], rtol=ROUNDING)


# --- bounds


@pytest.mark.parametrize(
    ("shape", "steps", "dtype"),
    [
        ((2, 2), 1, np.float32),
        ((2, 2), 3, np.float32),
        ((5, 3), 2, np.float32),
        ((8, 8), 8, np.float32),
        ((4, 1), 1, np.float32),
        ((3, 5), 1, np.complex64),
    ],
)
def test_it_is_never_above_the_norm_and_a_singular_value_lies_within_the_error(shape, steps, dtype):
    """3000 matrices and starts each, of all scales and degrees of rank."""
    rng = np.random.default_rng(sum(shape) + steps)
    x = normal((3000, *shape), dtype, seed=steps)
    x[::3] *= 10.0 ** rng.uniform(-3, 0, (1000, 1, shape[1])).astype(np.float32)
    x[1::3] *= 10.0 ** rng.uniform(-9, 9, (1000, 1, 1)).astype(np.float32)
    assert_bounded(x, estimate(x, normal((3000, shape[1]), dtype, seed=99), steps))


def test_the_error_is_not_a_waste():
    """It is below the norm, and half of the time less than 50 times what it must be."""
    x = normal((2000, 6, 4))
    norm, _, error = estimate(x, steps=3)
    distance = np.abs(svd(x)[1] - np.asarray(norm)[:, None]).min(-1)
    assert np.median(distance / np.asarray(error)) > 0.02
    assert (np.asarray(error) < np.asarray(norm)).all()


def test_a_start_across_the_leading_direction_finds_another_singular_value():
    x = np.diag([3.0, 2.0, 1.0]).astype(np.float32)
    norm, vector, error = estimate(x, np.array([0, 1, 1], np.float32), 40)
    assert norm == pytest.approx(2)
    assert error < 1e-5
    np.testing.assert_allclose(np.abs(vector), [0, 1, 0], atol=1e-5)


def test_the_estimate_grows_with_the_steps():
    x, v = normal((50, 9, 7)), normal((50, 7), seed=1)
    norms = np.stack([estimate(x, v, steps).norm for steps in (1, 2, 6)])
    assert (norms[1:] >= norms[:-1] * (1 - ROUNDING)).all()
    assert (norms[1] > norms[0] * (1 + 1e-3)).mean() > 0.9


def test_on_a_large_gaussian_matrix_one_step_gives_seven_tenths_and_thirty_nearly_all():
    x = normal((1000, 960))
    expected = scipy.sparse.linalg.svds(
        oracles.float64(x), k=1, v0=np.ones(960), tol=1e-9, return_singular_vectors=False
    )[0]
    assert 0.65 < estimate(x).norm / expected < 0.77
    norm, _, error = estimate(x, steps=30)
    assert 0.955 < norm / expected <= 1 + ROUNDING
    assert error < 0.1 * norm


# --- from call to call


def test_calls_of_one_step_make_up_one_call_of_several():
    x = normal((9, 7))
    vector = None
    for _ in range(4):
        result = estimate(x, vector)
        vector = result.vector
    for actual, expected in zip(result, estimate(x, steps=4), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_one_step_a_call_follows_a_slowly_changing_matrix_and_one_from_the_start_does_not():
    rng = np.random.default_rng(0)
    path = rng.standard_normal((60, 40)) + 0.005 * np.cumsum(
        rng.standard_normal((200, 60, 40)), axis=0
    )
    path = path.astype(np.float32)
    expected = leading(path)[0]

    @jax.jit
    def follow(path):
        def step(vector, x):
            result = spectral_norm(x, vector)
            return result.vector, (result.norm, result.error)

        return jax.lax.scan(step, spectral_norm(path[0]).vector, path)[1]

    norms, errors = (np.asarray(a)[60:] for a in follow(path))
    np.testing.assert_allclose(norms, expected[60:], rtol=0.01)
    assert (errors < 0.01 * expected[60:]).all()
    assert (np.asarray(estimate(path).norm) < 0.9 * expected).all()


def test_the_first_direction_is_fixed_and_every_matrix_of_a_batch_has_it():
    x = normal((9, 7))
    for actual, again, twice in zip(
        estimate(x), estimate(x), estimate(np.stack([x, x])), strict=True
    ):
        np.testing.assert_array_equal(actual, again)
        np.testing.assert_allclose(twice, np.stack([actual, actual]), rtol=1e-6)


@pytest.mark.parametrize("power", [-40, -3, 5, 40])
def test_the_length_of_the_start_does_not_matter(power):
    x, v = normal((3, 9, 7)), normal((3, 7), seed=1)
    longer = estimate(x, (2.0**power * v).astype(np.float32), 2)
    for actual, expected in zip(longer, estimate(x, v, 2), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("length", [1e-30, 1e-22, 1e22, 1e30, 5e37])
def test_a_start_of_extreme_length_does_not_either(length):
    x, v = normal((9, 7)), normal(7, seed=1)
    actual = estimate(x, (length * v).astype(np.float32), 2)
    assert actual.norm == pytest.approx(float(estimate(x, v, 2).norm), rel=1e-6)
    assert np.linalg.norm(actual.vector) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_start_of_another_dtype_is_taken(dtype):
    x, v = normal((9, 7)), np.array([1, 0, -2, 3, 1, 2, 1])
    actual, expected = estimate(x, jnp.asarray(v, dtype), 2), estimate(x, v.astype(np.float32), 2)
    assert actual.vector.dtype == np.float32
    assert actual.norm == pytest.approx(float(expected.norm), rel=1e-6)


def test_a_real_start_serves_a_complex_matrix():
    x, v = normal((12, 8), np.complex64), normal(8, seed=1)
    actual, expected = estimate(x, v, 2), estimate(x, v.astype(np.complex64), 2)
    assert actual.vector.dtype == np.complex64
    np.testing.assert_allclose(actual.vector, expected.vector, atol=1e-6)


# --- laws


def test_a_batch_is_its_slices():
    scales = np.array([1e-12, 1, 1e9], np.float32)[:, None, None]
    x, v = normal((3, 9, 7)) * scales, normal((3, 7), seed=1)
    together = estimate(x, v, 2)
    for i in range(3):
        for actual, expected in zip(together, estimate(x[i], v[i], 2), strict=True):
            np.testing.assert_allclose(actual[i], expected, rtol=1e-5, atol=1e-7 * scales[i].max())


@pytest.mark.parametrize("power", [-66, -40, 40, 59])
def test_it_commutes_with_scaling_from_1e_minus_20_to_1e18(power):
    x, scale = normal((3, 9, 7)), np.float32(2.0**power)
    scaled, plain = estimate(scale * x, steps=3), estimate(x, steps=3)
    np.testing.assert_allclose(scaled.norm, scale * np.asarray(plain.norm), rtol=1e-6)
    np.testing.assert_allclose(scaled.error, scale * np.asarray(plain.error), rtol=1e-5)
    np.testing.assert_allclose(scaled.vector, plain.vector, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e30])
def test_small_and_large_matrices_converge_too(scale):
    x = (scale * with_a_gap((12, 8))).astype(np.float32)
    norm, _, error = estimate(x, steps=30)
    assert norm == pytest.approx(leading(x)[0], rel=ROUNDING)
    assert error < 1e-5 * norm


def test_columns_of_very_different_scale_do_not_spoil_it():
    x = normal((12, 8)) * np.logspace(-18, 18, 8).astype(np.float32)
    assert estimate(x, steps=5).norm == pytest.approx(leading(x)[0], rel=ROUNDING)


# --- slopes


slopes_of = jax.jit(jax.grad(lambda x: spectral_norm(x, steps=30).norm.sum()))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((12, 8), np.float32), ((8, 12), np.float32), ((12, 8), np.complex64)]
)
def test_the_gradient_is_the_product_of_the_singular_vectors(shape, dtype):
    x = with_a_gap(shape, dtype)
    u, _, vh = svd(x)
    # JAX gives the conjugate of the direction of steepest ascent.
    expected = np.outer(u[:, 0], vh[0]).conj()
    np.testing.assert_allclose(slopes_of(x), expected, atol=2e-6)


SCALES = [1e-15, 1, 1e18]


@pytest.mark.parametrize("scale", [*SCALES, 1e-20, 1e30])
def test_the_gradient_is_the_same_at_any_scale(scale):
    x = (scale * with_a_gap((12, 8))).astype(np.float32)
    u, _, vh = svd(x)
    np.testing.assert_allclose(slopes_of(x), np.outer(u[:, 0], vh[0]), atol=2e-6)


def test_the_gradient_of_a_batch_is_that_of_each_matrix():
    x = with_a_gap((3, 12, 8)) * np.array([1e-6, 1, 1e6], np.float32)[:, None, None]
    u, _, vh = svd(x)
    np.testing.assert_allclose(slopes_of(x), u[..., :, :1] * vh[..., :1, :], atol=2e-6)


def test_before_the_limit_the_gradient_takes_the_vectors_for_constant():
    """Of the norm of X^H u with the unit vector u fixed: u times the adjoint of the new vector."""
    x, v = normal((12, 8)), normal(8, seed=1)
    slopes = jax.jit(jax.grad(lambda x: spectral_norm(x, v, 2).norm))(x)
    before, after = (by_recursion(x, v, steps)[1] for steps in (1, 2))
    u = oracles.float64(x) @ before
    np.testing.assert_allclose(slopes, np.outer(u / np.linalg.norm(u), after), atol=2e-6)


def test_the_gradient_at_zero_is_zero():
    slopes = jax.jit(jax.grad(lambda x: spectral_norm(x, steps=2).norm))(jnp.zeros((3, 2)))
    assert not np.asarray(slopes).any()


def test_forward_mode_agrees():
    x, direction = with_a_gap((12, 8)), normal((12, 8), seed=3)
    u, _, vh = svd(x)
    norm = functools.partial(spectral_norm, steps=30)
    _, slope = jax.jit(lambda x, t: jax.jvp(lambda x: norm(x).norm, (x,), (t,)))(x, direction)
    assert slope == pytest.approx(u[:, 0] @ direction @ vh[0], abs=1e-5)


# --- edges


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_zero_matrix_gives_zero_and_the_vector_that_came(dtype):
    x = jnp.zeros((2, 5, 2), dtype)
    norm, vector, error = estimate(x, jnp.array([[3.0, 4.0], [0.0, 2.0]]), 2)
    assert not np.asarray(norm).any()
    assert not np.asarray(error).any()
    np.testing.assert_allclose(vector, [[0.6, 0.8], [0, 1]], rtol=1e-6)
    assert np.linalg.norm(estimate(x).vector[0]) == pytest.approx(1, rel=1e-6)


def test_a_vector_that_waited_at_a_zero_matrix_goes_on():
    vector = estimate(jnp.zeros((12, 8)), steps=30).vector
    x = with_a_gap((12, 8))
    assert estimate(x, vector, 30).norm == pytest.approx(1, rel=ROUNDING)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_own_matrix(bad):
    x = normal((3, 9, 7))
    expected = [np.asarray(a) for a in estimate(x, steps=3)]
    x[0, 3, 4] = bad
    actual = estimate(x, steps=3)
    for found, clean in zip(actual, expected, strict=True):
        assert np.isnan(found[0]).all()
        np.testing.assert_allclose(found[1:], clean[1:], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4), (2, 0, 4)], ids=str)
def test_matrices_without_entries_have_norm_zero(shape):
    norm, vector, error = estimate(jnp.zeros(shape))
    assert norm.shape == error.shape == shape[:-2]
    assert vector.shape == (*shape[:-2], shape[-1])
    assert not np.asarray(norm).any()
    assert not np.asarray(error).any()


def test_a_start_that_the_matrix_maps_to_zero_gives_zero():
    norm, vector, _ = estimate(jnp.diag(jnp.array([2.0, 0.0])), jnp.array([0.0, 3.0]), 3)
    assert norm == 0
    np.testing.assert_array_equal(vector, [0, 1])
