"""The tolerances hold for plain NumPy arithmetic, and are not so wide as to be void."""

import ml_dtypes
import numpy as np
import oracles
import pytest
import tolerances

DTYPES = [ml_dtypes.bfloat16, np.float16, np.float32, np.float64]


def multiply(x, y):
    """Product rounded to the dtype of its factors (NumPy widens bfloat16)."""
    return (x @ y).astype(x.dtype)


def newton_schulz_in(dtype, x, table):
    """The iteration with every product and sum rounded to `dtype`."""
    x = (x / np.linalg.norm(x)).astype(dtype)
    for a, b, c in np.asarray(table, dtype):
        gram = multiply(x, x.T)
        x = a * x + multiply(b * gram + c * multiply(gram, gram), x)
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [4, 16, 64])
def test_rounding_error_of_newton_schulz_is_within_its_tolerance_and_not_far_below(dtype, size):
    rng = np.random.default_rng(size)
    spectrum = np.linspace(0.5, 1.0, size)
    x = oracles.matrix_with_spectrum(rng, size, size, spectrum, np.longdouble)
    exact = x / np.sqrt((x**2).sum())
    for a, b, c in np.asarray(oracles.MUON_TABLE, np.longdouble):
        gram = exact @ exact.T
        exact = a * exact + (b * gram + c * gram @ gram) @ exact
    actual = newton_schulz_in(dtype, x, oracles.MUON_TABLE).astype(np.longdouble)
    gain = oracles.gain(oracles.MUON_TABLE, 0.5 / np.linalg.norm(spectrum))
    tolerance = tolerances.rounding(dtype, size, gain)
    error = float(np.abs(actual - exact).max())
    assert tolerance / 100 < error < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_error_of_a_product_is_within_its_tolerance_and_not_far_below(dtype):
    rng = np.random.default_rng(0)
    size = 48
    q, p = (oracles.orthogonal(rng, size).astype(dtype) for _ in range(2))
    exact = q.astype(np.longdouble) @ p.astype(np.longdouble)
    error = float(np.abs(multiply(q, p).astype(np.longdouble) - exact).max())
    tolerance = tolerances.rounding(dtype, size)
    assert tolerance / 100 < error < tolerance


def test_a_tolerance_falls_with_precision_and_with_size_and_grows_with_gain():
    errors = [tolerances.rounding(dtype, 16) for dtype in DTYPES]
    assert errors == sorted(errors, reverse=True)
    assert tolerances.rounding(np.float32, 64) == tolerances.rounding(np.float32, 16) / 2
    assert tolerances.rounding(np.float32, 1, 3.0) == 3 * tolerances.rounding(np.float32)


def test_the_tolerance_is_small_beside_the_entries_of_an_orthogonal_matrix():
    whole_range = oracles.gain(oracles.MUON_TABLE, 1e-6)
    assert tolerances.rounding(np.float32, 64, whole_range) < 1e-3 * 64**-0.5
    assert tolerances.rounding(np.float64, 64, whole_range) < 1e-12
    assert tolerances.rounding(ml_dtypes.bfloat16, 4, 5.0) < 0.4 * 4**-0.5


def test_the_gain_of_a_table_is_its_slope_at_zero_when_all_singular_values_are_allowed():
    slope = np.prod([a for a, _, _ in oracles.MUON_TABLE])
    assert oracles.gain(oracles.MUON_TABLE, 1e-9) == pytest.approx(slope, rel=1e-6)


def test_the_scalar_slope_is_the_derivative_of_the_scalar_map():
    s, step = np.linspace(0.05, 1.0, 40), 1e-6
    table = oracles.MUON_TABLE
    difference = oracles.scalar_map(table, s + step) - oracles.scalar_map(table, s - step)
    np.testing.assert_allclose(
        oracles.scalar_slope(table, s), difference / (2 * step), rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (2, 9, 4)])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_the_matrix_oracle_is_the_scalar_oracle_on_singular_values(shape, dtype):
    rng = np.random.default_rng(1)
    spectrum = np.linspace(0.02, 1.0, min(shape[-2:]))
    x = np.stack(
        [
            oracles.matrix_with_spectrum(rng, *shape[-2:], spectrum, dtype)
            for _ in range(int(np.prod(shape[:-2])))
        ]
    ).reshape(shape)
    norm = np.linalg.norm(spectrum)
    expected = oracles.on_singular_values(
        x, lambda s: oracles.scalar_map(oracles.MUON_TABLE, s / norm)
    )
    np.testing.assert_allclose(oracles.newton_schulz(x), expected, atol=1e-12)


def test_a_constructed_matrix_has_the_prescribed_singular_values():
    rng = np.random.default_rng(2)
    spectrum = np.array([3.0, 1.0, 1e-3])
    for m, n in [(3, 3), (7, 3), (3, 7)]:
        x = oracles.matrix_with_spectrum(rng, m, n, spectrum)
        np.testing.assert_allclose(np.linalg.svd(x, compute_uv=False), spectrum, rtol=1e-12)


@pytest.mark.parametrize("lower", [0.5, 0.1, 1e-2, 1e-3])
def test_linear_program_and_nonlinear_system_find_the_same_quintic(lower):
    *programmed, programmed_error = oracles.quintic_by_linear_programming(lower, 1.0)
    solved, error = oracles.equioscillating_quintic(lower, 1.0)
    np.testing.assert_allclose(programmed, solved, rtol=1e-4)
    assert 0 <= error - programmed_error < 1e-5
