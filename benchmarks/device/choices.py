"""Where there is a choice, which way is faster here? What rules of the library are to follow from.

Stacks or single leaves; stacks in how large chunks; the Gram form from which aspect on; Hermitian
products whole, by blocks or by kernel; the cosine transform by product or FFT; quantised buffers.
"""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import record

import orthax
from device.session import Compiled, Session, compile_all, distance, nbytes, problem, timed
from device.updates import gpt2, step
from orthax.linalg import dct, elementary, gram_newton_schulz, newton_schulz
from orthax.linalg.elementary import Halving
from orthax.linalg.half_products import Tiles, by_blocks, by_kernel

PRECISIONS = {"bfloat16": jnp.bfloat16, "float32, default products": jnp.float32}


def run(session: Session) -> None:
    """Every choice; each may fail by itself."""
    choices = (stacking, symmetric, aspects, chunks, transforms, quantised)
    for choice in session.each(choices):
        with session.reported(choice=choice.__name__):
            choice(session)


def _times(session: Session, functions: dict[str, Any], **about: Any) -> dict[str, Compiled]:
    """Compiles, times in turn, and writes a row for each function; speeds beside the first."""
    made = compile_all(functions, session)
    calls = {name: functools.partial(m.call, *functions[name][1]) for name, m in made.items()}
    calls = session.working(calls, **about)
    times = timed(calls, smoke=session.smoke)
    first = next(iter(times.values())).median if times else 1.0
    for name, seconds in times.items():
        more = {"speed": first / seconds.median, "compile s": made[name].seconds}
        temporary = {"temporary (MB)": made[name].temporary / 1e6}
        session.row(**about, way=name, ms=1e3 * seconds.median, **more, **temporary)
    return {name: made[name] for name in times}


def stacking(session: Session) -> None:
    """Leaves of one shape together or one by one, on GPT-2's matrices."""
    width, layers = (32, 2) if session.smoke else (768, 12)
    shapes = record.kernels(record.gpt_shapes(width), layers)
    key = jax.random.key(0)
    tree = jax.tree.map(lambda x: jax.random.normal(key, x.shape, x.dtype), shapes)
    for title, method in {
        "newton_schulz, bfloat16": functools.partial(newton_schulz, dtype=jnp.bfloat16),
        "newton_schulz": newton_schulz,
        "gram_newton_schulz": gram_newton_schulz,
    }.items():
        ways = {"stacked": True, "leaf by leaf": False}
        functions = {}
        for way, stack in ways.items():
            tx = orthax.orthogonalize(method, stack=stack)
            functions[way] = (lambda g, tx=tx: tx.update(g, optax.EmptyState())[0], (tree,))
        _times(session, functions, choice="stacking", method=title)


def chunks(session: Session) -> None:
    """How many matrices are batched at once."""
    shapes = [(8, 16, 16)] if session.smoke else [(48, 768, 768), (16, 2048, 2048)]
    for shape in session.each(shapes):
        x = jax.random.normal(jax.random.key(0), shape, jnp.float32)

        def chunked(x: jax.Array, size: int) -> list[jax.Array]:
            parts = [x[i : i + size] for i in range(0, len(x), size)]
            return [newton_schulz(part, dtype=jnp.bfloat16) for part in parts]

        sizes = [n for n in (shape[0], 16, 4, 1) if n <= shape[0]]
        functions = {f"{n} at once": (functools.partial(chunked, size=n), (x,)) for n in sizes}
        _times(session, functions, choice="chunks", shape=shape)


def aspects(session: Session) -> None:
    """The Gram form beside the quintic, the longer a matrix."""
    short = 16 if session.smoke else 1024
    for aspect in session.each((4,) if session.smoke else (1, 1.5, 2, 3, 4, 8)):
        x = problem((short, int(short * aspect))).x
        for title, dtype in PRECISIONS.items():
            functions = {
                method.__name__: (functools.partial(method, dtype=dtype), (x,))
                for method in (newton_schulz, gram_newton_schulz)
            }
            _times(session, functions, choice="aspect", aspect=aspect, mode=title)


KERNELS = {
    "kernel, 128 x 128 x 64": Tiles(128, 64, 8, 3),
    "kernel, 128 x 128 x 32": Tiles(128, 32, 8, 4),
    "kernel, 64 x 64 x 64": Tiles(64, 64, 4, 4),
}


def symmetric(session: Session) -> None:
    """Hermitian products: of long matrices with themselves, of squares, and in newton_schulz."""
    interpreted = jax.default_backend() not in ("gpu", "cuda")
    kernels = KERNELS if not session.smoke else {"kernel": Tiles(16, 16)}
    ways: dict[str, Callable[..., jax.Array]] = {
        "whole": functools.partial(by_blocks, levels=0),
        "one level of blocks": by_blocks,
        "two levels of blocks": functools.partial(by_blocks, levels=2),
        **{
            name: functools.partial(by_kernel, tiles=tiles, interpret=interpreted)
            for name, tiles in kernels.items()
        },
    }
    shapes: Any = [(32, 48)] if session.smoke else [
        (48, 768, 768), (1024, 1024), (2048, 2048), (4096, 4096), (4096, 11008), (8192, 8192)
    ]  # fmt: skip
    for shape in session.each(shapes):
        for title, dtype in PRECISIONS.items():
            x = jax.random.normal(jax.random.key(0), shape).astype(dtype)
            about = {"choice": "symmetric product", "shape": shape, "mode": title}
            functions = {name: (lambda x, way=way: way(x, x), (x,)) for name, way in ways.items()}
            made = _times(session, functions, **about)
            whole = made["whole"].call(x).astype(jnp.float32)
            for name, compiled in made.items():
                off = distance(compiled.call(x), whole)
                session.law(off < 0.01, **about, way=name, distance=float(off))
    _symmetric_inside(session, {name: ways[name] for name in list(ways)[:4]})


def _symmetric_inside(session: Session, ways: dict[str, Callable[..., jax.Array]]) -> None:
    for shape in session.each([(24, 48)] if session.smoke else [(2048, 2048), (4096, 11008)]):
        x = problem(shape).x
        made: dict[str, Any] = {}
        for name, way in ways.items():
            # The rule is read while tracing: one after the other, each function traced anew.
            rule = {jax.default_backend(): Halving(1, way)}
            with mock.patch.dict(elementary.HALVED, rule), session.reported(way=name):
                jax.clear_caches()
                function = functools.partial(newton_schulz, dtype=jnp.bfloat16)
                made |= compile_all({name: (function, (x,))}, session)
        calls = {name: functools.partial(compiled.call, x) for name, compiled in made.items()}
        times = timed(calls, smoke=session.smoke)
        for name, seconds in times.items():
            session.row(
                choice="symmetric product in newton_schulz, bfloat16",
                shape=shape,
                way=name,
                ms=1e3 * seconds.median,
                speed=times["whole"].median / seconds.median,
            )
    jax.clear_caches()


def transforms(session: Session) -> None:
    """The cosine transform by product and by FFT."""
    for n in session.each((64,) if session.smoke else (1024, 2048, 4096, 8192)):
        x = jax.random.normal(jax.random.key(0), (min(n, 4096), n))
        functions = {
            method: (functools.partial(dct, method=method), (x,)) for method in ("matrix", "fft")
        }
        _times(session, functions, choice="dct", shape=x.shape)


def quantised(session: Session) -> None:
    """Buffers of low-rank optimizers in full and in 8 and 4 bits."""
    params = gpt2(32, 1, 64) if session.smoke else gpt2()
    for optimizer, argument in ((orthax.trion, "mu_dtype"), (orthax.dct_adamw, "buffer_dtype")):
        functions, sizes = {}, {}
        for dtype in (None, "int8", "int4"):
            options: dict[str, Any] = {argument: dtype}
            tx = optimizer(1e-3, 8 if session.smoke else 128, **options)
            tree = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), params)
            state = tx.init(tree)
            name = str(dtype or "full")
            functions[name] = (functools.partial(step, tx), (tree, state, tree))
            sizes[name] = round(nbytes(state) / 1e6, 3)
        session.row(choice="buffer", optimizer=optimizer.__name__, **{"state (MB)": sizes})
        _times(session, functions, choice="buffer", optimizer=optimizer.__name__)
