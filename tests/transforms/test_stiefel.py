"""Constraints that hold exactly: on Stiefel manifolds, on spheres of neurons and of matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import tolerances
from helpers import normal

import orthax
from orthax.linalg import polar_svd

SHAPES = {
    "square": (8, 8),
    "tall": (12, 5),
    "wide": (5, 12),
    "batch": (2, 3, 8, 6),
    "row": (1, 6),
}
ROUNDING = 1e-6


def orthogonal(shape, seed=0, dtype=np.float32):
    return oracles.polar(normal(shape, dtype, seed=seed)).astype(dtype)


def tree_of(function, seed=0, **options):
    return {
        name: function(shape, seed=seed + i, **options)
        for i, (name, shape) in enumerate(SHAPES.items())
    }


KEEP_ORTHOGONAL, PROJECT_TANGENT = orthax.keep_orthogonal(), orthax.project_tangent()
KEEP_UNIT_NEURONS, KEEP_NORM = orthax.keep_unit_neurons(), orthax.keep_norm()


@functools.cache
def compiled(transformation):
    """So that tests of one transformation and one shape compile once."""
    return jax.jit(transformation.update)


def apply(transformation, updates, params):
    return compiled(transformation)(updates, transformation.init(params), params)[0]


def moved(transformation, updates, params):
    """Params after the update, summed in float64."""
    updates = apply(transformation, updates, params)
    return jax.tree.map(lambda w, u: oracles.float64(w) + oracles.float64(u), params, updates)


def adjoint(x):
    return oracles.mT(x).conj()


def deviation(w):
    """Spectral norm of the Gram matrix of the shorter side less the identity, the largest."""
    w = oracles.float64(w)
    w = w if w.shape[-2] >= w.shape[-1] else oracles.mT(w)
    return np.linalg.norm(adjoint(w) @ w - np.eye(w.shape[-1]), 2, (-2, -1)).max()


def path_of(optimizer, params, gradients, steps):
    """Params after each of so many updates; `gradients(params, time)`."""

    @jax.jit
    def run(params):
        def step(carry, time):
            params, state = carry
            updates, state = optimizer.update(gradients(params, time), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(1.0, steps + 1))[1]

    return run(jax.tree.map(jnp.asarray, params))


def wandering(params, time):
    """Gradients without an aim: each entry a wave of its own frequency."""
    return jax.tree.map(lambda w: jnp.sin(time * normal(w.shape, seed=7)).astype(w.dtype), params)


# --- keep_orthogonal


@pytest.mark.parametrize("size", [1e-3, 0.1, 10.0])
def test_the_update_ends_at_the_orthogonal_matrix_nearest_to_its_aim(size):
    params = tree_of(orthogonal)
    updates = jax.tree.map(lambda u: np.float32(size) * u, tree_of(normal, 10))
    for name, w in moved(KEEP_ORTHOGONAL, updates, params).items():
        aim = oracles.float64(params[name]) + updates[name]
        smallest = np.linalg.svd(aim, compute_uv=False).min()
        np.testing.assert_allclose(
            w, oracles.polar(aim), atol=3e-7 * max(1, size / smallest) + ROUNDING, err_msg=name
        )
        assert deviation(w) < 2e-6, name


def test_an_update_of_16_bits_is_rounded_once():
    """The constraint then holds to the rounding of the update, not to that of the weights."""
    w, u = orthogonal((12, 5)), jnp.asarray(0.05 * normal((12, 5), seed=1), jnp.bfloat16)
    exact = oracles.polar(oracles.float64(w) + oracles.float64(u)) - oracles.float64(w)
    actual = oracles.float64(apply(KEEP_ORTHOGONAL, u, w))
    np.testing.assert_allclose(
        actual, exact, rtol=tolerances.eps(jnp.bfloat16) / 2 * 1.01, atol=1e-6
    )
    assert apply(KEEP_ORTHOGONAL, u, w).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.bfloat16])
def test_params_of_16_bits_are_orthogonal_to_their_rounding(dtype):
    w = jnp.asarray(orthogonal((12, 12)), dtype)
    w = path_of(optax.chain(optax.sgd(0.05), orthax.keep_orthogonal()), w, wandering, 50)
    assert w.dtype == dtype
    # Entries of an orthogonal matrix and updates are rounded to half of eps.
    assert deviation(w[-1]) < 2 * tolerances.eps(dtype)


def test_float32_updates_of_bfloat16_params_make_up_for_their_rounding():
    w, u = jnp.asarray(orthogonal((12, 5)), jnp.bfloat16), 0.1 * normal((12, 5), seed=1)
    after = moved(KEEP_ORTHOGONAL, u, w)
    assert deviation(after) < 2e-6
    np.testing.assert_allclose(after, oracles.polar(oracles.float64(w) + u), atol=ROUNDING)


def test_complex_matrices_are_kept_unitary():
    params = [orthogonal(shape, dtype=np.complex64) for shape in ((8, 8), (3, 5, 7))]
    updates = [0.3 * normal(w.shape, np.complex64, seed=1) for w in params]
    for w, u, after in zip(params, updates, moved(KEEP_ORTHOGONAL, updates, params), strict=True):
        np.testing.assert_allclose(after, oracles.polar(oracles.float64(w) + u), atol=ROUNDING)
        assert deviation(after) < 2e-6


def test_params_that_are_not_orthogonal_are_so_after_the_first_update():
    params = jax.tree.map(lambda w: np.float32(5) * w, tree_of(normal))
    updates = tree_of(normal, 10)
    for name, w in moved(KEEP_ORTHOGONAL, updates, params).items():
        aim = oracles.float64(params[name]) + updates[name]
        # The update is as large as the weights, of whose size its rounding is.
        np.testing.assert_allclose(w, oracles.polar(aim), atol=5e-6, err_msg=name)


def test_without_an_aim_orthogonal_params_stay():
    params = tree_of(orthogonal)
    for u in jax.tree.leaves(apply(KEEP_ORTHOGONAL, jax.tree.map(np.zeros_like, params), params)):
        assert np.abs(u).max() < 3e-7


@pytest.mark.parametrize(
    ("optimizer", "shapes"),
    [
        (optax.adam(0.03), [(64, 64), (32, 96)]),
        (orthax.muon(0.1), [(96, 32)]),
        (optax.sgd(0.05, momentum=0.9), [(2, 96, 32)]),
    ],
    ids=["adam", "muon", "sgd"],
)
def test_it_holds_after_every_update_of_any_optimizer(optimizer, shapes):
    params = [orthogonal(shape) for shape in shapes]
    path = path_of(optax.chain(optimizer, KEEP_ORTHOGONAL), params, wandering, 300)
    for w, start in zip(path, params, strict=True):
        assert max(deviation(w[9::10]), deviation(w[:5])) < 1e-5
        assert np.linalg.norm(w[-1] - start) > 1  # it has moved


def test_it_does_not_drift_in_ten_thousand_updates():
    chain = optax.chain(optax.sgd(0.03), KEEP_ORTHOGONAL)
    path = path_of(chain, orthogonal((32, 32)), wandering, 10_000)
    early, late = deviation(path[:100]), deviation(path[-100:])
    assert deviation(path[::100]) < 3e-6
    assert late < 2 * early


@pytest.mark.parametrize(
    ("shape", "tangent"), [((12, 5), False), ((5, 12), True)], ids=["tall", "wide, tangent"]
)
def test_the_orthogonal_matrix_nearest_to_a_given_one_is_found(shape, tangent):
    """Minimise |W - M|^2: orthogonal Procrustes, solved by the polar factor of M."""
    target = normal(shape, seed=3)
    first = [PROJECT_TANGENT] if tangent else []
    chain = optax.chain(*first, optax.sgd(0.05, momentum=0.5), KEEP_ORTHOGONAL)
    path = path_of(chain, orthogonal(shape), lambda w, _: 2 * (w - target), 200)
    np.testing.assert_allclose(path[-1], oracles.polar(target), atol=1e-5)


def test_procrustes_on_rotations_is_solved():
    """Minimise |A W - B|^2 over orthogonal W: the polar factor of A^T B."""
    a, w = normal((20, 6), seed=4) / np.float32(20**0.5), orthogonal((6, 6))
    solution = orthogonal((6, 6), 1)
    solution[:, 0] *= np.sign(np.linalg.det(solution) * np.linalg.det(w))
    b = a @ solution + np.float32(0.1) * normal((20, 6), seed=5) / np.float32(20**0.5)
    expected = oracles.polar(oracles.float64(a).T @ b)
    chain = optax.chain(PROJECT_TANGENT, optax.sgd(0.3, momentum=0.5), orthax.keep_orthogonal())
    path = path_of(chain, w, lambda w, _: a.T @ (a @ w - b), 400)
    np.testing.assert_allclose(path[-1], expected, atol=1e-5)


def test_principal_components_are_found():
    """Maximise tr(W^T C W) over orthonormal columns: the leading eigenvectors' space."""
    rng = np.random.default_rng(0)
    basis = oracles.orthogonal(rng, 12)
    covariance = (basis * np.r_[3, 2.5, 2, np.linspace(1, 0.1, 9)]) @ basis.T
    covariance = covariance.astype(np.float32)
    chain = optax.chain(PROJECT_TANGENT, optax.sgd(0.2), KEEP_ORTHOGONAL)
    path = path_of(chain, orthogonal((12, 3)), lambda w, _: -covariance @ w, 200)
    w = oracles.float64(path[-1])
    np.testing.assert_allclose(w @ w.T, basis[:, :3] @ basis[:, :3].T, atol=1e-5)


def test_another_retraction_takes_its_place():
    w, u = orthogonal((12, 5)), normal((12, 5), seed=1)
    by_svd = apply(orthax.keep_orthogonal(polar_svd), u, w)
    np.testing.assert_allclose(by_svd, apply(KEEP_ORTHOGONAL, u, w), atol=2e-6)
    halved = moved(orthax.keep_orthogonal(lambda x: x / 2), u, w)
    np.testing.assert_allclose(halved, (w + u) / 2, atol=ROUNDING)


def test_it_wraps_in_a_mask_and_in_views():
    kernel, attention, bias = orthogonal((8, 8)), orthogonal((8, 8), 1), normal(8)
    params = {"kernel": kernel, "query": attention.reshape(8, 2, 4), "bias": bias}
    updates = jax.tree.map(lambda w: np.float32(0.1) * normal(w.shape, seed=5), params)
    views = optax.contrib.MuonDimensionNumbers
    rules = orthax.PathRules(((r"kernel", views(0, 1)), (r"query", views((0,), (1, 2)))))
    matrices = orthax.as_matrices(orthax.keep_orthogonal(), rules)
    mask = {"kernel": True, "query": True, "bias": False}
    after = moved(optax.masked(matrices, mask), updates, params)
    np.testing.assert_allclose(
        after["kernel"], oracles.polar(kernel + updates["kernel"]), atol=1e-6
    )
    aim = (params["query"] + updates["query"]).reshape(8, 8)
    np.testing.assert_allclose(after["query"].reshape(8, 8), oracles.polar(aim), atol=1e-6)
    np.testing.assert_allclose(after["bias"], bias + updates["bias"], atol=1e-6)


# --- project_tangent


def tangent(w, g):
    """G - W sym(W^H G) in float64, of the transposes where W is wide."""
    w, g = oracles.float64(w), oracles.float64(g)
    if w.shape[-2] < w.shape[-1]:
        return oracles.mT(tangent(oracles.mT(w), oracles.mT(g)))
    product = adjoint(w) @ g
    return g - w @ (product + adjoint(product)) / 2


def project(g, w):
    return apply(PROJECT_TANGENT, g, w)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_the_projection_is_the_formula(dtype, scale):
    params = tree_of(orthogonal, dtype=dtype)
    gradients = jax.tree.map(lambda g: np.float32(scale) * g, tree_of(normal, 10, dtype=dtype))
    for name, u in project(gradients, params).items():
        assert (u.shape, u.dtype) == (SHAPES[name], dtype)
        expected = tangent(params[name], gradients[name])
        np.testing.assert_allclose(u, expected, rtol=0, atol=2e-6 * scale, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_it_is_tangent(dtype):
    """The Gram matrix does not change to first order: W^H U is skew."""
    params, gradients = tree_of(orthogonal, dtype=dtype), tree_of(normal, 10, dtype=dtype)
    for name, u in project(gradients, params).items():
        w, u = oracles.float64(params[name]), oracles.float64(u)
        if w.shape[-2] < w.shape[-1]:
            w, u = oracles.mT(w), oracles.mT(u)
        product = adjoint(w) @ u
        np.testing.assert_allclose(product + adjoint(product), 0, atol=3e-6, err_msg=name)
        assert np.abs(u).max() > 0.1 or w.shape[-1] == 1


def test_it_is_an_orthogonal_projection():
    """Once is twice, and <P a, b> = <a, P b>."""
    params, a, b = tree_of(orthogonal), tree_of(normal, 10), tree_of(normal, 20)
    pa, pb = project(a, params), project(b, params)
    twice = project(pa, params)
    for name in SHAPES:
        np.testing.assert_allclose(twice[name], pa[name], atol=2e-6, err_msg=name)
        left, right = np.sum(pa[name] * b[name]), np.sum(a[name] * pb[name])
        np.testing.assert_allclose(left, right, atol=2e-5, err_msg=name)
        assert np.linalg.norm(pa[name]) < np.linalg.norm(a[name])


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_tangent_vectors_stay_and_normal_ones_go(dtype):
    w = orthogonal((12, 5), dtype=dtype)
    across = np.linalg.svd(oracles.float64(w))[0][:, 5:]
    s, k = normal((5, 5), dtype, seed=1), normal((7, 5), dtype, seed=2)
    along = (oracles.float64(w) @ (s - adjoint(s)) + across @ k).astype(dtype)
    np.testing.assert_allclose(project(along, w), along, atol=5e-6)
    normal_to = (oracles.float64(w) @ (s + adjoint(s))).astype(dtype)
    np.testing.assert_allclose(project(normal_to, w), 0, atol=5e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_wide_is_the_transpose_of_tall(dtype):
    w, g = orthogonal((3, 12, 5), dtype=dtype), normal((3, 12, 5), dtype, seed=1)
    wide = project(oracles.mT(g), oracles.mT(w))
    np.testing.assert_allclose(wide, oracles.mT(project(g, w)), atol=1e-6)


def test_what_it_takes_away_would_be_undone():
    """A small step along the gradient and one along its projection end at the same place."""
    w, g = orthogonal((12, 5)), normal((12, 5), seed=1)
    with tolerances.double_precision():
        w, g = jnp.asarray(oracles.polar(w)), jnp.asarray(g, jnp.float64)
        size = 1e-4
        straight = moved(KEEP_ORTHOGONAL, -size * g, w)
        along = moved(KEEP_ORTHOGONAL, -size * project(g, w), w)
    assert np.abs(straight - along).max() < 100 * size**2
    assert np.abs(straight - np.asarray(w)).max() > 0.5 * size


def test_updates_keep_their_dtype_whatever_that_of_the_params():
    w, g = orthogonal((12, 5)), normal((12, 5), seed=1)
    for dtype in (jnp.bfloat16, jnp.float16):
        u = project(jnp.asarray(g, dtype), w)
        assert u.dtype == dtype
        expected = tangent(w, jnp.asarray(g, dtype))
        np.testing.assert_allclose(oracles.float64(u), expected, atol=2 * tolerances.eps(dtype))
        u = project(g, jnp.asarray(w, dtype))
        assert u.dtype == np.float32
        np.testing.assert_allclose(u, tangent(jnp.asarray(w, dtype), g), atol=3e-6)


# --- keep_unit_neurons


def unit_neurons(x, radius=1.0, axis=-2):
    x = oracles.float64(x)
    return radius * x / np.sqrt((np.abs(x) ** 2).sum(axis, keepdims=True))


@pytest.mark.parametrize(
    ("axis", "along", "radius"), [("output", -2, 1.0), ("input", -1, 1.0), ("input", -1, 7)]
)
def test_every_neuron_ends_at_the_same_length(axis, along, radius):
    params, updates = tree_of(normal), tree_of(normal, 10)
    transformation = orthax.keep_unit_neurons(radius, axis)
    for name, w in moved(transformation, updates, params).items():
        aim = oracles.float64(params[name]) + updates[name]
        expected = unit_neurons(aim, radius, along)
        np.testing.assert_allclose(w, expected, atol=1e-6 * max(1, radius), err_msg=name)


def test_by_default_columns_have_length_one():
    w, u = normal((7, 5)), normal((7, 5), seed=1)
    after = moved(KEEP_UNIT_NEURONS, u, w)
    np.testing.assert_allclose(np.linalg.norm(after, axis=0), 1, atol=1e-6)
    np.testing.assert_allclose(after, unit_neurons(w + u), atol=1e-6)


def test_a_neuron_that_would_be_zero_keeps_its_direction():
    w, u = normal((7, 4)), normal((7, 4), seed=1)
    u[:, 2] = -w[:, 2]
    after = moved(orthax.keep_unit_neurons(3.0), u, w)
    np.testing.assert_allclose(after[:, 2], unit_neurons(w, 3.0)[:, 2], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(after, axis=0), 3, rtol=1e-6)
    np.testing.assert_allclose(moved(KEEP_UNIT_NEURONS, u, w), after / 3, atol=1e-6)
    rows = moved(orthax.keep_unit_neurons(3.0, "input"), u.T.copy(), w.T.copy())
    np.testing.assert_allclose(rows, after.T, atol=1e-6)


def test_a_neuron_without_weights_stays_so_until_it_gets_some():
    w, u = normal((7, 5)), normal((7, 5), seed=1)
    w[:, 1] = 0
    after = moved(KEEP_UNIT_NEURONS, u, w)
    np.testing.assert_allclose(after, unit_neurons(w + u), atol=1e-6)
    u[:, 1] = 0
    after = moved(KEEP_UNIT_NEURONS, u, w)
    assert not after[:, 1].any()
    assert np.isfinite(after).all()


def test_tiny_neurons_beside_huge_ones_end_at_the_same_length():
    scales = np.array([1e-30, 1e-20, 1, 1e18, 1e30], np.float32)
    w, u = normal((7, 5)) * scales, normal((7, 5), seed=1) * scales
    updates = np.asarray(apply(KEEP_UNIT_NEURONS, u, w))
    assert np.isfinite(updates).all()
    expected = unit_neurons(oracles.float64(w) + u) - oracles.float64(w)
    # Of the update: what a unit length is rounded to when a huge one is taken off it.
    np.testing.assert_allclose(updates, expected, rtol=1e-6, atol=3e-7)


def test_complex_neurons_keep_their_phase():
    w, u = normal((7, 4), np.complex64), normal((7, 4), np.complex64, seed=1)
    after = moved(orthax.keep_unit_neurons(2.0), u, w)
    np.testing.assert_allclose(after, unit_neurons(w + u, 2.0), atol=2e-6)


def test_neurons_do_not_drift():
    chain = optax.chain(optax.sgd(0.01), orthax.keep_unit_neurons(2.0))
    path = path_of(chain, normal((8, 6)), wandering, 2000)
    np.testing.assert_allclose(np.linalg.norm(oracles.float64(path), axis=-2), 2, rtol=1e-6)


# --- keep_norm


def frobenius(x):
    return np.sqrt((np.abs(oracles.float64(x)) ** 2).sum((-2, -1), keepdims=True))


def at_norm(x, radius):
    return radius * oracles.float64(x) / frobenius(x)


@pytest.mark.parametrize("radius", [None, 3.0])
def test_every_matrix_ends_at_the_norm(radius):
    scales = dict(zip(SHAPES, np.logspace(-3, 3, len(SHAPES)).astype(np.float32), strict=True))
    params = {name: scales[name] * w for name, w in tree_of(normal).items()}
    updates = {name: scales[name] * u for name, u in tree_of(normal, 10).items()}
    for name, w in moved(orthax.keep_norm(radius), updates, params).items():
        aim = oracles.float64(params[name]) + updates[name]
        expected = at_norm(aim, frobenius(params[name]) if radius is None else radius)
        largest = max(np.abs(params[name]).max(), np.abs(expected).max())
        np.testing.assert_allclose(w, expected, rtol=0, atol=5e-7 * largest, err_msg=name)


def test_hyperball_is_a_relative_step_that_is_pulled_back():
    """Hyperball (MuonH): u' = u r / |u|, then r (W - lr u') / |W - lr u'|."""
    w, u, rate = normal((8, 6)), normal((8, 6), seed=1), 0.05
    chain = optax.chain(
        optax.scale_by_trust_ratio(), optax.scale_by_learning_rate(rate), orthax.keep_norm()
    )
    size = frobenius(w)
    expected = at_norm(oracles.float64(w) - rate * u * size / frobenius(u), size)
    np.testing.assert_allclose(moved(chain, u, w), expected, atol=1e-6)


def test_matrices_of_a_stack_keep_their_own_norms():
    scales = np.array([1e-15, 1, 1e15], np.float32)[:, None, None]
    w, u = normal((3, 8, 6)) * scales, normal((3, 8, 6), seed=1) * scales
    after = moved(KEEP_NORM, u, w)
    np.testing.assert_allclose(frobenius(after), frobenius(w), rtol=1e-6)
    np.testing.assert_allclose(after / scales, at_norm((w + u), frobenius(w)) / scales, atol=3e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e30, 2e37])
def test_the_norm_is_right_at_any_scale(scale):
    w, u = (np.float32(scale) * normal((8, 6), seed=seed) for seed in (0, 1))
    after = moved(KEEP_NORM, u, w)
    np.testing.assert_allclose(frobenius(after), frobenius(w), rtol=1e-6)


def test_a_matrix_that_would_be_zero_keeps_its_direction_and_a_zero_one_is_zero():
    w = normal((3, 8, 6))
    w[1] = 0
    u = -w
    np.testing.assert_allclose(moved(KEEP_NORM, u, w), w, atol=1e-6)
    after = moved(orthax.keep_norm(2.0), u, w)
    np.testing.assert_allclose(after[::2], at_norm(w[::2], 2.0), atol=1e-6)
    assert not after[1].any()


def test_a_zero_matrix_stays_zero_and_rises_to_a_given_norm():
    w, u = np.zeros((8, 6), np.float32), normal((8, 6))
    assert not moved(KEEP_NORM, u, w).any()
    np.testing.assert_allclose(moved(orthax.keep_norm(2.0), u, w), at_norm(u, 2.0), atol=1e-6)


def test_complex_matrices_keep_their_phase():
    w, u = normal((8, 6), np.complex64), normal((8, 6), np.complex64, seed=1)
    after = moved(KEEP_NORM, u, w)
    np.testing.assert_allclose(after, at_norm(w + u, frobenius(w)), atol=2e-6)


def test_the_norm_hardly_drifts_and_a_given_one_not_at_all():
    w = normal((8, 6))
    for radius, rtol in ((None, 1e-5), (3.0, 1e-6)):
        chain = optax.chain(optax.sgd(0.01), orthax.keep_norm(radius))
        path = path_of(chain, w, wandering, 5000)
        expected = frobenius(w).item() if radius is None else radius
        np.testing.assert_allclose(frobenius(path[1000:]), expected, rtol=rtol)


def test_the_radius_can_be_a_hyperparameter():
    transformation = optax.inject_hyperparams(orthax.keep_norm)(radius=2.0)
    w, u = normal((8, 6)), normal((8, 6), seed=1)
    state = transformation.init(w)
    state.hyperparams["radius"] = jnp.asarray(5.0)
    updates = jax.jit(transformation.update)(u, state, w)[0]
    np.testing.assert_allclose(frobenius(w + np.asarray(updates)), 5, rtol=1e-6)


def test_the_recipe_for_a_relative_step_moves_weights_by_the_learning_rate():
    """Up to the pull back onto the sphere, which takes off the part along the weights."""
    rate = 0.02
    w = 5 * normal((12, 5))
    recipe = [orthax.orthogonalize(polar_svd), optax.scale_by_trust_ratio(), optax.sgd(rate)]
    size = frobenius(w).item()
    free = apply(optax.chain(*recipe), normal((12, 5), seed=1), w)
    assert np.linalg.norm(free) == pytest.approx(rate * size, rel=1e-5)
    kept = path_of(optax.chain(*recipe, orthax.keep_norm()), w, wandering, 50)
    path = np.concatenate([w[None], kept])
    np.testing.assert_allclose(frobenius(path), size, rtol=3e-6)
    steps = np.linalg.norm(np.diff(path, axis=0), axis=(-2, -1)) / size
    assert steps.max() < rate * (1 + rate)
    assert np.median(steps) > 0.95 * rate


# --- 16 bits, of spheres


@pytest.mark.parametrize(
    "transformation", [KEEP_UNIT_NEURONS, KEEP_NORM], ids=["keep_unit_neurons", "keep_norm"]
)
def test_spheres_keep_the_dtypes_of_updates(transformation):
    w, u = jnp.asarray(normal((8, 6))), 0.1 * jnp.asarray(normal((8, 6), seed=1))
    reference = oracles.float64(apply(transformation, u, w))
    for params, updates in [(w, "bfloat16"), ("float16", u)]:
        params = w.astype(params) if isinstance(params, str) else params
        updates = u.astype(updates) if isinstance(updates, str) else updates
        actual = apply(transformation, updates, params)
        assert actual.dtype == updates.dtype
        least = min(params.dtype, updates.dtype, key=lambda d: -tolerances.eps(d))
        error = np.abs(oracles.float64(actual) - reference).max()
        assert error < 2 * tolerances.eps(least) * np.abs(w).max()


# --- errors

EVERY = {
    "keep_orthogonal": KEEP_ORTHOGONAL,
    "project_tangent": PROJECT_TANGENT,
    "keep_unit_neurons": KEEP_UNIT_NEURONS,
    "keep_norm": KEEP_NORM,
}
every = pytest.mark.parametrize("name", EVERY)
MATRIX = {"dense": {"kernel": jnp.ones((3, 2))}}


@every
def test_there_is_no_state(name):
    assert not jax.tree.leaves(EVERY[name].init(MATRIX))
