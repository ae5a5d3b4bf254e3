"""What holds for every optimizer alike and is no rule of optax (tests/test_contract.py)."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from helpers import normal, normal_tree
from paths import updates_of

import orthax

NUMBERS = {"b1": 0.7, "b2": 0.95, "eps": 1e-3}
dct_adamw = functools.partial(orthax.dct_adamw, rank=3, error_feedback=True)
trion = functools.partial(orthax.trion, rank=3)
OPTIMIZERS = {
    "muon": orthax.muon,
    "normuon": orthax.normuon,
    "root": orthax.root,
    "auon": orthax.auon,
    "auon(code)": functools.partial(orthax.auon, mode="code", gamma=1.5),
    "auon(rms)": functools.partial(orthax.auon, mode="rms"),
    "hybrid_auon": orthax.hybrid_auon,
    "trion": trion,
    "trion(svd, int8)": functools.partial(trion, basis="svd", mu_dtype="int8"),
    "trion(subspace, int4)": functools.partial(trion, basis="subspace", mu_dtype="int4"),
    "dct_adamw": functools.partial(dct_adamw, **NUMBERS),
    "dct_adamw(global, svd)": functools.partial(
        dct_adamw, basis="svd", bias_correction="global", **NUMBERS
    ),
}
# Their root mean square, relative to a fifth of the learning rate, whatever the gradients.
RMS = {
    "muon": (0.7, 1.3),
    "normuon": (0.7, 1.3),
    "root": (0.6, 1.4),
    "auon": (0.98, 1.02),
    "hybrid_auon": (0.70, 3.44),
}
MODEL = {"Dense_0": {"kernel": (8, 12), "bias": (12,)}, "Embed_0": {"embedding": (11, 8)}}
SHAPES = {"expanding": (10, 24), "contracting": (24, 10), "layers": (3, 6, 10)}
stacked = {"dimension_numbers": optax.contrib.MuonDimensionNumbers(-2, -1)}

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def others(tree):
    return [tree["Dense_0"]["bias"], tree["Embed_0"]["embedding"]]


@every_optimizer
def test_leaves_that_are_not_matrices_follow_adamw_with_its_numbers(name):
    params, grads = normal_tree(MODEL), [normal_tree(MODEL, seed) for seed in (1, 2, 3)]
    numbers = NUMBERS if name.startswith("dct_adamw") else {}
    ours = updates_of(OPTIMIZERS[name](0.01, weight_decay=0.1), params, grads)
    theirs = updates_of(optax.adamw(0.01, weight_decay=0.1, **numbers), params, grads)
    for pair in zip(ours, theirs, strict=True):
        for actual, expected in zip(*map(others, pair), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9)


@every_optimizer
def test_a_layer_without_gradient_does_not_move(name):
    params, g = normal_tree(SHAPES), normal_tree(SHAPES, 1)
    g["contracting"] = np.zeros_like(g["contracting"])
    for updates in updates_of(OPTIMIZERS[name](0.1, **stacked), params, [g, g]):
        assert not np.asarray(updates["contracting"]).any()
        assert np.asarray(updates["expanding"]).any()
        assert all(np.isfinite(u).all() for u in updates.values())


@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_the_fallback_may_be_any_transformation_and_no_params_are_needed_without_decay(name):
    params, g = normal_tree(MODEL), normal_tree(MODEL, 1)
    optimizer = OPTIMIZERS[name](0.01, fallback=optax.sgd(0.5))
    updates, _ = jax.jit(optimizer.update)(g, optimizer.init(params))
    for actual, gradient in zip(*map(others, (updates, g)), strict=True):
        np.testing.assert_allclose(actual, -0.5 * gradient, rtol=1e-6)
    kernel = oracles.float64(updates["Dense_0"]["kernel"])
    assert np.sqrt((kernel**2).mean()) == pytest.approx(0.002, rel=0.3)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float16") for name in RMS), ("auon", "bfloat16")]
)
def test_updates_of_16_bit_gradients_of_a_thousand_have_their_scale_and_dtype(name, dtype):
    g = normal_tree(SHAPES, 1)
    g = jax.tree.map(lambda x: jnp.asarray(1e3 * np.sign(x), dtype), g)
    optimizer = OPTIMIZERS[name](0.01, **stacked)
    *_, updates = updates_of(optimizer, jax.tree.map(np.zeros_like, g), [g] * 45)
    least, most = RMS[name]
    for leaf, u in updates.items():
        assert u.dtype == dtype
        rms = np.sqrt((oracles.float64(u) ** 2).mean((-2, -1)))
        assert (0.002 * least < rms).all(), (leaf, rms)
        assert (rms < 0.002 * most).all(), (leaf, rms)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("trion", {}),
        ("dct_adamw", {}),
        ("hybrid_auon", {}),
        ("muon", {"mu_dtype": jnp.bfloat16}),
    ],
)
def test_what_cannot_be_injected_is_refused_with_the_line_to_write(name, options):
    params = {"dense": {"kernel": jnp.asarray(normal((16, 32)))}}
    plain = optax.inject_hyperparams(getattr(orthax, name))(learning_rate=0.1, **options)
    with pytest.raises(TypeError) as raised:
        plain.init(params)
    (line,) = re.findall(r"optax\.inject_hyperparams\(.*\)\(", str(raised.value))
    names = {"optax": optax, "orthax": orthax, "options": options}
    made = eval(f"{line}learning_rate=0.1, **options)", names)
    state = made.init(params)
    updates, _ = jax.jit(made.update)(params, state, params)
    expected = getattr(orthax, name)(0.1, **options)
    theirs, _ = expected.update(params, expected.init(params), params)
    chex.assert_trees_all_close(updates, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["trion", "dct_adamw"])
def test_without_a_rank_it_is_a_quarter_of_the_shorter_side(name):
    params = {"dense": {"kernel": jnp.ones((64, 24))}}
    state = jax.eval_shape(getattr(orthax, name)(0.1).init, params)
    subspaces = optax.tree.get(state, "subspaces")
    assert [x.shape for x in jax.tree.leaves(subspaces)] == [(6,)]


@pytest.mark.parametrize("name", ["muon", "normuon", "root", "trion", "dct_adamw"])
def test_a_real_loss_of_complex_params_falls_along_the_conjugate_of_the_gradient(name):
    optimizer = getattr(orthax, name)(optax.linear_schedule(0.1, 0.0, 40))
    a, exact = (normal(shape, np.complex64, seed=1) for shape in ((32, 16), (16, 24)))
    b = a @ exact

    def loss_of(params):
        return jnp.mean(jnp.abs(a @ params["dense"]["kernel"] - b) ** 2)

    @functools.partial(jax.jit, static_argnums=0)
    def trained(conjugate):
        def step(carry, _):
            params, state = carry
            g = jax.grad(loss_of)(params)
            g = jax.tree.map(jnp.conj, g) if conjugate else g
            updates, state = optimizer.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"dense": {"kernel": jnp.zeros((16, 24), jnp.complex64)}}
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=40)
        return loss_of(params)

    start = np.mean(np.abs(b) ** 2)
    assert trained(True) < 0.8 * start
    assert trained(False) > 0.9 * start
