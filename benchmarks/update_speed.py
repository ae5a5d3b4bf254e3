"""Whole optimizer updates beside optax.contrib.muon's: how fast, and how near to orthogonal?

    python benchmarks/update_speed.py          # about ten minutes on two cores
    python benchmarks/update_speed.py --smoke  # tiny, in seconds, writes nothing

An update is the jitted `update(gradients, state, params)` with donated state: momentum,
orthogonalisation, scale, learning rate. Workloads, as Flax kernels:
  gpt2  3 layers of width 768: 12 of 768 x 768, 3 of 768 x 3072, 3 of 3072 x 768;
  nano  6 layers of width 384: 24 of 384 x 384, 6 of 384 x 1536, 6 of 1536 x 384;
  wide  2 of 1024 x 8192, 1 of 8192 x 1024.
Gradients, the same for all, have stored spectra of really trained momentum (benchmarks/data; width
768 at step 60, for nano width 256 at step 200) with random singular vectors. Where the width is
another, the spectrum's quantiles are kept. The same gradient every time keeps momentum at it.

Updates take turns; speeds are the median and the range of the ratios to optax.contrib.muon in the
same round. "distance" is the relative Frobenius distance of the direction, the update over learning
rate and shape factor, to the gradient's polar factor; "rescaled" is the same after the factor that
makes it least, which a learning rate absorbs. Then what single steps cost beside optax's quintic,
and auon beside SGD. Targets stand beside the figures. Prints tables, writes update_speed.json and
update_speed.png to benchmarks/results.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import tyro
from matplotlib.figure import Figure

import orthax
from orthax.linalg import coefficients, gram_newton_schulz, newton_schulz

LEARNING_RATE = 1e-3
BASELINE = "optax.contrib.muon"
THREE_STEPS = coefficients.minimax(3, 1e-3, cushion=0.02, safety=1.02)


def optax_scale(fan_in: int, fan_out: int) -> float:
    """Shape factor of optax.contrib.muon."""
    return math.sqrt(max(1, fan_out / fan_in))


def adam_scale(fan_in: int, fan_out: int) -> float:
    """Shape factor of orthax.scale_by_adam_rms."""
    return 0.2 * math.sqrt(max(fan_in, fan_out))


class Contender(NamedTuple):
    """An optimizer, and the factor from its direction's singular values to those of the update."""

    optimizer: optax.GradientTransformation
    scale: Callable[[int, int], float] | None = None  # None: its direction is not orthogonal


def theirs(**options: Any) -> Contender:
    """Muon of optax."""
    return Contender(optax.contrib.muon(LEARNING_RATE, **options), optax_scale)


def ours(*method: Any, **options: Any) -> Contender:
    """Muon of orthax with a method of orthogonalisation."""
    orthogonalizer = orthax.orthogonalize(*method, **options)
    return Contender(orthax.muon(LEARNING_RATE, orthogonalizer=orthogonalizer), adam_scale)


CONTENDERS = {
    BASELINE: theirs(),
    "optax.contrib.muon, 5-row table": theirs(ns_coeffs="dion"),
    "optax.contrib.muon, aol": theirs(preconditioning="aol"),
    "muon, fast": ours(),
    "muon, exact": ours(accuracy="exact"),
    "muon, newton_schulz": ours(newton_schulz),
    "muon, newton_schulz, 3 steps": ours(newton_schulz, coefficients=THREE_STEPS),
    "muon, gram_newton_schulz": ours(gram_newton_schulz),
    "normuon": Contender(orthax.normuon(LEARNING_RATE), adam_scale),
    "root": Contender(orthax.root(LEARNING_RATE), adam_scale),
    "hybrid_auon": Contender(orthax.hybrid_auon(LEARNING_RATE)),
    "auon": Contender(orthax.auon(LEARNING_RATE)),
    "optax.sgd, momentum": Contender(optax.sgd(LEARNING_RATE, momentum=0.95)),
    "optax.adamw": Contender(optax.adamw(LEARNING_RATE)),
}
JUDGED = ("muon, fast", "muon, exact")
IN_BFLOAT16 = (BASELINE, *JUDGED, "muon, newton_schulz")


class Workload(NamedTuple):
    """A model's kernels, the spectra its gradients get, and what muon, fast and exact, shall reach.

    Fast shall also be no further from the polar factor than the baseline, exact no more than 0.2.
    """

    shapes: dict[str, tuple[int, int]]
    layers: int
    spectra: str
    targets: tuple[float, float] = (1.0, 1.0)


WIDE = {"up": (1024, 8192), "gate": (1024, 8192), "down": (8192, 1024)}
WORKLOADS = {
    "gpt2": Workload(record.gpt_shapes(768), 3, "mom768|step60|", (5.0, 2.5)),
    "nano": Workload(record.gpt_shapes(384), 6, "mom256|step200|", (3.2, 1.8)),
    "wide": Workload(WIDE, 1, "mom768|step60|", (6.0, 3.0)),
}
SMOKE = {"smoke": Workload({"query": (16, 16), "up": (16, 64)}, 1, "mom256|step200|")}


class Problem(NamedTuple):
    """Trees of a workload."""

    params: Any
    gradients: Any
    factors: Any  # the gradients' polar factors


def make_problem(workload: Workload, generator: np.random.Generator) -> Problem:
    """Draws gradients; kernels take the stored spectra of their kind in turn."""
    kernels = record.kernels(workload.shapes, workload.layers)
    leaves, structure = jax.tree.flatten_with_path(kernels)
    drawn = []
    for index, (path, leaf) in enumerate(leaves):
        names = record.ATTENTION if path[1].key in record.ATTENTION else record.MLP
        stored = record.momentum_spectra(workload.spectra, names)
        spectrum = record.stretched(stored[index % len(stored)], min(leaf.shape))
        drawn.append(record.with_spectrum(spectrum, leaf.shape, generator))
    gradients, factors = (
        structure.unflatten([jnp.asarray(x, jnp.float32) for x in part])
        for part in zip(*drawn, strict=True)
    )
    return Problem(jax.tree.map(jnp.ones_like, gradients), gradients, factors)


def updater(optimizer: optax.GradientTransformation, problem: Problem) -> Callable[[], Any]:
    """A function that makes the next update and keeps the state, whose memory it reuses."""
    update = jax.jit(optimizer.update, donate_argnums=1)
    state = optimizer.init(problem.params)

    def run() -> Any:
        nonlocal state
        updates, state = update(problem.gradients, state, problem.params)
        return updates, state

    return run


def distances(contender: Contender, updates: Any, factors: Any) -> tuple[float | None, float]:
    """Means over the matrices: as it is, and after rescaling."""
    found = []
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(factors), strict=True)
    for update, factor in pairs:
        y, p = (np.asarray(x, np.float32).ravel() for x in (update, factor))
        scale = contender.scale(*update.shape) if contender.scale else 1.0
        off = np.linalg.norm(-y / (LEARNING_RATE * scale) - p) / np.linalg.norm(p)
        cosine = y @ p / (np.linalg.norm(y) * np.linalg.norm(p))
        found.append((off, math.sqrt(max(0.0, 1 - float(cosine) ** 2))))
    off, rescaled = (float(x) for x in np.mean(found, axis=0))
    return (off if contender.scale else None), rescaled


def measure(workload: Workload, rounds: int, generator: np.random.Generator) -> dict[str, Any]:
    """Milliseconds, speed and distances of every contender, and the speeds in bfloat16."""
    problem = make_problem(workload, generator)
    runs = {name: updater(c.optimizer, problem) for name, c in CONTENDERS.items()}
    found: dict[str, Any] = {}
    for name, contender in CONTENDERS.items():
        off, rescaled = distances(contender, runs[name]()[0], problem.factors)
        found[name] = {"distance": off, "rescaled": rescaled}
    times = record.interleaved(runs, rounds)
    speeds = record.speeds(times, BASELINE)
    for name, row in found.items():
        row |= {"ms": record.milliseconds(times[name]), "speed": speeds[name]}
    nearest = (found[BASELINE]["distance"], 0.2)
    for name, speed, distance in zip(JUDGED, workload.targets, nearest, strict=True):
        found[name] |= {"speed target": speed, "distance target": distance}
    half = Problem(*jax.tree.map(lambda x: x.astype(jnp.bfloat16), problem))
    runs = {name: updater(CONTENDERS[name].optimizer, half) for name in IN_BFLOAT16}
    times = record.interleaved(runs, rounds)
    for name, speed in record.speeds(times, BASELINE).items():
        found[name] |= {"bf16 ms": record.milliseconds(times[name]), "bf16 speed": speed}
    return found


def step_costs(shape: tuple[int, int], rounds: int, generator: np.random.Generator) -> list[Any]:
    """Rows: transformations of one matrix over optax's quintic, auon over SGD and Muon."""
    workload = Workload({"up": shape}, 1, "mom768|step60|")
    problem = make_problem(workload, generator)
    (x,) = jax.tree.leaves(problem.gradients)
    steps = {
        "clip_by_quantile": orthax.clip_by_quantile(),
        "normalize_neurons": orthax.normalize_neurons(),
        "scale_by_cosh_rms": orthax.scale_by_cosh_rms(),
    }
    whole = ("auon", "optax.sgd, momentum", BASELINE)
    runs: dict[str, Callable[[], Any]] = {
        "quintic": functools.partial(jax.jit(record.optax_quintic), x),
        **{name: updater(step, problem) for name, step in steps.items()},
        **{name: updater(CONTENDERS[name].optimizer, problem) for name in whole},
    }
    times = record.interleaved(runs, rounds)
    compared = (
        ("clip_by_quantile", "quintic", 0.1),
        ("normalize_neurons", "quintic", 0.1),
        ("scale_by_cosh_rms", "quintic", None),
        ("auon", "optax.sgd, momentum", 3.0),
        ("auon", BASELINE, 0.15),
    )
    return [
        {
            "step": name,
            "ms": record.milliseconds(times[name]),
            "beside": other,
            "its ms": record.milliseconds(times[other]),
            "ratio": round(1 / record.speeds(times, other)[name][0], 3),
            "target": "" if target is None else f"<= {target:g}",
        }
        for name, other, target in compared
    ]


def row_of(name: str, figures: dict[str, Any]) -> dict[str, str]:
    """One line of a workload's table."""

    def show(key: str, form: str) -> str:
        value = figures.get(key)
        if value is None:
            return ""
        return form.format(*value) if isinstance(value, list) else form.format(value)

    return {
        "update": name,
        "ms": show("ms", "{:.1f}"),
        "speed (range)": show("speed", "{:.2f} ({:.2f}-{:.2f})"),
        "target": show("speed target", ">= {:g}"),
        "distance": show("distance", "{:.3f}"),
        "its target": show("distance target", "<= {:.3f}"),
        "rescaled": show("rescaled", "{:.3f}"),
        "bf16 ms": show("bf16 ms", "{:.1f}"),
        "bf16 speed (range)": show("bf16 speed", "{:.2f} ({:.2f}-{:.2f})"),
    }


def draw(results: dict[str, dict[str, Any]]) -> Figure:
    """Bars of speed with the distance beside them, one panel per workload."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (title, found) in zip(panels, results.items(), strict=True):
        speeds = [figures["speed"][0] for figures in found.values()]
        colours = ["#E69F00" if name.startswith("optax") else "#0072B2" for name in found]
        bars = axes.barh(list(found), speeds, color=colours)
        labels = [
            f"({figures['rescaled']:.2f})"
            if figures["distance"] is None
            else f"{figures['distance']:.2f}"
            for figures in found.values()
        ]
        axes.bar_label(bars, labels, padding=9, fontsize=8)
        for name in JUDGED:
            axes.plot(found[name]["speed target"], name, "D", color="#D55E00", markersize=5)
        axes.set(title=title, xlabel=f"speed relative to {BASELINE}", xscale="log")
        axes.set_xlim(0.8, 3 * max(speeds))
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    figure.suptitle(
        "Distance to the polar factor beside the bars (in brackets: rescaled); diamonds: targets"
    )
    return figure


def main(rounds: int = 7, smoke: bool = False) -> None:
    """Measure and report.

    Args:
      rounds: Updates of each optimizer and workload, interleaved.
      smoke: One tiny workload, two rounds, and no record.
    """
    generator, results = np.random.default_rng(0), {}
    rounds = 2 if smoke else rounds
    for title, workload in (SMOKE if smoke else WORKLOADS).items():
        results[title] = measure(workload, rounds, generator)
        print(f"{title}: {workload.layers} times {workload.shapes}")
        rows = [row_of(name, figures) for name, figures in results[title].items()]
        print(record.table(rows), end="\n\n")
    steps = step_costs((16, 64) if smoke else (768, 3072), 3 * rounds, generator)
    print(record.table(steps))
    picture = draw(results)
    if not smoke:
        record.write("update_speed", {"rounds": rounds, "updates": results, "steps": steps})
        picture.savefig(record.RESULTS / "update_speed.png", dpi=150)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
