"""`sharding=`: how leaves lie, where a program does not tell; and pieces between whole matrices."""

import functools
import math

import hlo
import jax
import numpy as np
import optax
import oracles
import pytest
from helpers import says
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import arrays, assert_close, assert_sharded_alike, map_leaves, normal_tree, put
from optax.contrib import MuonDimensionNumbers

import orthax
from orthax.base.owners import axes_inside, axes_of_owners
from orthax.linalg import coefficients, newton_schulz, polar_svd

LAYOUT = {f"layer_{i}": ((16, 32), P("x", "y")) for i in range(8)}
QUICK = orthax.orthogonalize(newton_schulz, coefficients=coefficients.MUON[:2])
muon = functools.partial(
    orthax.muon, 0.1, orthogonalizer=QUICK, dimension_numbers=MuonDimensionNumbers(0, 1)
)


@functools.cache
def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)


def shardings(layout=LAYOUT):
    return map_leaves(lambda leaf: NamedSharding(mesh_of(), leaf[1]), layout)


FORMS = {
    "shardings": shardings,
    "specs": lambda: map_leaves(lambda leaf: leaf[1], LAYOUT),
    "function": lambda: lambda params: shardings(),
}


def compiled(optimizer, tree, layout=LAYOUT, kind=AxisType.Auto):
    """The compiled update with what it takes."""
    g = put(mesh_of(kind), layout, tree)
    state = optimizer.init(g)
    return jax.jit(optimizer.update).lower(g, state, g).compile(), g, state


@pytest.mark.parametrize("form", FORMS)
def test_on_auto_axes_two_exchanges_are_enough(form):
    tree = normal_tree(LAYOUT, 0)
    program, g, state = compiled(muon(sharding=FORMS[form]()), tree)
    assert hlo.counted(program.as_text(), 8).collectives == {"all-to-all": 2}
    updates, after = program(g, state, g)
    expected, _ = jax.jit(muon().update)(tree, muon().init(tree), tree)
    assert_close(updates, expected, 1e-6)
    assert_sharded_alike(updates, g)
    assert_sharded_alike(arrays(after), arrays(state))


@pytest.mark.parametrize("spec", [P(None, "x"), P(("x", "y")), P()], ids=str)
def test_a_wrong_spec_changes_no_value_and_no_sharding(spec):
    tree = normal_tree(LAYOUT, 0)
    wrong = map_leaves(lambda leaf: spec, LAYOUT)
    program, g, state = compiled(muon(sharding=wrong), tree)
    updates, after = program(g, state, g)
    expected, _ = jax.jit(muon().update)(tree, muon().init(tree), tree)
    assert_close(updates, expected, 1e-6)
    assert_sharded_alike(updates, g)
    assert_sharded_alike(arrays(after), arrays(state))


def test_with_false_nothing_travels():
    program, *_ = compiled(muon(sharding=False), normal_tree(LAYOUT, 0))
    assert hlo.counted(program.as_text(), 8).collectives.get("all-reduce", 0) >= 8  # of products


@pytest.mark.parametrize("transformation", ["orthogonalize", "as_matrices", "partition_matrices"])
def test_transformations_take_it_as_well(transformation):
    options = {"method": newton_schulz, "coefficients": coefficients.MUON[:2]}
    dims = MuonDimensionNumbers(0, 1)
    tx = {
        "orthogonalize": lambda: orthax.orthogonalize(**options, sharding=shardings()),
        "as_matrices": lambda: orthax.as_matrices(QUICK, dims, sharding=shardings()),
        "partition_matrices": lambda: orthax.partition_matrices(
            lambda leaves: leaves(QUICK), optax.identity(), dims, sharding=shardings()
        ),
    }[transformation]()
    program, *_ = compiled(tx, normal_tree(LAYOUT, 0))
    assert hlo.counted(program.as_text(), 8).collectives == {"all-to-all": 2}


BAD = {
    "axis": (P("z"), ValueError, ("muon: sharding of 'layer_0'", "'z'", "('x', 'y')")),
    "entries": (P("x", "y", None), ValueError, ("'layer_0'", "3 entries", "(16, 32)")),
    "kind": ("x", TypeError, ("muon: sharding of 'layer_0'", "NamedSharding", "'x'")),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_sharding_of_a_leaf_is_refused_by_name(case):
    given, kind, words = BAD[case]
    tree = put(mesh_of(), LAYOUT, normal_tree(LAYOUT, 0))
    optimizer = muon(sharding=map_leaves(lambda leaf: given, LAYOUT))
    with pytest.raises(kind, match=says(*words)):
        jax.eval_shape(jax.jit(optimizer.update), tree, optimizer.init(tree), tree)


def test_an_axis_that_does_not_divide_a_leaf_is_refused_by_name():
    layout = {"odd": ((6, 32), P(None, "y"))}
    tree = put(mesh_of(), layout, normal_tree(layout, 0))
    optimizer = muon(sharding={"odd": P("x")})
    with pytest.raises(ValueError, match=says("muon: sharding of 'odd'", "size 6 in 4")):
        jax.eval_shape(jax.jit(optimizer.update), tree, optimizer.init(tree), tree)


def test_shardings_of_another_tree_are_refused():
    tree = put(mesh_of(), LAYOUT, normal_tree(LAYOUT, 0))
    with pytest.raises(ValueError, match=says("muon: sharding", "tree structure of the params")):
        muon(sharding={"another": P()}).init(tree)


# --- pieces between whole matrices


def polar(x):
    u, _, v = np.linalg.svd(oracles.float64(x), full_matrices=False)
    return u @ v


PIECES = {
    "matrix": ((64, 32), P("x", "y")),
    "heads": ((32, 4, 8), P(None, "x", "y")),
    "whole": ((16, 8), P()),
    "layers": ((2, 16, 32), P(None, None, ("x", "y"))),
}
DIMS = {
    "matrix": MuonDimensionNumbers(0, 1),
    "heads": MuonDimensionNumbers(0, (1, 2)),
    "whole": MuonDimensionNumbers(0, 1),
    "layers": MuonDimensionNumbers(1, 2),
}


def direction(name, g, *, of_pieces):
    """-0.2 sqrt(longer side) polar, of the matrices or of what each device has of them."""
    parts = parts_of(PIECES[name][1], g.ndim) if of_pieces else [1] * g.ndim
    result = np.zeros(g.shape)
    for index in np.ndindex(*parts):
        cut = tuple(
            slice(i * n // k, (i + 1) * n // k)
            for i, n, k in zip(index, g.shape, parts, strict=True)
        )
        matrices = g[cut] if name == "layers" else g[cut].reshape(1, len(g[cut]), -1)
        result[cut] = np.stack([scaled(x) for x in matrices]).reshape(g[cut].shape)
    return result


def parts_of(spec, axes):
    """In how many parts each axis is cut."""
    sizes = {"x": 4, "y": 2, None: 1}
    entries = (*spec, *(None,) * (axes - len(spec)))
    return [math.prod(sizes[a] for a in (e if isinstance(e, tuple) else (e,))) for e in entries]


def scaled(matrix):
    return -0.2 * np.sqrt(max(matrix.shape)) * polar(matrix)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_pieces_are_orthogonalised_alone_between_whole_matrices(kind):
    tree = normal_tree(PIECES, 0)
    given = shardings(PIECES) if kind == AxisType.Auto else None
    optimizer = orthax.muon(
        1.0,
        0.0,
        nesterov=False,
        orthogonalizer=orthax.orthogonalize(polar_svd),
        dimension_numbers=DIMS,
        whole_every=3,
        sharding=given,
    )
    program, g, state = compiled(optimizer, tree, PIECES, kind)
    for step in range(4):
        updates, state = program(g, state, g)
        expected = {n: direction(n, x, of_pieces=step % 3 > 0) for n, x in tree.items()}
        assert_close(updates, expected, 2e-6)
        assert_sharded_alike(updates, g)


def test_on_one_device_every_update_is_of_whole_matrices():
    tree = normal_tree(LAYOUT, 0)
    state, plain = muon(whole_every=3).init(tree), muon().init(tree)
    for _ in range(2):
        updates, state = muon(whole_every=3).update(tree, state, tree)
        expected, plain = muon().update(tree, plain, tree)
        assert_close(updates, expected, 0)


def test_pieces_of_unknown_cuts_are_refused():
    tree = put(mesh_of(), LAYOUT, normal_tree(LAYOUT, 0))
    optimizer = muon(whole_every=2)
    with pytest.raises(ValueError, match=says("muon: whole_every", "sharding=")):
        jax.eval_shape(jax.jit(optimizer.update), tree, optimizer.init(tree), tree)


# --- fewer matrices than devices


FEW = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
FEW_SPECS = [P(None, ("x", "y")), P("x", "y"), P(None, "y"), P(("x", "y"), None), P()]


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("spec", FEW_SPECS, ids=str)
def test_several_devices_work_on_each_of_few_matrices(spec, kind):
    """Where it pays, along mesh axes that cut the longer side; the shorter is never divided."""
    layout = {name: ((32, 512), spec) for name in ("first", "second")}
    tree = normal_tree(layout, 0)
    given = shardings(layout) if kind == "auto" else None
    whole = muon()
    program, g, state = compiled(muon(sharding=given), tree, layout, FEW[kind])
    updates, _ = program(g, state, g)
    expected, _ = jax.jit(whole.update)(tree, whole.init(tree), tree)
    assert_close(updates, expected, 1e-5)
    assert_sharded_alike(updates, g)
    counts = hlo.counted(program.as_text(), 8)
    alone = jax.jit(whole.update).lower(tree, whole.init(tree), tree).compile()
    of_one = hlo.counted(alone.as_text(), 1).dots / 2
    divided = spec in FEW_SPECS[:3]
    assert counts.dots < 0.7 * of_one if divided else counts.dots == of_one
    assert counts.collectives.get("all-reduce", 0) <= (10 if divided else 0)


def test_tall_matrices_and_merged_axes_are_divided_as_well():
    layout = {"tall": ((512, 32), P(("x", "y"))), "heads": ((32, 16, 32), P(None, ("x", "y")))}
    dims = {"tall": MuonDimensionNumbers(0, 1), "heads": MuonDimensionNumbers(0, (1, 2))}
    tree = normal_tree(layout, 0)
    optimizer = orthax.muon(0.1, orthogonalizer=QUICK, dimension_numbers=dims)
    program, g, state = compiled(optimizer, tree, layout, AxisType.Explicit)
    updates, _ = program(g, state, g)
    expected, _ = jax.jit(optimizer.update)(tree, optimizer.init(tree), tree)
    assert_close(updates, expected, 1e-5)
    assert_sharded_alike(updates, g)
    assert hlo.counted(program.as_text(), 8).collectives.get("all-reduce", 0) > 0


@pytest.mark.parametrize(
    ("matrices", "shape", "cutting", "inside"),
    [
        (8, (1024, 4096), "xy", ""),  # enough
        (2, (1024, 4096), "xy", "y"),  # 38.7 against 64.4 G, 16.8 against 29.4 MB
        (2, (1024, 4096), "x", "x"),  # two on each, along copies too
        (1, (1024, 8192), "xy", "xy"),
        (2, (1024, 1024), "xy", ""),  # products among squares are not divided
        (7, (1024, 4096), "xy", ""),
    ],
)
def test_estimated_times_decide_which_axes_stay_inside(matrices, shape, cutting, inside):
    found = axes_inside(matrices, shape, cutting, "xy", {"x": 2, "y": 4})
    assert found == tuple(inside)


def test_along_copies_there_are_as_many_owners_as_have_less_to_do():
    sizes = {"x": 2, "y": 4, "z": 2}
    assert axes_of_owners(16, "x", "yz", sizes) == {"x", "y", "z"}
    assert axes_of_owners(2, "", "xy", sizes) == {"x"}
    assert axes_of_owners(3, "", "xy", sizes) == {"y"}
    assert axes_of_owners(4, "x", "yz", sizes) == {"x", "z"}
    assert axes_of_owners(1, "", "xyz", sizes) == set()


def test_sections_of_several_numbers_of_matrices_travel_one_by_one():
    layout = {"experts": ((12, 16, 32), P("x", None, "y"))}
    dims = {"experts": orthax.Packed(MuonDimensionNumbers(1, 2), axis=0, sections=(4, 8))}
    optimizer = orthax.muon(0.1, orthogonalizer=QUICK, dimension_numbers=dims)
    tree = normal_tree(layout, 0)
    program, g, state = compiled(optimizer, tree, layout, AxisType.Explicit)
    updates, _ = program(g, state, g)
    expected, _ = jax.jit(optimizer.update)(tree, optimizer.init(tree), tree)
    assert_close(updates, expected, 1e-6)
    assert_sharded_alike(updates, g)
