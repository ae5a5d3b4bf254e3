"""The fine-tuning example: starts from trained parameters, measures memory, refuses other ranks."""

import dataclasses
import json
import math

import finetune_low_rank as finetune
import gpt
import jax
import numpy as np
import pytest
from helpers import normal

TINY = gpt.Config(**gpt.SMOKE, progress=False, rank=8)
# Entries of the kernels of a smoke model: a layer of four attention and two MLP kernels.
KERNELS = 4 * 32 * 32 + 2 * 32 * 128


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "checkpoints"
    return folder, gpt.train(dataclasses.replace(TINY, checkpoint_dir=folder))


def test_a_run_starts_from_the_parameters_of_another(pretrained):
    folder, trained = pretrained
    started = dataclasses.replace(TINY, start_from=folder, optimizer="dct_adamw", steps=4)
    result = gpt.train(started)
    assert result.report_loss[0] == pytest.approx(trained.report_loss[-1], rel=1e-6)
    assert result.report_loss[0] < trained.report_loss[0] - 0.5


def test_a_start_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"start_from={tmp_path} holds no checkpoint"):
        gpt.train(dataclasses.replace(TINY, start_from=tmp_path))


def test_a_start_with_another_model_is_refused(pretrained):
    folder, _ = pretrained
    with pytest.raises(ValueError, match="holds another model: give its width"):
        gpt.train(dataclasses.replace(TINY, start_from=folder, width=16))


@pytest.mark.parametrize("optimizer", ["trion", "dct_adamw"])
def test_the_low_rank_optimizers_learn_and_get_their_settings(optimizer):
    config = dataclasses.replace(TINY, optimizer=optimizer, learning_rate=8e-3)
    result = gpt.train(config)
    assert result.report_loss[-1] < result.report_loss[0] - 1.0

    def update(config):
        optimizer, params = gpt.make_optimizer(config), {"blocks": {"kernel": normal((32, 48))}}
        updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
        return np.asarray(updates["blocks"]["kernel"])

    expected = update(config)
    for name, value in {"rank": 2, "basis": "hadamard", "ranking": "l1"}.items():
        other = update(dataclasses.replace(config, **{name: value}))
        assert np.abs(other - expected).max() > 0.1 * np.abs(expected).max(), name


@pytest.fixture(scope="module")
def of_trion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trion") / "checkpoints"
    config = dataclasses.replace(TINY, optimizer="trion", checkpoint_dir=folder, steps=3)
    gpt.train(config)
    return config


@pytest.mark.parametrize(("name", "value"), [("rank", 4), ("basis", "dct3"), ("ranking", "l1")])
def test_a_checkpoint_of_another_subspace_is_refused_by_name(of_trion, name, value):
    changed = dataclasses.replace(of_trion, **{name: value})
    with pytest.raises(ValueError, match=f"was written with {name}="):
        gpt.train(changed)


def test_the_bytes_of_the_state_are_those_of_its_moments(pretrained):
    folder, _ = pretrained
    config = dataclasses.replace(TINY, start_from=folder)
    adamw = dataclasses.replace(config, optimizer="adamw")
    assert finetune.live_bytes_of_state(adamw, only_blocks=True) == pytest.approx(
        8 * (KERNELS + 2 * 32), abs=32
    )
    low = dataclasses.replace(config, optimizer="dct_adamw", rank=8)
    share = finetune.live_bytes_of_state(low, only_blocks=True) / (8 * KERNELS)
    assert 0.25 < share < 0.27


def test_the_smoke_run_prints_a_table_and_writes_data_and_picture(tmp_path, capsys, monkeypatch):
    options = finetune.Options(
        smoke=True, progress=False, folder=tmp_path / "runs", output=tmp_path / "out"
    )
    lines = finetune.main(options)
    printed = capsys.readouterr().out
    assert [line.label for line in lines] == ["adamw", "dct_adamw, rank 8", "trion, rank 8"]
    assert all(line.label in printed for line in lines)
    assert all(math.isfinite(line.report[-1]) for line in lines)
    starts = [line.report[0] for line in lines]
    np.testing.assert_allclose(starts, starts[0])
    data = json.loads((tmp_path / "out" / "low_rank_finetuning.json").read_text())
    assert {run["optimizer"] for run in data["runs"]} == {"adamw", "dct_adamw", "trion"}
    assert (tmp_path / "out" / "low_rank_finetuning.png").stat().st_size > 10_000

    # From the checkpoints, without training and timing.
    monkeypatch.setattr(gpt, "make_train_step", lambda *_: None)
    seconds = {line.label: 1.0 for line in lines}
    monkeypatch.setattr(finetune, "measure_step_seconds", lambda *_: seconds)
    again = finetune.main(options)
    assert [line.report for line in again] == [line.report for line in lines]
    with pytest.raises(ValueError, match="was written with basis='dct'"):
        finetune.main(dataclasses.replace(options, basis="dct3"))
