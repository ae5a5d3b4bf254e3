"""One measuring session: its clock, rows and data file, and how calls are timed and counted."""

import contextlib
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import record
import scipy.fft


class Session:
    """Collects rows, prints each as it comes, and writes all of them after every one.

    So a session that is cut off leaves what it has measured.

    Attributes:
      smoke: Everything once and tiny.
      rows: By section.
      failed: What should have held and did not.
    """

    def __init__(self, path: Path, *, seconds: float, smoke: bool, commit: str | None) -> None:
        """Results go to `path`; after `seconds` nothing new is begun."""
        self.smoke, self.rows, self.failed = smoke, {}, []
        self._path, self._ends, self._section_ends = path, time.monotonic() + seconds, 0.0
        self._section = ""
        self._origin = record.origin()
        self._origin["commit"] = commit or self._origin["commit"]

    @contextlib.contextmanager
    def section(self, name: str, share: float) -> Iterator[None]:
        """A part of the session, with its share of the time that is left."""
        started = time.monotonic()
        self._section, self._section_ends = name, started + share * (self._ends - started)
        self.rows[name] = []
        print(f"\n== {name}: {self.left():.0f} s at most", flush=True)
        with self.reported(section=name):
            yield
        print(f"== {name}: {time.monotonic() - started:.1f} s", flush=True)

    def left(self) -> float:
        """Seconds of the section that are left."""
        return self._section_ends - time.monotonic()

    def row(self, **fields: Any) -> None:
        """A result."""
        self.rows[self._section].append(fields)
        print("  ".join(f"{key} {_short(value)}" for key, value in fields.items()), flush=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({**self._origin, **self.rows}, indent=1) + "\n")

    def law(self, holds: bool, **fields: Any) -> None:
        """A result of something that should hold."""
        self.row(**fields, holds=bool(holds))
        if not holds:
            self.failed.append({"section": self._section, **fields})

    @contextlib.contextmanager
    def reported(self, **fields: Any) -> Iterator[None]:
        """An exception in here becomes a row and ends nothing else."""
        try:
            yield
        except Exception as error:  # out of memory, not supported, ...: what, is in the row
            lines = str(error).strip().splitlines() or [""]
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {lines[0][:200]} ({place.name}:{place.lineno})"
            self.row(**fields, error=said)
            self.failed.append({"section": self._section, **fields, "error": said})

    def working(
        self, calls: Mapping[str, Callable[[], Any]], **about: Any
    ) -> dict[str, Callable[[], Any]]:
        """The calls that work, tried once; one that does not, of lack of memory say, is a row."""
        found = {}
        for name, call in calls.items():
            with self.reported(**about, call=name):
                jax.block_until_ready(call())
                found[name] = call
        return found

    def each(self, things: Iterable[Any]) -> Iterator[Any]:
        """The things as long as there is time; the others are counted in a row."""
        things = list(things)
        for index, thing in enumerate(things):
            if self.left() < 0:
                self.row(left_out=len(things) - index, reason="time")
                return
            yield thing


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- time


class Timing(NamedTuple):
    """Seconds of a call: the median over rounds, the least and the most."""

    median: float
    least: float
    most: float


def timed(calls: Mapping[str, Callable[[], Any]], *, smoke: bool) -> dict[str, Timing]:
    """Seconds of each function, which take turns; many calls are queued, so that gaps are hidden.

    A round of one function is at least 40 ms long; a first one is not counted.
    """
    counts = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        once = _seconds(call, 1)
        counts[name] = 1 if smoke else max(2, min(200, math.ceil(0.04 / once)))
    rounds = range(1 if smoke else 5)
    turns = [{name: _seconds(call, counts[name]) for name, call in calls.items()} for _ in rounds]
    found = {}
    for name in calls:
        seconds = [turn[name] for turn in turns]
        found[name] = Timing(statistics.median(seconds), min(seconds), max(seconds))
    return found


def _seconds(call: Callable[[], Any], count: int) -> float:
    started = time.perf_counter()
    result = None
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / count


class Compiled(NamedTuple):
    """A compiled function, the seconds that took, and bytes beyond arguments and results."""

    call: Any
    seconds: float
    temporary: int


def compile_all(
    functions: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]],
    session: Session,
    *,
    donate: Sequence[int] = (),
    threads: int = 6,
) -> dict[str, Compiled]:
    """Compiles functions of arguments (or their shapes) beside each other; faults become rows."""

    def one(item: tuple[Callable[..., Any], Sequence[Any]]) -> Compiled | Exception:
        function, arguments = item
        started = time.perf_counter()
        try:
            # A function of its own: settings that a cache would not see may differ.
            fresh = jax.jit(lambda *a: function(*a), donate_argnums=tuple(donate))
            made = fresh.lower(*arguments).compile()
        except Exception as error:
            return error
        analysis: Any = made.memory_analysis()
        temporary = int(analysis.temp_size_in_bytes) if analysis else -1
        return Compiled(made, time.perf_counter() - started, temporary)

    with ThreadPoolExecutor(threads) as pool:
        results = dict(zip(functions, pool.map(one, functions.values()), strict=True))
    found = {}
    for name, result in results.items():
        with session.reported(compiling=name):
            if isinstance(result, Exception):
                raise result
            found[name] = result
    return found


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def product_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of the matrix products of a function, loops counted as often."""
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(program: Any) -> float:
    total = 0.0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            summed = math.prod(shape[axis] for axis in contracted)
            complex_factor = 4 if jnp.iscomplexobj(equation.invars[0].aval) else 1
            total += 2 * complex_factor * summed * equation.outvars[0].aval.size
        inside = [getattr(p, "jaxpr", p) for p in _parts(equation.params.values())]
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(_flops(part) for part in inside if hasattr(part, "eqns"))
    return total


def _parts(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, tuple | list) else [value]


# --- matrices


class Problem(NamedTuple):
    """Matrices in float32 with the spectrum of trained momentum, and their polar factors."""

    x: jax.Array
    factor: jax.Array


def problem(shape: tuple[int, ...], seed: int = 0) -> Problem:
    """Matrices (..., m, n): stored spectra in turn, stretched; singular vectors mixed by cosines.

    Computed in float64: rows of the identity, their signs drawn and their cosine transform taken
    twice on either side, are as good as random orthogonal matrices and exact, and take seconds
    where a QR decomposition takes minutes.
    """
    generator = np.random.default_rng(seed)
    *batch, m, n = shape
    names = (*record.ATTENTION, *record.MLP)
    stored = record.momentum_spectra("mom768|step60|", names)
    xs, factors = [], []
    for i in range(math.prod(batch)):
        spectrum = record.stretched(stored[i % len(stored)], min(m, n))
        right = _mixed(np.eye(min(m, n), max(m, n)), 1, generator)
        turn = np.random.SeedSequence([seed, i])
        both = [
            _mixed(part, 0, np.random.default_rng(turn))
            for part in (spectrum[:, None] * right, right)
        ]
        x, factor = (part.T if m > n else part for part in both)
        xs.append(np.asarray(x, np.float32))
        factors.append(np.asarray(factor, np.float32))
    x, factor = (jnp.asarray(np.reshape(parts, shape)) for parts in (xs, factors))
    return Problem(x, factor)


def _mixed(x: np.ndarray, axis: int, generator: np.random.Generator) -> np.ndarray:
    for _ in range(2):
        signs = generator.choice([-1.0, 1.0], x.shape[axis])
        x = x * (signs[:, None] if axis == 0 else signs)
        x = np.asarray(scipy.fft.dct(x, axis=axis, norm="ortho", workers=-1))
    return x


@jax.jit
def distance(y: jax.Array, factor: jax.Array) -> jax.Array:
    """Relative Frobenius distance, the mean over matrices."""
    off = jnp.linalg.norm(y.astype(jnp.float32) - factor, axis=(-2, -1))
    return jnp.mean(off / jnp.linalg.norm(factor, axis=(-2, -1)))
