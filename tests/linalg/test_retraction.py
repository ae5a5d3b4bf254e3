"""nearest_orthogonal: the polar factor to rounding, from near and from far."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances

import orthax.linalg.polar_factor.nearest
from orthax.linalg import nearest_orthogonal

nearest = jax.jit(nearest_orthogonal)
SHAPES = [(24, 24), (40, 16), (16, 40), (1, 9), (9, 1), (1, 1), (3, 12, 8), (2, 2, 5, 7)]
# Of Q^T Q - I in the spectral norm up to 64 columns; the promise for 1024 is 5e-6.
ORTHONORMAL = 1e-6


def matrices(shape, dtype=np.float32, smallest=0.1, seed=0, scale=1.0):
    """Singular values on a logarithmic scale from `smallest` to 1."""
    rng = np.random.default_rng(seed)
    *batch, m, n = shape
    spectrum = scale * np.geomspace(1, smallest, min(m, n))
    count = int(np.prod(batch))
    x = [oracles.matrix_with_spectrum(rng, m, n, spectrum, dtype) for _ in range(count)]
    return np.reshape(x, shape)


def near(shape, distance, dtype=np.float32, seed=0):
    """Orthogonal matrices plus errors of this spectral norm."""
    rng = np.random.default_rng(seed)
    error = rng.standard_normal(shape)
    error *= distance / np.linalg.norm(error, 2, (-2, -1), keepdims=True)
    return (oracles.polar(rng.standard_normal(shape)) + error).astype(dtype)


def deviation(q):
    """Largest spectral norm of the Gram matrix of the shorter side less the identity."""
    q = oracles.float64(q)
    q = q if q.shape[-2] >= q.shape[-1] else oracles.mT(q)
    return np.linalg.norm(oracles.mT(q).conj() @ q - np.eye(q.shape[-1]), 2, (-2, -1)).max()


def error(actual, x):
    """Largest error of an entry against the polar factor in float64."""
    return np.abs(oracles.float64(actual) - oracles.polar(x)).max()


def bound(x, smallest, dtype=np.float32):
    """Of entries: an error in the matrix grows by 1 over its smallest singular value.

    And an error in the Gram matrix R twofold in (15 - 10 R + 3 R^2) / 8.
    """
    return tolerances.rounding(dtype, min(x.shape[-2:]), 2 + 1 / smallest)


# --- against the decomposition


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_polar_factor_of_a_matrix_that_is_far_from_orthogonal(shape):
    x = matrices(shape)
    q = nearest(x)
    assert (q.shape, q.dtype) == (shape, np.float32)
    assert error(q, x) < bound(x, 0.1)
    assert deviation(q) < ORTHONORMAL


@pytest.mark.parametrize("distance", [0.0, 1e-6, 1e-3, 0.02, 0.1, 0.3])
def test_it_is_the_polar_factor_of_a_matrix_that_is_near(distance):
    for shape in [(64, 64), (24, 40)]:
        x = near(shape, distance)
        q = nearest(x)
        assert error(q, x) < bound(x, 1.0)
        assert deviation(q) < ORTHONORMAL


def test_what_is_orthogonal_to_rounding_changes_by_rounding():
    q = nearest(near((64, 64), 0.1))
    np.testing.assert_allclose(nearest(q), q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 12), (3, 12, 8), (8, 12)], ids=str)
def test_complex_matrices_have_complex_factors(shape):
    x = matrices(shape, np.complex64)
    for y in (x, x / 10, oracles.polar(x).astype(np.complex64) * np.float32(1.01)):
        q = nearest(y)
        assert q.dtype == np.complex64
        assert error(q, y) < 2 * bound(x, 0.1)
        assert deviation(q) < ORTHONORMAL


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_double_precision_is_kept(dtype):
    with tolerances.double_precision():
        for x in (matrices((12, 8), dtype), near((8, 8), 0.01).astype(dtype)):
            q = nearest(jnp.asarray(x))
            assert q.dtype == dtype
            assert error(q, x) < 2 * bound(x, 0.1, np.float64)
            assert deviation(q) < 4e-15


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(12, 8), (2, 8, 8)], ids=str)
def test_16_bits_are_computed_in_float32(dtype, shape):
    x = jnp.asarray(matrices(shape, smallest=0.01), dtype)
    q = nearest(x)
    assert q.dtype == dtype
    # Rounded once: half a unit in the last place of numbers below 1.
    assert error(q, x) <= tolerances.eps(dtype) / 4 + 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-6, 1e6, 1e18, 1e30])
@pytest.mark.parametrize("shape", [(8, 8), (12, 8)], ids=str)
def test_the_scale_does_not_matter(scale, shape):
    x = matrices(shape, scale=scale)
    q = nearest(x)
    assert error(q, x) < bound(x, 0.1)
    assert deviation(q) < ORTHONORMAL


@pytest.mark.parametrize("shape", [(24, 24), (40, 16)], ids=str)
@pytest.mark.parametrize("smallest", [1e-3, 1e-6])
def test_an_ill_conditioned_matrix_has_an_orthonormal_factor(shape, smallest):
    x = matrices(shape, smallest=smallest)
    q = nearest(x)
    assert deviation(q) < ORTHONORMAL
    assert error(q, x) < bound(x, smallest)


def test_tiny_singular_values_become_one_down_to_the_stated_part_of_the_largest():
    s = np.array([1, 1e-4, 1e-7, 1.1e-8, 1e-12, 1e-20, 0], np.float32)
    q = nearest(np.diag(s))
    np.testing.assert_allclose(np.diag(q)[:4], 1, rtol=1e-6)
    short = np.diag(q)[4:]
    assert (short < 0.1).all()
    assert (short >= 0).all()
    np.testing.assert_array_equal(q - np.diag(np.diag(q)), np.zeros((7, 7)))


def test_the_promise_holds_for_a_thousand_columns():
    x = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    q = oracles.float64(nearest(x))
    gram, v = q.T @ q - np.eye(1024), np.ones(1024)
    for _ in range(50):  # the spectral norm, by power iteration
        v = gram @ v
        v /= np.linalg.norm(v)
    assert np.linalg.norm(gram @ v) < 5e-6


# --- few steps for what is near


@pytest.fixture
def a_single_step(monkeypatch):
    """The function with at most one step; other functions compiled meanwhile keep theirs."""
    compiled = jax.jit(lambda x: nearest_orthogonal(x))

    def run(x):
        with monkeypatch.context() as patched:
            patched.setattr(orthax.linalg.polar_factor.nearest, "MAX_STEPS", 1)
            return compiled(x)

    return run


@pytest.mark.parametrize("shape", [(64, 64), (24, 40), (3, 12, 8)], ids=str)
def test_a_matrix_that_is_nearly_orthogonal_takes_a_single_step(shape, a_single_step):
    for distance in (0.0, 1e-5, 1e-3):
        x = near(shape, distance)
        q = a_single_step(x)
        np.testing.assert_array_equal(q, nearest(x))
        assert error(q, x) < bound(x, 1.0)


@pytest.mark.parametrize("shape", [(64, 64), (24, 40)], ids=str)
def test_others_take_more(shape, a_single_step):
    for x in (near(shape, 0.1), matrices(shape), 3 * near(shape, 0.0)):
        assert np.abs(np.asarray(a_single_step(x)) - nearest(x)).max() > 1e-6


@pytest.mark.parametrize(
    ("x", "most"),
    [(near((32, 32), 0.1), 2), (matrices((32, 32)), 8), (matrices((32, 32), smallest=1e-6), 28)],
    ids=["near", "condition 10", "condition 1e6"],
)
def test_the_number_of_steps_is_about_four_for_a_factor_of_ten(x, most, monkeypatch):
    expected = nearest(x)
    monkeypatch.setattr(orthax.linalg.polar_factor.nearest, "MAX_STEPS", most)
    np.testing.assert_array_equal(jax.jit(lambda x: nearest_orthogonal(x))(x), expected)


# --- laws


@pytest.mark.parametrize("shape", [(12, 12), (3, 12, 8)], ids=str)
def test_it_commutes_with_transposition(shape):
    for x in (matrices(shape), near(shape, 0.01)):
        np.testing.assert_allclose(nearest(oracles.mT(x)), oracles.mT(nearest(x)), atol=5e-7)


def test_it_commutes_with_orthogonal_maps_on_both_sides():
    rng = np.random.default_rng(1)
    left, right = oracles.orthogonal(rng, 12), oracles.orthogonal(rng, 8)
    for x in (matrices((12, 8)), near((12, 8), 0.01)):
        expected = left @ oracles.float64(nearest(x)) @ right
        rotated = (left @ oracles.float64(x) @ right).astype(np.float32)
        np.testing.assert_allclose(nearest(rotated), expected, atol=2 * bound(x, 0.1))


def test_signs_are_kept():
    x = matrices((3, 12, 8))
    np.testing.assert_allclose(nearest(-x), -np.asarray(nearest(x)), atol=5e-7)


def test_a_batch_of_near_and_far_matrices_is_its_slices():
    x = np.stack(
        [near((8, 8), 1e-4), matrices((8, 8), smallest=1e-4), near((8, 8), 0.05), np.eye(8)]
    ).astype(np.float32)
    x[3] *= 1e10
    together = nearest(x)
    for i, alone in enumerate(map(nearest, x)):
        np.testing.assert_allclose(together[i], alone, rtol=0, atol=5e-7)
        assert deviation(together[i]) < ORTHONORMAL


def test_vmap_is_a_batch():
    x = np.stack([near((8, 8), 1e-4), matrices((8, 8))])
    np.testing.assert_allclose(jax.jit(jax.vmap(nearest_orthogonal))(x), nearest(x), atol=5e-7)


# --- edges


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-10])
def test_of_a_matrix_without_full_rank_only_the_part_that_is_there_becomes_orthonormal(
    shape, scale
):
    """A whole-numbered product, so that its rank is exact."""
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (shape[0], 3)) @ rng.integers(-3, 4, (3, shape[1]))
    x = np.ldexp(x, -33 if scale < 1 else 0).astype(np.float32)
    u, s, vh = np.linalg.svd(oracles.float64(x))
    assert s[2] > 0.1 * s[0]
    assert s[3] < 1e-12 * s[0]
    q = oracles.float64(nearest(x))
    np.testing.assert_allclose(u[:, :3].T @ q @ vh[:3].T, np.eye(3), atol=1e-6)
    # The rest is rounding, which may have grown up to that of an orthogonal matrix.
    assert np.linalg.norm(q, 2) < 1 + 1e-6


def test_a_zero_row_and_column_stay_zero_beside_an_orthogonal_block():
    x = np.zeros((9, 7), np.float32)
    x[:6, :5] = matrices((6, 5))
    q = np.asarray(nearest(x))
    assert not q[6:].any()
    assert not q[:, 5:].any()
    assert error(q[:6, :5], x[:6, :5]) < bound(x[:6, :5], 0.1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
def test_zero_is_exactly_zero_beside_others(dtype):
    x = np.stack([np.zeros((8, 8)), near((8, 8), 0.01)])
    q = oracles.float64(nearest(jnp.asarray(x, dtype)))
    assert not q[0].any()
    assert deviation(q[1]) < max(ORTHONORMAL, 4 * tolerances.eps(dtype))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_own_matrix(bad):
    x = np.stack([near((8, 8), 0.01), matrices((8, 8)), near((8, 8), 1e-4)])
    expected = np.asarray(nearest(x))
    x[1, 2, 3] = bad
    actual = np.asarray(nearest(x))
    assert np.isnan(actual[1]).all()
    np.testing.assert_allclose(actual[::2], expected[::2], atol=5e-7)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0, 3, 4), (2, 0, 4)], ids=str)
def test_a_matrix_without_entries_comes_back(shape):
    assert nearest(jnp.zeros(shape)).shape == shape


def test_it_is_finite_and_orthonormal_for_spectra_around_every_threshold():
    """Where a step diverges (singular values above 1.53), where it is needed, where it is not."""
    rng = np.random.default_rng(0)
    count, k = 600, 6
    spectra = np.stack(
        [
            rng.uniform(0.2, 2.2, (count, k)),
            np.where(rng.random((count, k)) < 0.5, rng.uniform(1, 3, (count, 1)), 0.05),
            10.0 ** rng.uniform(-6, 0, (count, k)),
            1 + 10.0 ** rng.uniform(-8, 0, (count, 1)) * rng.uniform(-1, 1, (count, k)),
            np.where(np.arange(k) == 0, rng.uniform(1, 3, (count, 1)), 1),
        ]
    ).reshape(-1, k)
    left, right = (np.linalg.qr(rng.standard_normal((len(spectra), k, k)))[0] for _ in range(2))
    q = nearest(((left * spectra[:, None, :]) @ right).astype(np.float32))
    assert deviation(q) < ORTHONORMAL


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([[3e38, -3e38], [3e38, 3e38]], np.array([[1, -1], [1, 1]]) / 2**0.5),
        (np.full((3, 3), 3e38), np.full((3, 3), 1 / 3)),
        (np.diag([3e38, 3e38, -3e38]), np.diag([1, 1, -1])),
        (np.diag([3e38, 1e-38]), np.diag([1, 0])),
        (np.diag([1.5275252, 1.5275252]), np.eye(2)),
        (np.full((2, 2), 1e-45), np.zeros((2, 2))),
    ],
)
def test_extreme_entries_are_no_trouble(x, expected):
    np.testing.assert_allclose(nearest(np.asarray(x, np.float32)), expected, atol=1e-6)
