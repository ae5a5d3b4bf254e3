"""What the tests of every part use: random arrays and trees, published data, patterns, sizes."""

import contextlib
import pathlib
import re
from unittest import mock

import jax
import numpy as np

import orthax

GOLDEN = pathlib.Path(__file__).parent / "golden" / "reference.npz"

OPTIMIZERS = {
    "muon": orthax.muon,
    "normuon": orthax.normuon,
    "root": orthax.root,
    "auon": orthax.auon,
    "hybrid_auon": orthax.hybrid_auon,
    "trion": orthax.trion,
    "dct_adamw": orthax.dct_adamw,
}


def normal(shape, dtype=np.float32, *, seed=0):
    """Normal numbers of variance one."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        x = (x + 1j * rng.standard_normal(shape)) / 2**0.5
    return x.astype(dtype)


def normal_tree(shapes, seed=0, scale=1.0, dtype=np.float32):
    """A tree of normal numbers, of leaves of these shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (scale * rng.standard_normal(shape)).astype(dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def says(*parts):
    """Pattern of a message that holds all parts, in order."""
    return "(?s)" + ".*".join(re.escape(str(part)) for part in parts)


def array_bytes(state):
    """Bytes of all leaves but the counters, which are scalars."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)


def lowered_for(platform, function, *args):
    """The program of a function on a platform, be it here or not."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@contextlib.contextmanager
def values_as_on(platform):
    """Here, what the library chooses for another platform."""

    def named(*args, default, **others):
        return others.get(platform, default)(*args)

    jax.clear_caches()
    with mock.patch.object(jax.lax, "platform_dependent", named):
        yield
    jax.clear_caches()


def views(params, dimension_numbers=None):
    """Path -> how each leaf is read: (fan-in, fan-out) behind its batch, or where it goes."""
    rows = orthax.explain(params, dimension_numbers).rows
    return {row.path: row.view or row.destination for row in rows}
