"""add_penalty: its gradient, where in a chain, for which leaves, with what it carries along."""

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
from orthax.conv_penalties import convolution_orthogonality
from orthax.penalties import (
    WithMemory,
    double_soft_orthogonality,
    soft_orthogonality,
    spectral_restricted_isometry,
    warm_spectral_restricted_isometry,
)

SHAPES = {"square": (5, 5), "tall": (7, 4), "wide": (4, 7), "batch": (2, 6, 3)}
ADD_SOFT = orthax.add_penalty(soft_orthogonality, 0.3)


def params_and_gradients(shapes=SHAPES, scale=0.5):
    params = {
        name: np.float32(scale) * normal(s, seed=i) for i, (name, s) in enumerate(shapes.items())
    }
    gradients = {name: normal(s, seed=10 + i) for i, (name, s) in enumerate(shapes.items())}
    return params, gradients


@functools.cache
def compiled(transformation):
    """So that tests of one transformation and one shape compile once."""
    return jax.jit(transformation.update)


def apply(transformation, gradients, params, state=None):
    state = transformation.init(params) if state is None else state
    return compiled(transformation)(gradients, state, params)


def adjoint(w):
    return oracles.mT(w).conj()


def soft_gradient(w):
    """Of |W^H W - I|^2, or |W W^H - I|^2 where W is wide: the direction of steepest ascent."""
    w = oracles.float64(w)
    if w.shape[-2] < w.shape[-1]:
        return oracles.mT(soft_gradient(oracles.mT(w)))
    return 4 * w @ (adjoint(w) @ w - np.eye(w.shape[-1]))


def srip_gradient(w):
    """Of the largest |s^2 - 1|: 2 s u v^H with the sign of s^2 - 1."""
    u, s, vh = np.linalg.svd(oracles.float64(w), full_matrices=False)
    i = np.argmax(np.abs(s**2 - 1))
    return np.sign(s[i] ** 2 - 1) * 2 * s[i] * np.outer(u[:, i], vh[i])


def quartic(w):
    """A penalty for leaves of any rank."""
    return jnp.sum(jnp.abs(w) ** 4)


def quartic_gradient(w):
    return 4 * oracles.float64(w) ** 3


def close(actual, expected, rtol=2e-6):
    """To a part of the largest entry."""
    expected = oracles.float64(expected)
    np.testing.assert_allclose(
        oracles.float64(actual), expected, rtol=0, atol=rtol * max(1e-30, np.abs(expected).max())
    )


# --- the update


def test_the_gradient_at_the_params_is_added_to_the_updates():
    params, gradients = params_and_gradients()
    updates, _ = apply(ADD_SOFT, gradients, params)
    for name, u in updates.items():
        assert (u.shape, u.dtype) == (SHAPES[name], np.float32)
        close(u, gradients[name] + 0.3 * soft_gradient(params[name]))


def test_leaves_of_any_rank_that_the_penalty_takes_have_one():
    shapes = {"scalar": (), "bias": (5,), "kernel": (2, 3, 4), "empty": (0, 3)}
    params, gradients = params_and_gradients(shapes)
    updates, _ = apply(orthax.add_penalty(quartic, 2.0), gradients, params)
    for name, u in updates.items():
        if name != "empty":
            close(u, gradients[name] + 2 * quartic_gradient(params[name]))
    assert updates["empty"].shape == (0, 3)


def test_strength_zero_changes_nothing():
    params, gradients = params_and_gradients()
    updates, _ = apply(orthax.add_penalty(soft_orthogonality, 0.0), gradients, params)
    jax.tree.map(np.testing.assert_array_equal, updates, gradients)


def test_twice_the_strength_adds_twice_as_much():
    params, gradients = params_and_gradients({"tall": (7, 4)})
    zero = jax.tree.map(np.zeros_like, gradients)
    once, _ = apply(ADD_SOFT, zero, params)
    twice, _ = apply(orthax.add_penalty(soft_orthogonality, jnp.float32(0.6)), zero, params)
    close(twice["tall"], 2 * np.asarray(once["tall"]))


def test_it_reads_the_params_and_not_the_updates():
    params, gradients = params_and_gradients({"tall": (7, 4)})
    one, _ = apply(ADD_SOFT, gradients, params)
    other, _ = apply(ADD_SOFT, {"tall": 5 * gradients["tall"]}, params)
    close(other["tall"] - one["tall"], 4 * gradients["tall"])


def test_there_is_nothing_to_add_where_the_penalty_is_zero():
    w = oracles.orthogonal(np.random.default_rng(0), 7, 4).astype(np.float32)
    for penalty in (soft_orthogonality, double_soft_orthogonality):
        update, _ = apply(orthax.add_penalty(penalty, 10.0), np.zeros_like(w), w)
        np.testing.assert_allclose(update, 0, atol=2e-5)


# --- its place in a chain


def test_before_the_preconditioner_moments_see_it_and_after_it_they_do_not():
    rate, strength, steps = 0.02, 0.3, 6
    params, gradients = params_and_gradients({"tall": (7, 4)})
    w0, g = params["tall"], gradients["tall"]

    def path(*chain):
        chain = optax.chain(*chain, optax.scale_by_learning_rate(rate))
        w, state, result = jnp.asarray(w0), chain.init(w0), []
        for step in range(steps):
            update, state = compiled(chain)(g * (1 + step), state, w)
            w = optax.apply_updates(w, update)
            result.append(w)
        return result

    def by_hand(coupled, b1=0.9, b2=0.999):
        w, m, v, result = oracles.float64(w0), 0.0, 0.0, []
        for step in range(steps):
            gradient, penalty = oracles.float64(g) * (1 + step), strength * soft_gradient(w)
            x = gradient + coupled * penalty
            m, v = b1 * m + (1 - b1) * x, b2 * v + (1 - b2) * x**2
            corrected = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
            direction = corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
            w = w - rate * (direction + (1 - coupled) * penalty)
            result.append(w)
        return result

    penalty = orthax.add_penalty(soft_orthogonality, strength)
    coupled = path(penalty, optax.scale_by_adam())
    decoupled = path(optax.scale_by_adam(), penalty)
    for step in range(steps):
        np.testing.assert_allclose(coupled[step], by_hand(True)[step], atol=2e-5)
        np.testing.assert_allclose(decoupled[step], by_hand(False)[step], atol=2e-5)
    assert np.abs(coupled[-1] - decoupled[-1]).max() > 0.01


def test_after_muons_direction_it_is_a_step_beside_it():
    rate = 0.1
    params, gradients = params_and_gradients({"tall": (7, 4)})
    direction = optax.chain(optax.trace(0.9), orthax.orthogonalize(orthax.linalg.polar_svd))
    chain = optax.chain(direction, ADD_SOFT, optax.scale_by_learning_rate(rate))
    w = params["tall"]
    state, m = chain.init(params), 0.0
    for _ in range(3):
        updates, state = compiled(chain)(gradients, state, params)
        m = 0.9 * m + oracles.float64(gradients["tall"])
        expected = -rate * (oracles.polar(m) + 0.3 * soft_gradient(w))
        np.testing.assert_allclose(updates["tall"], expected, atol=1e-5)
        params = optax.apply_updates(params, updates)
        w = params["tall"]


@pytest.mark.parametrize("shape", [(6, 6), (8, 5), (5, 8)], ids=["square", "tall", "wide"])
def test_without_gradients_weights_become_orthogonal(shape):
    chain = optax.chain(
        orthax.add_penalty(soft_orthogonality, 0.5), optax.scale_by_learning_rate(0.1)
    )

    @jax.jit
    def train(w):
        def step(carry, _):
            w, state = carry
            update, state = chain.update(jnp.zeros_like(w), state, w)
            w = optax.apply_updates(w, update)
            return (w, state), soft_orthogonality(w)

        (w, _), values = jax.lax.scan(step, (w, chain.init(w)), length=200)
        return w, values

    w = 0.5 * normal(shape)
    trained, values = train(jnp.asarray(w))
    np.testing.assert_allclose(trained, oracles.polar(w), atol=1e-5)
    assert (np.diff(values) <= 1e-6).all()


# --- strength over time


def test_a_schedule_is_read_at_the_number_of_updates_before():
    params, gradients = params_and_gradients({"tall": (7, 4)})
    schedule = optax.piecewise_interpolate_schedule("linear", 0.5, {1: 2.0, 3: 0.0})
    transformation = orthax.add_penalty(soft_orthogonality, schedule)
    state = transformation.init(params)
    for count, strength in enumerate([0.5, 1.0, 0.5, 0.0, 0.0]):
        assert int(state.count) == count
        assert float(schedule(count)) == strength
        updates, state = apply(transformation, gradients, params, state)
        expected = gradients["tall"] + strength * soft_gradient(params["tall"])
        close(updates["tall"], expected)


def test_a_constant_strength_counts_too():
    params, gradients = params_and_gradients({"tall": (7, 4)})
    state = ADD_SOFT.init(params)
    for count in range(3):
        assert state.count.dtype == jnp.int32
        assert int(state.count) == count
        _, state = apply(ADD_SOFT, gradients, params, state)


def test_the_count_stops_at_its_largest():
    params, gradients = params_and_gradients({"tall": (7, 4)})
    largest = np.iinfo(np.int32).max
    state = ADD_SOFT.init(params)._replace(count=jnp.asarray(largest, jnp.int32))
    assert int(apply(ADD_SOFT, gradients, params, state)[1].count) == largest


@pytest.mark.parametrize("penalty", [soft_orthogonality, orthax.PathRules(((".", quartic),))])
def test_the_strength_can_be_a_hyperparameter(penalty):
    """Neither a penalty nor rules are taken for a schedule, if they are listed as static."""
    gradient_of = soft_gradient if penalty is soft_orthogonality else quartic_gradient
    params, gradients = params_and_gradients({"tall": (7, 4)})
    injected = optax.inject_hyperparams(orthax.add_penalty, static_args=("penalty",))
    transformation = injected(penalty=penalty, strength=0.1)
    state = transformation.init(params)
    for strength in (0.1, 0.7, 0.0):
        state.hyperparams["strength"] = jnp.asarray(strength)
        updates, state = apply(transformation, gradients, params, state)
        close(updates["tall"], gradients["tall"] + strength * gradient_of(params["tall"]))


def test_a_hyperparameter_can_follow_a_schedule():
    params, gradients = params_and_gradients({"tall": (7, 4)})
    injected = optax.inject_hyperparams(orthax.add_penalty, static_args=("penalty",))
    transformation = injected(soft_orthogonality, strength=optax.linear_schedule(1.0, 0.0, 2))
    state = transformation.init(params)
    for strength in (1.0, 0.5, 0.0):
        updates, state = apply(transformation, gradients, params, state)
        close(updates["tall"], gradients["tall"] + strength * soft_gradient(params["tall"]))


def test_updates_of_one_shape_are_traced_once():
    calls = []

    def penalty(w):
        calls.append(w.shape)
        return soft_orthogonality(w)

    params, gradients = params_and_gradients({"tall": (7, 4)})
    transformation = orthax.add_penalty(penalty, optax.linear_schedule(1.0, 0.0, 10))
    state, update = transformation.init(params), jax.jit(transformation.update)
    assert not calls
    updates, state = update(gradients, state, params)
    traced = len(calls)
    for _ in range(3):
        updates, state = update(updates, state, params)
    assert len(calls) == traced


# --- which leaves


def tree():
    flat = {"dense/kernel": (7, 4), "dense/bias": (4,), "head/kernel": (4, 7)}
    params, gradients = params_and_gradients(flat)

    def nest(x):
        return {
            "dense": {"kernel": x["dense/kernel"], "bias": x["dense/bias"]},
            "head": {"kernel": x["head/kernel"]},
        }

    return nest(params), nest(gradients)


def is_kernel(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


@pytest.mark.parametrize(
    ("mask", "penalised"),
    [
        (is_kernel, ("dense", "head")),
        ({"dense": {"kernel": True, "bias": False}, "head": {"kernel": False}}, ("dense",)),
        ({"dense": False, "head": True}, ("head",)),
        (False, ()),
    ],
    ids=["callable", "tree", "prefix", "none"],
)
def test_a_mask_says_which_leaves_have_the_penalty(mask, penalised):
    params, gradients = tree()
    updates, _ = apply(orthax.add_penalty(soft_orthogonality, 0.3, mask), gradients, params)
    np.testing.assert_array_equal(updates["dense"]["bias"], gradients["dense"]["bias"])
    for name in ("dense", "head"):
        g, w = gradients[name]["kernel"], params[name]["kernel"]
        added = 0.3 * soft_gradient(w) if name in penalised else 0
        close(updates[name]["kernel"], g + added)


def test_rules_give_every_path_its_own_penalty():
    """The first rule that fits; None is no penalty, and so is no rule."""
    params, gradients = tree()
    rules = orthax.PathRules(
        (
            (r"head/kernel", functools.partial(spectral_restricted_isometry, steps=100)),
            (r"dense/kernel$", soft_orthogonality),
            (r"kernel", quartic),
        )
    )
    updates, _ = apply(orthax.add_penalty(rules, 0.3), gradients, params)
    for name, gradient_of in {"dense": soft_gradient, "head": srip_gradient}.items():
        g, w = gradients[name]["kernel"], params[name]["kernel"]
        close(updates[name]["kernel"], g + 0.3 * gradient_of(w), rtol=1e-4)
    np.testing.assert_array_equal(updates["dense"]["bias"], gradients["dense"]["bias"])


def test_rules_may_say_none_and_give_a_default():
    params, gradients = tree()
    rules = orthax.PathRules(((r"dense/kernel", None), (r"bias", None)), default=quartic)
    updates, _ = apply(orthax.add_penalty(rules, 0.3), gradients, params)
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(updates["dense"][leaf], gradients["dense"][leaf])
    expected = gradients["head"]["kernel"] + 0.3 * quartic_gradient(params["head"]["kernel"])
    close(updates["head"]["kernel"], expected)


def test_init_warns_once_of_a_rule_that_matches_nothing():
    params, gradients = tree()
    rules = ((r"dense2/kernel", soft_orthogonality), (r"head/kernel", soft_orthogonality))
    tx = orthax.add_penalty(orthax.PathRules(rules), 0.3)
    said = "add_penalty: rule 'dense2/kernel' matches no leaf; the nearest path is 'dense/kernel'"
    with pytest.warns(UserWarning, match=said) as caught:
        state = tx.init(params)
    assert len(caught) == 1
    tx.update(gradients, state, params)  # warnings are errors
    strict = orthax.add_penalty(orthax.PathRules(rules, strict=True), 0.3)
    with pytest.raises(ValueError, match=said):
        strict.init(params)
    # Taken away by its own mask or one around: seen.
    rules = orthax.PathRules(((r"dense/kernel$", soft_orthogonality),), strict=True)
    for masked in (False, {"kernel": False, "bias": True}):
        mask = {"dense": masked, "head": True}
        orthax.add_penalty(rules, 0.3, mask).init(params)
        optax.masked(orthax.add_penalty(rules, 0.3), mask).init(params)


def test_rules_and_a_mask_both_have_to_agree():
    params, gradients = tree()
    rules = orthax.PathRules(((r"kernel", soft_orthogonality),))
    transformation = orthax.add_penalty(rules, 0.3, {"dense": True, "head": False})
    updates, _ = apply(transformation, gradients, params)
    expected = gradients["dense"]["kernel"] + 0.3 * soft_gradient(params["dense"]["kernel"])
    close(updates["dense"]["kernel"], expected)
    np.testing.assert_array_equal(updates["dense"]["bias"], gradients["dense"]["bias"])
    np.testing.assert_array_equal(updates["head"]["kernel"], gradients["head"]["kernel"])


def test_it_works_inside_masked_and_on_partitions():
    params, gradients = tree()
    by_mask, _ = apply(optax.masked(ADD_SOFT, is_kernel), gradients, params)
    labels = {"dense": {"kernel": "on", "bias": "off"}, "head": {"kernel": "on"}}
    partition = optax.partition({"on": ADD_SOFT, "off": optax.identity()}, labels)
    by_labels, _ = apply(partition, gradients, params)
    for updates in (by_mask, by_labels):
        for name in ("dense", "head"):
            g, w = gradients[name]["kernel"], params[name]["kernel"]
            close(updates[name]["kernel"], g + 0.3 * soft_gradient(w))
        np.testing.assert_array_equal(updates["dense"]["bias"], gradients["dense"]["bias"])


def test_inside_multi_steps_it_is_added_once_to_the_mean_of_the_gradients():
    params, gradients = params_and_gradients({"tall": (7, 4)})
    w, g = params["tall"], gradients["tall"]
    optimizer = optax.MultiSteps(optax.chain(ADD_SOFT, optax.sgd(0.1)), every_k_schedule=2)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    updates, state = update({"tall": g}, state, params)
    np.testing.assert_array_equal(updates["tall"], np.zeros_like(g))
    assert int(optax.tree.get(state, "count")) == 0
    updates, state = update({"tall": 3 * g}, state, params)
    close(updates["tall"], -0.1 * (2 * g + 0.3 * soft_gradient(w)))
    assert int(optax.tree.get(state, "count")) == 1


# --- what a penalty carries along

WARM = orthax.add_penalty(warm_spectral_restricted_isometry(), 1.0)


def test_memories_are_vectors_of_the_shorter_side_and_only_of_penalties_that_have_one():
    params, _ = tree()
    params["stack"] = {"kernel": jnp.zeros((2, 3, 6, 5), jnp.bfloat16)}
    rules = orthax.PathRules(
        ((r"dense/kernel|stack", warm_spectral_restricted_isometry()), (r"head", quartic))
    )
    memory = orthax.add_penalty(rules, 1.0).init(params).memory
    assert memory["dense"]["kernel"].shape == (4,)
    assert memory["stack"]["kernel"].shape == (2, 3, 5)
    assert {m.dtype for m in jax.tree.leaves(memory)} == {jnp.dtype("float32")}
    assert memory["dense"]["bias"] == memory["head"]["kernel"] == optax.MaskedNode()
    assert not jax.tree.leaves(ADD_SOFT.init({"kernel": jnp.ones((3, 2))}).memory)


def test_the_state_has_the_same_type_after_as_before():
    params = {"kernel": normal((6, 4)), "half": jnp.asarray(normal((6, 4)), jnp.bfloat16)}
    state = WARM.init(params)
    shapes = jax.eval_shape(WARM.update, params, state, params)[1]
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)


def test_the_memory_follows_weights_that_change_little():
    """One step a call comes near the gradient of the exact norm; one from the start does not."""
    rng = np.random.default_rng(0)
    w = oracles.matrix_with_spectrum(rng, 12, 8, np.r_[2.0, np.linspace(1.5, 0.5, 7)])
    drift = 2e-3 * rng.standard_normal((30, 12, 8))
    zero, state = np.zeros((12, 8), np.float32), WARM.init(jnp.asarray(w, jnp.float32))
    cold = state
    for change in drift:
        w = w + change
        update, state = apply(WARM, zero, w.astype(np.float32), state)
    expected = srip_gradient(w)
    assert np.abs(update - expected).max() < 0.05 * np.abs(expected).max()
    once, _ = apply(WARM, zero, w.astype(np.float32), cold)
    assert np.abs(once - expected).max() > 0.2 * np.abs(expected).max()


def test_a_state_that_was_stored_goes_on_where_it_was():
    params, gradients = params_and_gradients({"tall": (7, 4), "batch": (2, 6, 3)})
    transformation = orthax.add_penalty(
        warm_spectral_restricted_isometry(), optax.linear_schedule(1.0, 0.0, 5)
    )
    state = transformation.init(params)
    for _ in range(3):
        _, state = apply(transformation, gradients, params, state)
    leaves, structure = jax.tree.flatten(state)
    restored = jax.tree.unflatten(structure, [jnp.asarray(np.array(leaf)) for leaf in leaves])
    expected = apply(transformation, gradients, params, state)
    jax.tree.map(
        np.testing.assert_array_equal, apply(transformation, gradients, params, restored), expected
    )
    fresh, _ = apply(transformation, gradients, params)
    assert np.abs(fresh["tall"] - expected[0]["tall"]).max() > 1e-3


def test_a_memory_of_any_type_is_handed_on():
    """Here the last weights and how often: the penalty holds on to where it was."""

    def init(w):
        return {"last": jnp.zeros(w.shape), "calls": jnp.zeros((), jnp.int32)}

    def apply_penalty(w, memory):
        value = jnp.sum((w - memory["last"]) ** 2)
        return value, {"last": w, "calls": memory["calls"] + 1}

    transformation = orthax.add_penalty(WithMemory(init, apply_penalty), 0.5)
    w, zero = normal((5, 3)), np.zeros((5, 3), np.float32)
    state = transformation.init(w)
    update, state = apply(transformation, zero, w, state)
    close(update, w)
    update, state = apply(transformation, zero, 3 * w, state)
    close(update, 2 * w)
    close(state.memory["last"], 3 * w)
    assert int(state.memory["calls"]) == 2


def test_the_memory_has_no_part_in_the_gradient():
    """What the next memory depends on is not what is descended."""
    penalty = WithMemory(lambda w: jnp.zeros(()), lambda w, m: (jnp.sum(w**2) / 2, jnp.sum(w) + m))
    w = normal((5, 3))
    update, state = apply(orthax.add_penalty(penalty, 1.0), np.zeros_like(w), w)
    close(update, w)
    assert float(state.memory) == pytest.approx(float(w.sum()), rel=1e-5)


# --- dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gradient_of_16_bits_is_computed_in_float32(dtype):
    params, gradients = params_and_gradients({"tall": (7, 4)})
    w, g = jnp.asarray(params["tall"], dtype), gradients["tall"]
    exact = g + 0.3 * soft_gradient(w)
    update, _ = apply(ADD_SOFT, g, w)
    assert update.dtype == np.float32
    close(update, exact)
    g = jnp.asarray(g, dtype)
    exact = oracles.float64(g) + 0.3 * soft_gradient(w)
    update, _ = apply(ADD_SOFT, g, w)
    assert update.dtype == dtype
    close(update, exact, rtol=tolerances.eps(dtype))
    update, _ = apply(ADD_SOFT, g, params["tall"])
    assert update.dtype == dtype


def test_the_penalty_sees_float32_where_params_have_16_bits():
    seen = []

    def penalty(w):
        seen.append(w.dtype)
        return quartic(w)

    apply(orthax.add_penalty(penalty, 1.0), *[jnp.ones((3, 2), jnp.bfloat16)] * 2)
    assert set(seen) == {jnp.dtype("float32")}


def test_double_precision_is_kept():
    with tolerances.double_precision():
        w, g = (
            jnp.asarray(normal((7, 4), np.float64)),
            jnp.asarray(normal((7, 4), np.float64, seed=1)),
        )
        update, _ = apply(ADD_SOFT, g, w)
        assert update.dtype == np.float64
        close(update, oracles.float64(g) + 0.3 * soft_gradient(w), rtol=1e-14)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)], ids=["tall", "wide"])
def test_complex_params_descend(shape):
    """JAX's own gradient of a real function of them is the conjugate, along which it may rise."""
    w, g = normal(shape, np.complex64), normal(shape, np.complex64, seed=1)
    update, _ = apply(ADD_SOFT, g, w)
    assert update.dtype == np.complex64
    close(update, g + 0.3 * soft_gradient(w))
    chain = optax.chain(ADD_SOFT, optax.scale_by_learning_rate(0.02))
    w, state = jnp.asarray(w * np.float32(2**0.5 / 3)), chain.init(w)
    values = [float(soft_orthogonality(w))]
    for _ in range(60):
        update, state = compiled(chain)(jnp.zeros_like(w), state, w)
        w = optax.apply_updates(w, update)
        values.append(float(soft_orthogonality(w)))
    assert (np.diff(values) < 1e-6).all()
    assert values[-1] < 0.05 * values[0]


# --- kernels of other shapes


def test_kernels_of_attention_are_matrices_to_the_penalty_in_views():
    views = optax.contrib.MuonDimensionNumbers
    shapes = {"query": (8, 2, 3), "out": (2, 3, 8), "fused": (5, 9)}
    params, gradients = params_and_gradients(shapes)
    rules = orthax.PathRules(
        (
            (r"query", views(0, (1, 2))),
            (r"out", views((0, 1), 2)),
            (r"fused", orthax.Packed(views(0, 1), axis=1, sections=3)),
        )
    )
    updates, _ = apply(orthax.as_matrices(ADD_SOFT, rules), gradients, params)
    for name, matrix in {"query": (8, 6), "out": (6, 8)}.items():
        added = soft_gradient(params[name].reshape(matrix)).reshape(shapes[name])
        close(updates[name], gradients[name] + 0.3 * added)
    parts = [soft_gradient(part) for part in np.split(params["fused"], 3, axis=1)]
    close(updates["fused"], gradients["fused"] + 0.3 * np.concatenate(parts, axis=1))


def test_views_keep_the_memory_of_the_opened_matrix():
    views = optax.contrib.MuonDimensionNumbers(0, (1, 2))
    transformation = orthax.as_matrices(WARM, views)
    w = normal((8, 2, 3))
    state = transformation.init(w)
    assert [m.shape for m in jax.tree.leaves(state.memory)] == [(6,)]
    for _ in range(100):
        update, state = apply(transformation, np.zeros_like(w), w, state)
    close(update, srip_gradient(w.reshape(8, 6)).reshape(w.shape), rtol=1e-3)


def convolution(kernel, strides):
    """L_orth up to its constant: over offsets, the products of all pairs of taps, less identity."""
    kernel = oracles.float64(kernel)
    height, width, _, outputs = kernel.shape
    total = 0.0
    for dy in range(1 - height, height):
        for dx in range(1 - width, width):
            if dy % strides or dx % strides:
                continue
            product = np.zeros((outputs, outputs))
            for y in range(height):
                for x in range(width):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        product += kernel[y + dy, x + dx].T @ kernel[y, x]
            total += np.sum((product - (dy == dx == 0) * np.eye(outputs)) ** 2)
    return total


@pytest.mark.parametrize("strides", [1, 2])
def test_kernels_of_convolutions_have_their_own_penalty(strides):
    kernel, other = 0.3 * normal((3, 3, 2, 4)), normal((7, 4), seed=1)
    rules = orthax.PathRules(
        (
            (r"conv", functools.partial(convolution_orthogonality, strides=strides)),
            (r"dense", soft_orthogonality),
        )
    )
    params = {"conv": kernel, "dense": other}
    updates, _ = apply(orthax.add_penalty(rules, 0.2), jax.tree.map(np.zeros_like, params), params)
    direction, step = normal(kernel.shape, seed=2), 1e-5
    ahead, behind = (
        convolution(kernel + sign * step * oracles.float64(direction), strides) for sign in (1, -1)
    )
    slope = np.sum(updates["conv"] * direction)
    assert slope == pytest.approx(0.2 * (ahead - behind) / (2 * step), rel=1e-4)
    close(updates["dense"], 0.2 * soft_gradient(other))
