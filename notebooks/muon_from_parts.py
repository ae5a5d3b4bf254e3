# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Muon from its parts
#
# What happens to a gradient on its way through Muon, one step at a time: momentum, orthogonalisation,
# a scale for the shape, the learning rate. Each step is an optax transformation, and the last cell
# puts them together and finds the same updates as `orthax.muon`.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import pyplot as plt

import orthax
from orthax.linalg import coefficients, newton_schulz, polar_svd

# %% [markdown]
# ## A gradient and its singular values
#
# Gradients of trained networks have a few large singular values and many small ones. Here is a matrix
# with such a spectrum: 64 values that fall by half every six.

# %%
rng = np.random.default_rng(0)
left, _ = np.linalg.qr(rng.standard_normal((64, 64)))
right, _ = np.linalg.qr(rng.standard_normal((256, 64)))
spectrum = 0.5 ** (np.arange(64) / 6)
gradient = jnp.asarray(left * spectrum @ right.T, jnp.float32)


def singular_values(x):
    """Singular values, largest first."""
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


# %% [markdown]
# ## The polar factor
#
# The polar factor keeps the singular vectors and sets every singular value to 1: it is the steepest
# descent direction when the size of a step is measured by its largest singular value. `polar_svd`
# computes it exactly; `newton_schulz` approximates it with matrix products alone.

# %%
tables = {
    "original Muon, 5 steps": coefficients.MUON,
    "Polar Express, 5 steps (default)": coefficients.POLAR_EXPRESS,
    "minimax(8, 1e-4)": coefficients.minimax(8, 1e-4),
}
figure, axes = plt.subplots(figsize=(7, 4))
axes.semilogy(singular_values(gradient), color="0.6", label="gradient")
for name, table in tables.items():
    axes.semilogy(singular_values(newton_schulz(gradient, table)), label=name)
axes.semilogy(singular_values(polar_svd(gradient)), "k--", label="exact")
axes.set(xlabel="index", ylabel="singular value", title="What orthogonalisation does to a spectrum")
axes.legend()
plt.show()

# %% [markdown]
# Nothing happens to the singular vectors, so what a table does to a matrix is what it does to numbers:
# `coefficients.scalar_map` tells it beforehand.

# %%
relative = spectrum / np.linalg.norm(spectrum)
for name, table in tables.items():
    predicted = np.sort(coefficients.scalar_map(table, relative))[::-1]
    measured = singular_values(newton_schulz(gradient, table))
    assert np.allclose(predicted, measured, atol=1e-4), name

# %% [markdown]
# ## A scale for the shape
#
# An orthogonal direction has entries of RMS `1 / sqrt(max(fan_in, fan_out))`. `scale_by_adam_rms`
# brings that to 0.2, about what AdamW's updates have, so that AdamW's learning rates carry over.

# %%
direction = optax.chain(orthax.orthogonalize(polar_svd), orthax.scale_by_adam_rms())
update, _ = direction.update(gradient, direction.init(gradient))
rms = float(jnp.sqrt(jnp.mean(update**2)))
print(f"RMS of the update: {rms:.4f}")
assert abs(rms - 0.2) < 1e-4

# %% [markdown]
# ## All together
#
# Leaves of a model are not all matrices, and not all matrices are `(rows, cols)`. `partition_matrices`
# decides over the whole tree, sends the others elsewhere and, in the chain of the matrices, shows a
# transformation each of them as a matrix; `explain` shows what it decides.

# %%
params = {
    "Embed_0": {"embedding": jnp.ones((100, 64))},
    "Dense_0": {"kernel": jnp.ones((64, 256)), "bias": jnp.zeros(256)},
    "Conv_0": {"kernel": jnp.ones((3, 3, 16, 32)), "bias": jnp.zeros(32)},
}
print(orthax.explain(params))

# %%
learning_rate = 3e-3
by_hand = orthax.partition_matrices(
    lambda leaves: optax.chain(
        optax.trace(0.95, nesterov=True),
        leaves(optax.chain(orthax.orthogonalize(), orthax.scale_by_adam_rms())),
        optax.scale_by_learning_rate(learning_rate),
    ),
    optax.adamw(learning_rate, weight_decay=0.0),
)
ready_made = orthax.muon(learning_rate)

gradients = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
ours, _ = by_hand.update(gradients, by_hand.init(params), params)
theirs, _ = ready_made.update(gradients, ready_made.init(params), params)
for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert np.allclose(a, b, atol=1e-6)
print("The chain and orthax.muon give the same updates.")
