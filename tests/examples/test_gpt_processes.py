"""The GPT example on meshes and in several processes, and what starts these on one machine.

Two launches of processes serve most tests: `killed`, two processes of which one dies in update 8,
and `alone`, one process with as many devices, which trains whole and goes on from the dead one.
"""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple

import gpt
import gpt_mesh
import launch_local
import numpy as np
import pytest

LAUNCHER = launch_local.__file__
MESH = "fsdp=2,tp=2"
DEVICES = 4
TINY = gpt.Config(**gpt.SMOKE, progress=False, mesh=MESH)

KILLED_RUN = """
import os, signal, sys, time
from pathlib import Path
import gpt, gpt_mesh, jax

read = gpt_mesh.Batches.__getitem__

def read_or_die(batches, step):
    if step == 7 and jax.process_index() == 1:
        Path(sys.argv[2]).write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return read(batches, step)

gpt_mesh.Batches.__getitem__ = read_or_die
gpt.SMOKE["layers"] = 1
folder = Path(sys.argv[1])
gpt.main(gpt.Config(smoke=True, progress=False, mesh="fsdp=2,tp=2", checkpoint_dir=folder))
"""

# Also: the same training with one method of orthogonalising everywhere, on the mesh and without;
# and what a training step sends between the devices.
RUN_ALONE = """
import collections, dataclasses, json, re, sys
from pathlib import Path
import gpt, gpt_mesh

folder = Path(sys.argv[1])
config = gpt.Config(**gpt.SMOKE | {"layers": 1}, progress=False, mesh="fsdp=2,tp=2")
gpt.train(dataclasses.replace(config, log=folder / "whole.csv"))
gpt.train(dataclasses.replace(config, log=folder / "one_device.csv", mesh=None))
gpt.train(dataclasses.replace(config, checkpoint_dir=folder / "checkpoints"))

short = dataclasses.replace(config, optimizer="muon_polynomial", steps=4)
losses = {mesh: gpt.train(dataclasses.replace(short, mesh=mesh)) for mesh in (short.mesh, None)}
found = {"losses": [[*run.train_loss, *run.report_loss] for run in losses.values()]}

for axes in ("fsdp=4", "tp=4", "dp=2,fsdp=2"):
    config = gpt.settle(dataclasses.replace(config, optimizer="sgd", learning_rate=None, mesh=axes))
    mesh = gpt_mesh.make_mesh(config)
    windows = gpt.shuffled_windows(gpt.read_corpus(None), config)
    batches = gpt_mesh.Batches(windows, config.batch, mesh)
    graphdef, state = gpt.init_state(config, mesh)
    loss_of = gpt_mesh.on_whole_params(gpt.loss_of, mesh)
    text = gpt.make_train_step(config, graphdef, state, batches[0], loss_of).as_text()
    sent = re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute)[a-z-]*[(]", text)
    found[axes] = collections.Counter(sent)
(folder / "found.json").write_text(json.dumps(found))
"""

Run = namedtuple("Run", "code lines seconds")


def start(folder, script, processes, *arguments, devices=None):
    """Starts the launcher with a script of this text, whose standard output is its lines."""
    path = folder / "script.py"
    path.write_text(script)
    options = [] if devices is None else ["--devices", str(devices)]
    return subprocess.Popen(
        [sys.executable, LAUNCHER, str(processes), *options, "--", str(path), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*arguments, **options):
    started = time.time()
    process = start(*arguments, **options)
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.terminate()  # the launcher then ends what it started
        process.wait()
    return Run(process.returncode, output.splitlines(), time.time() - started)


def read_log(path):
    with path.open() as file:
        return {int(row.pop("step")): row for row in csv.DictReader(file)}


def assert_same_losses(ours, theirs, steps):
    for step in steps:
        for name in ("train_loss", "select_loss", "report_loss"):
            a, b = ours[step][name], theirs[step][name]
            assert bool(a) == bool(b), (step, name)
            if a:
                np.testing.assert_allclose(float(a), float(b), rtol=1e-6, err_msg=f"{step} {name}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def killed(folder):
    found = run(
        folder, KILLED_RUN, 2, str(folder / "checkpoints"), str(folder / "died"), devices=DEVICES
    )
    ended = time.time()
    assert (folder / "died").exists(), "\n".join(found.lines)
    log = read_log(folder / "checkpoints" / "log.csv")
    return found, log, ended - float((folder / "died").read_text())


@pytest.fixture(scope="module")
def alone(folder, killed):
    del killed  # goes first, and leaves its checkpoint
    found = run(folder, RUN_ALONE, 1, str(folder), devices=DEVICES)
    assert found.code == 0, "\n".join(found.lines)
    return read_log(folder / "whole.csv"), json.loads((folder / "found.json").read_text())


# ------------------------------------------------------- training, a death, and training again


def test_a_killed_process_ends_the_job_with_one_clear_line(killed):
    run, _, seconds = killed
    assert run.code == 1
    assert seconds < gpt_mesh.HEARTBEAT_SECONDS + gpt_mesh.SHUTDOWN_SECONDS
    said = [line for line in run.lines if line.startswith("launch_local")]
    assert said == ["launch_local: process 1 was killed by SIGKILL: the job ends."]
    survivor = [line for line in run.lines if "another process has probably died" in line]
    assert [line.partition(" ends")[0] for line in survivor] == ["[0] Process 0 of 2"]
    assert "Traceback" not in "".join(run.lines)


def test_two_processes_have_the_losses_of_one(killed, alone):
    assert list(killed[1]) == list(range(8))  # the start and seven updates
    assert_same_losses(killed[1], alone[0], killed[1])


def test_a_job_goes_on_from_its_checkpoint_in_one_process(folder, alone):
    log = read_log(folder / "checkpoints" / "log.csv")
    assert list(log) == list(range(TINY.steps + 1))
    assert_same_losses(log, alone[0], log)


def test_a_mesh_has_the_losses_of_one_device(folder, alone):
    log = read_log(folder / "one_device.csv")
    assert_same_losses(alone[0], log, log)


def test_with_one_method_everywhere_a_mesh_has_the_losses_of_one_device(alone):
    on_mesh, on_one = alone[1]["losses"]
    assert len(on_mesh) == 6
    np.testing.assert_allclose(on_mesh, on_one, rtol=1e-6)


def test_blocks_gather_parameters_and_sum_gradients_and_send_no_more(alone):
    matrices = 9  # four of attention, two of the MLP, two embeddings, the head
    found = alone[1]
    assert found["fsdp=4"] == {"all-gather": matrices, "all-reduce": 1}
    assert found["dp=2,fsdp=2"] == {"all-gather": matrices, "all-reduce": 1}
    assert found["tp=4"] == {"all-reduce": 4}  # after attention and MLP, there and back


# ------------------------------------------------------------------------------------- launcher


WAITS = "import os, time; print('here is', os.getpid(), flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    ("death", "line"),
    [
        ("sys.exit(3)", "process 1 ended with exit code 3"),
        ("raise RuntimeError('full')", "process 1 ended with exit code 1"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "process 1 was killed by SIGTERM"),
        ("os.abort()", "process 1 was killed by SIGABRT"),
    ],
)
def test_the_launcher_has_exit_code_1_whatever_a_process_dies_of(tmp_path, death, line):
    script = (
        f"import os, signal, sys\nif os.environ['JAX_PROCESS_ID'] == '1':\n    {death}\n{WAITS}"
    )
    found = run(tmp_path, script, 2)
    assert found.code == 1
    assert found.lines[-1] == f"launch_local: {line}: the job ends."
    assert found.seconds < 20
    (waiting,) = [line for line in found.lines if "here is" in line]
    assert waiting.startswith("[0] here is ")
    assert is_gone(int(waiting.split()[-1]))


def is_gone(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_all(tmp_path, number, code):
    process = start(tmp_path, WAITS, 3)
    children = [int(process.stdout.readline().split()[-1]) for _ in range(3)]
    assert not any(map(is_gone, children))
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == code
    assert all(map(is_gone, children))


def test_each_process_learns_where_the_others_are(tmp_path):
    names = ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS")
    found = run(tmp_path, f"import os; print(*map(os.environ.get, {names}))", 2, devices=6)
    assert found.code == 0
    assert sorted(found.lines) == ["[0] 0 2 3 cpu", "[1] 1 2 3 cpu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["2"], "say what to start"),
        (["0", "--", "script.py"], "N=0 is not a number of processes"),
        (["2", "--devices", "3", "--", "script.py"], "--devices 3 is not a multiple of 2"),
    ],
)
def test_the_launcher_refuses_what_cannot_be(arguments, message, capsys):
    with pytest.raises(SystemExit):
        launch_local.main(arguments)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------- what is refused

Device = namedtuple("Device", "process_index")


@pytest.mark.parametrize(
    ("change", "devices", "message"),
    [
        ({"mesh": "fsdp=2,ep=2"}, 4, "mesh='fsdp=2,ep=2': 'ep' is not one of dp, fsdp, tp"),
        ({"mesh": ""}, 4, "'' is not one of dp, fsdp, tp"),
        ({"mesh": "fsdp=2,tp"}, 4, "give each axis once and a size"),
        ({"mesh": "fsdp=0"}, 4, "give each axis once and a size"),
        ({"mesh": "tp=2,tp=2"}, 4, "give each axis once and a size"),
        ({}, 8, "'fsdp=2,tp=2' takes 4 devices, but there are 8: 4 in each of 2 processes"),
        ({"width": 36, "mesh": "fsdp=8"}, 8, "fsdp=8 does not divide width=36"),
        ({"heads": 8, "mesh": "tp=3,dp=2"}, 6, "tp=3 does not divide heads=8"),
        ({"batch": 6, "mesh": "dp=2,fsdp=2"}, 4, "dp=2 times fsdp=2 does not divide batch=6"),
        ({"eval_windows": 9}, 4, "fsdp=2 does not divide eval_windows=9"),
    ],
)
def test_an_impossible_mesh_is_refused_by_name(change, devices, message, monkeypatch):
    of_two_processes = [Device(index // (devices // 2)) for index in range(devices)]
    monkeypatch.setattr(gpt_mesh.jax, "devices", lambda: of_two_processes)
    monkeypatch.setattr(gpt, "read_corpus", lambda _: pytest.fail("it was not refused at once"))
    with pytest.raises(ValueError, match=message):
        gpt.train(dataclasses.replace(TINY, **change))


def test_processes_with_other_numbers_of_devices_are_refused():
    devices = [Device(0), Device(0), Device(0), Device(1)]
    with pytest.raises(ValueError, match="Process 1 has 1 devices, but process 0 has 3"):
        gpt_mesh.check_axes({"fsdp": 4}, TINY, devices)


def test_processes_with_other_settings_are_refused(monkeypatch):
    gpt_mesh.check_agreement({"seed": 0})
    gather = gpt_mesh.multihost_utils.process_allgather
    other = np.array([[1]], np.uint32)
    monkeypatch.setattr(
        gpt_mesh.multihost_utils,
        "process_allgather",
        lambda digest: np.concatenate([np.atleast_2d(gather(digest)), other]),
    )
    with pytest.raises(ValueError, match=r"Processes \[1\] have other settings or another corpus"):
        gpt_mesh.check_agreement({"seed": 0})


def test_an_environment_that_tells_half_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES=2 is set, but JAX_PROCESS_ID is not"):
        gpt_mesh.join_processes()


# ----------------------------------------------------------------------------------------- rows


def test_rows_on_a_mesh_are_those_of_the_batch():
    config = dataclasses.replace(TINY, mesh="fsdp=1,tp=1")
    corpus, mesh = gpt.read_corpus(None), gpt_mesh.make_mesh(config)
    batches = gpt_mesh.Batches(gpt.shuffled_windows(corpus, config), config.batch, mesh)
    expected = gpt.make_batches(corpus, config)
    for step in (0, 3):
        np.testing.assert_array_equal(batches[step], expected[step])


def test_every_leaf_is_cut_as_its_kind_says():
    params = gpt.nnx.as_pure(gpt.nnx.state(gpt.nnx.eval_shape(lambda: model(TINY))))
    axes = gpt_mesh.AxisType.Auto, gpt_mesh.AxisType.Auto
    mesh = gpt_mesh.jax.sharding.AbstractMesh((4, 2), ("fsdp", "tp"), axis_types=axes)
    specs = gpt_mesh.jax.tree.map(lambda x: tuple(x.spec), gpt_mesh.layout(params, mesh))
    block = specs["blocks"][0]
    attention = {name: block["attention"][name]["kernel"] for name in ("query", "out")}
    assert attention == {"query": ("fsdp", "tp", None), "out": ("tp", None, "fsdp")}
    assert block["up"]["kernel"] == ("fsdp", "tp")
    assert block["down"]["kernel"] == ("tp", "fsdp")
    assert block["mlp_norm"]["scale"] == (None,)
    assert specs["lm_head"]["kernel"] == ("fsdp", None)
    assert specs["token_embedding"]["embedding"] == (None, "fsdp")

    mesh = gpt_mesh.jax.sharding.AbstractMesh((4,), ("fsdp",), axis_types=axes[:1])
    block = gpt_mesh.layout(params, mesh)["blocks"][0]
    assert tuple(block["up"]["kernel"].spec) == (None, "fsdp")  # the larger dimension
    assert tuple(block["down"]["kernel"].spec) == ("fsdp", None)


def model(config):
    return gpt.GPT(config, gpt.nnx.Rngs(0))
