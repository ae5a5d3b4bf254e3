"""How near does each method come to the orthogonal polar factor, and how fast?

    python benchmarks/orthogonality.py          # about ten minutes on two cores
    python benchmarks/orthogonality.py --smoke  # tiny, in seconds, writes nothing

Every method of orthax.linalg beside all tables and preconditionings of optax.contrib.muon, on
  gauss, gauss wide     768 x 768 and 768 x 3072 of independent normal entries;
  1e3, 1e3 wide, 1e6    singular values in geometric progression, of this condition number;
  rank 256              768 x 768, normal factors;
  GPT 256, GPT 256 wide trained here: the momentum of attention and MLP kernels of the model of
                        examples/gpt.py, two layers of width 256, after 40 updates of Muon;
  step 10, step 60      stored spectra of such momentum at width 768 (benchmarks/data), query and
                        output kernels of two layers, with random singular vectors; wide: MLPs.
Tall matrices are transposed. Matrices are float32; singular values and vectors of input and result
are computed in float64. Directions of the input whose singular value is at most float32's epsilon
(1.2e-7) times the largest count as zero, and there any result is right: a result Y is judged by
Y V, with V the other right singular vectors and U the left. Figures are the largest and the mean
|s - 1| of Y V's singular values s, and ||Y V - U|| / ||U|| in the Frobenius norm.

Times are medians of rounds in which the methods take turns; speeds are medians of the ratios to
optax's default in the same round. Prints a table per figure, writes orthogonality.json and
orthogonality.png to benchmarks/results.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from orthax import linalg
from orthax.linalg import coefficients, newton_schulz, polar, zolotarev

sys.path.append(str(record.ROOT / "examples"))

BASELINE = "optax"
STORED = {"step 10": "mom768|step10|", "step 60": "mom768|step60|"}
DRAWN = ("gauss", "1e3", "step 60", "gauss wide", "1e3 wide", "step 60 wide")
COLOURS = {  # Okabe and Ito's, by the first word of a method's name
    "optax": "#000000",
    "newton_schulz": "#0072B2",
    "gram_newton_schulz": "#56B4E9",
    "zolotarev": "#E69F00",
    "polar": "#009E73",
    "polar_svd": "#CC79A7",
}
MARKERS = "osD^vPX*"

Method = Callable[[jax.Array], jax.Array]


def methods() -> dict[str, Method]:
    """Everything that is compared, jitted."""
    with_table = functools.partial(functools.partial, newton_schulz)
    express, long = coefficients.POLAR_EXPRESS, coefficients.minimax(10, 1e-5)
    theirs = functools.partial(functools.partial, record.optax_quintic)
    table = jnp.asarray(coefficients.DION)
    found = {
        BASELINE: theirs(),
        "optax, 5-row table": theirs(ns_coeffs=table),
        "optax, aol": theirs(preconditioning="aol"),
        "optax, schatten": theirs(preconditioning="schatten"),
        "optax, spectral": theirs(preconditioning="spectral"),
        "newton_schulz MUON": with_table(coefficients=coefficients.MUON),
        "newton_schulz POLAR_EXPRESS": with_table(coefficients=express),
        "newton_schulz POLAR_EXPRESS, schatten": with_table(
            coefficients=express, prescale="schatten"
        ),
        "newton_schulz POLAR_EXPRESS, aol": with_table(coefficients=express, prescale="aol"),
        "newton_schulz for_shape": with_table(coefficients=coefficients.for_shape),
        "newton_schulz minimax(10, 1e-5), schatten": with_table(
            coefficients=long, prescale="schatten"
        ),
        "gram_newton_schulz": linalg.gram_newton_schulz,
        "zolotarev 2": functools.partial(zolotarev, degree=2),
        "zolotarev 3": functools.partial(zolotarev, degree=3),
        "zolotarev 2, two passes": functools.partial(zolotarev, degree=2, passes=2),
        "zolotarev 3, two passes": functools.partial(zolotarev, degree=3, passes=2),
        "polar fast": polar,
        "polar exact": functools.partial(polar, accuracy="exact"),
        "polar_svd": linalg.polar_svd,
    }
    return {name: jax.jit(method) for name, method in found.items()}


# -------------------------------------------------------------------------------------- matrices


def made_matrices(size: int, generator: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """Matrices of chosen spectra: all titles but those of trained momentum."""
    square, wide = (size, size), (size, 4 * size)

    def geometric(condition: float, shape: tuple[int, int]) -> np.ndarray:
        spectrum = np.geomspace(1, 1 / condition, size)
        return record.with_spectrum(spectrum, shape, generator)[0]

    left, right = generator.standard_normal((2, size, size // 3))
    return {
        "gauss": [generator.standard_normal(square)],
        "gauss wide": [generator.standard_normal(wide)],
        "1e3": [geometric(1e3, square)],
        "1e3 wide": [geometric(1e3, wide)],
        "1e6": [geometric(1e6, square)],
        "rank 256": [left @ right.T],
    }


def stored_matrices(size: int, generator: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """Matrices with the spectra of trained momentum, stretched if the size is not theirs."""
    found = {}
    for title, prefix in STORED.items():
        for suffix, names, width in (("", ("query", "out"), 1), (" wide", record.MLP, 4)):
            found[title + suffix] = [
                record.with_spectrum(
                    record.stretched(spectrum, size), (size, width * size), generator
                )[0]
                for spectrum in record.momentum_spectra(prefix, names)
            ]
    return found


def trained_matrices(smoke: bool) -> dict[str, list[np.ndarray]]:
    """Momentum of the GPT example after some updates."""
    import gpt

    config = gpt.Config(width=256, layers=2, optimizer="muon")
    if smoke:
        tiny = {"width": 16, "layers": 1, "context": 16, "batch": 2, "data": record.ROOT / "orthax"}
        config = gpt.Config(optimizer="sgd", **tiny)  # it has the same momentum
    config = gpt.settle(config)
    graphdef, state = gpt.init_state(config)
    batches = gpt.make_batches(gpt.read_corpus(config.data), config)
    train_step = gpt.make_train_step(config, graphdef, state, batches[0])
    for step in range(2 if smoke else 40):
        state, _ = train_step(state, batches[step])
    blocks = optax.tree.get(state.opt_state, "trace")["blocks"].values()
    width, attention = config.width, [block["attention"] for block in blocks]
    return {
        "GPT 256": [
            np.asarray(kernels[name]["kernel"]).reshape(width, width)
            for kernels in attention
            for name in record.ATTENTION
        ],
        "GPT 256 wide": [np.asarray(block["up"]["kernel"]) for block in blocks]
        + [np.asarray(block["down"]["kernel"]).T for block in blocks],
    }


# ------------------------------------------------------------------------------------ measurement


class Errors(NamedTuple):
    """Of one result; see the head of the file."""

    largest: float
    mean: float
    distance: float


def errors_of(method: Method, matrices: list[np.ndarray], factors: list[Any]) -> Errors:
    """Largest of the largest, mean of the others over matrices whose u and v are given."""
    found = []
    for x, (u, v) in zip(matrices, factors, strict=True):
        y = np.asarray(method(jnp.asarray(x, jnp.float32)), np.float64) @ v
        off = np.abs(np.linalg.svd(y, compute_uv=False) - 1)
        found.append((off.max(), off.mean(), np.linalg.norm(y - u) / np.linalg.norm(u)))
    largest, mean, distance = np.array(found).T
    return Errors(float(largest.max()), float(mean.mean()), float(distance.mean()))


def singular_vectors(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those in float64 of the float32 matrix whose singular value is not numerically zero."""
    u, s, vh = np.linalg.svd(x.astype(np.float32).astype(np.float64), full_matrices=False)
    kept = s > np.finfo(np.float32).eps * s[0]
    return u[:, kept], vh[kept].T


def times_of(
    compared: dict[str, Method], matrices: dict[str, list[np.ndarray]], rounds: int
) -> dict[str, Any]:
    """For each shape, by method: median milliseconds and speed relative to optax's default."""
    by_shape = {group[0].shape: group[0] for group in matrices.values()}
    found = {}
    for shape, x in by_shape.items():
        x = jnp.asarray(x, jnp.float32)
        runs = {name: functools.partial(method, x) for name, method in compared.items()}
        times = record.interleaved(runs, rounds)
        speeds = record.speeds(times, BASELINE)
        found["x".join(map(str, shape))] = {
            name: {"ms": record.milliseconds(times[name]), "speed": speeds[name]} for name in runs
        }
    return found


# ----------------------------------------------------------------------------------------- report


def error_rows(errors: dict[str, dict[str, Errors]], figure: str) -> list[dict[str, Any]]:
    """One row per method, one column per spectrum."""
    return [
        {figure: name}
        | {title: f"{getattr(by_method[name], figure):.2g}" for title, by_method in errors.items()}
        for name in next(iter(errors.values()))
    ]


def time_rows(times: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per method; per shape the time and the speed with its range."""
    rows: list[dict[str, Any]] = [{"time": name} for name in next(iter(times.values()))]
    for shape, by_method in times.items():
        for row in rows:
            own = by_method[row["time"]]
            row[f"{shape} (ms)"] = own["ms"]
            row["speed " + shape] = "{:.2f} ({:.2f}-{:.2f})".format(*own["speed"])
    return rows


def draw(shapes: dict[str, str], times: dict[str, Any], errors: dict[str, Any]) -> Figure:
    """Distance against speed, one panel per spectrum."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    panels = figure.subplots(2, 3, sharex="row", sharey=True)
    for axes, title in zip(panels.flat, DRAWN, strict=True):
        count: dict[str, int] = {}
        for name, error in errors[title].items():
            family = name.replace(",", "").split()[0]
            marker = MARKERS[count.setdefault(family, 0)]
            count[family] += 1
            speed, distance = times[shapes[title]][name]["speed"][0], max(error.distance, 1e-4)
            face = "none" if family == "polar" else COLOURS[family]
            size = 130 if family == "polar" else 45
            style = {"marker": marker, "edgecolors": COLOURS[family], "label": name}
            axes.scatter(speed, distance, size, face, **style)
        axes.set(title=f"{title}, {shapes[title]}", xscale="log", yscale="log")
        axes.set_xticks((0.25, 0.5, 1, 2, 4, 8), ("1/4", "1/2", "1", "2", "4", "8"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    figure.supxlabel("speed relative to optax.contrib.muon's default (right: faster)")
    figure.supylabel(
        "relative Frobenius distance to the polar factor (below: nearer; 1e-4 at least)"
    )
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    return figure


def main(rounds: int = 9, smoke: bool = False) -> None:
    """Measure and report.

    Args:
      rounds: Timings of each method and shape, interleaved.
      smoke: Tiny matrices, two rounds, and no record.
    """
    size, generator = 16 if smoke else 768, np.random.default_rng(0)
    compared = methods()
    matrices = made_matrices(size, generator) | trained_matrices(smoke)
    matrices |= stored_matrices(size, generator)
    errors: dict[str, dict[str, Errors]] = {}
    for title, group in matrices.items():
        factors = [singular_vectors(x) for x in group]
        errors[title] = {
            name: errors_of(method, group, factors) for name, method in compared.items()
        }
    times = times_of(compared, matrices, 2 if smoke else rounds)
    for figure in Errors._fields:
        print(record.table(error_rows(errors, figure)), end="\n\n")
    print(record.table(time_rows(times)))
    print("Speeds are relative to optax's default, with their range: larger is faster.")
    shapes = {title: "x".join(map(str, group[0].shape)) for title, group in matrices.items()}
    picture = draw(shapes, times, errors)
    if not smoke:
        named = {t: {m: e._asdict() for m, e in by.items()} for t, by in errors.items()}
        data = {"rounds": rounds, "shapes": shapes, "errors": named, "times": times}
        record.write("orthogonality", data)
        picture.savefig(record.RESULTS / "orthogonality.png", dpi=150)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
