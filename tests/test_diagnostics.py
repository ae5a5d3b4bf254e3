import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import tolerances
from helpers import normal
from optax.contrib import MuonDimensionNumbers

import orthax
from orthax.conv_penalties import convolution_orthogonality
from orthax.diagnostics import (
    effective_rank,
    neuron_norm_spread,
    of_both,
    of_params,
    of_updates,
    orthogonality_error,
    scalars,
    singular_values,
    stable_rank,
    update_to_weight_ratio,
    warm_spectral_norm,
)
from orthax.penalties import WithMemory

SHAPES = [(7, 4), (5, 5), (1, 6), (6, 1), (2, 3, 4, 6)]
SCALES = [1e-20, 1e-5, 1.0, 1e5, 1e18]


# --- the formulas, for one matrix in float64


def frobenius(w):
    return np.sqrt((np.abs(w) ** 2).sum())


def gram_excess(w):
    w = w if w.shape[0] >= w.shape[1] else w.conj().T
    return w.conj().T @ w - np.eye(w.shape[1])


def entropy_rank(w):
    s = np.linalg.svd(w, compute_uv=False)
    if not s.any():
        return 0.0
    p = s[s > 0] / s.sum()
    return np.exp(-(p * np.log(p)).sum())


def ratio_of_norms(w):
    norm = np.linalg.norm(w, 2)
    return (frobenius(w) / norm) ** 2 if norm else 0.0


def spread(w):
    """Coefficient of variation of the columns' lengths."""
    lengths = np.sqrt((np.abs(w) ** 2).sum(0))
    return lengths.std() / lengths.mean() if lengths.any() else 0.0


FORMULAS = {
    "frobenius": lambda w: frobenius(gram_excess(w)),
    "spectral": lambda w: np.abs(np.linalg.svd(w, compute_uv=False) ** 2 - 1).max(),
    "singular values": lambda w: np.linalg.svd(w, compute_uv=False),
    "stable rank": ratio_of_norms,
    "effective rank": entropy_rank,
    "spread": spread,
}
MEASURES = {
    "frobenius": orthogonality_error,
    "spectral": functools.partial(orthogonality_error, norm="spectral"),
    "singular values": singular_values,
    "stable rank": functools.partial(stable_rank, steps=200),
    "effective rank": effective_rank,
    "spread": neuron_norm_spread,
}
every_measure = pytest.mark.parametrize("name", MEASURES)
OF_ANY_SCALE = ["singular values", "stable rank", "effective rank", "spread"]


def formula(name, w):
    w = oracles.float64(w)
    values = [FORMULAS[name](matrix) for matrix in w.reshape(-1, *w.shape[-2:])]
    return np.reshape(values, w.shape[:-2] + np.shape(values[0]))


def measure_all(name, ws):
    return jax.jit(lambda ws: [MEASURES[name](w) for w in ws])(ws)


# --- values


@every_measure
def test_each_matrix_has_the_value_of_the_formula(name):
    ws = [normal(shape) for shape in SHAPES]
    ws += [normal(shape, np.complex64) for shape in [(7, 4), (2, 4, 7)]]
    for w, value in zip(ws, measure_all(name, ws), strict=True):
        expected = formula(name, w)
        assert value.shape == expected.shape
        assert value.dtype == np.float32
        tolerance = 1e-5 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=tolerance, err_msg=w.shape)


@every_measure
def test_it_holds_from_1e_minus_20_to_1e18(name):
    """Stacked, so that no matrix lends another its scale."""
    scales = np.float32(SCALES)[:, None, None]
    ws = [scales * normal((len(SCALES), *shape)) for shape in [(7, 4), (4, 7)]]
    for w, value in zip(ws, measure_all(name, ws), strict=True):
        np.testing.assert_allclose(value, formula(name, w), rtol=5e-5, err_msg=str(w.shape))


@pytest.mark.parametrize("name", OF_ANY_SCALE)
def test_scaling_scales_singular_values_and_changes_no_rank_and_no_spread(name):
    w = normal((7, 4))
    powers = np.float32(2.0) ** np.array([-60, -20, 0, 20, 60], np.float32)
    (value,) = measure_all(name, [w * powers[:, None, None]])
    factor = powers if name == "singular values" else np.ones(5)
    scaled = np.moveaxis(np.asarray(value), 0, -1) / factor
    np.testing.assert_allclose(scaled, scaled[..., :1] * np.ones(5), rtol=1e-5)


@every_measure
def test_a_zero_matrix_has_a_number(name):
    ws = [jnp.zeros((6, 4)), jnp.zeros((4, 6), jnp.bfloat16), jnp.zeros((2, 5, 5), jnp.complex64)]
    for w, value in zip(ws, measure_all(name, ws), strict=True):
        np.testing.assert_allclose(value, formula(name, w), atol=1e-6)
        if name in OF_ANY_SCALE:
            assert not np.asarray(value).any()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@every_measure
def test_16_bits_are_measured_in_float32(name, dtype):
    """Entries of 100 have squares that sum beyond the largest float16."""
    ws = [jnp.asarray(100 * normal((30, 4)), dtype), jnp.asarray(normal((4, 7)), dtype)]
    for w, value in zip(ws, measure_all(name, ws), strict=True):
        assert value.dtype == np.float32
        expected = formula(name, w)
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-5 * np.abs(expected).max())


@every_measure
def test_double_precision_is_kept(name):
    w = normal((2, 7, 4), np.float64)
    with tolerances.double_precision():
        (value,) = measure_all(name, [w])
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, formula(name, w), rtol=1e-10)


@every_measure
def test_a_nan_is_not_hidden_and_spoils_no_other_matrix(name):
    w = normal((2, 6, 4))
    expected = formula(name, w)
    w[0, 2, 1] = np.nan
    (value,) = measure_all(name, [w])
    assert np.isnan(value[0]).any()
    np.testing.assert_allclose(value[1], expected[1], rtol=1e-4)


# --- each by itself


def test_orthogonal_matrices_have_no_error_to_rounding_and_others_have():
    rng = np.random.default_rng(0)
    ws = [oracles.orthogonal(rng, *shape).astype(np.float32) for shape in [(60, 40), (40, 60)]]
    eyes = [jnp.eye(5, 3), jnp.eye(3, 5)]
    for name in ("frobenius", "spectral"):
        values = np.array(measure_all(name, [*ws, *(1.001 * w for w in ws), *eyes]))
        assert (values[:2] < 1e-5).all()
        assert (values[2:4] > 1.9e-3).all()
        assert (values[4:] == 0).all()


def test_the_frobenius_error_is_the_default_and_bounds_the_spectral_one():
    w = normal((20, 7, 4))
    named = [functools.partial(orthogonality_error, norm=n) for n in ("frobenius", "spectral")]
    default, frobenius, spectral = jax.jit(lambda w: [f(w) for f in (orthogonality_error, *named)])(
        w
    )
    np.testing.assert_array_equal(default, frobenius)
    assert (spectral <= default).all()
    assert (default <= 2 * spectral * (1 + 1e-6)).all()


def test_singular_values_decrease():
    s = [3.0, 0.5, 2.0, 0.0]
    w = oracles.matrix_with_spectrum(np.random.default_rng(0), 6, 4, s, np.float32)
    np.testing.assert_allclose(singular_values(w), sorted(s, reverse=True), atol=1e-6)


def test_stable_rank_is_never_underestimated_and_seldom_by_more_than_a_few_per_cent():
    stacks = [normal((20, 64, 48)), normal((10, 60, 90))]

    def measured(ws):
        return [[stable_rank(w, steps) for steps in (30, 100)] + [stable_rank(w)] for w in ws]

    for w, (few, many, default) in zip(stacks, jax.jit(measured)(stacks), strict=True):
        exact = formula("stable rank", w)
        np.testing.assert_array_equal(few, default)
        for value, typical, most in ((few, 0.03, 0.12), (many, 0.005, 0.03)):
            excess = np.asarray(value) / exact - 1
            assert excess.min() > -1e-5
            assert excess.max() < most
            assert np.median(excess) < typical


def test_stable_rank_is_exact_where_a_singular_value_stands_out():
    s = [5.0, 2.0, 2.0, 1.0]
    w = oracles.matrix_with_spectrum(np.random.default_rng(0), 9, 4, s, np.float32)
    np.testing.assert_allclose(jax.jit(stable_rank)(w), 34 / 25, rtol=1e-5)


def test_ranks_of_equal_singular_values_are_their_number():
    rng = np.random.default_rng(0)
    ws = np.stack(
        [
            oracles.matrix_with_spectrum(rng, 9, 6, 7.0 * (np.arange(6) < k), np.float32)
            for k in range(1, 7)
        ]
    )
    for name in ("effective rank", "stable rank"):
        for value in measure_all(name, [ws, oracles.mT(ws)]):
            np.testing.assert_allclose(value, range(1, 7), rtol=1e-4)


def test_small_singular_values_change_the_effective_rank_little_and_the_stable_rank_less():
    s = np.array([1.0, 1.0, 1e-3, 1e-3])
    w = oracles.matrix_with_spectrum(np.random.default_rng(0), 6, 4, s, np.float32)
    assert 2 < measure_all("effective rank", [w])[0] < 2.05
    np.testing.assert_allclose(measure_all("stable rank", [w]), 2.0, rtol=1e-4)


def test_ranks_lie_between_one_and_the_shorter_side():
    ws = [normal(shape) for shape in [(30, 7, 4), (30, 1, 5)]]
    for name in ("stable rank", "effective rank"):
        for w, value in zip(ws, measure_all(name, ws), strict=True):
            assert (value >= 1 - 1e-5).all()
            assert (value <= min(w.shape[1:]) * (1 + 1e-5)).all()


def test_the_spread_is_of_columns_and_zero_where_they_are_orthonormal():
    w = normal((6, 4))
    stretched = w / np.linalg.norm(w, axis=0) * np.float32([1, 2, 3, 4])
    expected = np.std([1, 2, 3, 4]) / 2.5
    q = oracles.orthogonal(np.random.default_rng(0), 6, 4).astype(np.float32)
    values = measure_all("spread", [stretched, stretched.T, q, q.T, jnp.full((3, 5), -2.0)])
    np.testing.assert_allclose(values[0], expected, rtol=1e-5)
    assert abs(values[1] / expected - 1) > 0.1
    np.testing.assert_allclose(values[2], 0.0, atol=1e-6)
    assert values[3] > 0.01
    assert values[4] == 0


def test_the_spread_after_an_exact_polar_factor_of_a_gaussian_is_0_077():
    """Measured independently."""
    q = oracles.polar(normal((64, 256))).astype(np.float32)
    np.testing.assert_allclose(jax.jit(neuron_norm_spread)(q), 0.077, rtol=0.1)
    np.testing.assert_allclose(jax.jit(neuron_norm_spread)(oracles.mT(q)), 0.0, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64, jnp.bfloat16, jnp.float16])
def test_the_ratio_is_that_of_the_frobenius_norms(dtype):
    kind = dtype if dtype == np.complex64 else np.float32
    update = jnp.asarray(normal((2, 3, 6, 4), kind), dtype)
    weight = jnp.asarray(30 * normal((2, 3, 6, 4), kind, seed=1), dtype)
    value = jax.jit(update_to_weight_ratio)(update, weight)
    assert value.shape == (2, 3)
    assert value.dtype == np.float32
    expected = [np.linalg.norm(oracles.float64(x), axis=(-2, -1)) for x in (update, weight)]
    np.testing.assert_allclose(value, expected[0] / expected[1], rtol=1e-5)


def test_the_ratio_holds_at_every_scale():
    update, weight = normal((6, 4)), normal((6, 4), seed=1)
    expected = frobenius(oracles.float64(update)) / frobenius(oracles.float64(weight))
    scales = [(a, b) for a in SCALES for b in SCALES]
    updates, weights = (
        np.stack([x * np.float32(pair[i]) for pair in scales])
        for i, x in enumerate((update, weight))
    )
    value = np.asarray(jax.jit(update_to_weight_ratio)(updates, weights), np.float64)
    np.testing.assert_allclose(value, [expected * a / b for a, b in scales], rtol=1e-5)


def test_the_ratio_of_nothing_is_zero_and_of_something_to_nothing_infinite():
    zero, one = jnp.zeros((3, 4)), jnp.ones((3, 4))
    assert update_to_weight_ratio(zero, one) == 0
    assert update_to_weight_ratio(zero, zero) == 0
    assert update_to_weight_ratio(one, zero) == jnp.inf
    assert jnp.isnan(update_to_weight_ratio(one * jnp.nan, one))


# --- the spectral norm with memory


@pytest.mark.parametrize("dtype", ["float16", "complex64"])
def test_the_memory_of_the_spectral_norm_is_a_vector_per_matrix(dtype):
    measure = warm_spectral_norm()
    assert isinstance(measure, WithMemory)
    for shape in [(6, 4), (2, 3, 4, 6)]:
        memory = measure.init(jax.ShapeDtypeStruct(shape, dtype))
        w = jnp.asarray(normal(shape), dtype)
        np.testing.assert_array_equal(memory, measure.init(w))
        value, after = jax.jit(measure.apply)(w, memory)
        assert value.shape == shape[:-2]
        assert value.dtype == np.float32
        for vector in (memory, after):
            assert vector.shape == (*shape[:-2], shape[-1])
            assert vector.dtype == (np.complex64 if dtype == "complex64" else np.float32)
            assert np.asarray(vector).any()


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_from_call_to_call_the_spectral_norm_is_reached_from_below(dtype):
    for shape in [(12, 8), (3, 8, 12)]:
        w = normal(shape, dtype)
        exact = np.linalg.norm(oracles.float64(w), 2, axis=(-2, -1))
        measure = warm_spectral_norm()

        def call(memory, _, w=w, apply=measure.apply):
            value, memory = apply(w, memory)
            return memory, value

        run = functools.partial(jax.lax.scan, call, length=60)
        values = np.asarray(jax.jit(run)(jax.jit(measure.init)(w))[1])
        assert (values <= exact * (1 + 1e-5)).all()
        assert (values[0] < 0.98 * exact).any()
        np.testing.assert_allclose(values[-1], exact, rtol=1e-3)


def test_several_steps_at_a_call_get_as_far_as_several_calls():
    w = normal((12, 8))
    slow, fast = warm_spectral_norm(), warm_spectral_norm(4)
    memory = start = jax.jit(slow.init)(w)
    for _ in range(4):
        value, memory = jax.jit(slow.apply)(w, memory)
    np.testing.assert_allclose(jax.jit(fast.apply)(w, start)[0], value, rtol=1e-4)


def test_the_spectral_norm_with_memory_holds_at_every_scale_and_bears_zero():
    measure = warm_spectral_norm(100)
    apply, w = jax.jit(measure.apply), normal((6, 4))
    memory, exact = jax.jit(measure.init)(w), np.linalg.norm(oracles.float64(w), 2)
    for scale in np.float32(SCALES):
        value, memory = apply(scale * w, memory)
        np.testing.assert_allclose(value, exact * scale, rtol=1e-4)
        value, memory = apply(0 * w, memory)
        assert value == 0


# --- in optax

PARAMS = {
    "blocks": [
        {"up": {"kernel": normal((6, 4)), "bias": normal((4,), seed=1)}},
        {"up": {"kernel": normal((6, 4), seed=2), "bias": normal((4,), seed=3)}},
    ],
    "query": {"kernel": normal((6, 2, 3), seed=4), "bias": normal((2, 3), seed=5)},
    "fused": {"kernel": normal((6, 9), seed=6)},
    "scale": normal((6,), seed=7),
}
RULES = orthax.PathRules(
    (
        (r"query/kernel", MuonDimensionNumbers(0, (1, 2))),
        (r"query/bias", None),
        (r"fused/kernel", orthax.Packed(MuonDimensionNumbers(0, 1), 1, (4, 3, 2))),
    )
)
GRADS = jax.tree.map(lambda x: normal(x.shape, seed=x.size), PARAMS)


def matrices_of(tree):
    """Paths of the matrices among the leaves, and what they are."""
    fused = tree["fused"]["kernel"]
    return {
        "blocks/0/up/kernel": tree["blocks"][0]["up"]["kernel"],
        "blocks/1/up/kernel": tree["blocks"][1]["up"]["kernel"],
        "query/kernel": np.reshape(tree["query"]["kernel"], (6, 6)),
        "fused/kernel": (fused[:, :4], fused[:, 4:7], fused[:, 7:]),
    }


def of_each(function, *trees):
    """What a function gives for the matrices of the trees; of the packed leaf, a tuple."""
    opened = [matrices_of(tree) for tree in trees]
    return {
        path: tuple(map(function, *parts)) if isinstance(parts[0], tuple) else function(*parts)
        for path, parts in ((path, [tree[path] for tree in opened]) for path in opened[0])
    }


def assert_measured(actual, expected, rtol=1e-4):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert set(actual) == set(expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), actual, expected)


def first_update(tx, updates, params):
    """Updates and state after one, as a single program."""
    return jax.jit(lambda updates, params: tx.update(updates, tx.init(params), params))(
        updates, params
    )


def test_a_snapshot_takes_the_updates_where_it_stands_in_the_chain():
    tx = optax.chain(
        optax.snapshot("before", of_updates(effective_rank, RULES)),
        optax.scale(-0.1),
        optax.snapshot("after", of_updates(singular_values, RULES)),
        optax.scale(5.0),
    )
    updates, state = first_update(tx, GRADS, PARAMS)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.5 * g, rtol=1e-5), updates, GRADS)
    before, after = optax.tree.get(state, "before"), optax.tree.get(state, "after")
    assert_measured(before, of_each(functools.partial(formula, "effective rank"), GRADS))
    scaled = jax.tree.map(lambda g: -0.1 * g, GRADS)
    assert_measured(after, of_each(functools.partial(formula, "singular values"), scaled))


def test_a_monitor_takes_updates_and_params_and_both():
    tx = optax.chain(
        optax.scale(-0.1),
        optax.monitor(
            {
                "update": of_updates(effective_rank, RULES),
                "error": of_params(orthogonality_error, RULES),
                "ratio": of_both(update_to_weight_ratio, RULES),
            }
        ),
        optax.scale(3.0),
    )
    state, params = jax.jit(tx.init)(PARAMS), PARAMS
    for _ in range(2):
        updates, state = jax.jit(tx.update)(GRADS, state, params)
        get = functools.partial(optax.tree.get, state)
        expected = of_each(functools.partial(formula, "effective rank"), GRADS)
        assert_measured(get("update"), expected)
        expected = of_each(functools.partial(formula, "frobenius"), params)
        assert_measured(get("error"), expected)

        def ratio(update, weight):
            return 0.1 * frobenius(oracles.float64(update)) / frobenius(oracles.float64(weight))

        assert_measured(get("ratio"), of_each(ratio, GRADS, params))
        params = optax.apply_updates(params, updates)


def test_a_measure_of_both_is_given_the_update_first():
    tx = optax.monitor({"pair": of_both(lambda update, weight: (update, weight))})
    params, grads = {"kernel": normal((3, 2))}, {"kernel": normal((3, 2), seed=1)}
    _, state = first_update(tx, grads, params)
    update, weight = optax.tree.get(state, "pair")["kernel"]
    np.testing.assert_array_equal(update, grads["kernel"])
    np.testing.assert_array_equal(weight, params["kernel"])


def test_the_default_rule_decides_without_dimension_numbers():
    params = {
        "layer": {"kernel": normal((6, 4)), "bias": normal((4,))},
        "embedding": normal((10, 6)),
        "norm": {"scale": normal((6,))},
    }
    rows = orthax.explain(params).rows
    tx = optax.monitor({"rank": of_params(effective_rank), "norm": of_updates(singular_values)})
    _, state = first_update(tx, params, params)
    for name in ("rank", "norm"):
        found = optax.tree.get(state, name)
        assert set(found) == {row.path for row in rows if row.destination == "matrices"}
        assert "layer/kernel" in found
        assert "layer/bias" not in found


def test_dimension_numbers_may_be_those_of_all_leaves_or_a_tree_or_a_function():
    params = {"a": normal((4, 2, 3)), "b": normal((4, 3, 2), seed=1)}
    numbers = MuonDimensionNumbers(0, (1, 2))
    forms = [numbers, {"a": numbers, "b": numbers}, lambda params: {"a": numbers, "b": numbers}]
    expected = {
        path: np.linalg.svd(x.reshape(4, 6), compute_uv=False) for path, x in params.items()
    }
    for form in forms:
        tx = optax.monitor({"s": of_params(singular_values, form)})
        _, state = first_update(tx, params, params)
        assert_measured(optax.tree.get(state, "s"), expected)
    tx = optax.monitor({"s": of_updates(singular_values, {"a": numbers, "b": None})})
    _, state = tx.update(params, tx.init(params))
    assert set(optax.tree.get(state, "s")) == {"a"}


def test_a_batch_axis_gives_a_number_for_each_matrix():
    params = {"experts": normal((3, 6, 4))}
    tx = optax.monitor({"rank": of_params(effective_rank, MuonDimensionNumbers(1, 2))})
    _, state = first_update(tx, params, params)
    expected = formula("effective rank", params["experts"])
    np.testing.assert_allclose(optax.tree.get(state, "rank")["experts"], expected, rtol=1e-4)


def test_holes_in_the_tree_pass():
    params = {"a": {"kernel": normal((6, 4))}, "b": None, "c": optax.MaskedNode()}
    tx = optax.monitor({"u": of_updates(effective_rank), "p": of_params(effective_rank)})
    _, state = first_update(tx, params, params)
    for name in ("u", "p"):
        assert set(optax.tree.get(state, name)) == {"a/kernel"}


def test_a_measure_with_memory_carries_its_vectors_from_update_to_update():
    measure = warm_spectral_norm()
    tx = optax.monitor({"norm": of_params(measure, RULES)})
    state = jax.jit(tx.init)(PARAMS)
    memories = jax.jit(functools.partial(of_each, measure.init))(PARAMS)
    carried = jax.tree.leaves(state)
    assert sorted(x.shape for x in carried) == sorted(x.shape for x in jax.tree.leaves(memories))
    update = jax.jit(tx.update)
    apply = jax.jit(measure.apply)
    for _ in range(3):
        _, state = update(PARAMS, state, PARAMS)
        pairs = {}
        for path, matrices in matrices_of(PARAMS).items():
            if isinstance(matrices, tuple):
                pairs[path] = tuple(map(apply, matrices, memories[path]))
                memories[path] = tuple(memory for _, memory in pairs[path])
                pairs[path] = tuple(value for value, _ in pairs[path])
            else:
                pairs[path], memories[path] = apply(matrices, memories[path])
        assert_measured(optax.tree.get(state, "norm"), pairs)
    for _ in range(40):
        _, state = update(PARAMS, state, PARAMS)
    exact = of_each(lambda w: np.linalg.norm(oracles.float64(w), 2), PARAMS)
    assert_measured(optax.tree.get(state, "norm"), exact, rtol=1e-2)


def test_the_memory_starts_from_shapes_alone():
    tx = optax.monitor({"norm": of_params(warm_spectral_norm(), RULES)})
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS))
    actual = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(tx.init, shapes))
    assert actual == jax.tree.map(lambda x: (x.shape, x.dtype), jax.jit(tx.init)(PARAMS))


def test_a_snapshot_keeps_the_structure_of_its_state_through_a_scan():
    tx = optax.chain(
        optax.sgd(0.1), optax.snapshot("rank", of_updates(effective_rank, RULES)), optax.scale(1.0)
    )

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), optax.tree.get(state, "rank")

    path = [jax.tree.map(lambda g, t=t: g + t, GRADS) for t in range(3)]
    init = jax.jit(tx.init)(PARAMS)
    stack = jax.tree.map(lambda *grads: np.stack(grads), *path)
    (_, state), ranks = jax.jit(functools.partial(jax.lax.scan, step))((PARAMS, init), stack)
    assert jax.tree.structure(state) == jax.tree.structure(init)
    for t, grads in enumerate(path):
        expected = of_each(functools.partial(formula, "effective rank"), grads)
        assert_measured(jax.tree.map(lambda x, t=t: x[t], ranks), expected)


def test_after_the_first_update_a_monitor_with_memory_can_be_scanned_too():
    tx = optax.monitor({"norm": of_updates(warm_spectral_norm(), RULES)})
    _, state = first_update(tx, GRADS, PARAMS)

    def step(state, _):
        return tx.update(GRADS, state, PARAMS)[1], None

    last, _ = jax.jit(functools.partial(jax.lax.scan, step, length=80))(state)
    exact = of_each(lambda w: np.linalg.norm(oracles.float64(w), 2), GRADS)
    assert_measured(optax.tree.get(last, "norm"), exact, rtol=1e-2)


def test_updates_pass_a_monitor_unchanged():
    tx = optax.monitor({"norm": of_params(orthogonality_error, RULES)})
    updates, _ = first_update(tx, GRADS, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, updates, GRADS)


def test_a_measure_of_updates_needs_none():
    tx = optax.monitor({"x": of_updates(effective_rank, RULES)})
    _, state = jax.jit(lambda updates: tx.update(updates, tx.init(updates)))(GRADS)
    assert_measured(
        optax.tree.get(state, "x"), of_each(functools.partial(formula, "effective rank"), GRADS)
    )


# --- measures by path, of leaves as they are


def test_rules_measure_each_leaf_as_it_is_and_heads_too():
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 4), "head": (5, 2), "dense": (4, 3)}
    params = {
        name: {"kernel": jnp.asarray(rng.standard_normal(shape), jnp.float32), "bias": jnp.ones(2)}
        for name, shape in shapes.items()
    }
    strided = functools.partial(convolution_orthogonality, strides=2)
    rules = orthax.PathRules(
        ((r"conv/kernel$", strided), (r"dense", None), (r"head/kernel$", stable_rank))
    )
    ratios = orthax.PathRules(((r"head/kernel$", update_to_weight_ratio),))
    measures = {"found": of_params(rules), "ratio": of_both(ratios)}
    tx = optax.chain(optax.scale(0.5), optax.monitor(measures))
    _, state = first_update(tx, params, params)
    found, ratio = (optax.tree.get(state, name) for name in ("found", "ratio"))
    assert set(found) == {"conv/kernel", "head/kernel"}
    assert found["conv/kernel"] == pytest.approx(float(strided(params["conv"]["kernel"])), rel=1e-5)
    head = np.asarray(params["head"]["kernel"], np.float64)
    exact = (head**2).sum() / np.linalg.norm(head, 2) ** 2
    assert found["head/kernel"] == pytest.approx(exact, rel=1e-3)
    assert ratio == {"head/kernel": pytest.approx(0.5)}
    assert set(of_updates(rules)(params)) == set(found)


# --- for loggers


def test_scalars_are_the_measures_of_monitors_and_snapshots_by_name_and_path():
    last = MuonDimensionNumbers(-2, -1)
    ratio = of_both(update_to_weight_ratio, last)
    tx = optax.chain(
        optax.snapshot("size", of_updates(orthogonality_error, last)),
        optax.sgd(0.1),
        optax.monitor({"ratio": ratio, "loss": lambda u: jnp.float32(2)}),
    )
    stacked = {"kernel": jnp.stack([jnp.eye(3), 2 * jnp.eye(3)])}
    params = {"up": {"kernel": 2 * jnp.eye(3)}, "experts": stacked}
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    found = scalars(state)
    assert all(isinstance(value, float) for value in found.values())
    expected = {
        "size/up/kernel": 3 * 3**0.5,
        "size/experts/kernel/0": 0.0,
        "size/experts/kernel/1": 3 * 3**0.5,
        "ratio/up/kernel": 0.1,
        "ratio/experts/kernel/0": 0.1,
        "ratio/experts/kernel/1": 0.1,
        "loss": 2.0,
    }
    assert found == pytest.approx(expected, abs=1e-5)


def test_scalars_of_a_traced_state_are_refused_by_name():
    tx = optax.monitor({"error": of_params(orthogonality_error)})
    params = {"up": {"kernel": jnp.eye(3)}}

    @jax.jit
    def step(params):
        return scalars(tx.update(params, tx.init(params), params)[1])

    with pytest.raises(TypeError, match="'error/up/kernel' is traced"):
        step(params)
    assert scalars(optax.sgd(0.1).init(params)) == {}


# --- gradients of measures


def test_gradients_at_equal_lengths_and_of_rank_deficient_matrices():
    for w in (jnp.eye(4, 3), jnp.ones((3, 3)), jnp.zeros((3, 2))):
        np.testing.assert_array_equal(jax.grad(neuron_norm_spread)(w), np.zeros(w.shape))
    np.testing.assert_array_equal(jax.grad(effective_rank)(jnp.zeros((3, 2))), np.zeros((3, 2)))
    # exp(H) of the shares p of the singular values: its slope along s_i is -e^H (log p_i + H) / S.
    p = np.array([0.75, 0.25])
    entropy = -np.sum(p * np.log(p))
    expected = np.zeros((3, 3))
    expected[:2, :2] = np.diag(-np.exp(entropy) * (np.log(p) + entropy) / 4)
    found = jax.grad(effective_rank)(jnp.diag(jnp.array([3.0, 1.0, 0.0])))
    np.testing.assert_allclose(found[:2, :2], expected[:2, :2], atol=1e-6)
    assert np.isfinite(found).all()
