"""States of one rank do not silently become states of another.

Run as a script, it prints what Orbax says to that, by name of the case: a read that Orbax refuses
leaves other reads behind, and Python's complaints about these would fail whatever test runs next.
"""

import json
import os
import re
import subprocess
import sys

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
    "low_rank-svd": lambda rank: orthax.low_rank(optax.trace(0.9), rank, basis="svd"),
    "trion": lambda rank: orthax.trion(0.1, rank),
    "trion-int8": lambda rank: orthax.trion(0.1, rank, mu_dtype="int8"),
    "dct_adamw": lambda rank: orthax.dct_adamw(0.1, rank),
    "dct_adamw-global": lambda rank: orthax.dct_adamw(0.1, rank, bias_correction="global"),
}


def params():
    return {"Dense_0": {"kernel": jnp.ones((8, 12))}}


def abstract_state(name, rank):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        FACTORIES[name](rank).init(params()),
    )


def print_refusals(folder):
    refusals = {}
    for name in FACTORIES:
        with ocp.StandardCheckpointer() as checkpointer:
            try:
                checkpointer.restore(os.path.join(folder, name), abstract_state(name, OTHER_RANK))
            except ValueError as error:
                refusals[name] = str(error)
    print(json.dumps(refusals))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder, and the state of each case after one step."""
    folder, states = tmp_path_factory.mktemp("orbax"), {}
    rng = np.random.default_rng(0)
    g = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params())
    with ocp.StandardCheckpointer() as checkpointer:
        for name, factory in FACTORIES.items():
            transformation = factory(RANK)
            update = jax.jit(transformation.update)
            _, states[name] = update(g, transformation.init(params()), params())
            checkpointer.save(folder / name, states[name])
        checkpointer.wait_until_finished()
    return folder, states


@pytest.fixture(scope="module")
def refusals(checkpoints):
    folder, _ = checkpoints
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", FACTORIES)
def test_a_checkpoint_of_the_same_rank_is_restored(name, checkpoints):
    folder, states = checkpoints
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / name, abstract_state(name, RANK))
    jax.tree.map(np.testing.assert_array_equal, restored, states[name])


@pytest.mark.parametrize("name", FACTORIES)
def test_a_checkpoint_of_another_rank_is_refused_by_both_shapes(name, refusals):
    """Orbax tells the shapes of a leaf that differs, but not which leaf it is."""
    asked, stored = (
        re.search(rf"{kind} shape: \(([^)]*)\)", refusals[name])[1].strip(",").split(", ")
        for kind in ("Requested", "stored")
    )
    assert [(int(x), int(y)) for x, y in zip(asked, stored, strict=True) if x != y] == [
        (OTHER_RANK, RANK)
    ]


if __name__ == "__main__":
    print_refusals(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # without the complaints
