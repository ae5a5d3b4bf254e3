"""Does a job of several processes train as one process does, end when one dies, and go on?

    python benchmarks/processes.py          # eight minutes on two busy cores
    python benchmarks/processes.py --smoke  # two runs, a minute, writes nothing

Trains the tiny GPT of `examples/gpt.py --smoke` with Muon on virtual devices of this machine, in
processes that `examples/launch_local.py` starts. First in one, two and four processes; then one of
them dies in update 8; then the job goes on from the checkpoint of update 5 in another number of
processes, and of devices. "difference" is the largest relative one of all losses to those of one
process; "end" the time from the death to the end of the launcher. Prints a table, writes
processes.json.
"""

import csv
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import record
import tyro

sys.path.insert(0, str(record.ROOT / "examples"))
import gpt
import gpt_mesh

LAUNCHER = record.ROOT / "examples" / "launch_local.py"
DEATH = 8  # the update in which a process dies
LOSSES = ("train_loss", "select_loss", "report_loss")


@dataclasses.dataclass(frozen=True)
class Part:
    """What a process of a job does: train in this folder, and perhaps die."""

    folder: Path
    """With the checkpoints."""
    mesh: str
    """Axes, as `examples/gpt.py --mesh` takes them."""
    victim: int | None = None
    """The process that dies."""
    number: str = "SIGKILL"
    """The signal it dies of; SIGSTOP: it only stops, and its heartbeats with it."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A part and who takes it."""

    name: str
    processes: int
    devices: int
    mesh: str
    victim: int | None = None
    number: str = "SIGKILL"
    goes_on: str | None = None
    """Name of the job whose checkpoint it starts from."""


SAME = {"devices": 4, "mesh": "fsdp=2,tp=2"}
JOBS = (
    Job("1", 1, **SAME),
    Job("2", 2, **SAME),
    Job("4", 4, **SAME),
    Job("2, the second killed", 2, victim=1, **SAME),
    Job("4, the last killed", 4, victim=3, **SAME),
    Job("2, the first killed", 2, victim=0, **SAME),
    Job("2, the second told to end", 2, victim=1, number="SIGTERM", **SAME),
    Job("2, the second stopped", 2, victim=1, number="SIGSTOP", **SAME),
    Job("2 to 1", 1, goes_on="2, the second killed", **SAME),
    Job("2 to 4", 4, goes_on="2, the second killed", **SAME),
    Job("4 to 2", 2, goes_on="4, the last killed", **SAME),
    Job("2 to 4, twice the devices", 4, 8, "fsdp=4,tp=2", goes_on="2, the second killed"),
    Job("2 to 1, half the devices", 1, 2, "fsdp=2", goes_on="2, the second killed"),
)
SMOKE = (JOBS[3], JOBS[8])


def take_part(part: Part) -> None:
    """Train as one process of a job."""
    read = gpt_mesh.Batches.__getitem__

    def read_or_die(self: gpt_mesh.Batches, step: int) -> jax.Array:
        if step == DEATH - 1 and jax.process_index() == part.victim:
            (part.folder / "died").write_text(str(time.time()))
            os.kill(os.getpid(), getattr(signal, part.number))
        return read(self, step)

    gpt_mesh.Batches.__getitem__ = read_or_die
    gpt.main(
        gpt.Config(smoke=True, progress=False, mesh=part.mesh, checkpoint_dir=part.folder / "run")
    )


def losses_in(folder: Path) -> list[list[float]]:
    """The logged losses of every update so far, NaN where there are none."""
    with (folder / "run" / "log.csv").open() as file:
        return [[float(row[name] or "nan") for name in LOSSES] for row in csv.DictReader(file)]


def run(job: Job, root: Path) -> dict[str, Any]:
    """Start a job in its own folder: exit code, seconds in all and from a death to the end."""
    folder = root / job.name
    if job.goes_on is None:
        folder.mkdir()
    else:
        shutil.copytree(root / job.goes_on, folder)
    part = ["--folder", str(folder), "--mesh", job.mesh, "--number", job.number]
    part += [] if job.victim is None else ["--victim", str(job.victim)]
    who = [str(job.processes), "--devices", str(job.devices)]
    started = time.time()
    ended = subprocess.run(
        [sys.executable, LAUNCHER, *who, "--", __file__, "part", *part],
        capture_output=True,
        text=True,
        check=False,
    )
    now = time.time()
    if ended.returncode != (job.victim is not None):
        raise RuntimeError(f"{job.name}: exit code {ended.returncode}\n{ended.stdout}")
    return {
        "code": ended.returncode,
        "seconds": round(now - started, 1),
        "end": None if job.victim is None else now - float((folder / "died").read_text()),
        "losses": losses_in(folder),
        "said": [line for line in ended.stdout.splitlines() if line.startswith("launch_local")],
    }


def difference(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """The largest relative difference of the losses that both have."""
    shared = min(len(ours), len(theirs))
    a, b = np.array(ours[:shared]), np.array(theirs[:shared])
    return float(np.nanmax(np.abs(a - b) / b))


def measure(smoke: bool = False) -> None:
    """Run the jobs and report.

    Args:
      smoke: Two jobs only, and no record.
    """
    found: dict[str, dict[str, Any]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for job in SMOKE if smoke else JOBS:
            result = found[job.name] = run(job, Path(root))
            first = next(iter(found.values()))
            end = result["end"]
            rows.append(
                {
                    "processes": job.name,
                    "devices": job.devices,
                    "mesh": job.mesh,
                    "updates": len(result["losses"]) - 1,
                    "difference": f"{difference(result['losses'], first['losses']):.1e}",
                    "exit code": result["code"],
                    "seconds": result["seconds"],
                    "end": "" if end is None else f"{end:.1f} s",
                    "said": " ".join(result["said"]).removeprefix("launch_local: "),
                }
            )
            print(f"{job.name}: {result['seconds']} s", file=sys.stderr, flush=True)
    print(record.table(rows))
    if not smoke:
        record.write("processes", {"jobs": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["part"]:
        take_part(tyro.cli(Part, args=sys.argv[2:]))
    else:
        tyro.cli(measure, description=__doc__)
