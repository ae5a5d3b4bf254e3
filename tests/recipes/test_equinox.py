"""Recipe: an Equinox model, filtered; with `eqx.nn.Shared` for tied embeddings."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import views
from optax.contrib import MuonDimensionNumbers

import orthax

eqx = pytest.importorskip("equinox")
import orthax.eqx  # noqa: E402


class Model(eqx.Module):
    tied: eqx.nn.Shared  # the embedding, and the output head that has its weight
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        embed = eqx.nn.Embedding(11, 8, key=keys[0])
        head = eqx.nn.Linear(8, 11, use_bias=False, key=keys[1])
        self.tied = eqx.nn.Shared((embed, head), lambda p: p[1].weight, lambda p: p[0].weight)
        self.attention = eqx.nn.MultiheadAttention(2, 8, qk_size=3, vo_size=3, key=keys[2])
        self.mlp = eqx.nn.MLP(8, 8, width_size=16, depth=1, key=keys[3])

    def __call__(self, tokens):
        embed, head = self.tied()
        x = jax.vmap(embed)(tokens)
        x = x + self.attention(x, x, x)
        return jax.vmap(head)(x + jax.vmap(self.mlp)(x))


model = Model(jax.random.key(0))
dims = orthax.eqx.dimension_numbers(model)  # from module types, a tree in the form of the model

# The same by names, for models of layers that Equinox does not define: `weight` is (out, in).
by_name = orthax.PathRules(
    (
        (r"(tied|embed|head|norm).*/", None),
        (r"conv.*/weight$", MuonDimensionNumbers((1, 2, 3), 0)),  # (out, in, height, width)
        (r"weight$", MuonDimensionNumbers(1, 0)),
    ),
    default=None,
)
optimizer = orthax.muon(0.01, weight_decay=0.1, dimension_numbers=dims)


@eqx.filter_jit
def train_step(model, state, tokens):
    @eqx.filter_value_and_grad
    def loss_of(model):
        logits = jax.vmap(model)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, gradients = loss_of(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, state = optimizer.update(gradients, state, params)
    return eqx.apply_updates(model, updates), state, loss


def test_equinox():
    params = eqx.filter(model, eqx.is_inexact_array)
    assert views(params, dims) == {
        "tied/pytree/0/weight": "fallback",
        "attention/query_proj/weight": "(8, 6)",
        "attention/key_proj/weight": "(8, 6)",
        "attention/value_proj/weight": "(8, 6)",
        "attention/output_proj/weight": "(6, 8)",
        "mlp/layers/0/weight": "(8, 16)",
        "mlp/layers/0/bias": "fallback",
        "mlp/layers/1/weight": "(16, 8)",
        "mlp/layers/1/bias": "fallback",
    }
    assert views(params, by_name) == views(params, dims)
    tokens = jnp.arange(24).reshape(2, 12) % 5
    trained, state, losses = model, optimizer.init(params), []
    for _ in range(4):
        trained, state, loss = train_step(trained, state, tokens)
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_an_unfiltered_model_is_refused_with_the_line_to_write():
    with pytest.raises(TypeError, match=r"eqx\.filter\(model, eqx\.is_inexact_array\)"):
        optimizer.init(model)
