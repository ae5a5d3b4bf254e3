"""What tests on meshes share: trees of shapes with specs, arrays laid out by them, comparisons.

A layout is a tree of (shape, `PartitionSpec`).
"""

import jax
import numpy as np
import oracles
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def map_leaves(function, layout, *trees):
    return jax.tree.map(
        function, layout, *trees, is_leaf=lambda x: isinstance(x, tuple) and type(x[1]) is P
    )


def normal_tree(layout, seed):
    rng = np.random.default_rng(seed)
    return map_leaves(lambda leaf: rng.standard_normal(leaf[0]).astype(np.float32), layout)


def put(mesh, layout, tree):
    return map_leaves(lambda leaf, x: jax.device_put(x, NamedSharding(mesh, leaf[1])), layout, tree)


def assert_close(actual, expected, tolerance):
    """Every leaf is, to so much of its largest entry."""
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        x, y = oracles.float64(x), oracles.float64(y)
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), jax.tree_util.keystr(path)


def assert_sharded_alike(actual, expected):
    """Every array of one tree lies as in the other; on Explicit axes its type says so too."""
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        where = (jax.tree_util.keystr(path), x.sharding, y.sharding)
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), where
        assert jax.typeof(x).sharding == jax.typeof(y).sharding, where


def arrays(state):
    """Leaves but the counters, which start on one device and follow the params from then on."""
    return [x for x in jax.tree.leaves(state) if x.ndim]
