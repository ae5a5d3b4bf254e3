import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances
from helpers import lowered_for, values_as_on

from orthax.linalg import (
    coefficients,
    gram_newton_schulz,
    newton_schulz,
    polar,
    polar_svd,
    zolotarev,
)
from orthax.linalg.polar_factor.choice import ACCURACIES

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


@pytest.mark.parametrize(
    ("shape", "scale"),
    [((8, 8), 1e-20), ((12, 5), 1e-10), ((12, 5), 1e10), ((2, 2, 7, 4), 1e18)],
    ids=str,
)
def test_the_scale_of_the_input_does_not_matter(shape, scale):
    x = (oracles.well_conditioned(shape).astype(np.float64) * scale).astype(np.float32)
    np.testing.assert_allclose(
        polar_svd(jnp.asarray(x)), oracles.polar(x), rtol=0, atol=tolerance(shape)
    )


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((8, 8), jnp.bfloat16), ((12, 5), jnp.float32), ((5, 12), jnp.complex64)],
    ids=str,
)
def test_zero_is_mapped_to_exactly_zero(shape, dtype):
    actual = polar_svd(jnp.zeros(shape, dtype))
    assert actual.dtype == dtype
    assert not np.asarray(actual, np.complex64).any()


@pytest.mark.parametrize(
    ("shape", "rank", "scale"),
    [((8, 8), 1, 1e-20), ((12, 5), 3, 1.0), ((5, 12), 1, 1e18), ((8, 8), 3, 1.0)],
    ids=str,
)
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


# --- the rule that chooses a method

METHODS = {
    ("cpu", "fast"): zolotarev,
    ("cpu", "exact"): functools.partial(zolotarev, degree=3, passes=2),
    ("cuda", "exact"): functools.partial(
        newton_schulz,
        coefficients=coefficients.minimax(10, 1e-5),
        prescale="schatten",
        dtype=jnp.float32,
        precision="highest",
    ),
}
MIXED = [
    ((6, 12), jnp.bfloat16),
    ((12, 6), jnp.complex64),
    ((2, 2, 7, 4), jnp.float32),
]
by_accuracy = pytest.mark.parametrize("accuracy", ["fast", "exact"])
PLATFORMS = ["cpu", "cuda"]
by_platform = pytest.mark.parametrize("platform", PLATFORMS)
DECOMPOSITION = re.compile("cholesky|triangular_solve|lapack|cusolver|cublas|while")


@functools.cache
def of_spectra(platform, accuracy, names):
    """`polar` of matrices by name; for all at once, as to change the platform compiles anew."""
    with values_as_on(platform):
        compiled = jax.jit(functools.partial(polar, accuracy=accuracy))
        return {name: np.asarray(compiled(real_matrix(name)[0])) for name in names}


@pytest.fixture
def elsewhere():
    """Lets `polar` choose as it would on an accelerator."""
    with values_as_on("cuda"):
        yield


def matrices(shape, dtype):
    base = np.complex64 if dtype == jnp.complex64 else np.float32
    return jnp.asarray(oracles.well_conditioned(shape, base)).astype(dtype)


def name_of(value):
    return getattr(value, "__name__", str(value))


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(oracles.float64(actual), oracles.float64(expected))


@by_accuracy
@pytest.mark.parametrize(("shape", "dtype"), MIXED, ids=name_of)
def test_on_a_cpu_it_is_the_rational_form(shape, dtype, accuracy):
    x = matrices(shape, dtype)
    with values_as_on("cpu"):
        assert_same(polar(x, accuracy), jax.jit(METHODS["cpu", accuracy])(x))
    if accuracy == "fast":
        assert_same(polar(x), polar(x, accuracy))


@pytest.mark.parametrize(
    ("shape", "dtype", "method"),
    [
        ((6, 11), jnp.float32, newton_schulz),
        ((6, 12), jnp.float32, gram_newton_schulz),
        ((12, 6), jnp.float32, gram_newton_schulz),
        ((2, 3, 12), jnp.complex64, gram_newton_schulz),
        ((3, 12), jnp.bfloat16, newton_schulz),
    ],
    ids=name_of,
)
def test_on_other_platforms_it_is_a_polynomial(shape, dtype, method, elsewhere):
    x = matrices(shape, dtype)
    assert_same(polar(x), jax.jit(method)(x))


def test_on_a_tpu_it_is_the_iteration_of_the_matrix_itself_for_long_ones_too():
    x = matrices((6, 24), jnp.float32)
    with values_as_on("tpu"):
        assert_same(polar(x), jax.jit(newton_schulz)(x))


@pytest.mark.parametrize(("shape", "dtype"), MIXED, ids=name_of)
def test_where_it_shall_be_exact_the_polynomial_is_a_longer_one(shape, dtype, elsewhere):
    x = matrices(shape, dtype)
    assert_same(polar(x, "exact"), jax.jit(METHODS["cuda", "exact"])(x))


@by_accuracy
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(8, 8), (3, 5, 12)], ids=str)
def test_the_platform_of_the_program_decides_and_not_the_one_that_traces(shape, dtype, accuracy):
    x = jax.ShapeDtypeStruct(shape, dtype)
    compiled = functools.partial(polar, accuracy=accuracy)
    assert {"lapack", "while"} <= set(DECOMPOSITION.findall(lowered_for("cpu", compiled, x)))
    for platform in ("tpu", "cuda", "rocm"):
        text = lowered_for(platform, compiled, x)
        assert "dot_general" in text
        steps = {"while"} if (platform, accuracy) == ("tpu", "exact") else set()
        assert set(DECOMPOSITION.findall(text)) == steps


def test_without_jit_and_under_transformations_the_choice_is_the_same():
    x = matrices((6, 12), jnp.float32)
    compiled = jax.jit(polar)
    np.testing.assert_allclose(polar(x), compiled(x), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(polar)(x[None])[0], compiled(x), atol=1e-6)
    slopes = (jax.jvp(function, (x,), (x + 1,))[1] for function in (polar, compiled))
    np.testing.assert_allclose(*slopes, atol=1e-5)


@by_accuracy
@by_platform
@pytest.mark.parametrize(
    ("shape", "scale"),
    [((1, 9), 1e-30), ((9, 1), 1e30), ((1, 1), 1.0), ((3, 1, 5), 1e30), ((2, 2, 7, 1), 1.0)],
    ids=str,
)
def test_vectors_are_divided_by_their_norm(shape, scale, accuracy, platform):
    x = (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)
    wide = oracles.float64(x)
    expected = wide / np.sqrt((wide**2).sum((-2, -1), keepdims=True))
    with values_as_on(platform):
        np.testing.assert_allclose(polar(jnp.asarray(x), accuracy), expected, rtol=1e-6)


@by_accuracy
def test_a_zero_vector_stays_zero_and_16_bits_stay_16_bits(accuracy):
    x = jnp.asarray([[[3.0, 4.0]], [[0.0, 0.0]]], jnp.bfloat16)
    actual = polar(x, accuracy)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        oracles.float64(actual), [[[0.6, 0.8]], [[0, 0]]], rtol=tolerances.eps(jnp.bfloat16)
    )


@functools.cache
def singular_vectors(rows):
    rng = np.random.default_rng(rows)
    return oracles.orthogonal(rng, rows), oracles.orthogonal(rng, rows)


@pytest.mark.accuracy
@pytest.mark.parametrize(("platform", "rows"), [("cpu", 256), ("cpu", 768), ("cuda", 256)])
@pytest.mark.parametrize(
    ("accuracy", "smallest", "least", "most"),
    [("fast", 1.1e-3, 0.80, 1.20), ("exact", 1e-5, 0.94, 1.06)],
)
def test_singular_values_come_near_one_from_the_smallest_promised(
    rows, accuracy, smallest, least, most, platform
):
    """Half of them are the smallest, the others on all scales from there to the largest."""
    left, right = singular_vectors(rows)
    spectrum = smallest ** np.concatenate([np.ones(rows // 2), np.linspace(1, 0, rows - rows // 2)])
    spectrum = np.maximum(spectrum, smallest * np.linalg.norm(spectrum))
    x = ((left * spectrum) @ right).astype(np.float32)
    with values_as_on(platform):
        y = oracles.float64(jax.jit(functools.partial(polar, accuracy=accuracy))(x))
    s = np.sqrt(np.linalg.eigvalsh(y @ y.T))
    printed = 5e-3  # two digits
    assert least - printed < s.min()
    assert s.max() < most + printed


# --- on singular values of momentum in real training (benchmarks/data)

SPECTRA = np.load(pathlib.Path(__file__).parents[2] / "benchmarks" / "data" / "real_spectra.npz")
# Of each group that with the fewest tiny values, and one with the most.
REAL = [
    f"mom{width}|{step}|['blocks'][{block}]['{name}']['kernel'].value"
    for width, steps, matrices in (
        (256, ("step20", "step21", "step200"), ((0, "down"), (5, "o"))),
        (768, ("step10", "step11", "step60"), ((0, "q"),)),
    )
    for step in steps
    for block, name in matrices
]


def test_every_group_of_real_spectra_is_tried():
    groups = {tuple(name.split("|")[:2]) for name in SPECTRA}
    assert {tuple(name.split("|")[:2]) for name in REAL} == groups


@functools.cache
def real_matrix(name):
    """A matrix of these singular values and random vectors, its own singular values and factor."""
    spectrum = SPECTRA[name]
    left, right = singular_vectors(len(spectrum))
    x = ((left * spectrum) @ right).astype(np.float32)
    u, s, vh = np.linalg.svd(oracles.float64(x))
    return x, s, u @ vh


def distance(actual, expected):
    """Relative, in the Frobenius norm."""
    return np.linalg.norm(oracles.float64(actual) - expected) / np.linalg.norm(expected)


@by_platform
@pytest.mark.parametrize("name", REAL)
def test_fast_is_no_farther_from_the_factor_than_five_steps_of_muon_and_exact_at_most_a_fifth(
    name, platform
):
    _, s, factor = real_matrix(name)
    fast, exact = (of_spectra(platform, accuracy, tuple(REAL))[name] for accuracy in ACCURACIES)
    steps = oracles.scalar_map(oracles.MUON_TABLE, s / np.linalg.norm(s))
    muon = np.sqrt(np.mean((steps - 1) ** 2))
    assert distance(fast, factor) <= muon
    assert distance(exact, factor) <= 0.2


# --- edges of both accuracies


@by_accuracy
@by_platform
def test_zero_stays_zero_and_a_nan_is_not_hidden(accuracy, platform):
    x = oracles.well_conditioned((3, 5, 12))
    x[1] = 0
    x[2, 1, 1] = np.nan
    with values_as_on(platform):
        actual = np.asarray(polar(jnp.asarray(x), accuracy))
    s = np.linalg.svd(actual[0], compute_uv=False)
    assert 0.7 < s.min() <= s.max() < 1.3
    assert not actual[1].any()
    assert np.isnan(actual[2]).any()


@by_accuracy
@by_platform
@pytest.mark.parametrize("shape", [(0, 4), (0, 0), (0, 4, 4), (3, 0, 4)], ids=str)
def test_an_empty_matrix_comes_back_empty(shape, accuracy, platform):
    with values_as_on(platform):
        assert polar(jnp.zeros(shape), accuracy).shape == shape
