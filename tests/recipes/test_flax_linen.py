"""Recipe: Flax Linen with a `TrainState`. Every leaf that is a matrix is named by a rule."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from helpers import views
from optax.contrib import MuonDimensionNumbers

import orthax

rules = orthax.PathRules(
    (
        (r"(embedding|bias|scale)$", None),
        (r"(query|key|value)/kernel$", MuonDimensionNumbers(0, (1, 2))),  # (in, heads, size)
        (r"out/kernel$", MuonDimensionNumbers((0, 1), 2)),  # (heads, size, out)
        (r"Conv_\d+/kernel$", MuonDimensionNumbers((0, 1), 2)),  # (window, in, out)
        (r"kernel$", MuonDimensionNumbers(0, 1)),  # Dense: (in, out)
    )
)


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        x = embed(tokens)
        x = x + nn.Conv(8, (3,))(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(16)(x))
        x = x + nn.Dense(8)(h)
        return embed.attend(x)  # tied: the only parameter is the embedding


@jax.jit
def train_step(state, tokens):
    def loss_of(params):
        logits = state.apply_fn({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=gradients), loss


def test_flax_linen():
    model, tokens = Model(), jnp.arange(24).reshape(2, 12) % 5
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    optimizer = orthax.muon(0.01, weight_decay=0.1, dimension_numbers=rules)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
    read = views(params, rules)
    assert {path: view for path, view in read.items() if view != "fallback"} == {
        "Conv_0/kernel": "(24, 8)",
        "MultiHeadDotProductAttention_0/query/kernel": "(8, 6)",
        "MultiHeadDotProductAttention_0/key/kernel": "(8, 6)",
        "MultiHeadDotProductAttention_0/value/kernel": "(8, 6)",
        "MultiHeadDotProductAttention_0/out/kernel": "(6, 8)",
        "Dense_0/kernel": "(8, 16)",
        "Dense_1/kernel": "(16, 8)",
    }
    losses = []
    for _ in range(4):
        state, loss = train_step(state, tokens)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
