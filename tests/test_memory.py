"""A jitted step with donated params and state writes both in place: no second copy of momentum."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import OPTIMIZERS

SHAPES = {"query": (64, 64), "key": (64, 64), "up": (64, 256), "down": (256, 64)}
PARAMS = {
    f"layer_{i}": {
        name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in SHAPES.items()
    }
    for i in range(2)
} | {"norm": {"scale": jax.ShapeDtypeStruct((64,), jnp.float32)}}
SMALLEST = 64 * 16  # entries of the smallest matrix in a state, at a quarter of the rank


def compiled_step(optimizer, reversed_results=False):
    """The step as one writes it, with what it returns in the order of what it takes, or not."""
    state = jax.eval_shape(optimizer.init, PARAMS)

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return (state, params) if reversed_results else (params, state)

    return jax.jit(step, donate_argnums=(0, 1)).lower(PARAMS, state, PARAMS).compile(), state


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def copied(compiled):
    """Donated matrices that the program copies."""
    copies = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(%(?:params|state)_", compiled.as_text())
    entries = [math.prod(int(axis) for axis in shape.split(",") if axis) for shape in copies]
    return [n for n in entries if n >= SMALLEST]


def made(name):
    low_rank = {"rank": 0.25} if name in ("trion", "dct_adamw") else {}
    return OPTIMIZERS[name](1e-3, weight_decay=0.1, **low_rank)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_params_and_state_are_written_in_place(name):
    compiled, state = compiled_step(made(name))
    memory = compiled.memory_analysis()
    # The indices of a subspace are chosen anew; their buffers are not even read.
    kept = [x for x in jax.tree.leaves(state) if x.ndim == 0 or x.dtype != jnp.int32]
    assert memory.alias_size_in_bytes >= size(PARAMS) + size(kept)
    assert not copied(compiled)
    # What is orthogonalised and its result, at most.
    assert memory.temp_size_in_bytes <= 2.1 * size(PARAMS)


def test_a_copy_would_be_seen():
    # JAX gives donated buffers to results of their shape in turn: here params' to the momentum.
    compiled, _ = compiled_step(made("muon"), reversed_results=True)
    assert len(copied(compiled)) >= 8


def test_temporary_memory_is_four_tenths_of_optax_muons():
    ours, _ = compiled_step(made("muon"))
    theirs, _ = compiled_step(optax.contrib.muon(1e-3, weight_decay=0.1))
    temporary = [step.memory_analysis().temp_size_in_bytes for step in (ours, theirs)]
    assert temporary[0] <= 0.4 * temporary[1]
