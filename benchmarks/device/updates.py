"""Whole optimizer steps beside optax's and PyTorch's: time, memory, time to compile.

A step is update and application, jitted, with params and state donated; PyTorch's likewise is
`optimizer.step()`. Gradients are normal numbers: times do not depend on them.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import record
from optax.contrib import MuonDimensionNumbers

import orthax
from device import peers
from device.session import Session, compile_all, nbytes, timed
from orthax.linalg import gram_newton_schulz, newton_schulz

RATE = 1e-3
BASELINE = "optax.contrib.muon"


def _muon(*method: Any, **options: Any) -> optax.GradientTransformation:
    return orthax.muon(RATE, orthogonalizer=orthax.orthogonalize(*method, **options))


def _kernels(params: Any) -> Any:
    """What optax.contrib.muon shall orthogonalise: what orthax.muon does by itself."""

    def one(path: Any, leaf: Any) -> Any:
        return MuonDimensionNumbers(0, 1) if path[-1].key == "kernel" and leaf.ndim == 2 else None

    return jax.tree.map_with_path(one, params)


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    BASELINE: lambda: optax.contrib.muon(RATE, muon_weight_dimension_numbers=_kernels),
    "muon": lambda: orthax.muon(RATE),
    "optax.adamw": lambda: optax.adamw(RATE),
    "muon, newton_schulz in bfloat16": lambda: _muon(newton_schulz, dtype=jnp.bfloat16),
    "muon, newton_schulz in float16": lambda: _muon(newton_schulz, dtype=jnp.float16),
    "muon, newton_schulz in bfloat16, not stacked": lambda: _muon(
        newton_schulz, stack=False, dtype=jnp.bfloat16
    ),
    "muon, gram_newton_schulz": lambda: _muon(gram_newton_schulz),
    "muon, exact": lambda: _muon(accuracy="exact"),
    "normuon": lambda: orthax.normuon(RATE),
    "root": lambda: orthax.root(RATE),
    "auon": lambda: orthax.auon(RATE),
    "hybrid_auon": lambda: orthax.hybrid_auon(RATE),
    "trion": lambda: orthax.trion(RATE),
    "dct_adamw": lambda: orthax.dct_adamw(RATE),
}


class Workload(NamedTuple):
    """A model's parameters, and which optimizers step through them."""

    params: dict[str, Any]
    dtype: Any
    optimizers: tuple[str, ...]


def gpt2(width: int = 768, layers: int = 12, vocabulary: int = 50257) -> dict[str, Any]:
    """GPT-2 of 124 million parameters, as Flax has it."""
    tree = record.kernels(record.gpt_shapes(width), layers)
    return _with_rest(tree, width, {"token": vocabulary, "position": 1024})


def llama(
    width: int, hidden: int, layers: int, vocabulary: int, key_width: int | None = None
) -> dict[str, Any]:
    """Blocks with a gated MLP; without vocabulary, blocks alone."""
    narrow = (width, key_width or width)
    shapes = {
        "query": (width, width),
        "key": narrow,
        "value": narrow,
        "out": (width, width),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    return _with_rest(record.kernels(shapes, layers), width, {"token": vocabulary})


def _with_rest(tree: dict[str, Any], width: int, embeddings: dict[str, int]) -> dict[str, Any]:
    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    tables = {f"{n}_embedding": {"embedding": array(size, width)} for n, size in embeddings.items()}
    blocks = {
        name: {
            **block,
            "attention_norm": {"scale": array(width)},
            "mlp_norm": {"scale": array(width)},
        }
        for name, block in tree.items()
    }
    tables = {name: t for name, t in tables.items() if t["embedding"].shape[0]}
    return {**tables, **blocks, "norm": {"scale": array(width)}}


def _layers_that_fit(bytes_per_layer: int) -> int:
    """Of the 7 B model: params, gradients, state and updates, twice that for what is temporary."""
    stats = jax.devices()[0].memory_stats() or {}
    return max(1, min(32, int(stats.get("bytes_limit", 16e9) * 0.8 / (10 * bytes_per_layer))))


def workloads(smoke: bool) -> dict[str, Callable[[], Workload]]:
    """By title, in order of interest."""
    every, fewer = tuple(OPTIMIZERS), (BASELINE, "muon", "optax.adamw", "normuon", "trion")
    if smoke:
        return {
            "smoke": lambda: Workload(gpt2(32, 1, 64), jnp.float32, every),
            "smoke, bfloat16": lambda: Workload(llama(32, 64, 1, 0), jnp.bfloat16, fewer),
        }
    per_layer = 4 * (4 * 4096**2 + 3 * 4096 * 11008)
    in_half = (BASELINE, "muon", "optax.adamw", "muon, newton_schulz in float16")

    def seven(dtype: Any) -> Workload:
        layers = _layers_that_fit(per_layer * jnp.dtype(dtype).itemsize // 4)
        return Workload(llama(4096, 11008, layers, 0), dtype, (BASELINE, "muon", "optax.adamw"))

    return {
        "GPT-2 124M": lambda: Workload(gpt2(), jnp.float32, every),
        "GPT-2 124M, bfloat16": lambda: Workload(gpt2(), jnp.bfloat16, in_half),
        "Llama 1B": lambda: Workload(llama(2048, 8192, 16, 128_256, 512), jnp.float32, fewer),
        "Llama 7B blocks, bfloat16": lambda: seven(jnp.bfloat16),
    }


def run(session: Session) -> None:
    """Every workload."""
    for title, make in session.each(workloads(session.smoke).items()):
        with session.reported(workload=title):
            _measure(session, title, make())


def _measure(session: Session, title: str, workload: Workload) -> None:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, workload.dtype), workload.params)
    layers = sum(name.startswith("layer_") for name in shapes)
    session.row(workload=title, layers=layers, **{"parameters (MB)": nbytes(shapes) / 1e6})
    optimizers = {name: OPTIMIZERS[name]() for name in workload.optimizers}
    functions = {
        name: (
            functools.partial(step, optimizer),
            (shapes, jax.eval_shape(optimizer.init, shapes), shapes),
        )
        for name, optimizer in optimizers.items()
    }
    made = compile_all(functions, session, donate=(0, 1))
    gradients = _normal(shapes)
    medians: dict[str, float] = {}
    # One after the other, as a few models do not fit at once; the baseline again at the end.
    for name in [*made, *([BASELINE] if BASELINE in made else [])]:
        with session.reported(workload=title, update=name):
            again = name in medians
            run_step = _runner(made[name].call, optimizers[name], gradients)
            seconds = timed({name: run_step}, smoke=session.smoke)[name]
            medians.setdefault(name, seconds.median)
            fields = {"least": 1e3 * seconds.least, "most": 1e3 * seconds.most}
            if BASELINE in medians:
                fields["of optax's"] = seconds.median / medians[BASELINE]
            session.row(
                workload=title,
                update=f"{name}, again" if again else name,
                ms=1e3 * seconds.median,
                **fields,
                **{
                    "state (MB)": nbytes(functions[name][1][1]) / 1e6,
                    "temporary (MB)": made[name].temporary / 1e6,
                    "compile s": made[name].seconds,
                },
            )
    for name, make in peers.optimizers().items():
        with session.reported(workload=title, update=name):
            if session.left() < 0:
                session.row(workload=title, update=name, left_out=1, reason="time")
                continue
            call, peak = make(gradients, RATE)
            seconds = timed({name: call}, smoke=session.smoke)[name]
            session.row(
                workload=title,
                update=name,
                ms=1e3 * seconds.median,
                **{"of optax's": seconds.median / medians.get(BASELINE, math.nan)},
                **{"peak (MB)": peak() / 1e6},
            )
    if not peers.available():
        session.row(workload=title, skipped="PyTorch is not installed")


def step(
    optimizer: optax.GradientTransformation, params: Any, state: Any, gradients: Any
) -> tuple[Any, Any]:
    """New params and state, in the order of the old: so each takes the place of its own."""
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def _runner(
    call: Callable[..., Any], optimizer: optax.GradientTransformation, gradients: Any
) -> Callable[[], Any]:
    params = jax.tree.map(jnp.ones_like, gradients)
    state = jax.jit(optimizer.init)(params)

    def run_step() -> Any:
        nonlocal params, state
        params, state = call(params, state, gradients)
        return params

    return run_step


def _normal(shapes: Any) -> Any:
    def draw(key: jax.Array) -> Iterator[jax.Array]:
        for i, leaf in enumerate(jax.tree.leaves(shapes)):
            drawn = jax.random.normal(jax.random.fold_in(key, i), leaf.shape, jnp.bfloat16)
            yield (1e-2 * drawn).astype(leaf.dtype)

    return jax.tree.unflatten(jax.tree.structure(shapes), list(draw(jax.random.key(0))))
