"""Recipe: trees like MaxText's, whose layers are stacked along the second axis of each kernel.

`(emb, L, mlp)` in MLPs, `(emb, L, heads, size)` for query, key and value, `(heads, L, size, emb)`
for the projection after them. What a rule does not name counts matrices: here the axis L.
"""

import jax
import jax.numpy as jnp
import optax
from helpers import views
from optax.contrib import MuonDimensionNumbers

import orthax

rules = orthax.PathRules(
    (
        (r"layers/.*(query|key|value)/kernel$", MuonDimensionNumbers(0, (2, 3))),
        # One matrix per head instead: MuonDimensionNumbers(0, 3).
        (r"layers/.*out/kernel$", MuonDimensionNumbers((0, 2), 3)),
        (r"layers/.*mlp/w[io](_\d+)?/kernel$", MuonDimensionNumbers(0, 2)),
    ),
    default=None,  # token_embedder/embedding, logits_dense/kernel, scales (emb, L)
)

EMB, L, HEADS, SIZE, MLP, VOCABULARY = 8, 3, 2, 5, 16, 11


def init(key):
    def kernel(at, *shape, fan_in=EMB):
        key_of_it = jax.random.fold_in(key, at)
        return {"kernel": jax.random.normal(key_of_it, shape) * fan_in**-0.5}

    attention = {
        name: kernel(at, EMB, L, HEADS, SIZE) for at, name in enumerate(("query", "key", "value"))
    }
    attention["out"] = kernel(3, HEADS, L, SIZE, EMB, fan_in=HEADS * SIZE)
    mlp = {"wi_0": kernel(4, EMB, L, MLP), "wi_1": kernel(5, EMB, L, MLP)}
    mlp["wo"] = kernel(6, MLP, L, EMB, fan_in=MLP)
    norm = {"scale": jnp.ones((EMB, L))}
    return {
        "token_embedder": {"embedding": kernel(7, VOCABULARY, EMB)["kernel"]},
        "decoder": {
            "layers": {"self_attention": attention, "mlp": mlp, "pre_norm": norm},
            "logits_dense": kernel(8, EMB, VOCABULARY),
        },
    }


def apply(params, tokens):
    def block(x, layer):
        h = x * layer["pre_norm"]["scale"]
        project = {
            name: jnp.einsum("bte,ehd->bthd", h, layer["self_attention"][name]["kernel"])
            for name in ("query", "key", "value")
        }
        attended = jax.nn.dot_product_attention(*project.values(), is_causal=True)
        x = x + jnp.einsum("bthd,hde->bte", attended, layer["self_attention"]["out"]["kernel"])
        gate, up = x @ layer["mlp"]["wi_0"]["kernel"], x @ layer["mlp"]["wi_1"]["kernel"]
        return x + (jax.nn.silu(gate) * up) @ layer["mlp"]["wo"]["kernel"], None

    layers = jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), params["decoder"]["layers"])
    x, _ = jax.lax.scan(block, params["token_embedder"]["embedding"][tokens], layers)
    return x @ params["decoder"]["logits_dense"]["kernel"]


optimizer = orthax.muon(0.01, weight_decay=0.1, dimension_numbers=rules)


@jax.jit
def train_step(params, state, tokens):
    def loss_of(params):
        logits = apply(params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def test_the_scan_axis_is_second():
    params, tokens = init(jax.random.key(0)), jnp.arange(24).reshape(2, 12) % 5
    read = views(params, rules)
    assert {path: view for path, view in read.items() if view != "fallback"} == {
        "decoder/layers/self_attention/query/kernel": "(3, 8, 10)",
        "decoder/layers/self_attention/key/kernel": "(3, 8, 10)",
        "decoder/layers/self_attention/value/kernel": "(3, 8, 10)",
        "decoder/layers/self_attention/out/kernel": "(3, 10, 8)",
        "decoder/layers/mlp/wi_0/kernel": "(3, 8, 16)",
        "decoder/layers/mlp/wi_1/kernel": "(3, 8, 16)",
        "decoder/layers/mlp/wo/kernel": "(3, 16, 8)",
    }
    state, losses = optimizer.init(params), []
    for _ in range(4):
        params, state, loss = train_step(params, state, tokens)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
