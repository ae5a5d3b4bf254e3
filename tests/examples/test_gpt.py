"""The GPT example: training, exact resumption, refusals, and the comparison of optimizers."""

import csv
import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import gpt
import gpt_compare
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX.proto.event_pb2 import Event

import orthax
from orthax.diagnostics import of_params, of_updates, orthogonality_error, stable_rank

TINY = gpt.Config(**gpt.SMOKE, progress=False)

# Trains, and kills itself while it fetches the batch of step 12.
KILLED_RUN = """
import os, signal, sys
from pathlib import Path
import gpt

class Batches:
    def __init__(self, batches):
        self.batches = batches
    def __getitem__(self, step):
        if step == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.batches[step]

make_batches = gpt.make_batches
gpt.make_batches = lambda *arguments: Batches(make_batches(*arguments))
settings = gpt.SMOKE | {"layers": 1}
gpt.train(gpt.Config(**settings, progress=False, checkpoint_dir=Path(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "log.csv"


@pytest.fixture(scope="module")
def uninterrupted(log):
    return gpt.train(dataclasses.replace(TINY, log=log))


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    gpt.train(dataclasses.replace(TINY, checkpoint_dir=folder))
    return folder


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("optimizer", "fall"),
    [
        ("adamw", 1.0),
        (None, 1.5),  # muon
        ("normuon", 1.5),
        ("root", 1.5),
        ("auon_rms", 1.0),
        ("sgd", 0.5),
    ],
)
def test_a_dozen_steps_lower_the_held_out_loss(optimizer, fall, uninterrupted):
    result = uninterrupted
    if optimizer is not None:
        result = gpt.train(dataclasses.replace(TINY, optimizer=optimizer))
    assert result.select_loss[0] - result.select_loss[-1] > fall
    assert result.report_loss[0] - result.report_loss[-1] > fall


def test_bfloat16_activations_keep_float32_parameters_and_learn_as_fast(uninterrupted):
    config = dataclasses.replace(TINY, dtype="bfloat16")
    _, state = gpt.init_state(gpt.settle(config))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    losses = gpt.train(config).report_loss
    np.testing.assert_allclose(losses, uninterrupted.report_loss, rtol=0.02)


def test_the_model_sees_no_later_byte():
    graphdef, state = gpt.init_state(gpt.settle(TINY))
    model = gpt.nnx.merge(graphdef, state.params)
    tokens = jnp.arange(2 * TINY.context).reshape(2, TINY.context)
    changed = tokens.at[:, 20:].set(7)
    np.testing.assert_allclose(model(tokens)[:, :20], model(changed)[:, :20], atol=1e-5)
    assert not np.allclose(model(tokens)[:, 20:], model(changed)[:, 20:], atol=1e-2)


def test_kernels_are_decayed_and_nothing_else():
    _, state = gpt.init_state(gpt.settle(TINY))
    mask = jax.tree.map_with_path(
        lambda path, decayed: (path[-1].key, decayed), gpt.decayed(state.params)
    )
    pairs = set(jax.tree.leaves(mask, is_leaf=lambda item: isinstance(item, tuple)))
    assert pairs == {("kernel", True), ("embedding", False), ("scale", False)}


def test_the_learning_rate_rises_to_its_peak_and_falls_without_a_zero_update():
    config = gpt.settle(dataclasses.replace(TINY, steps=10, warmup_steps=4, learning_rate=1.0))
    rates = [float(gpt.learning_rate_schedule(config)(count)) for count in range(10)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates[3:], np.arange(7, 0, -1) / 7, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adam"}, "optimizer='adam' is not one of adamw, muon"),
        ({"outliers": 1.0}, r"outliers=1.0 is not a share in \[0, 1\)"),
        ({"heads": 5}, "heads=5 does not divide width=32"),
        ({"warmup_steps": 12}, "warmup_steps=12 is not between 0 and steps=12"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        gpt.train(dataclasses.replace(TINY, **change))


def test_outliers_of_100_standard_deviations_hit_the_share_of_entries_asked_for():
    gradients = {"a": 3e-4 * jax.random.normal(jax.random.key(1), (500, 400)), "b": jnp.ones((9,))}
    noise = gpt.add_outliers(0.01, seed=0)
    state = noise.init(gradients)
    first, state = noise.update(gradients, state)
    added = np.asarray(first["a"] - gradients["a"])
    hit = added != 0
    assert abs(hit.mean() - 0.01) < 0.002
    assert abs(added[hit].std() / (100 * 3e-4) - 1) < 0.05
    np.testing.assert_array_equal(first["b"], gradients["b"])  # nothing to measure noise by

    second, state = noise.update(gradients, state)
    assert not np.array_equal(second["a"], first["a"])
    assert int(state.count) == 2
    again, _ = gpt.add_outliers(0.01, seed=0).update(gradients, noise.init(gradients))
    np.testing.assert_array_equal(again["a"], first["a"])
    other, _ = gpt.add_outliers(0.01, seed=1).update(gradients, noise.init(gradients))
    assert not np.array_equal(other["a"], first["a"])


def test_outliers_reach_the_optimizer_from_the_settings(uninterrupted):
    noisy = gpt.train(dataclasses.replace(TINY, outliers=0.05))
    assert noisy.train_loss[0] == uninterrupted.train_loss[0]  # before the first update
    assert noisy.report_loss[-1] > uninterrupted.report_loss[-1] + 0.01


# --------------------------------------------------------------------------------------- corpus


def test_batches_depend_on_seed_and_step_only():
    corpus = gpt.read_corpus(None)
    in_order = gpt.make_batches(corpus, TINY)
    backwards = gpt.make_batches(corpus, TINY)
    forth = [in_order[step] for step in range(5)]
    back = [backwards[step] for step in reversed(range(5))][::-1]
    np.testing.assert_array_equal(forth, back)
    other_seed = gpt.make_batches(corpus, dataclasses.replace(TINY, seed=1))
    assert not np.array_equal(forth[0], other_seed[0])
    assert not np.array_equal(forth[0], forth[1])
    assert forth[0].shape == (TINY.batch, TINY.context + 1)


def test_every_document_is_in_exactly_one_split(tmp_path):
    markers = [f"<{index}>" for index in range(200)]
    for index, marker in enumerate(markers):
        path = tmp_path / f"folder{index % 7}" / f"{index}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(marker * 9)
    corpus = gpt.read_corpus(tmp_path)
    splits = [split.tobytes().decode() for split in (corpus.train, corpus.select, corpus.report)]
    for marker in markers:
        assert sum(marker in split for split in splits) == 1
    assert all(splits)
    assert len(splits[0]) > 0.8 * sum(map(len, splits))


def test_the_standard_library_fills_every_split_and_its_tests_are_left_out():
    corpus = gpt.read_corpus(None)
    assert len(corpus.train) > 4_000_000
    assert min(len(corpus.select), len(corpus.report)) > 100_000
    folders = {part for name in gpt.read_documents(None) for part in Path(name).parts[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}


def test_a_single_file_is_a_corpus_too(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(32, 127)) * 5000)
    corpus = gpt.read_corpus(path)
    assert min(map(len, corpus[:3])) > 0
    assert sum(len(split) - split.tobytes().count(b"\0") for split in corpus[:3]) == 95 * 5000


def test_a_corpus_too_small_to_evaluate_on_is_refused(tmp_path):
    for index in range(100):
        (tmp_path / f"{index}.txt").write_text("word " * 40)
    with pytest.raises(ValueError, match="fewer than eval_windows=100"):
        gpt.train(dataclasses.replace(TINY, data=tmp_path, eval_windows=100))


# ------------------------------------------------------------------------- log and checkpoints


def test_the_log_holds_one_row_per_step_with_the_losses_returned(log, uninterrupted):
    result = uninterrupted
    with log.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(TINY.steps + 1))
    assert [float(row["train_loss"]) for row in rows[1:]] == result.train_loss.tolist()
    evaluated = [row for row in rows if row["report_loss"]]
    assert [int(row["step"]) for row in evaluated] == result.eval_steps.tolist() == [0, 4, 8, 12]
    assert [float(row["report_loss"]) for row in evaluated] == result.report_loss.tolist()


def test_a_run_killed_and_resumed_equals_an_uninterrupted_one(tmp_path, uninterrupted):
    folder = tmp_path / "checkpoints"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(folder)], env=environment, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert len((folder / "log.csv").read_text().splitlines()) == 13  # header, steps 0 to 11

    resumed = gpt.train(dataclasses.replace(TINY, checkpoint_dir=folder))
    for ours, theirs in zip(resumed, uninterrupted, strict=True):
        if ours is not resumed.config and ours is not resumed.eval_seconds:
            np.testing.assert_array_equal(ours, theirs)
    with (folder / "log.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == list(range(TINY.steps + 1))


def test_a_finished_run_is_read_back_without_training(checkpoint_dir, monkeypatch):
    before = (checkpoint_dir / "log.csv").read_text()
    monkeypatch.setattr(gpt, "make_train_step", lambda *_: None)
    gpt.train(dataclasses.replace(TINY, checkpoint_dir=checkpoint_dir))
    assert (checkpoint_dir / "log.csv").read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adamw", "learning_rate": 8e-3}, "optimizer='muon', but .*'adamw'"),
        ({"layers": 2}, "layers=1, but this run has layers=2"),
        ({"seed": 1}, "seed=0, but this run has seed=1"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_name(checkpoint_dir, change, message):
    config = dataclasses.replace(
        TINY, learning_rate=gpt.LEARNING_RATES["muon"], checkpoint_dir=checkpoint_dir
    )
    with pytest.raises(ValueError, match=message):
        gpt.train(dataclasses.replace(config, **change))


def test_a_log_that_lacks_rows_is_not_continued(checkpoint_dir, tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("\n".join((checkpoint_dir / "log.csv").read_text().splitlines()[:-2]) + "\n")
    with pytest.raises(ValueError, match="rows are missing"):
        gpt.train(dataclasses.replace(TINY, checkpoint_dir=checkpoint_dir, log=log))


def test_the_smoke_run_writes_every_file_and_prints_the_final_loss(tmp_path, capsys):
    config = gpt.Config(
        smoke=True,
        progress=False,
        checkpoint_dir=tmp_path / "checkpoints",
        plot=tmp_path / "loss.png",
    )
    result = gpt.main(config)
    assert f"{result.report_loss[-1]:.4f} (report)" in capsys.readouterr().out
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"10", "12", "log.csv"}


def read_events(folder):
    """Values by tag and step in TensorBoard's files, later ones instead of earlier ones."""
    found = {}
    for path in sorted(folder.iterdir()):
        rest = path.read_bytes()
        while rest:  # records: length (8 bytes), its checksum (4), data, their checksum (4)
            (length,) = struct.unpack("<Q", rest[:8])
            event = Event.FromString(rest[12 : 12 + length])
            rest = rest[16 + length :]
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def test_tensorboard_has_the_losses_and_what_the_optimizer_measures(tmp_path, monkeypatch):
    measures = {"rank": of_updates(stable_rank), "error": of_params(orthogonality_error)}
    monkeypatch.setitem(
        gpt.OPTIMIZERS,
        "muon",
        lambda *rate, **options: optax.chain(
            orthax.muon(*rate, **options), optax.monitor(measures)
        ),
    )
    config = dataclasses.replace(
        TINY, steps=8, tensorboard=tmp_path / "events", checkpoint_dir=tmp_path / "run"
    )
    result = gpt.train(config)
    found = read_events(tmp_path / "events")
    assert 1 <= found["rank/blocks/0/up/kernel", 8] <= TINY.width
    assert {step for tag, step in found if tag == "error/blocks/0/up/kernel"} == {4, 8}
    np.testing.assert_allclose(
        [found["loss/train", step] for step in range(1, 9)], result.train_loss, rtol=1e-6
    )
    for name in ("select", "report"):
        steps = sorted(step for tag, step in found if tag == f"loss/{name}")
        assert steps == [4, 8]
    np.testing.assert_allclose(found["loss/report", 8], result.report_loss[-1], rtol=1e-6)

    monkeypatch.setattr(gpt, "make_train_step", lambda *_: None)
    gpt.train(config)  # its checkpoint, which has the measures too, is read


def test_tensorboard_without_its_package_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="needs tensorboardX: pip install tensorboardX"):
        gpt.train(dataclasses.replace(TINY, tensorboard=tmp_path))


# ----------------------------------------------------------------------------------- comparison


def test_steps_to_a_loss_are_interpolated_at_the_first_crossing():
    steps, losses = [0, 10, 20, 30, 40], [5.0, 3.0, 2.0, 2.5, 1.0]
    assert gpt_compare.steps_to_loss(steps, losses, 4.0) == 5.0
    assert gpt_compare.steps_to_loss(steps, losses, 2.25) == 17.5
    assert gpt_compare.steps_to_loss(steps, losses, 2.0) == 20.0
    assert gpt_compare.steps_to_loss(steps, losses, 6.0) == 0.0
    assert gpt_compare.steps_to_loss(steps, losses, 0.9) == float("inf")
    assert gpt_compare.steps_to_loss(steps, [float("nan")] * 5, 2.0) == float("inf")


def test_the_table_gives_ratios_to_the_baseline_and_says_never():
    def curve(name, seed, report):
        return gpt_compare.Curve(name, 0.1, seed, [0, 10, 20], [0.0, 2.0, 4.0], report, report)

    runs = {
        "adamw": [curve("adamw", 0, [5.0, 3.0, 2.0]), curve("adamw", 1, [5.0, 3.0, 2.0])],
        "fast": [curve("fast", 0, [5.0, 2.0, 1.0]), curve("fast", 1, [5.0, 3.0, 1.0])],
        "slow": [curve("slow", 0, [5.0, 3.0, 1.9]), curve("slow", 1, [5.0, 4.0, 3.0])],
        "stuck": [curve("stuck", 0, [5.0, 4.0, 3.0]), curve("stuck", 1, [5.0, 4.0, 3.0])],
    }
    lines = gpt_compare.format_table(gpt_compare.standings(runs)).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert rows[0] == ["adamw", "0.1", "2.000 ± 0.000", "20 ± 0", "1.00", "4 ± 0", "1.00"]
    assert rows[1] == ["fast", "0.1", "1.000 ± 0.000", "12 ± 4", "0.62", "2 ± 1", "0.62"]
    assert rows[2][3:] == ["never in 1 of 2", "-", "never in 1 of 2", "-"]
    assert rows[3][3:] == ["never", "-", "never", "-"]


def test_the_learning_rate_grid_grows_until_its_best_rate_is_inside():
    assert gpt_compare.rates_to_add({1.0: 3.0, 2.0: 2.0, 4.0: 2.5}, room=4) == []
    assert gpt_compare.rates_to_add({1.0: 3.0, 2.0: 2.0, 4.0: 1.5}, room=4) == [8.0]
    assert gpt_compare.rates_to_add({1.0: 1.0, 2.0: 2.0, 4.0: float("nan")}, room=4) == [0.5]
    assert gpt_compare.rates_to_add({1.0: 3.0, 2.0: 2.0, 4.0: 1.5}, room=0) == []
    assert gpt_compare.best_rate({1.0: float("nan"), 2.0: 9.0, 4.0: float("inf")}) == 2.0


def test_the_sweep_follows_each_optimizer_to_its_own_best_rate():
    best = {"adamw": 32 * gpt.LEARNING_RATES["adamw"], "muon": gpt.LEARNING_RATES["muon"]}

    class Bowls:
        """A runner whose losses are parabolas around the best rates."""

        def run(self, configs, title):
            del title
            return [self.curve(config.optimizer, config.learning_rate) for config in configs]

        def curve(self, name, rate):
            loss = 1.0 + np.log2(rate / best[name]) ** 2
            return gpt_compare.Curve(name, rate, 0, [0, 9], [0.0, 1.0], [9.0, loss], [9.0, loss])

    grids = gpt_compare.sweep(gpt_compare.Options(optimizers=("adamw", "muon")), Bowls())
    losses = {name: gpt_compare.final_select_loss(grid) for name, grid in grids.items()}
    assert {name: gpt_compare.best_rate(grid) for name, grid in losses.items()} == best
    assert len(grids["muon"]) == 5
    assert list(losses["adamw"]) == [best["adamw"] * 2.0**power for power in range(-7, 2)]


def test_the_demonstration_writes_a_picture_and_a_table(tmp_path, capsys):
    options = gpt_compare.Options(
        optimizers=("adamw", "muon"), smoke=True, progress=False, output=tmp_path
    )
    gpt_compare.main(options)
    printed = capsys.readouterr().out
    assert "| adamw " in printed
    assert "| muon " in printed
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_the_full_comparison_writes_its_results_and_resumes_from_its_cache(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(gpt_compare, "code_digest", lambda: "the same for both calls")
    options = gpt_compare.Options(
        optimizers=("adamw", "sgd"),
        jobs=1,  # to start a process takes as long as its runs
        full=True,
        smoke=True,
        outliers=0.01,
        name="noisy",
        progress=False,
        output=tmp_path,
    )
    gpt_compare.main(options)
    printed = capsys.readouterr().out
    assert "2 seeds, mean ± standard deviation" in printed
    assert "outliers in 0.01 of the gradient" in printed
    assert (tmp_path / "noisy.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "noisy.json").read_text())
    assert record["settings"]["outliers"] == 0.01
    assert set(record["optimizers"]) == {"adamw", "sgd"}
    assert len(record["runs"]) == 2 * (2 + 1)  # two rates, and a second seed at the better one
    assert len(record["optimizers"]["sgd"]["final_report_loss"]) == 2

    runs = tmp_path / ".compare_cache" / "runs.jsonl"
    first_time = runs.read_text()
    seconds = {name: 1.0 for name in options.optimizers}
    monkeypatch.setattr(gpt_compare, "measure_step_seconds", lambda *_: seconds)
    gpt_compare.main(options)
    assert runs.read_text() == first_time
    again = json.loads((tmp_path / "noisy.json").read_text())
    for name in ("select", "report"):
        assert [run[name] for run in again["runs"]] == [run[name] for run in record["runs"]]


def test_a_cache_cut_off_in_a_line_keeps_its_other_runs(tmp_path):
    curves = [gpt_compare.Curve("sgd", 0.1, seed, [0], [0.0], [5.0], [5.0]) for seed in range(3)]
    cache = gpt_compare.RunCache(tmp_path)
    for seed in (0, 1):
        cache.add({"seed": seed, "code": "a"}, curves[seed])
    path = tmp_path / "runs.jsonl"
    path.write_text(path.read_text()[:-5])
    cache = gpt_compare.RunCache(tmp_path)
    cache.add({"seed": 2, "code": "b"}, curves[2])

    cache = gpt_compare.RunCache(tmp_path)
    assert cache.get({"seed": 0, "code": "a"}) == curves[0]
    assert cache.get({"seed": 1, "code": "a"}) is None
    assert cache.get({"seed": 2, "code": "a"}) is None
    assert gpt_compare.RunCache(tmp_path, True).get({"seed": 2, "code": "a"}) == curves[2]
