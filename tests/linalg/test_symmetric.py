import jax
import numpy as np
import oracles
import pytest
import tolerances
from helpers import normal

from orthax.linalg.elementary import gram, symmetric_product
from orthax.linalg.polar_factor.zolotarev import LEAF, WHOLE, inverse

DTYPES = [np.float32, np.complex64]
by_dtype = pytest.mark.parametrize("dtype", DTYPES)

LARGE = 513


def conjugate(x):
    return oracles.mT(x).conj()


def error(actual, expected):
    """Of the matrix, relative to the norm of the expected one."""
    return np.linalg.norm(oracles.float64(actual) - expected) / np.linalg.norm(expected)


# --- products


@by_dtype
@pytest.mark.parametrize("rows", [1, 7, 64, LARGE, 700])
def test_a_gram_matrix_is_that_of_numpy_and_hermitian(rows, dtype):
    x = normal((rows, 9), dtype)
    actual = jax.jit(gram)(x)
    assert actual.dtype == dtype
    assert actual.shape == (rows, rows)
    wide = oracles.float64(x)
    assert error(actual, wide @ conjugate(wide)) < tolerances.eps(dtype)
    assert error(actual, conjugate(oracles.float64(actual))) < tolerances.eps(dtype)


@by_dtype
@pytest.mark.parametrize("rows", [5, LARGE])
def test_a_product_of_polynomials_of_a_hermitian_matrix_is_that_of_numpy(rows, dtype):
    rng = np.random.default_rng(0)
    vectors = oracles.orthogonal(rng, rows, 5, dtype)
    r = ((vectors * np.linspace(0.1, 1.0, 5)) @ conjugate(vectors)).astype(dtype)
    p = (2 * np.eye(rows) - r).astype(dtype)
    actual = jax.jit(symmetric_product)(p, r)
    assert error(actual, oracles.float64(p) @ oracles.float64(r)) < tolerances.rounding(dtype)


@by_dtype
@pytest.mark.parametrize("batch", [(3,), (2, 2)], ids=str)
@pytest.mark.parametrize("rows", [6, LARGE])
def test_matrices_of_a_batch_are_multiplied_one_by_one(rows, batch, dtype):
    x = normal((*batch, rows, 4), dtype)
    actual = np.asarray(jax.jit(gram)(x))
    assert actual.shape == (*batch, rows, rows)
    for index in np.ndindex(*batch):
        wide = oracles.float64(x[index])
        assert error(actual[index], wide @ conjugate(wide)) < tolerances.eps(dtype), index


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_products_keep_double_precision(dtype):
    x = normal((LARGE, 5), dtype)
    with tolerances.double_precision():
        actual = jax.jit(gram)(x)
        assert actual.dtype == dtype
        assert error(actual, x @ conjugate(x)) < tolerances.eps(dtype)


def test_the_derivative_of_a_gram_matrix_goes_through_all_blocks():
    x = normal((LARGE, 5), np.float32)
    weight = normal((LARGE,) * 2, np.float32, seed=1)
    gradient = jax.jit(jax.grad(lambda x: (weight * gram(x)).sum()))(x)
    expected = oracles.float64(weight + weight.T) @ oracles.float64(x)
    assert error(gradient, expected) < tolerances.rounding(np.float32)


# --- inverses


def positive_definite(rows, condition, dtype):
    """Eigenvalues from 1 down to 1 / condition, half of them there."""
    spectrum = np.maximum(np.geomspace(1.0, condition**-2, rows), 1 / condition)
    vectors = oracles.orthogonal(np.random.default_rng(rows), rows, dtype=dtype)
    a = (vectors * spectrum) @ conjugate(vectors)
    return ((a + conjugate(a)) / 2).astype(dtype)


def residual(inverted, a):
    """Largest entry of I - A^-1 A."""
    a, inverted = oracles.float64(a), oracles.float64(inverted)
    return np.abs(inverted @ a - np.eye(len(a))).max()


compiled_inverse = jax.jit(inverse)


@by_dtype
@pytest.mark.parametrize("rows", [1, 5, LEAF, LEAF + 1, 2 * LEAF + 3, WHOLE + 3])
@pytest.mark.parametrize("condition", [30.0, 1e3])
def test_an_inverse_is_that_of_numpy(rows, condition, dtype):
    a = positive_definite(rows, condition, dtype)
    actual = compiled_inverse(a)
    assert actual.dtype == dtype
    limit = tolerances.rounding(dtype, gain=condition)
    expected = np.linalg.inv(oracles.float64(a))
    assert error(actual, expected) < limit
    assert error(actual, conjugate(oracles.float64(actual))) < limit


def test_a_large_inverse_is_that_of_numpy_up_to_a_hundredth_of_the_condition_of_the_dtype():
    for condition in (30.0, 1 / (100 * tolerances.eps(np.float32))):
        a = positive_definite(LARGE, condition, np.float32)
        actual = compiled_inverse(a)
        limit = tolerances.rounding(np.float32, gain=condition)
        assert error(actual, np.linalg.inv(oracles.float64(a))) < limit
        assert error(actual, oracles.float64(actual).T) < limit


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("condition", [30.0, 1 / (100 * tolerances.eps(np.float64))])
def test_double_precision_is_kept_up_to_a_hundredth_of_its_condition(condition, dtype):
    a = positive_definite(2 * LEAF + 3, condition, dtype)
    with tolerances.double_precision():
        actual = compiled_inverse(a)
        assert actual.dtype == dtype
        assert residual(actual, a) < tolerances.rounding(dtype, gain=condition)


def test_the_inverse_of_a_diagonal_matrix_is_exact_but_for_rounding():
    d = np.geomspace(1.0, 1e-4, 2 * LEAF + 3).astype(np.float32)
    np.testing.assert_allclose(compiled_inverse(np.diag(d)), np.diag(1 / d), rtol=1e-6)


def test_a_nan_is_not_hidden():
    a = positive_definite(2 * LEAF + 3, 10.0, np.float32)
    a[LEAF + 4, 7] = a[7, LEAF + 4] = np.nan
    assert np.isnan(compiled_inverse(a)).any()


def test_the_derivative_of_an_inverse_is_that_of_numpy():
    a = positive_definite(LEAF + 1, 10.0, np.float64)
    rng = np.random.default_rng(0)
    direction, weight = rng.standard_normal((2, *a.shape))
    direction = direction + direction.T
    inverted = np.linalg.inv(a)
    expected = -(weight * (inverted @ direction @ inverted)).sum()
    with tolerances.double_precision():
        _, tangent = jax.jit(
            lambda a, d: jax.jvp(lambda a: (weight * inverse(a)).sum(), (a,), (d,))
        )(a, direction)
    np.testing.assert_allclose(tangent, expected, rtol=1e-9)
