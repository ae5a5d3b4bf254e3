"""Several devices and several processes for examples/gpt.py: mesh, layouts, rows, failures.

    python examples/gpt.py --mesh fsdp=4,tp=2                        # all devices of this machine
    python examples/launch_local.py 2 --devices 4 -- examples/gpt.py --mesh fsdp=2,tp=2

The axes are `dp` (batch), `fsdp` (batch, and parameters with the optimizer's state) and `tp` (heads
and hidden features, as in Megatron). docs/scale.md says how to start it on a cluster.
"""

import contextlib
import functools
import hashlib
import math
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

if TYPE_CHECKING:
    from gpt import Config

AXES = ("dp", "fsdp", "tp")

# A process that is silent for so long counts as dead, and the end waits so long for the others.
HEARTBEAT_SECONDS = 10
SHUTDOWN_SECONDS = 20

# ------------------------------------------------------------------------------------ processes


def join_processes() -> None:
    """Connect the processes of a job, before any computation; a process alone goes on alone.

    Read from the environment: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES
    and JAX_PROCESS_ID. Without them JAX looks for a TPU pod, Slurm, Open MPI or Kubernetes;
    JAX_NUM_PROCESSES=1 keeps it from looking.
    """
    if jax.distributed.is_initialized():
        return
    given: dict[str, Any] = {}
    if "JAX_NUM_PROCESSES" in os.environ:
        count = int(os.environ["JAX_NUM_PROCESSES"])
        if count == 1:
            return
        try:
            given = {
                "coordinator_address": os.environ["JAX_COORDINATOR_ADDRESS"],
                "num_processes": count,
                "process_id": int(os.environ["JAX_PROCESS_ID"]),
            }
        except KeyError as missing:
            msg = f"JAX_NUM_PROCESSES={count} is set, but {missing.args[0]} is not."
            raise ValueError(msg) from None
    # Otherwise JAX takes SIGTERM for a notice to save and go on: a process told to end would not.
    with contextlib.suppress(AttributeError):  # before JAX 0.9 there was no choice
        jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **given,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError:
        if given:
            raise
        # JAX knows no cluster here. `make_mesh` refuses a mesh that needs more devices than one has


def is_first() -> bool:
    """Whether this process is the one that prints and writes what is written once."""
    return jax.process_index() == 0


@contextlib.contextmanager
def failures_end_the_job() -> Iterator[None]:
    """End the process at once when it fails, if there are others.

    Python's normal end would wait for them, and they wait in a computation for this one. They then
    lose the connection, fail too, and end in the same way.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            reason = f"another process has probably died: {str(error).splitlines()[0]}"
        else:
            traceback.print_exception(error)
            reason = f"{type(error).__name__}: {error}"
        print(f"Process {jax.process_index()} of {jax.process_count()} ends: {reason}", flush=True)
        sys.stderr.flush()
        os._exit(1)


def check_agreement(settings: Any) -> None:
    """Compare what decides the losses, settings and corpus, between the processes.

    Raises:
        ValueError: If a process has others than process 0: they would compute different programs.
    """
    digest = hashlib.sha256(repr(settings).encode()).digest()[:4]
    digests = np.ravel(multihost_utils.process_allgather(np.frombuffer(digest, np.uint32)))
    different = [int(index) for index in np.flatnonzero(digests != digests[0])]
    if different:
        msg = f"Processes {different} have other settings or another corpus than process 0."
        raise ValueError(msg)


# ----------------------------------------------------------------------------------------- mesh


def parse_axes(text: str) -> dict[str, int]:
    """Sizes by axis: "fsdp=4,tp=2" to {"fsdp": 4, "tp": 2}.

    Raises:
        ValueError: If it is written otherwise, or an axis is none of AXES.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES:
            msg = f"mesh={text!r}: {name!r} is not one of {', '.join(AXES)}."
            raise ValueError(msg)
        if not size.isdecimal() or int(size) == 0 or name in axes:
            msg = f"mesh={text!r}: give each axis once and a size, such as fsdp=4,tp=2."
            raise ValueError(msg)
        axes[name] = int(size)
    return axes


def check_axes(axes: dict[str, int], config: "Config", devices: Sequence[Any]) -> None:
    """Check that the mesh fits the devices and the settings.

    Raises:
        ValueError: If not; the message names the axis and the setting.
    """
    mesh = f"mesh={config.mesh!r}"
    counts = Counter(device.process_index for device in devices)
    for process, count in sorted(counts.items()):
        if count != counts[0]:
            msg = (
                f"Process {process} has {count} devices, but process 0 has {counts[0]}: "
                "start all processes with the same number."
            )
            raise ValueError(msg)
    needed = math.prod(axes.values())
    if needed != len(devices):
        msg = (
            f"{mesh} takes {needed} devices, but there are {len(devices)}: {counts[0]} in each of "
            f"{len(counts)} processes."
        )
        raise ValueError(msg)
    rows = [name for name in ("dp", "fsdp") if name in axes]
    for setting, names in (
        ("width", ["fsdp"]),
        ("heads", ["tp"]),
        ("batch", rows),
        ("eval_windows", rows),
    ):
        parts = math.prod(axes.get(name, 1) for name in names)
        value = getattr(config, setting)
        if value % parts:
            cut = " times ".join(f"{name}={axes[name]}" for name in names)
            raise ValueError(f"{mesh}: {cut} does not divide {setting}={value}.")


def make_mesh(config: "Config") -> Mesh:
    """The mesh that the settings name, over all devices of all processes.

    Raises:
        ValueError: If it does not fit them; nothing has been computed or sent then.
    """
    axes = parse_axes(config.mesh or "")
    check_axes(axes, config, jax.devices())
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


# --------------------------------------------------------------------------------------- layouts

# The axis of each kernel that `tp` cuts: heads of attention, hidden features of the MLP. A block
# then sends twice: after `out` and after `down`, whose products are summed over the devices.
HEADS_OR_HIDDEN = {"query": 1, "key": 1, "value": 1, "out": 0, "up": 1, "down": 0}
# The axis of the other matrices that has the size of the width.
WIDTH = {"token_embedding": 1, "position_embedding": 1, "lm_head": 0}


def layout(params: Any, mesh: Mesh, *, stored: bool = True) -> Any:
    """Where parameters lie, a tree of shardings, as they are stored or as a block uses them.

    Blocks use them whole along `fsdp`: each device works on its own rows of the batch.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        cut: list[str | None] = [None] * leaf.ndim
        if leaf.ndim > 1:  # scales of norms are whole everywhere
            name = path[-2].key
            free = [WIDTH[name]] if name in WIDTH else list(range(leaf.ndim))
            if "tp" in mesh.shape and name in HEADS_OR_HIDDEN:
                cut[HEADS_OR_HIDDEN[name]] = "tp"
                free.remove(HEADS_OR_HIDDEN[name])
            if "fsdp" in mesh.shape and stored:
                cut[max(free, key=lambda axis: leaf.shape[axis])] = "fsdp"
        return NamedSharding(mesh, P(*cut))

    return jax.tree.map_with_path(sharding, params)


def on_whole_params(loss_of: Callable[..., jax.Array], mesh: Mesh) -> Callable[..., jax.Array]:
    """The same loss; each device gathers the parameters, and its gradients are cut as they are.

    Without it the compiler may cut features of the activations instead, and send those.
    """

    @jax.custom_vjp
    def gathered(params: Any) -> Any:
        return jax.lax.with_sharding_constraint(params, layout(params, mesh, stored=False))

    def forward(params: Any) -> tuple[Any, None]:
        return gathered(params), None

    def backward(_: None, gradients: Any) -> tuple[Any]:
        summed = gathered(gradients)
        return (jax.lax.with_sharding_constraint(summed, layout(gradients, mesh)),)

    gathered.defvjp(forward, backward)
    return lambda params, *others: loss_of(gathered(params), *others)


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Arrays that lie on one device, such as counts of updates, whole on every device instead."""
    whole = NamedSharding(mesh, P())

    def put(leaf: jax.Array) -> jax.Array:
        if isinstance(leaf.sharding, NamedSharding):
            return leaf
        values = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, whole, lambda index: values[index])

    return jax.tree.map(put, tree)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Of batches: their rows are cut over `dp` and `fsdp`."""
    return NamedSharding(mesh, P(tuple(name for name in ("dp", "fsdp") if name in mesh.shape)))


def cut_rows(tokens: np.ndarray, mesh: Mesh) -> jax.Array:
    """Windows that every process has whole, laid out as a batch."""
    return jax.make_array_from_callback(
        tokens.shape, rows_sharding(mesh), lambda index: tokens[index]
    )


class Batches:
    """Batches of windows, laid out on a mesh; a process reads only the rows of its devices."""

    def __init__(self, windows: Any, batch: int, mesh: Mesh):
        """Take `batch` windows after the other from a random-access source."""
        self._windows, self._batch = windows, batch
        self._shape = (batch, *windows[0].shape)
        self._sharding = rows_sharding(mesh)

    def __getitem__(self, step: int) -> jax.Array:
        """The batch of update `step`, the first being 0."""

        @functools.cache  # devices along `tp` hold the same rows
        def read(start: int, stop: int) -> np.ndarray:
            first = step * self._batch
            return np.stack([self._windows[first + row] for row in range(start, stop)])

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self._batch)
            return read(start, stop)

        return jax.make_array_from_callback(self._shape, self._sharding, part)
