"""Views of leaves as matrices, and what sends leaves to them."""

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import tolerances
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from helpers import normal
from optax.contrib import MuonDimensionNumbers

import orthax
import orthax.nn
from orthax import diagnostics
from orthax.linalg import polar_svd

POLAR = orthax.orthogonalize(polar_svd)
PACKED = 1e-6  # packed against separate, the promise of the library


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def updated(transformation, updates, params=None):
    """The updates of one step."""
    return transformation.update(updates, transformation.init(updates), params)[0]


def as_seen_inside(tree, dimension_numbers=None, params=None):
    """What `as_matrices` shows to a transformation: updates and params, at init and at update."""
    seen = []

    def init(params):
        seen.append(params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        seen.append(updates)
        seen.append(params)
        return updates, state

    spy = orthax.as_matrices(optax.GradientTransformation(init, update), dimension_numbers)
    state = spy.init(tree if params is None else params)
    spy.update(tree, state, params)
    return seen


def opened_at_init(params, dimension_numbers):
    """What `as_matrices` shows to a transformation at init."""
    keep = optax.GradientTransformation(lambda params: params, lambda updates, state, params: None)
    return orthax.as_matrices(keep, dimension_numbers).init(params)


def row(params, dimension_numbers=None):
    (only,) = orthax.explain(params, dimension_numbers).rows
    return only


# --- against NumPy's SVD of matrices that the test reshapes by hand

D, H, K, L, E = 12, 3, 5, 2, 4  # width, heads, size of a head, layers, experts

ATTENTION = {
    "query": {"kernel": (D, H, K)},
    "key": {"kernel": (D, H, K)},
    "value": {"kernel": (D, H, K)},
    "out": {"kernel": (H, K, D)},
}
BY_HAND = {
    # dimension numbers, shape, leaf -> (batch, rows, cols), and back
    "query": (
        MuonDimensionNumbers(0, (1, 2)),
        (D, H, K),
        lambda x: x.reshape(D, H * K),
        lambda y: y.reshape(D, H, K),
    ),
    "out": (
        MuonDimensionNumbers((0, 1), 2),
        (H, K, D),
        lambda x: x.reshape(H * K, D),
        lambda y: y.reshape(H, K, D),
    ),
    "query, each head": (
        MuonDimensionNumbers(0, 2),
        (D, H, K),
        lambda x: np.stack([x[:, h] for h in range(H)]),
        lambda y: np.stack(list(y), axis=1),
    ),
    "out, each head": (
        MuonDimensionNumbers(1, 2),
        (H, K, D),
        lambda x: x,
        lambda y: y,
    ),
    "query in a stack, each head": (
        MuonDimensionNumbers(-3, -1),
        (L, D, H, K),
        lambda x: np.stack([np.stack([x[i, :, h] for h in range(H)]) for i in range(L)]),
        lambda y: y.transpose(0, 2, 1, 3),
    ),
    "fused query, key, value": (
        MuonDimensionNumbers(0, (2, 3)),
        (D, 3, H, K),
        lambda x: np.stack([x[:, i].reshape(D, H * K) for i in range(3)]),
        lambda y: np.stack([part.reshape(D, H, K) for part in y], axis=1),
    ),
    "convolution": (
        MuonDimensionNumbers((0, 1, 2), 3),
        (3, 2, 4, 7),
        lambda x: x.reshape(24, 7),
        lambda y: y.reshape(3, 2, 4, 7),
    ),
    "convolution, outputs first": (
        MuonDimensionNumbers((2, 3, 1), 0),
        (7, 4, 3, 2),
        lambda x: x.transpose(2, 3, 1, 0).reshape(24, 7),
        lambda y: y.reshape(3, 2, 4, 7).transpose(3, 2, 0, 1),
    ),
    "experts": (MuonDimensionNumbers(-2, -1), (E, D, 6), lambda x: x, lambda y: y),
    "layers of experts": (MuonDimensionNumbers(-2, -1), (L, E, D, 6), lambda x: x, lambda y: y),
    "transposed": (MuonDimensionNumbers(1, 0), (4, 9), lambda x: x.T, lambda y: y.T),
    "N x 1": (MuonDimensionNumbers(0, 1), (9, 1), lambda x: x, lambda y: y),
    "1 x N": (MuonDimensionNumbers(0, 1), (1, 9), lambda x: x, lambda y: y),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_a_leaf_is_orthogonalised_as_the_matrices_that_its_axes_make(case):
    dims, shape, opened, closed = BY_HAND[case]
    x = normal(shape)
    (seen, _, _) = as_seen_inside(x, dims)
    np.testing.assert_array_equal(seen, opened(x))
    update = updated(orthax.as_matrices(POLAR, dims), x)
    expected = closed(oracles.polar(opened(x)))
    assert oracles.relative_error(update, expected) < tolerances.rounding(jnp.float32, gain=10)


def test_attention_by_names_is_orthogonalised_across_its_heads():
    grads = jax.tree.map(normal, ATTENTION, is_leaf=lambda x: isinstance(x, tuple))
    updates = updated(orthax.as_matrices(POLAR), grads)
    for name, layer in grads.items():
        x = layer["kernel"]
        opened = x.reshape(H * K, D) if name == "out" else x.reshape(D, H * K)
        expected = oracles.polar(opened).reshape(x.shape)
        error = oracles.relative_error(updates[name]["kernel"], expected)
        assert error < tolerances.rounding(jnp.float32, gain=100)


def test_a_convolution_by_name_is_orthogonalised_as_height_width_inputs_by_outputs():
    x = normal((3, 2, 4, 7))
    updates = updated(orthax.as_matrices(POLAR), {"Conv_0": {"kernel": x}})
    expected = oracles.polar(x.reshape(24, 7)).reshape(x.shape)
    error = oracles.relative_error(updates["Conv_0"]["kernel"], expected)
    assert error < tolerances.rounding(jnp.float32, gain=10)


def test_experts_by_rules_are_orthogonalised_one_by_one():
    rules = orthax.PathRules(((r"experts/(up|down)$", MuonDimensionNumbers(-2, -1)),))
    grads = {"experts": {"up": normal((E, D, 6)), "down": normal((L, E, 6, D))}}
    updates = updated(orthax.as_matrices(POLAR, rules), grads)
    for name, x in grads["experts"].items():
        for index in np.ndindex(x.shape[:-2]):
            error = oracles.relative_error(updates["experts"][name][index], oracles.polar(x[index]))
            assert error < tolerances.rounding(jnp.float32, gain=100)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_updates_keep_shape_and_dtype(dtype):
    x = jnp.asarray(normal((4, 2, 3)), dtype)
    update = updated(orthax.as_matrices(POLAR, MuonDimensionNumbers(0, (1, 2))), x)
    assert update.shape == x.shape
    assert update.dtype == dtype


# --- opening and closing


def random_axes(seed):
    """A shape of two to six axes and disjoint choices of reduction and output axes."""
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(2, 7))
    shape = tuple(int(size) for size in rng.integers(1, 5, rank))
    order = [int(axis) for axis in rng.permutation(rank)]
    inputs = int(rng.integers(1, rank))
    outputs = int(rng.integers(1, rank - inputs + 1))
    reduction, output = order[:inputs], order[inputs : inputs + outputs]
    batch = sorted(order[inputs + outputs :])
    return shape, batch, reduction, output


@pytest.mark.parametrize("seed", range(12))
def test_closing_undoes_opening_for_any_axes(seed):
    shape, batch, reduction, output = random_axes(seed)
    x = normal(shape)
    # Some axes counted from the end, and a single axis without its tuple.
    dims = MuonDimensionNumbers(
        reduction[0] if len(reduction) == 1 else tuple(reduction),
        tuple(axis - len(shape) for axis in output),
    )
    seen, _, _ = as_seen_inside(x, dims)
    rows = int(np.prod([shape[axis] for axis in reduction]))
    cols = int(np.prod([shape[axis] for axis in output]))
    expected = x.transpose(*batch, *reduction, *output)
    expected = expected.reshape(*(shape[axis] for axis in batch), rows, cols)
    np.testing.assert_array_equal(seen, expected)
    np.testing.assert_array_equal(updated(orthax.as_matrices(optax.identity(), dims), x), x)


@pytest.mark.parametrize("seed", range(5))
def test_closing_undoes_opening_for_packed_sections_along_any_axis(seed):
    shape, _, reduction, output = random_axes(seed)
    axis = seed % len(shape)
    sizes = (2, 1, 3)
    x = normal((*shape[:axis], sum(sizes), *shape[axis + 1 :]))
    packed = orthax.Packed(
        MuonDimensionNumbers(tuple(reduction), tuple(output)), axis - len(shape), sizes
    )
    np.testing.assert_array_equal(updated(orthax.as_matrices(optax.identity(), packed), x), x)
    seen, _, _ = as_seen_inside(x, packed)
    parts = np.split(x, [2, 3], axis)
    for opened, part in zip(seen, parts, strict=True):
        alone, _, _ = as_seen_inside(part, packed.dims)
        np.testing.assert_array_equal(opened, alone)


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3), (2, 3, 4, 3)])
def test_the_view_of_matrices_in_the_last_axes_changes_nothing(shape):
    x = jnp.asarray(normal(shape))
    assert as_seen_inside(x)[0] is x


def test_updates_and_params_are_opened_at_init_and_at_update():
    params, grads = {"w": normal((4, 2, 3), seed=1)}, {"w": normal((4, 2, 3), seed=2)}
    at_init, updates, params_inside = as_seen_inside(
        grads, MuonDimensionNumbers(0, (1, 2)), params=params
    )
    np.testing.assert_array_equal(at_init["w"], params["w"].reshape(4, 6))
    np.testing.assert_array_equal(updates["w"], grads["w"].reshape(4, 6))
    np.testing.assert_array_equal(params_inside["w"], params["w"].reshape(4, 6))


def test_params_may_be_left_out_and_extra_arguments_are_passed_on():
    received = {}

    def update(updates, state, params=None, **extra):
        received.update(extra, params=params)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    for wrap in (orthax.as_matrices, lambda tx: orthax.partition_matrices(tx, optax.identity())):
        transformation = wrap(inner)
        grads = {"w": normal((4, 3))}
        transformation.update(grads, transformation.init(grads), value=3.0)
        assert received.pop("value") == 3.0
        assert jax.tree.leaves(received.pop("params")) == []


def test_state_inside_has_the_shape_of_the_opened_leaves():
    dims = MuonDimensionNumbers(0, (1, 2))
    state = orthax.as_matrices(optax.trace(0.9), dims).init({"w": normal((4, 2, 3))})
    assert state.trace["w"].shape == (4, 6)


def test_init_takes_shapes_in_the_place_of_arrays():
    dims = MuonDimensionNumbers((0, 1, 2), 3)
    assert opened_at_init({"w": struct(3, 3, 2, 5)}, dims) == {"w": struct(18, 5)}
    packed = orthax.Packed(MuonDimensionNumbers(0, 1), 1, (4, 2))
    assert opened_at_init(struct(3, 6), packed) == (struct(3, 4), struct(3, 2))
    params = {"Conv_0": {"kernel": struct(3, 3, 2, 5), "bias": struct(5)}}
    state = jax.eval_shape(orthax.muon(1e-3).init, params)
    arrays = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, orthax.muon(1e-3).init(arrays))


@pytest.mark.parametrize("hole", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
def test_holes_in_the_tree_pass(hole):
    grads = {"a": hole, "w": normal((4, 3)), "kernels": [hole, normal((3, 4))]}
    for transformation in (
        orthax.as_matrices(POLAR),
        orthax.partition_matrices(orthax.as_matrices(POLAR), optax.scale(2.0)),
    ):
        updates = updated(transformation, grads, grads)
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        error = oracles.relative_error(updates["w"], oracles.polar(grads["w"]))
        assert error < tolerances.rounding(jnp.float32, gain=10)


def test_an_empty_tree_passes():
    assert updated(orthax.as_matrices(POLAR, MuonDimensionNumbers(0, 1)), {}) == {}
    assert updated(orthax.muon(1e-3), {}, {}) == {}
    assert orthax.explain({}).rows == ()


# --- packed leaves

PACKINGS = {
    # shape, dimension numbers, axis, sections, their sizes
    "fused QKV": ((D, 3 * 8), MuonDimensionNumbers(0, 1), 1, 3, (8, 8, 8)),
    "GQA": ((D, 16), MuonDimensionNumbers(0, 1), 1, (8, 4, 4), (8, 4, 4)),
    "GQA by heads": ((D, 8, K), MuonDimensionNumbers(0, (1, 2)), 1, (4, 2, 2), (4, 2, 2)),
    "gate and up in a stack": ((L, D, 10), MuonDimensionNumbers(-2, -1), -1, 2, (5, 5)),
    "along the inputs": ((D, 7), MuonDimensionNumbers(0, 1), 0, (9, 3), (9, 3)),
}


def step_twice(optimizer, params):
    """Updates of two steps, along gradients that are the params and their negative cubes."""
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    first, state = update(params, state, params)
    second, state = update(jax.tree.map(lambda x: -(x**3), params), state, params)
    return first, second


def assert_packed_equals_separate(make, cases):
    together, apart, packed, separate = {}, {}, {}, {}
    for case in cases:
        shape, dims, axis, sections, sizes = PACKINGS[case]
        together[case] = normal(shape)
        apart[case] = np.split(together[case], np.cumsum(sizes)[:-1], axis)
        packed[case], separate[case] = orthax.Packed(dims, axis, sections), dims
    actual = step_twice(make(1.0, dimension_numbers=packed), together)
    expected = step_twice(make(1.0, dimension_numbers=separate), apart)
    for step in range(2):
        for case in cases:
            joined = np.concatenate(expected[step][case], PACKINGS[case][2])
            np.testing.assert_allclose(
                actual[step][case], joined, rtol=0, atol=PACKED, err_msg=case
            )


def test_a_packed_leaf_is_treated_as_its_sections_apart():
    make = functools.partial(orthax.muon, orthogonalizer=POLAR)
    assert_packed_equals_separate(make, PACKINGS)


@pytest.mark.parametrize("make", [orthax.muon, orthax.normuon], ids=["muon", "normuon"])
def test_optimizers_treat_a_packed_leaf_as_its_sections_apart(make):
    assert_packed_equals_separate(make, ["GQA"])


def test_fused_attention_with_an_axis_of_its_own_is_a_batch():
    x = normal((D, 3, H, K))
    together = updated(orthax.as_matrices(POLAR, MuonDimensionNumbers(0, (2, 3))), x)
    for i in range(3):
        alone = updated(orthax.as_matrices(POLAR, MuonDimensionNumbers(0, (1, 2))), x[:, i])
        np.testing.assert_allclose(together[:, i], alone, rtol=0, atol=PACKED)


# --- the forms of dimension numbers

FORMS_PARAMS = {"a": {"w": struct(4, 2, 3), "v": struct(6, 4, 2)}, "b": [struct(5, 3, 2)]}
ALL = MuonDimensionNumbers(0, (1, 2))
FORMS = {
    "value": ALL,
    "tree": {"a": {"w": ALL, "v": ALL}, "b": [ALL]},
    "prefix": {"a": ALL, "b": ALL},
    "callable to a tree": lambda params: jax.tree.map(lambda leaf: ALL, params),
    "callable to a value": lambda params: ALL,
    "PathRules": orthax.PathRules(((r"^a/(w|v)$", ALL), (r"^b/0$", ALL))),
    "PathRules by default": orthax.PathRules((), default=ALL),
}


@pytest.mark.parametrize("form", FORMS)
def test_dimension_numbers_in_every_form_agree(form):
    grads = jax.tree.map(lambda leaf: normal(leaf.shape), FORMS_PARAMS)
    views = [row.view for row in orthax.explain(FORMS_PARAMS, FORMS[form]).rows]
    assert views == ["(6, 8)", "(4, 6)", "(5, 6)"]
    seen = as_seen_inside(grads, FORMS[form], params=grads)
    assert [leaf.shape for leaf in jax.tree.leaves(seen)] == [(6, 8), (4, 6), (5, 6)] * 3


def test_no_dimension_numbers_and_those_of_the_default_rule_agree():
    params = {"Dense_0": {"kernel": normal((4, 3)), "bias": normal((3,))}, "w": normal((5, 2))}
    matrix = MuonDimensionNumbers(0, 1)
    forms = [
        None,
        {"Dense_0": {"kernel": matrix, "bias": None}, "w": matrix},
        lambda params: jax.tree.map(lambda x: matrix if x.ndim == 2 else None, params),
        orthax.PathRules(((r"bias$", None), (r"", matrix))),
        orthax.PathRules(()),
    ]
    for form in forms:
        negated = orthax.as_matrices(optax.scale(-1.0), form)
        updates = updated(orthax.partition_matrices(negated, optax.scale(2.0), form), params)
        np.testing.assert_array_equal(updates["Dense_0"]["kernel"], -params["Dense_0"]["kernel"])
        np.testing.assert_array_equal(updates["Dense_0"]["bias"], 2 * params["Dense_0"]["bias"])
        np.testing.assert_array_equal(updates["w"], -params["w"])


def test_masked_nodes_in_a_tree_of_dimension_numbers_mean_the_fallback():
    params = {"a": struct(3, 4), "b": struct(3, 4)}
    dims = {"a": optax.MaskedNode(), "b": MuonDimensionNumbers(0, 1)}
    destinations = [row.destination for row in orthax.explain(params, dims).rows]
    assert destinations == ["fallback", "matrices"]


# --- PathRules


def test_the_first_rule_that_matches_decides():
    rules = orthax.PathRules((("a/b", 1), ("^a", 2), ("b$", 3)), default=4)
    found = [rules.lookup(path)[0] for path in ("x/a/b", "a/c", "c/b", "c")]
    assert found == [1, 2, 3, 4]


def test_a_rule_may_send_a_leaf_to_the_fallback_or_to_the_default_rule():
    rules = orthax.PathRules((("up", None), ("down", ...)), default=MuonDimensionNumbers(1, 0))
    params = {name: {"kernel": struct(4, 9)} for name in ("down", "other", "up")}
    rows = orthax.explain(params, rules).rows
    assert [row.view for row in rows] == ["(4, 9)", "(9, 4)", ""]
    assert [row.reason for row in rows] == [
        "two axes: (rows, cols)",
        "default of the rules",
        "rule 'up'",
    ]


def test_a_rule_overrides_what_the_default_rule_sends_to_the_fallback():
    rules = orthax.PathRules(((r"lm_head/kernel", MuonDimensionNumbers(0, 1)),))
    params = {"lm_head": {"kernel": struct(4, 9), "bias": struct(9)}}
    destinations = {row.path: row.destination for row in orthax.explain(params, rules).rows}
    assert destinations == {"lm_head/bias": "fallback", "lm_head/kernel": "matrices"}


def test_rules_take_compiled_expressions_and_compare_and_hash_by_value():
    rules = orthax.PathRules([(re.compile("UP", re.IGNORECASE), 1), ("^down", 2)])
    assert rules.lookup("a/up")[0] == 1
    same = orthax.PathRules(((re.compile("UP", re.IGNORECASE), 1), ("^down", 2)))
    assert rules == same
    assert hash(rules) == hash(same)
    assert dataclasses.replace(rules, default=None) != rules


def test_rules_are_not_taken_for_a_schedule():
    rules = orthax.PathRules((("w", MuonDimensionNumbers(1, 0)),))
    assert not callable(rules)
    injected = optax.inject_hyperparams(orthax.muon)(1e-3, dimension_numbers=rules)
    state = jax.eval_shape(injected.init, {"w": struct(4, 3)})
    assert set(state.hyperparams) == {"learning_rate", "momentum", "weight_decay"}


# --- rules that match nothing, leaves without names

MISTYPED = orthax.PathRules(((r"layer2/kernel$", None), (r"l1/k", MuonDimensionNumbers(1, 0))))
LAYERS = {name: {"kernel": normal((4, 3)), "bias": normal((3,))} for name in ("l1", "l2")}
SAYS_MISTYPED = r"rule 'layer2/kernel\$' matches no leaf; the nearest path is 'l2/kernel'"
OF_RULES = {
    "muon": lambda rules: orthax.muon(0.1, dimension_numbers=rules),
    "as_matrices": lambda rules: orthax.as_matrices(
        optax.identity(), dataclasses.replace(rules, default=MuonDimensionNumbers(-1, -2))
    ),
    "of_params": lambda rules: diagnostics.of_params(diagnostics.stable_rank, rules),
}


@pytest.mark.parametrize("call", OF_RULES)
def test_init_warns_once_of_a_rule_that_matches_nothing_and_update_does_not(call):
    params = LAYERS
    if call == "as_matrices":
        params = {name: {"kernel": layer["kernel"]} for name, layer in LAYERS.items()}
    tx = OF_RULES[call](MISTYPED)
    with pytest.warns(UserWarning, match=f"{call}: {SAYS_MISTYPED}") as caught:
        state = tx.init(params)
    assert len(caught) == 1 and caught[0].filename == __file__
    tx.update(params, state, params)  # warnings are errors
    strict = OF_RULES[call](dataclasses.replace(MISTYPED, strict=True))
    with pytest.raises(ValueError, match=f"{call}: {SAYS_MISTYPED}"):
        strict.init(params)


def test_explain_lists_rules_that_match_nothing_and_does_not_raise():
    for rules in (MISTYPED, dataclasses.replace(MISTYPED, strict=True)):
        table = orthax.explain(LAYERS, rules)
        (note,) = table.notes
        assert re.search(SAYS_MISTYPED, note)
        assert str(table).endswith(f"note: {note}")


@pytest.mark.parametrize("name", ["l2", "head"])
def test_what_an_outer_mask_took_away_counts_as_seen(name):
    params = {"l1": LAYERS["l1"], name: LAYERS["l2"]}
    rules = orthax.PathRules(((rf"{name}/.*kernel$", None), ("l1/", ...)), strict=True)
    inner = orthax.muon(0.1, dimension_numbers=rules)
    by_leaf = {key: {"kernel": key, "bias": key} for key in params}
    for labels in (by_leaf, {key: key for key in params}):
        tx = optax.partition({"l1": inner, name: optax.sgd(0.1)}, labels)
        assert updated(tx, params, params).keys() == params.keys()
    elsewhere = orthax.PathRules((("layer2/kernel", None),), strict=True)
    tx = optax.masked(orthax.muon(0.1, dimension_numbers=elsewhere), {"l1": True, name: by_leaf})
    tx = optax.partition(
        {"l1": orthax.muon(0.1, dimension_numbers=elsewhere), name: optax.sgd(0.1)}, by_leaf
    )
    with pytest.raises(ValueError, match="rule 'layer2/kernel' matches no leaf"):
        tx.init(params)


def test_a_rule_behind_another_one_and_the_rules_of_a_model_are_not_reported():
    behind = orthax.PathRules((("kernel", None), ("l2/kernel", None)), strict=True)
    orthax.muon(0.1, dimension_numbers=behind).init(LAYERS)
    model = nnx.eval_shape(lambda: nnx.Dict(a=nnx.LoRALinear(4, 8, lora_rank=2, rngs=nnx.Rngs(0))))
    rules = orthax.nn.dimension_numbers(model)
    orthax.muon(0.1, dimension_numbers=rules).init(nnx.state(model, nnx.LoRAParam))


def test_kernels_of_several_ranks_without_names_are_reported():
    leaves = [struct(3, 3, 1, 8), struct(64, 10), struct(10)]
    with pytest.warns(UserWarning, match=r"muon: leaves such as .* have no names") as caught:
        jax.eval_shape(orthax.muon(0.1).init, leaves)
    assert len(caught) == 1
    table = orthax.explain(leaves)
    assert [row.view for row in table.rows] == ["(3, 3, 1, 8)", "(64, 10)", ""]
    assert "v.path" in table.notes[0] and "v.path" in orthax.explain(leaves[1:]).notes[0]
    # One rank, names, or dimension numbers: nothing to report.
    jax.eval_shape(orthax.muon(0.1).init, leaves[1:])
    by_path = {"conv2d/kernel": leaves[0], "dense/kernel": leaves[1], "dense/bias": leaves[2]}
    jax.eval_shape(orthax.muon(0.1).init, by_path)
    dims = [MuonDimensionNumbers((0, 1, 2), 3), None, None]
    jax.eval_shape(orthax.muon(0.1, dimension_numbers=dims).init, leaves)


class Holder(nnx.Module):
    """A variable that holds a tree, and one under the name that variables give to their value."""

    def __init__(self):
        self.embed = nnx.Param({"table": jnp.ones((9, 4)), "more": [jnp.ones((2, 4))]})
        self.value = nnx.Param(jnp.ones((3, 2)))


def test_paths_are_those_of_the_model_whether_variables_wrap_the_leaves_or_not():
    state = nnx.state(Holder(), nnx.Param)
    expected = ["embed/more/0", "embed/table", "value"]
    assert [row.path for row in orthax.explain(state).rows] == expected
    assert [row.path for row in orthax.explain(nnx.to_pure_dict(state)).rows] == expected


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Projections:
    query: dict
    value: dict


def test_an_attribute_of_a_model_may_be_called_value():
    params = {"a": Projections({"w": struct(2, 3)}, {"w": struct(2, 3)})}
    paths = [row.path for row in orthax.explain([Projections(params, params)]).rows]
    assert paths[0] == "0/query/a/query/w"
    nested = Projections({}, Projections({}, {"w": struct(2, 3)}))
    assert row(nested).path == "value/value/w"


# --- partition_matrices


def test_matrices_go_one_way_and_everything_else_the_other():
    params = {
        "Dense_0": {"kernel": normal((4, 3)), "bias": normal((3,))},
        "Embed_0": {"embedding": normal((9, 4))},
        "scale": normal(()),
        "lm_head": {"kernel": normal((4, 9))},
    }
    transformation = orthax.partition_matrices(optax.scale(0.0), optax.scale(2.0))
    updates = updated(transformation, params)
    assert not updates["Dense_0"]["kernel"].any()
    del updates["Dense_0"]["kernel"], params["Dense_0"]["kernel"]
    jax.tree.map(lambda u, p: np.testing.assert_array_equal(u, 2 * p), updates, params)


def test_both_sides_see_updates_and_params_in_their_own_shape():
    shapes = []

    def update(updates, state, params):
        shapes.append((jax.tree.map(jnp.shape, updates), jax.tree.map(jnp.shape, params)))
        return updates, state

    spy = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    params = {"query": normal((4, 2, 3)), "bias": normal((2, 3))}
    rules = orthax.PathRules((("query", ALL),))
    updated(orthax.partition_matrices(spy, spy, rules), params, params)
    hole = optax.MaskedNode()
    matrices, rest = {"query": (4, 2, 3), "bias": hole}, {"query": hole, "bias": (2, 3)}
    assert len(shapes) == 2
    assert (matrices, matrices) in shapes
    assert (rest, rest) in shapes


def test_python_numbers_go_to_the_fallback():
    updates = updated(orthax.partition_matrices(optax.scale(0.0), optax.scale(2.0)), {"a": 1.5})
    assert updates == {"a": 3.0}


def test_a_partition_inside_a_mask_leaves_the_rest_alone():
    params = {"a": {"kernel": normal((4, 3)), "bias": normal((3,))}, "b": normal((2, 2))}
    mask = {"a": {"kernel": True, "bias": True}, "b": False}
    inner = orthax.partition_matrices(optax.scale(0.0), optax.scale(2.0))
    updates = updated(optax.masked(inner, mask), params)
    np.testing.assert_array_equal(updates["b"], params["b"])
    assert not updates["a"]["kernel"].any()
    np.testing.assert_array_equal(updates["a"]["bias"], 2 * params["a"]["bias"])


# --- explain

TABLE = """
path                   shape         view             batch  fan_in  fan_out  destination  reason
Conv_0/bias            (8,)                                                   fallback     fewer than two axes
Conv_0/kernel          (3, 3, 4, 8)  (36, 8)          1      36      8        matrices     2-D convolution
LayerNorm_0/scale      (4,)                                                   fallback     fewer than two axes
MHA_0/key/bias         (2, 8)                                                 fallback     named 'bias'
experts                (5, 4, 9)                                              undecided    undecided: names and shapes leave several readings
layers/Dense_0/kernel  (6, 4, 9)     (6, 4, 9)        6      4       9        matrices     stack of Dense kernels
layers/experts/up      (6, 5, 4, 9)  (6, 5, 4, 9)     30     4       9        matrices     rule 'experts/up'
lm_head/kernel         (4, 20)                                                fallback     output head 'lm_head'
qkv/kernel             (4, 8)        (4, 5) + (4, 3)  2      4       5 + 3    matrices     rule 'qkv'
wte                    (20, 4)                                                fallback     embedding
"""  # noqa: E501


def test_explain_prints_a_table_with_undecided_leaves():
    params = {
        "Conv_0": {"kernel": struct(3, 3, 4, 8), "bias": struct(8)},
        "LayerNorm_0": {"scale": struct(4)},
        "MHA_0": {"key": {"bias": struct(2, 8)}},
        "experts": struct(5, 4, 9),
        "layers": {
            "Dense_0": {"kernel": struct(6, 4, 9)},
            "experts": {"up": struct(6, 5, 4, 9)},
        },
        "lm_head": {"kernel": struct(4, 20)},
        "qkv": {"kernel": struct(4, 8)},
        "wte": struct(20, 4),
    }
    rules = orthax.PathRules(
        (
            ("experts/up", MuonDimensionNumbers(-2, -1)),
            ("qkv", orthax.Packed(MuonDimensionNumbers(0, 1), 1, (5, 3))),
        )
    )
    table = orthax.explain(params, rules)
    assert str(table) == TABLE.strip()
    assert repr(table) == str(table)


@pytest.mark.parametrize(
    ("last", "size", "marked"),
    [
        ("out", 10, True),
        ("fc_out", 1, True),
        ("l3", 10, True),
        ("out", 1000, True),
        ("l3", 1000, False),  # wider than its inputs and not called so
        ("out", 64, False),
    ],
)
def test_explain_marks_what_looks_like_a_head_and_is_not_called_so(last, size, marked):
    kernels = {"l1": (784, 64), "mix/c": (64, 64), "mix/out": (64, 64), last: (64, size)}
    params = {f"{name}/kernel": struct(*shape) for name, shape in kernels.items()}
    params |= {f"{name}/bias": struct(shape[1]) for name, shape in kernels.items()}
    table = orthax.explain(params)
    heads = [row.path for row in table.rows if "looks like an output head" in row.reason]
    assert heads == ([f"{last}/kernel"] if marked else [])
    assert {row.destination for row in table.rows if "kernel" in row.path} == {"matrices"}
    if marked:
        (note,) = table.notes
        (rules,) = re.findall(r"orthax\.PathRules\(.*\),\)\)", note)
        by_rule = orthax.explain(params, eval(rules))
        assert by_rule.notes == ()
        assert [r.path for r in by_rule.rows if r.reason.startswith("rule")] == heads
    # A head by name, and there is no other to look for.
    assert not orthax.explain(params | {"lm_head/kernel": struct(64, 99)}).notes


def test_a_convolution_whose_outputs_are_flattened_is_no_head():
    params = {"c1/kernel": (3, 3, 1, 4), "c2/kernel": (3, 3, 4, 8), "l/kernel": (128, 64)}
    biases = {path.replace("kernel", "bias"): (shape[-1],) for path, shape in params.items()}
    params = params | biases | {"last/kernel": (64, 10)}
    table = orthax.explain({path: struct(*shape) for path, shape in params.items()})
    assert [row.path for row in table.rows if "head" in row.reason] == ["last/kernel"]


def test_explain_counts_matrices_and_reads_arrays_too():
    explained = row({"Dense_0": {"kernel": normal((2, 3, 4, 5))}})
    assert (explained.batch, explained.fan_in, explained.fan_out) == ("6", "4", "5")
    along_inputs = orthax.Packed(MuonDimensionNumbers(0, 1), 0, (2, 1))
    explained = row(struct(3, 5), along_inputs)
    assert (explained.batch, explained.fan_in, explained.fan_out) == ("2", "2 + 1", "5 + 5")


# --- whole models, one step


class ScannedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)(nn.LayerNorm()(x))
        x = nn.Conv(8, (3,), use_bias=False)(x)
        heads = nn.DenseGeneral((2, 3))(x)
        return nn.Dense(8)(nn.DenseGeneral(8, axis=(-2, -1))(heads)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(9, 8)
        layers = nn.scan(
            ScannedBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = layers(name="layers")(embed(tokens), None)
        boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
        return embed.attend(nn.Dense(8, kernel_init=boxed)(x))


def test_a_linen_train_state_steps_every_matrix_of_a_scanned_model():
    tokens = jnp.arange(24).reshape(4, 6) % 9
    model = Scanned()
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * normal(leaf.shape)), params)
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=orthax.muon(1e-2, orthogonalizer=POLAR)
    )

    @jax.jit
    def step(state):
        def loss(params):
            logits = state.apply_fn({"params": params}, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    state = step(state)
    assert isinstance(state.params["Dense_0"]["kernel"], nn.Partitioned)

    change = jax.tree.map(lambda a, b: np.asarray(a - b), state.params, params)
    layers = change["layers"]
    attention = layers["MultiHeadDotProductAttention_0"]
    matrices = {
        "query": attention["query"]["kernel"].reshape(3, 8, 6),
        "out": attention["out"]["kernel"].reshape(3, 6, 8),
        "convolution": layers["Conv_0"]["kernel"].reshape(3, 24, 8),
        "to heads": layers["DenseGeneral_0"]["kernel"].reshape(3, 8, 6),
        "from heads": layers["DenseGeneral_1"]["kernel"].reshape(3, 6, 8),
        "dense": layers["Dense_0"]["kernel"],
        "boxed": change["Dense_0"]["kernel"].value[None],
    }
    for name, stack in matrices.items():
        for matrix in stack:
            length = 1e-2 * 0.2 * max(matrix.shape) ** 0.5
            direction = matrix / length  # singular values 1, or 0 where the gradient has none
            assert np.linalg.norm(direction, 2) > 0.99
            np.testing.assert_allclose(
                direction @ direction.T @ direction, direction, atol=1e-3, err_msg=name
            )


class Attentive(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.up(self.attention(x))


def test_an_nnx_optimizer_steps_attention_by_the_default_rule():
    model = nnx.jit(lambda: Attentive(nnx.Rngs(0)))()
    optimizer = nnx.Optimizer(model, orthax.muon(1e-2, orthogonalizer=POLAR), wrt=nnx.Param)
    x = jnp.asarray(normal((2, 5, 8)))
    kernel = np.asarray(model.attention.query.kernel[...])

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.square(model(x)).mean())(model)
        optimizer.update(model, grads)

    step(model, optimizer)
    change = (np.asarray(model.attention.query.kernel[...]) - kernel).reshape(8, 8)
    s = np.linalg.svd(change / (1e-2 * 0.2 * 8**0.5), compute_uv=False)
    np.testing.assert_allclose(s, 1.0, atol=1e-3)


def test_views_are_static_and_public_names_are_documented():
    view = orthax.MatrixView((4, 2, 3), (), (0,), (1, 2))
    assert (view.batch, view.fan_in, view.fan_out, view.matrix_shape) == ((), 4, 6, (4, 6))
    assert hash(view) == hash(dataclasses.replace(view))
    for public in (orthax.as_matrices, orthax.partition_matrices, orthax.explain, orthax.Packed):
        assert inspect.getdoc(public)
    step = jax.jit(functools.partial(updated, orthax.as_matrices(POLAR, ALL)))
    assert step(normal((4, 2, 3))).shape == (4, 2, 3)
