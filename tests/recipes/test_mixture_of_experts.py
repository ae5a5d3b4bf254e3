"""Recipe: a mixture of experts. Experts are a batch axis of one array, the router is no matrix."""

import jax
import jax.numpy as jnp
import optax
from helpers import normal_tree, views
from optax.contrib import MuonDimensionNumbers

import orthax

in_out = MuonDimensionNumbers(-2, -1)  # (experts, in, out), and (layers, experts, in, out) too
rules = orthax.PathRules(
    (
        (r"router", None),  # (in, experts): a small classifier, as an output head
        (r"experts/gate_up$", orthax.Packed(in_out, axis=-1, sections=2)),
        (r"experts/down$", in_out),
    ),
    default=None,
)


def apply(params, x):
    scores = jax.nn.softmax(x @ params["router"]["kernel"])
    weights, chosen = jax.lax.top_k(scores, 2)
    gates = jnp.zeros_like(scores).at[jnp.arange(len(x))[:, None], chosen].set(weights)
    gate, up = jnp.split(jnp.einsum("bi,eio->ebo", x, params["experts"]["gate_up"]), 2, axis=-1)
    outputs = jnp.einsum("ebh,eho->ebo", jax.nn.silu(gate) * up, params["experts"]["down"])
    return jnp.einsum("be,ebo->bo", gates, outputs) + params["bias"]


optimizer = orthax.muon(0.02, weight_decay=0.1, dimension_numbers=rules)


@jax.jit
def train_step(params, state, x, y):
    loss, gradients = jax.value_and_grad(lambda p: jnp.mean((apply(p, x) - y) ** 2))(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def test_mixture_of_experts():
    experts = {"gate_up": (4, 6, 20), "down": (4, 10, 6)}
    shapes = {"router": {"kernel": (6, 4)}, "experts": experts, "bias": (6,)}
    params = normal_tree(shapes, scale=0.4)
    assert views(params, rules) == {
        "router/kernel": "fallback",
        "experts/gate_up": "(4, 6, 10) + (4, 6, 10)",
        "experts/down": "(4, 10, 6)",
        "bias": "fallback",
    }
    x, y = normal_tree({"x": (16, 6), "y": (16, 6)}, seed=1).values()
    state, losses = optimizer.init(params), []
    for _ in range(4):
        params, state, loss = train_step(params, state, x, y)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
