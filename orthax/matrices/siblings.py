"""What the shapes around a leaf say of its axes: its bias, and the layers in the same module.

A bias has the stacked axes and the outputs of its weight, and nothing else.
"""

import re
from collections.abc import Mapping

from orthax.base.leaves import Path
from orthax.matrices import names
from orthax.matrices.view import DimensionNumbers

Shapes = Mapping[Path, tuple[int, ...]]

# Linen's automatic names; nn.scan and nn.vmap put a prefix before them, nn.remat and nn.jit too.
LINEN_NAME = re.compile(
    r"(?:Scan|Vmap|Checkpoint|Jit)*(Dense|DenseGeneral|Conv|ConvTranspose|ConvLocal|Einsum)_\d+"
)
_WITH_VECTOR_BIAS = ("Dense", "Conv", "ConvTranspose")
_LIFTED = re.compile(r"(?:Checkpoint|Jit)*(?:Scan|Vmap)[A-Z]")  # may stack layers, or share one


def is_lifted(path: Path) -> bool:
    """Whether a leaf lies under nn.scan or nn.vmap, which may stack layers."""
    return any(isinstance(part, str) and _LIFTED.match(part) for part in path)


def bias_of(path: Path, shapes: Shapes) -> tuple[int, ...] | None:
    """The shape of the bias beside a weight, or None."""
    at = max(index for index, part in enumerate(path) if isinstance(part, str))
    for name in names.bias_names(str(path[at])):
        found = shapes.get((*path[:at], name, *path[at + 1 :]))
        if found is not None:
            return found
    return None


def is_beside_a_stack(path: Path, shape: tuple[int, ...], shapes: Shapes) -> bool:
    """Whether the module of a leaf holds a weight with one axis more and the same stacked axes."""
    at = max(index for index, part in enumerate(path) if isinstance(part, str))
    module, stack = path[:at], shape[:-1]
    return any(
        len(other) == len(shape) + 1 and other[: len(stack)] == stack and beside[:at] == module
        for beside, other in shapes.items()
    )


# --- the bias

_Readings = dict[DimensionNumbers, int]  # and how many axes are stacked


def outputs_last(
    path: Path, shape: tuple[int, ...], bias: tuple[int, ...] | None, shapes: Shapes
) -> DimensionNumbers | None:
    """Reads a weight (*stack, *inputs, *outputs) by its bias (*stack, *outputs), if in one way."""
    return None if bias is None else _the_one(_outputs_last(shape, bias), path, shapes)


def outputs_on_the_only_axis(
    shape: tuple[int, ...], bias: tuple[int, ...]
) -> DimensionNumbers | None:
    """Reads a single layer's weight whose outputs, as many as the bias has, fit one axis only."""
    axes = [axis for axis, size in enumerate(shape) if (size,) == bias]
    if len(axes) != 1:
        return None
    return DimensionNumbers(tuple(a for a in range(len(shape)) if a not in axes), axes[0])


def weight_by_bias(
    path: Path, shape: tuple[int, ...], shapes: Shapes
) -> tuple[DimensionNumbers, str] | None:
    """Reads a weight whose outputs come first, as in torch and Equinox, or last, if in one way."""
    bias = bias_of(path, shapes)
    if bias is None:
        return None
    _, parent = names.leaf_and_parent(path)
    transposed = not {"transpose", "transposed", "deconv"}.isdisjoint(names.words(parent))
    vector = _without_ones(bias)  # biases of convolutions may be (outputs, 1, ..., 1)
    found: _Readings = {}
    if not (transposed and len(shape) > 2):  # of those, torch has the inputs first
        found = _outputs_first(shape, bias) | _outputs_last(shape, vector)
    dims = _the_one(found, path, shapes) if found else outputs_on_the_only_axis(shape, vector)
    return None if dims is None else (dims, "outputs as in its bias")


def _outputs_last(shape: tuple[int, ...], bias: tuple[int, ...]) -> _Readings:
    rank, outputs = len(shape), len(bias)
    return {
        DimensionNumbers(
            tuple(range(stack, rank - outputs + stack)), tuple(range(rank - outputs + stack, rank))
        ): stack
        for stack in range(outputs)
        if outputs < rank and shape[:stack] + shape[rank - outputs + stack :] == bias
    }


def _outputs_first(shape: tuple[int, ...], bias: tuple[int, ...]) -> _Readings:
    """Readings as (*stack, *outputs, *inputs), or as Equinox's convolutions.

    These are (*stack, outputs, inputs, *window), with a bias of (*stack, outputs, 1, ..., 1).
    """
    rank, outputs = len(shape), len(bias)
    inputs = tuple(range(outputs, rank))
    found: _Readings = {}
    if inputs and shape[:outputs] == bias:
        found = {
            DimensionNumbers(inputs, tuple(range(stack, outputs))): stack
            for stack in range(outputs)
        }
    window = outputs - len(_without_ones(bias))
    stack = rank - 2 - window
    if outputs == rank - 1 and window and stack >= 0 and shape[: stack + 1] == bias[: stack + 1]:
        found[DimensionNumbers(tuple(range(stack + 1, rank)), (stack,))] = stack
    return found


def _without_ones(bias: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without ones at its end."""
    kept = next((end for end in range(len(bias), 1, -1) if bias[end - 1] != 1), 1)
    return bias[:kept]


def _the_one(readings: _Readings, path: Path, shapes: Shapes) -> DimensionNumbers | None:
    """The only reading, or the only one with as many stacked axes as the layers around."""
    if len(readings) > 1:
        around = _stacks_of_siblings(path, shapes)
        readings = {dims: stack for dims, stack in readings.items() if {stack} == around}
    return next(iter(readings)) if len(readings) == 1 else None


# --- the layers in the same module


def stack_of_convolution(
    path: Path, rank: int, bias: tuple[int, ...] | None, shapes: Shapes
) -> int | None:
    """Returns the number of stacked axes of a convolution, which its bias or its siblings tell.

    Without either, a kernel of three or four axes outside nn.scan and nn.vmap is a plain one.
    """
    if bias is not None:
        return len(bias) - 1
    stacks = _stacks_of_siblings(path, shapes)
    if not stacks and rank <= 4 and not is_lifted(path):
        return 0
    return stacks.pop() if len(stacks) == 1 else None


def _stacks_of_siblings(path: Path, shapes: Shapes) -> set[int]:
    """Returns the numbers of stacked axes of a kernel's siblings, the layers in the same module.

    Biases and scales of norms, Dense and Conv have one axis in a single layer. A stack of modules
    stacks all of them; a lifted layer is stacked for itself. A LayerNorm may have several features.
    """
    if len(path) < 2 or _LIFTED.match(str(path[-2])):
        return set()
    kernel, module = shapes[path], path[:-2]
    stacks: set[int] = set()
    for sibling, shape in shapes.items():
        if sibling[:-2] != module or sibling[-1] not in ("bias", "scale"):
            continue
        layer = str(sibling[-2])
        if _LIFTED.match(layer):
            continue
        linen = LINEN_NAME.fullmatch(layer)
        has_vectors = names.is_norm(layer) or (linen and linen.group(1) in _WITH_VECTOR_BIAS)
        if has_vectors and shape[:-1] == kernel[: len(shape) - 1]:
            stacks.add(len(shape) - 1)
    return stacks
