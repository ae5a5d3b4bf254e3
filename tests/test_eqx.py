"""Exact dimension numbers of Equinox models. Expectations are written by hand, or measured."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import orthax

eqx = pytest.importorskip("equinox")
import orthax.eqx  # noqa: E402
from orthax.eqx import dimension_numbers  # noqa: E402

nn = eqx.nn
KEY = jax.random.key(0)


def abstract(make):
    """The module that `make(key)` returns, with shapes for arrays."""
    return eqx.filter_eval_shape(make, KEY)


def arrays(model):
    """The params of a concrete or an abstract model."""
    is_param = lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
    return eqx.filter(model, is_param)


def readings(model, *arguments, **options):
    """Path -> the view that a parameter gets, or its destination if it is no matrix."""
    rows = orthax.explain(arrays(model), dimension_numbers(model, *arguments, **options)).rows
    return {row.path: row.view or row.destination for row in rows}


def layer(view):
    return {"weight": view, "bias": "fallback"}


def side_by_side(view, count):
    return " + ".join([view] * count)


NORM = layer("fallback")
ATTENTION = ("query_proj", "key_proj", "value_proj", "output_proj")
LAYERS = {
    "Linear": (lambda k: nn.Linear(4, 6, key=k), layer("(4, 6)")),
    "Linear without bias": (
        lambda k: nn.Linear(4, 6, use_bias=False, key=k),
        {"weight": "(4, 6)"},
    ),
    "Linear to a scalar": (lambda k: nn.Linear(4, "scalar", key=k), layer("(4, 1)")),
    "Linear of a scalar": (lambda k: nn.Linear("scalar", 6, key=k), layer("(1, 6)")),
    "Conv1d": (lambda k: nn.Conv1d(3, 8, 5, key=k), layer("(15, 8)")),
    "Conv2d": (lambda k: nn.Conv2d(3, 8, (5, 2), key=k), layer("(30, 8)")),
    "Conv3d": (
        lambda k: nn.Conv3d(3, 8, (5, 2, 2), use_bias=False, key=k),
        {"weight": "(60, 8)"},
    ),
    "Conv of rank 4": (lambda k: nn.Conv(4, 3, 8, 2, key=k), layer("(48, 8)")),
    "grouped": (
        lambda k: nn.Conv2d(4, 6, 3, groups=2, key=k),
        layer(side_by_side("(18, 3)", 2)),
    ),
    "depthwise": (lambda k: nn.Conv2d(4, 4, 3, groups=4, key=k), layer("fallback")),
    "depthwise, two outputs a channel": (
        lambda k: nn.Conv1d(2, 4, 9, groups=2, key=k),
        layer(side_by_side("(9, 2)", 2)),
    ),
    "ConvTranspose1d": (lambda k: nn.ConvTranspose1d(3, 8, 5, key=k), layer("(15, 8)")),
    "ConvTranspose2d, grouped": (
        lambda k: nn.ConvTranspose2d(4, 6, (3, 5), stride=2, groups=2, key=k),
        layer(side_by_side("(30, 3)", 2)),
    ),
    "ConvTranspose3d": (lambda k: nn.ConvTranspose3d(3, 8, (5, 2, 2), key=k), layer("(60, 8)")),
    "MultiheadAttention": (
        lambda k: nn.MultiheadAttention(
            2, 8, key_size=5, value_size=6, output_size=9, qk_size=3, vo_size=7, key=k
        ),
        {
            "query_proj/weight": "(8, 6)",
            "key_proj/weight": "(5, 6)",
            "value_proj/weight": "(6, 14)",
            "output_proj/weight": "(14, 9)",
        },
    ),
    "GRUCell": (
        lambda k: nn.GRUCell(3, 4, key=k),
        {
            "weight_ih": side_by_side("(3, 4)", 3),
            "weight_hh": side_by_side("(4, 4)", 3),
            "bias": "fallback",
            "bias_n": "fallback",
        },
    ),
    "LSTMCell": (
        lambda k: nn.LSTMCell(3, 4, key=k),
        {
            "weight_ih": side_by_side("(3, 4)", 4),
            "weight_hh": side_by_side("(4, 4)", 4),
            "bias": "fallback",
        },
    ),
    "MLP": (
        lambda k: nn.MLP(4, 3, 8, 2, key=k),
        {
            f"layers/{at}/{leaf}": read
            for at, view in enumerate(("(4, 8)", "(8, 8)", "(8, 3)"))
            for leaf, read in layer(view).items()
        },
    ),
    "Sequential": (
        lambda k: nn.Sequential([nn.Linear(4, 6, key=k), nn.Lambda(jax.nn.relu), nn.Identity()]),
        {f"layers/0/{leaf}": view for leaf, view in layer("(4, 6)").items()},
    ),
    "WeightNorm": (
        lambda k: nn.WeightNorm(nn.Linear(4, 6, key=k)),
        {"layer/weight": "(4, 6)", "layer/bias": "fallback", "g": "fallback"},
    ),
    "SpectralNorm": (
        lambda k: nn.SpectralNorm(nn.Conv2d(3, 8, 2, key=k), "weight", key=k),
        {
            "layer/weight": "(12, 8)",
            "layer/bias": "fallback",
            "uv_index/init/0": "fallback",
            "uv_index/init/1": "fallback",
        },
    ),
    "Embedding": (lambda k: nn.Embedding(9, 4, key=k), {"weight": "fallback"}),
    "LayerNorm": (lambda k: nn.LayerNorm((4, 5)), NORM),
    "RMSNorm": (lambda k: nn.RMSNorm(4), NORM),
    "GroupNorm": (lambda k: nn.GroupNorm(2, 4), NORM),
    "PReLU": (lambda k: nn.PReLU(), {"negative_slope": "fallback"}),
    "no parameters": (lambda k: (nn.Dropout(), nn.AvgPool2d(2), nn.Linear(2, 3, key=k)), ...),
}
LAYERS["no parameters"] = (
    LAYERS["no parameters"][0],
    {f"2/{k}": v for k, v in layer("(2, 3)").items()},
)


@pytest.mark.parametrize("case", LAYERS)
def test_every_layer_of_equinox_is_known_alone_and_in_stacks(case):
    make, expected = LAYERS[case]
    assert readings(abstract(make)) == expected
    once = eqx.filter_vmap(make)
    stack = eqx.filter_eval_shape(once, jax.random.split(KEY, 7))
    assert readings(stack) == {p: re.sub(r"\((\d)", r"(7, \1", v) for p, v in expected.items()}
    twice = eqx.filter_eval_shape(eqx.filter_vmap(once), jax.random.split(KEY, (2, 7)))
    assert readings(twice) == {p: re.sub(r"\((\d)", r"(2, 7, \1", v) for p, v in expected.items()}


def test_batch_norm_has_no_matrix_and_its_statistics_neither():
    model, _ = eqx.nn.make_with_state(nn.BatchNorm)(4, "batch", mode="batch")
    assert readings(model) == NORM
    with_statistics = nn.BatchNorm(4, "batch", mode="ema")
    assert set(readings(with_statistics).values()) == {"fallback"}


def neurons_by_use(module, *inputs):
    """For every entry of a weight, the output unit that it feeds, as the layer itself shows.

    Units are channels: the first axis of the outputs. Whatever a layer computes, the entries that
    feed one unit are the column of one neuron.
    """

    def outputs(weight):
        return eqx.tree_at(lambda m: m.weight, module, weight)(*inputs)

    jacobian = np.asarray(jax.jit(jax.jacobian(outputs))(module.weight))
    units = jacobian.shape[0]
    feeds = np.abs(jacobian.reshape(units, -1, module.weight.size)).sum(1) > 0
    assert (feeds.sum(0) == 1).all()
    return feeds.argmax(0).reshape(module.weight.shape)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda k: nn.Linear(3, 5, key=k), (3,)),
        (lambda k: nn.Linear(4, 4, key=k), (4,)),
        (lambda k: nn.Conv1d(4, 6, 3, groups=2, key=k), (4, 5)),
        (lambda k: nn.Conv2d(6, 6, (2, 3), key=k), (6, 3, 4)),
        (lambda k: nn.ConvTranspose1d(6, 4, 3, groups=2, key=k), (6, 5)),
        (lambda k: nn.ConvTranspose2d(4, 4, (2, 3), stride=2, key=k), (4, 3, 2)),
    ],
)
def test_the_columns_of_each_matrix_are_the_neurons(make, shape):
    module = make(KEY)
    units = neurons_by_use(module, jnp.ones(shape))
    dims = dimension_numbers(module).weight
    seen = []

    def look(tree, _):
        seen.extend(jax.tree.leaves(tree))
        return tree

    tx = orthax.as_matrices(optax.stateless(look), dims)
    units = jnp.asarray(units, jnp.float32)
    tx.update(units, tx.init(units))
    columns = [
        np.unique(np.asarray(matrix[:, j])) for matrix in seen for j in range(matrix.shape[1])
    ]
    assert [len(column) for column in columns] == [1] * len(columns)
    assert sorted(int(column[0]) for column in columns) == list(range(int(units.max()) + 1))


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell])
def test_each_gate_of_a_cell_is_orthogonalised_alone(cell):
    model = cell(3, 4, key=KEY)
    params = arrays(model)
    tx = orthax.partition_matrices(
        lambda leaves: leaves(orthax.orthogonalize(accuracy="exact")),
        optax.set_to_zero(),
        dimension_numbers(model),
    )
    updates, _ = tx.update(params, tx.init(params), params)
    for name in ("weight_ih", "weight_hh"):
        gates = np.asarray(getattr(params, name), np.float64)
        gates = gates.reshape(-1, 4, gates.shape[1])
        for gate, update in zip(gates, getattr(updates, name).reshape(gates.shape), strict=True):
            u, _, vt = np.linalg.svd(gate, full_matrices=False)
            np.testing.assert_allclose(update, u @ vt, atol=0.1)


# --- stacks


@pytest.mark.parametrize("axis", [1, 2])
def test_a_stack_along_another_axis_is_found_by_its_size(axis):
    make = eqx.filter_vmap(lambda k: nn.Linear(4, 6, use_bias=False, key=k), out_axes=axis)
    stack = eqx.filter_eval_shape(make, jax.random.split(KEY, 7))
    assert readings(stack) == {"weight": "(7, 4, 6)"}


def test_a_stack_as_long_as_the_layer_is_wide_leads():
    stack = eqx.filter_eval_shape(
        eqx.filter_vmap(lambda k: nn.Linear(4, 4, key=k)), jax.random.split(KEY, 4)
    )
    assert dimension_numbers(stack).weight == MuonDimensionNumbers((2,), (1,))


# --- heads of attention


def test_per_head_every_head_of_query_key_and_value_is_a_matrix():
    make = LAYERS["MultiheadAttention"][0]
    expected = {
        "query_proj/weight": side_by_side("(8, 3)", 2),
        "key_proj/weight": side_by_side("(5, 3)", 2),
        "value_proj/weight": side_by_side("(6, 7)", 2),
        "output_proj/weight": "(14, 9)",
    }
    assert readings(abstract(make), per_head=True) == expected
    stack = eqx.filter_eval_shape(eqx.filter_vmap(make), jax.random.split(KEY, 5))
    in_stack = {p: re.sub(r"\((\d)", r"(5, \1", v) for p, v in expected.items()}
    assert readings(stack, per_head=True) == in_stack
    with pytest.warns(UserWarning, match="per_head=True, but the model has no"):
        dimension_numbers(abstract(LAYERS["Linear"][0]), per_head=True)


def test_per_head_holds_inside_a_weight_norm():
    attention = LAYERS["MultiheadAttention"][0](KEY)
    model = eqx.tree_at(lambda m: m.query_proj, attention, replace_fn=nn.WeightNorm)
    read = readings(model, per_head=True)
    assert read["query_proj/layer/weight"] == side_by_side("(8, 3)", 2)


# --- whole models


class Block(eqx.Module):
    norm: nn.LayerNorm
    attention: nn.MultiheadAttention
    up: nn.Linear
    act: object

    def __init__(self, key):
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(2, 8, key=key)
        self.up = nn.Linear(8, 16, key=key)
        self.act = jax.nn.gelu

    def __call__(self, x):
        h = jax.vmap(self.norm)(x)
        return x + self.attention(h, h, h) + self.act(jax.vmap(self.up)(h))[:, :8]


class Model(eqx.Module):
    embed: nn.Embedding
    mix: nn.Conv1d
    first: list
    layers: Block
    gain: jax.Array
    steps: int
    lm_head: nn.Linear

    def __init__(self, key):
        self.embed = nn.Embedding(20, 8, key=key)
        self.mix = nn.Conv1d(8, 8, 3, padding=1, key=key)
        self.first = [Block(key), jnp.tanh]
        self.layers = eqx.filter_vmap(Block)(jax.random.split(key, 3))
        self.gain = jnp.ones(8)
        self.steps = 3
        self.lm_head = nn.Linear(8, 20, key=key)

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        x = self.first[1](self.first[0](self.mix(x.T).T)) * self.gain[None]
        arrays, static = eqx.partition(self.layers, eqx.is_array)
        x, _ = jax.lax.scan(lambda x, layer: (eqx.combine(layer, static)(x), None), x, arrays)
        return jax.vmap(self.lm_head)(x)


def block(prefix, batch=""):
    return {
        f"{prefix}/norm/weight": "fallback",
        f"{prefix}/norm/bias": "fallback",
        **{f"{prefix}/attention/{name}/weight": f"({batch}8, 8)" for name in ATTENTION},
        f"{prefix}/up/weight": f"({batch}8, 16)",
        f"{prefix}/up/bias": "fallback",
    }


MODEL = {
    "embed/weight": "fallback",
    "mix/weight": "(24, 8)",
    "mix/bias": "fallback",
    **block("first/0"),
    **block("layers", "3, "),
    "gain": "fallback",
    "lm_head/weight": "fallback",
    "lm_head/bias": "fallback",
}


def test_a_model_is_read_whole_filtered_and_without_values():
    model = Model(KEY)
    assert readings(model) == MODEL
    assert readings(abstract(Model)) == MODEL
    dims, params = dimension_numbers(model), eqx.filter(model, eqx.is_inexact_array)
    assert jax.tree.leaves(dimension_numbers(params)) == jax.tree.leaves(dims)
    assert orthax.explain(eqx.filter(model, eqx.is_array), dims).rows[0].path == "embed/weight"
    # Frozen parts of the params need no other dimension numbers.
    trained = jax.tree.map(lambda _: True, params)
    trained = eqx.tree_at(lambda m: m.layers, trained, replace_fn=lambda _: False)
    frozen = eqx.filter(params, trained)
    assert {row.path for row in orthax.explain(frozen, dims).rows} == {
        path for path in MODEL if not path.startswith("layers/")
    }


def test_several_models_are_read_together():
    model = {"a": nn.Linear(2, 3, key=KEY), "b": [nn.Linear(3, 2, use_bias=False, key=KEY)]}
    assert readings(model) == {"a/weight": "(2, 3)", "a/bias": "fallback", "b/0/weight": "(3, 2)"}


def test_a_model_trains_and_init_and_update_read_it_alike():
    model = Model(KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimizer = orthax.muon(1e-2, weight_decay=0.1, dimension_numbers=dimension_numbers(model))
    tokens = jnp.arange(10) % 5

    @eqx.filter_jit
    def step(params, state):
        def loss(params):
            logits = eqx.combine(params, static)(tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(3):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]


# --- shared parameters


class Tied(eqx.Module):
    shared: nn.Shared

    def __init__(self, key, where, get, size=8):
        pair = {"embed": nn.Embedding(20, size, key=key), "out": nn.Linear(size, 20, key=key)}
        self.shared = nn.Shared(pair, where, get)


class Autoencoder(eqx.Module):
    shared: nn.Shared

    def __init__(self, key):
        pair = (nn.Linear(8, 4, key=key), nn.Linear(4, 8, key=key))
        get = lambda pair: jnp.transpose(pair[0].weight)  # noqa: E731
        self.shared = nn.Shared(pair, lambda pair: pair[1].weight, get)


def test_a_tied_embedding_is_an_embedding_in_whichever_layer_it_is_kept():
    of_embed, of_out = lambda pair: pair["embed"].weight, lambda pair: pair["out"].weight
    kept = "shared/pytree/{}/weight"
    expected = {"shared/pytree/out/bias": "fallback"}
    for make in (lambda k: Tied(k, of_out, of_embed), lambda k: Tied(k, of_embed, of_out)):
        for model in (make(KEY), abstract(make)):
            (path,) = readings(model).keys() - expected.keys()
            assert path in (kept.format("embed"), kept.format("out"))
            assert readings(model) == {path: "fallback", **expected}


def test_a_weight_that_is_used_transposed_too_is_read_where_it_is_kept():
    assert readings(Autoencoder(KEY)) == {
        "shared/pytree/0/weight": "(8, 4)",
        "shared/pytree/0/bias": "fallback",
        "shared/pytree/1/bias": "fallback",
    }
    # Kept in the head, and transposed into a table with a row for each of its inputs.
    transposed = lambda pair: jnp.transpose(pair["out"].weight)  # noqa: E731

    class Odd(eqx.Module):
        shared: nn.Shared

        def __init__(self, key):
            pair = {"embed": nn.Embedding(8, 20, key=key), "out": nn.Linear(8, 20, key=key)}
            self.shared = nn.Shared(pair, lambda pair: pair["embed"].weight, transposed)

    assert readings(Odd(KEY))["shared/pytree/out/weight"] == "fallback"


# --- heads, exclusions, unknown modules


def test_heads_and_excluded_paths_go_to_the_fallback():
    model = abstract(Model)
    excluded = {path: "fallback" for path in MODEL if path.startswith(("layers/", "mix/"))}
    for exclude in ("^layers/|mix", ["mix", re.compile("^LAYERS/", re.IGNORECASE)]):
        assert readings(model, exclude) == MODEL | excluded


class Own(eqx.Module):
    linear: nn.Linear
    mix: list

    def __init__(self, key):
        self.linear = nn.Linear(2, 3, key=key)
        self.mix = [jnp.ones((3, 4))]


class Doubled(nn.Linear):
    again: jax.Array

    def __init__(self, key):
        super().__init__(2, 3, key=key)
        self.again = jnp.ones((2, 3))


def test_an_array_of_an_unknown_module_raises_and_the_advice_holds():
    message = r"dimension_numbers: 'mix/0' has shape \(3, 4\) and is held by Own, .*"
    with pytest.raises(ValueError, match=message + re.escape("exclude=r'mix/0'")) as caught:
        dimension_numbers(abstract(Own))
    assert "eqx.tree_at(lambda model: model.mix[0], dims, " in str(caught.value)
    model = Own(KEY)
    dims = dimension_numbers(model, exclude=r"mix/0")
    dims = eqx.tree_at(
        lambda model: model.mix[0],
        dims,
        MuonDimensionNumbers(reduction_axis=0, output_axis=1),
        is_leaf=lambda x: x is None,
    )
    rows = orthax.explain(arrays(model), dims).rows
    assert {row.path: row.view for row in rows}["mix/0"] == "(3, 4)"


@pytest.mark.parametrize("make", [Doubled, lambda k: [nn.Linear(2, 3, key=k), jnp.ones((2, 3))]])
def test_an_array_that_no_layer_knows_raises(make):
    with pytest.raises(ValueError, match=r"'(again|1)' has shape \(2, 3\) and is held by"):
        dimension_numbers(abstract(make))


def test_a_weight_that_is_not_of_its_layer_raises():
    fused = eqx.tree_at(lambda m: m.weight, nn.Linear(4, 6, key=KEY), jnp.ones((18, 4)))
    message = r"'weight' has shape \(18, 4\), but one Linear has a kernel of shape \(6, 4\)"
    with pytest.raises(ValueError, match=message):
        dimension_numbers(fused)
    factors = eqx.tree_at(
        lambda m: m.weight, nn.Linear(4, 4, key=KEY), (jnp.ones((4, 4)), jnp.ones((4, 4)))
    )
    with pytest.raises(ValueError, match=r"'weight/0' .* is held by Linear"):
        dimension_numbers(factors)
