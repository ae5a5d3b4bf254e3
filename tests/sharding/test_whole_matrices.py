"""Whole matrices travel to their devices and back: values, shardings, and what is sent."""

import functools
import itertools
import math

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import arrays, assert_close, assert_sharded_alike, map_leaves, normal_tree, put
from optax.contrib import MuonDimensionNumbers

import orthax
from orthax.base.exchange import Route, bring, send
from orthax.base.one_way import backward, forward
from orthax.linalg import coefficients, newton_schulz

DEVICES = 8
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
AXES = {"x": (8,), "xy": (4, 2), "xyz": (2, 2, 2)}

every_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def mesh_of(names, kind="explicit"):
    assert jax.device_count() == DEVICES, "run `pytest tests/sharding` by itself"
    return jax.make_mesh(AXES[names], tuple(names), axis_types=(KINDS[kind],) * len(names))


# --- to the owners and back, against the whole array


def all_cuts(names):
    """Every way in which mesh axes may cut rows and columns, in every order."""
    for count in range(len(names) + 1):
        for order in itertools.permutations(names, count):
            for rows in range(count + 1):
                yield order[:rows], order[rows:]


def travels_of(names):
    """Shapes of stacks, counts that divide and counts that do not; and how each travels."""
    counts = itertools.cycle((1, 3, 8, 11, 16))
    found = [
        ((count, 8, 16), Route(cuts, tuple(names), small))
        for small in (False, True)
        for count, cuts in zip(counts, all_cuts(names), strict=False)
    ]
    first, *_, last = names
    # A matrix with axes that are merged later, and owners without an axis: of experts.
    found += [
        ((5, 4, 8, 2), Route(((last,), (first,), ()), tuple(names))),
        ((2, 4, 8, 2), Route(((), (), (last,)), tuple(names))),
        ((3, 8, 16), Route(((last,), ()), tuple(names[1:]))),
        ((8, 8, 16), Route(((), ()), tuple(names[:1]))),
    ]
    return found


def own_part(whole, device, mesh, owners):
    """The matrices that a device owns, the first owner those at the beginning; zeros at the end."""
    sizes = dict(mesh.shape)
    place = dict(zip(mesh.axis_names, *np.argwhere(mesh.devices == device), strict=True))
    number, devices = 0, 1
    for axis in owners:
        number, devices = number * sizes[axis] + place[axis], devices * sizes[axis]
    own = math.ceil(len(whole) / devices)
    found = np.zeros((own, *whole.shape[1:]), whole.dtype)
    mine = whole[number * own : (number + 1) * own]
    found[: len(mine)] = mine
    return found


@pytest.mark.parametrize("names", ["xy", "xyz"])
def test_matrices_come_whole_to_their_owners_and_go_back_in_pieces(names):
    mesh, rng = mesh_of(names, "auto"), np.random.default_rng(0)
    travels = travels_of(names)
    wholes = [rng.standard_normal(shape).astype(np.float32) for shape, _ in travels]
    routes = [route for _, route in travels]
    sizes = dict(mesh.shape)

    def inside(pieces):
        owned = bring(pieces, routes, sizes)
        counts = [len(piece) for piece in pieces]
        return owned, send([3 * x for x in owned], counts, routes, sizes)

    pieces = [P(None, *(cut or None for cut in route.cuts)) for route in routes]
    owners = [P(route.owners) for route in routes]
    run = jax.shard_map(
        inside, mesh=mesh, in_specs=(pieces,), out_specs=(owners, pieces), check_vma=False
    )
    owned, back = jax.jit(run)(wholes)
    for whole, route, there, here in zip(wholes, routes, owned, back, strict=True):
        assert len(there.addressable_shards) == len(here.addressable_shards) == DEVICES
        for shard in there.addressable_shards:
            expected = own_part(whole, shard.device, mesh, route.owners)
            np.testing.assert_array_equal(shard.data, expected, str(route))
        for shard in here.addressable_shards:  # copies too
            np.testing.assert_array_equal(shard.data, 3 * whole[shard.index], str(route))


def test_pieces_of_one_size_travel_together_however_they_are_cut():
    mesh = mesh_of("xy")
    routes = [Route(cuts, ("x", "y")) for cuts in all_cuts("xy") if len(sum(cuts, ())) == 2]
    specs = [P(None, *(cut or None for cut in route.cuts)) for route in routes]
    stacks = [
        jax.ShapeDtypeStruct((8, 8, 16), jnp.float32, sharding=NamedSharding(mesh, spec))
        for spec in specs
    ]

    def inside(pieces):
        return bring(pieces, routes, dict(mesh.shape))

    run = jax.shard_map(
        inside, mesh=mesh, in_specs=(specs,), out_specs=P(("x", "y")), check_vma=False
    )
    text = jax.jit(run).lower(stacks).compile().as_text()
    assert len(routes) == 6
    assert hlo.counted(text, DEVICES).collectives == {"all-to-all": 1}


# --- updates are those of one device, with default arguments

ROWS = MuonDimensionNumbers(0, 1)
STACK = MuonDimensionNumbers(1, 2)
PER_HEAD = MuonDimensionNumbers(0, 2)
# Shape, spec on a mesh (2, 2, 2), dimension numbers, dtype. Matrices of few shapes: every one costs
# seconds to compile.
LEAVES = {
    "rows": ((16, 32), P("x", None), ROWS),
    "rows over all": ((16, 32), P(("x", "y", "z"), None), ROWS),
    "columns": ((16, 32), P(None, ("z", "x")), ROWS),
    "replicated": ((16, 32), P(), ROWS),
    "both": ((16, 32), P("x", "y"), ROWS),
    "both, three axes": ((16, 32), P("z", ("y", "x")), ROWS),
    "tall": ((32, 16), P(("z", "x"), "y"), ROWS),
    "up": ((16, 32), P(None, ("x", "y", "z")), ROWS),
    "down": ((32, 16), P(("x", "y", "z"), None), ROWS),
    "query": ((16, 4, 8), P(None, None, "x"), MuonDimensionNumbers(0, (1, 2))),
    "key": ((16, 4, 8), P("y", "x", "z"), MuonDimensionNumbers(0, (1, 2))),
    "out": ((4, 8, 16), P(None, "y", "x"), MuonDimensionNumbers((0, 1), 2)),
    "per head": ((16, 3, 32), P("z", None, "x"), PER_HEAD),
    "layers": ((5, 16, 32), P(None, "x", "y"), STACK),
    "experts": ((8, 16, 32), P(("x", "y", "z"), None, None), STACK),
    "experts, cut": ((6, 16, 32), P("y", "x", None), STACK),
    "packed": ((16, 64), P("x", ("z", "y")), orthax.Packed(ROWS, axis=1, sections=(32, 32))),
    "complex": ((16, 32), P("x", "z"), ROWS, np.complex64),
    "bfloat16": ((16, 32), P("y", "x"), ROWS, jnp.bfloat16),
}
LAYOUT = {name: leaf[:2] for name, leaf in LEAVES.items()}
DIMENSION_NUMBERS = {name: leaf[2] for name, leaf in LEAVES.items()}
OPTIMIZERS = {
    name: getattr(orthax, name)(0.1, dimension_numbers=DIMENSION_NUMBERS)
    for name in ("muon", "normuon", "root")
}
TOLERANCES = {"muon": 1e-6, "normuon": 1e-6, "root": 1e-5}


def gradients(seed):
    """Far from singular, as a matrix too: an orthogonaliser makes much of what is small."""
    found = {}
    for i, (name, (shape, _, dims, *dtype)) in enumerate(LEAVES.items()):
        if isinstance(dims, orthax.Packed):
            shape = (2, 16, 32)
        elif dims is PER_HEAD:
            shape = (3, 16, 32)
        elif dims is not STACK:
            shape = (16, 32) if shape[0] == 16 else (32, 16)
        kind = np.complex64 if dtype == [np.complex64] else np.float32
        x = oracles.well_conditioned(shape, kind, seed=100 * seed + i)
        if isinstance(dims, orthax.Packed):
            x = np.concatenate(list(x), axis=1)
        elif dims is PER_HEAD:
            x = np.moveaxis(x, 0, 1)
        found[name] = x.reshape(LEAVES[name][0]).astype(*(dtype or [np.float32]))
    return found


def two_steps(optimizer, params, steps):
    """Updates and state after the second, for which there is momentum."""
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for g in steps:
        updates, state = update(g, state, params)
    return updates, state


@functools.cache
def on_one_device(name):
    return two_steps(OPTIMIZERS[name], gradients(0), [gradients(1), gradients(1)])


@every_kind
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_one_device_and_nothing_moves(name, kind):
    mesh, optimizer = mesh_of("xyz", kind), OPTIMIZERS[name]
    params, g = put(mesh, LAYOUT, gradients(0)), put(mesh, LAYOUT, gradients(1))
    updates, state = two_steps(optimizer, params, [g, g])
    expected, expected_state = on_one_device(name)
    for found, wanted, tolerance in (
        (updates, expected, TOLERANCES[name]),
        (state, expected_state, 1e-5),
    ):
        found, wanted = (jax.tree_util.tree_leaves_with_path(tree) for tree in (found, wanted))
        for (path, x), (_, y) in zip(found, wanted, strict=True):
            # Of bfloat16 a last bit may be rounded the other way.
            short = "bfloat16" in jax.tree_util.keystr(path)
            assert_close({str(path): x}, {str(path): y}, 2**-7 if short else tolerance)
    assert_sharded_alike(updates, params)
    assert_sharded_alike(arrays(state), arrays(optimizer.init(params)))


def test_on_auto_axes_leaves_of_one_shape_may_be_cut_in_several_ways():
    layout = {"q": ((16, 16), P("x", "y")), "k": ((16, 16), P(("x", "y"), None))}
    layout |= {"v": ((16, 16), P(None, ("x", "y"))), "o": ((16, 16), P("y", "x"))}
    layout |= {"rows": ((16, 16), P("x", None)), "copies": ((16, 16), P())}
    params = put(mesh_of("xy", "auto"), layout, normal_tree(layout, 0))
    updates, state = two_steps(COUNTED["muon"], params, [params, params])
    assert_sharded_alike(updates, params)
    assert_sharded_alike(arrays(state), arrays(COUNTED["muon"].init(params)))


@every_kind
def test_ten_steps_are_those_of_one_device(kind):
    mesh = mesh_of("xy", kind)
    layout = {"up": ((16, 32), P("x", "y")), "down": ((32, 16), P("y", "x"))}
    optimizer = orthax.muon(0.1, dimension_numbers=ROWS)
    target = map_leaves(lambda leaf: oracles.well_conditioned(leaf[0]), layout)

    def ten_steps(params, target):
        @jax.jit
        def step(params, state):
            g = jax.tree.map(lambda p, t: p - t, params, target)
            updates, state = optimizer.update(g, state, params)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        for _ in range(10):
            params, state = step(params, state)
        return params

    start = jax.tree.map(lambda x: -x, target)
    params = ten_steps(put(mesh, layout, start), put(mesh, layout, target))
    assert_sharded_alike(params, put(mesh, layout, start))
    assert_close(params, ten_steps(start, target), 1e-5)


@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_the_state_does_not_depend_on_the_mesh(name):
    optimizer = OPTIMIZERS[name]
    expected = jax.eval_shape(optimizer.init, gradients(0))
    for names in AXES:
        layout = {
            k: (shape, P("x") if shape[0] % 8 == 0 else P()) for k, (shape, _) in LAYOUT.items()
        }
        params = put(mesh_of(names), layout, gradients(0))
        state = optimizer.init(params)
        _, after = jax.eval_shape(optimizer.update, params, state, params)
        for found in (state, after):
            same = jax.tree.map(
                lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), found, expected
            )
            assert jax.tree.all(same)


# --- what is sent

MATRICES, SHAPE = 8, (16, 64)
BYTES = 4 * MATRICES * math.prod(SHAPE)
QUICK = orthax.orthogonalize(newton_schulz, coefficients=coefficients.MUON[:2])
COUNTED = {
    name: getattr(orthax, name)(0.1, orthogonalizer=QUICK, dimension_numbers=ROWS)
    for name in ("muon", "normuon", "root")
}
SPECS = {  # of the leaves, on a mesh of these axes
    "rows of one axis": ("x", P("x", None)),
    "columns of one axis": ("x", P(None, "x")),
    "rows": ("xy", P(("x", "y"), None)),
    "columns": ("xy", P(None, ("x", "y"))),
    "both": ("xy", P("x", "y")),
    "swapped": ("xy", P("y", "x")),
    "three axes": ("xyz", P(("x", "z"), "y")),
    "replicated": ("xy", P()),
}


def equal_matrices(name):
    axes, spec = SPECS[name]
    return axes, {str(i): (SHAPE, spec) for i in range(MATRICES)}


@functools.cache
def counts_of(optimizer, layout_name, kind):
    names, layout = equal_matrices(layout_name)
    return counts_on(mesh_of(names, kind), layout, COUNTED[optimizer])


def counts_on(mesh, layout, optimizer):
    params = normal_tree(layout, 0) if mesh is None else put(mesh, layout, normal_tree(layout, 0))
    lowered = jax.jit(optimizer.update).lower(params, optimizer.init(params), params)
    return hlo.counted(lowered.compile().as_text(), DEVICES)


CUT = [name for name in SPECS if name != "replicated"]


@pytest.mark.parametrize("name", CUT)
def test_two_all_to_alls_bring_all_matrices_and_send_them_back(name):
    found = counts_of("muon", name, "explicit")
    assert found.collectives == {"all-to-all": 2}
    # A device keeps one part of eight of what it has.
    assert found.wire == 2 * BYTES / DEVICES * (1 - 1 / DEVICES)


def test_one_all_gather_copies_what_each_device_did_of_copies():
    found = counts_of("muon", "replicated", "explicit")
    assert found.collectives == {"all-gather": 1}
    assert found.wire == BYTES * (1 - 1 / DEVICES)


@pytest.mark.parametrize("name", ["rows", "both", "replicated"])
def test_statistics_of_neurons_take_two_small_collectives_more(name):
    muon, normuon = (counts_of(optimizer, name, "explicit") for optimizer in ("muon", "normuon"))
    more = sum(normuon.collectives.values()) - sum(muon.collectives.values())
    assert 0 <= more <= 2
    # One number for each of 64 columns beside 16 x 64: to the owners and to all.
    assert normuon.wire - muon.wire <= 2 * BYTES / SHAPE[0]


@pytest.mark.parametrize("name", ["rows", "both", "replicated"])
def test_clipping_sends_nothing(name):
    muon, root = (counts_of(optimizer, name, "explicit") for optimizer in ("muon", "root"))
    assert root.collectives == muon.collectives
    assert root.wire == muon.wire


@pytest.mark.parametrize("name", [name for name in CUT if name != "three axes"])
def test_on_auto_axes_the_compiler_exchanges_once_for_each_mesh_axis(name):
    found = counts_of("muon", name, "auto")
    axes = len(SPECS[name][0])
    assert set(found.collectives) == {"all-to-all"}
    assert found.collectives["all-to-all"] <= 2 * axes
    assert found.wire <= axes * 2 * BYTES / DEVICES


@every_kind
@pytest.mark.parametrize("name", ["muon", "normuon", "root"])
def test_experts_on_devices_of_their_own_send_nothing(name, kind):
    shape = (2 * DEVICES, *SHAPE)
    layout = {x: (shape, P(("x", "y"), None, None)) for x in ("gate", "up")}
    optimizer = getattr(orthax, name)(0.1, orthogonalizer=QUICK, dimension_numbers=STACK)
    assert counts_on(mesh_of("xy", kind), layout, optimizer).collectives == {}


@every_kind
@pytest.mark.parametrize("name", SPECS)
def test_every_device_multiplies_an_eighth(name, kind):
    _, layout = equal_matrices(name)
    whole = counts_on(None, layout, COUNTED["muon"]).dots
    steps = coefficients.MUON[:2]
    m, n = SHAPE
    assert whole >= MATRICES * len(steps) * 2 * (2 * m * m * n + m**3) * 0.9
    assert counts_of("muon", name, kind).dots == whole / DEVICES


@every_kind
def test_fewer_matrices_than_devices_are_shared_as_well(kind):
    layout = {str(i): (SHAPE, P("x", "y")) for i in range(3)}
    found = counts_on(mesh_of("xy", kind), layout, COUNTED["muon"])
    one = counts_on(None, {"0": (SHAPE, P())}, COUNTED["muon"])
    # Where layouts are known, several devices may work on one matrix.
    assert found.dots <= one.dots if kind == "explicit" else found.dots == one.dots
    assert found.collectives.pop("all-to-all") <= 4
    assert set(found.collectives) <= ({"all-reduce"} if kind == "explicit" else set())


def test_what_passes_layouts_one_way_can_be_differentiated_and_batched():
    def squares(x):
        return (forward(x) ** 2).sum() + backward(x).sum()

    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.jit(jax.grad(squares))(x), 2 * x + 1)
    np.testing.assert_array_equal(jax.jit(jax.vmap(squares))(x), (x**2 + x).sum(1))


# --- the counter


def test_the_counter_counts_loops_groups_and_products():
    mesh = mesh_of("xy")

    def inside(x):
        def body(x, _):
            return jax.lax.psum(x @ x, "y"), None

        x, _ = jax.lax.scan(body, x, length=5)
        x = jax.lax.all_gather(x, "x", tiled=True)
        return jax.lax.ppermute(x, "x", [(0, 1)])

    run = jax.shard_map(inside, mesh=mesh, in_specs=P("x"), out_specs=P(None, "x"), check_vma=False)
    x = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=NamedSharding(mesh, P("x", None)))
    found = hlo.counted(jax.jit(run).lower(x).compile().as_text(), DEVICES)
    assert found.collectives == {"all-reduce": 5, "all-gather": 1, "collective-permute": 1}
    one = 4 * 8 * 8
    assert found.wire == 5 * one * 2 / 2 + 4 * one * 3 / 4 + 4 * one
    assert found.dots == 5 * 2 * 8**3
    assert found.endless == 0


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("replica_groups={{0,2},{1,3}}", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", 2),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", 4),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([8]<=[2,4]T(1,0)) {'a'}", 4),
        ("replica_groups={}", 8),
    ],
)
def test_the_counter_reads_every_form_of_groups(text, members):
    assert hlo.group_size(f"%x), channel_id=1, {text}, dimensions={{0}}", DEVICES) == members
