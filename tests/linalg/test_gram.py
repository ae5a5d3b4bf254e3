import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances

from orthax.linalg import coefficients, gram_newton_schulz, newton_schulz
from orthax.linalg.polar_factor.gram import best_restarts

TABLES = {
    "muon": oracles.MUON_TABLE,
    "polar express": coefficients.POLAR_EXPRESS,
    "eight steps": coefficients.minimax(8, 1e-3),
}
ONE_STEP = ((1.875, -1.25, 0.375),)
SHAPES = [(8, 8), (12, 5), (5, 12), (2, 2, 7, 4), (1, 9)]
DTYPES = [np.float64, np.float32, jnp.float16, jnp.bfloat16]
by_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@functools.cache
def compiled(table=oracles.MUON_TABLE, **options):
    return jax.jit(functools.partial(gram_newton_schulz, coefficients=table, **options))


def tolerance(shape, table=oracles.MUON_TABLE, dtype=np.float32, lowest=0.5):
    r = min(shape[-2:])
    return tolerances.rounding(dtype, r, oracles.gain(table, lowest / r**0.5))


def geometric(shape, condition, dtype=np.float32):
    spectrum = np.geomspace(1.0, 1 / condition, min(shape))
    return oracles.matrix_with_spectrum(np.random.default_rng(0), *shape, spectrum, dtype)


# --- the polynomial of newton_schulz


@by_shape
@by_table
def test_it_is_newton_schulz(shape, table):
    x = oracles.well_conditioned(shape)
    actual = compiled(table)(x)
    assert actual.shape == shape
    assert actual.dtype == x.dtype
    np.testing.assert_allclose(
        actual, oracles.newton_schulz(x, table), rtol=0, atol=tolerance(shape, table)
    )


@by_table
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((12, 12), np.float64), ((30, 8), np.float64), ((8, 30), np.complex128)],
    ids=str,
)
def test_in_double_precision_it_is_so_to_1e_11(shape, dtype, table):
    x = geometric(shape, 1e3, dtype)
    with tolerances.double_precision():
        actual = compiled(table)(x)
        assert actual.dtype == dtype
        actual = np.asarray(actual)
    np.testing.assert_allclose(actual, oracles.newton_schulz(x, table), rtol=0, atol=1e-11)


def test_a_single_step_is_one_too():
    x = oracles.well_conditioned((5, 12))
    np.testing.assert_allclose(
        compiled(ONE_STEP)(x),
        oracles.newton_schulz(x, ONE_STEP),
        rtol=0,
        atol=tolerance(x.shape, ONE_STEP),
    )
    with pytest.raises(ValueError, match="restarts"):
        gram_newton_schulz(jnp.asarray(x), ONE_STEP, restarts=(1,))


@pytest.mark.parametrize("steps", [12, 18])
def test_long_tables_get_restarts_too(steps):
    """Between restarts far apart, float64 itself overflows."""
    table = coefficients.minimax(steps, 1e-6)
    restarts = best_restarts(table, tolerances.eps(np.float32))
    assert restarts
    s = np.linalg.svd(compiled(table)(oracles.well_conditioned((5, 12))), compute_uv=False)
    off = np.abs(coefficients.scalar_map(table, np.linspace(0.05, 1, 1000)) - 1).max()
    assert np.abs(s - 1).max() <= off + 1e-5


@pytest.mark.parametrize("restarts", [(), (1,), (4,), (2, 3), (1, 2, 3, 4)], ids=str)
def test_restarts_do_not_change_the_numbers(restarts):
    x = geometric((8, 30), 1e3, np.float64)
    with tolerances.double_precision():
        actual = np.asarray(compiled(restarts=restarts)(x))
    np.testing.assert_allclose(actual, oracles.newton_schulz(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(48, 200), (64, 64)], ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e12])
def test_ill_conditioned_matrices_lose_nothing_by_the_restarts(shape, condition):
    x = geometric(shape, condition)
    table = coefficients.POLAR_EXPRESS
    exact = oracles.newton_schulz(x, table)
    np.testing.assert_allclose(compiled(table)(x), exact, rtol=0, atol=5e-5)
    if condition > 1:
        without = np.abs(compiled(table, restarts=())(x) - exact).max()
        assert without > 10 * np.abs(compiled(table)(x) - exact).max()


def test_a_long_table_needs_them_to_stay_finite():
    x = geometric((64, 64), 1e12)
    table = coefficients.minimax(10, 1e-5)
    assert not np.isfinite(compiled(table, restarts=())(x)).all()
    np.testing.assert_allclose(compiled(table)(x), oracles.newton_schulz(x, table), atol=1e-2)


# --- their choice


def rounding_error(table, restarts, eps):
    """Worst relative error of what a segment multiplies the smallest singular values by.

    Either its Gram matrix has an eigenvalue 4 eps (of float32, or of the dtype) instead of 0, or
    the factor is rounded to the dtype before it meets a matrix of norm 1.
    """

    def multiplied(rows, eigenvalue):
        factor = 1.0
        for a, b, c in rows:
            step = a + b * eigenvalue + c * eigenvalue**2
            factor, eigenvalue = factor * step, eigenvalue * step**2
        return factor

    ends = [0, *restarts, len(table)]
    segments = [table[start:end] for start, end in itertools.pairwise(ends)]
    moved = 4 * min(eps, 2.0**-23)
    return max(
        error
        for rows in segments
        for error in (
            abs(multiplied(rows, moved) / multiplied(rows, 0.0) - 1),
            abs(multiplied(rows, -moved) / multiplied(rows, 0.0) - 1),
            eps / 2 * multiplied(rows, 0.0),
        )
    )


@pytest.mark.parametrize(
    "table", [*TABLES.values(), ONE_STEP, coefficients.CANS, coefficients.minimax(10, 1e-5)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fewest_restarts_that_keep_rounding_below_two_percent_are_taken(table, dtype):
    eps = tolerances.eps(dtype)
    chosen = best_restarts(table, eps)
    steps = range(1, len(table))
    subsets = {
        count: {
            places: rounding_error(table, places, eps)
            for places in itertools.combinations(steps, count)
        }
        for count in range(len(table))
    }
    enough = [count for count, errors in subsets.items() if min(errors.values()) <= 0.02]
    if enough:
        errors = subsets[min(enough)]
        assert len(chosen) == min(enough)
        assert errors[chosen] == pytest.approx(min(errors.values()))
    else:
        assert chosen == tuple(steps)


@by_table
def test_in_double_precision_there_are_none_and_in_bfloat16_one_before_every_step(table):
    assert best_restarts(table, tolerances.eps(np.float64)) == ()
    assert best_restarts(table, tolerances.eps(jnp.bfloat16)) == tuple(range(1, len(table)))


@pytest.mark.parametrize("restarts", [None, (), (2,), (1, 3)], ids=str)
def test_there_are_two_long_products_and_two_more_per_restart(restarts):
    table = coefficients.POLAR_EXPRESS
    program = jax.make_jaxpr(functools.partial(gram_newton_schulz, restarts=restarts))
    products = list(oracles.matrix_products(program(jnp.ones((5, 40)))))
    used = best_restarts(table, tolerances.eps(np.float32)) if restarts is None else restarts
    assert sum((5, 40) in shapes for shapes in products) == 2 + 2 * len(used)
    plain = oracles.matrix_products(jax.make_jaxpr(newton_schulz)(jnp.ones((5, 40))))
    assert sum((5, 40) in shapes for shapes in plain) == 2 * len(table)


# --- dtypes


@pytest.mark.parametrize("shape", [(8, 8), (5, 12)], ids=str)
def test_complex_matrices_keep_their_phases(shape):
    x = oracles.well_conditioned(shape, np.complex64)
    actual = compiled()(x)
    assert actual.dtype == np.complex64
    np.testing.assert_allclose(actual, oracles.newton_schulz(x), rtol=0, atol=tolerance(shape))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_half_precision_keeps_its_dtype_and_on_a_cpu_is_rounded_only_once(scale, dtype):
    x = jnp.asarray(oracles.well_conditioned((5, 12)) * np.float32(scale)).astype(dtype)
    actual = compiled()(x)
    assert actual.dtype == dtype
    np.testing.assert_allclose(
        oracles.float64(actual),
        oracles.newton_schulz(oracles.float64(x)),
        rtol=tolerances.eps(dtype) / 2,
        atol=tolerance(x.shape),
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(8, 8), (5, 12)], ids=str)
def test_long_products_in_half_precision_cost_its_rounding(shape, dtype):
    x, table = oracles.well_conditioned(shape), coefficients.POLAR_EXPRESS
    actual = compiled(table, dtype=dtype)(x)
    assert actual.dtype == np.float32
    error = np.abs(actual - oracles.newton_schulz(x, table)).max()
    assert tolerance(shape, table) < error < tolerance(shape, table, dtype)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("condition", [1e3, 1e12])
def test_ill_conditioned_matrices_stay_finite_in_half_precision(condition, dtype):
    x = geometric((48, 200), condition)
    y = oracles.float64(compiled(coefficients.POLAR_EXPRESS, dtype=dtype)(x))
    assert np.linalg.norm(y, 2) < 1.4


# --- edges


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_of_the_input_does_not_matter(scale):
    x = (oracles.well_conditioned((3, 5, 12)).astype(np.float64) * scale).astype(np.float32)
    np.testing.assert_allclose(
        compiled()(x), oracles.newton_schulz(x), rtol=0, atol=tolerance(x.shape)
    )


def test_matrices_of_a_batch_are_scaled_one_by_one_and_zero_stays_zero():
    x = oracles.well_conditioned((3, 5, 12)).astype(np.float64)
    x = (x * np.array([1e-20, 0.0, 1e18])[:, None, None]).astype(np.float32)
    actual = np.asarray(compiled()(x))
    assert not actual[1].any()
    np.testing.assert_allclose(actual, oracles.newton_schulz(x), rtol=0, atol=tolerance(x.shape))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_zero_is_mapped_to_exactly_zero(dtype):
    actual = compiled()(jnp.zeros((5, 12), dtype))
    assert actual.dtype == dtype
    assert not np.asarray(actual, np.complex64).any()


def test_a_matrix_below_eps_counts_as_zero():
    x = np.float32(1e-9) * oracles.well_conditioned((5, 12))
    assert not np.asarray(compiled(eps=1e-7)(x)).any()
    np.testing.assert_allclose(
        compiled(eps=1e-12)(x), oracles.newton_schulz(x), rtol=0, atol=tolerance(x.shape)
    )


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 4, 4)], ids=str)
def test_an_empty_matrix_comes_back_empty(shape):
    assert gram_newton_schulz(jnp.zeros(shape)).shape == shape


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nan_or_an_infinity_is_not_hidden_and_leaves_the_others_alone(bad):
    x = oracles.well_conditioned((3, 5, 12))
    x[0, 1, 2] = bad
    actual = np.asarray(compiled()(x))
    assert np.isnan(actual[0]).any()
    assert np.isfinite(actual[1:]).all()


def test_the_gradient_is_finite_at_zero_and_at_rank_one():
    x = np.zeros((3, 5, 12), np.float32)
    x[1] = 1.0
    x[2, 0, 0] = 1.0
    gradient = jax.jit(jax.grad(lambda x: gram_newton_schulz(x)[..., 0, 0].sum()))
    assert np.isfinite(gradient(x)).all()


def test_its_derivative_is_that_of_the_published_iteration():
    rng = np.random.default_rng(7)
    x = oracles.well_conditioned((5, 12), np.float64)
    direction, weight = rng.standard_normal((2, *x.shape))
    step = 1e-5
    difference = oracles.newton_schulz(x + step * direction) - oracles.newton_schulz(
        x - step * direction
    )
    with tolerances.double_precision():
        loss = functools.partial(lambda w, x: (w * compiled()(x)).sum(), weight)
        gradient = np.asarray(jax.jit(jax.grad(loss))(x))
    np.testing.assert_allclose(
        (gradient * direction).sum(), (weight * difference).sum() / (2 * step), rtol=1e-6
    )


def test_a_table_may_be_a_function_of_the_shape():
    seen = []

    def table(m, n):
        seen.append((m, n))
        return oracles.MUON_TABLE[:3]

    x = oracles.well_conditioned((12, 5))
    np.testing.assert_allclose(
        gram_newton_schulz(jnp.asarray(x), table),
        oracles.newton_schulz(x, oracles.MUON_TABLE[:3]),
        rtol=0,
        atol=tolerance(x.shape),
    )
    assert seen == [(5, 12)]


def test_without_compilation_and_vectorised_it_is_the_same():
    x = oracles.well_conditioned((3, 5, 12))
    expected = oracles.newton_schulz(x, coefficients.POLAR_EXPRESS)
    atol = tolerance(x.shape, coefficients.POLAR_EXPRESS)
    for function in (gram_newton_schulz, jax.vmap(gram_newton_schulz)):
        np.testing.assert_allclose(function(jnp.asarray(x)), expected, rtol=0, atol=atol)
