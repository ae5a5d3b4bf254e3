"""Recipe: Haiku. Its params are `{module: {name: array}}`, with slashes in the modules' names."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import views
from optax.contrib import MuonDimensionNumbers

import orthax

hk = pytest.importorskip("haiku")

rules = orthax.PathRules(
    (
        (r"(^|/)(lm_head|logits)/", None),
        (r"conv[^/]*/w$", MuonDimensionNumbers((0, 1, 2), 3)),  # (height, width, in, out)
        (r"/w$", MuonDimensionNumbers(0, 1)),  # Linear and the projections of attention
    ),
    default=None,  # b, embeddings, scale, offset
)


@hk.transform
def forward(tokens):
    x = hk.Embed(11, 8)(tokens)
    h = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
    x = x + hk.MultiHeadAttention(2, 3, w_init=hk.initializers.VarianceScaling(), model_size=8)(
        h, h, h
    )
    x = x + hk.Conv2D(8, (1, 3))(x[:, None])[:, 0]
    x = x + hk.nets.MLP([16, 8])(x)
    return hk.Linear(11, name="lm_head")(x)


optimizer = orthax.muon(0.01, weight_decay=0.1, dimension_numbers=rules)


@jax.jit
def train_step(params, state, tokens):
    def loss_of(params):
        logits = forward.apply(params, None, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def test_haiku():
    tokens = jnp.arange(24).reshape(2, 12) % 5
    params = jax.jit(forward.init)(jax.random.key(0), tokens)
    read = views(params, rules)
    assert {path: view for path, view in read.items() if view != "fallback"} == {
        "multi_head_attention/query/w": "(8, 6)",
        "multi_head_attention/key/w": "(8, 6)",
        "multi_head_attention/value/w": "(8, 6)",
        "multi_head_attention/linear/w": "(6, 8)",
        "conv2_d/w": "(24, 8)",
        "mlp/~/linear_0/w": "(8, 16)",
        "mlp/~/linear_1/w": "(16, 8)",
    }
    assert {"embed/embeddings", "layer_norm/scale", "lm_head/w"} <= set(read)
    state, losses = optimizer.init(params), []
    for _ in range(4):
        params, state, loss = train_step(params, state, tokens)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
