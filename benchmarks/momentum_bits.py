"""What does momentum in 8 or 4 bits lose? On the gradients of a GPT that is being trained.

    python benchmarks/momentum_bits.py          # two minutes on two cores
    python benchmarks/momentum_bits.py --smoke  # tiny, in seconds, writes nothing

`examples/gpt.py` is trained for 100 steps with Muon in full precision. Beside it, the momentum of
every kernel is kept from the same gradients in 8 and 4 bits, rounded to the nearest level and
stochastically. Each is compared with the exact momentum: the relative Frobenius distance, and the
cosine between the directions that `polar` makes of both. Then whole trainings of 600 steps with
`mu_dtype="int8"` and without, from three seeds. Prints tables, writes momentum_bits.json.
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import tyro

from orthax.linalg import polar
from orthax.linalg.quantization import dequantize, quantize

sys.path.insert(0, str(record.ROOT / "examples"))
import gpt

WAYS = {
    "8 bits, nearest": (8, False),
    "8 bits, stochastic": (8, True),
    "4 bits, nearest": (4, False),
    "4 bits, stochastic": (4, True),
}
DECAY = 0.95
AT = (1, 10, 30, 100)


def compared(config: Any) -> list[dict[str, Any]]:
    """Rows: one per way and step of AT."""
    config = gpt.settle(config)
    batches = gpt.make_batches(gpt.read_corpus(config.data), config)
    graphdef, state = gpt.init_state(config)
    optimizer = gpt.make_optimizer(config)

    @jax.jit
    def step(state: Any, tokens: Any) -> Any:
        gradients = jax.grad(gpt.loss_of)(state.params, graphdef, tokens)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        kernels = {
            jax.tree_util.keystr(path): g
            for path, g in jax.tree.leaves_with_path(gradients["blocks"])
            if path[-1].key == "kernel"
        }
        return gpt.State(optax.apply_updates(state.params, updates), opt_state), kernels

    @jax.jit
    def after(kept: Any, gradients: Any, count: Any) -> Any:
        """What each way keeps, dequantised, and the exact momentum."""
        result: dict[str, Any] = {
            "exact": jax.tree.map(lambda m, g: g + DECAY * m, kept["exact"], gradients)
        }
        for i, (way, (bits, stochastic)) in enumerate(WAYS.items()):
            key = jax.random.fold_in(jax.random.key(i), count)

            def rounded(
                m: Any, g: Any, key: Any = key, bits: int = bits, s: bool = stochastic
            ) -> Any:
                x = g + DECAY * m
                return dequantize(quantize(x, bits, key if s else None), bits, x.shape[-1])

            result[way] = jax.tree.map(rounded, kept[way], gradients)
        return result

    @jax.jit
    def cosine_and_distance(ours: Any, exact: Any) -> Any:
        def both(x: Any, y: Any) -> Any:
            x, y = _matrix(x), _matrix(y)
            p, q = polar(x, "exact"), polar(y, "exact")
            f, g = polar(x), polar(y)
            off = jnp.linalg.norm(x - y) / jnp.linalg.norm(y)
            return jnp.stack([off, _cosine(f, g), _cosine(p, q)])

        return jnp.stack(jax.tree.leaves(jax.tree.map(both, ours, exact)))

    rows, kept = [], None
    for count in range(1, config.steps + 1):
        state, gradients = step(state, batches[count - 1])
        if kept is None:
            zeros = jax.tree.map(jnp.zeros_like, gradients)
            kept = {way: zeros for way in ("exact", *WAYS)}
        kept = after(kept, gradients, count)
        if count in AT:
            for way in WAYS:
                found = np.asarray(cosine_and_distance(kept[way], kept["exact"]))
                off, fast, exact = found.T
                rows.append(
                    {
                        "momentum": way,
                        "step": count,
                        "distance": f"{off.mean():.4f} ({off.max():.4f})",
                        "cosine, fast": f"{fast.mean():.3f} ({fast.min():.3f})",
                        "cosine, exact": f"{exact.mean():.3f} ({exact.min():.3f})",
                    }
                )
    return rows


def _matrix(kernel: jax.Array) -> jax.Array:
    """Attention's kernels as matrices: the two axes of heads are next to each other."""
    if kernel.ndim == 2:
        return kernel
    features_first = kernel.shape[0] == kernel.shape[1] * kernel.shape[2]
    return (
        kernel.reshape(kernel.shape[0], -1)
        if features_first
        else kernel.reshape(-1, kernel.shape[-1])
    )


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(x * y) / (jnp.linalg.norm(x) * jnp.linalg.norm(y))


def trained(config: Any, seeds: int) -> list[dict[str, Any]]:
    """Rows: the final loss with the momentum in float32 and in 8 bits."""
    rows = []
    for seed in range(seeds):
        losses = {}
        for optimizer in ("muon", "muon_int8"):
            run = dataclasses.replace(config, optimizer=optimizer, seed=seed, progress=False)
            losses[optimizer] = float(gpt.train(run).report_loss[-1])
        difference = losses["muon_int8"] - losses["muon"]
        rows.append({"seed": seed, **{k: round(v, 4) for k, v in losses.items()}})
        rows[-1]["difference"] = round(difference, 4)
    return rows


def main(seeds: int = 3, smoke: bool = False) -> None:
    """Measure and report.

    Args:
      seeds: Trainings of each kind.
      smoke: Tiny models, and no record.
    """
    config = gpt.Config(optimizer="muon", weight_decay=0.1)
    short = dataclasses.replace(config, steps=100, warmup_steps=10)
    if smoke:
        config = dataclasses.replace(config, **gpt.SMOKE)
        short, seeds = dataclasses.replace(config, steps=12), 1
    rows = compared(short)
    print(record.table(rows), end="\n\n")
    losses = trained(config, seeds)
    print(record.table(losses))
    if not smoke:
        record.write("momentum_bits", {"momentum": rows, "training": losses})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
