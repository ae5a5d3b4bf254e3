import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import paths
import pytest
import tolerances
from helpers import GOLDEN, array_bytes, normal, normal_tree, says
from paths import run, updates_of

import orthax

LEAVES = ["tall", "wide", "square"]
# The code multiplies moments by a dense, rounded rotation, where zeros are exact here.
GOLDEN_PATH, GOLDEN_PATH_FLOAT64 = 3e-2, 1.2e-2
# Flax kernels (fan_in, fan_out).
SHAPES = {"expanding": (10, 24), "contracting": (24, 10), "square": (12, 12), "layers": (2, 8, 12)}
tree = functools.partial(normal_tree, SHAPES)

settings = {"dimension_numbers": optax.contrib.MuonDimensionNumbers(-2, -1)}


def golden(feedback, key):
    data = np.load(GOLDEN)
    return {leaf: data[f"dct_adamw_rot1_ef{feedback}/{key}/{leaf}"].T for leaf in LEAVES}


def transcribed(p, grads, *, basis, **options):
    q = oracles.basis_matrix(basis, min(p.shape[-2:]))
    return paths.slice_by_slice(functools.partial(oracles.dct_adamw, basis=q, **options), p, grads)


# --- the published algorithm


@pytest.mark.parametrize("feedback", [0, 1])
def test_it_follows_the_published_code_for_six_steps(feedback):
    start, end = golden(feedback, "p0"), golden(feedback, "p6")
    grads = [golden(feedback, f"g{t}") for t in range(6)]
    optimizer = orthax.dct_adamw(
        0.01,
        8,
        basis="dct3",
        error_feedback=bool(feedback),
        bias_correction="global",
        weight_decay=0.1,
    )
    *_, after = run(optimizer, start, grads)
    for leaf in LEAVES:
        error = np.linalg.norm(after[leaf] - end[leaf])
        assert error < GOLDEN_PATH * np.linalg.norm(end[leaf] - start[leaf]), leaf


@pytest.mark.parametrize("feedback", [0, 1])
@pytest.mark.parametrize("leaf", LEAVES)
def test_the_oracle_follows_the_published_code_too(leaf, feedback):
    start, end = golden(feedback, "p0")[leaf], golden(feedback, "p6")[leaf]
    *_, after = transcribed(
        start,
        [golden(feedback, f"g{t}")[leaf] for t in range(6)],
        learning_rate=0.01,
        rank=8,
        basis="dct3",
        error_feedback=bool(feedback),
        bias_correction="global",
        weight_decay=0.1,
    )
    error = np.linalg.norm(after - end)
    assert error < GOLDEN_PATH_FLOAT64 * np.linalg.norm(end - start)


@pytest.mark.parametrize(
    ("bias_correction", "error_feedback", "update_every"),
    [("per_index", False, 1), ("per_index", True, 3), ("global", False, 3), ("global", True, 1)],
)
def test_it_follows_the_transcription(bias_correction, error_feedback, update_every):
    basis = "dct3" if error_feedback else "dct"
    options = {
        "b1": 0.8,
        "b2": 0.95,
        "eps": 1e-6,
        "basis": basis,
        "ranking": "l1" if update_every == 3 else "l2",
        "bias_correction": bias_correction,
        "error_feedback": error_feedback,
        "update_every": update_every,
        "weight_decay": 0.1,
    }
    params, grads = tree(0, 0.1), [tree(seed) for seed in range(1, 9)]
    optimizer = orthax.dct_adamw(0.05, 4, **options, **settings)
    oracle = functools.partial(transcribed, learning_rate=0.05, rank=4, **options)
    paths.assert_follows(optimizer, params, grads, oracle)


@pytest.mark.parametrize("bias_correction", ["per_index", "global"])
def test_first_moments_of_8_bits_follow_the_transcription(bias_correction):
    options = {"basis": "dct", "bias_correction": bias_correction, "b2": 0.95}
    params, grads = tree(0, 0.1), [tree(seed) for seed in range(1, 7)]
    optimizer = orthax.dct_adamw(0.05, 4, mu_dtype="int8", **options, **settings)

    def keep(mu, nu):
        return oracles.rows_in_256_levels(mu / np.sqrt(nu)) * np.sqrt(nu)

    oracle = functools.partial(transcribed, learning_rate=0.05, rank=4, keep=keep, **options)
    paths.assert_follows(optimizer, params, grads, oracle)


def test_indices_do_change_in_these_tests():
    """Otherwise the two bias corrections would agree."""
    params, grads = tree(0), [tree(seed) for seed in range(1, 4)]
    ends = [
        transcribed(
            params["expanding"],
            [g["expanding"] for g in grads],
            learning_rate=0.1,
            rank=4,
            basis="dct",
            bias_correction=correction,
        )
        for correction in ("per_index", "global")
    ]
    assert oracles.relative_error(ends[0][0], ends[1][0]) == 0
    assert oracles.relative_error(ends[0][-1], ends[1][-1]) > 0.01


@pytest.mark.parametrize("error_feedback", [False, True])
@pytest.mark.parametrize("bias_correction", ["per_index", "global"])
def test_at_full_rank_it_is_adamw(bias_correction, error_feedback):
    params, grads = tree(0), [tree(seed) for seed in range(1, 6)]
    numbers = {"b1": 0.8, "b2": 0.99, "eps": 1e-6, "weight_decay": 0.1}
    optimizer = orthax.dct_adamw(
        0.01,
        12,
        bias_correction=bias_correction,
        error_feedback=error_feedback,
        **numbers,
        **settings,
    )
    ours = updates_of(optimizer, params, grads)
    theirs = updates_of(optax.adamw(0.01, **numbers), params, grads)
    for actual, expected in zip(ours, theirs, strict=True):
        for leaf in params:
            assert oracles.relative_error(actual[leaf], expected[leaf]) < 1e-5, leaf


# --- new indices


@pytest.mark.parametrize(("bias_correction", "size"), [("per_index", 1.0), ("global", 3.16)])
def test_the_first_step_of_a_new_index_late_in_training(bias_correction, size):
    """The global count multiplies it by (1 - b1) / sqrt(1 - b2)."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.zeros((6, 4))}
    one, other = ({"kernel": np.zeros((6, 4), np.float32)} for _ in range(2))
    one["kernel"][:, 1], other["kernel"][:, 2] = rng.standard_normal((2, 6))
    optimizer = orthax.dct_adamw(1.0, 1, basis="columns", bias_correction=bias_correction)

    def step(_, state):
        return optimizer.update(one, state, params)[1]

    state = jax.jit(lambda state: jax.lax.fori_loop(0, 8000, step, state))(optimizer.init(params))
    updates, _ = optimizer.update(other, state, params)
    expected = np.zeros((6, 4))
    expected[:, 2] = -size * np.sign(other["kernel"][:, 2])
    np.testing.assert_allclose(updates["kernel"], expected, rtol=tolerances.PRINTED)


@pytest.mark.parametrize("bias_correction", ["per_index", "global"])
def test_an_index_that_leaves_and_returns_starts_again(bias_correction):
    rng = np.random.default_rng(0)
    grads = [np.zeros((6, 4), np.float32) for _ in range(3)]
    for g, index in zip(grads, (1, 2, 1), strict=True):
        g[:, index] = rng.standard_normal(6)
    optimizer = orthax.dct_adamw(1.0, 1, basis="columns", bias_correction=bias_correction)
    params = {"kernel": np.zeros((6, 4), np.float32)}
    *_, last = updates_of(optimizer, params, [{"kernel": g} for g in grads])
    age = {"per_index": 1, "global": 3}[bias_correction]
    size = 0.1 / (1 - 0.9**age) / np.sqrt(0.001 / (1 - 0.999**age))
    np.testing.assert_allclose(last["kernel"], -size * np.sign(grads[2]), rtol=1e-4)


# --- the state


@pytest.mark.parametrize("bias_correction", ["per_index", "global"])
def test_at_a_quarter_of_the_rank_the_state_is_about_a_quarter_of_adamws(bias_correction):
    shapes = [(128, 512), (512, 128), (128, 128)] * 2
    params = {f"Dense_{i}": {"kernel": jnp.zeros(shape)} for i, shape in enumerate(shapes)}
    optimizer = orthax.dct_adamw(0.1, 0.25, bias_correction=bias_correction)
    ours = array_bytes(jax.eval_shape(optimizer.init, params))
    numbers = sum(2 * 32 * max(shape) + 32 for shape in shapes)
    weights = sum(2 * 32 for _ in shapes) if bias_correction == "per_index" else 0
    assert ours == 4 * (numbers + weights)
    assert ours < 0.35 * array_bytes(jax.eval_shape(optax.adamw(0.1).init, params))


@pytest.mark.parametrize("buffer_dtype", [None, jnp.bfloat16, "int8", "int4"])
def test_error_feedback_takes_the_bytes_of_its_dtype(buffer_dtype):
    params = tree(0)
    without = orthax.dct_adamw(0.1, 3, **settings)
    optimizer = orthax.dct_adamw(0.1, 3, error_feedback=True, buffer_dtype=buffer_dtype, **settings)
    rows = {leaf: int(np.prod(shape[:-1])) for leaf, shape in SHAPES.items()}
    bits = {None: 32, jnp.bfloat16: 16, "int8": 8, "int4": 4}[buffer_dtype]
    expected = sum(rows[leaf] * -(-shape[-1] * bits // 8) for leaf, shape in SHAPES.items())
    if isinstance(buffer_dtype, str):
        expected += 8 * sum(rows.values())  # scale and zero of each row
    states = (jax.eval_shape(tx.init, params) for tx in (optimizer, without))
    ours, theirs = map(array_bytes, states)
    assert ours - theirs == expected


@pytest.mark.parametrize("bias_correction", ["per_index", "global"])
def test_first_moments_of_8_bits_take_a_byte_an_entry(bias_correction):
    params = tree(0)
    whole, ours = (
        jax.eval_shape(
            orthax.dct_adamw(
                0.1, 3, bias_correction=bias_correction, mu_dtype=mu_dtype, **settings
            ).init,
            params,
        )
        for mu_dtype in (None, "int8")
    )
    # (10, 24) -> (3, 24), (24, 10) -> (24, 3), (12, 12) -> (3, 12), (2, 8, 12) -> (2, 3, 12)
    entries, rows = 72 + 72 + 36 + 72, 3 + 24 + 3 + 6
    assert array_bytes(whole) - array_bytes(ours) == 3 * entries - 8 * rows


def test_8_bit_moments_of_rows_of_large_and_small_entries_give_adams_steps():
    """Levels between the ends of such a row would be wider than its small moments."""
    scale = np.float32([1.0, 1e-3, 1e-6, 0.0, 1e-2, 1e-5])
    params = {"dense": {"kernel": jnp.zeros((6, 6))}}
    steps = {}
    for mu_dtype in (None, "int8"):
        tx = orthax.dct_adamw(1.0, 1.0, eps=1e-12, mu_dtype=mu_dtype)
        state = tx.init(params)
        for seed in range(4):
            g = {"dense": {"kernel": normal((6, 6), seed=seed) * scale}}
            steps[mu_dtype], state = tx.update(g, state, params)
    exact, ours = (x["dense"]["kernel"] for x in steps.values())
    assert np.abs(exact).max() > 0.5
    np.testing.assert_allclose(ours, exact, atol=0.02)


def test_complex_leaves_are_refused_by_8_bit_moments():
    params = {"dense": {"kernel": jnp.zeros((4, 8), jnp.complex64)}}
    with pytest.raises(TypeError, match=says("dct_adamw", "dense/kernel", "mu_dtype='int8'")):
        orthax.dct_adamw(0.1, mu_dtype="int8").init(params)


@pytest.mark.parametrize("buffer_dtype", [None, jnp.bfloat16, "int8", "int4"])
def test_a_least_squares_problem_is_solved_with_any_error_feedback(buffer_dtype):
    optimizer = orthax.dct_adamw(
        optax.linear_schedule(0.1, 0.0, 200), 4, error_feedback=True, buffer_dtype=buffer_dtype
    )
    assert paths.part_of_the_loss_left(optimizer, 200) < 0.05
