import functools

import numpy as np
import optax
import oracles
import paths
import pytest
from helpers import normal_tree
from paths import updates_of

import orthax
from orthax.linalg import coefficients, newton_schulz

# Flax kernels (fan_in, fan_out).
SHAPES = {"expanding": (10, 24), "contracting": (24, 10), "layers": (3, 6, 10)}

stacked = {"dimension_numbers": optax.contrib.MuonDimensionNumbers(-2, -1)}
repository = {"mode": "code", "gamma": 1.5, "shape_scale": optax.identity()}
REPOSITORY = {
    "auon": repository,
    "hybrid_auon": {name: value for name, value in repository.items() if name != "mode"},
}
ORACLE = {"auon": {}, "hybrid_auon": {"steps": 1, "mode": "code"}}  # the hybrid has one mode

every_optimizer = pytest.mark.parametrize("name", ORACLE)


tree = functools.partial(normal_tree, SHAPES)


def one(*_):
    """No shape factor."""
    return 1.0


def unit_norm_factor(fan_in, fan_out):
    return 0.2 * (fan_in * fan_out) ** 0.5


def assert_follows(optimizer, oracle):
    params, grads = tree(0, 0.1), [tree(seed) for seed in range(100, 105)]
    paths.assert_follows(optimizer, params, grads, oracle, limit=1e-5, floor=1e-6)


def rms(x):
    return np.sqrt((oracles.float64(x) ** 2).mean((-2, -1)))


# --- the published codes


@pytest.mark.parametrize(
    ("name", "momentum", "nesterov", "gamma", "mode"),
    [
        ("auon", 0.9, True, 1.0, {"mode": "paper"}),
        ("auon", 0.5, False, 2.0, {"mode": "paper"}),
        ("auon", 0.9, False, 3.0, {"mode": "code"}),
        ("auon", 0.5, True, 1.0, {"mode": "rms"}),
        ("hybrid_auon", 0.9, True, 1.0, {}),
        ("hybrid_auon", 0.5, False, 3.0, {}),
    ],
)
def test_it_follows_the_transcription(name, momentum, nesterov, gamma, mode):
    options = {"nesterov": nesterov, "gamma": gamma, "weight_decay": 0.1, **mode}
    optimizer = getattr(orthax, name)(
        0.05, momentum, shape_scale=orthax.scale_by_width(), **options, **stacked
    )
    expected = functools.partial(oracles.auon, momentum=momentum, **{**options, **ORACLE[name]})
    assert_follows(optimizer, lambda p, g: expected(p, g, 0.05))


@every_optimizer
def test_the_defaults_are_the_papers_at_the_rms_of_adam(name):
    expected = functools.partial(oracles.auon, factor=unit_norm_factor, **ORACLE[name])
    optimizer = getattr(orthax, name)(0.01, **stacked)
    assert_follows(optimizer, lambda p, g: expected(p, g, 0.01))


@pytest.mark.parametrize("steps", [2, 5])
def test_the_hybrid_takes_as_many_steps_of_muons_triple_as_it_is_told(steps):
    optimizer = orthax.hybrid_auon(0.05, steps=steps, **REPOSITORY["hybrid_auon"], **stacked)
    options = {"gamma": 1.5, "mode": "code", "steps": steps, "factor": one}
    assert_follows(optimizer, lambda p, g: oracles.auon(p, g, 0.05, **options))


# --- what AuON is


@pytest.mark.parametrize("size", [32, 64])
def test_the_repositorys_is_sgd_with_averaged_nesterov_momentum(size):
    """But for gamma^2 / 2N: 1.1e-3 for 32 x 32, 2.7e-4 for 64 x 64."""
    shapes = {"w": (size, size)}
    params, grads = normal_tree(shapes), [normal_tree(shapes, seed) for seed in range(1, 6)]
    sgd = optax.chain(optax.scale(1 - 0.95), optax.sgd(0.24, momentum=0.95, nesterov=True))
    ours = updates_of(orthax.auon(0.24, **repository), params, grads)
    theirs = updates_of(sgd, params, grads)
    for actual, expected in zip(ours, theirs, strict=True):
        norms = [np.linalg.norm(oracles.float64(updates["w"])) for updates in (actual, expected)]
        assert norms[1] / norms[0] - 1 == pytest.approx(1.5**2 / (2 * size**2), rel=0.01)
        assert oracles.relative_error(actual["w"] * (norms[1] / norms[0]), expected["w"]) < 2e-6


def test_updates_of_the_default_have_a_fifth_of_the_learning_rate_as_rms():
    params, grads = tree(0), [tree(seed) for seed in (1, 2, 3)]
    for updates in updates_of(orthax.auon(0.01, **stacked), params, grads):
        for leaf, u in updates.items():
            *_, m, n = SHAPES[leaf]
            # R is 1 + 1 / (2 m n).
            np.testing.assert_allclose(rms(u), 0.002, rtol=0.6 / (m * n), err_msg=leaf)


def test_the_brake_of_rms_divides_that_by_two_for_normal_momentum_and_stops_for_a_spike():
    shapes = {"w": (256, 256)}
    params, g = normal_tree(shapes), normal_tree(shapes, 1)
    optimizer = orthax.auon(0.01, mode="rms")
    (updates,) = updates_of(optimizer, params, [g])
    assert rms(updates["w"]) == pytest.approx(0.002 / 2.05, rel=0.02)
    g["w"][3, 4] = 1e3
    (updates,) = updates_of(optimizer, params, [g])
    assert rms(updates["w"]) < 1e-30


def test_nothing_is_orthogonalised_but_in_the_hybrid():
    rng = np.random.default_rng(0)
    x = oracles.matrix_with_spectrum(rng, 24, 24, np.linspace(1, 0.05, 24)).astype(np.float32)

    def condition(name, **options):
        (updates,) = updates_of(getattr(orthax, name)(0.1, **options), {"w": x}, [{"w": x}])
        return np.linalg.cond(oracles.float64(updates["w"]))

    assert condition("auon") == pytest.approx(20, rel=1e-3)
    assert condition("hybrid_auon") < 19
    assert condition("hybrid_auon", steps=5) < 3


def test_updates_of_the_hybrid_have_the_norm_of_one_step_for_that():
    """Between 0.70, for rank one, and 3.44 times the unit norm before it."""
    rng = np.random.default_rng(0)
    low = np.outer(rng.standard_normal(24), rng.standard_normal(40)).astype(np.float32)
    full = oracles.orthogonal(rng, 400, 400).astype(np.float32)
    for x, norm in ((low, 0.701), (full, 3.433)):
        (updates,) = updates_of(orthax.hybrid_auon(1.0), {"w": x}, [{"w": x}])
        assert rms(updates["w"]) == pytest.approx(0.2 * norm, rel=1e-3)


# --- arguments


def test_only_the_repositorys_auon_averages_its_momentum():
    """All else is normalised: there the factor does not matter."""
    params, g = tree(0), tree(1)

    def update(name, **options):
        return next(updates_of(getattr(orthax, name)(0.1, **options, **stacked), params, [g]))

    trace = optax.trace(0.95, nesterov=True)
    for name, options, ratio in (
        ("auon", {}, 1),
        ("auon", {"mode": "rms"}, 1),
        ("auon", repository, 0.05),
        ("hybrid_auon", {}, 1),
    ):
        number = update(name, **options)
        transformation = update(name, momentum=trace, **options)
        for leaf, u in number.items():
            np.testing.assert_allclose(u, ratio * transformation[leaf], rtol=1e-6, err_msg=leaf)


def test_an_average_given_as_momentum_is_taken_as_it_is():
    params, grads = tree(0), [tree(seed) for seed in (1, 2, 3)]
    average = optax.ema(0.95, debias=False)
    ours = updates_of(orthax.auon(0.1, average, **repository, **stacked), params, grads)
    options = {"nesterov": False, **repository, **stacked}
    theirs = updates_of(orthax.auon(0.1, 0.95, **options), params, grads)
    for actual, expected in zip(ours, theirs, strict=True):
        for leaf in SHAPES:
            # How the two round depends on the compiler: one entry of 240 is 1.1e-5 off.
            np.testing.assert_allclose(actual[leaf], expected[leaf], rtol=2e-5, atol=1e-9)


def test_the_steps_of_the_hybrid_are_those_of_orthogonalize():
    params, g = tree(0), tree(1)
    steps = orthax.orthogonalize(newton_schulz, coefficients=coefficients.MUON[:2])
    scale = {"shape_scale": optax.identity()}
    by_hand = orthax.muon(0.1, orthogonalizer=steps, **scale, **stacked)
    hybrid = orthax.hybrid_auon(0.1, steps=2, gamma=0.0, **scale, **stacked)
    (expected,), (actual,) = (updates_of(tx, params, [g]) for tx in (by_hand, hybrid))
    for leaf in SHAPES:
        np.testing.assert_allclose(actual[leaf], expected[leaf], rtol=1e-6)
