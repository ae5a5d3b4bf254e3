"""Recipe: LoRA adapters on a frozen base, as a plain tree and with NNX's `LoRAParam`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from helpers import normal_tree, views
from optax.contrib import MuonDimensionNumbers

import orthax
import orthax.nn

rules = orthax.PathRules(
    ((r"lora_[ab]$", MuonDimensionNumbers(0, 1)),),  # (in, rank) and (rank, out)
    default=None,
)


def labels(params):
    """Adapters are trained, all else is frozen: no state and no update."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: "adapter" if "lora" in jax.tree_util.keystr(keys) else "frozen", params
    )


optimizer = optax.partition(
    {"adapter": orthax.muon(0.02, dimension_numbers=rules), "frozen": optax.set_to_zero()}, labels
)


def apply(params, x):
    for layer in ("first", "second"):
        w = params[layer]
        x = jnp.tanh(x @ w["kernel"] + x @ w["lora_a"] @ w["lora_b"] + w["bias"])
    return x


@jax.jit
def train_step(params, state, x, y):
    loss, gradients = jax.value_and_grad(lambda p: jnp.mean((apply(p, x) - y) ** 2))(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def test_lora_on_a_plain_tree():
    layer = {"kernel": (6, 6), "lora_a": (6, 2), "lora_b": (2, 6), "bias": (6,)}
    params = before = normal_tree({"first": layer, "second": layer}, scale=0.5)
    read = views(params, rules)
    assert {path for path, view in read.items() if view == "fallback"} == {
        f"{name}/{leaf}" for name in ("first", "second") for leaf in ("kernel", "bias")
    }
    assert (read["first/lora_a"], read["first/lora_b"]) == ("(6, 2)", "(2, 6)")
    x, y = normal_tree({"x": (16, 6), "y": (16, 6)}, seed=1, scale=0.3).values()
    state, losses = optimizer.init(params), []
    for _ in range(4):
        params, state, loss = train_step(params, state, x, y)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2 * (4 * 12) + 10  # no frozen state
    for name in ("first", "second"):
        np.testing.assert_array_equal(params[name]["kernel"], before[name]["kernel"])
        assert not np.array_equal(params[name]["lora_a"], before[name]["lora_a"])


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.LoRALinear(6, 8, lora_rank=2, rngs=rngs)
        self.second = nnx.LoRALinear(8, 6, lora_rank=2, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


@nnx.jit
def nnx_train_step(model, optimizer, x, y):
    adapters = nnx.DiffState(0, nnx.LoRAParam)
    loss_of = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2), argnums=adapters)
    loss, gradients = loss_of(model)
    optimizer.update(model, gradients)
    return loss


def test_lora_with_nnx():
    model = nnx.jit(lambda: Model(nnx.Rngs(0)))()
    dims = orthax.nn.dimension_numbers(model)
    optimizer = nnx.Optimizer(model, orthax.muon(0.02, dimension_numbers=dims), wrt=nnx.LoRAParam)
    assert views(nnx.state(model, nnx.LoRAParam), dims) == {
        "first/lora/lora_a": "(6, 2)",
        "first/lora/lora_b": "(2, 8)",
        "second/lora/lora_a": "(8, 2)",
        "second/lora/lora_b": "(2, 6)",
    }
    before = np.asarray(model.first.kernel[...])
    x, y = normal_tree({"x": (16, 6), "y": (16, 6)}, seed=1).values()
    losses = [float(nnx_train_step(model, optimizer, x, y)) for _ in range(4)]
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(model.first.kernel[...], before)
