import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.linalg
import tolerances
from helpers import normal

from orthax.linalg.bases.hadamard import check_hadamard_size, hadamard_columns, hadamard_transform


def is_prime(q):
    return q > 1 and all(q % factor for factor in range(2, q))


def has_construction(n):
    """A power of two, or (q + 1) 2**k of a prime q = 3 mod 4."""
    halves = [n]
    while halves[-1] % 2 == 0:
        halves.append(halves[-1] // 2)
    return halves[-1] == 1 or any(half % 4 == 0 and is_prime(half - 1) for half in halves)


KNOWN = [n for n in range(1, 133) if has_construction(n)]
UNKNOWN = [n for n in range(1, 133) if not has_construction(n)]
SIZES = [*KNOWN, 768]
by_size = pytest.mark.parametrize("n", SIZES)
by_some_sizes = pytest.mark.parametrize("n", [1, 2, 12, 16, 20, 24, 48, 60, 96])


@functools.cache
def whole(n, dtype=jnp.float32):
    return np.asarray(jax.jit(lambda: hadamard_columns(n, jnp.arange(n), dtype))())


def limit(x):
    return tolerances.rounding(x.dtype, gain=np.abs(x).max())


# --- which sizes there are


def test_the_sizes_are_powers_of_two_and_those_of_paley():
    multiples_of_four = {*range(4, 133, 4)}
    assert {*UNKNOWN} & multiples_of_four == {28, 36, 52, 56, 76, 92, 100, 112, 116, 124}
    assert {*KNOWN} - multiples_of_four == {1, 2}
    for n in (*SIZES, 1280, 4096):
        check_hadamard_size("low_rank", n)


@pytest.mark.parametrize("n", [*UNKNOWN, 768 + 1, 3 * 2**10 + 4])
def test_other_sizes_are_refused_with_the_call_and_the_size(n):
    with pytest.raises(ValueError, match=rf"low_rank: 'w'.*size {n} .*2\*\*k.*12, 20, 24"):
        check_hadamard_size("low_rank: 'w'", n)


@pytest.mark.parametrize("n", [3, 28, 36])
def test_neither_transform_nor_columns_exist_for_other_sizes(n):
    with pytest.raises(ValueError, match=f"hadamard: .*size {n} "):
        hadamard_transform(jnp.ones((2, n)))
    with pytest.raises(ValueError, match=f"hadamard: .*size {n} "):
        hadamard_columns(n, jnp.arange(2), jnp.float32)


# --- the matrices


@by_size
def test_the_matrix_is_orthogonal(n):
    matrix = whole(n)
    assert (matrix.shape, matrix.dtype) == ((n, n), np.float32)
    product = oracles.float64(matrix).T @ oracles.float64(matrix)
    # Entries are one rounded product of two rounded roots.
    np.testing.assert_allclose(product, np.eye(n), rtol=0, atol=4 * tolerances.eps(np.float32))


@by_size
def test_all_entries_are_plus_and_minus_one_over_the_root_of_the_size(n):
    size = np.abs(oracles.float64(whole(n)))
    np.testing.assert_allclose(size, n**-0.5, rtol=2 * tolerances.eps(np.float32))
    signs = np.sign(oracles.float64(whole(n))).astype(int)
    np.testing.assert_array_equal(signs.T @ signs, n * np.eye(n, dtype=int))


@pytest.mark.parametrize("n", [2**k for k in range(9)])
def test_of_powers_of_two_it_is_sylvesters(n):
    np.testing.assert_array_equal(np.sign(whole(n)), scipy.linalg.hadamard(n))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_entries_have_the_dtype_that_is_asked_for(dtype):
    matrix = whole(48, dtype)
    assert matrix.dtype == dtype
    np.testing.assert_allclose(
        np.abs(oracles.float64(matrix)), 48**-0.5, rtol=2 * tolerances.eps(dtype)
    )


def test_double_precision_is_kept():
    x = normal((3, 24), np.float64)
    with tolerances.double_precision():
        matrix, actual = whole(24, jnp.float64), hadamard_transform(jnp.asarray(x))
        actual = np.asarray(actual)
    assert matrix.dtype == actual.dtype == np.float64
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(24), rtol=0, atol=1e-15)
    np.testing.assert_allclose(actual, x @ matrix, rtol=0, atol=limit(x))


# --- the transform


@by_size
def test_the_transform_is_the_product_with_the_matrix(n):
    x = normal((3, n))
    actual = jax.jit(hadamard_transform)(x)
    assert (actual.shape, actual.dtype) == (x.shape, x.dtype)
    exact = oracles.float64(x) @ oracles.float64(whole(n))
    np.testing.assert_allclose(actual, exact, rtol=0, atol=limit(x))


@pytest.mark.parametrize("shape", [(2, 3, 24), (2, 1, 3, 12), (0, 16), (2, 0, 20)], ids=str)
def test_it_transforms_every_row_of_a_batch(shape):
    x = normal(shape)
    actual = hadamard_transform(jnp.asarray(x))
    exact = oracles.float64(x) @ oracles.float64(whole(shape[-1]))
    np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-5)


@by_some_sizes
def test_it_transforms_complex_rows(n):
    x = normal((3, n), np.complex64)
    actual = hadamard_transform(jnp.asarray(x))
    assert actual.dtype == np.complex64
    exact = oracles.float64(x) @ oracles.float64(whole(n))
    limit = tolerances.rounding(np.float32, gain=np.abs(x).max())
    np.testing.assert_allclose(actual, exact, rtol=0, atol=limit)


@by_some_sizes
def test_it_keeps_norms_and_its_gradient_is_the_transpose(n):
    x, slopes = normal((3, n)), normal((3, n))[::-1].copy()
    norms = np.linalg.norm(hadamard_transform(jnp.asarray(x)), axis=-1)
    np.testing.assert_allclose(norms, np.linalg.norm(x, axis=-1), rtol=1e-6)
    gradient = jax.grad(lambda x: (slopes * hadamard_transform(x)).sum())(jnp.asarray(x))
    exact = oracles.float64(slopes) @ oracles.float64(whole(n)).T
    np.testing.assert_allclose(gradient, exact, rtol=0, atol=limit(x))


@pytest.mark.parametrize("n", [48, 768])
def test_no_product_is_as_large_as_the_matrix(n):
    """Two factors of about the root of n, so n**1.5 operations a row instead of n**2."""
    program = jax.make_jaxpr(hadamard_transform)(jnp.zeros((3, n)))
    for left, right in oracles.matrix_products(program):
        assert min(np.prod(left), np.prod(right)) <= 4 * n


# --- columns


@by_some_sizes
def test_columns_are_those_of_the_matrix(n):
    matrix = whole(n)
    indices = np.random.default_rng(0).permutation(n)[: (n + 1) // 2]
    columns = jax.jit(lambda indices: hadamard_columns(n, indices, jnp.float32))
    np.testing.assert_array_equal(columns(indices), matrix[:, indices])
    batched = np.random.default_rng(0).integers(0, n, (2, 3, 4))
    actual = columns(batched)
    assert actual.shape == (2, 3, n, 4)
    np.testing.assert_array_equal(actual, np.moveaxis(matrix[:, batched], 0, -2))
