"""States of one rank do not silently become states of another."""

import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import orthax

RANK, OTHER_RANK = 3, 5
FACTORIES = {
    "low_rank": lambda rank: orthax.low_rank(optax.scale_by_adam(), rank),
    "low_rank(svd)": lambda rank: orthax.low_rank(optax.trace(0.9), rank, basis="svd"),
    "trion": lambda rank: orthax.trion(0.1, rank),
    "trion(int8)": lambda rank: orthax.trion(0.1, rank, mu_dtype="int8"),
    "dct_adamw": lambda rank: orthax.dct_adamw(0.1, rank),
    "dct_adamw(global)": lambda rank: orthax.dct_adamw(0.1, rank, bias_correction="global"),
}
PARAMS = {"Dense_0": {"kernel": jnp.ones((8, 12))}}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A state of each after one step, and where it is saved."""
    rng = np.random.default_rng(0)
    g = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), PARAMS)
    saved = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for name, factory in FACTORIES.items():
            transformation = factory(RANK)
            _, state = jax.jit(transformation.update)(g, transformation.init(PARAMS), PARAMS)
            saved[name] = (tmp_path_factory.mktemp("orbax") / "checkpoint", state)
            checkpointer.save(*saved[name])
        checkpointer.wait_until_finished()
    return saved


@pytest.mark.parametrize("name", FACTORIES)
def test_a_checkpoint_of_the_same_rank_is_restored(name, checkpoints):
    path, state = checkpoints[name]
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path, abstract(FACTORIES[name](RANK).init(PARAMS)))
    jax.tree.map(np.testing.assert_array_equal, restored, state)


# Orbax drops the reads of the other leaves when one is refused, and Python says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", FACTORIES)
def test_a_checkpoint_of_another_rank_is_refused_by_both_shapes(name, checkpoints):
    """Orbax names the shapes of the first leaf that differs, but not the leaf."""
    path, _ = checkpoints[name]
    other = abstract(FACTORIES[name](OTHER_RANK).init(PARAMS))
    with ocp.StandardCheckpointer() as checkpointer:
        with pytest.raises(ValueError, match="shape") as caught:
            checkpointer.restore(path, other)
    print(
        "NOTES",
        getattr(caught.value, "__notes__", None),
        repr(caught.value.__cause__),
        repr(caught.value.__context__),
    )
    shapes = [
        tuple(map(int, re.findall(r"\d+", shape)))
        for shape in re.findall(r"\(([\d, ]+)\)", str(caught.value))
    ]
    expected = {RANK, OTHER_RANK}
    assert {size for shape in shapes for size in shape} & expected == expected, caught.value
    del caught
    gc.collect()
