"""Which leaves the default rule calls matrices. Every expectation is written by hand."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import orthax
import orthax.nn

STACKED = {"params": 0, "batch_stats": 0}


def shapes(tree):
    """A tree of shapes as one of `ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple) and all(isinstance(size, int) for size in x),
    )


def readings(params):
    """Path -> the view that a leaf gets, or its destination if it is no matrix."""
    rows = orthax.explain(params).rows
    return {row.path: row.view or row.destination for row in rows}


def linen_params(module, *inputs):
    """Params of a Linen module, as shapes."""
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def zeros(*shape):
    return jnp.zeros(shape)


# --- Linen models, by automatic names


class LinenBlock(nn.Module):
    """Every kind of layer, width 8, 2 heads of size 3; a body for nn.scan."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)(nn.LayerNorm()(x))
        x = nn.Conv(8, (5,))(x)
        y = nn.Conv(4, (3, 2), use_bias=False)(x[..., None])
        y = nn.BatchNorm(use_running_average=True)(y)
        y = nn.ConvTranspose(1, (2, 2))(y)[..., 0]
        heads = nn.DenseGeneral((2, 3))(x)
        z = nn.DenseGeneral(8, axis=(-2, -1))(heads)
        return nn.Dense(8)(nn.RMSNorm()(x + y + z)), None


BLOCK = {
    "BatchNorm_0/bias": "fallback",
    "BatchNorm_0/scale": "fallback",
    "ConvTranspose_0/bias": "fallback",
    "ConvTranspose_0/kernel": "(16, 1)",
    "Conv_0/bias": "fallback",
    "Conv_0/kernel": "(40, 8)",
    "Conv_1/kernel": "(6, 4)",
    "DenseGeneral_0/bias": "fallback",
    "DenseGeneral_0/kernel": "(8, 6)",
    "DenseGeneral_1/bias": "fallback",
    "DenseGeneral_1/kernel": "(6, 8)",
    "Dense_0/bias": "fallback",
    "Dense_0/kernel": "(8, 8)",
    "LayerNorm_0/bias": "fallback",
    "LayerNorm_0/scale": "fallback",
    "MultiHeadDotProductAttention_0/key/bias": "fallback",
    "MultiHeadDotProductAttention_0/key/kernel": "(8, 6)",
    "MultiHeadDotProductAttention_0/out/bias": "fallback",
    "MultiHeadDotProductAttention_0/out/kernel": "(6, 8)",
    "MultiHeadDotProductAttention_0/query/bias": "fallback",
    "MultiHeadDotProductAttention_0/query/kernel": "(8, 6)",
    "MultiHeadDotProductAttention_0/value/bias": "fallback",
    "MultiHeadDotProductAttention_0/value/kernel": "(8, 6)",
    "RMSNorm_0/scale": "fallback",
}
SCANNED_BLOCK = BLOCK | {
    "ConvTranspose_0/kernel": "(7, 16, 1)",
    "Conv_0/kernel": "(7, 40, 8)",
    "Conv_1/kernel": "(7, 6, 4)",
    "DenseGeneral_0/kernel": "(7, 8, 6)",
    "DenseGeneral_1/kernel": "(7, 6, 8)",
    "Dense_0/kernel": "(7, 8, 8)",
    "MultiHeadDotProductAttention_0/key/kernel": "(7, 8, 6)",
    "MultiHeadDotProductAttention_0/out/kernel": "(7, 6, 8)",
    "MultiHeadDotProductAttention_0/query/kernel": "(7, 8, 6)",
    "MultiHeadDotProductAttention_0/value/kernel": "(7, 8, 6)",
}


def within(name, expected):
    return {f"{name}/{path}": reading for path, reading in expected.items()}


def scanned(module, length=7):
    return nn.scan(module, variable_axes=STACKED, split_rngs={"params": True}, length=length)


class LinenTower(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(20, 8)
        x = embed(tokens)
        x, _ = LinenBlock()(x)
        x, _ = nn.remat(LinenBlock)()(x)
        x, _ = scanned(LinenBlock)()(x, None)
        x, _ = scanned(LinenBlock)(name="layers")(x, None)
        nn.Dense(20, name="lm_head")(x)
        return embed.attend(x)


def test_a_linen_model_is_read_without_dimension_numbers():
    params = linen_params(LinenTower(), jnp.zeros((2, 6), jnp.int32))
    assert readings(params) == {
        "Embed_0/embedding": "fallback",
        **within("LinenBlock_0", BLOCK),
        **within("CheckpointLinenBlock_0", BLOCK),
        **within("ScanLinenBlock_0", SCANNED_BLOCK),
        **within("layers", SCANNED_BLOCK),
        "lm_head/bias": "fallback",
        "lm_head/kernel": "fallback",
    }


class LiftedLayers(nn.Module):
    """Single layers under nn.vmap and nn.jit: experts, and one layer shared by all."""

    @nn.compact
    def __call__(self, x):
        each = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": 0}
        x = nn.vmap(nn.Dense, **each)(5)(x)
        x = nn.vmap(nn.vmap(nn.Dense, **each), **each)(4)(x)
        x = nn.vmap(nn.Conv, **each)(4, (3, 3))(x)
        x = nn.jit(nn.Dense)(4)(x)
        shared = {"variable_axes": {"params": None}, "split_rngs": {"params": False}}
        return nn.vmap(nn.Conv, in_axes=0, **shared)(4, (3, 3))(x)


def test_lifted_linen_layers_are_stacks_unless_they_share_their_params():
    assert readings(linen_params(LiftedLayers(), zeros(2, 6, 7, 7, 4))) == {
        "JitDense_0/bias": "fallback",
        "JitDense_0/kernel": "(4, 4)",
        "VmapConv_0/bias": "fallback",
        "VmapConv_0/kernel": "(2, 36, 4)",
        "VmapConv_1/bias": "fallback",
        "VmapConv_1/kernel": "(36, 4)",
        "VmapDense_0/bias": "fallback",
        "VmapDense_0/kernel": "(2, 4, 5)",
        "VmapVmapDense_0/bias": "fallback",
        "VmapVmapDense_0/kernel": "(2, 6, 5, 4)",
    }


def test_boxed_linen_params_are_read_like_plain_ones():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "heads"))
    logical = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))

    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.MultiHeadDotProductAttention(num_heads=2, kernel_init=init)(x)
            return nn.Dense(3, kernel_init=logical)(x)

    params = linen_params(Boxed(), zeros(1, 5, 8))
    assert isinstance(params["Dense_0"]["kernel"], nn.LogicallyPartitioned)
    attention = {
        f"MultiHeadDotProductAttention_0/{name}/{leaf}": reading
        for name in ("query", "key", "value", "out")
        for leaf, reading in (("bias", "fallback"), ("kernel", "(8, 8)"))
    }
    assert readings(params) == {
        "Dense_0/bias": "fallback",
        "Dense_0/kernel": "(8, 3)",
        **attention,
    }


def test_a_linen_einsum_of_three_axes_is_undecided_unless_a_bias_tells():
    params = linen_params(nn.Sequential([nn.Einsum((8, 2, 3), "btd,dhk->bthk")]), zeros(1, 5, 8))
    assert readings(params) == {"layers_0/bias": "fallback", "layers_0/kernel": "(8, 6)"}
    del params["layers_0"]["bias"]
    assert readings(params) == {"layers_0/kernel": "undecided"}
    assert readings(shapes({"Einsum_0": {"kernel": (8, 2, 3)}})) == {"Einsum_0/kernel": "undecided"}


# --- NNX models, by the names that the user gave


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, 8, qkv_features=6, decode=False, normalize_qk=True, rngs=rngs
        )
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.LoRALinear(16, 8, lora_rank=2, rngs=rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(20, 8, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.conv = nnx.Conv(8, 4, (5,), rngs=rngs)
        self.down_conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.convs = nnx.List([nnx.Conv(4, 2, (3, 3), rngs=rngs)])
        self.neuron = nnx.Linear(8, 1, rngs=rngs)
        self.spread = nnx.Linear(1, 8, rngs=rngs)
        self.head = nnx.Linear(8, 20, rngs=rngs)


NNX_BLOCK = {
    "attention/key/bias": "fallback",
    "attention/key/kernel": "(8, 6)",
    "attention/key_ln/scale": "fallback",
    "attention/out/bias": "fallback",
    "attention/out/kernel": "(6, 8)",
    "attention/query/bias": "fallback",
    "attention/query/kernel": "(8, 6)",
    "attention/query_ln/scale": "fallback",
    "attention/value/bias": "fallback",
    "attention/value/kernel": "(8, 6)",
    "down/bias": "fallback",
    "down/kernel": "(16, 8)",
    "down/lora/lora_a": "(16, 2)",
    "down/lora/lora_b": "(2, 8)",
    "norm/scale": "fallback",
    "up/bias": "fallback",
    "up/kernel": "(8, 16)",
}


@pytest.mark.parametrize("pure", [False, True], ids=["variables", "pure state"])
def test_an_nnx_model_is_read_where_names_decide(pure):
    state = nnx.state(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))), nnx.Param)
    if pure:
        state = nnx.to_pure_dict(state)
    assert readings(state) == {
        **within("blocks/0", NNX_BLOCK),
        **within("blocks/1", NNX_BLOCK),
        "conv/bias": "fallback",
        "conv/kernel": "(40, 4)",
        "convs/0/bias": "fallback",
        "convs/0/kernel": "(36, 2)",
        "down_conv/kernel": "(27, 4)",
        "embed/embedding": "fallback",
        "head/bias": "fallback",
        "head/kernel": "fallback",
        "neuron/bias": "fallback",
        "neuron/kernel": "(8, 1)",
        "spread/bias": "fallback",
        "spread/kernel": "(1, 8)",
    }


def vmapped_linear(rngs):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0)
    def make(rngs):
        return nnx.Linear(8, 4, rngs=rngs)

    return make(rngs)


def state_of(layer, name="mix"):
    model = nnx.eval_shape(lambda: nnx.Dict({name: layer(nnx.Rngs(0))}))
    return nnx.state(model, nnx.Param)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (lambda rngs: nnx.Conv(8, 4, (5,), rngs=rngs), "(40, 4)"),
        (lambda rngs: nnx.Conv(1, 16, (3, 3), rngs=rngs), "(9, 16)"),
        (lambda rngs: nnx.ConvTranspose(8, 4, (3, 3), transpose_kernel=True, rngs=rngs), "(72, 4)"),
        (vmapped_linear, "(3, 8, 4)"),
        (lambda rngs: nnx.LinearGeneral(8, (2, 3), rngs=rngs), "(8, 6)"),
        (lambda rngs: nnx.LinearGeneral((2, 3), 8, axis=(-2, -1), rngs=rngs), "(6, 8)"),
    ],
)
def test_the_bias_of_an_nnx_layer_of_any_name_tells_its_outputs(layer, expected):
    found = readings(state_of(layer))
    assert found == {"mix/kernel": expected, "mix/bias": "fallback"}


@pytest.mark.parametrize(
    "layer",
    [
        lambda rngs: nnx.Conv(8, 4, (5,), use_bias=False, rngs=rngs),
        lambda rngs: nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs),
        lambda rngs: nnx.LinearGeneral(8, (2, 3), use_bias=False, rngs=rngs),
        lambda rngs: nnx.Einsum("btd,dhk->bthk", (8, 2, 3), rngs=rngs),
    ],
    ids=["1-D convolution", "2-D convolution", "LinearGeneral", "Einsum"],
)
def test_nnx_layers_that_nothing_tells_apart_raise_and_name_leaf_and_remedy(layer):
    message = (
        r"muon: 'mix/kernel' has shape \(\d, \d, \d.*neither names nor shapes"
        r".*orthax\.nn\.dimension_numbers\(model\).*orthax\.eqx\.dimension_numbers\(model\)"
        r".*Linen.*orthax\.PathRules\(\(\(r'mix/kernel'"
    )
    with pytest.raises(ValueError, match=message):
        orthax.muon(1e-3).init(state_of(layer))


@pytest.mark.parametrize(
    ("path", "shape", "view"),
    [
        ("c1/kernel", (3, 3, 1, 16), "(9, 16)"),
        ("c1/kernel", (5, 4, 8), "(20, 8)"),
        ("up/weight", (8, 8), "(8, 8)"),
        ("c.1/weight", (16, 2, 3, 3), "(18, 16)"),
    ],
)
def test_the_error_prints_a_rule_that_can_be_pasted(path, shape, view):
    params = nested(path, shape)
    with pytest.raises(ValueError) as error:
        orthax.muon(1e-3).init(params)
    (rules,) = re.findall(r"orthax\.PathRules\(.*?\),\)\)", str(error.value))
    (row,) = orthax.explain(params, eval(rules)).rows
    assert row.view == view
    if path == "c1/kernel" and len(shape) == 4:
        assert "MuonDimensionNumbers((0, 1, 2), 3)" in rules


# --- one leaf at a time


@pytest.mark.parametrize("shape", [(), (8,), (2, 4), (3, 2, 4), (3, 5, 2, 4)])
@pytest.mark.parametrize("name", ["bias", "scale", "out_bias"])
def test_biases_and_scales_are_never_matrices(name, shape):
    assert readings(shapes({"layer": {name: shape}})) == {f"layer/{name}": "fallback"}


@pytest.mark.parametrize(
    "path",
    ["norm/weight", "RMSNorm_0/gamma", "query_norm/weight", "ln_1/g", "bn1/weight", "my_norm"],
)
def test_stacked_norms_are_never_matrices(path):
    assert readings(nested(path, (3, 8))) == {path: "fallback"}


@pytest.mark.parametrize(
    "path",
    [
        "embed/embedding",
        "Embed_0/embedding",
        "wte",
        "wpe",
        "pos_embedding",
        "tok_emb/weight",
        "tokenEmbedder/table",
        "patch_embed/kernel",
    ],
)
def test_embeddings_are_never_matrices(path):
    assert readings(nested(path, (20, 8))) == {path: "fallback"}


def decided(path, shape=(8, 20)):
    (row,) = orthax.explain(nested(path, shape)).rows
    return row.destination, row.reason


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("lm_head", "lm_head"),
        ("head", "head"),
        ("logits", "logits"),
        ("classifier", "classifier"),
        ("logits_dense", "logits"),
        ("mlp_head", "head"),
        ("heads", "heads"),
        ("heads_0", "heads"),
        ("head_1", "head"),
        ("unembed", "unembed"),
        ("to_logits", "logits"),
        ("qa_outputs", "qa_outputs"),
        ("policy_head", "head"),
        ("value_head", "head"),
        ("output_head", "head"),
        ("LMHead_0", "lm_head"),
        ("ValueHead_2", "head"),
        ("head_proj", "head"),
        ("head-linear", "head"),
        ("headDense", "head"),
        ("classifier_dense", "classifier"),
        ("output_projection_head", "head"),
        ("multi_task_logits", "logits"),
    ],
)
def test_output_heads_go_to_the_fallback_wherever_they_are(name, word):
    for path in (f"{name}/kernel", f"decoder/{name}/Dense_0/kernel", name):
        destination, reason = decided(path)
        assert destination == "fallback"
        assert reason.startswith(f"output head '{word}'")
    # Haiku's keys hold slashes, and Keras's are whole paths.
    haiku = shapes({f"decoder/~/{name}": {"w": (8, 20)}})
    keras = shapes({f"decoder/{name}/kernel": (8, 20)})
    assert set(readings(haiku).values()) == set(readings(keras).values()) == {"fallback"}


@pytest.mark.parametrize(
    "name",
    [
        "ahead",
        "head_mixing",
        "attention_heads_mixing",
        "attention_head",
        "num_heads",
        "multi_head",
        "MultiHeadDotProductAttention_0",
        "multi_head_attention/proj",
        "MultiHead_0",
        "header",
    ],
)
def test_names_that_speak_of_other_heads_are_matrices(name):
    for path in (f"{name}/kernel", name):
        assert readings(nested(path, (8, 20))) == {path: "(8, 20)"}
    assert readings(shapes({name: {"w": (8, 20)}})) == {f"{name}/w": "(8, 20)"}


@pytest.mark.parametrize("path", ["patch_embed/proj", "time_embedding/linear_1"])
def test_layers_of_a_module_of_embeddings_are_matrices(path):
    for leaf in (path, f"{path}/kernel"):
        assert readings(nested(leaf, (8, 20))) == {leaf: "(8, 20)"}


@pytest.mark.parametrize(
    ("path", "shape"),
    [("pos", (16, 8)), ("pos_embed", (1, 16, 8)), ("positions", (16, 8)), ("pos_enc/w", (16, 8))],
)
def test_embeddings_of_positions_are_embeddings(path, shape):
    assert decided(path, shape) == ("fallback", "embedding")
    assert decided("pos_proj/kernel", (16, 8))[0] == "matrices"


# --- weights whose outputs come first: Equinox, haliax, torch


@pytest.mark.parametrize(
    ("weight", "bias", "expected"),
    [
        ((4, 9), (4,), "(9, 4)"),
        ((9, 4), (4,), "(9, 4)"),
        ((4, 9), None, "undecided"),
        ((4, 4), (4,), "undecided"),
        ((4, 9), (3,), "undecided"),
        ((4, 9), (4, 9), "fallback"),  # a LayerNorm
        ((1, 9), (1,), "(9, 1)"),
        ((1, 9), None, "fallback"),
        ((16, 1, 3, 3), (16, 1, 1), "(9, 16)"),  # Equinox's Conv2d
        ((16, 8, 1, 1), (16, 1, 1), "(8, 16)"),
        ((16, 1, 3, 3), (16,), "(9, 16)"),  # torch's
        ((16, 16, 3, 3), (16,), "(144, 16)"),
        ((16, 8, 16), (16,), "undecided"),
        ((3, 3, 1, 16), (16,), "(9, 16)"),
        ((5, 16, 2, 3, 3), (5, 16, 1, 1), "(5, 18, 16)"),  # a stack of Equinox's Conv2d
        ((16, 1, 5), (16, 1), "undecided"),  # one Conv1d, or sixteen Linear(5, 1)
        ((5, 4, 9), (5, 4), "undecided"),  # five Linear(9, 4), or one to (5, 4)
        ((2, 3, 9), (9,), "(6, 9)"),
        ((4, 9, 3), (9,), "(12, 9)"),  # the only axis of that size
    ],
)
def test_the_bias_beside_a_weight_tells_where_its_outputs_are(weight, bias, expected):
    layer = {"weight": weight} | ({} if bias is None else {"bias": bias})
    for parent in ("up", "layers.0.up"):
        assert readings(shapes({parent: layer}))[f"{parent}/weight"] == expected


def test_layers_beside_a_weight_tell_whether_it_is_stacked():
    layer = {"weight": (5, 4, 9), "bias": (5, 4)}
    for scale, expected in {(5, 9): "(5, 9, 4)", (9,): "(9, 20)"}.items():
        found = readings(shapes({"layers": {"up": layer, "norm": {"scale": scale}}}))
        assert found["layers/up/weight"] == expected


@pytest.mark.parametrize("name", ["deconv", "conv_transpose"])
def test_a_transposed_weight_is_read_by_its_bias_only(name):
    for weight, expected in {(8, 4, 3, 3): "(72, 4)", (4, 4, 3, 3): "undecided"}.items():
        found = readings(shapes({name: {"weight": weight, "bias": (4,)}}))
        assert found[f"{name}/weight"] == expected


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({"weight_ih": (12, 5), "bias": (12,)}, "(5, 12)"),
        ({"in_proj_weight": (12, 5), "in_proj_bias": (12,), "bias": (5,)}, "(5, 12)"),
        ({"weight_hh": (12, 12), "bias": (12,)}, "undecided"),
        ({"kernel": (4, 9), "bias": (4,)}, "(4, 9)"),  # as in Flax, whatever the bias
        ({"w": (4, 9), "b": (9,)}, "(4, 9)"),
        ({"w": (4, 9)}, "(4, 9)"),
        ({"w": (9, 9), "b": (9,)}, "(9, 9)"),
        ({"w": (4, 9), "b": (4,)}, "(9, 4)"),
        ({"w_up": (4, 9), "b_up": (4,)}, "(9, 4)"),
        ({"w": (3, 3, 1, 16), "b": (16,)}, "(9, 16)"),  # Haiku's Conv2D
    ],
)
def test_weights_of_other_names_find_their_bias(flat, expected):
    assert next(reversed(readings(shapes({"up": flat})).values())) == expected


def test_equinox_models_are_read_where_biases_decide():
    eqx = pytest.importorskip("equinox")  # the oldest versions are tested without it
    key = jax.random.key(0)
    layers = [
        eqx.nn.Linear(5, 4, key=key),
        eqx.nn.Conv2d(1, 16, 3, key=key),
        eqx.nn.ConvTranspose2d(2, 16, 3, key=key),
        eqx.nn.GRUCell(3, 4, key=key),
        eqx.nn.LayerNorm((9, 8)),
        eqx.nn.Linear(4, 4, key=key),
    ]
    found = readings(eqx.filter(layers, eqx.is_inexact_array))
    assert {path: view for path, view in found.items() if view != "fallback"} == {
        "0/weight": "(5, 4)",
        "1/weight": "(9, 16)",
        "2/weight": "(18, 16)",
        "3/weight_ih": "(3, 12)",
        "3/weight_hh": "(4, 12)",
        "5/weight": "undecided",
    }


def test_the_array_in_a_named_array_is_no_name():
    layer = {"weight": {"array": (4, 9)}, "bias": {"array": (4,)}}
    assert readings(shapes({"up": layer}))["up/weight/array"] == "(9, 4)"


# --- Keras and Haiku, whose keys hold slashes


def test_keras_variables_by_path_are_read():
    table = {
        "conv2d/kernel": ((3, 3, 1, 4), "(9, 4)"),
        "conv2d/bias": ((4,), "fallback"),
        "conv2d_transpose/kernel": ((3, 3, 5, 4), "(36, 5)"),
        "conv2d_transpose/bias": ((5,), "fallback"),
        "conv2d_transpose_1/kernel": ((3, 3, 4, 4), "undecided"),
        "conv2d_transpose_1/bias": ((4,), "fallback"),
        "separable_conv2d/depthwise_kernel": ((3, 3, 4, 1), "fallback"),
        "separable_conv2d/pointwise_kernel": ((1, 1, 4, 8), "(4, 8)"),
        "separable_conv2d/bias": ((8,), "fallback"),
        "depthwise_conv2d/kernel": ((3, 3, 8, 1), "fallback"),
        "multi_head_attention/query/kernel": ((8, 2, 3), "(8, 6)"),
        "multi_head_attention/query/bias": ((2, 3), "fallback"),
        "multi_head_attention/attention_output/kernel": ((2, 3, 8), "(6, 8)"),
        "multi_head_attention/attention_output/bias": ((8,), "fallback"),
        "token_embedding/embeddings": ((20, 8), "fallback"),
        "lstm/lstm_cell/recurrent_kernel": ((4, 16), "(4, 16)"),
        "layer_normalization/gamma": ((8,), "fallback"),
        "policy_head/kernel": ((8, 4), "fallback"),
    }
    found = readings(shapes({f"model/{path}": shape for path, (shape, _) in table.items()}))
    assert found == {f"model/{path}": view for path, (_, view) in table.items()}


def test_haiku_params_are_read():
    hk = pytest.importorskip("haiku")  # the oldest versions are tested without it

    def forward(x):
        x = hk.Conv2DTranspose(5, 3)(hk.Conv2D(4, 3)(x))
        x = hk.DepthwiseConv2D(1, 3)(x).reshape(1, -1, 5)
        x = hk.MultiHeadAttention(2, 3, w_init=jnp.zeros)(x, x, x)
        return hk.Linear(2, name="value_head")(hk.nets.MLP([4, 2])(x))

    params = jax.eval_shape(hk.transform(forward).init, jax.random.key(0), zeros(1, 6, 6, 1))
    found = {path: view for path, view in readings(params).items() if view != "fallback"}
    attention = {f"multi_head_attention/{name}/w": "(5, 6)" for name in ("query", "key", "value")}
    assert found == attention | {
        "conv2_d/w": "(9, 4)",
        "conv2_d_transpose/w": "(36, 5)",
        "multi_head_attention/linear/w": "(6, 6)",
        "mlp/~/linear_0/w": "(6, 4)",
        "mlp/~/linear_1/w": "(4, 2)",
    }


def test_keys_that_come_to_the_same_path_are_read_by_their_own_shapes():
    params = shapes({"up/kernel": (4, 9), "up": {"kernel": (9,)}})
    assert [row.view for row in orthax.explain(params).rows] == ["", "(4, 9)"]


# --- vectors and tables


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 1, 8), (1, 8), (8, 1), (1, 1, 1)])
@pytest.mark.parametrize("name", ["layer_scale", "affine/g", "cls_token"])
def test_at_most_one_axis_above_1_is_a_vector(name, shape):
    assert decided(name, shape) == ("fallback", "at most one axis above 1: a vector")


def test_kernels_of_one_output_are_matrices_and_no_error_where_nothing_decides():
    assert decided("proj/w", (8, 1))[0] == decided("proj/kernel", (1, 8))[0] == "matrices"
    assert decided("mix/kernel", (1, 1, 8))[0] == "fallback"
    assert readings(shapes({"mix": {"kernel": (1, 1, 8), "bias": (8,)}}))["mix/kernel"] == "(1, 8)"


@pytest.mark.parametrize("name", ["b", "b_up", "b1", "beta", "gamma", "offset", "A_log"])
def test_vectors_beside_weights_stacked_by_hand_are_vectors(name):
    for weight, expected in {(9, 16, 8): "fallback", (10, 16, 8): "(9, 16)"}.items():
        stacked = {"Dense_0": {"kernel": weight}, name: (9, 16)}
        assert readings(shapes({"layers": stacked}))[f"layers/{name}"] == expected
    twice = {"up": {"kernel": (9, 3, 16, 8), name: (9, 3, 8)}}
    assert readings(shapes(twice))[f"up/{name}"] == "fallback"


@pytest.mark.parametrize("name", ["w_up", "B", "proj", "mixing_b"])
def test_matrices_beside_a_stack_stay_matrices(name):
    params = {"layers": {"Dense_0": {"kernel": (9, 16, 8)}, name: (9, 16)}}
    assert readings(shapes(params))[f"layers/{name}"] == "(9, 16)"


@pytest.mark.parametrize("path", ["rational/numerator", "mixing", "module/table"])
def test_a_side_below_8_without_the_name_of_a_weight_is_a_table(path):
    for shape in ((8, 4), (6, 8), (7, 64)):
        destination, reason = decided(path, shape)
        assert destination == "fallback" and "a side below 8" in reason
    assert decided(path, (8, 9))[0] == "matrices"


def test_tables_without_a_name_of_their_own_keep_their_reading():
    assert readings(shapes({"dense": [(8, 4), (4,)]})) == {
        "dense/0": "(8, 4)",
        "dense/1": "fallback",
    }


@pytest.mark.parametrize("name", ["kernel", "w", "W", "w_gate", "w1", "up_kernel", "lora_a"])
def test_the_name_of_a_weight_is_trusted_at_any_size(name):
    assert decided(f"layer/{name}", (8, 4))[0] == "matrices"


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("depthwise/kernel", (3, 3, 1, 16)),
        ("DepthwiseConv_0/kernel", (3, 3, 1, 16)),
        ("block/dwconv/kernel", (7, 7, 1, 16)),
        ("block/depthwise_kernel", (3, 3, 16, 1)),
        ("conv1d/kernel", (4, 16)),  # (taps, channels)
        ("mixer/conv_w", (4, 16)),
    ],
)
def test_depthwise_kernels_go_to_the_fallback(path, shape):
    destination, reason = decided(path, shape)
    assert destination == "fallback" and reason.startswith("depthwise")


def test_an_unknown_name_with_two_axes_is_a_matrix():
    assert readings(shapes({"w_gate": (4, 9), "proj": {"w": (9, 1)}})) == {
        "proj/w": "(9, 1)",
        "w_gate": "(4, 9)",
    }


@pytest.mark.parametrize("path", ["experts/up", "layers/w_in", "cls_token", "module/kernel"])
@pytest.mark.parametrize("shape", [(4, 8, 16), (2, 4, 8, 16)])
def test_a_named_leaf_of_three_axes_that_no_rule_knows_raises_and_names_itself(path, shape):
    with pytest.raises(ValueError, match=rf"as_matrices: '{path}' has shape \({shape[0]}, "):
        orthax.as_matrices(optax.identity()).init(nested(path, shape))
    assert readings(nested(path, shape)) == {path: "undecided"}


def test_two_axes_under_scan_may_be_a_stack_of_vectors():
    assert readings(shapes({"ScanBlock_0": {"gamma": (7, 8)}})) == {
        "ScanBlock_0/gamma": "undecided"
    }


def nested(path, shape):
    for part in reversed(path.split("/")):
        shape = {part: shape}
    return shapes(shape)


@pytest.mark.parametrize("shape", [(4, 8), (3, 4, 8), (2, 3, 4, 8)])
def test_leaves_without_names_are_matrices_in_their_last_two_axes(shape):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    vector = jax.ShapeDtypeStruct((8,), jnp.float32)
    expected = str(shape)
    assert readings(leaf) == {"": expected}
    assert readings([leaf, (leaf, vector)]) == {
        "0": expected,
        "1/0": expected,
        "1/1": "fallback",
    }


# --- names that decide only together with the shapes around them


def attention(query, key, value, out):
    kernels = {"query": query, "key": key, "value": value, "out": out}
    return shapes({name: {"kernel": shape} for name, shape in kernels.items()})


def test_grouped_query_and_cross_attention_are_attention():
    params = attention((16, 4, 8), (12, 2, 8), (12, 2, 8), (4, 8, 10))
    assert readings(params) == {
        "key/kernel": "(12, 16)",
        "out/kernel": "(32, 10)",
        "query/kernel": "(16, 32)",
        "value/kernel": "(12, 16)",
    }


@pytest.mark.parametrize(
    "kernels",
    [
        [(6, 8, 8)] * 4,  # a stack of square Linear layers under the names of attention
        [(8, 8, 8)] * 4,  # the same, as long as wide: attention with head_dim 8 fits too
        [(8, 2, 4), (8, 2, 4), (8, 2, 4), (3, 4, 8)],
        [(8, 2, 4), (8, 2, 4), (8, 3, 4), (2, 4, 8)],
        [(8, 2, 4), (8, 2, 4), (8, 2, 4), (7, 2, 4, 8)],
        [(7, 8, 2, 4), (7, 8, 2, 4), (7, 8, 2, 4), (6, 2, 4, 8)],
    ],
)
def test_names_of_attention_without_its_shapes_are_undecided(kernels):
    assert set(readings(attention(*kernels)).values()) == {"undecided"}


@pytest.mark.parametrize("missing", ["query", "key", "value", "out"])
def test_attention_with_a_projection_missing_is_undecided(missing):
    params = attention((8, 2, 4), (8, 2, 4), (8, 2, 4), (2, 4, 8))
    del params[missing]
    assert set(readings(params).values()) == {"undecided"}


@pytest.mark.parametrize(
    ("kernel", "bias", "expected"),
    [
        ((8, 2, 3), (2, 3), "(8, 6)"),
        ((2, 3, 8), (8,), "(6, 8)"),
        ((7, 8, 2, 3), (7, 2, 3), "(7, 8, 6)"),
        ((4, 8, 2, 3), (2, 3), "(32, 6)"),
        ((8, 8, 3), (8, 3), "undecided"),  # (8, 24), or eight of (8, 3)
        ((8, 2, 3), (3, 2), "undecided"),
        ((8, 2, 3), None, "undecided"),
    ],
)
def test_the_bias_of_a_dense_general_tells_its_outputs(kernel, bias, expected):
    layer = {"kernel": kernel} | ({} if bias is None else {"bias": bias})
    assert readings(shapes({"DenseGeneral_0": layer}))["DenseGeneral_0/kernel"] == expected


@pytest.mark.parametrize(("scale", "expected"), [((8,), "(8, 24)"), ((8, 5), "(8, 8, 3)")])
def test_layers_beside_a_dense_general_tell_whether_it_is_stacked(scale, expected):
    params = {
        "DenseGeneral_0": {"kernel": (8, 8, 3), "bias": (8, 3)},
        "LayerNorm_0": {"scale": scale},
    }
    found = readings(shapes({"layers": params}))
    assert found["layers/DenseGeneral_0/kernel"] == expected


@pytest.mark.parametrize(
    ("path", "kernel", "bias", "expected"),
    [
        ("Conv_0", (5, 3, 8), (8,), "(15, 8)"),
        ("Conv_0", (5, 3, 8), None, "(15, 8)"),
        ("Conv_0", (3, 3, 4, 8), None, "(36, 8)"),
        ("Conv_0", (2, 3, 3, 4, 8), (8,), "(72, 8)"),
        ("Conv_0", (2, 3, 3, 4, 8), (2, 8), "(2, 36, 8)"),
        ("Conv_0", (2, 3, 3, 4, 8), None, "undecided"),  # 3-D, or two of 2-D
        ("Conv_0", (3, 3, 4, 8), (7,), "undecided"),
        ("Conv_0", (3, 4, 8), (3, 8), "undecided"),
        ("ScanBlock_0/Conv_0", (2, 3, 4, 8), (2, 8), "(2, 12, 8)"),
        ("ScanBlock_0/Conv_0", (2, 3, 4, 8), (8,), "(24, 8)"),  # params broadcast over the scan
        ("ScanBlock_0/Conv_0", (2, 3, 4, 8), None, "undecided"),
        ("VmapConv_0", (2, 3, 4, 8), None, "undecided"),
        ("ConvLocal_0", (5, 6, 8), None, "undecided"),
        ("stem_conv", (5, 3, 8), (8,), "(15, 8)"),
        ("conv1", (2, 5, 3, 8), (2, 8), "(2, 15, 8)"),
    ],
)
def test_a_convolution_is_read_by_its_bias_or_its_rank(path, kernel, bias, expected):
    layer = {"kernel": kernel} | ({} if bias is None else {"bias": bias})
    params = {path.split("/")[-1]: layer}
    for part in path.split("/")[-2::-1]:
        params = {part: params}
    assert readings(shapes(params))[f"{path}/kernel"] == expected


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"BatchNorm_0": {"scale": (8,)}}, "(24, 8)"),
        ({"BatchNorm_0": {"scale": (2, 8)}}, "(2, 12, 8)"),
        ({"Dense_0": {"bias": (2, 8), "kernel": (2, 8, 8)}}, "(2, 12, 8)"),
        ({"BatchNorm_0": {"scale": (2, 8)}, "Dense_0": {"bias": (8,)}}, "undecided"),
        ({"VmapDense_0": {"bias": (2, 8)}}, "(24, 8)"),
        ({"LayerNorm_0": {"scale": (7, 8)}}, "(24, 8)"),  # a norm over two axes
    ],
)
def test_layers_beside_a_convolution_without_bias_tell_whether_it_is_stacked(beside, expected):
    params = shapes({"layers": {"Conv_0": {"kernel": (2, 3, 4, 8)}, **beside}})
    assert readings(params)["layers/Conv_0/kernel"] == expected


def test_partition_matrices_shows_the_bias_to_the_rule_inside_and_as_matrices_alone_misses_it():
    params = linen_params(nn.Sequential([LinenBlock()]), zeros(1, 6, 8))
    params = {"DenseGeneral_0": params["layers_0"]["DenseGeneral_0"]}
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
    optimizer = orthax.muon(1e-3)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)

    kernel_only = {"DenseGeneral_0": {"kernel": params["DenseGeneral_0"]["kernel"]}}
    with pytest.raises(ValueError, match=r"as_matrices: 'DenseGeneral_0/kernel' has shape"):
        orthax.as_matrices(optax.identity()).init(kernel_only)


def test_the_kernel_of_a_layer_that_is_the_whole_model_is_read_by_its_bias():
    assert readings(shapes({"kernel": (4, 8), "bias": (8,)}))["kernel"] == "(4, 8)"
    assert readings(shapes({"kernel": (2, 4, 8), "bias": (8,)}))["kernel"] == "(8, 8)"
    assert readings(shapes({"kernel": (2, 4, 8)}))["kernel"] == "undecided"
    model = nnx.Conv(4, 8, (3,), rngs=nnx.Rngs(0))
    rules = orthax.nn.dimension_numbers(model)
    table = orthax.explain(nnx.state(model, nnx.Param), rules)
    assert {row.path: row.view for row in table.rows}["kernel"] == "(12, 8)"


# --- the rank of low-rank optimizers


@pytest.mark.parametrize(
    ("rank", "shown"),
    [
        (0.25, ["16 of 64", "2 of 8 + 1 of 4 + 1 of 4", "12 of 48", ""]),
        (32, ["32 of 64", "all 8 + all 4 + all 4", "32 of 48", ""]),
        (lambda m, n: m // 2, ["32 of 64", "4 of 8 + all 4 + all 4", "all 48", ""]),
    ],
    ids=["fraction", "integer", "function"],
)
def test_explain_tells_the_rank_of_low_rank_optimizers(rank, shown):
    shapes = {"up": (64, 256), "packed": (8, 16), "conv": (3, 4, 8, 48), "bias": (256,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    rules = {
        "up": optax.contrib.MuonDimensionNumbers(0, 1),
        "packed": orthax.Packed(
            optax.contrib.MuonDimensionNumbers(0, 1), axis=1, sections=(8, 4, 4)
        ),
        "conv": optax.contrib.MuonDimensionNumbers((0, 1, 2), 3),
        "bias": None,
    }
    table = orthax.explain(params, rules, rank=rank)
    ranks = {row.path: row.rank for row in table.rows}
    assert [ranks[name] for name in shapes] == shown
    assert "rank" in str(table).splitlines()[0]
    assert "rank" not in str(orthax.explain(params, rules)).splitlines()[0]
    # what the optimizer does
    tx = orthax.low_rank(optax.identity(), rank)
    matrices = {"up": params["up"]}
    kept = jax.tree.leaves(jax.eval_shape(tx.init, matrices).subspaces)
    assert [x.shape[-1] for x in kept] == [int(shown[0].split()[0])]
