import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances
from helpers import normal
from hypothesis import given, settings
from hypothesis import strategies as st

from orthax.linalg import top_columns

ORDERS = ["l1", "l2"]
SHAPES = [(24, 40), (40, 16), (1, 9), (9, 1), (3, 8, 12), (2, 2, 5, 4)]
by_order = pytest.mark.parametrize("order", ORDERS)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)

columns = jax.jit(top_columns, static_argnums=(1, 2))


def expected(x, rank, order):
    """A stable sort of the exact norms, largest first."""
    sizes = np.abs(oracles.float64(x))
    norms = (sizes if order == "l1" else sizes**2).sum(-2)
    return np.sort(np.argsort(-norms, axis=-1, kind="stable")[..., :rank], axis=-1)


def energy(x, indices=None):
    """Squares of the entries in these columns, relative to the largest entry of the matrix."""
    x = np.abs(oracles.float64(x))
    x = x / (x.max() or 1.0)
    return (x[:, indices] ** 2 if indices is not None else x**2).sum()


# --- the choice


@by_shape
@by_order
def test_they_are_the_first_of_a_sort_by_norm(shape, order):
    x = normal(shape)
    for rank in {1, 2, shape[-1] // 2, shape[-1]} - {0}:
        if rank > shape[-1]:
            continue
        actual = columns(x, rank, order)
        assert (actual.shape, actual.dtype) == ((*shape[:-2], rank), np.int32)
        np.testing.assert_array_equal(actual, expected(x, rank, order))


@by_order
def test_norms_of_complex_columns_are_of_magnitudes(order):
    x = normal((3, 24, 40), np.complex64)
    np.testing.assert_array_equal(columns(x, 7, order), expected(x, 7, order))
    np.testing.assert_array_equal(columns(x, 7, order), columns(np.abs(x), 7, order))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@by_order
def test_norms_of_16_bits_are_taken_in_float32(dtype, order):
    x = jnp.asarray(normal((200, 40))).astype(dtype)
    np.testing.assert_array_equal(columns(x, 7, order), expected(x, 7, order))


@by_order
def test_double_precision_tells_close_columns_apart(order):
    x = np.ones((1, 4)) + 1e-12 * np.array([[2.0, 0.0, 3.0, 1.0]])
    with tolerances.double_precision():
        actual = np.asarray(top_columns(jnp.asarray(x), 2, order))
    np.testing.assert_array_equal(actual, [0, 2])


def test_the_default_is_l2():
    x = np.concatenate([np.full((100, 1), 0.05), np.eye(100, 1)], axis=1, dtype=np.float32)
    assert top_columns(jnp.asarray(x), 1).tolist() == columns(x, 1, "l2").tolist() == [1]


@by_order
def test_indices_increase_whatever_the_order_of_norms(order):
    x = np.arange(12, 0, -1, dtype=np.float32)[None]
    assert columns(x, 5, order).tolist() == [0, 1, 2, 3, 4]
    assert columns(x[:, ::-1].copy(), 5, order).tolist() == [7, 8, 9, 10, 11]
    many = np.asarray(columns(normal((50, 4, 12)), 5, order))
    assert (np.diff(many, axis=-1) > 0).all()


@by_order
def test_of_equal_columns_those_of_lower_index_come_first(order):
    assert columns(np.ones((3, 9), np.float32), 4, order).tolist() == [0, 1, 2, 3]
    x = np.tile(np.float32([1, 2, -1, 2, 3, -2, 1]), (3, 1))
    assert columns(x, 3, order).tolist() == [1, 3, 4]
    assert columns(x, 5, order).tolist() == [0, 1, 3, 4, 5]
    swapped = np.stack([x[0] * [[1], [2], [3]], x[0] * [[3], [1], [2]]]).astype(np.float32)
    np.testing.assert_array_equal(columns(swapped, 2, order), [[1, 4], [1, 4]])


@by_order
def test_every_matrix_of_a_batch_has_its_own(order):
    x = normal((2, 3, 8, 12))
    actual = np.asarray(columns(x, 5, order))
    for place in np.ndindex(2, 3):
        np.testing.assert_array_equal(actual[place], columns(x[place], 5, order))


@by_order
def test_a_permutation_of_columns_permutes_them(order):
    x, permutation = normal((8, 12)), np.random.default_rng(1).permutation(12)
    actual = columns(x[:, permutation], 5, order)
    np.testing.assert_array_equal(np.sort(permutation[actual]), columns(x, 5, order))


# --- scale


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-3, 1e3, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@by_order
def test_they_do_not_depend_on_the_scale(dtype, order, scale):
    x = normal((3, 24, 40), dtype)
    scaled = (scale * x.astype(np.complex128 if x.imag.any() else np.float64)).astype(dtype)
    np.testing.assert_array_equal(columns(scaled, 7, order), columns(x, 7, order))


@by_order
def test_scales_of_a_batch_do_not_mix(order):
    x = normal((3, 24, 40))
    scales = np.float32([1e-30, 1, 1e30])[:, None, None]
    np.testing.assert_array_equal(columns(x * scales, 7, order), columns(x, 7, order))


@by_order
def test_the_largest_floats_count(order):
    x = np.full((30, 4), 1e38, np.float32)
    x[:, 2] = 3e38
    assert columns(x, 1, order).tolist() == [2]
    assert columns((x * np.complex64(1 + 1j)), 1, order).tolist() == [2]


@by_order
def test_zero_has_its_first_columns(order):
    np.testing.assert_array_equal(columns(np.zeros((2, 3, 5), np.float32), 2, order), [[0, 1]] * 2)


@by_order
def test_matrices_without_rows_have_their_first_columns(order):
    assert columns(np.zeros((0, 5), np.float32), 2, order).tolist() == [0, 1]
    assert columns(np.zeros((0, 3, 5), np.float32), 2, order).shape == (0, 2)


@by_order
def test_columns_with_a_nan_count_as_largest(order):
    x = normal((2, 8, 12))
    finite = np.asarray(columns(x, 2, order))
    x[0, 3, [4, 9]] = np.nan
    assert columns(x, 2, order)[0].tolist() == [4, 9]
    np.testing.assert_array_equal(columns(x, 2, order)[1], finite[1])


# --- what they hold


def spikes(m, n, rng):
    x = np.zeros((m, n))
    x[rng.integers(m, size=n), np.arange(n)] = 10 ** rng.uniform(-15, 15, n)
    return x


KINDS = {
    "normal": lambda m, n, rng: rng.standard_normal((m, n)),
    "zero": lambda m, n, _: np.zeros((m, n)),
    "equal columns": lambda m, n, rng: np.tile(rng.standard_normal((m, 1)), n),
    "nearly equal columns": lambda m, n, rng: 1 + 1e-7 * rng.standard_normal((m, n)),
    "equal energies": lambda m, n, rng: oracles.orthogonal(rng, max(m, n))[:m, :n],
    "spikes": spikes,
    "spikes and plateaus": lambda m, n, rng: np.where(
        np.arange(n) % 2, np.eye(m, n), rng.uniform(0, 2 / m**0.5, (1, n))
    ),
    "huge range": lambda m, n, rng: (
        rng.choice([-1, 0, 1], (m, n)) * 10 ** rng.uniform(-30, 38, (m, n))
    ),
    "one row": lambda m, n, rng: np.eye(m, 1) * rng.standard_normal(n),
}


def assert_holds_its_part(x, rank):
    """Of the energy, rank / n; the norms are sums of m rounded squares."""
    kept = energy(x, np.asarray(columns(x, rank, "l2")))
    slack = 1 - 2 * len(x) * tolerances.eps(np.float32)
    assert kept >= slack * rank / x.shape[1] * energy(x)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from([(1, 2), (5, 5), (100, 2), (7, 12), (1, 9)]),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_by_l2_they_hold_their_part_of_the_energy(kind, shape, seed, data):
    x = KINDS[kind](*shape, np.random.default_rng(seed)).astype(np.float32)
    assert_holds_its_part(x, data.draw(st.integers(1, shape[1])))


# Numbers below the smallest normal one count as zero.
ENTRIES = st.one_of(st.just(0.0), st.floats(2.0**-100, 2.0**127))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(ENTRIES, st.booleans()), min_size=12, max_size=12),
    st.sampled_from([(2, 6), (6, 2), (3, 4), (1, 12)]),
    st.data(),
)
def test_they_do_so_for_any_entries(entries, shape, data):
    x = np.float32([-e if negative else e for e, negative in entries]).reshape(shape)
    assert_holds_its_part(x, data.draw(st.integers(1, shape[1])))


def test_by_l1_they_may_hold_less():
    """A hundred entries 0.05 have norm 5 and energy 1/4; one entry 1 has norm and energy 1."""
    x = np.concatenate([np.full((100, 1), 0.05), np.eye(100, 1)], axis=1, dtype=np.float32)
    by_sum, by_square = columns(x, 1, "l1"), columns(x, 1, "l2")
    assert (by_sum.tolist(), by_square.tolist()) == ([0], [1])
    assert energy(x, np.asarray(by_sum)) / energy(x) == pytest.approx(0.2, rel=1e-6)
    assert energy(x, np.asarray(by_square)) / energy(x) == pytest.approx(0.8, rel=1e-6)


# --- bad input


def test_an_integer_of_numpy_is_a_rank():
    assert top_columns(jnp.ones((3, 4)), np.int64(2)).tolist() == [0, 1]
