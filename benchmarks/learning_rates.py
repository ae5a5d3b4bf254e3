"""Which learning rate does Muon want, where AdamW's best one is known? And what RMS of its updates?

    python benchmarks/learning_rates.py          # a quarter of an hour on two cores
    python benchmarks/learning_rates.py --smoke  # tiny, in seconds, writes nothing

Small models on scikit-learn's digits (an MLP, a CNN, a ViT, written below) and the GPT of
examples/gpt.py at two widths, each trained with AdamW and with Muon whose updates have an RMS of
0.2 (the default), 0.4 and 1, at rates a factor 2 apart, the same for all. The best rate is chosen
on one held-out set and its loss reported on another. "at AdamW's" is what a newcomer gets who keeps
the rate that was best for AdamW. Prints a table and writes learning_rates.json.
"""

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import tyro
from sklearn.datasets import load_digits

import orthax

sys.path.insert(0, str(record.ROOT / "examples"))
import gpt

RATES = tuple(5e-4 * 2**i for i in range(9))
OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "muon, RMS 0.2": orthax.muon,
    "muon, RMS 0.4": functools.partial(orthax.muon, shape_scale=orthax.scale_by_adam_rms(0.4)),
    "muon, RMS 1": functools.partial(orthax.muon, shape_scale=orthax.scale_by_adam_rms(1.0)),
}


class Problem(NamedTuple):
    """A model, its loss of a batch, and three sets of examples."""

    params: Any
    loss_of: Callable[[Any, Any], jax.Array]
    train: Any
    select: Any
    report: Any
    steps: int
    batch: int


# --- models on digits


def dense(key: int, rows: int, columns: int) -> dict[str, jax.Array]:
    """A layer's parameters."""
    kernel = jax.random.normal(jax.random.key(key), (rows, columns)) / math.sqrt(rows)
    return {"kernel": kernel, "bias": jnp.zeros(columns)}


def apply(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """X @ W + b."""
    return x @ layer["kernel"] + layer["bias"]


def mlp(width: int = 128) -> tuple[Any, Callable[[Any, jax.Array], jax.Array]]:
    """Two hidden layers."""
    sizes = {"first": (64, width), "second": (width, width), "head": (width, 10)}
    params = {name: dense(i, *shape) for i, (name, shape) in enumerate(sizes.items())}

    def logits(params: Any, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1)
        x = jax.nn.relu(apply(params["first"], x))
        return apply(params["head"], jax.nn.relu(apply(params["second"], x)))

    return params, logits


def cnn(width: int = 32) -> tuple[Any, Callable[[Any, jax.Array], jax.Array]]:
    """Three convolutions, the last two with stride 2, and a mean."""
    params = {"head": dense(9, width, 10)}
    for i, channels in enumerate((1, width, width)):
        layer = dense(i, 9 * channels, width)
        params[f"conv_{i}"] = layer | {"kernel": layer["kernel"].reshape(3, 3, channels, width)}

    def logits(params: Any, images: jax.Array) -> jax.Array:
        x = images[..., None]
        for i in range(3):
            layer, strides = params[f"conv_{i}"], (2, 2) if i else (1, 1)
            x = jax.lax.conv_general_dilated(
                x, layer["kernel"], strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + layer["bias"])
        return apply(params["head"], x.mean(axis=(1, 2)))

    return params, logits


def vit(width: int = 64, blocks: int = 2) -> tuple[Any, Callable[[Any, jax.Array], jax.Array]]:
    """Patches of 2 x 2, attention with four heads."""
    shapes = {name: (width, width) for name in ("query", "key", "value", "out")}
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    params: dict[str, Any] = {
        "patch_embedding": dense(1, 4, width),
        "position_embedding": 0.02 * jax.random.normal(jax.random.key(2), (16, width)),
        "head": dense(3, width, 10),
    }
    for b in range(blocks):
        params[f"block_{b}"] = {n: dense(10 * b + i, *s) for i, (n, s) in enumerate(shapes.items())}

    def normed(x: jax.Array) -> jax.Array:
        return jax.nn.standardize(x, axis=-1)

    def logits(params: Any, images: jax.Array) -> jax.Array:
        patches = images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
        x = apply(params["patch_embedding"], patches) + params["position_embedding"]
        for b in range(blocks):
            p, y = params[f"block_{b}"], normed(x)
            q, k, v = (
                apply(p[n], y).reshape(*y.shape[:2], 4, -1) for n in ("query", "key", "value")
            )
            attended = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
            x = x + apply(p["out"], attended)
            x = x + apply(p["down"], jax.nn.gelu(apply(p["up"], normed(x))))
        return apply(params["head"], normed(x).mean(axis=1))

    return params, logits


def on_digits(model: tuple[Any, Callable[[Any, jax.Array], jax.Array]], steps: int) -> Problem:
    """1797 images of 8 x 8: 1100 to train on, 300 to choose by, the rest to report."""
    params, logits = model
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = np.float32(images[order] / 16 - 0.3).reshape(-1, 8, 8)
    labels = labels[order].astype(np.int32)

    def loss_of(params: Any, batch: Any) -> jax.Array:
        found = logits(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(found, batch[1]).mean()

    cuts = (slice(0, 1100), slice(1100, 1400), slice(1400, None))
    train, select, report = ((images[cut], labels[cut]) for cut in cuts)
    return Problem(params, loss_of, train, select, report, steps, 64)


def on_text(width: int, steps: int) -> Problem:
    """The GPT of the examples, in batches of 16 windows of 128 bytes."""
    config = gpt.settle(gpt.Config(width=width, optimizer="adamw"))
    corpus = gpt.read_corpus(None)
    windows = gpt.Windows(corpus.train, config.context)
    chosen = np.random.default_rng(0).permutation(len(windows))[: 16 * steps]
    graphdef, state = gpt.init_state(config)
    held_out = [gpt.held_out_windows(text, config) for text in (corpus.select, corpus.report)]

    def loss_of(params: Any, batch: Any) -> jax.Array:
        return gpt.loss_of(params, graphdef, batch[0])

    train = (np.stack([windows[i] for i in chosen]),)
    return Problem(state.params, loss_of, train, (held_out[0],), (held_out[1],), steps, 16)


# --- training


def trained(problem: Problem, make: Callable[[Any], optax.GradientTransformation]) -> Any:
    """A compiled function from a rate to the losses on both held-out sets."""
    generator = np.random.default_rng(1)
    count = len(problem.train[0])
    epochs = -(-problem.steps * problem.batch // count)
    order = np.concatenate([generator.permutation(count) for _ in range(epochs)])
    order = order[: problem.steps * problem.batch].reshape(problem.steps, problem.batch)

    @jax.jit
    def losses(rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        warmup = problem.steps // 20 + 1
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, problem.steps)
        optimizer = make(lambda count: rate * shape(count + 1))

        def step(carry: Any, rows: jax.Array) -> Any:
            params, state = carry
            batch = tuple(jnp.asarray(x)[rows] for x in problem.train)
            g = jax.grad(problem.loss_of)(params, batch)
            updates, state = optimizer.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = (problem.params, optimizer.init(problem.params))
        (params, _), _ = jax.lax.scan(step, start, jnp.asarray(order))
        return problem.loss_of(params, problem.select), problem.loss_of(params, problem.report)

    return losses


def rows_of(
    title: str, problem: Problem, rates: tuple[float, ...], names: list[str]
) -> list[dict[str, Any]]:
    """One row per optimizer."""
    found: dict[str, Any] = {}
    for name in names:
        losses = trained(problem, OPTIMIZERS[name])
        found[name] = np.array([[float(x) for x in losses(jnp.float32(r))] for r in rates])
        print(f"  {title}, {name}: {np.round(found[name][:, 0], 4).tolist()}", flush=True)
    best = {name: int(np.nanargmin(table[:, 0])) for name, table in found.items()}
    adamw = best["adamw"]
    return [
        {
            "model": title,
            "optimizer": name,
            "best rate": f"{rates[best[name]]:.2g}",
            "of AdamW's": round(rates[best[name]] / rates[adamw], 3),
            "inside the grid": 0 < best[name] < len(rates) - 1,
            "loss": round(float(table[best[name], 1]), 4),
            "at AdamW's": round(float(table[adamw, 1]), 4),
            "at 4 times": round(float(table[min(adamw + 2, len(rates) - 1), 1]), 4),
        }
        for name, table in found.items()
    ]


def main(smoke: bool = False) -> None:
    """Measure and report.

    Args:
      smoke: Few steps and rates, and no record.
    """
    steps, text_steps = (4, 2) if smoke else (400, 300)
    problems: dict[str, Callable[[], Problem]] = {
        "MLP": lambda: on_digits(mlp(16 if smoke else 128), steps),
        "CNN": lambda: on_digits(cnn(8 if smoke else 32), steps),
        "ViT": lambda: on_digits(vit(16 if smoke else 64), steps),
        "GPT, width 64": lambda: on_text(32 if smoke else 64, text_steps),
        "GPT, width 128": lambda: on_text(32 if smoke else 128, text_steps),
    }
    rates = RATES[3:5] if smoke else RATES
    rows = []
    for title, problem in list(problems.items())[: 4 if smoke else None]:
        rows += rows_of(title, problem(), rates, list(OPTIMIZERS)[: 2 if smoke else None])
    print(record.table(rows))
    if not smoke:
        settings = {"rates": rates, "steps": steps, "steps on text": text_steps}
        record.write("learning_rates", {**settings, "rows": rows})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
