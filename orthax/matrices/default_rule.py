"""The default rule: which leaves of a model are matrices, read off names and shapes alone.

It promises only what these decide. Where they do not, it raises `Undecided` and never guesses.
"""

import functools
import re
from collections.abc import Iterable
from typing import TypeAlias

from orthax.base.leaves import Path, joined
from orthax.matrices import names, siblings
from orthax.matrices.siblings import LINEN_NAME, Shapes
from orthax.matrices.view import DimensionNumbers

_ATTENTION = ("query", "key", "value")
_ATTENTION_OUT = ("out", "attention_output")  # Flax's and Keras's

# Below that a two-axis table of no weight's name holds coefficients, such as (8, 6) of rational
# activations.
_SMALLEST_SIDE = 8
_VECTOR = "at most one axis above 1: a vector"


class Undecided(ValueError):
    """Names and shapes do not say which axes of a leaf are the matrix."""


Verdict: TypeAlias = tuple[DimensionNumbers | None, str] | Undecided
"""Dimension numbers (None: fallback) and the reason; or why there are none."""


@functools.lru_cache(maxsize=64)
def default_verdicts(
    paths: tuple[Path, ...], shapes: tuple[tuple[int, ...], ...]
) -> tuple[Verdict, ...]:
    """What the rule says of every leaf; remembered, as updates have the tree that `init` had."""
    read = list(map(names.split_path, paths))  # Keras's and Haiku's keys hold `/`
    known = dict(zip(read, shapes, strict=True))

    def verdict(path: Path, parts: Path, shape: tuple[int, ...]) -> Verdict:
        try:
            return _default_rule(parts, shape, known, joined(path))
        except Undecided as error:
            return Undecided(*error.args)  # without the frames that the one raised holds

    return tuple(map(verdict, paths, read, shapes))


def _default_rule(
    path: Path, shape: tuple[int, ...], shapes: Shapes, shown: str
) -> tuple[DimensionNumbers | None, str]:
    """Decides one leaf, from the shapes of all: dimension numbers (None: fallback) and the reason.

    Paths are as `names.split_path` gives them. Raises `Undecided`, which names the leaf as `shown`,
    if names and shapes leave more than one reading.
    """
    if len(shape) < 2:
        return None, "fewer than two axes"
    if not any(isinstance(part, str) for part in path):
        return DimensionNumbers(-2, -1), "no name: the last two axes"
    leaf, parent = names.leaf_and_parent(path)
    if excluded := _never_a_matrix(path, leaf, parent, shape, shapes):
        return None, excluded
    known = _reading(path, leaf, parent, shape, shapes)
    if known is not None:
        return known
    if _is_vector(shape):
        return None, _VECTOR
    raise Undecided(_advice(shown, leaf, shape))


def _never_a_matrix(
    path: Path, leaf: str, parent: str, shape: tuple[int, ...], shapes: Shapes
) -> str | None:
    if leaf in ("bias", "scale") or leaf.endswith(("_bias", "_reflectors")):
        return f"named '{leaf}'"
    if leaf != "kernel" and (names.is_norm(parent) or names.is_norm(leaf)):
        return "normalisation"
    bias = siblings.bias_of(path, shapes)
    if names.is_torch_weight(leaf) and bias == shape:
        return "normalisation: a bias of its own shape"
    if head := names.output_head(path):
        return f"output head {head}"
    if names.is_embedding(leaf, parent):
        return "embedding"
    if names.is_vector_of_a_layer(leaf) and siblings.is_beside_a_stack(path, shape, shapes):
        return f"named '{leaf}' in a stack: vectors"
    if _is_vector(shape) and not names.is_weight(leaf):
        return _VECTOR
    small = len(shape) == 2 and 0 < min(shape) < _SMALLEST_SIDE and not siblings.is_lifted(path)
    if names.is_depthwise(leaf) or names.is_depthwise(parent):
        return "depthwise by its name: channels are not mixed"
    if small:
        if any(map(names.is_convolution, (leaf, parent))):
            return "depthwise: a convolution of two axes, (taps, channels)"
        has_name = isinstance(path[-1], str) and "lora" not in names.words(leaf)
        if has_name and not names.is_weight(leaf):
            return f"a side below {_SMALLEST_SIDE} and no 'kernel', 'w' or 'weight' in its name"
    return None


def _is_vector(shape: tuple[int, ...]) -> bool:
    return sum(size != 1 for size in shape) < 2


def _reading(
    path: Path, leaf: str, parent: str, shape: tuple[int, ...], shapes: Shapes
) -> tuple[DimensionNumbers, str] | None:
    """The matrix of a leaf and the reason, if names and shapes leave one reading."""
    if names.is_torch_weight(leaf):
        return siblings.weight_by_bias(path, shape, shapes)
    if len(shape) == 2:
        if names.bias_names(leaf)[:1] == ["b" + leaf[1:]]:  # w, w_up
            bias = siblings.bias_of(path, shapes)
            if bias is not None and bias == shape[:1] != shape[1:]:
                return DimensionNumbers(1, 0), "outputs first, as in its bias"
        if names.is_kernel(leaf) or not siblings.is_lifted(path):
            return DimensionNumbers(0, 1), "two axes: (rows, cols)"
        return None
    if names.is_kernel(leaf):
        return _kernel(path, parent, shape, shapes)
    if siblings.bias_of(path, shapes) is not None:  # `w` beside `b`: Haiku's order, or torch's
        return siblings.weight_by_bias(path, shape, shapes)
    return None


def _kernel(
    path: Path, parent: str, shape: tuple[int, ...], shapes: Shapes
) -> tuple[DimensionNumbers, str] | None:
    """Reads a kernel of three or more axes, by the type of its module or by its bias."""
    rank, bias = len(shape), siblings.bias_of(path, shapes)
    if _is_attention(path, shapes):
        if parent in _ATTENTION_OUT:
            return DimensionNumbers((rank - 3, rank - 2), rank - 1), f"attention '{parent}'"
        return DimensionNumbers(rank - 3, (rank - 2, rank - 1)), f"attention '{parent}'"
    linen = LINEN_NAME.fullmatch(parent)
    module = linen.group(1) if linen else "Conv" if names.is_convolution(parent) else None
    if module == "Dense":
        return DimensionNumbers(rank - 2, rank - 1), "stack of Dense kernels"
    if module == "DenseGeneral":
        dims = siblings.outputs_last(path, shape, bias, shapes)
        return None if dims is None else (dims, "DenseGeneral: outputs as in its bias")
    if module in ("Conv", "ConvTranspose"):
        return _convolution(path, parent, shape, bias, shapes)
    if module is None and bias is not None:
        dims = siblings.outputs_last(path, shape, bias, shapes)
        dims = dims or siblings.outputs_on_the_only_axis(shape, bias)
        return None if dims is None else (dims, "outputs as in its bias")
    return None


def _convolution(
    path: Path, parent: str, shape: tuple[int, ...], bias: tuple[int, ...] | None, shapes: Shapes
) -> tuple[DimensionNumbers, str] | None:
    rank = len(shape)
    if names.is_transposed_of_keras_or_haiku(parent) and shape[-1] == shape[-2]:
        return None
    stack = siblings.stack_of_convolution(path, rank, bias, shapes)
    if stack is None or rank - 2 - stack < 1:
        return None
    kind = f"{rank - 2 - stack}-D convolution"
    if names.is_transposed_of_keras_or_haiku(parent) and bias is None:
        return None
    if bias is not None and bias != shape[:stack] + shape[-1:]:
        dims = siblings.outputs_on_the_only_axis(shape, bias)
        return None if dims is None else (dims, f"{kind}, outputs as in its bias")
    dims = DimensionNumbers(tuple(range(stack, rank - 1)), rank - 1)
    return dims, f"stack of {kind}s" if stack else kind


def _is_attention(path: Path, shapes: Shapes) -> bool:
    """Whether four projections, this one among them, fit together as multi-head attention only.

    Attention has query, key, value (*stack, features, heads, head_dim) and out (*stack, heads,
    head_dim, features). Square linear layers do not fit, unless a stack is as long as they are.
    """
    if len(path) < 2 or path[-2] not in (*_ATTENTION, *_ATTENTION_OUT):
        return False
    beside = {name: shapes.get((*path[:-2], name, "kernel"), ()) for name in _ATTENTION}
    outs = [shapes.get((*path[:-2], name, "kernel"), ()) for name in _ATTENTION_OUT]
    query, key, value, out = kernels = [*beside.values(), max(outs, key=len)]
    if len(query) < 3 or len(set(map(len, kernels))) > 1:
        return False
    stack = len(query) - 3
    heads_fit = query[-2:] == out[-3:-1] and key[-1] == query[-1] and value[-2] == key[-2]
    stacks_fit = len({query[:stack], key[:stack], value[:stack], out[:stack]}) == 1
    a_stack_of_linear_layers_fits = stack == 0 and query[0] == key[0] == value[0] == out[0]
    return heads_fit and stacks_fit and not a_stack_of_linear_layers_fits


def _advice(shown: str, leaf: str, shape: tuple[int, ...]) -> str:
    """What the error says: the finished rule for what the leaf may be."""
    rank = len(shape)
    last = _written(range(rank - 1), rank - 1)
    if names.is_torch_weight(leaf):
        first = _written(range(1, rank), 0)
        choices = [
            (first, "its outputs come first, as in torch and Equinox"),
            (last, "they come last"),
        ]
    elif rank == 2:
        choices = [(last, "it is one matrix (in, out)")]
    else:
        stack = _written([rank - 2], rank - 1)
        choices = [
            (last, "it is a convolution (*window, in, out)"),
            (stack, "it is a stack of matrices (in, out)"),
        ]
    (dims, why), *others = choices
    rules = f"orthax.PathRules(((r'{re.escape(shown)}', {dims}),)) if {why}"
    instead = [f"with {other} instead if {why}" for other, why in others]
    instead.append("with None to send it to the fallback")
    return (
        f"'{shown}' has shape {shape}, and neither names nor shapes decide which axes are its "
        "matrix. Pass dimension_numbers=orthax.nn.dimension_numbers(model) for Flax NNX, "
        "orthax.eqx.dimension_numbers(model) for Equinox, and for Linen and every other tree "
        f"{rules}; {', '.join(instead)}. Axes that are neither count matrices."
    )


def _written(reduction: Iterable[int], output: int) -> str:
    axes = tuple(reduction)
    shown = axes[0] if len(axes) == 1 else axes
    return f"optax.contrib.MuonDimensionNumbers({shown}, {output})"
