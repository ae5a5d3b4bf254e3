"""Recipe: a plain dict of arrays, layers stacked for `lax.scan`, query, key and value fused."""

import jax
import jax.numpy as jnp
import optax
from helpers import views
from optax.contrib import MuonDimensionNumbers

import orthax

LAYERS, WIDTH, HEADS, VOCABULARY = 3, 8, 2, 11

in_out = MuonDimensionNumbers(-2, -1)  # (layers, in, out)
rules = orthax.PathRules(
    (
        (r"^blocks/qkv$", orthax.Packed(in_out, axis=-1, sections=3)),
        # One matrix per head instead: sections=3 * HEADS.
        (r"^blocks/(out|up|down)$", in_out),
    ),
    default=None,  # embed, which is the output head too, biases and norms
)


def init(key):
    def normal(key, *shape):
        return jax.random.normal(key, shape) * shape[-2] ** -0.5

    keys = jax.random.split(key, 5)
    return {
        "embed": normal(keys[0], VOCABULARY, WIDTH),
        "blocks": {
            "norm": jnp.ones((LAYERS, WIDTH)),
            "qkv": normal(keys[1], LAYERS, WIDTH, 3 * WIDTH),
            "out": normal(keys[2], LAYERS, WIDTH, WIDTH),
            "up": normal(keys[3], LAYERS, WIDTH, 4 * WIDTH),
            "b_up": jnp.zeros((LAYERS, 4 * WIDTH)),
            "down": normal(keys[4], LAYERS, 4 * WIDTH, WIDTH),
        },
    }


def apply(params, tokens):
    def block(x, layer):
        h = x * layer["norm"] / jnp.sqrt(1e-6 + jnp.mean(x**2, -1, keepdims=True))
        qkv = jnp.split(h @ layer["qkv"], 3, -1)
        q, k, v = (part.reshape(*x.shape[:-1], HEADS, -1) for part in qkv)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + attended @ layer["out"]
        return x + jax.nn.gelu(x @ layer["up"] + layer["b_up"]) @ layer["down"], None

    x, _ = jax.lax.scan(block, params["embed"][tokens], params["blocks"])
    return x @ params["embed"].T


optimizer = orthax.muon(0.01, weight_decay=0.1, dimension_numbers=rules)


@jax.jit
def train_step(params, state, tokens):
    def loss_of(params):
        logits = apply(params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def test_plain_dict():
    params, tokens = init(jax.random.key(0)), jnp.arange(24).reshape(2, 12) % 5
    assert views(params, rules) == {
        "embed": "fallback",
        "blocks/norm": "fallback",
        "blocks/qkv": "(3, 8, 8) + (3, 8, 8) + (3, 8, 8)",
        "blocks/out": "(3, 8, 8)",
        "blocks/up": "(3, 8, 32)",
        "blocks/b_up": "fallback",
        "blocks/down": "(3, 32, 8)",
    }
    state, losses = optimizer.init(params), []
    for _ in range(4):
        params, state, loss = train_step(params, state, tokens)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
