"""Householder products: against one reflection after the other, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import tolerances
from helpers import normal

from orthax.linalg import (
    householder_factors,
    householder_product,
    householder_projector,
    householder_vectors,
)

product = jax.jit(householder_product, static_argnames="columns")
vectors = jax.jit(householder_vectors)
projector = jax.jit(householder_projector)
factors = jax.jit(householder_factors, static_argnames="rank")
SHAPES = [(6, 6), (9, 4), (7, 1), (1, 1), (3, 6, 5), (2, 2, 5, 5)]
ROUNDING = 1e-6


def sequential(v):
    """H_1 H_2 ... H_r in float64, one product after the other; a zero column reflects nothing."""
    v = oracles.float64(v)
    if v.ndim > 2:
        return np.stack([sequential(each) for each in v])
    q = np.eye(len(v))
    for column in v.T:
        if column.any():
            column = column / np.abs(column).max()
            q = q @ (np.eye(len(v)) - 2 * np.outer(column, column) / (column @ column))
    return q


def deviation(q):
    """Largest entry of Q^T Q - I."""
    q = oracles.float64(q)
    return np.abs(oracles.mT(q) @ q - np.eye(q.shape[-1])).max()


def orthogonal(n, sign, seed=0):
    """Orthogonal matrix of this determinant."""
    q = oracles.orthogonal(np.random.default_rng(seed), n)
    q[:, 0] *= sign * np.sign(np.linalg.det(q))
    return q.astype(np.float32)


def q_factor(x):
    """Q of the decomposition whose R has a positive diagonal."""
    q, r = np.linalg.qr(oracles.float64(x))
    return q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


def rotation(n, i, j, angle):
    q = np.eye(n)
    q[[i, j], [i, j]] = np.cos(angle)
    q[j, i], q[i, j] = np.sin(angle), -np.sin(angle)
    return q


# --- the product


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_product_of_the_reflections_in_their_order(shape):
    v = normal(shape)
    q = product(v)
    assert q.shape == (*shape[:-1], shape[-2])
    assert q.dtype == np.float32
    np.testing.assert_allclose(q, sequential(v), atol=ROUNDING)
    assert deviation(q) < ROUNDING


def test_the_first_reflection_is_the_leftmost():
    """So its vector is mapped by the others first."""
    v = normal((5, 2))
    first, second = sequential(v[:, :1]), sequential(v[:, 1:])
    np.testing.assert_allclose(product(v), first @ second, atol=ROUNDING)
    assert np.abs(first @ second - second @ first).max() > 0.1


@pytest.mark.parametrize("columns", [1, 3, 5, 9, np.int64(4)])
def test_it_computes_the_first_columns_alone(columns):
    v = normal((9, 4))
    q = product(v, columns=columns)
    assert q.shape == (9, columns)
    np.testing.assert_allclose(q, sequential(v)[:, :columns], atol=ROUNDING)
    assert deviation(q) < ROUNDING


def test_double_precision_is_kept():
    with tolerances.double_precision():
        v = normal((3, 9, 7), dtype=np.float64)
        q = product(jnp.asarray(v))
        assert q.dtype == np.float64
        np.testing.assert_allclose(q, sequential(v), atol=3e-15)
        assert deviation(q) < 3e-15


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_computed_in_float32(dtype):
    v = jnp.asarray(normal((9, 7)), dtype)
    q = product(v)
    assert q.dtype == dtype
    np.testing.assert_allclose(
        oracles.float64(q), sequential(v), atol=tolerances.eps(dtype) / 4 + ROUNDING
    )


def test_zero_columns_reflect_nothing():
    v = normal((6, 5))
    v[:, [0, 3]] = 0
    np.testing.assert_allclose(product(v), sequential(v[:, [1, 2, 4]]), atol=ROUNDING)
    np.testing.assert_array_equal(product(np.zeros((4, 3), np.float32)), np.eye(4))


def test_a_reflection_twice_is_none():
    v = normal((6, 1))
    others = normal((6, 2), seed=1)
    twice = product(np.concatenate([others[:, :1], v, v, others[:, 1:]], axis=1))
    np.testing.assert_allclose(twice, sequential(others), atol=ROUNDING)


@pytest.mark.parametrize("count", [3, 32])
def test_the_same_direction_many_times_is_once_or_none(count):
    v = normal((32, 1))
    signs = np.random.default_rng(1).choice([-1, 1], count)
    q = product((v * signs).astype(np.float32))
    # Errors of a reflection that is undone again and again add up.
    bound = 4 * count * tolerances.eps(np.float32)
    np.testing.assert_allclose(q, sequential(v) if count % 2 else np.eye(32), atol=bound)
    assert deviation(q) < bound


@pytest.mark.parametrize("power", [-100, -66, 20, 59, 100, 126])
def test_lengths_do_not_matter(power):
    v = normal((3, 9, 7))
    expected = product(v)
    np.testing.assert_allclose(product(np.ldexp(v, power)), expected, atol=1e-7)
    mixed = np.ldexp(v, np.array([power, 0, -power // 2, 1, 3, 0, power]))
    np.testing.assert_allclose(product(mixed), expected, atol=1e-7)
    np.testing.assert_allclose(product(-v), expected, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-37, 1e37])
def test_a_column_with_one_large_entry_overflows_nowhere(scale):
    v = np.zeros((4, 2), np.float32)
    v[:, 0], v[2, 1] = scale, -scale
    np.testing.assert_allclose(product(v), sequential(v), atol=ROUNDING)


@pytest.mark.parametrize("shape", [(6, 6), (6, 5), (3, 7, 4)], ids=str)
def test_the_determinant_counts_the_reflections(shape):
    q = oracles.float64(product(normal(shape)))
    np.testing.assert_allclose(np.linalg.det(q), (-1.0) ** shape[-1], rtol=1e-5)
    with_zero = normal(shape)
    with_zero[..., 1] = 0
    q = oracles.float64(product(with_zero))
    np.testing.assert_allclose(np.linalg.det(q), (-1.0) ** (shape[-1] - 1), rtol=1e-5)


def test_what_is_orthogonal_to_all_directions_stays():
    v = normal((9, 4))
    across = np.linalg.svd(oracles.float64(v))[0][:, 4:]
    np.testing.assert_allclose(oracles.float64(product(v)) @ across, across, atol=ROUNDING)


def test_five_hundred_random_reflections_are_orthogonal_to_rounding():
    assert deviation(product(normal((512, 512)))) < 1e-6


def test_a_thousand_steps_of_adam_leave_it_orthogonal():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((12, 16)), jnp.float32) for _ in range(2))
    optimizer = optax.adam(0.05)

    @jax.jit
    def train(v):
        def loss(v):
            return jnp.sum((a @ householder_product(v) - b) ** 2)

        def step(carry, _):
            v, state = carry
            value, slopes = jax.value_and_grad(loss)(v)
            updates, state = optimizer.update(slopes, state)
            return (optax.apply_updates(v, updates), state), value

        (v, _), losses = jax.lax.scan(step, (v, optimizer.init(v)), length=1000)
        return householder_product(v), losses

    q, losses = train(normal((16, 16), seed=1))
    assert deviation(q) < 1e-6
    # The least over orthogonal matrices, of either determinant.
    s = np.linalg.svd(oracles.float64(a).T @ oracles.float64(b), compute_uv=False)
    squares = np.sum(np.square(a)) + np.sum(np.square(b))
    least = squares - 2 * s.sum()
    assert losses[-1] < least + 0.02 * (losses[0] - least)
    assert losses[-1] > least * (1 - 1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 2), (4, 0), (0, 0)], ids=str)
def test_without_reflections_it_is_the_identity(shape):
    expected = np.broadcast_to(np.eye(shape[-2]), (*shape[:-1], shape[-2]))
    np.testing.assert_array_equal(product(jnp.zeros(shape)), expected)


def test_a_nan_spoils_its_own_matrix():
    v = normal((2, 6, 5))
    expected = np.asarray(product(v))
    v[0, 2, 3] = np.nan
    actual = np.asarray(product(v))
    assert np.isnan(actual[0]).any()
    np.testing.assert_allclose(actual[1], expected[1], atol=1e-7)


# --- slopes


def finite_difference(function, x, direction, step=1e-5):
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


@pytest.mark.parametrize("columns", [None, 3])
def test_the_gradient_of_the_product_agrees_with_differences(columns):
    with tolerances.double_precision():
        v, direction = (normal((2, 6, 4), np.float64, seed=seed) for seed in (0, 1))
        weights = normal((2, 6, columns or 6), np.float64, seed=2)

        def loss(v):
            return jnp.sum(weights * householder_product(v, columns))

        slopes = jax.jit(jax.grad(loss))(jnp.asarray(v))
        expected = finite_difference(jax.jit(loss), v, direction)
        assert np.sum(slopes * direction) == pytest.approx(float(expected), rel=1e-7)
        assert np.abs(slopes).max() > 0.1


def test_the_gradient_is_across_each_direction_and_falls_with_its_length():
    v, weights = normal((6, 4)), normal((6, 6), seed=1)
    slopes_of = jax.jit(jax.grad(lambda v: jnp.sum(weights * householder_product(v))))
    slopes = np.asarray(slopes_of(v))
    np.testing.assert_allclose((slopes * v).sum(0), 0, atol=1e-5)
    np.testing.assert_allclose(slopes_of(8 * v), slopes / 8, rtol=1e-4, atol=1e-6)


def test_at_a_zero_column_the_gradient_is_zero_and_that_of_the_others_is_as_without_it():
    v, weights = normal((6, 4)), normal((6, 6), seed=1)
    v[:, 2] = 0
    slopes_of = jax.jit(jax.grad(lambda v: jnp.sum(weights * householder_product(v))))
    slopes = np.asarray(slopes_of(v))
    assert not slopes[:, 2].any()
    rest = [0, 1, 3]
    np.testing.assert_allclose(slopes[:, rest], slopes_of(v[:, rest]), atol=1e-5)
    assert not np.asarray(slopes_of(np.zeros((6, 4), np.float32))).any()


def test_the_gradient_of_the_projector_agrees_with_differences():
    with tolerances.double_precision():
        u, du = (normal((6, 2), np.float64, seed=seed) for seed in (0, 1))
        v, dv = (normal((5, 2), np.float64, seed=seed) for seed in (2, 3))
        weights = normal((6, 5), np.float64, seed=4)

        def loss(u, v):
            return jnp.sum(weights * householder_projector(u, v))

        slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(u), jnp.asarray(v))
        step = 1e-5
        compiled = jax.jit(loss)
        expected = compiled(u + step * du, v + step * dv) - compiled(u - step * du, v - step * dv)
        actual = np.sum(slopes[0] * du) + np.sum(slopes[1] * dv)
        assert actual == pytest.approx(float(expected) / (2 * step), rel=1e-7)


# --- vectors


def assert_round_trip(q, atol=ROUNDING):
    v = np.asarray(vectors(q))
    assert v.shape == q.shape
    lengths = np.linalg.norm(v, axis=-2)
    assert ((np.abs(lengths - 1) < 1e-6) | (lengths == 0)).all()
    assert not np.triu(v, 1).any()
    np.testing.assert_allclose(product(v, columns=q.shape[-1]), q, atol=atol, rtol=0)
    return v


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_every_orthogonal_matrix_comes_back(n, sign):
    for seed in range(4):
        v = assert_round_trip(orthogonal(n, sign, seed))
        count = np.count_nonzero(v.any(axis=0))
        assert (-1) ** count == sign


@pytest.mark.parametrize("shape", [(9, 4), (9, 1), (3, 7, 7), (2, 2, 7, 3), (64, 64)], ids=str)
def test_orthonormal_columns_come_back(shape):
    assert_round_trip(q_factor(normal(shape)).astype(np.float32))


def test_the_identity_takes_no_reflection():
    assert not np.asarray(vectors(np.eye(6, dtype=np.float32))).any()
    assert not np.asarray(vectors(np.eye(9, 4, dtype=np.float32))).any()


def test_minus_the_identity_takes_all():
    v = assert_round_trip(-np.eye(6, dtype=np.float32))
    np.testing.assert_array_equal(np.abs(v), np.eye(6))


@pytest.mark.parametrize("angle", [1.0, 1e-2, 1e-4, 1e-7, 1e-12, -1e-4, -1e-7, np.pi - 1e-4])
def test_a_rotation_by_a_small_angle_loses_nothing(angle):
    """1 - cos is below the rounding of 1, and the angle must come back all the same."""
    for i, j in [(0, 1), (1, 3)]:
        q = rotation(4, i, j, angle).astype(np.float32)
        assert_round_trip(q)
        back = np.asarray(product(vectors(q)))
        np.testing.assert_allclose(back[[j, i], [i, j]], q[[j, i], [i, j]], rtol=1e-6)


def test_what_is_near_the_identity_comes_back():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 6))
    for size in (1e-2, 1e-4, 1e-7):
        assert_round_trip(q_factor(np.eye(6) + size * (x - x.T)).astype(np.float32), 3e-6)


def test_permutations_come_back():
    rng = np.random.default_rng(0)
    stack = np.stack([np.eye(6)[rng.permutation(6)] for _ in range(50)])
    assert_round_trip((stack * rng.choice([-1, 1], (50, 1, 6))).astype(np.float32))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (3, 7, 5)], ids=str)
def test_other_columns_give_their_q_factor_with_a_positive_diagonal_of_r(shape, scale):
    x = (scale * (normal(shape) + 2 * np.eye(*shape[-2:]))).astype(np.float32)
    condition = np.linalg.cond(oracles.float64(x)).max()
    q = product(vectors(x), columns=shape[-1])
    np.testing.assert_allclose(q, q_factor(x), atol=2e-7 * condition + ROUNDING)
    r = oracles.mT(oracles.float64(q)) @ oracles.float64(x) / scale
    assert (np.diagonal(r, axis1=-2, axis2=-1) > 0).all()
    np.testing.assert_allclose(np.tril(r, -1), 0, atol=5e-6)


def test_columns_of_very_different_length_give_their_q_factor():
    x = normal((9, 4))
    scaled = x * np.array([1e-12, 1, 1e12, 1e-3], np.float32)
    q = product(vectors(scaled), columns=4)
    np.testing.assert_allclose(q, q_factor(x), atol=3e-6)


def test_dependent_and_zero_columns_still_give_orthonormal_ones():
    x = normal((8, 2)) @ normal((2, 5))
    x[:, 1] = 0
    q = product(vectors(x), columns=5)
    assert deviation(q) < 2e-6
    np.testing.assert_array_equal(product(np.zeros((4, 2), np.float32), columns=2), np.eye(4, 2))


def test_vectors_keep_the_dtype():
    q = orthogonal(6, 1)
    for dtype in ("float16", "bfloat16"):
        v = vectors(jnp.asarray(q, dtype))
        assert v.dtype == dtype
        back = oracles.float64(product(v))
        assert np.abs(back - q).max() < 8 * tolerances.eps(dtype)
    with tolerances.double_precision():
        q = oracles.orthogonal(np.random.default_rng(0), 20)
        v = vectors(jnp.asarray(q))
        assert v.dtype == np.float64
        np.testing.assert_allclose(product(v), q, atol=3e-15)


@pytest.mark.parametrize("shape", [(6, 6), (9, 4)], ids=str)
def test_lapacks_product_of_the_same_vectors_is_the_same(shape):
    """Its vectors have ones on the diagonal and their factors 2 / |v|^2 apart."""
    v = oracles.float64(vectors(q_factor(normal(shape)).astype(np.float32)))
    zero = ~v.any(axis=0)
    v = v / np.where(zero, 1, np.diagonal(v)) + zero * np.eye(*shape)
    taus = np.where(zero, 0, 2 / (v**2).sum(axis=0))
    expected = jax.lax.linalg.householder_product(
        jnp.asarray(v, jnp.float32), jnp.asarray(taus, jnp.float32)
    )
    actual = product((v * (taus > 0)).astype(np.float32), columns=shape[1])
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_slices_of_a_batch_are_taken_apart_each_by_itself():
    x = np.stack([np.eye(6), orthogonal(6, 1), orthogonal(6, -1), 1e6 * normal((6, 6))])
    x = x.astype(np.float32)
    np.testing.assert_allclose(vectors(x), np.stack([vectors(y) for y in x]), atol=1e-6)


# --- projectors


def nearest_projector(w, k):
    u, _, vh = np.linalg.svd(oracles.float64(w))
    return u[..., :, :k] @ vh[..., :k, :]


@pytest.mark.parametrize(("m", "n", "k"), [(7, 5, 2), (5, 7, 5), (6, 6, 6), (4, 4, 1)])
def test_the_projector_has_k_singular_values_of_one_and_no_others(m, n, k):
    u, v = normal((3, m, k)), normal((3, n, k), seed=1)
    p = projector(u, v)
    assert p.shape == (3, m, n)
    expected = sequential(u)[..., :k] @ oracles.mT(sequential(v)[..., :k])
    np.testing.assert_allclose(p, expected, atol=ROUNDING)
    s = np.linalg.svd(oracles.float64(p), compute_uv=False)
    np.testing.assert_allclose(s, np.broadcast_to(np.arange(min(m, n)) < k, s.shape), atol=ROUNDING)


@pytest.mark.parametrize(
    ("shape", "rank"), [((7, 5), 1), ((7, 5), None), ((6, 6), None), ((3, 5, 7), 3)], ids=str
)
def test_the_factors_of_a_matrix_give_its_leading_singular_vectors(shape, rank):
    w = normal(shape)
    k = rank or min(shape[-2:])
    u, v = factors(w, rank)
    assert u.shape == (*shape[:-1], k)
    assert v.shape == (*shape[:-2], shape[-1], k)
    assert u.dtype == v.dtype == np.float32
    np.testing.assert_allclose(projector(u, v), nearest_projector(w, k), atol=5e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_the_scale_of_the_matrix_does_not_matter(scale):
    w = normal((7, 5))
    p = projector(*factors((scale * w).astype(np.float32), 2))
    np.testing.assert_allclose(p, nearest_projector(w, 2), atol=5e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_no_other_projector_is_nearer(rank):
    """Neither among random ones nor among those close by."""
    w = normal((7, 5))
    u, v = factors(w, rank)
    least = np.linalg.norm(w - oracles.float64(projector(u, v)))
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.uniform(-3, 2, (2000, 1, 1))
    us = oracles.float64(u) + sizes * rng.standard_normal((2000, *u.shape))
    vs = oracles.float64(v) + sizes * rng.standard_normal((2000, *v.shape))
    others = oracles.float64(projector(us.astype(np.float32), vs.astype(np.float32)))
    distances = np.linalg.norm(w - others, axis=(-2, -1))
    assert distances.min() > least * (1 - 1e-6)
    assert np.median(distances) > 1.05 * least


def test_the_factors_of_a_projector_give_it_back():
    p = np.asarray(projector(normal((7, 3)), normal((5, 3), seed=1)))
    np.testing.assert_allclose(projector(*factors(p, 3)), p, atol=3e-6)
    np.testing.assert_allclose(projector(*factors(3 * p, 3)), p, atol=3e-6)


@pytest.mark.parametrize("w", [np.zeros((5, 4)), np.ones((5, 4)), np.eye(5, 4)])
def test_matrices_with_equal_or_no_singular_values_have_some_nearest_projector(w):
    u, v = factors(w.astype(np.float32), 2)
    s = np.linalg.svd(oracles.float64(projector(u, v)), compute_uv=False)
    np.testing.assert_allclose(s, [1, 1, 0, 0], atol=ROUNDING)


def test_factors_and_projectors_keep_the_dtype():
    w = jnp.asarray(normal((6, 5)), jnp.bfloat16)
    u, v = factors(w, 2)
    assert u.dtype == v.dtype == projector(u, v).dtype == jnp.bfloat16
    error = np.abs(oracles.float64(projector(u, v)) - nearest_projector(w, 2)).max()
    assert error < 8 * tolerances.eps(jnp.bfloat16)
