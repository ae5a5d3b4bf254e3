"""Recipe: a Flax NNX model. Tied embeddings, shared layers, one matrix per head of attention."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from helpers import views
from optax.contrib import MuonDimensionNumbers

import orthax
import orthax.nn


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, qkv_features=6, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)
        self.down_again = self.down  # a shared layer: one variable, one momentum, one update

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x)
        x = x + self.down(jax.nn.gelu(self.up(x))) + self.down_again(jnp.sin(self.up(x)))
        return self.embed.attend(x)  # the output head is the embedding: to the fallback


model = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))  # module types are enough
rules = orthax.nn.dimension_numbers(model, per_head=True)

# The same by names, for layers that Flax does not define.
by_name = orthax.PathRules(
    (
        (r"(query|key|value)/kernel$", MuonDimensionNumbers(0, 2)),  # (in, heads, size): per head
        (r"attention/out/kernel$", MuonDimensionNumbers((0, 1), 2)),  # (heads, size, out)
        (r"kernel$", MuonDimensionNumbers(0, 1)),
    ),
    default=None,
)


@nnx.jit
def train_step(model, optimizer, tokens):
    def loss_of(model):
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def test_flax_nnx():
    model = nnx.jit(lambda: Model(nnx.Rngs(0)))()
    optimizer = nnx.Optimizer(
        model, orthax.muon(0.01, weight_decay=0.1, dimension_numbers=rules), wrt=nnx.Param
    )
    read = views(nnx.state(model, nnx.Param), rules)
    assert {path: view for path, view in read.items() if view != "fallback"} == {
        "attention/query/kernel": "(2, 8, 3)",
        "attention/key/kernel": "(2, 8, 3)",
        "attention/value/kernel": "(2, 8, 3)",
        "attention/out/kernel": "(6, 8)",
        "up/kernel": "(8, 16)",
        "down/kernel": "(16, 8)",
    }
    assert views(nnx.state(model, nnx.Param), by_name) == read
    assert not any(path.startswith("down_again") for path in read)
    assert read["embed/embedding"] == "fallback"
    tokens = jnp.arange(24).reshape(2, 12) % 5
    losses = [float(train_step(model, optimizer, tokens)) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert model.down.kernel is model.down_again.kernel
