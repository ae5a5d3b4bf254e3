"""Low-rank subspaces: time to choose and apply them, energy they capture, memory of the state.

    python benchmarks/low_rank.py            # a few minutes on two cores
    python benchmarks/low_rank.py --smoke

Times: jitted updates of one n x n matrix at rank n / 4 by Adam in a subspace, with a new subspace
at every update and without, all in turn in one process. Energy: the momentum of really trained
models, by kind of layer. Bytes: of the live buffers of a state for the GPT's kernels.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import orthax
from orthax.linalg import dct
from orthax.linalg.bases.hadamard import hadamard_transform

sys.path.append(str(record.ROOT / "examples"))
import gpt

ROUNDS = {256: 15, 512: 15, 1024: 7, 2048: 3, 4096: 1}  # by n: SVDs take minutes
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
DRAWN = ("query", "key", "value", "up", "down", "position_embedding", "image inputs")
INTERVAL = 200  # updates between subspaces in the last column of the table
COLOURS = {
    "dct": "#0072B2",
    "dct3": "#56B4E9",
    "hadamard": "#009E73",
    "random": "#999999",
    "columns": "#E69F00",
    "svd": "#000000",
    "subspace": "#CC79A7",
    "galore": "#D55E00",
}

# ---------------------------------------------------------------------------------------- times


def optimizers(rank: int, every: int) -> dict[str, optax.GradientTransformation]:
    """Adam in a subspace that is chosen anew every so many updates."""
    ours = {
        basis: orthax.low_rank(optax.scale_by_adam(), rank, basis=basis, update_every=every)
        for basis in ("dct", "random", "columns", "svd", "subspace")
    }
    galore = optax.contrib.galore(1.0, rank=rank, update_proj_gap=every)
    return {**ours, "galore": galore, "adam": optax.scale_by_adam()}


def time_updates(n: int, rounds: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Median milliseconds of an update with and without a new subspace."""
    rank = n // 4
    g = {"w": jax.random.normal(jax.random.key(0), (n, n))}
    result: dict[str, dict[str, float]] = {}
    # Apart, since LAPACK's threads go on spinning for a while after an SVD.
    for kind, every in (("new", 1), ("same", 10**6)):
        functions: dict[str, Callable[[], Any]] = {}
        for name, optimizer in optimizers(rank, every).items():
            if name != "adam" or kind == "same":
                update = jax.jit(optimizer.update)
                _, state = update(g, optimizer.init(g), g)
                functions[name] = functools.partial(update, g, state, g)
        for name, seconds in record.interleaved(functions, rounds[kind]).items():
            result.setdefault(name, {})[kind] = record.milliseconds(seconds)
    return result


def times_row(n: int, name: str, times: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """A line of the table."""
    own = times[name]
    new = own.get("new", own["same"])

    def mean(name: str) -> float:
        same = times[name]["same"]
        return (times[name].get("new", same) + (INTERVAL - 1) * same) / INTERVAL

    return {
        "n": n,
        "Adam in": name,
        "new subspace (ms)": new,
        "same (ms)": own["same"],
        "SVD / this": round(times["svd"]["new"] / new, 1),
        "galore / this": round(times["galore"]["new"] / new, 1),
        f"galore / this, every {INTERVAL}": round(mean("galore") / mean(name), 2),
    }


def time_transforms(n: int, rounds: int) -> dict[str, Any]:
    """Median milliseconds of the DCT of n x n, by product and by FFT, along both axes."""
    x = jax.random.normal(jax.random.key(0), (n, n))
    functions: dict[str, Callable[[], Any]] = {}
    for method in ("matrix", "fft"):
        transform = functools.partial(dct, method=method)
        functions[f"{method}, rows"] = functools.partial(jax.jit(transform), x)
        along = jax.jit(lambda x, transform=transform: transform(x.mT).mT)
        functions[f"{method}, columns"] = functools.partial(along, x)
    times = record.interleaved(functions, rounds)
    return {"n": n, **{name: record.milliseconds(seconds) for name, seconds in times.items()}}


# --------------------------------------------------------------------------------------- energy


def gpt_momentum(steps: int, width: int) -> dict[str, list[np.ndarray]]:
    """Momentum of every kind of matrix in the GPT of examples/gpt.py, trained with Muon."""
    config = gpt.settle(gpt.Config(width=width, steps=max(steps, 2), warmup_steps=1))
    corpus = gpt.read_corpus(None)
    batches = gpt.make_batches(corpus, config)
    graphdef, (params, opt_state) = gpt.init_state(config)
    optimizer, trace = gpt.make_optimizer(config), optax.trace(0.95)

    @jax.jit
    def step(params: Any, opt_state: Any, momentum: Any, tokens: Any) -> tuple[Any, Any, Any]:
        gradients = jax.grad(gpt.loss_of)(params, graphdef, tokens)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        _, momentum = trace.update(gradients, momentum)
        return optax.apply_updates(params, updates), opt_state, momentum

    momentum = trace.init(params)
    for t in range(steps):
        params, opt_state, momentum = step(params, opt_state, momentum, batches[t])
    kinds: dict[str, list[np.ndarray]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(optax.tree.get(momentum, "trace")):
        names = [str(getattr(key, "key", key)) for key in keys]
        kind = names[-2]
        if leaf.ndim == 1:
            continue
        matrix = np.asarray(leaf, np.float64)
        if matrix.ndim == 3:  # heads
            matrix = matrix.reshape(-1, width) if kind == "out" else matrix.reshape(width, -1)
        kinds.setdefault(kind, []).append(matrix)
    return kinds


def digits_momentum(steps: int) -> dict[str, list[np.ndarray]]:
    """Momentum of the input layer of a network on 8 x 8 images, whose inputs are neighbours."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    model = nnx.Sequential(
        nnx.Linear(64, 256, rngs=nnx.Rngs(0)), jax.nn.relu, nnx.Linear(256, 10, rngs=nnx.Rngs(1))
    )
    graphdef, params = nnx.split(model)
    optimizer, trace = orthax.muon(1e-2), optax.trace(0.95)

    def loss(params: Any, rows: Any) -> jax.Array:
        logits = nnx.merge(graphdef, params)(x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    @jax.jit
    def step(params: Any, state: Any, momentum: Any, rows: Any) -> tuple[Any, Any, Any]:
        gradients = jax.grad(loss)(params, rows)
        updates, state = optimizer.update(gradients, state, params)
        _, momentum = trace.update(gradients, momentum)
        return optax.apply_updates(params, updates), state, momentum

    params = nnx.as_pure(params)
    state, momentum = optimizer.init(params), trace.init(params)
    for t in range(steps):
        rows = jax.random.randint(jax.random.key(t), (128,), 0, len(y))
        params, state, momentum = step(params, state, momentum, rows)
    kernels = [x for x in jax.tree.leaves(optax.tree.get(momentum, "trace")) if x.ndim == 2]
    return {"image inputs": [np.asarray(x, np.float64) for x in kernels if x.shape == (64, 256)]}


def captured(x: np.ndarray, fraction: float) -> dict[str, float]:
    """Share of the energy of x in the best columns of each basis, of the side that is projected."""
    x = x.T if x.shape[0] <= x.shape[1] else x
    n = x.shape[1]
    rank = max(1, round(fraction * n))
    random = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    y = jnp.asarray(x, jnp.float32)
    coordinates = {
        "dct": dct(y),
        "dct3": orthax.linalg.idct(y),
        "hadamard": hadamard_transform(y),
        "random": x @ random,
        "columns": x,
    }
    shares = {}
    for name, c in coordinates.items():
        energies = np.sort(np.square(np.asarray(c, np.float64)).sum(0))[::-1]
        shares[name] = float(energies[:rank].sum() / energies.sum())
    energies = np.linalg.svd(x, compute_uv=False) ** 2
    return {**shares, "svd": float(energies[:rank].sum() / energies.sum())}


def energy_rows(momentum: Mapping[str, list[np.ndarray]]) -> list[dict[str, Any]]:
    """Mean shares over the matrices of a kind."""
    rows = []
    for kind, matrices in momentum.items():
        for fraction in FRACTIONS:
            shares = [captured(x, fraction) for x in matrices]
            means = {name: round(statistics.mean(s[name] for s in shares), 3) for name in shares[0]}
            rows.append({"layer": kind, "rank / n": fraction, **means})
    return rows


# --------------------------------------------------------------------------------------- memory


def bytes_rows(width: int) -> list[dict[str, Any]]:
    """Bytes of live buffers for the kernels of a transformer block at rank n / 4."""
    shapes = record.kernels(record.gpt_shapes(width), 1)
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
    size = sum(x.size for x in jax.tree.leaves(params))
    feedback = functools.partial(orthax.dct_adamw, 1e-3, width // 4, error_feedback=True)
    rows = []
    for name, optimizer in {
        "optax.adamw": optax.adamw(1e-3),
        "orthax.dct_adamw": orthax.dct_adamw(1e-3, width // 4),
        "error feedback": feedback(),
        "error feedback, bfloat16": feedback(buffer_dtype=jnp.bfloat16),
        "error feedback, int8": feedback(buffer_dtype="int8"),
        "error feedback, int4": feedback(buffer_dtype="int4"),
        "optax.contrib.galore": optax.contrib.galore(1e-3, rank=width // 4),
        "orthax.muon": orthax.muon(1e-3),
        "orthax.trion": orthax.trion(1e-3, width // 4),
        "orthax.trion, int8": orthax.trion(1e-3, width // 4, mu_dtype="int8"),
    }.items():
        total = record.live_bytes(functools.partial(optimizer.init, params))
        rows.append({"state of": name, "bytes per parameter": round(total / size, 3)})
    for row in rows:
        row["of AdamW's"] = round(row["bytes per parameter"] / rows[0]["bytes per parameter"], 3)
    return rows


# -------------------------------------------------------------------------------------- picture


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Times against size, and energy against rank for the kinds that differ most."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = figure.subplots(2, 4).ravel()
    for name in ("dct", "columns", "subspace", "svd", "galore"):
        rows = [row for row in data["times"] if row["Adam in"] == name]
        axes[0].plot(
            [row["n"] for row in rows],
            [row["new subspace (ms)"] for row in rows],
            "o-",
            color=COLOURS[name],
            label=name,
        )
    axes[0].set(xscale="log", yscale="log", xlabel="n", ylabel="ms", title="Update, new subspace")
    axes[0].set_xticks([*ROUNDS], [str(n) for n in ROUNDS])
    axes[0].minorticks_off()
    axes[0].legend(fontsize="small")
    for kind, ax in zip(DRAWN, axes[1:], strict=True):
        rows = [row for row in data["energy"] if row["layer"] == kind]
        ranks = [row["rank / n"] for row in rows]
        for name in ("svd", "dct", "dct3", "hadamard", "random", "columns"):
            ax.plot(ranks, [row[name] for row in rows], ".-", color=COLOURS[name], label=name)
        ax.plot(ranks, ranks, ":", color="0.5", label="bound")
        ax.set(xscale="log", ylim=(0, 1), xlabel="rank / n", title=f"Energy: {kind}")
        ax.set_xticks(FRACTIONS, [f"1/{round(1 / f)}" for f in FRACTIONS])
        ax.minorticks_off()
    axes[1].legend(fontsize="small")
    for ax in axes:
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print, and write unless it is a smoke test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing written")
    smoke = parser.parse_args().smoke
    rounds = {16: 2} if smoke else ROUNDS
    lengths = [16] if smoke else [64, 128, *ROUNDS]
    transforms = [time_transforms(n, 2 if smoke else 15) for n in lengths]
    print(record.table(transforms), "\n", flush=True)
    times = []
    for n, count in rounds.items():
        measured = time_updates(n, {"new": count, "same": max(9, count)})
        times += [times_row(n, name, measured) for name in measured]
        print(record.table(times[-len(measured) :]), "\n", flush=True)
    momentum = gpt_momentum(2 if smoke else 200, 32 if smoke else 128)
    momentum |= digits_momentum(2 if smoke else 300)
    energy = energy_rows(momentum)
    print(record.table(energy), "\n")
    memory = bytes_rows(32 if smoke else 768)
    print(record.table(memory))
    if not smoke:
        data = {"rounds": rounds, "transforms": transforms, "times": times}
        data |= {"energy": energy, "memory": memory}
        path = record.write("low_rank", data)
        draw(data, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
