"""Which Newton-Schulz table? Accuracy on really trained momentum, and losses of training with it.

    python benchmarks/coefficients.py              # the spectra: seconds
    python benchmarks/coefficients.py --train-too  # and the GPT example with three of the tables

benchmarks/data/real_spectra.npz holds singular values of momentum matrices of byte-level GPTs, of
width 256 at steps 20 and 200 and of width 768 at steps 10 and 60. Most of them lie below 1e-2 of
the Frobenius norm, where a Gaussian matrix has few: a table is judged on these. Training follows
the protocol of examples/gpt_compare.py --full: a sweep of learning rates chosen on one held-out
part, three seeds at the best rate, losses on another part. Prints tables, writes coefficients.json
and coefficients.png to benchmarks/results.
"""

import dataclasses
import json
import sys
from typing import Any

import numpy as np
import record
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orthax.linalg import coefficients

sys.path.append(str(record.ROOT / "examples"))

TABLES = {
    "MUON, 5 steps": coefficients.MUON,
    "DION, 5 steps": coefficients.DION,
    "CANS, 5 steps": coefficients.CANS,
    "POLAR_EXPRESS, 5 steps": coefficients.POLAR_EXPRESS,
    "minimax(8, 1e-4)": coefficients.minimax(8, 1e-4),
}
TRAINED = {  # name in OPTIMIZERS of examples/gpt.py: table
    "muon_original_table": "MUON, 5 steps",
    "muon": "POLAR_EXPRESS, 5 steps",
    "muon_eight_steps": "minimax(8, 1e-4)",
}
COLOURS = dict(
    zip(TABLES, ("#000000", "#E69F00", "#56B4E9", "#0072B2", "#009E73"), strict=True)
)  # Okabe and Ito
SPECTRA = {
    "width 256, step 20": "mom256|step20|",
    "width 256, step 200": "mom256|step200|",
    "width 768, step 10": "mom768|step10|",
    "width 768, step 60": "mom768|step60|",
}


def load_spectra() -> dict[str, list[np.ndarray]]:
    """Singular values relative to the Frobenius norm, by kind of matrix."""
    stored = np.load(record.ROOT / "benchmarks" / "data" / "real_spectra.npz")
    spectra = {
        title: [stored[key] for key in stored.files if key.startswith(prefix)]
        for title, prefix in SPECTRA.items()
    }
    gaussian = np.random.default_rng(0).standard_normal((768, 768))
    spectra["Gaussian, 768 x 768"] = [np.linalg.svd(gaussian, compute_uv=False)]
    return {
        title: [values / np.linalg.norm(values) for values in group]
        for title, group in spectra.items()
    }


def distance(table: coefficients.Table, values: np.ndarray) -> float:
    """Relative Frobenius distance between the result and the exact polar factor."""
    return float(np.sqrt(np.mean((coefficients.scalar_map(table, values) - 1) ** 2)))


def measure_accuracy() -> list[dict[str, Any]]:
    """One row per table: distance per kind of spectrum, and the range of singular values."""
    spectra, everywhere = load_spectra(), np.linspace(0, 1, 100_001)
    rows = []
    for name, table in TABLES.items():
        distances = {
            title: round(float(np.mean([distance(table, values) for values in group])), 3)
            for title, group in spectra.items()
        }
        from_1e3 = coefficients.scalar_map(table, np.geomspace(1e-3, 1, 10_001))
        peak = coefficients.scalar_map(table, everywhere).max()
        rows.append(
            {
                "table": name,
                "slope at 0": round(float(np.prod([row[0] for row in table]))),
                "least from 1e-3": round(float(from_1e3.min()), 3),
                "most": round(float(peak), 3),
                **distances,
            }
        )
    return rows


def train(smoke: bool) -> dict[str, dict[str, Any]]:
    """Sweeps and seeds on the GPT example; finished runs are taken from the comparison's cache."""
    import gpt_compare

    options = gpt_compare.Options(optimizers=tuple(TRAINED), full=True, smoke=smoke)
    if smoke:
        options = dataclasses.replace(options, **gpt_compare.SMOKE)
    cache = gpt_compare.RunCache(record.RESULTS / ".compare_cache", reuse_any_code=True)
    results = {}
    with gpt_compare.Runner(options, cache) as runner:
        for name, grid in gpt_compare.sweep(options, runner).items():
            losses = gpt_compare.final_select_loss(grid)
            best = gpt_compare.best_rate(losses)
            runs = runner.run(
                [
                    gpt_compare.run_settings(options, name, best, seed)
                    for seed in range(options.seeds)
                ],
                name,
            )
            results[TRAINED[name]] = {
                "learning_rate": best,
                "select_loss_by_learning_rate": losses,
                "final_report_loss": [curve.report[-1] for curve in runs],
            }
    return results


def draw_accuracy(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Grouped bars: distance of each table on each kind of spectrum."""
    titles = [*SPECTRA, "Gaussian, 768 x 768"]
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        at = np.arange(len(titles)) + (index - (len(rows) - 1) / 2) * width
        heights = [row[title] for title in titles]
        axes.bar(at, heights, width, label=row["table"], color=COLOURS[row["table"]])
    axes.set_xticks(range(len(titles)), [title.replace(", ", "\n") for title in titles])
    axes.set(title="Distance to the exact polar factor", ylabel="relative Frobenius distance")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)


def draw_training(axes: Axes, training: dict[str, dict[str, Any]]) -> None:
    """Loss against learning rate for the trained tables; crosses are seeds at the best rate."""
    for name, result in training.items():
        by_rate = result["select_loss_by_learning_rate"]
        losses = {float(rate): loss for rate, loss in by_rate.items()}
        rates = sorted(losses)
        axes.plot(rates, [losses[r] for r in rates], "o-", color=COLOURS[name], label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set(title="Training a GPT with it", xlabel="learning rate", ylabel="final held-out loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def main(train_too: bool = False, smoke: bool = False) -> None:
    """Measure and report.

    Args:
      train_too: Train the GPT example as well; without it the stored losses are kept.
      smoke: Write nothing.
    """
    rows = measure_accuracy()
    print(record.table(rows))
    path = record.RESULTS / "coefficients.json"
    stored = json.loads(path.read_text())["training"] if path.exists() else {}
    training = train(smoke) if train_too else stored
    if training:
        print()
        print(record.table([training_row(name, result) for name, result in training.items()]))
    if smoke:
        return
    record.write("coefficients", {"accuracy": rows, "training": training})
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_accuracy(left, rows)
    if training:
        draw_training(right, training)
    figure.savefig(record.RESULTS / "coefficients.png", dpi=150)


def training_row(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """One line of the second table."""
    losses = np.array(result["final_report_loss"])
    return {
        "table": name,
        "best learning rate": result["learning_rate"],
        "final loss, mean": round(float(losses.mean()), 4),
        "standard deviation": round(float(losses.std(ddof=1)), 4),
        "seeds": len(losses),
    }


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
