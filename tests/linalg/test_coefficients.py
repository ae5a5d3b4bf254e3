import numpy as np
import oracles
import pytest
import tolerances

from orthax.linalg import coefficients

CUSHION = 0.02407327424182761

# Amsel et al., 2505.16932, the list in the paper's code, before its safety factor of 1.01.
PAPER = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# KellerJordan/modded-nanogpt, train_gpt.py.
NANOGPT = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# Dao-AI-Lab and microsoft/dion (You Jiacheng's five triples).
DION = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Grishina et al., 2506.10935, as circulated.
CANS = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)


def interval(lower, points=20001):
    """Grid of [lower, 1] that is fine at either end."""
    even = np.linspace(lower, 1.0, points)
    return np.union1d(even, np.geomspace(lower, 1.0, points))


def error(table, lower):
    return np.abs(oracles.scalar_map(table, interval(lower)) - 1).max()


def test_published_tables_are_as_published():
    assert coefficients.MUON == ((3.4445, -4.7750, 2.0315),) * 5
    assert coefficients.DION == DION
    assert coefficients.CANS == CANS
    np.testing.assert_allclose(coefficients.POLAR_EXPRESS, NANOGPT, rtol=tolerances.PUBLISHED_TABLE)


@pytest.mark.parametrize("name", ["MUON", "DION", "POLAR_EXPRESS", "CANS"])
def test_a_table_is_a_tuple_of_triples_of_python_numbers(name):
    table = getattr(coefficients, name)
    assert isinstance(table, tuple)
    assert all(isinstance(row, tuple) and len(row) == 3 for row in table)
    assert all(isinstance(value, float) for row in table for value in row)
    assert hash(table) is not None


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [("MUON", 0.4705, 1.2024), ("DION", 0.475, 1.145), ("POLAR_EXPRESS", 0.859, 1.141)],
)
def test_singular_values_from_a_thousandth_land_in_the_printed_range(name, lowest, highest):
    mapped = coefficients.scalar_map(getattr(coefficients, name), interval(1e-3))
    assert mapped.min() == pytest.approx(lowest, abs=tolerances.PRINTED)
    assert mapped.max() == pytest.approx(highest, abs=tolerances.PRINTED)


@pytest.mark.parametrize(("name", "slope"), [("MUON", 485), ("DION", 493), ("POLAR_EXPRESS", 990)])
def test_the_slope_at_zero_is_as_printed(name, slope):
    table = getattr(coefficients, name)
    assert coefficients.scalar_map(table, np.array(1e-12)) / 1e-12 == pytest.approx(slope, abs=1)


def test_the_scalar_map_is_the_composed_odd_polynomial_in_float64():
    rng = np.random.default_rng(0)
    s = rng.uniform(-1, 1, (3, 50))
    table = tuple(map(tuple, rng.standard_normal((4, 3))))
    actual = coefficients.scalar_map(table, s)
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, oracles.scalar_map(table, s), rtol=1e-10, atol=1e-14)
    np.testing.assert_array_equal(coefficients.scalar_map(table, -s), -actual)


def test_the_published_table_of_polar_express_is_reproduced():
    table = coefficients.minimax(8, 1e-3, safety=1.0)
    np.testing.assert_allclose(table[:6], PAPER[:6], rtol=tolerances.PUBLISHED_TABLE)
    np.testing.assert_allclose(table[6:], PAPER[6:], rtol=1e-8)


def test_the_published_table_of_modded_nanogpt_is_reproduced():
    table = coefficients.minimax(5, 1e-3, cushion=0.02, safety=1.02)
    np.testing.assert_allclose(table, NANOGPT, rtol=tolerances.PUBLISHED_TABLE)
    # The published rows and the nonlinear system agree without the library.
    expected = oracles.composed_quintics(5, 1e-3, cushion=0.02, safety=1.02, tracked=True)
    np.testing.assert_allclose(NANOGPT, expected, rtol=tolerances.PUBLISHED_TABLE)


@pytest.mark.parametrize("safety", [1.0, 1.01, 1.05])
def test_the_safety_factor_divides_the_argument_of_all_rows_but_the_last(safety):
    table = coefficients.minimax(4, 1e-2, safety=safety)
    expected = oracles.composed_quintics(4, 1e-2, cushion=CUSHION, safety=safety, tracked=True)
    np.testing.assert_allclose(table, expected, rtol=1e-9)


def test_rows_that_know_of_the_safety_factor_beat_rows_divided_by_it_afterwards():
    table = coefficients.minimax(5, 1e-3)
    powers = np.array([1, 3, 5])
    afterwards = [*(PAPER[:4] / 1.01**powers), PAPER[4]]
    assert error(table, 1e-3) < error(afterwards, 1e-3) - 0.01


@pytest.mark.parametrize("lower", [0.3, 1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("cushion", [0.0, CUSHION, 0.1])
def test_rows_agree_with_a_linear_program(lower, cushion):
    table = coefficients.minimax(6, lower, cushion=cushion, safety=1.0)
    expected = oracles.composed_quintics(6, lower, cushion=cushion)
    s = interval(lower, 500)
    for steps in range(1, 7):
        before, now = (oracles.scalar_map(expected[:k], s) for k in (steps - 1, steps))
        np.testing.assert_allclose(oracles.scalar_map(table[:steps], s), now, rtol=1e-8)
        # On an interval close to a point, very different rows do the same.
        if np.abs(before - 1).max() > 0.05:
            np.testing.assert_allclose(table[steps - 1], expected[steps - 1], rtol=1e-8)


@pytest.mark.parametrize("lower", [0.5, 0.1, 1e-2, 1e-3, 1e-4])
def test_one_step_equioscillates(lower):
    ((a, b, c),) = coefficients.minimax(1, lower, cushion=0.0)
    root = np.sqrt(9 * b**2 - 20 * a * c)
    inner = np.sqrt((-3 * b + np.array([-1, 1]) * root) / (10 * c))
    assert lower < inner[0] < inner[1] < 1
    deviation = oracles.scalar_map([(a, b, c)], np.array([lower, *inner, 1.0])) - 1
    expected = oracles.equioscillating_quintic(lower, 1.0)[1]
    np.testing.assert_allclose(deviation, expected * np.array([-1, 1, -1, 1]), atol=1e-12)
    assert error([(a, b, c)], lower) <= expected + 1e-12


@pytest.mark.parametrize(
    ("lower", "steps", "printed"),
    [
        (1e-1, 3, 1.5e-4),
        (1e-2, 4, 0.013),
        (1e-2, 5, 1.4e-6),
        (1e-3, 5, 0.124),
        (1e-3, 6, 1.2e-3),
        (1e-3, 7, 1.0e-9),
        (1e-4, 6, 0.38),
        (1e-4, 7, 0.036),
        (1e-4, 8, 3.0e-5),
    ],
)
def test_the_error_of_the_whole_table_is_as_printed(lower, steps, printed):
    table = coefficients.minimax(steps, lower, safety=1.0)
    assert error(table, lower) == pytest.approx(printed, rel=0.05)


@pytest.mark.parametrize("lower", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("cushion", [0.0, CUSHION])
def test_the_error_falls_with_every_step(lower, cushion):
    errors = [
        error(coefficients.minimax(steps, lower, cushion=cushion, safety=1.0), lower)
        for steps in range(1, 11)
    ]
    falling = [value for value in errors if value > 1e-13]
    assert falling == sorted(falling, reverse=True)
    assert len(set(falling)) == len(falling) >= 3
    assert max(errors[len(falling) :], default=0.0) < 1e-13


def test_the_cushion_costs_accuracy_and_buys_a_flatter_interior():
    flat, steep = (coefficients.minimax(5, 1e-3, cushion=c, safety=1.0) for c in (CUSHION, 0.0))
    assert error(steep, 1e-3) < error(flat, 1e-3)
    inside = interval(0.05)
    assert (
        np.abs(oracles.scalar_slope(flat[:1], inside)).max()
        < np.abs(oracles.scalar_slope(steep[:1], inside)).max()
    )


def test_with_the_safety_factor_arguments_a_percent_above_one_still_converge():
    table = coefficients.minimax(8, 1e-3)
    mapped = oracles.scalar_map(table, np.linspace(1e-2, 1.01, 2001))
    np.testing.assert_allclose(mapped, 1.0, atol=1e-4)


@pytest.mark.parametrize("safety", [1.0, 1.001, 1.01, 1.02])
@pytest.mark.parametrize("lower", [0.5, 1e-2, 1e-4, 1e-6, 1e-8])
def test_any_number_of_steps_stays_finite_and_accurate(lower, safety):
    for steps in (13, 20, 40):
        table = coefficients.minimax(steps, lower, safety=safety)
        assert len(table) == steps
        assert np.isfinite(table).all()
    assert error(table, lower) < 1e-9
