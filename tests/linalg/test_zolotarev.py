import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances

from orthax.linalg import zolotarev
from orthax.linalg.polar_factor.zolotarev import least_stable_lower, sign_function

SHAPES = [(8, 8), (12, 5), (5, 12), (2, 2, 7, 4), (1, 9)]
EPS = tolerances.eps(np.float32)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_degree = pytest.mark.parametrize("degree", [1, 2, 3, 4])
by_lower = pytest.mark.parametrize("lower", [0.1, 1e-3, 1e-4])


@functools.cache
def compiled(degree=2, passes=1, lower=None):
    return jax.jit(functools.partial(zolotarev, degree=degree, passes=passes, lower=lower))


def lower_of(degree, rows, dtype=np.float32):
    """What `lower=None` stands for."""
    return max(1e-3, oracles.smallest_lower(degree, rows, tolerances.eps(dtype)))


def first_of(passes, rows, dtype=np.float32):
    """`lower` of the first of two passes."""
    return oracles.smallest_lower(1, rows, tolerances.eps(dtype)) if passes == 2 else None


def expected(x, degree=2, passes=1, lower=None, dtype=np.float32):
    rows = min(x.shape[-2:])
    lower = lower_of(degree, rows, dtype) if lower is None else lower
    return oracles.zolotarev(x, degree, lower, first_of(passes, rows, dtype))


def tolerance(shape, degree=2, passes=1, lower=None, dtype=np.float32, smallest=0.5):
    """For singular values from `smallest` to 1 before they are scaled."""
    rows = min(shape[-2:])
    smallest = smallest / rows**0.25
    gain = oracles.zolotarev_gain(
        degree, lower_of(degree, rows, dtype) if lower is None else lower, smallest
    )
    if passes == 2:
        gain *= oracles.zolotarev_gain(1, first_of(2, rows, dtype), smallest)
    return tolerances.rounding(dtype, rows, gain)


# --- the function of one number


@by_degree
@by_lower
def test_the_error_has_equal_extrema_of_alternating_sign(degree, lower):
    """So many that no odd function of the type is better (Chebyshev, Achieser)."""
    function = sign_function(degree, lower)
    error = function(np.geomspace(lower, 1.0, 100_001)) - 1
    turns = np.diff(np.sign(np.diff(error)))
    extrema = error[np.concatenate([[0], np.nonzero(turns)[0] + 1, [-1]])]
    assert len(extrema) == 2 * degree + 2
    np.testing.assert_array_equal(np.sign(extrema), (-1.0) ** np.arange(1, 2 * degree + 3))
    np.testing.assert_allclose(np.abs(extrema), function.error, rtol=1e-4)


@by_degree
@by_lower
def test_the_function_is_that_of_elliptic_functions_by_means(degree, lower):
    function = sign_function(degree, lower)
    theirs, error = oracles.zolotarev_function(degree, lower)
    s = np.geomspace(lower / 1e3, 2.0, 1000)
    np.testing.assert_allclose(function(s), theirs(s), rtol=1e-8)
    np.testing.assert_allclose(function.shifts, oracles.zolotarev_points(degree, lower)[0::2])
    assert function.error == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize(("degree", "error"), [(2, 0.202), (3, 0.062), (4, 0.019)])
def test_the_errors_from_a_thousandth_on_are_the_known_ones(degree, error):
    assert sign_function(degree, 1e-3).error == pytest.approx(error, abs=5e-4)


@by_degree
@pytest.mark.parametrize("rows", [1, 8, 768, 4096])
def test_the_least_stable_lower_leaves_twice_the_rounding_of_the_gram_matrix(degree, rows):
    lower = least_stable_lower(degree, rows, EPS)
    np.testing.assert_allclose(lower, oracles.smallest_lower(degree, rows, EPS), rtol=1e-9)
    shift = oracles.zolotarev_points(degree, lower)[0]
    assert shift == pytest.approx(2 * rows**0.5 * EPS, rel=1e-9)


@by_degree
def test_the_least_stable_lower_in_double_precision_is_a_millionth(degree):
    lower = least_stable_lower(degree, 768, tolerances.eps(np.float64))
    assert lower == pytest.approx(1e-6, rel=1e-9)


# --- the function of a matrix


@by_shape
@pytest.mark.parametrize(("degree", "passes"), [(2, 1), (3, 2)])
def test_it_maps_singular_values_and_leaves_singular_vectors(shape, degree, passes):
    x = oracles.well_conditioned(shape)
    actual = compiled(degree, passes)(x)
    assert actual.shape == shape
    assert actual.dtype == x.dtype
    np.testing.assert_allclose(
        actual, expected(x, degree, passes), rtol=0, atol=tolerance(shape, degree, passes)
    )


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((20, 20), np.float64), ((30, 12), np.float64), ((12, 30), np.complex128)],
    ids=str,
)
@pytest.mark.parametrize(("degree", "passes"), [(2, 1), (1, 2), (3, 2)])
def test_in_double_precision_it_does_so_to_1e_9(shape, dtype, degree, passes):
    rng = np.random.default_rng(0)
    spectrum = np.geomspace(1.0, 1e-4 if passes == 1 else 1e-3, min(shape))
    x = oracles.matrix_with_spectrum(rng, *shape, spectrum, dtype)
    with tolerances.double_precision():
        actual = compiled(degree, passes)(x)
        assert actual.dtype == dtype
        actual = np.asarray(actual)
    np.testing.assert_allclose(
        actual, expected(x, degree, passes, dtype=np.float64), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("lower", [0.03, 0.3])
@pytest.mark.parametrize("degree", [1, 4])
def test_a_given_lower_is_that_of_the_function(degree, lower):
    shape = (10, 14)
    spectrum = np.geomspace(1.0, lower, 10)
    x = oracles.matrix_with_spectrum(np.random.default_rng(1), *shape, spectrum, np.float32)
    np.testing.assert_allclose(
        compiled(degree, 1, lower)(x),
        expected(x, degree, 1, lower),
        rtol=0,
        atol=tolerance(shape, degree, 1, lower, smallest=lower),
    )


@pytest.mark.parametrize("shape", [(8, 8), (5, 12)], ids=str)
def test_complex_matrices_keep_their_phases(shape):
    x = oracles.well_conditioned(shape, np.complex64)
    actual = compiled()(x)
    assert actual.dtype == np.complex64
    np.testing.assert_allclose(actual, expected(x), rtol=0, atol=tolerance(shape))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_half_precision_is_rounded_only_once(scale, dtype):
    x = jnp.asarray(oracles.well_conditioned((5, 12)) * np.float32(scale)).astype(dtype)
    actual = compiled()(x)
    assert actual.dtype == dtype
    np.testing.assert_allclose(
        oracles.float64(actual),
        expected(oracles.float64(x)),
        rtol=tolerances.eps(dtype) / 2,
        atol=tolerance(x.shape),
    )


def test_without_compilation_and_vectorised_it_is_the_same():
    x = oracles.well_conditioned((3, 5, 12))
    atol = tolerance(x.shape)
    for function in (zolotarev, jax.vmap(zolotarev)):
        np.testing.assert_allclose(function(jnp.asarray(x)), expected(x), rtol=0, atol=atol)


# --- the singular values that the docstring promises, in float32

PROMISED = [
    # degree, passes, smallest singular value relative to the Schatten-4 norm, interval
    (2, 1, 1.1e-3, 0.80, 1.20),
    (3, 1, 2.1e-3, 0.95, 1.05),
    (2, 2, 1.5e-6, 0.80, 1.20),
    (3, 2, 3e-6, 0.95, 1.05),
]
promised = pytest.mark.parametrize(("degree", "passes", "smallest", "least", "most"), PROMISED)
PRINTED = 5e-3  # two digits
GAUSSIAN = np.random.default_rng(2).standard_normal((256, 256))
SPECTRA = {
    "gaussian": np.linalg.svd(GAUSSIAN, compute_uv=False),
    "condition 1e3": 1e-3 ** np.linspace(0, 1, 256),
    "condition 1e6": 1e-6 ** np.linspace(0, 1, 256),
}


@functools.cache
def singular_vectors(m, n=None):
    rng = np.random.default_rng(m)
    return oracles.orthogonal(rng, m), oracles.orthogonal(rng, m, n)


@pytest.mark.accuracy
@pytest.mark.parametrize(
    ("rows", "small", "degree", "passes", "smallest", "least", "most"),
    [
        *((256, 128, *row) for row in PROMISED),
        (768, 767, *PROMISED[3]),
    ],
)
def test_singular_values_come_near_one_from_the_smallest_promised(
    rows, small, degree, passes, smallest, least, most
):
    """`small` of them are the smallest; the others lie on all scales from there to the largest."""
    left, right = singular_vectors(rows)
    spectrum = smallest ** np.concatenate([np.ones(small), np.linspace(0, 1, rows - small)])
    spectrum = np.maximum(spectrum, smallest * oracles.schatten4(spectrum))
    y = oracles.float64(compiled(degree, passes)(((left * spectrum) @ right).astype(np.float32)))
    s = np.sqrt(np.linalg.eigvalsh(y @ y.T))
    assert least - PRINTED < s.min()
    assert s.max() < most + PRINTED


@promised
@pytest.mark.parametrize("name", SPECTRA)
def test_other_singular_values_are_lifted_as_the_function_says(
    name, degree, passes, smallest, least, most
):
    left, right = singular_vectors(256)
    spectrum = SPECTRA[name] / oracles.schatten4(SPECTRA[name])
    y = oracles.float64(compiled(degree, passes)(((left * spectrum) @ right).astype(np.float32)))
    values = oracles.zolotarev_map(spectrum, degree, lower_of(degree, 256), first_of(passes, 256))
    within = values[spectrum >= smallest]
    assert least - PRINTED < within.min() <= within.max() < most + PRINTED
    error = np.linalg.norm(y - (left * values) @ right) / np.linalg.norm(values)
    assert error < 0.02


# --- stability in float32


def hard_matrices(m, n):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((m, n)).astype(np.float32)
    half = m // 2
    yield "rank 1", np.ones((m, n), np.float32)
    yield "half rank", x[:, :half] @ rng.standard_normal((half, n)).astype(np.float32)
    yield "zero rows", x * (np.arange(m) % 2)[:, None].astype(np.float32)
    yield "repeated rows", x[np.arange(m) // 2]
    yield "condition 1e12", x * np.geomspace(1.0, 1e-12, m, dtype=np.float32)[:, None]
    yield "rows of all scales", x * np.geomspace(1e-20, 1e18, m, dtype=np.float32)[:, None]
    yield "one large entry", np.where(np.arange(m * n).reshape(m, n) == 3, np.float32(1e6), x)
    yield "positive", np.abs(x) + 10
    yield "triangular", np.triu(np.ones((m, n), np.float32))


@pytest.mark.parametrize(("degree", "passes", "error"), [(2, 1, 0.21), (3, 2, 0.07)])
def test_ill_conditioned_matrices_give_finite_results_and_no_large_singular_values(
    degree, passes, error
):
    for name, x in hard_matrices(100, 120):
        y = oracles.float64(compiled(degree, passes)(x))
        assert np.isfinite(y).all(), name
        assert np.linalg.norm(y, 2) < 1.01 + error, name


def test_so_do_large_ones():
    for name, x in hard_matrices(1024, 1024):
        if name in ("rank 1", "condition 1e12"):
            assert np.isfinite(compiled()(x)).all(), name


def test_zero_rows_stay_exactly_zero():
    x = oracles.well_conditioned((5, 12))
    x[[1, 3]] = 0
    actual = compiled()(x)
    assert not np.asarray(actual)[[1, 3]].any()
    np.testing.assert_allclose(actual, expected(x), rtol=0, atol=tolerance(x.shape, smallest=0.2))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_of_the_input_does_not_matter(scale):
    x = (oracles.well_conditioned((5, 12)).astype(np.float64) * scale).astype(np.float32)
    for options in ((2, 1), (3, 2)):
        np.testing.assert_allclose(
            compiled(*options)(x),
            expected(x, *options),
            rtol=0,
            atol=tolerance(x.shape, *options),
        )


def test_matrices_of_a_batch_are_scaled_one_by_one():
    x = oracles.well_conditioned((3, 5, 12)).astype(np.float64)
    x = (x * np.array([1e-30, 1.0, 1e30])[:, None, None]).astype(np.float32)
    np.testing.assert_allclose(compiled()(x), expected(x), rtol=0, atol=tolerance(x.shape))


@pytest.mark.parametrize(
    ("dtype", "passes"), [(jnp.bfloat16, 1), (jnp.float32, 1), (jnp.float32, 2), (jnp.complex64, 2)]
)
def test_zero_is_mapped_to_exactly_zero(dtype, passes):
    actual = compiled(2, passes)(jnp.zeros((5, 12), dtype))
    assert actual.dtype == dtype
    assert not np.asarray(actual, np.complex64).any()


def test_a_zero_matrix_in_a_batch_stays_zero_and_leaves_the_others_alone():
    x = oracles.well_conditioned((3, 5, 12))
    x[1] = 0
    actual = np.asarray(compiled()(x))
    assert not actual[1].any()
    np.testing.assert_allclose(actual, expected(x), rtol=0, atol=tolerance(x.shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nan_or_an_infinity_is_not_hidden_and_leaves_the_others_alone(bad):
    x = oracles.well_conditioned((3, 5, 12))
    x[0, 1, 2] = bad
    actual = np.asarray(compiled()(x))
    assert np.isnan(actual[0]).any()
    np.testing.assert_allclose(actual[1:], expected(x[1:]), rtol=0, atol=tolerance(x.shape))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 4, 4), (0, 0)], ids=str)
@pytest.mark.parametrize("passes", [1, 2])
def test_an_empty_matrix_comes_back_empty(shape, passes):
    assert zolotarev(jnp.zeros(shape), passes=passes).shape == shape


# --- derivatives


@pytest.mark.parametrize(("shape", "passes"), [((5, 12), 2), ((2, 7, 4), 1)], ids=str)
def test_its_derivative_is_that_of_the_method_by_svd(shape, passes):
    rng = np.random.default_rng(7)
    x = oracles.well_conditioned(shape, np.float64)
    direction, weight = rng.standard_normal((2, *shape))
    step = 1e-5
    ends = [expected(x + sign * step * direction, 2, passes, dtype=np.float64) for sign in (1, -1)]
    difference = (weight * (ends[0] - ends[1])).sum() / (2 * step)
    with tolerances.double_precision():
        loss = functools.partial(lambda w, x: (w * compiled(2, passes)(x)).sum(), weight)
        gradient = np.asarray(jax.jit(jax.grad(loss))(x))
        _, tangent = jax.jit(lambda *args: jax.jvp(loss, args[:1], args[1:]))(x, direction)
    np.testing.assert_allclose((gradient * direction).sum(), difference, rtol=1e-6)
    np.testing.assert_allclose(tangent, difference, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "passes"), [(np.float32, 1), (np.complex64, 2)])
def test_the_gradient_is_finite_at_zero_and_at_rank_one(dtype, passes):
    x = np.zeros((3, 5, 12), dtype)
    x[1] = 1.0
    x[2, 0, 0] = 1.0
    gradient = jax.jit(jax.grad(lambda x: jnp.real(zolotarev(x, passes=passes)[..., 0, 0].sum())))
    assert np.isfinite(gradient(x)).all()


# --- what is refused


def refusal(x=None, **options):
    with pytest.raises((TypeError, ValueError)) as caught:
        zolotarev(jnp.ones((5, 12)) if x is None else x, **options)
    message = str(caught.value)
    assert message.startswith("zolotarev: ")
    return caught.type, message


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("rows", [8, 768])
def test_the_least_lower_of_the_message_is_accepted(degree, rows):
    x = jnp.ones((rows, 1000))
    _, message = refusal(x, degree=degree, lower=1e-9)
    least = float(message.partition("[")[2].partition(",")[0])
    assert least == pytest.approx(oracles.smallest_lower(degree, rows, EPS), rel=0.05)
    result = jax.eval_shape(functools.partial(zolotarev, degree=degree, lower=least), x)
    assert result.shape == x.shape


def test_double_precision_admits_a_smaller_lower():
    x = np.eye(3)
    with tolerances.double_precision():
        np.testing.assert_allclose(compiled(4, 1, 2e-6)(x), expected(x, 4, 1, 2e-6), atol=1e-6)
    with pytest.raises(ValueError, match="lower"):
        zolotarev(jnp.eye(3), 4, lower=2e-6)
