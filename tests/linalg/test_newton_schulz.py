import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances
from helpers import lowered_for, values_as_on

from orthax.linalg import coefficients, gram_newton_schulz, newton_schulz

TABLES = {
    "muon": oracles.MUON_TABLE,
    "three steps": ((3.0, -3.2, 1.2), (2.0, -1.5, 0.5), (1.875, -1.25, 0.375)),
}
SHAPES = [(8, 8), (12, 5), (5, 12), (2, 2, 7, 4), (1, 9)]
by_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_prescale = pytest.mark.parametrize("prescale", ["schatten", "aol"])
IDENTITY = ((1.0, 0.0, 0.0),)


def tolerance(shape, table, dtype=np.float32, lowest=0.5):
    r = min(shape[-2:])
    return tolerances.rounding(dtype, r, oracles.gain(table, lowest / r**0.5))


@pytest.mark.parametrize("shape", [*SHAPES, (9, 1), (1, 1), (3, 5, 12)], ids=str)
@by_table
def test_it_is_the_published_iteration(shape, table):
    x = oracles.well_conditioned(shape)
    actual = newton_schulz(jnp.asarray(x), table)
    assert actual.shape == shape
    assert actual.dtype == x.dtype
    np.testing.assert_allclose(
        actual, oracles.newton_schulz(x, table), rtol=0, atol=tolerance(shape, table)
    )


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12), (1, 9)], ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_it_maps_a_chosen_spectrum_as_the_scalar_polynomial_does_to_1e_12(shape, dtype):
    rng = np.random.default_rng(0)
    m, n = shape
    spectrum = np.geomspace(1.0, 1e-4, min(m, n))
    left = oracles.orthogonal(rng, m, len(spectrum), dtype)
    right = oracles.orthogonal(rng, len(spectrum), n, dtype)
    table = oracles.MUON_TABLE
    mapped = oracles.scalar_map(table, spectrum / np.linalg.norm(spectrum))
    with tolerances.double_precision():
        actual = newton_schulz(jnp.asarray((left * spectrum) @ right), table)
        assert actual.dtype == dtype
        actual = np.asarray(actual)
    np.testing.assert_allclose(actual, (left * mapped) @ right, rtol=0, atol=1e-12)


@by_shape
def test_the_default_table_brings_all_singular_values_near_one(shape):
    x = oracles.well_conditioned(shape)
    s = np.linalg.svd(oracles.float64(newton_schulz(jnp.asarray(x))), compute_uv=False)
    assert s.min() > 0.4
    assert s.max() < 1.3


@by_shape
def test_complex_matrices_keep_their_phases(shape):
    table = oracles.MUON_TABLE
    x = oracles.well_conditioned(shape, np.complex64)
    actual = newton_schulz(jnp.asarray(x), table)
    assert actual.dtype == np.complex64
    np.testing.assert_allclose(
        actual, oracles.newton_schulz(x, table), rtol=0, atol=tolerance(shape, table)
    )


@by_shape
@by_table
def test_it_is_odd(shape, table):
    x = jnp.asarray(oracles.well_conditioned(shape))
    np.testing.assert_allclose(
        newton_schulz(-x, table),
        -newton_schulz(x, table),
        rtol=0,
        atol=tolerance(shape, table),
    )


@by_shape
@by_table
def test_it_commutes_with_transposition(shape, table):
    x = jnp.asarray(oracles.well_conditioned(shape))
    np.testing.assert_allclose(
        newton_schulz(x.mT, table),
        newton_schulz(x, table).mT,
        rtol=0,
        atol=tolerance(shape, table),
    )


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@by_shape
def test_it_commutes_with_orthogonal_matrices_on_either_side(shape, dtype):
    rng = np.random.default_rng(5)
    x = oracles.float64(oracles.well_conditioned(shape, dtype))
    m, n = shape[-2:]
    q, p = oracles.orthogonal(rng, m, dtype=dtype), oracles.orthogonal(rng, n, dtype=dtype)
    table = oracles.MUON_TABLE
    rotated_before = newton_schulz(jnp.asarray((q @ x @ p).astype(dtype)), table)
    rotated_after = q @ oracles.float64(newton_schulz(jnp.asarray(x.astype(dtype)), table)) @ p
    np.testing.assert_allclose(
        rotated_before, rotated_after, rtol=0, atol=2 * tolerance(shape, table)
    )


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e12, 1e18])
@pytest.mark.parametrize("shape", [(12, 5), (3, 5, 12), (1, 9)], ids=str)
def test_the_scale_of_the_input_does_not_matter(shape, scale):
    x = (oracles.well_conditioned(shape).astype(np.float64) * scale).astype(np.float32)
    table = oracles.MUON_TABLE
    np.testing.assert_allclose(
        newton_schulz(jnp.asarray(x), table),
        oracles.newton_schulz(x, table),
        rtol=0,
        atol=tolerance(shape, table),
    )


def test_matrices_of_a_batch_are_scaled_one_by_one():
    x = oracles.well_conditioned((3, 5, 12)).astype(np.float64)
    x = (x * np.array([1e-20, 1.0, 1e18])[:, None, None]).astype(np.float32)
    table = oracles.MUON_TABLE
    np.testing.assert_allclose(
        newton_schulz(jnp.asarray(x), table),
        oracles.newton_schulz(x, table),
        rtol=0,
        atol=tolerance(x.shape, table),
    )


def test_a_batch_is_its_slices():
    x = jnp.asarray(oracles.well_conditioned((2, 2, 7, 4)))
    whole = newton_schulz(x, oracles.MUON_TABLE)
    for index in np.ndindex(2, 2):
        np.testing.assert_allclose(
            whole[index],
            newton_schulz(x[index], oracles.MUON_TABLE),
            rtol=0,
            atol=tolerance(x.shape, oracles.MUON_TABLE),
        )


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((8, 8), jnp.float16),
        ((5, 12), jnp.bfloat16),
        ((12, 5), jnp.float32),
        ((1, 9), jnp.complex64),
    ],
    ids=str,
)
def test_zero_is_mapped_to_exactly_zero(shape, dtype):
    actual = newton_schulz(jnp.zeros(shape, dtype))
    assert actual.dtype == dtype
    assert not np.asarray(actual, np.complex64).any()


def test_a_zero_matrix_in_a_batch_stays_zero_and_leaves_the_others_alone():
    x = oracles.well_conditioned((3, 5, 12))
    x[1] = 0
    actual = np.asarray(newton_schulz(jnp.asarray(x), oracles.MUON_TABLE))
    assert not actual[1].any()
    np.testing.assert_allclose(
        actual, oracles.newton_schulz(x), rtol=0, atol=tolerance(x.shape, oracles.MUON_TABLE)
    )


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 4, 4)], ids=str)
def test_an_empty_matrix_comes_back_empty(shape):
    assert newton_schulz(jnp.zeros(shape)).shape == shape


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_matrix_of_low_rank_is_mapped_on_its_range(shape, rank):
    rng = np.random.default_rng(3)
    spectrum = np.zeros(min(shape))
    spectrum[:rank] = np.linspace(1.0, 0.5, rank)
    x = oracles.matrix_with_spectrum(rng, *shape, spectrum, np.float32)
    table = oracles.MUON_TABLE
    np.testing.assert_allclose(
        newton_schulz(jnp.asarray(x), table),
        oracles.newton_schulz(x, table),
        rtol=0,
        atol=tolerances.rounding(np.float32, rank, oracles.gain(table, 1e-7)),
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("shape", [(5, 12), (2, 2, 7, 4)], ids=str)
def test_half_precision_keeps_its_dtype_and_on_a_cpu_is_rounded_only_once(shape, scale, dtype):
    x = jnp.asarray(oracles.well_conditioned(shape) * np.float32(scale)).astype(dtype)
    table = oracles.MUON_TABLE
    actual = newton_schulz(x, table)
    assert actual.dtype == dtype
    compute = jnp.float32 if jax.default_backend() == "cpu" else dtype
    np.testing.assert_allclose(
        oracles.float64(actual),
        oracles.newton_schulz(oracles.float64(x), table),
        rtol=tolerances.eps(dtype) / 2,
        atol=tolerance(shape, table, compute),
    )


def test_16_bit_input_is_multiplied_in_16_bits_where_that_is_faster():
    x = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)

    def bits(iteration, platform):
        text = lowered_for(platform, iteration, x)
        return set(re.findall(r"dot_general.*: \(tensor<\w*x(\w+)>", text))

    for platform in ("tpu", "cuda", "rocm"):
        assert bits(newton_schulz, platform) == {"bf16"}
        assert bits(gram_newton_schulz, platform) == {"bf16", "f32"}  # the small ones stay precise
    assert bits(newton_schulz, "cpu") == bits(gram_newton_schulz, "cpu") == {"f32"}


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("table", [oracles.MUON_TABLE, ((1.5, -0.5, 0.0),) * 4], ids=["5", "cubic"])
def test_on_a_tpu_precise_steps_are_a_loop_of_which_one_is_compiled(table, dtype):
    x = oracles.well_conditioned((2, 5, 12), dtype)
    precise = functools.partial(newton_schulz, coefficients=table, precision="highest")
    for function, platform, loops in (
        (precise, "tpu", True),
        (precise, "cuda", False),
        (newton_schulz, "tpu", False),
    ):
        assert ("stablehlo.while" in lowered_for(platform, function, x)) == loops
    with values_as_on("tpu"):
        looped = precise(x)
    np.testing.assert_allclose(looped, precise(x), rtol=0, atol=1e-6)


def test_float16_gradients_of_a_thousand_do_not_overflow():
    rng = np.random.default_rng(0)
    x = (1e3 * np.sign(rng.standard_normal((48, 96)))).astype(np.float16)
    assert np.linalg.norm(oracles.float64(x)) > np.finfo(np.float16).max
    s = np.linalg.svd(oracles.float64(newton_schulz(jnp.asarray(x))), compute_uv=False)
    assert s.max() < 1.4
    assert s.min() > 0.3


def test_the_compute_dtype_sets_the_accuracy_and_not_the_dtype_of_the_result():
    x = oracles.well_conditioned((8, 8))
    table = oracles.MUON_TABLE
    exact = oracles.newton_schulz(x, table)
    coarse = newton_schulz(jnp.asarray(x), table, dtype=jnp.bfloat16)
    assert coarse.dtype == np.float32
    assert np.abs(coarse - exact).max() > tolerance(x.shape, table)
    np.testing.assert_allclose(coarse, exact, rtol=0, atol=tolerance(x.shape, table, jnp.bfloat16))
    fine = newton_schulz(jnp.asarray(x).astype(jnp.bfloat16), table, dtype=jnp.float32)
    assert fine.dtype == jnp.bfloat16
    exact = oracles.newton_schulz(oracles.float64(jnp.asarray(x).astype(jnp.bfloat16)), table)
    np.testing.assert_allclose(
        oracles.float64(fine), exact, rtol=tolerances.eps(jnp.bfloat16) / 2, atol=1e-5
    )


def test_the_length_of_the_table_is_the_number_of_steps():
    x = oracles.well_conditioned((8, 8))
    for steps in range(1, 6):
        table = coefficients.MUON[:steps]
        np.testing.assert_allclose(
            newton_schulz(jnp.asarray(x), table),
            oracles.newton_schulz(x, oracles.MUON_TABLE[:steps]),
            rtol=0,
            atol=tolerance(x.shape, oracles.MUON_TABLE[:steps]),
        )


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (3, 5, 12)], ids=str)
def test_a_table_may_be_a_function_of_the_shape(shape):
    seen = []

    def table(m, n):
        seen.append((m, n))
        return oracles.MUON_TABLE[: min(m, n) - 2]

    x = oracles.well_conditioned(shape)
    np.testing.assert_allclose(
        newton_schulz(jnp.asarray(x), table),
        oracles.newton_schulz(x, oracles.MUON_TABLE[:3]),
        rtol=0,
        atol=tolerance(shape, oracles.MUON_TABLE[:3]),
    )
    assert {tuple(sorted(pair)) for pair in seen} == {(5, 12)}


@pytest.mark.parametrize("shape", [(5, 12), (2, 2, 7, 4)], ids=str)
def test_its_derivative_is_that_of_the_published_iteration(shape):
    rng = np.random.default_rng(7)
    x = oracles.well_conditioned(shape, np.float64)
    direction, weight = rng.standard_normal((2, *shape))
    step = 1e-5
    difference = oracles.newton_schulz(x + step * direction) - oracles.newton_schulz(
        x - step * direction
    )
    expected = (weight * difference).sum() / (2 * step)
    with tolerances.double_precision():

        def loss(x):
            return (weight * newton_schulz(x, oracles.MUON_TABLE)).sum()

        gradient = np.asarray(jax.jit(jax.grad(loss))(x))
        _, tangent = jax.jit(lambda *args: jax.jvp(loss, args[:1], args[1:]))(x, direction)
    np.testing.assert_allclose((gradient * direction).sum(), expected, rtol=1e-6)
    np.testing.assert_allclose(tangent, expected, rtol=1e-6)


def test_the_gradient_is_finite_at_zero_and_at_rank_one():
    def loss(x):
        return newton_schulz(x)[..., 0, 0].sum()

    x = np.zeros((3, 5, 12), np.float32)
    x[1] = 1.0
    x[2, 0, 0] = 1.0
    assert np.isfinite(jax.jit(jax.grad(loss))(x)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nan_or_an_infinity_is_not_hidden(bad):
    x = oracles.well_conditioned((3, 5, 12))
    x[0, 1, 2] = bad
    actual = np.asarray(newton_schulz(jnp.asarray(x), oracles.MUON_TABLE))
    assert np.isnan(actual[0]).any()
    assert np.isfinite(actual[1:]).all()


def test_it_can_be_compiled_and_vectorised_over_any_axis():
    x = oracles.well_conditioned((3, 5, 12))
    expected = oracles.newton_schulz(x, oracles.MUON_TABLE)

    def function(x):
        return newton_schulz(x, oracles.MUON_TABLE)

    atol = tolerance(x.shape, oracles.MUON_TABLE)
    np.testing.assert_allclose(jax.jit(function)(x), expected, rtol=0, atol=atol)
    vectorised = jax.vmap(function, in_axes=2, out_axes=2)
    np.testing.assert_allclose(
        vectorised(jnp.moveaxis(jnp.asarray(x), 0, 2)),
        np.moveaxis(expected, 0, 2),
        rtol=0,
        atol=atol,
    )


# --- what bounds the singular values before the first step


def row_scaled(x):
    """Turbo-Muon (2512.04632): rows of the shorter side over the root of sum_j |(X X^H)_ij|."""
    if x.shape[-2] > x.shape[-1]:
        return oracles.mT(row_scaled(oracles.mT(x)))
    sums = np.abs(x @ oracles.mT(x).conj()).sum(-1, keepdims=True)
    return x / np.where(sums == 0, 1.0, sums) ** 0.5


def prescaled_newton_schulz(x, table, prescale):
    """By SVD."""
    x = row_scaled(oracles.float64(x)) if prescale == "aol" else oracles.float64(x)
    return oracles.on_singular_values(
        x,
        lambda s: oracles.scalar_map(
            table, s / oracles.schatten4(s) if prescale == "schatten" else s
        ),
    )


@by_prescale
@by_shape
def test_a_prescaled_matrix_is_iterated_without_another_norm(shape, prescale):
    x = oracles.well_conditioned(shape)
    table = oracles.MUON_TABLE
    actual = newton_schulz(jnp.asarray(x), table, prescale=prescale)
    assert actual.dtype == x.dtype
    expected = prescaled_newton_schulz(x, table, prescale)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance(shape, table))


@by_prescale
@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)], ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_it_is_so_in_double_precision_to_1e_11(shape, dtype, prescale):
    rng = np.random.default_rng(0)
    x = oracles.matrix_with_spectrum(rng, *shape, np.geomspace(1.0, 1e-4, min(shape)), dtype)
    x = x * np.geomspace(1.0, 1e-3, shape[0])[:, None]
    table = oracles.MUON_TABLE
    with tolerances.double_precision():
        actual = np.asarray(newton_schulz(jnp.asarray(x), table, prescale=prescale))
    expected = prescaled_newton_schulz(x, table, prescale)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-11)


@by_prescale
def test_before_the_first_step_singular_values_are_at_most_one_and_larger_than_by_frobenius(
    prescale,
):
    x = oracles.well_conditioned((6, 30)) * np.geomspace(1, 1e-3, 6, dtype=np.float32)[:, None]
    s = {
        name: np.linalg.svd(newton_schulz(jnp.asarray(x), IDENTITY, prescale=name))[1]
        for name in ("frobenius", prescale)
    }
    assert s[prescale].max() <= 1 + 1e-6
    assert (s[prescale] > s["frobenius"]).all()


@by_prescale
@pytest.mark.parametrize("steps", [1, 5])
def test_a_prescale_costs_no_product(steps, prescale):
    def products(prescale):
        program = jax.make_jaxpr(
            lambda x: newton_schulz(x, oracles.MUON_TABLE[:steps], prescale=prescale)
        )
        return sorted(oracles.matrix_products(program(jnp.ones((5, 12)))))

    assert products(prescale) == products("frobenius")
    assert len(products(prescale)) == 3 * steps


@by_prescale
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_of_the_input_does_not_matter_to_a_prescale(scale, prescale):
    x = (oracles.well_conditioned((3, 5, 12)).astype(np.float64) * scale).astype(np.float32)
    table = oracles.MUON_TABLE
    np.testing.assert_allclose(
        newton_schulz(jnp.asarray(x), table, prescale=prescale),
        prescaled_newton_schulz(oracles.float64(x) / scale, table, prescale),
        rtol=0,
        atol=tolerance(x.shape, table),
    )


@by_prescale
def test_zero_rows_and_zero_matrices_are_prescaled_to_zero(prescale):
    x = oracles.well_conditioned((3, 5, 12))
    x[0, [1, 3]] = 0
    x[1] = 0
    table = oracles.MUON_TABLE
    actual = np.asarray(newton_schulz(jnp.asarray(x), table, prescale=prescale))
    assert not actual[0, [1, 3]].any()
    assert not actual[1].any()
    expected = prescaled_newton_schulz(x, table, prescale)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance(x.shape, table, lowest=0.1))


@by_prescale
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nan_or_an_infinity_is_not_hidden_by_a_prescale(bad, prescale):
    x = oracles.well_conditioned((3, 5, 12))
    x[0, 1, 2] = bad
    actual = np.asarray(newton_schulz(jnp.asarray(x), oracles.MUON_TABLE, prescale=prescale))
    assert np.isnan(actual[0]).any()
    assert np.isfinite(actual[1:]).all()


@by_prescale
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_prescale_in_half_precision_costs_its_rounding(dtype, prescale):
    x, table = oracles.well_conditioned((5, 12)), oracles.MUON_TABLE
    actual = newton_schulz(jnp.asarray(x), table, prescale=prescale, dtype=dtype)
    np.testing.assert_allclose(
        actual,
        prescaled_newton_schulz(x, table, prescale),
        rtol=0,
        atol=tolerance(x.shape, table, dtype),
    )


@by_prescale
def test_the_gradient_of_a_prescaled_iteration_is_finite_at_zero_and_at_rank_one(prescale):
    def loss(x):
        return newton_schulz(x, prescale=prescale)[..., 0, 0].sum()

    x = np.zeros((3, 5, 12), np.float32)
    x[1] = 1.0
    x[2, 0, 0] = 1.0
    assert np.isfinite(jax.jit(jax.grad(loss))(x)).all()
