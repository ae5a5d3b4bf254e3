"""Recipe: Keras on JAX, stateless. Params are a dict by `v.path`, as a bare list has no names."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import views
from optax.contrib import MuonDimensionNumbers

import orthax

keras = pytest.importorskip("keras")

rules = orthax.PathRules(
    (
        (r"(^|/)head/", None),
        (r"(query|key|value)/kernel$", MuonDimensionNumbers(0, (1, 2))),  # (in, heads, size)
        (r"attention_output/kernel$", MuonDimensionNumbers((0, 1), 2)),  # (heads, size, out)
        (r"conv1d[^/]*/kernel$", MuonDimensionNumbers((0, 1), 2)),  # (window, in, out)
        (r"dense[^/]*/kernel$", MuonDimensionNumbers(0, 1)),  # (in, out)
    ),
    default=None,  # biases, of attention (heads, size) too; embeddings, gamma, beta
)


def make_model():
    tokens = keras.Input((11,), dtype="int32")
    x = keras.layers.Embedding(7, 8)(tokens)
    h = keras.layers.LayerNormalization()(x)
    x = x + keras.layers.MultiHeadAttention(2, 3)(h, h)
    x = x + keras.layers.Conv1D(8, 3, padding="same")(x)
    h = keras.layers.Dense(16, activation="gelu")(x)
    x = x + keras.layers.Dense(8)(h)
    return keras.Model(tokens, keras.layers.Dense(7, name="head")(x))


def params_of(model):
    return {v.path: v.value for v in model.trainable_variables}


optimizer = orthax.muon(0.01, weight_decay=0.1, dimension_numbers=rules)


def make_train_step(model):
    paths = [v.path for v in model.trainable_variables]  # the order that stateless_call expects
    assert len(set(paths)) == len(paths)  # layers of equal names would overwrite each other

    @jax.jit
    def train_step(params, others, state, tokens):
        def loss_of(params):
            values = [params[path] for path in paths]
            logits, new = model.stateless_call(values, others, tokens[:, :-1], training=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return losses.mean(), new

        (loss, others), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), others, state, loss

    return train_step


def test_keras():
    keras.utils.set_random_seed(0)
    keras.utils.clear_session()
    model, tokens = make_model(), jnp.arange(24).reshape(2, 12) % 5
    params, others = params_of(model), [v.value for v in model.non_trainable_variables]
    read = views(params, rules)
    assert {path: view for path, view in read.items() if view != "fallback"} == {
        "conv1d/kernel": "(24, 8)",
        "multi_head_attention/query/kernel": "(8, 6)",
        "multi_head_attention/key/kernel": "(8, 6)",
        "multi_head_attention/value/kernel": "(8, 6)",
        "multi_head_attention/attention_output/kernel": "(6, 8)",
        "dense/kernel": "(8, 16)",
        "dense_1/kernel": "(16, 8)",
    }
    train_step, state, losses = make_train_step(model), optimizer.init(params), []
    for _ in range(4):
        params, others, state, loss = train_step(params, others, state, tokens)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    for variable in model.trainable_variables:  # back into the model, to save or to evaluate it
        variable.assign(params[variable.path])
