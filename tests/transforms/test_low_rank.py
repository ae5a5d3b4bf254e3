import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import tolerances
from hypothesis.extra.numpy import arrays

import orthax
from orthax.linalg import polar_svd

# Sizes of the shorter sides have Hadamard matrices. The rows of a square matrix are projected.
SHAPES = {"wide": (8, 12), "tall": (12, 8), "square": (8, 8), "layers": (2, 4, 6)}
FIXED = ["dct", "dct3", "random", "hadamard", "columns"]
ALL = [*FIXED, "svd", "subspace"]
RANK = 3
# Projecting and expanding, an entry of a matrix whose entries are of order one.
ROUNDING = 2e-6

every_fixed_basis = pytest.mark.parametrize("basis", FIXED)
every_basis = pytest.mark.parametrize("basis", ALL)
# "dct3" and "hadamard" differ from "dct" in their columns alone.
every_kind = pytest.mark.parametrize("basis", ["dct", "random", "columns", "svd", "subspace"])


def tree(seed, scale=1.0, dtype=np.float32, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(scale * rng.standard_normal(shape), dtype)
        for name, shape in shapes.items()
    }


def trees(steps, **options):
    return [tree(seed, **options) for seed in range(steps)]


def run(transformation, updates, params=None):
    state = transformation.init(updates[0] if params is None else params)
    update = jax.jit(transformation.update)
    for x in updates:
        out, state = update(x, state, params)
        yield out, state


def turned(x):
    """The matrix, and back: its projected side is last, the rows of a square one."""
    return oracles.mT(x) if x.shape[-2] <= x.shape[-1] else x


def columns_of(state, basis, n):
    """The matrix to choose columns from; a random one from the state."""
    if basis != "random":
        return oracles.basis_matrix(basis, n)
    matrices = {len(matrix): matrix for matrix in jax.tree.leaves(state.bases)}
    return oracles.float64(matrices[n])


def best_projection(x, q, rank, ranking="l2"):
    """x Q_r Q_r^T for the columns Q_r of q that suit x, (m, n) or a stack, best."""
    if x.ndim > 2:
        return np.stack([best_projection(part, q, rank, ranking) for part in x])
    chosen = q[:, oracles.largest_columns(x @ q, rank, ranking)]
    return x @ chosen @ chosen.T


def following(gradients, q, rank, step, moments):
    """Updates of one matrix (m, n) by `step`, whose moments have an entry for every index of q.

    Those of an index that is not in use are zero. `step` maps coordinates (m, r), moments for them
    and the number of the step to updates and moments.
    """
    for t, g in enumerate(gradients):
        coordinates = oracles.float64(g) @ q
        indices = oracles.largest_columns(coordinates, rank)
        u, new = step(coordinates[:, indices], [m[:, indices] for m in moments], t)
        for moment, values in zip(moments, new, strict=True):
            moment[:] = 0
            moment[:, indices] = values
        yield u @ q[:, indices].T


def assert_close(actual, expected, tolerance, message=""):
    error = oracles.relative_error(actual, expected)
    assert error < tolerance, (message, error)


def recorder(seen):
    """A transformation that notes the shapes of what it sees."""

    def update(updates, params):
        seen.append(jax.tree.map(lambda x: x.shape, (updates, params)))
        return updates

    return optax.stateless(update)


# --- what is kept and what is lost


@every_basis
def test_updates_and_buffer_add_up_to_the_gradients(basis):
    transformation = orthax.low_rank(optax.identity(), RANK, basis=basis, retain=0.0)
    gradients = trees(8)
    outputs = list(run(transformation, gradients))
    for leaf in SHAPES:
        total = sum(oracles.float64(g[leaf]) for g in gradients)
        updates = sum(oracles.float64(u[leaf]) for u, _ in outputs)
        residual = oracles.float64(outputs[-1][1].residuals[leaf])
        assert np.abs(residual).max() > 0.1
        assert_close(updates + residual, total, 4 * ROUNDING, leaf)


@pytest.mark.parametrize(
    ("basis", "bits", "rounding"),
    [
        ("dct", 8, "nearest"),
        ("columns", 4, "nearest"),
        ("svd", 8, "stochastic"),
        ("dct", 4, "stochastic"),
    ],
)
def test_they_add_up_within_the_quantisation_error(basis, bits, rounding):
    transformation = orthax.low_rank(
        optax.identity(),
        RANK,
        basis=basis,
        retain=0.0,
        buffer_dtype=f"int{bits}",
        rounding=rounding,
    )
    gradients = trees(8)
    outputs = list(run(transformation, gradients))
    spacing = {"nearest": 0.5, "stochastic": 1.0}[rounding]
    for leaf, shape in SHAPES.items():
        total = sum(
            oracles.float64(g[leaf] - u[leaf]) for g, (u, _) in zip(gradients, outputs, strict=True)
        )
        kept = outputs[-1][1].residuals
        codes = oracles.float64(kept.codes[leaf])
        if bits == 4:
            packed = np.asarray(kept.codes[leaf])
            codes = np.concatenate([packed & 15, packed >> 4], -1)[..., : shape[-1]]
        residual = codes * oracles.float64(kept.scale[leaf]) + oracles.float64(kept.zero[leaf])
        bound = spacing * sum(oracles.float64(s.residuals.scale[leaf]) for _, s in outputs)
        assert (np.abs(residual - total) <= bound + 1e-5).all(), leaf


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_they_add_up_within_the_rounding_of_a_16_bit_buffer(dtype):
    transformation = orthax.low_rank(optax.identity(), RANK, retain=0.0, buffer_dtype=dtype)
    gradients = trees(8)
    outputs = list(run(transformation, gradients))
    for leaf in SHAPES:
        total = sum(
            oracles.float64(g[leaf] - u[leaf]) for g, (u, _) in zip(gradients, outputs, strict=True)
        )
        residuals = [oracles.float64(s.residuals[leaf]) for _, s in outputs]
        assert outputs[-1][1].residuals[leaf].dtype == dtype
        bound = sum(np.abs(r).max() for r in residuals) * tolerances.eps(dtype) / 2
        assert np.abs(residuals[-1] - total).max() < bound + 1e-5, leaf


@every_fixed_basis
def test_the_buffer_is_a_momentum_whose_used_part_decays(basis):
    transformation = orthax.low_rank(optax.identity(), RANK, basis=basis, retain=0.8)
    gradients = trees(6)
    moments = {leaf: 0.0 for leaf in SHAPES}
    for g, (updates, state) in zip(gradients, run(transformation, gradients), strict=True):
        for leaf in SHAPES:
            m = turned(moments[leaf] + oracles.float64(g[leaf]))
            projected = best_projection(m, columns_of(state, basis, m.shape[-1]), RANK)
            back = oracles.mT if SHAPES[leaf][-2] <= SHAPES[leaf][-1] else lambda x: x
            moments[leaf] = back(m - (1 - 0.8) * projected)
            assert_close(updates[leaf], back(projected), 4 * ROUNDING, leaf)
            assert_close(state.residuals[leaf], moments[leaf], 4 * ROUNDING, leaf)


@pytest.mark.parametrize(
    ("basis", "rank"),
    [
        *((basis, 12) for basis in ("dct", "random", "columns", "svd", "subspace")),
        ("dct", lambda m, n: min(m, n)),
    ],
)
def test_at_full_rank_it_is_the_inner_transformation(basis, rank):
    for inner in (optax.identity(), optax.scale_by_adam()):
        transformation = orthax.low_rank(inner, rank, basis=basis)
        gradients = trees(3)
        outputs = list(run(transformation, gradients))
        for (ours, _), (theirs, _) in zip(outputs, run(inner, gradients), strict=True):
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        _, state = outputs[-1]
        assert not jax.tree.leaves(state.subspaces)
        assert not jax.tree.leaves(state.bases)


def test_the_fraction_one_is_the_full_rank():
    (g,) = trees(1)
    ((updates, state),) = run(orthax.low_rank(optax.identity(), 1.0), [g])
    assert not jax.tree.leaves(state.subspaces)
    jax.tree.map(np.testing.assert_array_equal, updates, g)


# --- shapes


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (3, {"wide": 3, "tall": 3, "square": 3, "layers": 3}),
        (np.int64(6), {"wide": 6, "tall": 6, "square": 6, "layers": None}),
        (0.25, {"wide": 2, "tall": 2, "square": 2, "layers": 1}),
        (0.01, {"wide": 1, "tall": 1, "square": 1, "layers": 1}),
        (lambda m, n: (m + n) // 5, {"wide": 4, "tall": 4, "square": 3, "layers": 2}),
        (lambda m, n: 2 if m > n else 5, {"wide": 5, "tall": 2, "square": 5, "layers": None}),
    ],
)
def test_the_inner_transformation_sees_updates_and_params_of_that_rank(rank, expected):
    seen = []
    (g,) = trees(1)
    transformation = orthax.low_rank(recorder(seen), rank)
    state = jax.eval_shape(transformation.init, g)
    updates, state = jax.eval_shape(transformation.update, g, state, g)
    assert jax.tree.map(jnp.shape, updates) == SHAPES
    shapes = dict(SHAPES)
    for leaf, r in expected.items():
        if r is not None:
            axis = {"wide": -2, "tall": -1, "square": -2, "layers": -2}[leaf]
            shape = list(SHAPES[leaf])
            shape[axis] = r
            shapes[leaf] = tuple(shape)
            indices = state.subspaces[leaf]
            assert indices.shape == (*SHAPES[leaf][:-2], r)
            assert indices.dtype == jnp.int32
    assert seen == [(shapes, shapes)]


def test_a_function_for_the_rank_is_called_with_the_shape_of_each_matrix():
    calls = []

    def rank(m, n):
        calls.append((m, n))
        return 2

    orthax.low_rank(optax.identity(), rank).init(tree(0))
    assert set(calls) == {shape[-2:] for shape in SHAPES.values()}


@every_kind
def test_each_matrix_of_a_stack_has_its_own_subspace(basis):
    transformation = orthax.low_rank(optax.scale_by_adam(), 2, basis=basis, retain=0.5)
    stacks = [tree(seed, shapes={"x": (2, 3, 8, 12)}) for seed in range(4)]
    together = [(u["x"], s.subspaces["x"]) for u, s in run(transformation, stacks)]
    distinct = {
        tuple(np.ravel(kept).round(3)) for kept in np.asarray(together[0][1]).reshape(6, -1)
    }
    assert len(distinct) > 1
    for i in range(2):
        for j in range(3):
            parts = [{"x": g["x"][i, j]} for g in stacks]
            for (updates, _), (stacked, _) in zip(
                run(transformation, parts), together, strict=True
            ):
                assert_close(stacked[i, j], updates["x"], 1e-4, (i, j))


# --- fixed bases


@every_fixed_basis
@pytest.mark.parametrize("ranking", ["l1", "l2"])
def test_the_update_is_the_projection_onto_the_largest_columns(basis, ranking):
    transformation = orthax.low_rank(optax.identity(), RANK, basis=basis, ranking=ranking)
    gradients = trees(3)
    for g, (updates, state) in zip(gradients, run(transformation, gradients), strict=True):
        for leaf in SHAPES:
            x = turned(oracles.float64(g[leaf]))
            q = columns_of(state, basis, x.shape[-1])
            np.testing.assert_allclose(q @ q.T, np.eye(len(q)), atol=1e-6)
            expected = best_projection(x, q, RANK, ranking)
            assert_close(turned(oracles.float64(updates[leaf])), expected, 2 * ROUNDING, leaf)
            indices = np.asarray(state.subspaces[leaf])
            assert (np.diff(indices) > 0).all()
            assert indices.min() >= 0
            assert indices.max() < x.shape[-1]


@functools.cache
def compiled(basis, rank):
    """One update of a (12, 8) matrix, and the columns of its basis."""
    transformation = orthax.low_rank(optax.identity(), rank, basis=basis)
    state = transformation.init(jnp.zeros((12, 8)))
    return jax.jit(lambda g: transformation.update(g, state)[0]), columns_of(state, basis, 8)


entries = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.05, 1e-4, 1e4, 0.5, 1 / 3]),
    st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
)


@every_fixed_basis
@hypothesis.settings(deadline=None, derandomize=True, max_examples=30)
@hypothesis.given(data=st.data(), rank=st.sampled_from([1, 3, 7]))
def test_l2_keeps_at_least_its_part_of_the_energy_of_any_matrix(basis, data, rank):
    project, q = compiled(basis, rank)
    x = data.draw(arrays(np.float64, (12, 8), elements=entries))
    if data.draw(st.booleans()):  # any coordinates, instead of any entries
        x = x @ q.T
    x = x.astype(np.float32)
    energy = (oracles.float64(project(x)) ** 2).sum()
    assert energy >= (rank / 8 - 1e-5) * (oracles.float64(x) ** 2).sum()


def test_l1_need_not_keep_that_part():
    """A column of many small entries beats a spike with more energy."""
    x = np.zeros((100, 2), np.float32)
    x[:, 0], x[3, 1] = 0.05, 1.0
    for ranking, part in (("l1", 0.2), ("l2", 0.8)):
        transformation = orthax.low_rank(optax.identity(), 1, basis="columns", ranking=ranking)
        ((u, _),) = run(transformation, [x])
        np.testing.assert_allclose((oracles.float64(u) ** 2).sum() / (x**2).sum(), part, rtol=1e-3)


# --- bases that follow the matrix


def test_svd_keeps_the_most_energy_possible():
    transformation = orthax.low_rank(optax.identity(), RANK, basis="svd")
    gradients = trees(3)
    for g, (updates, _) in zip(gradients, run(transformation, gradients), strict=True):
        for leaf in SHAPES:
            keep = functools.partial(
                oracles.on_singular_values, function=lambda s: s * (np.arange(s.shape[-1]) < RANK)
            )
            assert_close(updates[leaf], keep(g[leaf]), 1e-5, leaf)


def test_subspace_iteration_converges_to_it():
    rng = np.random.default_rng(0)
    g = {
        leaf: jnp.asarray(
            oracles.matrix_with_spectrum(rng, *SHAPES[leaf], 2.0 ** -np.arange(8), np.float32)
        )
        for leaf in ("wide", "tall", "square")
    }
    errors = []
    for updates, state in run(orthax.low_rank(optax.identity(), RANK, basis="subspace"), [g] * 12):
        for kept in jax.tree.leaves(state.subspaces):
            np.testing.assert_allclose(kept.mT @ kept, np.eye(RANK), atol=1e-6)
        lost = {leaf: g[leaf] - updates[leaf] for leaf in g}
        errors.append([(oracles.float64(x) ** 2).sum() for x in lost.values()])
    optimal = (4.0 ** -np.arange(RANK, 8)).sum()
    errors = np.asarray(errors) / optimal
    assert (errors[0] > 1.1).all()
    assert (errors > 1 - 1e-4).all()
    np.testing.assert_allclose(errors[-1], 1, rtol=1e-4)


def test_moments_are_rotated_with_the_singular_vectors():
    b1, b2 = 0.8, 0.9
    transformation = orthax.low_rank(optax.scale_by_adam(b1, b2), RANK, basis="svd")
    gradients = trees(20)
    mu, nu, old = ({leaf: None for leaf in SHAPES} for _ in range(3))
    for g, (_, state) in zip(gradients, run(transformation, gradients), strict=True):
        for leaf in SHAPES:
            new = oracles.float64(state.subspaces[leaf])
            a = turned(oracles.float64(g[leaf])) @ new
            if old[leaf] is None:
                mu[leaf] = nu[leaf] = np.zeros_like(a)
            else:
                rotation = oracles.mT(old[leaf]) @ new
                mu[leaf], nu[leaf] = mu[leaf] @ rotation, nu[leaf] @ rotation**2
            mu[leaf] = b1 * mu[leaf] + (1 - b1) * a
            nu[leaf] = b2 * nu[leaf] + (1 - b2) * a**2
            old[leaf] = new
            of_state = [getattr(state.inner, name)[leaf] for name in ("mu", "nu")]
            if SHAPES[leaf][-2] <= SHAPES[leaf][-1]:
                of_state = [x.mT for x in of_state]
            assert_close(of_state[0], mu[leaf], 2e-5, leaf)
            assert_close(of_state[1], nu[leaf], 2e-5, leaf)
            assert (of_state[1] >= 0).all()


@pytest.mark.parametrize("basis", ["svd", "subspace"])
def test_a_first_moment_without_negative_entries_turns_with_the_sign_of_its_column(basis):
    """Inputs of one sign give coordinates of one sign: that of the column, which is arbitrary.

    QR gives a column the sign opposite to that of its first entry, which changes here.
    """
    transformation = orthax.low_rank(optax.trace(0.9), 1, basis=basis)
    gradients = [
        np.outer(np.arange(1.0, 7), [first, 1.0, 1.0]).astype(np.float32)
        for first in (-0.1, 0.1, -0.1, 0.1)
    ]
    moment = old = 0.0
    for g, (u, state) in zip(gradients, run(transformation, gradients), strict=True):
        new = oracles.float64(state.subspaces)
        turn = np.dot(np.ravel(old), np.ravel(new)) if np.ndim(old) else 0.0
        moment, old = 0.9 * moment * turn + oracles.float64(g) @ new, new
        assert_close(u, moment @ new.T, 1e-5)


# --- moments follow their indices


def moments_for(g, number):
    return [np.zeros(turned(g).shape) for _ in range(number)]


def trace_step(a, moments, t):
    m = 0.9 * moments[0] + a
    return m, [m]


def adam_step(a, moments, t, b1=0.9, b2=0.99, eps=1e-8):
    mu, nu = b1 * moments[0] + (1 - b1) * a, b2 * moments[1] + (1 - b2) * a**2
    corrected = nu / (1 - b2 ** (t + 1))
    return mu / (1 - b1 ** (t + 1)) / (np.sqrt(corrected) + eps), [mu, nu]


def lion_step(a, moments, t, b1=0.9, b2=0.95):
    return np.sign(b1 * moments[0] + (1 - b1) * a), [b2 * moments[0] + (1 - b2) * a]


@pytest.mark.parametrize("basis", FIXED)
@pytest.mark.parametrize(
    ("inner", "step", "number"),
    [
        (optax.trace(0.9), trace_step, 1),
        (optax.scale_by_adam(b2=0.99), adam_step, 2),
        (optax.scale_by_lion(b1=0.9, b2=0.95), lion_step, 1),
    ],
    ids=["trace", "adam", "lion"],
)
def test_moments_move_with_their_indices_and_start_at_zero(basis, inner, step, number):
    shapes = {leaf: SHAPES[leaf] for leaf in ("wide", "tall", "square")}
    transformation = orthax.low_rank(inner, RANK, basis=basis)
    gradients = trees(8, shapes=shapes)
    outputs = list(run(transformation, gradients))
    for leaf in shapes:
        sets = {tuple(np.asarray(state.subspaces[leaf])) for _, state in outputs}
        assert len(sets) > 2
        xs = [turned(oracles.float64(g[leaf])) for g in gradients]
        q = columns_of(outputs[0][1], basis, xs[0].shape[-1])
        expected = following(xs, q, RANK, step, moments_for(gradients[0][leaf], number))
        for t, ((updates, _), u) in enumerate(zip(outputs, expected, strict=True)):
            assert_close(turned(oracles.float64(updates[leaf])), u, 1e-5, (leaf, t))


def test_a_moment_with_one_entry_for_each_index_moves_too():
    """Neurons are columns: those of a tall matrix are projected, those of a wide one are not."""
    decay = 0.8
    inner = optax.chain(orthax.orthogonalize(polar_svd), orthax.normalize_neurons(decay))
    shapes = {leaf: SHAPES[leaf] for leaf in ("wide", "tall")}
    gradients = trees(8, shapes=shapes)
    outputs = list(run(orthax.low_rank(inner, RANK), gradients))
    q = oracles.basis_matrix("dct", 8)

    def tall_step(a, moments, t):
        u, v = oracles.normalize_neurons(oracles.polar(a), moments[0], decay)
        return u, [v]

    xs = [oracles.float64(g["tall"]) for g in gradients]
    tall = following(xs, q, RANK, tall_step, [np.zeros((1, 8))])
    v = np.zeros((1, 12))
    for g, (updates, _), expected in zip(gradients, outputs, tall, strict=True):
        assert_close(updates["tall"], expected, 1e-4)
        coordinates = q.T @ oracles.float64(g["wide"])
        indices = oracles.largest_columns(coordinates.T, RANK)
        u, v = oracles.normalize_neurons(oracles.polar(coordinates[indices]), v, decay)
        assert_close(updates["wide"], q[:, indices] @ u, 1e-4)


def test_an_initial_accumulator_is_kept_at_the_first_step():
    transformation = orthax.low_rank(
        optax.scale_by_rss(initial_accumulator_value=0.5), 2, basis="columns"
    )
    (g, later) = (np.zeros((6, 4), np.float32) for _ in range(2))
    g[:, [1, 3]], later[:, [0, 3]] = 2.0, 1.0
    (first, _), (second, _) = run(transformation, [g, later])
    np.testing.assert_allclose(first, g / np.sqrt(0.5 + 4), rtol=1e-5)
    # Index 3 goes on; index 0 is new and starts at zero.
    expected = later * [1, 0, 0, 1 / np.sqrt(0.5 + 4 + 1)]
    np.testing.assert_allclose(second, expected, rtol=1e-5)


def test_a_state_that_does_not_follow_the_params_is_left_alone():
    schedule = optax.scale_by_schedule(lambda count: 0.5**count)
    transformation = orthax.low_rank(schedule, RANK)
    gradients = trees(4)
    plain = run(orthax.low_rank(optax.identity(), RANK), gradients)
    for t, ((updates, state), (whole, _)) in enumerate(
        zip(run(transformation, gradients), plain, strict=True)
    ):
        assert state.inner.count == t + 1
        for leaf in SHAPES:
            assert_close(updates[leaf], 0.5**t * oracles.float64(whole[leaf]), ROUNDING)


@every_kind
def test_params_are_projected_to_the_subspace_of_the_updates(basis):
    transformation = orthax.low_rank(optax.add_decayed_weights(0.3), RANK, basis=basis)
    plain = orthax.low_rank(optax.identity(), RANK, basis=basis)
    params, gradients = tree(100), trees(2)
    alone = run(plain, gradients)
    for (updates, state), (without, _) in zip(
        run(transformation, gradients, params), alone, strict=True
    ):
        for leaf in SHAPES:
            p, kept = turned(oracles.float64(params[leaf])), np.asarray(state.subspaces[leaf])
            if basis in FIXED:
                q = columns_of(state, basis, p.shape[-1])
                kept = oracles.mT(q.T[kept])
            expected = turned(oracles.float64(without[leaf])) + 0.3 * p @ kept @ oracles.mT(kept)
            assert_close(turned(oracles.float64(updates[leaf])), expected, 1e-5, leaf)


# --- when the subspace is chosen


@every_kind
def test_the_subspace_changes_every_so_many_updates_only(basis):
    transformation = orthax.low_rank(optax.scale_by_adam(), 2, basis=basis, update_every=3)
    gradients = trees(9)
    kept = [state.subspaces for _, state in run(transformation, gradients)]
    for t in range(1, 9):
        same = all(
            np.array_equal(kept[t][leaf], kept[t - 1][leaf]) for leaf in SHAPES if leaf != "layers"
        )
        assert same == (t % 3 != 0), t


def test_between_choices_gradients_are_projected_to_the_old_subspace():
    transformation = orthax.low_rank(optax.identity(), RANK, update_every=2)
    gradients = trees(4)
    for g, (updates, state) in zip(gradients, run(transformation, gradients), strict=True):
        for leaf in SHAPES:
            x = turned(oracles.float64(g[leaf]))
            q = oracles.basis_matrix("dct", x.shape[-1])
            q = oracles.mT(q.T[np.asarray(state.subspaces[leaf])])
            assert_close(
                turned(oracles.float64(updates[leaf])), x @ q @ oracles.mT(q), 2 * ROUNDING, leaf
            )


# --- seeds


def test_a_random_basis_is_kept_once_for_each_size_and_follows_its_seed():
    params = {**tree(0), "embedding": jnp.zeros((2, 2))}

    def bases(seed):
        state = orthax.low_rank(optax.identity(), 2, basis="random", seed=seed).init(params)
        return {len(q): q for q in jax.tree.leaves(state.bases)}, jax.tree.leaves(state.bases)

    (first, leaves), (again, _), (other, _) = bases(0), bases(0), bases(1)
    assert sorted(map(len, leaves)) == [4, 8]  # nothing for the full rank
    for n, q in first.items():
        np.testing.assert_allclose(q @ q.T, np.eye(n), atol=1e-6)
        np.testing.assert_array_equal(q, again[n])
        assert np.abs(q - other[n]).max() > 0.1


@pytest.mark.parametrize("basis", ["dct", "svd", "hadamard", "columns", "subspace"])
def test_other_bases_are_not_kept(basis):
    assert orthax.low_rank(optax.identity(), 2, basis=basis).init(tree(0)).bases is None


@pytest.mark.parametrize("bits", [8, 4])
def test_stochastic_rounding_has_a_key_for_each_leaf_step_and_seed(bits):
    def codes(leaf, *, seed=0, step=0, others=()):
        transformation = orthax.low_rank(
            optax.identity(),
            RANK,
            retain=0.0,
            buffer_dtype=f"int{bits}",
            rounding="stochastic",
            seed=seed,
        )
        g = {name: tree(0)["wide"] for name in (leaf, *others)}
        state = transformation.init(g)._replace(count=jnp.int32(step))
        return np.asarray(transformation.update(g, state)[1].residuals.codes[leaf])

    np.testing.assert_array_equal(codes("a"), codes("a"))
    np.testing.assert_array_equal(codes("b"), codes("b", others=("a", "c")))
    assert (codes("a") != codes("b")).any()
    assert (codes("a") != codes("a", step=1)).any()
    assert (codes("a") != codes("a", seed=1)).any()


def test_stochastic_rounding_is_right_on_average():
    transformation = orthax.low_rank(
        optax.identity(), RANK, retain=0.0, buffer_dtype="int8", rounding="stochastic"
    )
    exact = orthax.low_rank(optax.identity(), RANK, retain=0.0)
    g = tree(0)["wide"]
    expected = oracles.float64(exact.update(g, exact.init(g))[1].residuals)
    start = transformation.init(g)

    @jax.jit
    def kept(count):
        return transformation.update(g, start._replace(count=count))[1].residuals

    codes, scale, zero = map(oracles.float64, jax.vmap(kept)(jnp.arange(400, dtype=jnp.int32)))
    error = (codes * scale + zero).mean(0) - expected
    assert (np.abs(error) < 5 * 0.5 * scale[0] / 400**0.5 + 1e-6).all()  # five deviations
    assert ((codes * scale + zero)[0] != (codes * scale + zero)[1]).any()


# --- dtypes, scales, zeros


@every_kind
def test_bfloat16_gradients_are_projected_in_float32(basis):
    transformation = orthax.low_rank(optax.identity(), RANK, basis=basis)
    low = trees(2, dtype=jnp.bfloat16)
    high = [jax.tree.map(lambda x: x.astype(jnp.float32), g) for g in low]
    for (actual, _), (expected, _) in zip(
        run(transformation, low), run(transformation, high), strict=True
    ):
        for leaf in SHAPES:
            assert actual[leaf].dtype == jnp.bfloat16
            assert_close(actual[leaf], expected[leaf], 2 * tolerances.eps(jnp.bfloat16), leaf)


@pytest.mark.parametrize(
    ("basis", "inner"),
    [
        *((basis, optax.scale_by_adam()) for basis in ("dct", "random", "columns")),
        *((basis, orthax.orthogonalize()) for basis in ("dct", "svd", "subspace")),
    ],
)
def test_zero_gradients_give_zero_updates(basis, inner):
    transformation = orthax.low_rank(inner, RANK, basis=basis, retain=0.5)
    zeros = tree(0, scale=0.0)
    for updates, state in run(transformation, [zeros, zeros]):
        assert not any(u.any() for u in jax.tree.leaves(updates))
        assert not any(x.any() for x in jax.tree.leaves(state.residuals))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("basis", "scale"),
    [
        *((basis, 1e15) for basis in ("dct", "random", "columns", "svd", "subspace")),
        *((basis, 1e-15) for basis in ("dct", "svd", "subspace")),
    ],
)
def test_the_subspace_does_not_depend_on_the_scale(basis, scale):
    transformation = orthax.low_rank(optax.identity(), RANK, basis=basis)
    gradients = trees(2)
    scaled = [jax.tree.map(lambda x: x * np.float32(scale), g) for g in gradients]
    for (one, state), (other, other_state) in zip(
        run(transformation, gradients), run(transformation, scaled), strict=True
    ):
        for leaf in SHAPES:
            if basis in FIXED:
                np.testing.assert_array_equal(state.subspaces[leaf], other_state.subspaces[leaf])
            assert_close(oracles.float64(other[leaf]) / scale, one[leaf], 1e-4, leaf)


@every_kind
def test_complex_matrices_are_projected_and_nothing_is_lost(basis):
    transformation = orthax.low_rank(optax.identity(), RANK, basis=basis, retain=0.0)
    gradients = [jax.tree.map(jax.lax.complex, tree(2 * t), tree(2 * t + 1)) for t in range(4)]
    outputs = list(run(transformation, gradients))
    for leaf in SHAPES:
        assert outputs[0][0][leaf].dtype == jnp.complex64
        total = sum(oracles.float64(g[leaf]) for g in gradients)
        updates = sum(oracles.float64(u[leaf]) for u, _ in outputs)
        assert_close(updates + oracles.float64(outputs[-1][1].residuals[leaf]), total, 1e-5, leaf)
        if basis == "svd":
            keep = oracles.on_singular_values(
                gradients[0][leaf], lambda s: s * (np.arange(s.shape[-1]) < RANK)
            )
            assert_close(outputs[0][0][leaf], keep, 1e-5, leaf)


def test_moments_of_complex_matrices_are_rotated():
    """With the same gradient each time, whatever the phases of its singular vectors."""
    transformation = orthax.low_rank(optax.trace(0.5), RANK, basis="svd")
    (g,) = [jax.tree.map(jax.lax.complex, tree(0), tree(1))]
    outputs = [u for u, _ in run(transformation, [g] * 3)]
    for leaf in SHAPES:
        assert_close(outputs[-1][leaf], 1.75 * oracles.float64(outputs[0][leaf]), 1e-5, leaf)


@pytest.mark.parametrize("rank", [1.0, np.float32(1)])
def test_one_as_a_fraction_is_the_whole_side(rank):
    state = orthax.low_rank(optax.trace(0.9), rank).init([jnp.ones((6, 16))])
    assert jax.tree.leaves(state.inner)[0].shape == (6, 16)


def test_a_side_without_a_hadamard_matrix_passes_where_nothing_is_projected():
    state = orthax.low_rank(optax.trace(0.9), 6, basis="hadamard").init([jnp.ones((6, 16))])
    assert jax.tree.leaves(state.inner)[0].shape == (6, 16)


@pytest.mark.parametrize("buffer_dtype", [None, jnp.bfloat16, "int8", "int4"])
def test_without_a_buffer_its_dtype_says_nothing(buffer_dtype):
    g = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((6, 8)), jnp.float32)}
    plain, tx = (orthax.low_rank(optax.trace(0.9), 2, buffer_dtype=d) for d in (None, buffer_dtype))
    expected, _ = plain.update(g, plain.init(g))
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates["kernel"], expected["kernel"])
    assert state.residuals is None
