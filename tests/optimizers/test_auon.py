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
from orthax.linalg import coefficients, newton_schulz

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "reference.npz"
LEAVES = ["tall", "wide", "square"]
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


def one(*_):
    """No shape factor."""
    return 1.0


def unit_norm_factor(fan_in, fan_out):
    return 0.2 * (fan_in * fan_out) ** 0.5


def normal_tree(seed, shapes=SHAPES, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def assert_follows(optimizer, expected):
    """The path is that of the oracle."""
    params, grads = normal_tree(0, scale=0.1), [normal_tree(seed) for seed in range(100, 105)]
    paths = {leaf: [p, *expected(p, [g[leaf] for g in grads])] for leaf, p in params.items()}
    for t, after in enumerate(run(optimizer, params, grads)):
        for leaf, path in paths.items():
            step = np.abs(path[t + 1] - path[t]).max()
            error = np.abs(after[leaf] - path[t + 1]).max()
            assert error < 1e-5 * step + 1e-6 * np.abs(path[t]).max(), (t, leaf)


def golden(name, key):
    data = np.load(GOLDEN)
    return {leaf: data[f"{name}_code/{key}/{leaf}"].T for leaf in LEAVES}


WEIGHT_DECAY = {"auon": 0.01, "hybrid_auon": 0.0}  # of the golden data


def rms(x):
    return np.sqrt((oracles.float64(x) ** 2).mean((-2, -1)))


# --- the published codes


@every_optimizer
def test_it_follows_the_repository_for_six_steps(name):
    params, grads = golden(name, "p0"), [golden(name, f"g{t}") for t in range(6)]
    optimizer = getattr(orthax, name)(
        0.24, 0.95, weight_decay=WEIGHT_DECAY[name], **REPOSITORY[name]
    )
    for t, after in enumerate(run(optimizer, params, grads)):
        before, expected = golden(name, f"p{t}"), golden(name, f"p{t + 1}")
        for leaf in LEAVES:
            step = np.abs(expected[leaf] - before[leaf]).max()
            error = np.abs(after[leaf] - expected[leaf]).max()
            assert error < tolerances.GOLDEN_STEP * step, (t, leaf)


@every_optimizer
@pytest.mark.parametrize("leaf", LEAVES)
def test_the_oracle_follows_the_repository_too(name, leaf):
    grads = [golden(name, f"g{t}")[leaf] for t in range(6)]
    path = oracles.auon(
        golden(name, "p0")[leaf],
        grads,
        0.24,
        gamma=1.5,
        weight_decay=WEIGHT_DECAY[name],
        factor=one,
        **{"mode": "code", **ORACLE[name]},
    )
    for t, after in enumerate(path):
        expected = golden(name, f"p{t + 1}")[leaf]
        step = np.abs(expected - golden(name, f"p{t}")[leaf]).max()
        assert np.abs(after - expected).max() < 1e-4 * step


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
    params, grads = normal_tree(0, shapes), [normal_tree(seed, shapes) for seed in range(1, 6)]
    sgd = optax.chain(optax.scale(1 - 0.95), optax.sgd(0.24, momentum=0.95, nesterov=True))
    ours = updates_of(orthax.auon(0.24, **repository), params, grads)
    theirs = updates_of(sgd, params, grads)
    for actual, expected in zip(ours, theirs, strict=True):
        norms = [np.linalg.norm(oracles.float64(updates["w"])) for updates in (actual, expected)]
        assert norms[1] / norms[0] - 1 == pytest.approx(1.5**2 / (2 * size**2), rel=0.01)
        assert oracles.relative_error(actual["w"] * (norms[1] / norms[0]), expected["w"]) < 2e-6


def test_updates_of_the_default_have_a_fifth_of_the_learning_rate_as_rms():
    params, grads = normal_tree(0), [normal_tree(seed) for seed in (1, 2, 3)]
    for updates in updates_of(orthax.auon(0.01, **stacked), params, grads):
        for leaf, u in updates.items():
            *_, m, n = SHAPES[leaf]
            # R is 1 + 1 / (2 m n).
            np.testing.assert_allclose(rms(u), 0.002, rtol=0.6 / (m * n), err_msg=leaf)


def test_the_brake_of_rms_divides_that_by_two_for_normal_momentum_and_stops_for_a_spike():
    shapes = {"w": (256, 256)}
    params, g = normal_tree(0, shapes), normal_tree(1, shapes)
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
    params, g = normal_tree(0), normal_tree(1)

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
    params, grads = normal_tree(0), [normal_tree(seed) for seed in (1, 2, 3)]
    average = optax.ema(0.95, debias=False)
    ours = updates_of(orthax.auon(0.1, average, **repository, **stacked), params, grads)
    options = {"nesterov": False, **repository, **stacked}
    theirs = updates_of(orthax.auon(0.1, 0.95, **options), params, grads)
    for actual, expected in zip(ours, theirs, strict=True):
        for leaf in SHAPES:
            # How the two round depends on the compiler: one entry of 240 is 1.1e-5 off.
            np.testing.assert_allclose(actual[leaf], expected[leaf], rtol=2e-5, atol=1e-9)


def test_the_steps_of_the_hybrid_are_those_of_orthogonalize():
    params, g = normal_tree(0), normal_tree(1)
    steps = orthax.orthogonalize(newton_schulz, coefficients=coefficients.MUON[:2])
    scale = {"shape_scale": optax.identity()}
    by_hand = orthax.muon(0.1, orthogonalizer=steps, **scale, **stacked)
    hybrid = orthax.hybrid_auon(0.1, steps=2, gamma=0.0, **scale, **stacked)
    (expected,), (actual,) = (updates_of(tx, params, [g]) for tx in (by_hand, hybrid))
    for leaf in SHAPES:
        np.testing.assert_allclose(actual[leaf], expected[leaf], rtol=1e-6)


# --- the other leaves, dtypes


@every_optimizer
def test_leaves_that_are_not_matrices_follow_adamw(name):
    rng = np.random.default_rng(0)
    params = {"Dense_0": {"kernel": np.ones((8, 12), np.float32), "bias": np.ones(12, np.float32)}}
    grads = [
        jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), params)
        for _ in range(3)
    ]
    options = {**REPOSITORY[name], "weight_decay": 0.1}  # the average is of matrices alone
    ours = updates_of(getattr(orthax, name)(0.01, **options), params, grads)
    theirs = updates_of(optax.adamw(0.01, weight_decay=0.1), params, grads)
    for actual, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(
            actual["Dense_0"]["bias"], expected["Dense_0"]["bias"], rtol=1e-6, atol=1e-9
        )


@every_optimizer
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_gradients_of_a_thousand_stay_finite_and_keep_their_dtype(name, dtype):
    g = jax.tree.map(lambda x: jnp.asarray(1e3 * np.sign(x), dtype), normal_tree(1))
    optimizer = getattr(orthax, name)(0.01, **stacked)
    *_, updates = updates_of(optimizer, jax.tree.map(jnp.zeros_like, g), [g] * 45)
    for leaf, u in updates.items():
        assert u.dtype == dtype
        least, most = (0.70, 3.44) if name == "hybrid_auon" else (0.98, 1.02)
        assert (0.002 * least < rms(u)).all(), leaf
        assert (rms(u) < 0.002 * most).all(), leaf


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("auon", {"mode": mode}) for mode in ("paper", "code", "rms")),
        ("hybrid_auon", {}),
    ],
)
def test_a_layer_without_gradient_does_not_move(name, mode):
    params, g = normal_tree(0), normal_tree(1)
    g["contracting"] = np.zeros_like(g["contracting"])
    optimizer = getattr(orthax, name)(0.1, **mode, **stacked)
    for updates in updates_of(optimizer, params, [g, g]):
        assert not np.asarray(updates["contracting"]).any()
        assert np.asarray(updates["expanding"]).any()
        assert all(np.isfinite(u).all() for u in updates.values())
