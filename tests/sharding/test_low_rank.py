"""`low_rank` on eight devices: what is cut along the projected axis travels once each way.

Optimizers have their default arguments. Matrices are long enough for the FFT, which the compiler
would gather.
"""

import collections
import functools

import hlo
import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import arrays, assert_close, assert_sharded_alike

import orthax

WIDE, TALL, STACK = (256, 512), (512, 256), (2, 256, 512)
BOTH = ("x", "y")
# How the leaves of a model lie on a mesh of x (4 devices) and y (2 devices), and how their
# coordinates lie, where specs are known.
LAYOUTS = {
    "rows": {
        "Dense_0": (WIDE, P(BOTH, None), P(None, BOTH)),
        "Dense_1": (TALL, P(BOTH, None), P(BOTH, None)),
        "Dense_2": (STACK, P(None, BOTH, None), P(None, None, BOTH)),
    },
    "columns": {
        "Dense_0": (WIDE, P(None, BOTH), P(None, BOTH)),
        "Dense_1": (TALL, P(None, BOTH), P(BOTH, None)),
    },
    "2d": {
        "Dense_0": (WIDE, P("x", "y"), P(None, ("y", "x"))),
        "Dense_1": (TALL, P("x", "y"), P(BOTH, None)),
        "Dense_2": (WIDE, P("y", "x"), P(None, BOTH)),
    },
    "replicated": {"Dense_0": (WIDE, P(), P())},
}
OPTIMIZERS = {
    "trion": (orthax.trion(0.1), 1e-5),
    "dct_adamw": (orthax.dct_adamw(0.1, error_feedback=True), 2e-4),
}
by_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    assert jax.device_count() == 8, "run `pytest tests/sharding` by itself"
    return jax.make_mesh((4, 2), BOTH, axis_types=(request.param,) * 2)


def tree(layout, seed):
    rng = np.random.default_rng(seed)
    leaves = LAYOUTS[layout].items()
    return {
        name: {"kernel": rng.standard_normal(shape).astype(np.float32)}
        for name, (shape, *_) in leaves
    }


def put(mesh, layout, values):
    return {
        name: {"kernel": jax.device_put(values[name]["kernel"], NamedSharding(mesh, spec))}
        for name, (_, spec, _) in LAYOUTS[layout].items()
    }


def assert_lies_as(x, sharding):
    assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.shape, x.sharding, sharding)


def assert_all_lie_as(actual, expected):
    assert_sharded_alike(arrays(actual), arrays(expected))


@functools.cache
def on_one_device(name, layout):
    """The second update of an optimizer, and its state then."""
    optimizer, _ = OPTIMIZERS[name]
    params, update = tree(layout, 0), jax.jit(optimizer.update)
    state = optimizer.init(params)
    for seed in (1, 2):
        updates, state = update(tree(layout, seed), state, params)
    return updates, state


@by_layout
@by_optimizer
def test_updates_are_those_of_one_device_and_everything_lies_as_before(name, layout, mesh):
    optimizer, tolerance = OPTIMIZERS[name]
    params = put(mesh, layout, tree(layout, 0))
    update = jax.jit(optimizer.update)
    first = state = optimizer.init(params)
    for seed in (1, 2):
        updates, state = update(put(mesh, layout, tree(layout, seed)), state, params)
    expected, expected_state = on_one_device(name, layout)
    assert_close(updates, expected, tolerance)
    assert_close(state, expected_state, tolerance)
    assert_all_lie_as(updates, params)
    assert_all_lie_as(state, first)


def laid(layout, mesh):
    """How coordinates lie: on Auto axes, cut along the other axis by all of the mesh."""
    for name, (shape, _, spec) in LAYOUTS[layout].items():
        if AxisType.Auto in mesh.axis_types:
            spec = P(
                *(None for _ in shape[:-2]), *((None, BOTH) if shape != TALL else (BOTH, None))
            )
        yield name, NamedSharding(mesh, spec)


@by_layout
@pytest.mark.parametrize("start", [lambda init: init, jax.jit], ids=["eager", "jit"])
def test_the_small_state_and_the_buffer_lie_along_the_other_axis(start, layout, mesh):
    params = put(mesh, layout, tree(layout, 0))
    adam = orthax.low_rank(optax.scale_by_adam(), 0.25, retain=0.0)
    with jax.set_mesh(mesh):
        state = start(adam.init)(params)
    for name, sharding in laid(layout, mesh):
        for field in ("mu", "nu", "residuals"):
            assert_lies_as(optax.tree.get(state, field)[name]["kernel"], sharding)
        indices = optax.tree.get(state, "subspaces")[name]["kernel"]
        assert_lies_as(indices, NamedSharding(mesh, P()))


LEAVES = 8  # one for each device: fewer would be divided
# Bytes on a device of one move of all leaves, and of their coordinates.
MOVE = LEAVES * 256 * 512 * 4 // 8
COORDINATES = MOVE // 4


def compiled(optimizer, mesh, spec):
    names = [str(i) for i in range(LEAVES)]
    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": jax.device_put(rng.standard_normal(WIDE).astype(np.float32), spec)}
        for name in names
    }
    return jax.jit(optimizer.update).lower(params, optimizer.init(params), params).compile()


@pytest.mark.parametrize("spec", [P(BOTH, None), P(None, BOTH)], ids=["rows", "columns"])
@by_optimizer
def test_no_gradient_is_gathered_or_summed_whole(name, spec, mesh):
    optimizer, _ = OPTIMIZERS[name]
    program = compiled(optimizer, mesh, NamedSharding(mesh, spec))
    found = hlo.counted(program.as_text(), 8)
    counts, sizes = (collections.Counter(of) for of in (found.collectives, found.results))
    explicit = AxisType.Explicit in mesh.axis_types
    assert set(counts) <= {"all-to-all", "all-reduce"}
    # Norms of columns, and before them the largest entry.
    assert counts["all-reduce"] == 2
    assert sizes["all-reduce"] == LEAVES * (256 + 1) * 4
    # Gradients come and updates go, unless the projected axis is whole; the buffer stays.
    moves = 2 if spec == P(BOTH, None) else 0
    of_gradients = moves if explicit else moves and 1 + LEAVES
    # Trion's coordinates are orthogonalised by the devices that own them; on Auto axes they go
    # along one mesh axis after the other.
    small = 0 if name == "dct_adamw" else 2 if explicit else 4
    assert counts["all-to-all"] == of_gradients + small
    assert sizes["all-to-all"] <= moves * MOVE + 2 * small * COORDINATES


@by_optimizer
def test_a_loop_of_updates_carries_the_state(name, mesh):
    optimizer, _ = OPTIMIZERS[name]
    params = put(mesh, "rows", tree("rows", 0))

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda p: 2 * p + 1, params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, optimizer.init(params)
    after, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=2))(carry)
    assert_all_lie_as(after, carry)


def test_leaves_of_one_shape_that_lie_otherwise_keep_their_places():
    mesh = jax.make_mesh((4, 2), BOTH, axis_types=(AxisType.Auto,) * 2)
    specs = [P(BOTH, None), P(None, BOTH), P("x", "y"), P("y", "x"), P("x", None), P()]
    optimizer, _ = OPTIMIZERS["dct_adamw"]
    leaf = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    params = {
        f"Dense_{i}": {"kernel": jax.device_put(leaf, NamedSharding(mesh, spec))}
        for i, spec in enumerate(specs)
    }
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    assert_all_lie_as(updates, params)


def test_what_cannot_be_cut_is_projected_where_it_lies(mesh):
    leaf = np.random.default_rng(0).standard_normal((8, 12)).astype(np.float32)  # 12 is not 8 k
    sharding = NamedSharding(mesh, P(BOTH, None))
    optimizer, tolerance = OPTIMIZERS["dct_adamw"]
    update = jax.jit(optimizer.update)
    expected, _ = update({"w": leaf}, optimizer.init({"w": leaf}), {"w": leaf})
    params = {"w": jax.device_put(leaf, sharding)}
    updates, _ = update(params, optimizer.init(params), params)
    assert_close(updates, expected, tolerance)
    assert_lies_as(updates["w"], sharding)
