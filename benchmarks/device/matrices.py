"""One matrix, or a stack: how fast is each method, how near its rate to a product's, how exact?

Matrices are float32, with the spectrum of trained momentum; the modes say how they are iterated.
"rate" counts a method's products alone, and "of product" is that over the rate of the product of an
m x m with an m x n matrix in the same mode.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import record

from device.session import Session, compile_all, distance, problem, product_flops, timed
from orthax.linalg import (
    coefficients,
    gram_newton_schulz,
    newton_schulz,
    polar,
    polar_svd,
    zolotarev,
)

SHAPES = (
    (48, 768, 768),
    (768, 3072),
    (1024, 1024),
    (2048, 2048),
    (4096, 4096),
    (4096, 11008),
    (8192, 8192),
)
SMOKE = ((2, 24, 24), (24, 96))

BASELINE = "optax.contrib.muon's"
MODES = {
    "float32": (jnp.float32, "highest"),
    "float32, default products": (jnp.float32, None),
    "bfloat16": (jnp.bfloat16, None),
    "float16": (jnp.float16, None),
}


class Method(NamedTuple):
    """A function of float32 matrices, dtype and precision; in order of interest.

    Attributes:
      call: The function.
      modes: Those that it can run in, of MODES.
      rows: The most for which it is run: factorisations are slow on accelerators.
    """

    call: Callable[..., jax.Array]
    modes: tuple[str, ...]
    rows: int = 8192


def _ours(method: Callable[..., jax.Array], **options: Any) -> Callable[..., jax.Array]:
    return lambda x, dtype, precision: method(x, dtype=dtype, precision=precision, **options)


def _own_precision(method: Callable[..., jax.Array], **options: Any) -> Callable[..., jax.Array]:
    def call(x: jax.Array, dtype: Any, precision: Any) -> jax.Array:
        del precision
        return method(x.astype(dtype), **options)

    return call


def _optax(x: jax.Array, dtype: Any, precision: Any, **options: Any) -> jax.Array:
    call = functools.partial(record.optax_quintic, **options)
    with jax.default_matmul_precision(precision or "default"):
        return jax.vmap(call)(x.astype(dtype)) if x.ndim == 3 else call(x.astype(dtype))


_EVERY, _DEFAULT, _NARROW = tuple(MODES), ("float32, default products",), ("bfloat16", "float16")
METHODS = {
    BASELINE: Method(_optax, ("float32, default products", "bfloat16")),
    "newton_schulz": Method(_ours(newton_schulz), _EVERY),
    "polar": Method(_own_precision(polar), (*_DEFAULT, "bfloat16")),
    "gram_newton_schulz": Method(_ours(gram_newton_schulz), ("float32", *_DEFAULT, *_NARROW)),
    "newton_schulz, schatten": Method(_ours(newton_schulz, prescale="schatten"), _EVERY[1:]),
    "newton_schulz, Muon's table": Method(
        _ours(newton_schulz, coefficients=coefficients.MUON), _EVERY[1:]
    ),
    "polar, exact": Method(_own_precision(polar, accuracy="exact"), _DEFAULT),
    "zolotarev": Method(_own_precision(zolotarev), _DEFAULT, 1024),
    "zolotarev, exact": Method(_own_precision(zolotarev, degree=3, passes=2), _DEFAULT, 1024),
    "polar_svd": Method(_own_precision(polar_svd), _DEFAULT, 768),
}
FIRST = (BASELINE, "newton_schulz", "polar")


def run(session: Session) -> None:
    """The methods of most interest on every shape, then the others."""
    shapes = SMOKE if session.smoke else SHAPES
    others = [name for name in METHODS if name not in FIRST]
    peaks: dict[Any, float] = {}
    for shape, names in session.each([(s, n) for n in (FIRST, others) for s in shapes]):
        with session.reported(shape=shape):
            _measure(session, shape, names, peaks)


def _measure(session: Session, shape: tuple[int, ...], names: Any, peaks: dict[Any, float]) -> None:
    known = problem(shape)
    functions: dict[str, Any] = {}
    flops: dict[str, float] = {}
    for mode, (dtype, precision) in MODES.items():
        for name in names:
            method = METHODS[name]
            if mode in method.modes and min(shape[-2:]) <= method.rows:
                call = functools.partial(method.call, dtype=dtype, precision=precision)
                functions[f"{name} | {mode}"] = (call, (known.x,))
                flops[f"{name} | {mode}"] = product_flops(call, known.x)
        if (shape, mode) not in peaks:
            square = jnp.matmul(known.x, known.x.mT).astype(dtype)
            product = functools.partial(jnp.matmul, precision=precision)
            functions[f"product | {mode}"] = (product, (square, known.x.astype(dtype)))
            flops[f"product | {mode}"] = product_flops(product, square, known.x.astype(dtype))
    made = compile_all(functions, session)
    calls = {key: functools.partial(m.call, *functions[key][1]) for key, m in made.items()}
    calls = session.working(calls, shape=shape)
    times = timed(calls, smoke=session.smoke)
    for key, seconds in times.items():
        name, mode = key.split(" | ")
        if name == "product":
            peaks[shape, mode] = flops[key] / seconds.median
    for key, seconds in times.items():
        name, mode = key.split(" | ")
        rate = flops[key] / seconds.median
        fields: dict[str, Any] = {"ms": 1e3 * seconds.median, "TFLOP/s": rate / 1e12}
        if name != "product":
            if (shape, mode) in peaks:
                fields["of product"] = rate / peaks[shape, mode]
            fields["distance"] = float(distance(calls[key](), known.factor))
            fields["compile s"] = made[key].seconds
        session.row(shape=shape, method=name, mode=mode, **fields)
