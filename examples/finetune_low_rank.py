"""Fine-tune a small GPT with fewer moments: AdamW beside DCT-AdamW and Trion at several ranks.

The GPT of gpt.py is trained on Python's standard library, then on English: the language reference
that ships with Python (`pydoc_data`). Every optimizer starts from the same parameters and is shown
at its own best learning rate.

    python examples/finetune_low_rank.py            # table and picture; ten minutes on two cores
    python examples/finetune_low_rank.py --smoke    # everything once, in seconds
    python examples/finetune_low_rank.py --folder tuned --ranks 16    # keeps all checkpoints there

Runs are kept as checkpoints with their settings, rank, basis and ranking among them: started again
with the same folder, the script goes on where it stopped, and refuses those of other settings.
"""

import dataclasses
import itertools
import json
import sys
import tempfile
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

import gpt
import tyro
from gpt_compare import best_rate, markdown, measure_step_seconds, rates_to_add
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from record import live_bytes, origin  # noqa: E402

# ------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare, and how long to train."""

    ranks: tuple[int, ...] = (8, 32, 64)
    """Of the two low-rank optimizers; the kernels' shorter side is `width`."""
    basis: str = "dct"
    """Of the projection: dct, dct3, random, hadamard, columns, svd, subspace."""
    ranking: str = "l2"
    """Norm by which its columns are chosen, l1 or l2."""
    width: int = gpt.Config.width
    """Features of the residual stream."""
    pretrain_steps: int = 600
    """Updates on Python's standard library, with Muon."""
    steps: int = 150
    """Updates on the language reference, with each optimizer."""
    rates: int = 3
    """Learning rates per optimizer, a factor 2 apart around START_RATES..."""
    more_rates: int = 4
    """... and at most so many more, as long as the best one lies at an end of them."""
    timing_rounds: int = 40
    """Steps of each optimizer timed, in turn."""
    folder: Path | None = None
    """Folder for checkpoints, kept. None: a temporary one."""
    output: Path | None = None
    """Folder for low_rank_finetuning.json and .png. None: benchmarks/results."""
    progress: bool = True
    """Show progress bars."""
    smoke: bool = False
    """Tiny sizes; results go to a temporary folder unless --output names one."""


SMOKE = {
    "ranks": (8,),
    "width": 32,
    "pretrain_steps": 6,
    "steps": 6,
    "rates": 1,
    "more_rates": 0,
    "timing_rounds": 3,
}

PLACES = ("folder", "output")  # options that say where files are

# Middle of the first grid of each optimizer.
START_RATES = {"adamw": 1e-3, "dct_adamw": 2e-3, "trion": 4e-3}


class Tuned(NamedTuple):
    """One optimizer at one rank."""

    optimizer: str
    rank: int | None  # None: all of it
    learning_rate: float  # best on `select`
    select_by_rate: dict[float, float]
    report: list[float]  # held-out loss at each evaluation, nats per byte
    eval_steps: list[int]
    config: Any  # gpt.Config of the best run
    matrix_state_bytes: int  # of live buffers, for the kernels of the blocks
    state_bytes: int  # for all parameters

    @property
    def label(self) -> str:
        """Name in tables and pictures."""
        return self.optimizer if self.rank is None else f"{self.optimizer}, rank {self.rank}"


# --------------------------------------------------------------------------------------- corpus


def write_language_reference(folder: Path) -> Path:
    """The topics of Python's own help as one text file."""
    path = folder / "language_reference.txt"
    path.write_text("\n".join(topics.topics[name] for name in sorted(topics.topics)))
    return path


# ----------------------------------------------------------------------------------------- runs


def config_of(options: Options, text: Path, start: Path, **settings: Any) -> gpt.Config:
    """Settings of one fine-tuning run."""
    config = gpt.Config(
        data=text,
        start_from=start,
        width=options.width,
        steps=options.steps,
        warmup_steps=min(10, options.steps // 2),
        eval_windows=64,  # the corpus is small
        basis=options.basis,
        ranking=options.ranking,
        progress=options.progress,
    )
    if options.smoke:
        config = dataclasses.replace(config, **gpt.SMOKE | {"steps": options.steps})
    return dataclasses.replace(config, **settings)


def live_bytes_of_state(config: gpt.Config, *, only_blocks: bool) -> int:
    """Bytes that come to life on the device when the optimizer's state is made."""
    _, state = gpt.init_state(gpt.settle(config))
    params = {"blocks": state.params["blocks"]} if only_blocks else state.params
    optimizer = gpt.make_optimizer(config)
    return live_bytes(lambda: optimizer.init(params))


def tune(
    options: Options, text: Path, start: Path, folder: Path, optimizer: str, rank: Any
) -> Tuned:
    """Train at several learning rates until the best one lies inside the grid."""
    name = optimizer if rank is None else f"{optimizer}_{rank}"
    results: dict[float, gpt.Result] = {}

    def run(rate: float) -> None:
        settings = {"optimizer": optimizer, "learning_rate": rate}
        settings |= {"checkpoint_dir": folder / f"{name}_{rate:g}"}
        settings |= {} if rank is None else {"rank": rank}
        results[rate] = gpt.train(config_of(options, text, start, **settings))

    def losses() -> dict[float, float]:
        return {rate: float(results[rate].select_loss[-1]) for rate in sorted(results)}

    for i in range(options.rates):
        run(START_RATES[optimizer] * 2.0 ** (i - options.rates // 2))
    most = options.rates + options.more_rates
    while added := rates_to_add(losses(), most - len(results)):
        run(added[0])
    best = best_rate(losses())
    result = results[best]
    return Tuned(
        optimizer,
        rank,
        best,
        losses(),
        result.report_loss.tolist(),
        result.eval_steps.tolist(),
        result.config,
        live_bytes_of_state(result.config, only_blocks=True),
        live_bytes_of_state(result.config, only_blocks=False),
    )


# -------------------------------------------------------------------------------------- results


def format_table(lines: list[Tuned], step_seconds: dict[str, float]) -> str:
    """A Markdown table, aligned to be read as it is."""
    adamw = lines[0]
    rows = [
        [
            "optimizer",
            "learning rate",
            "final loss",
            "state of the kernels",
            "of AdamW's",
            "whole state",
            "ms per step",
        ]
    ]
    for line in lines:
        share = line.matrix_state_bytes / adamw.matrix_state_bytes
        rows.append(
            [
                line.label,
                f"{line.learning_rate:g}",
                f"{line.report[-1]:.3f}",
                f"{line.matrix_state_bytes / 1e6:.2f} MB",
                f"{share:.2f}",
                f"{line.state_bytes / 1e6:.2f} MB",
                f"{1e3 * step_seconds[line.label]:.0f}",
            ]
        )
    return markdown(rows)


COLOURS = {"adamw": "#000000", "dct_adamw": "#0072B2", "trion": "#D55E00"}
DASHES = ("-", "--", "-.", ":")


def draw(lines: list[Tuned], options: Options, path: Path) -> None:
    """Losses against steps, and final losses against memory."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    ranks = [None, *options.ranks]
    markers = dict(zip(START_RATES, "sov", strict=True))
    for line in lines:
        colour, dash = COLOURS[line.optimizer], DASHES[ranks.index(line.rank) % len(DASHES)]
        left.plot(line.eval_steps, line.report, dash, color=colour, label=line.label)
        megabytes = line.matrix_state_bytes / 1e6
        right.plot(megabytes, line.report[-1], markers[line.optimizer], color=colour)
        right.annotate(
            line.label, (megabytes, line.report[-1]), (6, 4), textcoords="offset points", size=8
        )
    left.set(title="Loss against steps", xlabel="steps", ylabel="held-out loss (nats per byte)")
    left.legend(fontsize="small")
    right.set(
        title="Final loss against memory",
        xlabel="optimizer state of the kernels (MB)",
        ylabel="held-out loss (nats per byte)",
    )
    right.margins(x=0.25, y=0.1)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"Byte-level GPT, width {options.width}, trained on Python code, fine-tuned on English "
        f"for {options.steps} steps"
    )
    figure.savefig(path, dpi=150)


# --------------------------------------------------------------------------------------- script


def main(options: Options) -> list[Tuned]:
    """Pre-train, fine-tune with every optimizer, print the table and write data and picture."""
    if options.smoke:
        options = dataclasses.replace(options, **SMOKE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        usual = Path(temporary) if options.smoke else ROOT / "benchmarks" / "results"
        output = options.output or usual
        output.mkdir(parents=True, exist_ok=True)

        text, start = write_language_reference(folder), folder / "pretrained"
        pretraining = gpt.Config(checkpoint_dir=start, progress=options.progress)
        sizes = {"width": options.width, "steps": options.pretrain_steps}
        if options.smoke:
            sizes = gpt.SMOKE | sizes
        gpt.train(dataclasses.replace(pretraining, **sizes))

        variants = [("adamw", None), *itertools.product(("dct_adamw", "trion"), options.ranks)]
        lines = [tune(options, text, start, folder, *variant) for variant in variants]
        draw(lines, options, output / "low_rank_finetuning.png")
        timed = {line.label: line.config for line in lines}
        step_seconds = measure_step_seconds(timed, options.timing_rounds)
        settings = dataclasses.asdict(options)
        record = {**origin(), "options": {k: v for k, v in settings.items() if k not in PLACES}}
        record |= {"step_seconds": step_seconds}
        record |= {"runs": [line._replace(config=None)._asdict() for line in lines]}
        path = output / "low_rank_finetuning.json"
        path.write_text(json.dumps(record, indent=1, default=str) + "\n")
        print(format_table(lines, step_seconds))
        print(f"\nLoss: nats per byte of held-out English. Data: {path}")
    return lines


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
