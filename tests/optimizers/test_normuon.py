import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import tolerances
from paths import run, updates_of

import orthax
from orthax.linalg import coefficients, newton_schulz, polar_svd

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "reference.npz"
LEAVES = ["tall", "wide", "square"]
# Flax kernels: an expanding layer has more neurons (columns) than inputs, "tall" in PyTorch.
SHAPES = {"expanding": (10, 24), "contracting": (24, 10)}

settings = {
    "orthogonalizer": orthax.orthogonalize(newton_schulz, coefficients=coefficients.MUON),
    "shape_scale": orthax.scale_by_width(),
}
published = functools.partial(orthax.normuon, **settings)


def normal_tree(seed, shapes=SHAPES, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def assert_follows(optimizer, expected, *, shapes=SHAPES, limit=tolerances.GOLDEN_STEP):
    """The path is that of the oracle, within `limit` of the largest entry of each step."""
    params = normal_tree(0, shapes, 0.1)
    grads = [normal_tree(seed, shapes) for seed in range(100, 105)]
    paths = {
        leaf: [params[leaf], *expected(params[leaf], [g[leaf] for g in grads])] for leaf in params
    }
    for t, after in enumerate(run(optimizer, params, grads)):
        for leaf, path in paths.items():
            step = np.abs(path[t + 1] - path[t]).max()
            assert np.abs(after[leaf] - path[t + 1]).max() < limit * step, (t, leaf)


def log_normal_neurons(seed=0, shape=(64, 256)):
    """Gradient whose neurons differ in scale."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.standard_normal(shape[1]))
    return {"w": (rng.standard_normal(shape) * scale).astype(np.float32)}


# --- the published algorithm


def test_it_follows_the_published_code_for_six_steps():
    data = np.load(GOLDEN)
    params = {leaf: data[f"normuon/p0/{leaf}"].T for leaf in LEAVES}
    grads = [{leaf: data[f"normuon/g{t}/{leaf}"].T for leaf in LEAVES} for t in range(6)]
    optimizer = published(0.02, 0.95, 0.95, weight_decay=0.1)
    for t, after in enumerate(run(optimizer, params, grads)):
        for leaf in LEAVES:
            expected = data[f"normuon/p{t + 1}/{leaf}"].T
            step = np.abs(expected - data[f"normuon/p{t}/{leaf}"].T).max()
            assert np.abs(after[leaf] - expected).max() < tolerances.GOLDEN_STEP * step, (t, leaf)


@pytest.mark.parametrize("leaf", LEAVES)
def test_the_oracle_follows_the_published_code_too(leaf):
    data = np.load(GOLDEN)
    grads = [data[f"normuon/g{t}/{leaf}"].T for t in range(6)]
    path = oracles.normuon(data[f"normuon/p0/{leaf}"].T, grads, 0.02, weight_decay=0.1)
    for t, after in enumerate(path):
        expected = data[f"normuon/p{t + 1}/{leaf}"].T
        step = np.abs(expected - data[f"normuon/p{t}/{leaf}"].T).max()
        assert np.abs(after - expected).max() < 1e-4 * step


@pytest.mark.parametrize(
    ("momentum", "decay", "nesterov"), [(0.5, 0.8, True), (0.9, 0.95, False), (0.9, 0.0, True)]
)
def test_it_follows_the_transcription(momentum, decay, nesterov):
    options = {"nesterov": nesterov, "weight_decay": 0.1}
    assert_follows(
        published(0.05, momentum, decay, **options),
        lambda p, g: oracles.normuon(p, g, 0.05, momentum=momentum, decay=decay, **options),
    )


def test_the_default_moments_are_the_published_ones_also_for_scanned_stacks_of_layers():
    assert_follows(
        published(0.05, dimension_numbers=optax.contrib.MuonDimensionNumbers(-2, -1)),
        lambda p, g: oracles.normuon(p, g, 0.05),
        shapes={"layers": (3, 6, 10), "layer": (6, 10)},
    )


def test_the_shape_scale_multiplies_the_normalised_direction_and_not_the_decay():
    factor = oracles.adam_rms_factor
    assert_follows(
        published(0.05, weight_decay=0.3, shape_scale=orthax.scale_by_adam_rms()),
        lambda p, g: oracles.normuon(p, g, 0.05, weight_decay=0.3, factor=factor),
    )


def test_the_measured_scale_is_the_one_of_the_paper():
    """0.2 sqrt(mn) / |O|_F: root mean square 0.2 times the learning rate, whatever the rank."""
    rng = np.random.default_rng(0)
    low_rank = rng.standard_normal((24, 2)) @ rng.standard_normal((2, 16))
    optimizer = orthax.normuon(0.01, shape_scale=orthax.scale_to_rms())
    (updates,) = updates_of(
        optimizer, {"w": np.zeros((24, 16), np.float32)}, [{"w": low_rank.astype(np.float32)}]
    )
    assert np.sqrt((oracles.float64(updates["w"]) ** 2).mean()) == pytest.approx(0.002, rel=1e-5)


# --- beside Muon


def test_neurons_of_an_expanding_layer_move_alike_as_they_do_not_under_muon():
    params, g = {"w": np.zeros((64, 256), np.float32)}, log_normal_neurons()
    (muon,) = updates_of(orthax.muon(1.0, **settings), params, [g])
    (normuon,) = updates_of(published(1.0), params, [g])
    assert oracles.spread(muon["w"], -2) > 0.4
    assert oracles.spread(normuon["w"], -2) < 1e-5
    assert np.linalg.norm(normuon["w"] - muon["w"]) > 0.2 * np.linalg.norm(muon["w"])
    np.testing.assert_allclose(np.linalg.norm(normuon["w"]), np.linalg.norm(muon["w"]), rtol=1e-5)


def test_an_accurate_direction_with_no_more_neurons_than_inputs_is_left_to_muon():
    rng = np.random.default_rng(0)
    spectrum = np.linspace(0.3, 1.0, 16)
    shapes = [(16, 16), (40, 16)]
    g = [oracles.matrix_with_spectrum(rng, *shape, spectrum, np.float32) for shape in shapes]
    orthogonalizer = orthax.orthogonalize(newton_schulz, coefficients=coefficients.minimax(8, 1e-3))
    grads = [[scale * x for x in g] for scale in np.float32([1.0, 3.0, 0.5])]
    exact = [-0.2 * max(x.shape) ** 0.5 * oracles.polar(x) for x in g]
    for name in ("muon", "normuon"):
        optimizer = getattr(orthax, name)(1.0, orthogonalizer=orthogonalizer)
        for updates in updates_of(optimizer, g, grads):
            for actual, expected in zip(updates, exact, strict=True):
                assert oracles.relative_error(actual, expected) < 1e-3, name


def test_an_exact_direction_moves_every_matrix_by_a_fifth_of_the_learning_rate():
    optimizer = orthax.normuon(0.01, orthogonalizer=orthax.orthogonalize(polar_svd))
    grads = [normal_tree(seed) for seed in (1, 2, 3)]
    for updates in updates_of(optimizer, normal_tree(0), grads):
        for u in updates.values():
            rms = np.sqrt((oracles.float64(u) ** 2).mean())
            assert rms == pytest.approx(0.2 * 0.01, rel=1e-5)


def test_the_second_moment_takes_one_number_a_neuron():
    params = normal_tree(0)

    def sizes(optimizer):
        return sum(leaf.size for leaf in jax.tree.leaves(optimizer.init(params)) if leaf.ndim)

    neurons = sum(shape[1] for shape in SHAPES.values())
    assert sizes(orthax.normuon(0.1)) - sizes(orthax.muon(0.1)) == neurons


# --- the other leaves, parameters, dtypes


def model_tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"Dense_0": {"kernel": (8, 12), "bias": (12,)}, "Embed_0": {"embedding": (11, 8)}}
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def test_leaves_that_are_not_matrices_follow_adamw():
    params, grads = model_tree(0), [model_tree(seed) for seed in (1, 2, 3)]
    ours = updates_of(orthax.normuon(0.01, weight_decay=0.1), params, grads)
    theirs = updates_of(optax.adamw(0.01, weight_decay=0.1), params, grads)
    for actual, expected in zip(ours, theirs, strict=True):
        for module, name in (("Dense_0", "bias"), ("Embed_0", "embedding")):
            np.testing.assert_allclose(
                actual[module][name], expected[module][name], rtol=1e-6, atol=1e-9
            )


def test_the_fallback_may_be_any_transformation_and_no_params_are_needed_without_decay():
    params, g = model_tree(0), model_tree(1)
    optimizer = orthax.normuon(0.01, fallback=optax.sgd(0.5))
    updates, _ = jax.jit(optimizer.update)(g, optimizer.init(params))
    np.testing.assert_allclose(updates["Dense_0"]["bias"], -0.5 * g["Dense_0"]["bias"], rtol=1e-6)
    kernel = oracles.float64(updates["Dense_0"]["kernel"])
    assert np.sqrt((kernel**2).mean()) == pytest.approx(0.002, rel=0.3)


def test_decay_without_params_says_what_is_missing():
    optimizer = orthax.normuon(0.01, weight_decay=0.1)
    params = normal_tree(0)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=r"(?s)normuon.*weight_decay.*params"):
        optimizer.update(params, state)


def test_the_learning_rate_may_be_a_schedule():
    params, grads = normal_tree(0, scale=0.1), [normal_tree(seed) for seed in range(1, 5)]
    path = run(published(lambda count: 0.1 / (1 + count), weight_decay=0.1), params, grads)
    directions = {}
    for leaf, p in params.items():
        sums = oracles.normuon(np.zeros_like(p), [g[leaf] for g in grads], 1.0)
        directions[leaf] = np.diff([np.zeros_like(p), *sums], axis=0)
    expected = {leaf: oracles.float64(p) for leaf, p in params.items()}
    for t, after in enumerate(path):
        rate = 0.1 / (1 + t)
        for leaf in params:
            expected[leaf] = expected[leaf] * (1 - 0.1 * rate) + rate * directions[leaf][t]
            np.testing.assert_allclose(after[leaf], expected[leaf], atol=2e-5)


def test_float16_gradients_of_a_thousand_stay_finite_and_keep_their_dtype():
    dtype = jnp.float16
    rng = np.random.default_rng(0)
    g = {"w": jnp.asarray(1e3 * np.sign(rng.standard_normal((8, 24))), dtype)}
    params = {"w": jnp.zeros((8, 24), dtype)}
    *_, updates = updates_of(orthax.normuon(0.01), params, [g] * 45)
    assert updates["w"].dtype == dtype
    w = oracles.float64(updates["w"])
    assert np.sqrt((w**2).mean()) == pytest.approx(0.002, rel=0.3)
    assert np.isfinite(w).all()


def test_a_layer_without_gradient_does_not_move():
    params = normal_tree(0)
    g = normal_tree(1)
    g["contracting"] = np.zeros_like(g["contracting"])
    for updates in updates_of(orthax.normuon(0.1), params, [g, g]):
        assert not np.asarray(updates["contracting"]).any()
        assert np.asarray(updates["expanding"]).any()
        assert all(np.isfinite(u).all() for u in updates.values())
