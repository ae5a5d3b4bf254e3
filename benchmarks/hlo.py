"""Counts what a compiled program sends and multiplies, from its HLO text.

Loops count as often as they run. For tests and benchmarks: `counted(compiled.as_text(), devices)`.
It knows what XLA's CPU and TPU compilers write. `exchanged` counts the all-to-alls that a lowered
program asks for itself, before any compiler: for meshes of more devices than there are.

Not counted: products inside decompositions and triangular solves, and those that a compiler writes
as convolutions (on TPUs). Of a conditional all branches are counted.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
    "collective-broadcast",
    "ragged-all-to-all",
)
SHORT: dict[str, str] = dict(zip(KINDS, ("AG", "AR", "A2A", "CP", "RS", "CB", "RA2A"), strict=True))

_SHAPE = re.compile(r"\b(pred|bf16|[cfsu]\d+)\w*\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_CALLED = re.compile(r"\b(calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of one run of a program.

    Attributes:
      collectives: How many of each kind.
      results: Bytes of their results, of each kind together.
      wire: Bytes that a device sends or receives, if collectives go round a ring of their group.
      dots: Floating point operations in the matrix products of a device.
      endless: Loops of which the text does not say how often they run; they are counted once.
    """

    collectives: dict[str, int]
    results: dict[str, float]
    wire: float
    dots: float
    endless: int

    def __str__(self) -> str:
        counts = [f"{n} {SHORT[kind]}" for kind, n in sorted(self.collectives.items())]
        return " ".join(counts) or "none"


def counted(text: str, devices: int) -> Counts:
    """What the program of a compiled function does on one of so many devices."""
    computations, entry = _computations(text)
    runs: collections.Counter[str] = collections.Counter()
    endless = _visit(computations, entry, 1, runs)
    collectives: collections.Counter[str] = collections.Counter()
    results: dict[str, float] = collections.defaultdict(float)
    wire = dots = 0.0
    for name, times in runs.items():
        lines = {line.name: line for line in computations[name]}
        for line in lines.values():
            if (kind := line.operation.removesuffix("-start")) in KINDS:
                collectives[kind] += times
                size = _result_bytes(line, lines)
                results[kind] += times * size
                wire += times * _wire(kind, size, line.rest, devices)
            elif line.operation == "dot":
                dots += times * _dot_operations(line, lines)
    return Counts(dict(collectives), dict(results), wire, dots, endless)


def exchanged(text: str) -> tuple[int, float]:
    """How many all-to-alls a StableHLO program has, and the bytes a device sends and receives."""
    found = re.findall(r'"stablehlo\.all_to_all".*split_count = (\d+).*-> tensor<([^>]*)>', text)
    wire = 0.0
    for parts, shape in found:
        *sizes, dtype = shape.split("x")
        bits = _bits(dtype) if not dtype.startswith("complex") else 64
        wire += math.prod(map(int, sizes)) * bits / 8 * (1 - 1 / int(parts))
    return len(found), wire


@dataclasses.dataclass(frozen=True)
class _Line:
    """`name = shape operation(rest`."""

    name: str
    shape: str
    operation: str
    rest: str


def _computations(text: str) -> tuple[dict[str, list[_Line]], str]:
    found: dict[str, list[_Line]] = {}
    lines: list[_Line] = []
    entry = ""
    for raw in text.splitlines():
        if start := _COMPUTATION.match(raw):
            lines = found[start[2]] = []
            entry = start[2] if start[1] else entry
        elif line := _INSTRUCTION.match(raw.strip()):
            lines.append(_Line(*line.groups()))
    return found, entry


def _visit(
    computations: dict[str, list[_Line]], name: str, times: int, runs: collections.Counter[str]
) -> int:
    """Adds how often each computation runs; the loops with an unknown number."""
    runs[name] += times
    endless = 0
    for line in computations[name]:
        if line.operation == "while":
            trips = _TRIPS.search(line.rest)
            endless += not trips
            turns = times * (int(trips[1]) if trips else 1)
            called = re.findall(r"\b(?:body|condition)=%?([\w.-]+)", line.rest)
        else:
            turns, called = times, list(_called(line.rest))
        endless += sum(_visit(computations, c, turns, runs) for c in called if c in computations)
    return endless


def _called(rest: str) -> Iterator[str]:
    yield from (name for _, name in _CALLED.findall(rest))
    for names in _BRANCHES.findall(rest):
        yield from (name.strip().lstrip("%") for name in names.split(","))


def _result_bytes(line: _Line, lines: dict[str, _Line]) -> float:
    """Of what a collective returns; one that only starts says it where it is done."""
    shape = line.shape
    if line.operation.endswith("-start"):
        ends = line.operation.removesuffix("start") + "done"
        done = [d for d in lines.values() if d.operation == ends]
        # An all-reduce that starts has the shape of its result, others a tuple with what came.
        shape = next((d.shape for d in done if re.search(rf"%?{line.name}\b", d.rest)), shape)
    return sum(_bits(kind) * _entries(dims) / 8 for kind, dims in _SHAPE.findall(shape))


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))


def _entries(dims: str) -> int:
    return math.prod(int(n) for n in dims.split(",") if n)


def _wire(kind: str, size: float, rest: str, devices: int) -> float:
    members = group_size(rest, devices)
    part = 1 - 1 / members
    return size * {"all-gather": part, "all-to-all": part, "all-reduce": 2 * part}.get(
        kind, members - 1 if kind == "reduce-scatter" else 1
    )


def group_size(rest: str, devices: int) -> int:
    """How many devices take part in each group of a collective."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed[1].count(",") + 1
    if counted_up := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(counted_up[1])
    # Axes of a mesh, or parts of such: 'a':(2)4 is the part of size 4 after one of size 2. How the
    # mesh numbers its devices may stand in between.
    by_mesh = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))?\s*\{([^}]*)\}"
    if mesh := re.search(by_mesh, rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def _dot_operations(line: _Line, lines: dict[str, _Line]) -> int:
    """Two for each product of entries; eight if they are complex."""
    (kind, result), *_ = _SHAPE.findall(line.shape)
    # The first factor's shape stands with its name, or where it is computed.
    first = re.match(r"(?:(\S+\[[\d,]*\]\S*) )?%?([\w.-]+)", line.rest)
    assert first is not None
    (_, dims), *_ = _SHAPE.findall(first[1] or lines[first[2]].shape)
    along = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
    sizes = dims.split(",")
    summed = math.prod(int(sizes[int(i)]) for i in (along[1] if along else "").split(",") if i)
    return (8 if kind.startswith("c") else 2) * _entries(result) * summed
