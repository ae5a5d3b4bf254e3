import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.fft
import tolerances
from helpers import lowered_for, normal, values_as_on

from orthax.linalg import dct, dct_matrix, idct
from orthax.linalg.bases.cosine import FFT_FROM, LONGEST, dct_columns

SIZES = [1, 2, 3, 5, 8, 24, 33, 256, 257]
METHODS = ["matrix", "fft"]
ORACLES = {dct: scipy.fft.dct, idct: scipy.fft.idct}
GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "reference.npz"

by_size = pytest.mark.parametrize("n", SIZES)
by_method = pytest.mark.parametrize("method", METHODS)
by_function = pytest.mark.parametrize("function", [dct, idct], ids=["dct", "idct"])


def expected(function, x):
    return ORACLES[function](oracles.float64(x), norm="ortho", axis=-1)


def compiled(function, method="auto"):
    return jax.jit(functools.partial(function, method=method))


def formula(n, columns=None):
    """Columns of the DCT-II matrix; the angle is reduced as a whole number."""
    k = np.arange(n) if columns is None else np.asarray(columns)
    place = np.arange(n)[:, None]
    angle = k * (2 * place + 1) % (4 * n) * (np.pi / (2 * n))
    return np.where(k == 0, np.sqrt(1 / n), np.sqrt(2 / n) * np.cos(angle))


def limit(x):
    """Rounding errors of coefficients of the size of the entries of x."""
    return tolerances.rounding(x.dtype, gain=np.abs(x).max())


def golden(name):
    with np.load(GOLDEN) as file:
        return file[f"dct/{name}"]


# --- the transforms


@by_size
@by_method
@by_function
def test_it_is_scipys_orthonormal_transform(function, method, n):
    x = normal((4, n))
    actual = compiled(function, method)(x)
    assert actual.dtype == x.dtype
    np.testing.assert_allclose(actual, expected(function, x), rtol=0, atol=limit(x))


@by_size
@by_method
@by_function
def test_it_is_as_exact_in_double_precision(function, method, n):
    x = normal((4, n), np.float64)
    with tolerances.double_precision():
        actual = np.asarray(compiled(function, method)(x))
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected(function, x), rtol=0, atol=limit(x))


@pytest.mark.parametrize("shape", [(2, 3, 24), (2, 1, 3, 5), (1, 1)], ids=str)
@by_method
@by_function
def test_every_row_of_a_batch_is_transformed(function, method, shape):
    x = normal(shape)
    np.testing.assert_allclose(
        compiled(function, method)(x),
        expected(function, x),
        rtol=0,
        atol=limit(x),
    )


@pytest.mark.parametrize(("n", "dtype"), [(1, jnp.float16), (24, jnp.bfloat16), (33, jnp.float16)])
@by_method
@by_function
def test_16_bits_are_transformed_in_float32(function, method, dtype, n):
    x = jnp.asarray(normal((4, n))).astype(dtype)
    actual = compiled(function, method)(x)
    assert actual.dtype == dtype
    np.testing.assert_allclose(
        oracles.float64(actual),
        expected(function, x),
        rtol=tolerances.eps(dtype) / 2,
        atol=tolerances.rounding(np.float32),
    )


@pytest.mark.parametrize("n", [1, 24, 33])
@by_method
@by_function
def test_parts_of_complex_rows_are_transformed_each_by_itself(function, method, n):
    x = normal((4, n), np.complex64)
    actual = compiled(function, method)(x)
    assert actual.dtype == np.complex64
    exact = expected(function, x.real) + 1j * expected(function, x.imag)
    np.testing.assert_allclose(actual, exact, rtol=0, atol=limit(x.real))


@by_method
def test_it_is_what_the_papers_code_computes(method):
    x, y = golden("x"), golden("makhoul")
    for function, of, result in ((dct, x, y), (idct, y, x)):
        np.testing.assert_allclose(
            compiled(function, method)(of),
            result,
            rtol=0,
            atol=limit(x),
        )


@by_size
@by_method
def test_the_inverse_takes_it_back(method, n):
    x = normal((4, n))
    there, back = compiled(dct, method), compiled(idct, method)
    np.testing.assert_allclose(back(there(x)), x, rtol=0, atol=limit(x))
    np.testing.assert_allclose(there(back(x)), x, rtol=0, atol=limit(x))


@by_method
@by_function
def test_it_keeps_the_norm_of_a_row(function, method):
    x = normal((4, 33))
    actual = oracles.float64(compiled(function, method)(x))
    np.testing.assert_allclose(
        np.linalg.norm(actual, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6
    )


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 2, 300)], ids=str)
@pytest.mark.parametrize(
    ("method", "dtype"),
    [("auto", jnp.float32), ("matrix", jnp.bfloat16), ("fft", jnp.complex64)],
)
@by_function
def test_arrays_without_entries_pass(function, method, dtype, shape):
    actual = function(jnp.zeros(shape, dtype), method=method)
    assert (actual.shape, actual.dtype) == (shape, dtype)


@by_method
@by_function
def test_zero_is_exactly_zero(function, method):
    assert not np.asarray(function(jnp.zeros((2, 24)), method=method)).any()


@by_method
@by_function
def test_a_nan_spoils_its_own_row(function, method):
    x = normal((3, 24))
    x[1, 5] = np.nan
    actual = np.asarray(compiled(function, method)(x))
    assert np.isnan(actual).all(-1).tolist() == [False, True, False]
    assert np.isfinite(actual[[0, 2]]).all()


def test_a_constant_row_has_its_energy_in_the_first_coefficient():
    actual = np.asarray(dct(jnp.ones((1, 100))))
    np.testing.assert_allclose(actual, [[10.0, *[0.0] * 99]], atol=1e-5)


@by_method
@by_function
def test_without_jit_it_is_the_same(function, method):
    x = normal((4, 24))
    np.testing.assert_allclose(
        function(x, method=method), compiled(function, method)(x), rtol=0, atol=limit(x)
    )


# --- derivatives


@pytest.mark.parametrize("n", [1, 2, 24, 33])
@by_method
@pytest.mark.parametrize(("function", "inverse"), [(dct, idct), (idct, dct)], ids=["dct", "idct"])
def test_the_gradient_is_the_inverse_of_the_slopes(function, inverse, method, n):
    """An orthogonal matrix, so both methods have one gradient."""
    x, slopes = normal((4, n)), normal((4, n))[::-1].copy()
    gradient = jax.jit(jax.grad(lambda x: (slopes * function(x, method=method)).sum()))(x)
    np.testing.assert_allclose(gradient, expected(inverse, slopes), rtol=0, atol=limit(slopes))


# --- the choice of a method


def uses_fft(function, x, method="auto"):
    program = jax.make_jaxpr(lambda x: function(x, method=method))(x)
    return any(equation.primitive.name == "fft" for equation in oracles.equations(program))


@by_function
def test_a_method_by_name_is_that_method(function):
    x = jnp.zeros((2, 600))
    assert uses_fft(function, x, "fft")
    assert not uses_fft(function, x, "matrix")
    (factors,) = oracles.matrix_products(jax.make_jaxpr(lambda x: function(x, method="matrix"))(x))
    assert factors == ((2, 600), (600, 600))


def uses_fft_on(platform, function, shape, dtype=jnp.float32):
    return "fft" in lowered_for(platform, function, jax.ShapeDtypeStruct(shape, dtype))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
@by_function
def test_long_rows_are_transformed_by_fft_on_a_cpu(function, dtype):
    length = FFT_FROM["cpu"]
    assert uses_fft_on("cpu", function, (2, length), dtype)
    assert not uses_fft_on("cpu", function, (2, length - 1), dtype)
    assert not uses_fft_on("cpu", function, (length, 2), dtype)


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
@by_function
def test_other_platforms_multiply(function, platform):
    assert not uses_fft_on(platform, function, (2, 1024))


@by_function
def test_rows_for_which_there_is_no_matrix_are_transformed_by_fft_everywhere(function):
    assert uses_fft_on("tpu", function, (1, LONGEST + 1))


@by_function
def test_the_platform_changes_nothing_but_rounding(function):
    x = jnp.asarray(normal((3, 300)))
    with values_as_on("tpu"):
        by_product = function(x)
    np.testing.assert_allclose(by_product, function(x), rtol=0, atol=limit(x))


# --- the matrix


@by_size
def test_the_matrix_is_exact_to_the_rounding_of_its_dtype(n):
    """One half of eps; the angle of an entry near zero is itself rounded, in float64."""
    exact = formula(n)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        actual = jax.jit(dct_matrix, static_argnums=(0, 1))(n, dtype)
        assert (actual.shape, actual.dtype) == ((n, n), dtype)
        subnormal = float(jnp.finfo(dtype).smallest_subnormal)
        np.testing.assert_allclose(
            oracles.float64(actual),
            exact,
            rtol=0.501 * tolerances.eps(dtype),
            atol=max(subnormal, 1e-15),
        )
    with tolerances.double_precision():
        actual = np.asarray(jax.jit(dct_matrix, static_argnums=(0, 1))(n, jnp.float64))
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, exact, rtol=0, atol=4 * tolerances.eps(np.float64))


@by_size
def test_the_matrix_is_orthogonal(n):
    matrix = oracles.float64(dct_matrix(n))
    error = np.abs(matrix.T @ matrix - np.eye(n)).max()
    assert error <= tolerances.eps(np.float32)  # of the squares of entries that are half off


@by_size
def test_the_product_with_the_matrix_is_the_transform(n):
    x, matrix = normal((4, n)), dct_matrix(n)
    for function, factor in ((dct, matrix), (idct, matrix.T)):
        product = oracles.float64(x) @ oracles.float64(factor)
        np.testing.assert_allclose(product, expected(function, x), rtol=0, atol=limit(x))


def test_its_transpose_is_the_matrix_of_the_papers_code():
    """The code rounds angles of up to 23 * 47 pi / 48 in float32."""
    actual, given = np.asarray(dct_matrix(24).T), golden("matrix24")
    off = tolerances.rounding(np.float32, 24, gain=23 * 47 * np.pi / 48)
    np.testing.assert_allclose(actual, given, rtol=0, atol=off)


@pytest.mark.parametrize("n", [1, 5, 24])
@pytest.mark.parametrize("transposed", [False, True])
def test_columns_are_those_of_the_matrix(n, transposed):
    matrix = np.asarray(dct_matrix(n).T if transposed else dct_matrix(n))
    indices = np.random.default_rng(0).integers(0, n, (2, 3, 4))
    actual = jax.jit(lambda indices: dct_columns(n, indices, jnp.float32, transposed=transposed))(
        indices
    )
    assert actual.shape == (2, 3, n, 4)
    np.testing.assert_array_equal(actual, np.moveaxis(matrix[:, indices], 0, -2))


@pytest.mark.parametrize("transposed", [False, True])
def test_columns_of_the_longest_matrix_are_as_exact(transposed):
    """Frequency times place is beyond int32, and beyond what float32 resolves."""
    n, indices = LONGEST, [0, 1, 12345, LONGEST - 2, LONGEST - 1]
    actual = dct_columns(n, jnp.array(indices), jnp.float32, transposed=transposed)
    k, place = (
        (np.arange(n)[:, None], np.array(indices))
        if transposed
        else (
            np.array(indices),
            np.arange(n)[:, None],
        )
    )
    angle = k * (2 * place + 1) % (4 * n) * (np.pi / (2 * n))
    exact = np.where(k == 0, np.sqrt(1 / n), np.sqrt(2 / n) * np.cos(angle))
    np.testing.assert_allclose(actual, exact, rtol=0.501 * tolerances.eps(np.float32), atol=1e-15)
