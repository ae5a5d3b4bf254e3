"""Exact dimension numbers of NNX models. Every expectation is written by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import orthax
import orthax.nn
from orthax.nn import dimension_numbers


def abstract(make):
    """The module that `make(rngs)` returns, with shapes for arrays."""
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def readings(model, exclude=None, state=None, per_head=False):
    """Path -> the view that a parameter gets, or its destination if it is no matrix."""
    state = nnx.state(model, nnx.Param) if state is None else state
    rows = orthax.explain(state, dimension_numbers(model, exclude, per_head=per_head)).rows
    return {row.path: row.view or row.destination for row in rows}


def stacked(make, size, axis=0):
    """`make(rngs)` as a stack of `size` modules along an axis of its parameters."""

    @nnx.split_rngs(splits=size)
    @nnx.vmap(in_axes=0, out_axes=axis)
    def stack(rngs):
        return make(rngs)

    return stack


# --- each known module: path -> view, alone and as a stack of seven


def matrix(view):
    """Kernel and bias of a layer."""
    return {"bias": "fallback", "kernel": view}


LAYERS = {
    "Linear": (lambda r: nnx.Linear(4, 6, rngs=r), matrix("(4, 6)")),
    "no bias": (lambda r: nnx.Linear(4, 6, use_bias=False, rngs=r), {"kernel": "(4, 6)"}),
    "N x 1": (lambda r: nnx.Linear(4, 1, rngs=r), matrix("(4, 1)")),
    "1 x N": (lambda r: nnx.Linear(1, 6, rngs=r), matrix("(1, 6)")),
    "LinearGeneral": (lambda r: nnx.LinearGeneral(4, (2, 3), rngs=r), matrix("(4, 6)")),
    "LinearGeneral in": (
        lambda r: nnx.LinearGeneral((2, 3), 5, axis=(-2, -1), rngs=r),
        matrix("(6, 5)"),
    ),
    "LinearGeneral batch": (
        lambda r: nnx.LinearGeneral(4, (2, 3), batch_axis={0: 5}, rngs=r),
        matrix("(5, 4, 6)"),
    ),
    "LinearGeneral all": (
        lambda r: nnx.LinearGeneral((3, 2), (4, 5), axis=(-2, -1), batch_axis={0: 6, 1: 8}, rngs=r),
        matrix("(6, 8, 6, 20)"),
    ),
    "fused QKV": (lambda r: nnx.LinearGeneral(8, (3, 2, 4), rngs=r), matrix("(8, 24)")),
    "Conv 1-D": (lambda r: nnx.Conv(3, 8, (5,), rngs=r), matrix("(15, 8)")),
    "Conv, int window": (lambda r: nnx.Conv(3, 8, 5, rngs=r), matrix("(15, 8)")),
    "Conv 2-D": (lambda r: nnx.Conv(3, 8, (5, 2), rngs=r), matrix("(30, 8)")),
    "Conv 3-D": (
        lambda r: nnx.Conv(3, 8, (5, 2, 2), use_bias=False, rngs=r),
        {"kernel": "(60, 8)"},
    ),
    "grouped": (
        lambda r: nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=r),
        matrix("(18, 3) + (18, 3)"),
    ),
    "depthwise": (
        lambda r: nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=r),
        matrix("fallback"),
    ),
    "depthwise, two outputs a channel": (
        lambda r: nnx.Conv(2, 4, (3, 3), feature_group_count=2, rngs=r),
        matrix("(9, 2) + (9, 2)"),
    ),
    "ConvTranspose": (lambda r: nnx.ConvTranspose(3, 8, (5, 2), rngs=r), matrix("(30, 8)")),
    "ConvTranspose, kernel of the forward convolution": (
        lambda r: nnx.ConvTranspose(3, 8, (5, 2), transpose_kernel=True, rngs=r),
        matrix("(30, 8)"),
    ),
    "Einsum": (
        lambda r: nnx.Einsum("btd, dhk -> bthk", (8, 2, 3), (2, 3), rngs=r),
        matrix("(8, 6)"),
    ),
    "Einsum, outputs first": (
        lambda r: nnx.Einsum("btd,hkd->bthk", (2, 3, 8), rngs=r),
        {"kernel": "(8, 6)"},
    ),
    "Einsum, two inputs": (
        lambda r: nnx.Einsum("bthk,hkd->btd", (2, 3, 8), rngs=r),
        {"kernel": "(6, 8)"},
    ),
    "Einsum per head": (
        lambda r: nnx.Einsum("nta,hab->nthb", (8, 2, 4), rngs=r),
        {"kernel": "(2, 32)"},
    ),
    "Einsum of experts": (
        lambda r: nnx.Einsum("ebd,edf->ebf", (5, 8, 6), rngs=r),
        {"kernel": "(5, 8, 6)"},
    ),
    "Einsum of experts in the middle": (
        lambda r: nnx.Einsum("...ed,dfe->...ef", (8, 6, 5), rngs=r),
        {"kernel": "(5, 8, 6)"},
    ),
    "Einsum without a matrix": (
        lambda r: nnx.Einsum("bhd,hd->bh", (2, 3), rngs=r),
        {"kernel": "fallback"},
    ),
    "LoRA": (
        lambda r: nnx.LoRA(8, 2, 6, rngs=r),
        {"lora_a": "(8, 2)", "lora_b": "(2, 6)"},
    ),
    "LoRALinear": (
        lambda r: nnx.LoRALinear(8, 6, lora_rank=2, rngs=r),
        {**matrix("(8, 6)"), "lora/lora_a": "(8, 2)", "lora/lora_b": "(2, 6)"},
    ),
    "MultiHeadAttention": (
        lambda r: nnx.MultiHeadAttention(
            2, 8, qkv_features=6, decode=False, normalize_qk=True, rngs=r
        ),
        {
            "key/bias": "fallback",
            "key/kernel": "(8, 6)",
            "key_ln/scale": "fallback",
            "out/bias": "fallback",
            "out/kernel": "(6, 8)",
            "query/bias": "fallback",
            "query/kernel": "(8, 6)",
            "query_ln/scale": "fallback",
            "value/bias": "fallback",
            "value/kernel": "(8, 6)",
        },
    ),
    "LSTM": (
        lambda r: nnx.OptimizedLSTMCell(3, 4, rngs=r),
        {
            "dense_h/bias": "fallback",
            "dense_h/kernel": "(4, 4) + (4, 4) + (4, 4) + (4, 4)",
            "dense_i/kernel": "(3, 4) + (3, 4) + (3, 4) + (3, 4)",
        },
    ),
    "LSTM, gate by gate": (
        lambda r: nnx.LSTMCell(3, 4, rngs=r),
        {
            **{
                f"h{gate}/{leaf}": view
                for gate in "fgio"
                for leaf, view in matrix("(4, 4)").items()
            },
            **{f"{gate}/kernel": "(3, 4)" for gate in ("if_", "ig", "ii", "io")},
        },
    ),
    "GRU": (
        lambda r: nnx.GRUCell(3, 4, rngs=r),
        {
            "dense_h/kernel": "(4, 4) + (4, 4) + (4, 4)",
            "dense_i/bias": "fallback",
            "dense_i/kernel": "(3, 4) + (3, 4) + (3, 4)",
        },
    ),
    "simple recurrent": (
        lambda r: nnx.SimpleCell(3, 4, rngs=r),
        {"dense_h/kernel": "(4, 4)", "dense_i/bias": "fallback", "dense_i/kernel": "(3, 4)"},
    ),
    "Embed": (lambda r: nnx.Embed(9, 4, rngs=r), {"embedding": "fallback"}),
    "LayerNorm": (lambda r: nnx.LayerNorm(4, rngs=r), {"bias": "fallback", "scale": "fallback"}),
    "RMSNorm": (lambda r: nnx.RMSNorm(4, rngs=r), {"scale": "fallback"}),
    "BatchNorm": (lambda r: nnx.BatchNorm(4, rngs=r), {"bias": "fallback", "scale": "fallback"}),
    "GroupNorm": (
        lambda r: nnx.GroupNorm(4, num_groups=2, rngs=r),
        {"bias": "fallback", "scale": "fallback"},
    ),
    "PReLU": (lambda r: nnx.PReLU(), {"negative_slope": "fallback"}),
}


@pytest.mark.parametrize("case", LAYERS)
def test_every_layer_of_flax_is_known(case):
    make, expected = LAYERS[case]
    assert readings(abstract(make)) == expected


def in_stack(view):
    return re.sub(r"\((\d)", r"(7, \1", view)


@pytest.mark.parametrize("case", LAYERS)
def test_a_stack_of_layers_is_a_batch(case):
    make, expected = LAYERS[case]
    expected = {path: in_stack(view) for path, view in expected.items()}
    assert readings(abstract(stacked(make, 7))) == expected


@pytest.mark.parametrize("axis", [1, 2, -1])
@pytest.mark.parametrize(
    ("make", "view"),
    [
        (lambda r: nnx.Linear(4, 6, use_bias=False, rngs=r), "(7, 4, 6)"),
        (lambda r: nnx.LinearGeneral(4, (2, 3), use_bias=False, rngs=r), "(7, 4, 6)"),
        (lambda r: nnx.Conv(4, 6, (3, 5), use_bias=False, rngs=r), "(7, 60, 6)"),
    ],
)
def test_a_stack_along_another_axis_is_found_by_its_size(make, view, axis):
    assert readings(abstract(stacked(make, 7, axis))) == {"kernel": view}


def test_two_stacked_axes_are_two_batch_axes():
    twice = stacked(stacked(lambda r: nnx.Linear(4, 6, rngs=r), 3), 2)
    assert readings(abstract(twice)) == matrix("(2, 3, 4, 6)")


@pytest.mark.parametrize(("axis", "batch_axis"), [(0, 0), (1, 1)])
def test_the_bias_tells_the_stacked_axis_of_a_stack_as_long_as_the_layer_is_wide(axis, batch_axis):
    model = abstract(stacked(lambda r: nnx.Linear(4, 6, rngs=r), 4, axis))
    view = dimension_numbers(model).lookup("kernel")[0]
    assert batch_axis not in view.reduction_axis + view.output_axis


def test_a_stack_as_long_as_the_layer_is_wide_leads_unless_its_bias_denies_it():
    model = abstract(stacked(lambda r: nnx.Linear(4, 4, use_bias=False, rngs=r), 4))
    dims = dimension_numbers(model).lookup("kernel")[0]
    assert dims == optax.contrib.MuonDimensionNumbers((1,), (2,))


# --- whole models


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, use_bias=False, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(20, 8, rngs=rngs)
        self.mix = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.first = nnx.List([Block(rngs)])
        self.layers = stacked(Block, 3)(rngs)
        self.gain = nnx.Param(jnp.ones(8))
        self.lm_head = nnx.Linear(8, 20, rngs=rngs)


MODEL = {
    "embed/embedding": "fallback",
    **{
        f"first/0/attention/{name}/{leaf}": view
        for name in ("key", "out", "query", "value")
        for leaf, view in matrix("(8, 8)").items()
    },
    "first/0/down/kernel": "(16, 8)",
    "first/0/norm/bias": "fallback",
    "first/0/norm/scale": "fallback",
    "first/0/up/bias": "fallback",
    "first/0/up/kernel": "(8, 16)",
    "gain": "fallback",
    **{
        f"layers/attention/{name}/{leaf}": view
        for name in ("key", "out", "query", "value")
        for leaf, view in matrix("(3, 8, 8)").items()
    },
    "layers/down/kernel": "(3, 16, 8)",
    "layers/norm/bias": "fallback",
    "layers/norm/scale": "fallback",
    "layers/up/bias": "fallback",
    "layers/up/kernel": "(3, 8, 16)",
    "lm_head/bias": "fallback",
    "lm_head/kernel": "fallback",
    "mix/bias": "fallback",
    "mix/kernel": "(24, 8)",
}


def test_variables_and_pure_states_are_read_alike():
    model = abstract(Model)
    state = nnx.state(model, nnx.Param)
    assert readings(model) == MODEL
    assert readings(model, state=nnx.to_pure_dict(state)) == MODEL


class Trainable(nnx.Module):
    """Attention, a 1-D convolution and a scanned stack, none of which paths alone tell."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(20, 8, rngs=rngs)
        self.mix = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, 8, use_bias=False, decode=False, rngs=rngs)
        self.layers = stacked(lambda rngs: nnx.Linear(8, 8, rngs=rngs), 3)(rngs)
        self.lm_head = nnx.Linear(8, 20, rngs=rngs)

    def __call__(self, tokens):
        x = self.mix(self.embed(tokens))
        x = x + self.attend(x)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, layer):
            return x + jax.nn.relu(layer(x))

        return self.lm_head(through(x, self.layers))


def test_one_step_of_an_nnx_optimizer_reads_init_and_update_alike():
    model = nnx.jit(lambda: Trainable(nnx.Rngs(0)))()
    seen = []

    def spy(tree):
        # At init a leaf lies in a Variable, whose path ends in `.value`; at update it is bare.
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        seen.append({jax.tree_util.keystr(path).split(".")[0]: leaf.shape for path, leaf in leaves})

    def init(params):
        spy(params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        spy(updates)
        spy(params)
        return updates, state

    spying = optax.GradientTransformation(init, update)
    tx = orthax.muon(
        1e-2,
        dimension_numbers=dimension_numbers(model),
        orthogonalizer=optax.chain(spying, orthax.orthogonalize()),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    tokens = jnp.arange(10).reshape(2, 5)

    def loss(model):
        logits = model(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value, loss(model)

    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    value, next_value = step(model, optimizer)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert next_value < value
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), before, after)))
    opened = {
        "['attend']['key']['kernel']": (8, 8),
        "['attend']['out']['kernel']": (8, 8),
        "['attend']['query']['kernel']": (8, 8),
        "['attend']['value']['kernel']": (8, 8),
        "['layers']['kernel']": (3, 8, 8),
        "['mix']['kernel']": (24, 8),
    }
    assert seen == [opened] * 3


def test_abstract_and_concrete_models_have_the_same_rules():
    assert dimension_numbers(Block(nnx.Rngs(0))) == dimension_numbers(abstract(Block))


def test_rules_are_exact_paths_and_leave_the_rest_to_the_default_rule():
    rules = dimension_numbers(abstract(lambda r: nnx.Dict(up=nnx.Linear(2, 3, rngs=r))))
    assert {pattern for pattern, _ in rules.rules} == {r"^up/bias$", r"^up/kernel$"}
    assert rules.default is ...
    assert rules.lookup("other/up/kernel")[0] is ...
    assert rules.lookup("up/kernel/more")[0] is ...


def test_the_rules_hold_for_a_part_of_the_state():
    model = abstract(lambda r: nnx.Dict(up=nnx.LoRALinear(8, 6, lora_rank=2, rngs=r)))
    state = nnx.state(model, nnx.LoRAParam)
    expected = {"up/lora/lora_a": "(8, 2)", "up/lora/lora_b": "(2, 6)"}
    assert readings(model, state=state) == expected


# --- shared parameters


class TiedHead(nnx.Module):
    """A square embedding whose parameter is also the kernel of a layer that sorts before it."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(8, 8, rngs=rngs)
        self.a_output = nnx.Linear(8, 8, rngs=rngs)
        self.a_output.kernel = self.embed.embedding


class SharedLayers(nnx.Module):
    def __init__(self, rngs):
        self.second = nnx.Linear(4, 6, rngs=rngs)
        self.first = self.second
        self.third = nnx.Linear(4, 6, rngs=rngs)
        self.third.kernel = self.second.kernel


class Disagreeing(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Einsum("bd,de->be", (4, 4), rngs=rngs)
        self.two = nnx.Einsum("bd,ed->be", (4, 4), rngs=rngs)
        self.two.kernel = self.one.kernel


def test_tied_embeddings_are_embeddings_under_whatever_path_shows_them():
    model = abstract(TiedHead)
    assert readings(model) == {"a_output/bias": "fallback", "a_output/kernel": "fallback"}


def test_shared_modules_have_the_path_that_the_state_shows():
    assert readings(abstract(SharedLayers)) == {
        "first/bias": "fallback",
        "first/kernel": "(4, 6)",
        "third/bias": "fallback",
    }


def test_a_parameter_that_modules_read_differently_raises_and_names_itself():
    with pytest.raises(ValueError, match=r"dimension_numbers: 'one/kernel' .* shared by .*Einsum"):
        dimension_numbers(abstract(Disagreeing))


# --- one matrix per head


class OwnAttention(nnx.Module):
    """Grouped-query attention as users write it, and a fused projection, which has no heads."""

    def __init__(self, rngs):
        self.query = nnx.LinearGeneral(8, (4, 3), rngs=rngs)
        self.key = nnx.LinearGeneral(8, (2, 3), rngs=rngs)
        self.value = nnx.LinearGeneral(8, (2, 5), use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral((4, 5), 8, axis=(-2, -1), rngs=rngs)
        self.up = nnx.LinearGeneral(8, (4, 3), use_bias=False, rngs=rngs)


def heads_of(make):
    model = abstract(make)
    kernels = {p: v for p, v in readings(model, per_head=True).items() if p.endswith("kernel")}
    return {path.removesuffix("/kernel"): view for path, view in kernels.items()}


def test_per_head_every_head_of_query_key_and_value_is_a_matrix():
    # (features, heads, size): matrices (features, size), one per head.
    def attention(rngs):
        return nnx.MultiHeadAttention(2, 8, qkv_features=6, decode=False, rngs=rngs)

    each, out = "(2, 8, 3)", "(6, 8)"
    assert heads_of(attention) == {"key": each, "out": out, "query": each, "value": each}
    each, out = "(7, 2, 8, 3)", "(7, 6, 8)"
    stack = heads_of(stacked(attention, 7))
    assert stack == {"key": each, "out": out, "query": each, "value": each}
    assert heads_of(OwnAttention) == {
        "query": "(4, 8, 3)",
        "key": "(2, 8, 3)",
        "value": "(2, 8, 5)",
        "out": "(20, 8)",
        "up": "(8, 12)",
    }


def test_per_head_orthogonalises_each_head_alone():
    model = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    rules = dimension_numbers(model, per_head=True)
    tx = orthax.partition_matrices(
        lambda leaves: leaves(orthax.orthogonalize(accuracy="exact")), optax.set_to_zero(), rules
    )
    updates, _ = tx.update(params, tx.init(params), params)
    for head in range(2):
        w = np.asarray(params["query"]["kernel"], np.float64)[:, head]
        u, _, vt = np.linalg.svd(w, full_matrices=False)
        np.testing.assert_allclose(updates["query"]["kernel"][:, head], u @ vt, atol=0.1)


def test_per_head_without_heads_warns():
    model = abstract(lambda r: nnx.Dict(query=nnx.Linear(4, 6, rngs=r)))
    with pytest.warns(UserWarning, match="dimension_numbers: per_head=True, but no .* query"):
        dimension_numbers(model, per_head=True)


# --- heads, exclusions, unknown modules


@pytest.mark.parametrize("name", ["lm_head", "head", "logits", "classifier"])
def test_output_heads_go_to_the_fallback(name):
    model = abstract(lambda r: nnx.Dict({name: nnx.LinearGeneral(8, (4, 5), rngs=r)}))
    assert readings(model) == {f"{name}/bias": "fallback", f"{name}/kernel": "fallback"}


@pytest.mark.parametrize(
    "exclude",
    ["layers/.*|mix", ["mix", "layers/"], (re.compile("MIX", re.IGNORECASE), "^layers/")],
)
def test_excluded_paths_go_to_the_fallback_too(exclude):
    excluded = {path: "fallback" for path in MODEL if path.startswith(("layers/", "mix/"))}
    assert readings(abstract(Model), exclude) == MODEL | excluded


class Unknown(nnx.Module):
    def __init__(self, rngs):
        self.scale_of_all = nnx.Param(jnp.ones(3))
        self.offset = nnx.Param(jnp.ones(()))
        self.mixing = nnx.Param(jnp.ones((8, 9)))
        self.experts = nnx.Param(jnp.ones((5, 3, 4)))


def test_bare_params_are_left_to_the_default_rule():
    model = abstract(Unknown)
    assert dimension_numbers(model) == orthax.PathRules(())
    assert readings(model) == {
        "experts": "undecided",
        "mixing": "(8, 9)",
        "offset": "fallback",
        "scale_of_all": "fallback",
    }
    optimizer = orthax.muon(1e-3, dimension_numbers=dimension_numbers(model))
    with pytest.raises(ValueError, match=r"muon: 'experts' has shape \(5, 3, 4\)"):
        optimizer.init(nnx.state(model, nnx.Param))


def test_rules_of_ones_own_go_before_those_of_the_model():
    rules = dimension_numbers(abstract(Unknown))
    per_expert = optax.contrib.MuonDimensionNumbers(-2, -1)
    rules = orthax.PathRules((("^experts$", per_expert), *rules.rules))
    view = orthax.explain(nnx.state(abstract(Unknown)), rules).rows[0].view
    assert view == "(5, 3, 4)"


class Reshaped(nnx.Module):
    def __init__(self, rngs):
        self.fused = nnx.Linear(4, 6, rngs=rngs)
        self.fused.kernel = nnx.Param(jnp.ones((4, 18)))


def test_a_kernel_that_is_not_of_its_layer_raises_and_names_itself_unless_excluded():
    message = r"dimension_numbers: 'fused/kernel' has shape \(4, 18\), but one Linear has a kernel "
    with pytest.raises(ValueError, match=message + r".*exclude=r'fused/kernel'"):
        dimension_numbers(abstract(Reshaped))
    assert readings(abstract(Reshaped), "fused/kernel")["fused/kernel"] == "fallback"


def test_a_stack_that_can_lie_in_two_places_and_not_lead_raises():
    # (4, 7, 4, 4) is (4, 4) without axes 0 and 1, 1 and 2, or 1 and 3; the bias denies the first.
    def make(rngs):
        layer = nnx.Linear(4, 4, rngs=rngs)
        layer.kernel = nnx.Param(jnp.ones((4, 7, 4, 4)))
        layer.bias = nnx.Param(jnp.ones((4, 7)))
        return nnx.Dict(layer=layer)

    with pytest.raises(ValueError, match=r"'layer/kernel'.*a stack cannot be told"):
        dimension_numbers(abstract(make))


@pytest.mark.parametrize("equation", ["bd,d...->b...", None])
def test_an_einsum_string_that_does_not_name_the_axes_of_its_kernel_raises(equation):
    def make(rngs):
        layer = nnx.Einsum("bd,def->bef", (2, 3, 4), rngs=rngs)
        layer.einsum_str = equation
        return nnx.Dict(layer=layer)

    message = r"dimension_numbers: einsum string .* does not name each axis of 'layer/kernel'"
    with pytest.raises(ValueError, match=message):
        dimension_numbers(abstract(make))
