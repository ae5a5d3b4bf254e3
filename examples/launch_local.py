"""Start several processes of a script on this machine, connected as those of a cluster are.

    python examples/launch_local.py 2 -- examples/gpt.py --mesh fsdp=2
    python examples/launch_local.py 2 --devices 4 -- examples/gpt.py --mesh fsdp=2,tp=2 --smoke

Each process computes on CPU; a "device" is a part of it. The script learns of the others by
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, see `join_processes` in gpt_mesh.py.
Lines that they print begin with the number of the process. If one dies, all end, and so does this
script, with exit code 1; Ctrl-C ends all, too.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

# So long the others may say what they were doing when one died.
LAST_WORDS_SECONDS = 1.0


def environment_of(index: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """The environment of process `index`: `devices` of its own, and where the others are."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"localhost:{port}",  # not reachable from elsewhere
        "PYTHONUNBUFFERED": "1",
    }
    if processes > 1:
        environment["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
    return environment


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def forward(index: int, child: "subprocess.Popen[str]") -> None:
    """Print the lines of a process as they come, with its number."""
    assert child.stdout is not None
    for line in child.stdout:
        if "connected peer ranks is" in line:
            continue  # Gloo, of each of its many connections
        # One call for each line, so that those of several processes do not mix.
        sys.stdout.write(f"[{index}] {line.rstrip()}\n")
        sys.stdout.flush()


def how_it_ended(code: int) -> str:
    """What the return code of a process says."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def culprit(codes: Sequence[int | None]) -> int | None:
    """The process that died, or None. Of several, one that was killed: the others follow it."""
    dead = [index for index, code in enumerate(codes) if code]
    aborted = (1, -signal.SIGABRT)  # how a process ends because it has lost another one
    return min(dead, key=lambda index: codes[index] in aborted, default=None)


def wait(children: Sequence["subprocess.Popen[str]"]) -> int:
    """Wait until all have ended or one has failed: exit code 0 or 1."""
    while True:
        codes = [child.poll() for child in children]
        failed = culprit(codes)
        if failed is not None:
            code = codes[failed]
            assert code is not None
            time.sleep(LAST_WORDS_SECONDS)
            print(f"launch_local: process {failed} {how_it_ended(code)}: the job ends.", flush=True)
            return 1
        if None not in codes:
            return 0
        time.sleep(0.05)


def launch(command: Sequence[str], processes: int, devices: int) -> int:
    """Run a Python script and its arguments in several processes.

    Args:
        command: The script and its arguments.
        processes: How many.
        devices: Of all of them together.

    Returns:
        0 if all ended well, 1 if one did not.
    """
    port, own = free_port(), devices // processes
    children: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    try:
        for index in range(processes):
            child = subprocess.Popen(
                [sys.executable, *command],
                env=environment_of(index, processes, own, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C comes here only, and all are ended at once
            )
            children.append(child)
            readers.append(threading.Thread(target=forward, args=(index, child), daemon=True))
            readers[-1].start()
        return wait(children)
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()
        for reader in readers:
            reader.join(timeout=5)


def stop(number: int, _: Any) -> None:
    """End as the signal says, and the processes with it."""
    print(f"launch_local: {signal.Signals(number).name}: the job ends.", flush=True)
    sys.exit(128 + number)


def main(arguments: Sequence[str]) -> int:
    """Read the command line and run; returns the exit code."""
    arguments = list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="launch_local.py N [--devices D] -- script.py ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("processes", metavar="N", type=int, help="processes")
    parser.add_argument("--devices", metavar="D", type=int, help="of all together; N by default")
    options = parser.parse_args(arguments[:end])
    command = arguments[end + 1 :]
    devices = options.processes if options.devices is None else options.devices
    if not command:
        parser.error("say what to start: -- script.py ...")
    if options.processes < 1:
        parser.error(f"N={options.processes} is not a number of processes.")
    if devices < 1 or devices % options.processes:
        parser.error(f"--devices {devices} is not a multiple of {options.processes} processes.")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    return launch(command, options.processes, devices)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
