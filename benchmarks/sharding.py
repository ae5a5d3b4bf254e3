"""What does an optimizer send, multiply and hold on a mesh of devices, beside optax.contrib.muon?

    python benchmarks/sharding.py          # about twenty minutes on two cores
    python benchmarks/sharding.py --smoke  # small, in seconds, writes nothing

Three tables. Nothing in them is a time that was measured.

1. On eight virtual devices, counted in compiled programs: collectives (all-gather, all-reduce,
   all-to-all, collective-permute), bytes on the wire of a device, products of a device, temporary
   memory; and, where the program is also run, the largest difference from one device, in parts of
   the largest entry, and updates whose sharding is another than their gradient's. Sets of leaves:
     a  eight kernels (256, 1024);
     b  eight transformer blocks of width 512 with q, k, v (512, 8, 64), out (8, 64, 512);
     c  the same, scanned: one leaf (8, ...) for each kind of kernel.
   Layouts on a mesh x = 4, y = 2: replicated; rows and cols, cut over all devices; TP as Megatron
   does, heads and hidden features; 2-D, those over y and the other axis over x.
2. On paper: Llama 7 B and 70 B in bfloat16, scanned, muon with newton_schulz, on abstract meshes
   fsdp = D / 8, tp = 8. Counted: the all-to-alls of the lowered program and the products in its
   trace. Modelled, by the constants below: what they take, and the step beside which they do.
3. For TPU v5e, 2x4, without a TPU: compiled by libtpu, if it is installed or TPU_LIBRARY_PATH names
   its file; set a, 2-D. XLA's own estimate of the time, not a measurement.

Bytes are those of rings: what a device sends or receives when n devices exchange b bytes is
b (n - 1) / n, twice that to add them up. Products inside Cholesky factors and triangular solves are
not counted. Writes sharding.json and sharding.png to benchmarks/results.
"""

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import record
import tyro
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from optax.contrib import MuonDimensionNumbers

import orthax
from orthax.linalg import newton_schulz

DEVICES, SIZES, BOTH = 8, (4, 2), ("x", "y")
LAYOUTS = ("replicated", "rows", "cols", "TP", "2-D")
KINDS = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
RANK = 64
TITLES = ("virtual devices", "on paper", "TPU v5e 2x4")
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "optax": lambda dims: optax.contrib.muon(0.1, muon_weight_dimension_numbers=dims),
    "muon": lambda dims: orthax.muon(0.1, dimension_numbers=dims),
    "normuon": lambda dims: orthax.normuon(0.1, dimension_numbers=dims),
    "root": lambda dims: orthax.root(0.1, dimension_numbers=dims),
    "trion": lambda dims: orthax.trion(0.1, RANK, dimension_numbers=dims),
    "dct_adamw": lambda dims: orthax.dct_adamw(0.1, RANK, dimension_numbers=dims),
}
# Set b has eight times the leaves of set c, and programs that take as long to compile.
UNROLLED, UNROLLED_LAYOUTS = ("optax", "muon"), ("rows", "TP", "2-D")
COLOURS = {"optax": "#000000", "Auto": "#E69F00", "Explicit": "#0072B2"}  # Okabe and Ito's

# The paper's computer: an H100's bfloat16 peak, the part of it that products reach and the part
# that a step reaches, and what goes in and out of a device in a second.
PEAK, PRODUCTS, STEP, NETWORK, TOKENS = 989e12, 0.6, 0.4, 50e9, 4e6
LLAMA = {  # width, hidden features, width of keys and values, layers
    "7B": (4096, 11008, 4096, 32, 6.74e9),
    "70B": (8192, 28672, 1024, 80, 69e9),
}

# ------------------------------------------------------------------------------------------ leaves

Shapes = dict[str, dict[str, Any]]


def sets(width: int) -> dict[str, Shapes]:
    """Shapes of the leaves of each set."""
    heads = 8
    block = {name: {"kernel": (width, heads, width // heads)} for name in ("query", "key", "value")}
    block |= {"out": {"kernel": (heads, width // heads, width)}}
    block |= {"up": {"kernel": (width, 4 * width)}, "down": {"kernel": (4 * width, width)}}
    blocks = {f"{i}/{name}": leaf for i in range(8) for name, leaf in block.items()}
    scanned = {name: {"kernel": (8, *leaf["kernel"])} for name, leaf in block.items()}
    return {
        "a": {str(i): {"kernel": (width // 2, 2 * width)} for i in range(8)},
        "b": blocks,
        "c": scanned,
    }


def reads_rows(name: str) -> bool:
    """Whether a kernel's inputs are what tensor parallelism cuts."""
    return name.endswith(("out", "down"))


def spec_of(set_name: str, name: str, shape: tuple[int, ...], layout: str) -> P:
    """How a leaf is cut."""
    lead = 1 if set_name == "c" else 0
    entries: list[Any] = [None] * len(shape)
    # Heads, or the only axis of features, and the axis of the width.
    features = lead if reads_rows(name) else lead + 1
    width = len(shape) - 1 if reads_rows(name) else lead
    if layout == "rows":
        entries[lead] = BOTH
    elif layout == "cols":
        entries[-1] = BOTH
    elif layout == "TP":
        entries[features] = BOTH
    elif layout == "2-D":
        entries[features], entries[width] = "y", "x"
    return P(*entries)


def dimension_numbers(set_name: str, shapes: Shapes) -> dict[str, Any]:
    """Which axes of each leaf are the matrix."""
    lead = 1 if set_name == "c" else 0

    def of(name: str, shape: tuple[int, ...]) -> MuonDimensionNumbers:
        axes = tuple(range(lead, len(shape)))
        rows = axes[:-1] if reads_rows(name) else axes[:1]
        return MuonDimensionNumbers(rows, axes[len(rows) :])

    return {name: {"kernel": of(name, leaf["kernel"])} for name, leaf in shapes.items()}


def normal(shapes: Shapes, seed: int) -> Any:
    """Normal numbers in the shapes."""
    rng = np.random.default_rng(seed)
    return {
        name: {"kernel": rng.standard_normal(leaf["kernel"]).astype(np.float32)}
        for name, leaf in shapes.items()
    }


# --------------------------------------------------------------------------------- virtual devices


class Case:
    """One optimizer on one set, with its updates on one device."""

    def __init__(self, set_name: str, shapes: Shapes, optimizer: str, compare: bool):
        self.set_name, self.shapes, self.optimizer = set_name, shapes, optimizer
        self.tx = OPTIMIZERS[optimizer](dimension_numbers(set_name, shapes))
        self.params, self.gradients = normal(shapes, 0), normal(shapes, 1)
        self.expected = None
        if compare:
            state = self.tx.init(self.params)
            self.expected, _ = jax.jit(self.tx.update)(self.gradients, state, self.params)

    def row(self, layout: str, kind: str) -> dict[str, Any]:
        """What is counted on one layout."""
        mesh = jax.make_mesh(SIZES, BOTH, axis_types=(KINDS[kind],) * 2)
        shardings = {
            name: {
                "kernel": NamedSharding(mesh, spec_of(self.set_name, name, leaf["kernel"], layout))
            }
            for name, leaf in self.shapes.items()
        }
        params, gradients = (
            jax.device_put(tree, shardings) for tree in (self.params, self.gradients)
        )
        row: dict[str, Any] = {
            "set": self.set_name,
            "layout": layout,
            "axes": kind,
            "optimizer": self.optimizer,
        }
        try:
            state = self.tx.init(params)
            started = time.perf_counter()
            compiled = jax.jit(self.tx.update).lower(gradients, state, params).compile()
        except Exception as error:  # optax on Explicit axes
            failed = f"raises {type(error).__name__}"
            return row | dict.fromkeys(COUNTED, "") | {"collectives": failed}
        counts = hlo.counted(compiled.as_text() or "", DEVICES)
        row |= {
            "collectives": str(counts),
            "wire (MB)": round(counts.wire / 1e6, 2),
            "products (GFLOP)": round(counts.dots / 1e9, 3),
            "memory (MB)": temporary(compiled),
            "compiled (s)": round(time.perf_counter() - started, 1),
        }
        row |= {"difference": "", "moved": ""}
        if self.expected is not None:
            updates, _ = compiled(gradients, state, params)
            row |= {
                "difference": f"{difference(updates, self.expected):.0e}",
                "moved": moved(updates, gradients),
            }
        return row


COUNTED = (
    "collectives",
    "wire (MB)",
    "products (GFLOP)",
    "memory (MB)",
    "compiled (s)",
    "difference",
    "moved",
)


def temporary(compiled: jax.stages.Compiled) -> float:
    """MB that a device needs beside arguments and results."""
    memory = compiled.memory_analysis()
    return round(getattr(memory, "temp_size_in_bytes", 0) / 1e6, 1)


def difference(ours: Any, theirs: Any) -> float:
    """The largest, in parts of the largest entry of a leaf."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(
        float(np.abs(np.asarray(x) - np.asarray(y)).max() / np.abs(np.asarray(y)).max())
        for x, y in pairs
    )


def moved(updates: Any, gradients: Any) -> str:
    """How many leaves do not lie as they did."""
    pairs = list(zip(jax.tree.leaves(updates), jax.tree.leaves(gradients), strict=True))
    count = sum(not x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in pairs)
    return f"{count} of {len(pairs)}"


def cases(smoke: bool) -> Iterator[tuple[str, Shapes, str, tuple[str, ...], bool]]:
    """Set, shapes, optimizer, layouts, and whether programs are run too."""
    if smoke:
        for optimizer in ("optax", "muon"):
            yield "a", sets(32)["a"], optimizer, ("rows", "replicated"), True
        return
    for set_name, shapes in sets(512).items():
        for optimizer in OPTIMIZERS if set_name != "b" else UNROLLED:
            # In set a cols are what tensor parallelism does.
            layouts = tuple(name for name in LAYOUTS if set_name != "a" or name != "TP")
            layouts = UNROLLED_LAYOUTS if set_name == "b" else layouts
            # Optax's updates of sets b and c take minutes to run.
            yield set_name, shapes, optimizer, layouts, set_name == "a" or optimizer != "optax"


def on_virtual_devices(smoke: bool) -> list[dict[str, Any]]:
    """The first table."""
    rows = []
    for set_name, shapes, optimizer, layouts, compare in cases(smoke):
        case = Case(set_name, shapes, optimizer, compare)
        for layout in layouts:
            for kind in KINDS:
                rows.append(case.row(layout, kind))
                print(" ".join(map(str, rows[-1].values())), file=sys.stderr, flush=True)
    return rows


# ---------------------------------------------------------------------------------------- on paper


def llama(model: str, mesh: Any) -> dict[str, Any]:
    """Abstract scanned kernels in bfloat16: inputs over fsdp and outputs over tp, or vice versa."""
    width, hidden, keys, layers, _ = LLAMA[model]
    column, row = P(None, "fsdp", "tp"), P(None, "tp", "fsdp")
    leaves = {
        "query": ((width, width), column),
        "key": ((width, keys), column),
        "value": ((width, keys), column),
        "out": ((width, width), row),
        "gate": ((width, hidden), column),
        "up": ((width, hidden), column),
        "down": ((hidden, width), row),
    }
    return {
        name: jax.ShapeDtypeStruct(
            (layers, *shape), jnp.bfloat16, sharding=NamedSharding(mesh, spec)
        )
        for name, (shape, spec) in leaves.items()
    }


def products(program: Any) -> float:
    """Floating point operations in the matrix products of a traced program, on one device."""
    total = 0.0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (along, _), _ = equation.params["dimension_numbers"]
            first = equation.invars[0].aval.shape
            summed = math.prod(first[axis] for axis in along)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * summed
        parts = []
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    parts.append(products(inner))
        if parts:
            branches = equation.primitive.name == "cond"
            total += equation.params.get("length", 1) * (max(parts) if branches else sum(parts))
    return total


def on_paper_row(model: str, devices: int) -> dict[str, Any]:
    """Counts of one model on one number of devices, and what they would take."""
    mesh = AbstractMesh((devices // 8, 8), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    tx = orthax.muon(
        0.1,
        orthogonalizer=orthax.orthogonalize(newton_schulz),
        dimension_numbers=MuonDimensionNumbers(1, 2),
    )
    leaves = llama(model, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(tx.update).trace(leaves, jax.eval_shape(tx.init, leaves), leaves)
        exchanges, wire = hlo.exchanged(traced.lower(lowering_platforms=("tpu",)).as_text())
        flops = products(traced.jaxpr.jaxpr)
        # Every device all of it: no mesh.
        alone = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in leaves.items()}
    whole = jax.jit(tx.update).trace(alone, jax.eval_shape(tx.init, alone), alone)
    all_flops = products(whole.jaxpr.jaxpr)
    entries = sum(math.prod(x.shape) for x in leaves.values())
    step = 6 * LLAMA[model][-1] * TOKENS / (STEP * PEAK * devices)
    seconds = {"products": flops / (PRODUCTS * PEAK), "bytes": wire / NETWORK}
    gathered = 2 * entries * (1 - 1 / devices)
    gathering = all_flops / (PRODUCTS * PEAK) + gathered / NETWORK
    return {
        "model": model,
        "devices": devices,
        "counted: all-to-alls": exchanges,
        "counted: MB": round(wire / 1e6),
        "least: MB": round(2 * 2 * entries / devices * (1 - 1 / devices) / 1e6),
        "counted: TFLOP": round(flops / 1e12, 2),
        "least: TFLOP": round(all_flops / devices / 1e12, 2),
        "modelled: products (ms)": round(1e3 * seconds["products"], 1),
        "modelled: bytes (ms)": round(1e3 * seconds["bytes"], 1),
        "modelled: step (s)": round(step, 2),
        "modelled: share of the step": f"{sum(seconds.values()) / step:.2%}",
        "modelled: gathered and repeated": f"{gathering / step:.0%}",
    }


def on_paper(smoke: bool) -> list[dict[str, Any]]:
    """The second table."""
    models = ("7B",) if smoke else tuple(LLAMA)
    return [on_paper_row(m, devices) for m in models for devices in (64, 512)]


# ------------------------------------------------------------------------------------------- TPUs


def tpu_library() -> str | None:
    """The file of libtpu, if there is one."""
    if (named := os.environ.get("TPU_LIBRARY_PATH")) is not None:
        return named
    if importlib.util.find_spec("libtpu") is None:
        return None
    import libtpu  # pyright: ignore[reportMissingImports]

    return libtpu.get_library_path()


def for_tpu() -> list[dict[str, Any]]:
    """The third table: set a, cut in two dimensions, and whole on one device."""
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_LIBRARY_PATH": tpu_library() or ""}
    devices = np.array(topologies.get_topology_desc("v5e:2x4", platform="tpu").devices)
    shapes, rows = sets(512)["a"], []
    for optimizer, make in OPTIMIZERS.items():
        tx = make(dimension_numbers("a", shapes))
        kind = "Auto" if optimizer == "optax" else "Explicit"
        for count in (DEVICES, 1):
            mesh = Mesh(
                devices.reshape(SIZES) if count > 1 else devices[:1].reshape(1, 1),
                BOTH,
                axis_types=(KINDS[kind],) * 2,
            )
            sharding = NamedSharding(mesh, P("x", "y"))
            leaves = jax.tree.map(
                lambda shape, s=sharding: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=s),
                shapes,
                is_leaf=lambda x: isinstance(x, tuple),
            )
            started = time.perf_counter()
            state = jax.tree.map(
                lambda x, s=sharding: x if x.sharding else with_sharding(x, s),
                jax.eval_shape(tx.init, leaves),
            )
            lowered = jax.jit(tx.update).trace(leaves, state, leaves)
            compiled = lowered.lower(lowering_platforms=("tpu",)).compile()
            text = compiled.as_text() or ""
            counts = hlo.counted(text, count)
            seconds = (compiled.cost_analysis() or {}).get("optimal_seconds", -1)
            rows.append(
                {
                    "optimizer": optimizer,
                    "axes": kind,
                    "v5e devices": count,
                    "collectives": str(counts),
                    "wire (MB)": round(counts.wire / 1e6, 2),
                    "XLA's estimate (us)": round(1e6 * seconds, 1) if seconds >= 0 else "",
                    "memory (MB)": temporary(compiled),
                    "HLO lines": text.count("\n"),
                    "compiled (s)": round(time.perf_counter() - started, 1),
                }
            )
            print(" ".join(map(str, rows[-1].values())), file=sys.stderr, flush=True)
    return rows


def with_sharding(x: jax.ShapeDtypeStruct, like: NamedSharding) -> jax.ShapeDtypeStruct:
    """A scalar of the state, a copy on every device; a matrix as `like`."""
    spec = like.spec if x.ndim == len(like.spec) and min(x.shape) > RANK else P()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(like.mesh, spec))


# ---------------------------------------------------------------------------------------- drawing


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Bytes and products of muon and of optax, by layout."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, 2, squeeze=False)
    quantities = {
        "wire (MB)": "MB on the wire of a device",
        "products (GFLOP)": "GFLOP of a device",
    }
    for line, (quantity, title) in zip(panels, quantities.items(), strict=True):
        for axes, set_name in zip(line, "ac", strict=True):
            layouts = [name for name in LAYOUTS if set_name != "a" or name != "TP"]
            bars = (("optax", "optax", "Auto"), ("Auto", "muon", "Auto"))
            bars += (("Explicit", "muon", "Explicit"),)
            for i, (label, optimizer, kind) in enumerate(bars):
                found = {
                    row["layout"]: row[quantity] or 0
                    for row in rows
                    if (row["set"], row["optimizer"], row["axes"]) == (set_name, optimizer, kind)
                }
                heights = [found.get(name, 0) for name in layouts]
                places = [x + 0.27 * (i - 1) for x in range(len(layouts))]
                name = label if label == "optax" else f"orthax.muon, {label}"
                axes.bar(places, heights, 0.25, color=COLOURS[label], label=name)
            axes.set_xticks(range(len(layouts)), layouts)
            axes.set_title(f"set {set_name}: {title}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False, fontsize=9)
    return figure


# -------------------------------------------------------------------------------------------- main


def main(smoke: bool = False, parts: tuple[int, ...] = (1, 2, 3)) -> None:
    """Count and report.

    Args:
      smoke: Small leaves and few of the tables' rows, and no record.
      parts: Which tables.
    """
    with contextlib.suppress(RuntimeError):  # if a backend runs already
        jax.config.update("jax_num_cpu_devices", DEVICES)
    path = record.ROOT / "benchmarks" / "results" / "sharding.json"
    found: dict[str, Any] = {}
    if path.exists() and not smoke:  # tables that are not made now stay, with their commit
        before = json.loads(path.read_text())
        found = {title: before[title] for title in TITLES if title in before}
        found["earlier"] = {title: before["commit"] for title in found} | before.get("earlier", {})
    for part in parts:
        found.get("earlier", {}).pop(TITLES[part - 1], None)
    if 1 in parts:
        found["virtual devices"] = on_virtual_devices(smoke)
        print(record.table(found["virtual devices"]), "\n")
    if 2 in parts:
        found["on paper"] = on_paper(smoke)
        print(record.table(found["on paper"]), "\n")
    if 3 in parts and not smoke:
        if tpu_library() is None:
            print("libtpu is not installed: no table for TPUs.")
        else:
            found["TPU v5e 2x4"] = for_tpu()
            print(record.table(found["TPU v5e 2x4"]))
    if not smoke:
        record.write("sharding", found)
        if 1 in parts:
            draw(found["virtual devices"]).savefig(path.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
