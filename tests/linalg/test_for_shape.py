"""Tables made for a shape, judged on singular values that the library did not compute."""

import functools
import itertools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.linalg

from orthax.linalg import coefficients, newton_schulz
from orthax.linalg.polar_factor import shape_tables

# Huawei Noah's Ark Lab, ROOT, the table in the paper's code.
ROOT = {
    (2048, 2048): (3.4916, -4.8224, 2.1095),
    (2048, 3072): (3.4509, -4.5790, 1.9325),
    (2048, 8192): (2.9794, -3.6674, 1.6207),
    (2048, 16384): (3.1943, -3.8221, 1.5322),
}
MUON = ((3.4445, -4.7750, 2.0315),) * 5
WIDE = [shape for shape in ROOT if shape != (2048, 2048)]
SHAPES = [
    *((1, 1), (1, 100_000), (2, 2), (3, 2), (2, 100_000), (16, 64), (128, 128), (128, 512)),
    *((301, 300), (768, 3072), (8192, 28672), (100_000, 100_000), *ROOT),
]
EVEN = np.linspace(0, 1, 100_001)
LOGARITHMIC = np.geomspace(1e-5, 1, 101)
SPECTRA_FILE = pathlib.Path(__file__).parents[2] / "benchmarks" / "data" / "real_spectra.npz"

# Fitted numbers are rounded to six decimals, and a law is summed in two ways.
STATIONARY = 5e-6


def scalar_map(table, s):
    for a, b, c in table:
        square = s * s
        s = s * (a + square * (b + square * c))
    return s


def mean_square(table, values, weights=None):
    return np.average((scalar_map(table, values) - 1) ** 2, weights=weights)


@functools.cache
def marchenko_pastur(m, n, points=200_000):
    """Singular values of a Gaussian matrix over its norm, and their density by the textbook."""
    ratio = min(m, n) / max(m, n)
    edges = 1 - ratio**0.5, 1 + ratio**0.5
    cells = np.linspace(*edges, points + 1)
    s = (cells[1:] + cells[:-1]) / 2
    density = np.sqrt((edges[1] ** 2 - s**2) * (s**2 - edges[0] ** 2)) / (np.pi * ratio * s)
    return s / min(m, n) ** 0.5, density


@functools.cache
def sampled(m, n, samples=2):
    """Singular values of Gaussian matrices over their norms: of bidiagonal ones with equal law.

    Dumitriu and Edelman, Matrix models for beta ensembles, 2002.
    """
    rng = np.random.default_rng(m + n)
    values = []
    for _ in range(samples):
        diagonal = np.sqrt(rng.chisquare(np.arange(n, n - m, -1)))
        below = np.sqrt(rng.chisquare(np.arange(m - 1, 0, -1)))
        squares = scipy.linalg.eigvalsh_tridiagonal(
            diagonal**2 + np.append(0.0, below**2), diagonal[:-1] * below
        )
        values.append(np.sqrt(np.maximum(squares, 0) / squares.sum()))
    return np.concatenate(values)


def gaussian(kind, shape):
    return marchenko_pastur(*shape) if kind == "law" else (sampled(*shape), None)


@functools.cache
def real_spectra():
    if not SPECTRA_FILE.exists():
        pytest.skip("the spectra of real momentum are not part of this distribution")
    stored = np.load(SPECTRA_FILE)
    return [stored[key] / np.linalg.norm(stored[key]) for key in stored.files]


def beyond_first_crest(table):
    (a, b, c), *_ = table
    return EVEN >= np.sqrt((-3 * b - np.sqrt(max(9 * b**2 - 20 * a * c, 0))) / (10 * c)) - 1e-9


both_kinds = pytest.mark.parametrize("kind", ["law", "sample"])


def test_bidiagonal_samples_have_the_singular_values_of_gaussian_matrices():
    rng = np.random.default_rng(0)
    s = np.concatenate(
        [np.linalg.svd(rng.standard_normal((60, 90)), compute_uv=False) for _ in range(50)]
    )
    s = np.sort(s / np.sqrt(60 * 90))
    np.testing.assert_allclose(np.sort(sampled(60, 90, 50)), s, atol=0.003)


def test_the_published_triples_of_root_are_as_published_and_cannot_be_changed():
    assert coefficients.ROOT == {shape: (row,) * 5 for shape, row in ROOT.items()}
    with pytest.raises(TypeError):
        coefficients.ROOT[2, 2] = MUON


def test_the_published_triple_for_square_matrices_leaves_its_basin():
    peak = scalar_map(coefficients.ROOT[2048, 2048], EVEN).max()
    assert peak == pytest.approx(3.31, abs=0.01)


@both_kinds
@pytest.mark.parametrize(
    ("shape", "factor"),
    list(zip(ROOT, (2.7, 1500, 180, 450), strict=True)),
)
def test_error_on_gaussian_matrices_is_much_smaller_than_with_published_triples(
    shape, factor, kind
):
    published = mean_square((ROOT[shape],) * 5, *gaussian(kind, shape))
    assert mean_square(coefficients.for_shape(*shape), *gaussian(kind, shape)) < published / factor


@both_kinds
def test_error_on_square_gaussian_matrices_is_smaller_than_with_the_generic_table(kind):
    generic = coefficients.minimax(5, 2e-3, cushion=0.0, safety=1.0)
    values = gaussian(kind, (2048, 2048))
    table = coefficients.for_shape(2048, 2048)
    assert mean_square(table, *values) < 0.95 * mean_square(generic, *values)


@both_kinds
@pytest.mark.parametrize("shape", WIDE)
def test_error_on_wide_gaussian_matrices_is_a_fifth_of_that_with_the_generic_table(shape, kind):
    generic = coefficients.minimax(5, 2e-3, cushion=0.0, safety=1.0)
    table = coefficients.for_shape(*shape)
    ratio = mean_square(table, *gaussian(kind, shape)) / mean_square(
        generic, *gaussian(kind, shape)
    )
    assert np.sqrt(ratio) < 0.2


@pytest.mark.parametrize("shape", [*SHAPES, (256, 256), (256, 1024), (768, 768)])
def test_no_real_spectrum_comes_out_worse_than_with_the_original_triple(shape):
    table = coefficients.for_shape(*shape)
    for values in real_spectra():
        assert mean_square(table, values) < mean_square(MUON, values)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_power_law_comes_out_better_than_with_the_original_triple(shape):
    for length in (16, 64, 256, 768, 2048):
        values = 1 / np.arange(1, length + 1)
        values = values / np.linalg.norm(values)
        assert mean_square(coefficients.for_shape(*shape), values) < mean_square(MUON, values)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_singular_value_ends_above_1_3_and_none_beyond_the_first_crest_below_0_7(shape, shared):
    for steps in (1, 2, 3, 5, 7, 10):
        table = coefficients.for_shape(*shape, steps, shared=shared)
        mapped = scalar_map(table, EVEN)
        assert mapped.max() <= 1.3
        assert mapped[1:].min() > 0
        if not shared:
            assert mapped[beyond_first_crest(table)].min() > 0.7


@pytest.mark.parametrize("shape", SHAPES)
def test_all_steps_may_be_off_by_a_percent_of_their_largest_value(shape):
    table = coefficients.for_shape(*shape)
    for signs in itertools.product((-0.01, 0.01), repeat=5):
        s = EVEN[::10]
        for row, sign in zip(table, signs, strict=True):
            s = scalar_map([row], s)
            s = s + sign * s.max()
        assert s.max() <= 1.3
        assert s[beyond_first_crest(table)[::10]].min() > 0.69


@pytest.mark.parametrize("shape", [(1, 1), (128, 512), (2048, 2048)])
def test_intermediate_values_stay_in_the_unit_interval(shape):
    table = coefficients.for_shape(*shape)
    for steps in range(1, 5):
        assert scalar_map(table[:steps], EVEN).max() <= 1


@pytest.mark.parametrize("shape", [(128, 512), (2048, 2048), (2048, 16384)])
@pytest.mark.parametrize(
    "spectrum",
    [
        np.ones(64),
        1 / np.arange(1, 65),
        np.r_[1.0, np.zeros(63)],
        np.r_[0.88, np.geomspace(0.2, 1e-3, 63)],
    ],
    ids=["flat", "power law", "rank one", "one in the dip"],
)
def test_nothing_diverges_in_bfloat16(shape, spectrum):
    rng = np.random.default_rng(0)
    x = oracles.matrix_with_spectrum(rng, 64, 80, spectrum, np.float32)
    table = coefficients.for_shape(*shape)
    mapped = newton_schulz(jnp.asarray(x), table, dtype=jnp.bfloat16)
    assert np.linalg.norm(oracles.float64(mapped), 2) < 1.3


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_table_has_as_many_triples_of_numbers_as_steps(shape, shared):
    for steps in (1, 2, 3, 5, 7, 10):
        table = coefficients.for_shape(*shape, steps, shared=shared)
        assert isinstance(table, tuple)
        assert len(table) == steps
        assert all(isinstance(row, tuple) and len(row) == 3 for row in table)
        assert all(isinstance(value, float) for row in table for value in row)


@pytest.mark.parametrize("n", [1, 2, 100_000])
def test_a_vector_is_normalized(n):
    for steps in range(1, 11):
        assert scalar_map(coefficients.for_shape(1, n, steps), 1.0) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("shape", [(16, 16), (128, 512), (2048, 2048)])
def test_more_steps_are_more_accurate(shape):
    errors = [
        mean_square(coefficients.for_shape(*shape, steps), *marchenko_pastur(*shape))
        for steps in (1, 2, 3, 5, 7, 9, 11)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5


@pytest.mark.parametrize("shape", [(1, 1), (128, 512), (2048, 2048)])
def test_steps_beyond_what_is_likely_lift_smaller_singular_values(shape):
    for steps in (8, 9, 10, 11):
        fewer, more = (coefficients.for_shape(*shape, k) for k in (steps, steps + 1))
        assert scalar_map(more, 1e-7) > 2 * scalar_map(fewer, 1e-7)


@pytest.mark.parametrize("shape", [(128, 512), (301, 300), (2048, 2048), (2048, 16384)])
@pytest.mark.parametrize("steps", [2, 3, 5, 7])
def test_no_generic_table_that_is_as_robust_has_a_smaller_error(shape, steps):
    def error(table):
        likely = mean_square(table, *marchenko_pastur(*shape))
        return 0.9985 * likely + 0.0015 * mean_square(table, LOGARITHMIC)

    generic = [
        coefficients.minimax(steps, lower, cushion=0.02, safety=1.01)
        for lower in np.geomspace(3e-5, 0.3, 24)
    ]
    robust = [
        table
        for table in generic
        if (mapped := scalar_map(table, EVEN)).max() < 1.3
        and mapped[beyond_first_crest(table)].min() > 0.7
    ]
    assert len(robust) > 5
    assert error(coefficients.for_shape(*shape, steps)) < min(map(error, robust))


def best_scale(table, parts):
    """What to multiply the last row by for the least error over (share, values, weights)."""
    moments = np.zeros(2)
    for share, values, weights in parts:
        mapped = scalar_map(table, values)
        moments += share * np.array([np.average(f, weights=weights) for f in (mapped, mapped**2)])
    return moments[0] / moments[1]


@pytest.mark.parametrize("shape", [(64, 64), (128, 512), (2048, 2048), (512, 4096)])
def test_no_other_scale_of_the_last_row_has_a_smaller_error(shape):
    parts = [(0.9985, *marchenko_pastur(*shape)), (0.0015, LOGARITHMIC, None)]
    table = coefficients.for_shape(*shape)
    assert best_scale(table, parts) == pytest.approx(1, abs=STATIONARY)


def test_longer_matrices_than_1_to_16_are_taken_to_be_1_to_16():
    assert coefficients.for_shape(100, 5000) == coefficients.for_shape(1600, 100)


def test_given_spectra_have_a_quarter_of_the_weight_in_equal_parts():
    given = [1 / np.arange(1, 31), np.geomspace(3, 1e-3, 200)]
    relative = [values / np.linalg.norm(values) for values in given]
    table = coefficients.for_shape(64, 64, spectra=given)
    shares = [(0.9985 * 0.125, values, None) for values in relative]
    parts = [(0.9985 * 0.75, *marchenko_pastur(64, 64)), *shares, (0.0015, LOGARITHMIC, None)]
    assert best_scale(table, parts) == pytest.approx(1, abs=STATIONARY)
    ignored = coefficients.for_shape(64, 64)
    with_them, without = (
        sum(share * mean_square(one, *values) for share, *values in parts)
        for one in (table, ignored)
    )
    assert with_them < 0.99 * without


@pytest.mark.parametrize("shared", [False, True])
def test_the_scale_of_given_spectra_and_the_kind_of_sequence_do_not_matter(shared):
    given = [1 / np.arange(1, 31), np.array([3, 2, 0])]
    table = coefficients.for_shape(64, 96, shared=shared, spectra=given)
    scaled = tuple((1e200 * values).tolist() for values in given)
    assert coefficients.for_shape(64, 96, shared=shared, spectra=scaled) == table


def test_given_spectra_do_not_change_later_tables():
    before = coefficients.for_shape(33, 44)
    coefficients.for_shape(33, 44, spectra=[np.ones(3)])
    assert coefficients.for_shape(33, 44) is before


@pytest.mark.parametrize("steps", [1, 5, 8])
@pytest.mark.parametrize("shared", [False, True])
def test_the_order_of_the_sides_does_not_matter(steps, shared):
    wide = coefficients.for_shape(20, 70, steps, shared=shared)
    assert coefficients.for_shape(70, 20, steps, shared=shared) == wide


def test_a_shape_of_numpy_integers_is_a_shape():
    sides = np.array([20, 70])
    assert coefficients.for_shape(*sides, np.int64(4)) == coefficients.for_shape(20, 70, 4)


def test_a_table_depends_on_the_shape():
    tables = {coefficients.for_shape(*shape) for shape in [(64, 64), (64, 96), (96, 96)]}
    assert len(tables) == 3


@pytest.mark.parametrize("shape", [*ROOT, (128, 128), (768, 3072), (4096, 11008)])
def test_shipped_tables_are_what_fitting_gives(shape, monkeypatch):
    shipped = coefficients.for_shape(*shape)
    monkeypatch.setattr(shape_tables, "NUMBERS", {})
    shape_tables._without_spectra.cache_clear()
    np.testing.assert_allclose(coefficients.for_shape(*shape), shipped, rtol=1e-5)
    shape_tables._without_spectra.cache_clear()


def test_common_shapes_are_looked_up(monkeypatch):
    monkeypatch.setattr(shape_tables, "fit", None)
    shape_tables._without_spectra.cache_clear()
    assert len(coefficients.for_shape(8192, 2048)) == 5


def test_a_table_is_fitted_within_two_seconds_and_once():
    start = time.process_time()
    table = coefficients.for_shape(1234, 4321)
    assert time.process_time() - start < 2
    assert coefficients.for_shape(4321, 1234) is table


@pytest.mark.parametrize("shape", ROOT)
def test_a_shared_triple_beats_the_published_one_on_gaussian_matrices(shape):
    table = coefficients.for_shape(*shape, shared=True)
    assert len(set(table)) == 1
    published = mean_square((ROOT[shape],) * 5, *marchenko_pastur(*shape))
    assert mean_square(table, *marchenko_pastur(*shape)) < published / 1.1


def test_a_shared_triple_loses_to_the_original_one_on_real_spectra_as_printed():
    tables = [coefficients.for_shape(*shape, shared=True) for shape in ROOT]
    ratios = [
        np.sqrt(mean_square(table, values) / mean_square(MUON, values))
        for table in tables
        for values in real_spectra()
    ]
    assert max(ratios) == pytest.approx(2.3, abs=0.05)
    slopes = [table[0][0] ** 5 for table in tables]
    assert [min(slopes), max(slopes)] == pytest.approx([116, 412], abs=0.5)


def test_the_printed_factors_hold():
    generic = coefficients.minimax(5, 2e-3, cushion=0.0, safety=1.0)
    own, published, generic, shared = (
        np.array([mean_square(table, *marchenko_pastur(*shape)) for shape, table in by_shape])
        for by_shape in (
            [(shape, coefficients.for_shape(*shape)) for shape in ROOT],
            coefficients.ROOT.items(),
            [(shape, generic) for shape in ROOT],
            [(shape, coefficients.for_shape(*shape, shared=True)) for shape in ROOT],
        )
    )
    np.testing.assert_allclose(published / own, [2.8, 2090, 190, 510], rtol=0.03)
    np.testing.assert_allclose(own / generic, [0.95, 0.034, 0.035, 0.035], rtol=0.03)
    gains = published / shared
    assert [gains.min(), gains.max()] == pytest.approx([1.1, 12], rel=0.03)


def test_the_printed_distances_of_real_momentum_hold():
    tables = {
        "least": coefficients.for_shape(2048, 2048),
        "most": coefficients.for_shape(2048, 16384),
        "muon": MUON,
        "polar express": coefficients.POLAR_EXPRESS,
        "eight": coefficients.minimax(8, 1e-4),
    }
    distances = [
        np.mean([np.sqrt(mean_square(table, values)) for values in real_spectra()])
        for table in tables.values()
    ]
    np.testing.assert_allclose(distances, [0.50, 0.55, 0.58, 0.48, 0.17], atol=0.006)


@pytest.mark.parametrize("shape", [(24, 56), (56, 24), (3, 24, 24), (1, 9)])
def test_newton_schulz_takes_the_function_itself(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    table = coefficients.for_shape(*shape[-2:])
    actual = jax.jit(lambda x: newton_schulz(x, coefficients.for_shape))(x)
    expected = oracles.newton_schulz(oracles.float64(x), table)
    assert oracles.relative_error(actual, expected) < 1e-4
