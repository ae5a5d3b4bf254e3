"""What an optimizer does is chosen by the platform it is compiled for, not by the one that traces.

Programs for TPU and GPU are made here, on any host, and looked at. Those for TPU are compiled too
where the compiler is installed, `pip install libtpu`, which needs no TPU.
"""

import functools
import importlib.util
import json
import re
import subprocess
import sys

import compilation
import jax
import jax.numpy as jnp
import pytest
from helpers import OPTIMIZERS, normal
from jax import export

# Long enough for an FFT on CPU; three shapes, of which one has enough leaves to be cut by offsets.
SHAPES = {
    "wide": (264, 528),
    "tall": (320, 264),
    "square": (264, 264),
    **{f"small_{i}": (64, 32) for i in range(8)},
}
ACCELERATORS = ["tpu", "cuda", "rocm"]
UNSUITABLE = re.compile("cholesky|triangular_solve|lapack|cusolver|cublas|fft")
ORTHOGONALIZING = ("muon", "normuon", "root", "hybrid_auon")
RATIONAL = ("muon", "normuon", "trion")
COSINE = ("trion", "dct_adamw")
RANK = 16


@functools.cache
def traced(name, dtype):
    """An update, traced once on this host."""
    optimizer = OPTIMIZERS[name](1e-3, *([RANK] if name in COSINE else []))
    params = {k: {"kernel": jax.ShapeDtypeStruct(s, dtype)} for k, s in SHAPES.items()}
    state = jax.eval_shape(optimizer.init, params)
    return jax.jit(optimizer.update).trace(params, state, params)


def program(name, platform, dtype=jnp.float32):
    return traced(name, dtype).lower(lowering_platforms=(platform,)).as_text()


def products(text):
    """The dtypes of factors of matrix products."""
    found = re.findall(r"dot_general.*: \((tensor<\S+>), (tensor<\S+>)\) ->", text)
    return [re.findall(r"(\w+)>", factor)[0].split("x")[-1] for pair in found for factor in pair]


by_name = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.mark.parametrize("platform", ACCELERATORS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@by_name
def test_accelerators_get_products_alone(name, platform, dtype):
    text = program(name, platform, dtype)
    assert not UNSUITABLE.findall(text)
    assert len(products(text)) or name == "auon"
    if name != "root":  # which looks for a quantile by bisection
        assert "stablehlo.while" not in text


@pytest.mark.parametrize("platform", ACCELERATORS)
@pytest.mark.parametrize("name", ORTHOGONALIZING)
def test_accelerators_multiply_16_bit_gradients_in_16_bits(name, platform):
    assert set(products(program(name, platform, jnp.bfloat16))) == {"bf16"}


@pytest.mark.parametrize("platform", ACCELERATORS)
def test_and_low_ranks_of_them(platform):
    assert {"bf16"} < set(products(program("trion", platform, jnp.bfloat16)))


@by_name
def test_cpus_get_their_own_way(name):
    for dtype in (jnp.float32, jnp.bfloat16):
        text = program(name, "cpu", dtype)
        assert ("lapack" in text) == (name in RATIONAL)
        assert ("stablehlo.fft" in text) == (name in COSINE)
        assert "bf16" not in products(text)


def test_one_exported_program_holds_the_ways_of_all_its_platforms():
    optimizer = OPTIMIZERS["muon"](1e-3)
    params = {"kernel": jnp.asarray(normal((6, 12)))}
    state = optimizer.init(params)
    update = export.export(jax.jit(optimizer.update), platforms=("cpu", "tpu", "cuda"))(
        params, state, params
    )
    assert "lapack" in update.mlir_module()
    expected, _ = jax.jit(optimizer.update)(params, state, params)
    found, _ = update.call(params, state, params)
    assert jnp.allclose(found["kernel"], expected["kernel"], atol=1e-6)


# --- compiled for a TPU that is not there

COMPILE = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import orthax

described = topologies.get_topology_desc("v5e:2x4", platform="tpu")
texts = {}
for count, dtype in ((1, jnp.float32), (8, jnp.bfloat16)):
    lies = NamedSharding(Mesh(np.array(described.devices[:count]), ("d",)), P("d"))
    params = {
        name: {"kernel": jax.ShapeDtypeStruct(shape, dtype, sharding=lies)}
        for name, shape in {"wide": (128, 512), "square": (128, 128)}.items()
    }
    optimizer = orthax.muon(1e-3)
    state = jax.eval_shape(optimizer.init, params)
    text = jax.jit(optimizer.update).lower(params, state, params).compile().as_text().lower()
    texts[count] = {word: text.count(word) for word in ("cholesky", "triangular", "convolution(")}
print(json.dumps(texts))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_program_compiled_for_tpu_has_no_decomposition():
    import libtpu

    environment = {
        "JAX_PLATFORMS": "cpu",
        "TPU_LIBRARY_PATH": libtpu.get_library_path(),
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other tests may compile at the same time
    }
    run = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**compilation.users_environment(), **environment},  # it knows no flags of the CPU's
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for counts in json.loads(run.stdout).values():
        assert counts.pop("convolution(") > 0  # what products become there
        assert set(counts.values()) == {0}
