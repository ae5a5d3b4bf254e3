"""Is it right on this device? The laws of orthogonalisation, and what published codes compute.

Float32 with whole products and with the device's default (on GPUs TF32), and 16-bit iterations.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record

import orthax
from device.session import Problem, Session, problem
from orthax.linalg import (
    coefficients,
    gram_newton_schulz,
    nearest_orthogonal,
    newton_schulz,
    polar,
    polar_svd,
    zolotarev,
)

GOLDEN = record.ROOT / "tests" / "golden" / "reference.npz"


class Mode(NamedTuple):
    """How products are taken: dtype of the iteration, precision, and the rounding to allow for."""

    dtype: Any
    precision: str | None
    eps: float


MODES = {
    "float32": Mode(jnp.float32, "highest", 2**-23),
    "float32, default products": Mode(jnp.float32, None, 2**-11),
    "bfloat16": Mode(jnp.bfloat16, None, 2**-8),
    "float16": Mode(jnp.float16, None, 2**-11),
}


class Method(NamedTuple):
    """A method, and the range of singular values it promises for inputs above `smallest`."""

    call: Callable[..., jax.Array]
    low: float
    high: float
    smallest: float


def methods(mode: Mode) -> dict[str, Method]:
    """Those that can be run so."""
    options = {"dtype": mode.dtype, "precision": mode.precision}
    found = {
        "newton_schulz": Method(functools.partial(newton_schulz, **options), 0.859, 1.141, 1e-3)
    }
    if mode.dtype != jnp.float32:
        return found
    gram = functools.partial(gram_newton_schulz, precision=mode.precision)
    found["gram_newton_schulz"] = Method(gram, 0.859, 1.141, 1e-3)
    if mode.precision is None:  # these choose their own precision
        found |= {
            "polar": Method(polar, 0.79, 1.21, 2e-3),
            "polar, exact": Method(functools.partial(polar, accuracy="exact"), 0.93, 1.07, 1e-5),
            "zolotarev": Method(zolotarev, 0.79, 1.21, 2e-3),
            "nearest_orthogonal": Method(nearest_orthogonal, 1, 1, 1e-5),
            "polar_svd": Method(functools.partial(polar_svd, rtol=1e-7), 1, 1, 1e-5),
        }
    return found


def run(session: Session) -> None:
    """Every law for every method and mode, then every published code."""
    size = 48 if session.smoke else 768
    known = problem((size, 2 * size))
    for name, mode in MODES.items():
        for title, method in session.each(methods(mode).items()):
            with session.reported(method=title, mode=name):
                for law, holds, value in _laws(method, mode, known):
                    session.law(holds, method=title, mode=name, law=law, value=value)
    with np.load(GOLDEN) as data:
        for code in session.each(CODES):
            for name, mode in MODES.items():
                if mode.dtype != jnp.float32 and code not in ORTHOGONALIZED:
                    continue  # nothing in it is iterated
                with session.reported(code=code, mode=name):
                    step, path = _golden(data, CODES[code], mode)
                    whole = name == "float32" and code != "dct_adamw"
                    holds = step < 5e-4 if whole else path < 0.05
                    session.law(holds, code=code, mode=name, step=step, path=path)


def _laws(method: Method, mode: Mode, known: Problem) -> Iterator[tuple[str, Any, float]]:
    f = jax.jit(method.call)
    exact = np.asarray(known.factor, np.float64)
    rows, columns = exact.shape
    rough = 16 * mode.eps

    # Of a matrix with singular values from 1 down to `smallest` of the norm, all in the range.
    norm = np.linalg.norm(np.geomspace(1, method.smallest, rows))
    spectrum = np.geomspace(1, 1.5 * method.smallest * norm, rows)
    u, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((rows, rows)))
    x = (u * spectrum) @ (u.T @ exact)
    aligned = u.T @ np.asarray(f(jnp.asarray(x, jnp.float32)), np.float64) @ (u.T @ exact).T
    values = np.diag(aligned)
    off = np.linalg.norm(aligned - np.diag(values)) / np.linalg.norm(values)
    # Float32 holds a singular value of 1e-5 of the norm to a hundredth.
    yield "alignment", off < max(rough, 0.02), float(off)
    yield "flatness, least", values.min() > method.low - max(rough, 0.02), float(values.min())
    yield "flatness, most", values.max() < method.high + max(rough, 0.02), float(values.max())

    base = np.asarray(f(known.x), np.float64)
    for power in (-30, -10, 10, 30):
        scaled = np.asarray(f(known.x * 10.0**power), np.float64)
        change = np.linalg.norm(scaled - base) / np.linalg.norm(base)
        yield f"scale 1e{power}", change < max(rough, 0.02), float(change)
    for dtype, scales in ((jnp.bfloat16, (1e-30, 1e30)), (jnp.float16, (1e-2, 1e3))):
        narrow = known.x.astype(dtype)
        for scale in scales:
            y = np.asarray(f(narrow * jnp.asarray(scale, dtype)), np.float64)
            largest = np.linalg.norm(y, 2)
            finite = bool(np.isfinite(y).all()) and largest < method.high + max(rough, 0.1)
            yield f"{jnp.dtype(dtype).name} input times {scale:g}", finite, float(largest)

    zero = np.asarray(f(jnp.zeros((rows, columns))))
    yield "zero", not zero.any(), float(np.abs(zero).max())
    deficient = jnp.asarray(known.x).at[rows // 2 :].set(0)
    y = np.asarray(f(deficient), np.float64)
    yield "rank deficient", np.linalg.norm(y, 2) < method.high + 0.1, float(np.linalg.norm(y, 2))
    yield "zero rows stay zero", not y[rows // 2 :].any(), float(np.abs(y[rows // 2 :]).max())


# --- published codes: what tests/optimizers/test_published_codes.py tests on a CPU


class Code(NamedTuple):
    """The data's name, their leaves, and our optimizer from an orthogonalizer."""

    data: str
    leaves: tuple[str, ...]
    make: Callable[[Any], optax.GradientTransformation]


_WIDTH: dict[str, Any] = {"shape_scale": orthax.scale_by_width()}
_AUON = {"gamma": 1.5, "shape_scale": optax.identity()}
_ALL = ("tall", "wide", "square")


def _trion(basis: str, orthogonalizer: Any) -> optax.GradientTransformation:
    options: Any = {"basis": basis, "ranking": "l1", "weight_decay": 0.1, **_WIDTH}
    return orthax.trion(0.02, 8, 0.95, orthogonalizer=orthogonalizer, **options)


CODES = {
    "muon": Code(
        "muon", _ALL, lambda o: orthax.muon(0.02, orthogonalizer=o, weight_decay=0.1, **_WIDTH)
    ),
    "normuon": Code(
        "normuon",
        _ALL,
        lambda o: orthax.normuon(0.02, 0.95, 0.95, orthogonalizer=o, weight_decay=0.1, **_WIDTH),
    ),
    "root": Code("root", _ALL, lambda o: orthax.root(0.01, orthogonalizer=o, weight_decay=0.1)),
    "auon": Code(
        "auon_code",
        _ALL,
        lambda _: orthax.auon(0.24, 0.95, mode="code", weight_decay=0.01, **_AUON),
    ),
    "hybrid_auon": Code(
        "hybrid_auon_code", _ALL, lambda _: orthax.hybrid_auon(0.24, 0.95, **_AUON)
    ),
    "trion": Code("trion_l1_kj", ("tall", "square"), functools.partial(_trion, "dct3")),
    "trion, wide": Code("trion_l1_kj", ("wide",), functools.partial(_trion, "dct")),
    "dct_adamw": Code("dct_adamw_rot1_ef1", _ALL, lambda _: _dct_adamw()),
}
ORTHOGONALIZED = ("muon", "normuon", "root", "trion", "trion, wide")


def _dct_adamw() -> optax.GradientTransformation:
    options: Any = {"basis": "dct3", "error_feedback": True, "bias_correction": "global"}
    return orthax.dct_adamw(0.01, 8, weight_decay=0.1, **options)


def _golden(data: Any, code: Code, mode: Mode) -> tuple[float, float]:
    """Largest relative error of an entry in six steps, and of the displacement after all of them.

    The code of dct_adamw multiplies by a rounded rotation: only its displacement can be compared.
    """
    orthogonalizer = orthax.orthogonalize(
        newton_schulz,
        coefficients=coefficients.MUON,
        dtype=mode.dtype,
        precision=mode.precision,
    )
    optimizer = code.make(orthogonalizer)

    def tree(key: str) -> dict[str, jax.Array]:
        return {leaf: jnp.asarray(data[f"{code.data}/{key}/{leaf}"].T) for leaf in code.leaves}

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.default_matmul_precision(mode.precision or "default"):
        params = tree("p0")
        state, worst = optimizer.init(params), 0.0
        for t in range(6):
            params, state = step(params, state, tree(f"g{t}"))
            before, after = tree(f"p{t}"), tree(f"p{t + 1}")
            for leaf in code.leaves:
                size = jnp.abs(after[leaf] - before[leaf]).max()
                worst = max(worst, float(jnp.abs(params[leaf] - after[leaf]).max() / size))
    start, end = tree("p0"), tree("p6")
    off = [
        float(jnp.linalg.norm(params[leaf] - end[leaf]) / jnp.linalg.norm(end[leaf] - start[leaf]))
        for leaf in code.leaves
    ]
    return worst, max(off)
