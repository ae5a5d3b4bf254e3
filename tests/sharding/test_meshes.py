"""Updates on eight devices are those on one, and keep the sharding of their parameters."""

import functools

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
from orthax.linalg import coefficients, gram_newton_schulz, newton_schulz, polar_svd, zolotarev
from orthax.matrices.path_rules import WrittenForModel
from orthax.penalties import soft_orthogonality, warm_spectral_restricted_isometry

# Two steps instead of five compile in half the time.
QUICK = {"coefficients": coefficients.MUON[:2]}
PACKED = orthax.Packed(MuonDimensionNumbers(0, 1), axis=1, sections=(16, 8))
OPTIONS = {  # for MODEL below; some tests have a part of it
    "orthogonalizer": orthax.orthogonalize(newton_schulz, **QUICK),
    "dimension_numbers": orthax.PathRules(((WrittenForModel("packed"), PACKED),)),
}
OPTIMIZERS = {
    "muon": orthax.muon(0.1, weight_decay=0.1, **OPTIONS),
    "muon(int8)": orthax.muon(0.1, mu_dtype="int8", **OPTIONS),
    "normuon": orthax.normuon(0.1, **OPTIONS),
    "root": orthax.root(0.1, **OPTIONS),
    "auon": orthax.auon(0.1, dimension_numbers=OPTIONS["dimension_numbers"]),
    "trion": orthax.trion(0.1, 4, **OPTIONS),
    "dct_adamw": orthax.dct_adamw(
        0.1,
        4,
        error_feedback=True,
        update_every=2,
        dimension_numbers=OPTIONS["dimension_numbers"],
    ),
    "dct_adamw(int8)": orthax.dct_adamw(
        0.1, 4, mu_dtype="int8", dimension_numbers=OPTIONS["dimension_numbers"]
    ),
    "hybrid_auon": orthax.hybrid_auon(0.1, dimension_numbers=OPTIONS["dimension_numbers"]),
}
TRANSFORMS = {
    "orthogonalize": orthax.orthogonalize(newton_schulz, **QUICK),
    "orthogonalize(stack=False)": orthax.orthogonalize(newton_schulz, stack=False, **QUICK),
    "orthogonalize(gram_newton_schulz)": orthax.orthogonalize(gram_newton_schulz, **QUICK),
    "orthogonalize(zolotarev)": orthax.orthogonalize(zolotarev),
    "orthogonalize(polar_svd)": orthax.orthogonalize(polar_svd),
    **{
        f"low_rank({basis})": orthax.low_rank(
            optax.scale_by_adam(), 4, basis=basis, retain=0.5, buffer_dtype=dtype
        )
        for basis, dtype in {
            "dct": None,
            "dct3": "int8",
            "hadamard": "int4",
            "random": jnp.bfloat16,
            "columns": None,
            "svd": None,
            "subspace": None,
        }.items()
    },
    "clip_by_quantile": orthax.clip_by_quantile(),
    "scale_by_cosh_rms": orthax.scale_by_cosh_rms(),
    "scale_by_cosh_rms(code)": orthax.scale_by_cosh_rms(mode="code"),
    "scale_by_cosh_rms(rms)": orthax.scale_by_cosh_rms(mode="rms"),
    "normalize_neurons": orthax.normalize_neurons(),
    "normalize_neurons(long)": orthax.normalize_neurons(axis="long"),
    "scale_by_width": orthax.scale_by_width(),
    "scale_by_unit_rms": orthax.scale_by_unit_rms(),
    "scale_by_adam_rms": orthax.scale_by_adam_rms(),
    "scale_to_rms": orthax.scale_to_rms(),
    "add_penalty": orthax.add_penalty(soft_orthogonality, 0.1),
    "add_penalty(warm)": orthax.add_penalty(warm_spectral_restricted_isometry(), 0.1),
    "keep_orthogonal": orthax.keep_orthogonal(),
    "project_tangent": orthax.project_tangent(),
    "keep_unit_neurons": orthax.keep_unit_neurons(),
    "keep_norm": orthax.keep_norm(),
}
# What a compiler does to decompositions and to products along a sharded axis on Auto axes: it lays
# the result out in its own way.
GATHERED_ON_AUTO = {"orthogonalize(polar_svd)", "orthogonalize(zolotarev)"}
GATHERED_ON_AUTO |= {"add_penalty(warm)"}

# Shape and sharding of each leaf, on a mesh of x (4 devices) and y (2 devices).
MATRICES = {
    "replicated": ((16, 8), P()),
    "rows": ((16, 8), P("x", None)),
    "columns": ((16, 8), P(None, "y")),
    "both": ((16, 8), P("x", "y")),
    "both_swapped": ((8, 16), P("y", "x")),
    "rows_over_all": ((16, 8), P(("x", "y"), None)),
    "stack": {"Dense_0": {"kernel": ((4, 8, 16), P("x", None, None))}},
    "stack_and_columns": {"Dense_0": {"kernel": ((4, 8, 16), P("x", None, "y"))}},
}
# Without those whose contractions and results "both" has too.
ENOUGH = {name: leaf for name, leaf in MATRICES.items() if name not in ("rows", "columns")}
MODEL = {
    **ENOUGH,
    "packed": ((16, 24), P("x", "y")),
    "attention": {
        "query": {"kernel": ((16, 4, 8), P(None, "x", None)), "bias": ((4, 8), P("x", None))},
        "key": {"kernel": ((16, 4, 8), P(None, "x", None))},
        "value": {"kernel": ((16, 4, 8), P("y", "x", None))},
        "out": {"kernel": ((4, 8, 16), P("x", None, None)), "bias": ((16,), P("y"))},
    },
    "Embed_0": {"embedding": ((32, 8), P("x", None))},
}
# All optimizers open attention kernels alike, and in trion and normuon it takes long to compile.
WITHOUT_ATTENTION = {name: x for name, x in MODEL.items() if name != "attention"}
LAYOUTS = dict.fromkeys(OPTIMIZERS, WITHOUT_ATTENTION)
LAYOUTS |= dict.fromkeys(("muon", "dct_adamw"), MODEL) | dict.fromkeys(TRANSFORMS, ENOUGH)
LAYOUTS |= {name: MATRICES for name in TRANSFORMS if name.startswith("orthogonalize")}
TOLERANCE = 1e-5  # of the largest entry of a leaf: sums over shards are taken in another order


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    assert jax.device_count() == 8, "run `pytest tests/sharding` by itself"
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(request.param,) * 2)


@functools.cache
def on_one_device(name):
    """Params, gradients and updates of an optimizer or a transform, without a mesh."""
    transformation, layout = (OPTIMIZERS | TRANSFORMS)[name], LAYOUTS[name]
    params, g = normal_tree(layout, 0), normal_tree(layout, 1)
    return params, g, jax.jit(transformation.update)(g, transformation.init(params), params)[0]


def check(name, mesh):
    """The update on the mesh is that on one device, and nothing moves.

    What is gathered on Auto axes does not move where the out_shardings of jit say so.
    """
    transformation, layout = (OPTIMIZERS | TRANSFORMS)[name], LAYOUTS[name]
    params, g, expected = on_one_device(name)
    params, g = put(mesh, layout, params), put(mesh, layout, g)
    state = transformation.init(params)
    gathered = AxisType.Auto in mesh.axis_types and name in GATHERED_ON_AUTO
    shardings = jax.tree.map(lambda x: x.sharding, params)
    options = {"out_shardings": (shardings, None)} if gathered else {}
    updates, new_state = jax.jit(transformation.update, **options)(g, state, params)
    assert_close(updates, expected, TOLERANCE)
    assert_sharded_alike(updates, params)
    if not gathered:
        assert_sharded_alike(arrays(new_state), arrays(state))


@pytest.mark.parametrize("name", LAYOUTS)
def test_shardings_are_kept_and_updates_are_those_of_one_device(name, mesh):
    check(name, mesh)


def test_it_does_so_with_the_mesh_as_context(mesh):
    with jax.set_mesh(mesh):
        check("muon", mesh)


DEFAULTS = {
    "muon": orthax.muon(0.1),
    "normuon": orthax.normuon(0.1),
    "muon(exact)": orthax.muon(0.1, orthogonalizer=orthax.orthogonalize(accuracy="exact")),
}
# Beside small matrices such as the rational form cuts in blocks.
LARGE = {**MATRICES, "tall": ((256, 64), P("x", "y")), "wide": ((64, 192), P("y", "x"))}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_default_is_one_function_on_a_mesh_and_on_one_device(name, mesh):
    optimizer = DEFAULTS[name]
    params = normal_tree(LARGE, 0)
    # Far from singular: the order in which the shards of a sum are added changes little.
    g = map_leaves(lambda leaf: oracles.well_conditioned(leaf[0]), LARGE)
    update = jax.jit(optimizer.update)
    expected, _ = update(g, optimizer.init(params), params)
    params, g = put(mesh, LARGE, params), put(mesh, LARGE, g)
    state = optimizer.init(params)
    assert "lapack" in update.lower(g, state, params).as_text()
    updates, _ = update(g, state, params)
    assert_close(updates, expected, 1e-6)


def test_without_jit_updates_are_the_same(mesh):
    layout = {name: MATRICES[name] for name in ("both", "both_swapped")}
    params, g = (normal_tree(layout, seed) for seed in range(2))
    optimizer = OPTIMIZERS["normuon"]
    expected, _ = optimizer.update(g, optimizer.init(params))
    params, g = put(mesh, layout, params), put(mesh, layout, g)
    with jax.set_mesh(mesh):
        updates, _ = optimizer.update(g, optimizer.init(params))
    assert_close(updates, expected, TOLERANCE)
    assert_sharded_alike(updates, params)


def test_momentum_lies_where_its_parameter_lies(mesh):
    params = put(mesh, MODEL, normal_tree(MODEL, 0))
    state = OPTIMIZERS["muon"].init(params)
    kernels = jax.tree.leaves(optax.tree.get(state, "trace"))
    found = {(x.shape, str(x.sharding)) for x in kernels}
    assert found <= {(x.shape, str(x.sharding)) for x in jax.tree.leaves(params)}
    assert len(found) > 8


def state_without_values(transformation, params):
    """The state for leaves whose values are gone: to read them raises an error."""
    for x in jax.tree.leaves(params):
        x.delete()
    return transformation.init(params)


def names(entry):
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


# The batch axes of a leaf, and what is the same for all of a row or column, by the leaf's spec.
LIES = {
    "indices": lambda spec: P(*spec[:-2], None),
    "columns": lambda spec: P(*spec[:-2], None, None),
    "per_column": lambda spec: P(*spec[:-2], None, spec[-1]),
    "per_row": lambda spec: P(*spec[:-2], spec[-2], None),
    "alike": lambda spec: P(*spec),
    # Of tall matrices, whose columns are projected.
    "low": lambda spec: P(*spec[:-2], spec[-2], None),
    "laid": lambda spec: P(*spec[:-2], (*names(spec[-2]), *names(spec[-1])), None),
}
LIES_ON_AUTO = LIES | {
    "indices of laid": lambda _: P(),
    "laid": lambda spec: P(*(None for _ in spec[:-2]), ("x", "y"), None),
}
LIES |= {"indices of laid": LIES["indices"]}
STATES = {
    "normalize_neurons": {"rms": "per_column"},
    "low_rank(dct)": {"subspaces": "indices of laid", "mu": "laid", "residuals": "laid"},
    "low_rank(dct3)": {"subspaces": "indices of laid", "codes": "alike", "scale": "per_row"},
    "low_rank(hadamard)": {"codes": "per_row", "zero": "per_row"},
    "low_rank(svd)": {"subspaces": "columns", "nu": "low", "residuals": "alike"},
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_starts_where_its_leaf_lies_and_reads_no_leaf(name, mesh):
    layout = {
        "stack": {"kernel": ((4, 8, 6), P("x", None, "y"))},
        "both": ((16, 8), P("x", "y")),
        "rows": ((16, 8), P(("x", "y"), None)),
    }
    if name == "low_rank(hadamard)":
        del layout["stack"]
    params = put(mesh, layout, normal_tree(layout, 0))
    state = state_without_values(TRANSFORMS[name], params)
    lies = LIES_ON_AUTO if AxisType.Auto in mesh.axis_types else LIES
    for field, kind in STATES[name].items():
        found = optax.tree.get(state, field)
        expected = map_leaves(
            lambda leaf, kind=kind: NamedSharding(
                mesh, lies[kind]((*leaf[1], *(None,) * (len(leaf[0]) - len(leaf[1]))))
            ),
            layout,
        )
        for x, sharding in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim), (field, x.sharding, sharding)


@pytest.mark.parametrize("name", ["muon", "normuon", "trion", "dct_adamw"])
def test_init_of_an_optimizer_reads_no_leaf(name, mesh):
    layout = {"stack": {"Dense_0": {"kernel": MATRICES["stack"]["Dense_0"]["kernel"]}}}
    state_without_values(OPTIMIZERS[name], put(mesh, layout, normal_tree(layout, 0)))


WRAPPED = {
    "plain": OPTIMIZERS["normuon"],
    "injected": optax.inject_hyperparams(orthax.normuon)(0.1, weight_decay=0.1, **OPTIONS),
    "MultiSteps": optax.MultiSteps(OPTIMIZERS["muon"], 2),
    "trion": OPTIMIZERS["trion"],
    "dct_adamw": OPTIMIZERS["dct_adamw"],
}


@pytest.mark.parametrize("name", WRAPPED)
def test_training_never_moves_a_parameter(name, mesh):
    layout = {"up": {"kernel": ((8, 16), P("x", "y"))}, "down": {"kernel": ((16, 8), P("y", None))}}

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda p: 2 * p + 1, params)
        updates, state = WRAPPED[name].update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    first = put(mesh, layout, normal_tree(layout, 0))
    with jax.set_mesh(mesh):
        carry = first, jax.jit(WRAPPED[name].init)(first)
        if name == "plain":
            run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=4))
            assert_sharded_alike(run(carry)[0][0], first)
        step = jax.jit(step)
        for _ in range(4):
            carry, _ = step(carry, None)
        params, _ = carry
        assert_sharded_alike(params, first)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(first), strict=True):
        assert np.isfinite(x).all()
        assert (np.asarray(x) != np.asarray(y)).all()


def test_bfloat16_params_keep_dtype_and_sharding(mesh):
    layout = {"rows": MATRICES["rows"], "both": MATRICES["both"]}
    cast = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), normal_tree(layout, s)) for s in (0, 1)]
    params, g = (put(mesh, layout, tree) for tree in cast)
    optimizer = OPTIMIZERS["muon"]
    updates, _ = jax.jit(optimizer.update)(g, optimizer.init(params), params)
    assert_sharded_alike(updates, params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
