"""Compare optimizers on the byte-level GPT of gpt.py: loss against steps and against seconds.

    python examples/gpt_compare.py            # one run each at the stored rates; comparison.png
    python examples/gpt_compare.py --full     # sweeps and three seeds; half an hour on two cores
    python examples/gpt_compare.py --smoke    # or --full --smoke: tiny sizes, seconds

The full comparison chooses each learning rate on the `select` files and reports losses on the
`report` files. It may be stopped and started again: every finished run is kept in a cache.
To compare one optimizer more, add a line to OPTIMIZERS in gpt.py and name it in --optimizers.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import multiprocessing.queues
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpt
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import orthax

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from record import device_name, git_commit, versions  # noqa: E402

# ------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare, and how."""

    optimizers: tuple[str, ...] = ("adamw", "muon", "normuon")
    """Names in OPTIMIZERS of gpt.py. The first is the baseline."""
    steps: int = 600
    """Updates per run."""
    width: int = gpt.Config.width
    """Features of the residual stream."""
    outliers: float = 0.0
    """Share of the gradient's entries that get heavy noise."""
    data: Path | None = None
    """Text file, or folder of text files. None: Python's standard library."""
    output: Path | None = None
    """Folder for the results. None: the current one; with --full benchmarks/results."""
    progress: bool = True
    """Show progress bars."""
    smoke: bool = False
    """Tiny sizes; results go to a temporary folder unless --output names one."""

    full: bool = False
    """Sweep the learning rates and repeat over seeds, instead of one run at the stored rate."""
    name: str = "compare"
    """[full] Of the files with the results."""
    rates: int = 5
    """[full] Learning rates per optimizer, a factor 2 apart around the stored one."""
    more_rates: int = 8
    """[full] At most so many more, as long as the best rate lies at an end of the grid."""
    seeds: int = 3
    """[full] Runs at the best rate."""
    jobs: int | None = None
    """[full] Runs at a time, each on one core whatever their number, so that losses do not
    depend on it. None: as many as cores. Give 1 on an accelerator."""
    timing_rounds: int = 40
    """[full] Steps of each optimizer timed, in turn."""
    reuse_any_code: bool = False
    """[full] Take cached runs that were made by another version of the code, too."""


SMOKE = {"rates": 2, "more_rates": 0, "seeds": 2, "timing_rounds": 4}

RATE_WITHOUT_STORED_ONE = 4e-3  # where the grid of an optimizer without a stored rate is centred


def run_settings(options: Options, optimizer: str, rate: float | None, seed: int) -> gpt.Config:
    """Settings of one run; everything but optimizer, rate and seed is the same for all."""
    config = gpt.Config(
        data=options.data,
        optimizer=optimizer,
        learning_rate=rate,
        seed=seed,
        steps=options.steps,
        width=options.width,
        outliers=options.outliers,
        progress=options.progress and not options.full,
    )
    return gpt.settle(dataclasses.replace(config, **gpt.SMOKE) if options.smoke else config)


# --------------------------------------------------------------------------------------- curves


class Curve(NamedTuple):
    """Held-out losses of one run, in nats per byte."""

    optimizer: str
    learning_rate: float
    seed: int
    steps: list[int]  # updates before each evaluation
    seconds: list[float]  # of training before each evaluation
    select: list[float]
    report: list[float]


def train_curve(config: gpt.Config) -> Curve:
    """Train, and keep the evaluations."""
    result = gpt.train(config)
    curves = (result.eval_steps, result.eval_seconds, result.select_loss, result.report_loss)
    return Curve(
        config.optimizer, gpt.peak_rate(config), config.seed, *(curve.tolist() for curve in curves)
    )


def steps_to_loss(steps: Sequence[float], losses: Sequence[float], target: float) -> float:
    """Where a loss curve first comes down to a target.

    Args:
        steps: Increasing.
        losses: One per step.
        target: The loss to reach.

    Returns:
        The step, by linear interpolation between the two evaluations around the first crossing;
        infinity if the curve stays above the target.
    """
    for index, loss in enumerate(losses):
        if loss <= target:
            if index == 0:
                return float(steps[0])
            before, after = losses[index - 1], loss
            share = (before - target) / (before - after)
            return float(steps[index - 1] + share * (steps[index] - steps[index - 1]))
    return float("inf")


class Standing(NamedTuple):
    """One line of the table; arrays have one entry per seed."""

    optimizer: str
    learning_rate: float
    final_loss: np.ndarray
    steps: np.ndarray  # to the baseline's final loss; inf: never
    seconds: np.ndarray


def standings(runs: dict[str, list[Curve]]) -> list[Standing]:
    """How fast each optimizer comes to the mean final loss of the first, the baseline."""
    baseline = next(iter(runs))
    target = float(np.mean([curve.report[-1] for curve in runs[baseline]]))
    lines = []
    for name, curves in runs.items():
        if name == baseline:  # all its steps, by definition: single seeds end above or below
            steps = np.array([float(curve.steps[-1]) for curve in curves])
        else:
            steps = np.array([steps_to_loss(c.steps, c.report, target) for c in curves])
        seconds = [
            np.interp(step, curve.steps, curve.seconds) if np.isfinite(step) else np.inf
            for step, curve in zip(steps, curves, strict=True)
        ]
        final_loss = np.array([curve.report[-1] for curve in curves])
        lines.append(Standing(name, curves[0].learning_rate, final_loss, steps, np.array(seconds)))
    return lines


def spread(values: np.ndarray, digits: int) -> str:
    """Mean, and with several values their sample standard deviation."""
    if not np.isfinite(values).all():
        missing = int((~np.isfinite(values)).sum())
        return "never" if missing == len(values) else f"never in {missing} of {len(values)}"
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def markdown(rows: list[list[str]]) -> str:
    """Rows, the first of titles, as a Markdown table that is aligned to be read as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in lines
    )


def format_table(lines: list[Standing]) -> str:
    """A Markdown table, aligned to be read as it is."""
    baseline = lines[0]
    rows = [
        [
            "optimizer",
            "learning rate",
            "final loss",
            f"steps to {baseline.optimizer}'s loss",
            "ratio",
            f"seconds to {baseline.optimizer}'s loss",
            "ratio",
        ]
    ]
    for line in lines:
        row = [line.optimizer, f"{line.learning_rate:g}", spread(line.final_loss, 3)]
        for values, reference in ((line.steps, baseline.steps), (line.seconds, baseline.seconds)):
            ratio = values.mean() / reference.mean()
            row += [spread(values, 0), f"{ratio:.2f}" if np.isfinite(ratio) else "-"]
        rows.append(row)
    return markdown(rows)


# ------------------------------------------------------------------------------------- pictures

# Okabe and Ito's colours, told apart with every kind of colour vision, and dashes as well.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, dash and label of each optimizer's lines."""
    return {
        name: {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": DASHES[index % len(DASHES)],
            "linewidth": 1.8,
            "label": name,
        }
        for index, name in enumerate(names)
    }


def draw_losses(axes: Axes, runs: dict[str, list[Curve]], against: str) -> None:
    """Held-out loss against `steps` or `seconds`: mean over seeds, and their range as a band."""
    lines = {line.optimizer: line for line in standings(runs)}
    target = next(iter(lines.values())).final_loss.mean()
    lowest = target
    for name, style in styles(runs).items():
        x = np.mean([getattr(curve, against) for curve in runs[name]], axis=0)
        losses = np.array([curve.report for curve in runs[name]])
        axes.plot(x, losses.mean(axis=0), **style)
        axes.fill_between(
            x, losses.min(axis=0), losses.max(axis=0), color=style["color"], alpha=0.2, linewidth=0
        )
        reached = getattr(lines[name], against)
        if np.isfinite(reached).all():
            axes.plot(reached.mean(), target, "o", color=style["color"], markersize=6)
        lowest = min(lowest, losses.min())
    axes.axhline(target, color="0.6", linewidth=0.8, zorder=0)
    axes.set_ylim(0.97 * lowest, 2 * lowest)  # leaves out the first steps from chance level
    axes.set_ylabel("held-out loss (nats per byte)")
    axes.grid(alpha=0.3)
    title = f"dot: reaches {next(iter(runs))}'s final loss"
    axes.legend(title=title, title_fontsize="small", fontsize="small", loc="upper right")


def draw_sweep(axes: Axes, grids: dict[str, dict[float, float]], best: dict[str, float]) -> None:
    """Final loss on `select` against the learning rate; a ring marks the rate chosen."""
    for name, style in styles(grids).items():
        rates = sorted(grids[name])
        losses = [grids[name][rate] for rate in rates]
        axes.plot(rates, losses, marker=".", markersize=8, **style)
        axes.plot(
            best[name],
            grids[name][best[name]],
            "o",
            color=style["color"],
            mfc="none",
            markersize=12,
        )
    finite = [loss for grid in grids.values() for loss in grid.values() if np.isfinite(loss)]
    axes.set_ylim(0.97 * min(finite), min(1.03 * max(finite), 2 * min(finite)))
    rates = sorted({rate for grid in grids.values() for rate in grid})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45)
    axes.minorticks_off()
    axes.set(title="Learning rate (ring: chosen)", xlabel="peak learning rate")
    axes.set_ylabel("final loss on `select` (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()


# ----------------------------------------------------------------------------- one run of each


def demo(options: Options, folder: Path) -> str:
    """Train each optimizer once, one after the other; write `comparison.png`."""
    runs = {
        name: [train_curve(run_settings(options, name, None, seed=0))]
        for name in options.optimizers
    }
    config = run_settings(options, options.optimizers[0], None, seed=0)

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_losses(left, runs, "steps")
    left.set(title="Loss against steps", xlabel="steps")
    draw_losses(right, runs, "seconds")
    right.set(title="Loss against time", xlabel="seconds of training")
    figure.suptitle(heading(config))
    picture = folder / "comparison.png"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)

    return (
        f"{format_table(standings(runs))}\n\n{heading(config)}, one seed. Loss: nats per byte on "
        f"files held out from training.\n{CROSSING.format(every=config.eval_every)}\n"
        f"Seconds: measured in these runs, training steps only.\nPicture: {picture}"
    )


CROSSING = "Steps to a loss: first crossing, linear between evaluations every {every} steps."


def heading(config: gpt.Config) -> str:
    """What was trained, in one line."""
    noise = f", outliers in {config.outliers:g} of the gradient" if config.outliers else ""
    return (
        f"Byte-level GPT, width {config.width}, {config.layers} layers, {config.steps} steps of "
        f"{config.batch * config.context} bytes{noise}"
    )


# -------------------------------------------------------------------------- the full comparison


class RunCache:
    """Finished runs, one JSON line each, found again by settings, corpus, packages and code."""

    def __init__(self, folder: Path, reuse_any_code: bool = False):
        """Read the runs of earlier comparisons."""
        self._path = folder / "runs.jsonl"
        self._ignored = {"code"} if reuse_any_code else set()
        self._runs: dict[str, Curve] = {}
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # cut off when the comparison was killed
                    continue
                self._runs[self._key(entry["made_by"])] = Curve(**entry["curve"])

    def _key(self, made_by: dict[str, Any]) -> str:
        return json.dumps({k: v for k, v in made_by.items() if k not in self._ignored})

    def get(self, made_by: dict[str, Any]) -> Curve | None:
        """The run made by these settings, if there is one."""
        return self._runs.get(self._key(made_by))

    def __getitem__(self, made_by: dict[str, Any]) -> Curve:
        """The run made by these settings, which must be there."""
        return self._runs[self._key(made_by)]

    def add(self, made_by: dict[str, Any], curve: Curve) -> None:
        """Keep a run, on disk at once."""
        self._runs[self._key(made_by)] = curve
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            # Starts on a line of its own even if the last one was cut off.
            file.write("\n" + json.dumps({"made_by": made_by, "curve": curve._asdict()}))
            file.flush()
            os.fsync(file.fileno())


def code_digest() -> str:
    """Changes with every edit of orthax or of gpt.py."""
    package = Path(orthax.__file__).parent
    digest = hashlib.sha256()
    for path in [*sorted(package.rglob("*.py")), Path(gpt.__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def usable_cores() -> list[int]:
    """Numbers of the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def pin_to_core(cores: multiprocessing.queues.SimpleQueue) -> None:
    """Give this worker process one core of its own, before JAX counts the cores it may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})


class Runner:
    """Trains many runs, several at a time, and remembers those that are finished."""

    def __init__(self, options: Options, cache: RunCache):
        """Start the worker processes."""
        self._cache, self._progress = cache, options.progress
        self._provenance = {
            "corpus": gpt.read_corpus(options.data).digest,
            "versions": versions(),
            "code": code_digest(),
        }
        cores = usable_cores()
        jobs = options.jobs or len(cores)
        context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
        queue = context.SimpleQueue()
        for worker in range(jobs):
            queue.put(cores[worker % len(cores)])
        self._pool = concurrent.futures.ProcessPoolExecutor(
            jobs, mp_context=context, initializer=pin_to_core, initargs=(queue,)
        )

    def __enter__(self) -> "Runner":
        """Nothing more to start."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop the runs that wait, and let those under way end."""
        self._pool.shutdown(cancel_futures=True)

    def run(self, configs: Sequence[gpt.Config], title: str) -> list[Curve]:
        """The curves of all these runs, in order; only those not in the cache are trained."""
        made_by = [
            {"settings": gpt.settings_that_matter(config), **self._provenance} for config in configs
        ]
        waiting = {
            self._pool.submit(train_curve, config): key
            for config, key in zip(configs, made_by, strict=True)
            if self._cache.get(key) is None
        }
        finished = concurrent.futures.as_completed(waiting)
        bar = tqdm(finished, title, len(waiting), unit="run", disable=not self._progress)
        for future in bar:
            curve = future.result()
            self._cache.add(waiting[future], curve)
            bar.set_postfix_str(
                f"{curve.optimizer} {curve.learning_rate:g}: {curve.select[-1]:.3f}"
            )
        return [self._cache[key] for key in made_by]


def rates_to_add(grid: dict[float, float], room: int) -> list[float]:
    """The rate beyond the end of a grid at which its lowest loss lies; none if it lies inside.

    Args:
        grid: Final loss of each learning rate. A run that diverged counts as infinitely bad.
        room: How many rates may be added.

    Returns:
        The next rate, or nothing.
    """
    rates = sorted(grid)
    best = best_rate(grid)
    if room <= 0:
        return []
    if best == rates[-1]:
        return [2 * best]
    return [best / 2] if best == rates[0] else []


def best_rate(grid: dict[float, float]) -> float:
    """The learning rate with the lowest finite loss, the smallest if there is none."""
    return min(sorted(grid), key=lambda rate: grid[rate] if np.isfinite(grid[rate]) else np.inf)


def sweep(options: Options, runner: Runner) -> dict[str, dict[float, Curve]]:
    """Runs by optimizer and learning rate; each grid grows until its best rate is inside."""
    wanted: dict[str, list[float]] = {}
    for name in options.optimizers:
        centre = gpt.LEARNING_RATES.get(name, RATE_WITHOUT_STORED_ONE)
        first = -((options.rates - 1) // 2)
        wanted[name] = [centre * 2.0 ** (first + index) for index in range(options.rates)]
    grids: dict[str, dict[float, Curve]] = {name: {} for name in options.optimizers}
    while any(wanted.values()):
        pairs = [(name, rate) for name, rates in wanted.items() for rate in rates]
        curves = runner.run([run_settings(options, *pair, seed=0) for pair in pairs], "sweep")
        for (name, rate), curve in zip(pairs, curves, strict=True):
            grids[name][rate] = curve
        for name, grid in grids.items():
            room = options.rates + options.more_rates - len(grid)
            wanted[name] = rates_to_add(final_select_loss(grid), room)
    return grids


def final_select_loss(grid: dict[float, Curve]) -> dict[float, float]:
    """What learning rates are chosen by."""
    return {rate: grid[rate].select[-1] for rate in sorted(grid)}


def measure_step_seconds(configs: dict[str, gpt.Config], rounds: int) -> dict[str, float]:
    """Median time of a training step of each run, the runs taking turns.

    Whatever else the machine does slows all of them alike.
    """
    first = next(iter(configs.values()))
    batches = gpt.make_batches(gpt.read_corpus(first.data), first)
    steps, states, times = {}, {}, {name: [] for name in configs}
    for name, config in configs.items():
        graphdef, states[name] = gpt.init_state(config)
        steps[name] = gpt.make_train_step(config, graphdef, states[name], batches[0])
    warm_up = 3
    for turn in range(warm_up + rounds):
        for name in configs:
            started = time.perf_counter()
            states[name], loss = steps[name](states[name], batches[turn])
            loss.block_until_ready()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - started)
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


def compare(options: Options, folder: Path) -> str:
    """Sweep, repeat over seeds, measure step times; write NAME.json and NAME.png."""
    cache = RunCache(folder / ".compare_cache", options.reuse_any_code)
    with Runner(options, cache) as runner:
        swept = sweep(options, runner)
        grids = {name: final_select_loss(grid) for name, grid in swept.items()}
        best = {name: best_rate(grid) for name, grid in grids.items()}
        pairs = [(name, seed) for name in best for seed in range(options.seeds)]
        configs = [run_settings(options, name, best[name], seed) for name, seed in pairs]
        repeated = runner.run(configs, "seeds")
    timed = {name: run_settings(options, name, rate, seed=0) for name, rate in best.items()}
    step_seconds = measure_step_seconds(timed, options.timing_rounds)
    runs = {
        name: [
            curve._replace(seconds=[step * step_seconds[name] for step in curve.steps])
            for curve in repeated
            if curve.optimizer == name
        ]
        for name in best
    }
    config, device = configs[0], device_name()

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_sweep(left, grids, best)
    draw_losses(middle, runs, "steps")
    middle.set(title=f"Loss against steps ({options.seeds} seeds and their range)", xlabel="steps")
    draw_losses(right, runs, "seconds")
    right.set(title="Loss against time", xlabel="seconds: steps x median step time")
    figure.suptitle(heading(config))
    figure.savefig(folder / f"{options.name}.png", dpi=150)

    rates_tried = ", ".join(f"{name} {len(grid)}" for name, grid in grids.items())
    milliseconds = ", ".join(f"{name} {1e3 * step_seconds[name]:.1f}" for name in runs)
    notes = [
        f"{heading(config)}; {options.seeds} seeds, mean ± standard deviation.",
        "Loss: nats per byte on the `report` files.",
        f"Learning rates: chosen on the `select` files, of rates a factor 2 apart: {rates_tried}.",
        CROSSING.format(every=config.eval_every),
        "Seconds: steps x median step time, measured for all optimizers in turn in one process: "
        f"{milliseconds} ms on {device}.",
    ]
    at_an_end = [name for name, grid in grids.items() if best[name] in (min(grid), max(grid))]
    if at_an_end:
        notes.append(f"The best rate lies at an end of the grid of {', '.join(at_an_end)}.")

    lines = standings(runs)
    settings = gpt.settings_that_matter(config)
    for name in ("optimizer", "learning_rate", "seed"):
        del settings[name]
    record = {
        "device": device,
        "versions": versions(),
        "commit": git_commit(),
        "settings": settings,
        "corpus": gpt.read_corpus(options.data).digest,
        "notes": notes,
        "optimizers": {
            line.optimizer: {
                "learning_rate": line.learning_rate,
                "select_loss_by_learning_rate": grids[line.optimizer],
                "final_report_loss": line.final_loss.tolist(),
                "steps_to_baseline_loss": line.steps.tolist(),
                "seconds_to_baseline_loss": line.seconds.tolist(),
                "step_seconds": step_seconds[line.optimizer],
            }
            for line in lines
        },
    }
    curves = [curve for grid in swept.values() for curve in grid.values()]
    curves += [curve for curve in repeated if curve.seed > 0]  # seed 0 is in the sweep
    write_record(folder / f"{options.name}.json", record, curves)
    results = f"Results: {folder / options.name}.json and .png"
    return "\n".join([format_table(lines), "", *notes, results])


def write_record(path: Path, record: dict[str, Any], curves: list[Curve]) -> None:
    """Write JSON with a line per run; infinite and undefined numbers become null."""
    head = json.dumps(finite_or_none(record), indent=1).removesuffix("\n}")
    runs = ",\n  ".join(json.dumps(finite_or_none(curve._asdict())) for curve in curves)
    path.write_text(f'{head},\n "runs": [\n  {runs}\n ]\n}}\n')


def finite_or_none(value: Any) -> Any:
    """The same nested value with None for the numbers that JSON cannot write."""
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


# --------------------------------------------------------------------------------------- script


def main(options: Options) -> str:
    """Compare as the options say, and print and return the table with its notes."""
    if options.smoke:
        options = dataclasses.replace(options, **SMOKE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output
        if folder is None:
            usual = ROOT / "benchmarks" / "results" if options.full else Path.cwd()
            folder = Path(temporary) if options.smoke else usual
        report = compare(options, folder) if options.full else demo(options, folder)
    print(report)
    return report


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
