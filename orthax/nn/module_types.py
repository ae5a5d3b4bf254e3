"""Exact dimension numbers of Flax NNX models, read from module types instead of names.

A layer's type and its feature counts say what its kernel is in one layer; axes beyond that are
stacked layers (`nnx.vmap`, `nnx.scan`) and count matrices.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from flax import nnx

from orthax.matrices.names import output_head
from orthax.matrices.path_rules import PathRules, WrittenForModel
from orthax.matrices.view import DimensionNumbers, Packed
from orthax.nn.householder_linear import HouseholderLinear

_CALL = "orthax.nn.dimension_numbers"
_KERNELS = (nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose, nnx.Einsum)
_NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm)
if hasattr(nnx, "InstanceNorm"):
    _NORMS += (nnx.InstanceNorm,)
_NEVER = (
    (_KERNELS, ("bias",)),
    (_NORMS, ("scale", "bias")),
    (nnx.Embed, ("embedding",)),
    (nnx.PReLU, ("negative_slope",)),
    (HouseholderLinear, ("input_reflectors", "output_reflectors", "bias")),
)


def dimension_numbers(
    model: nnx.Module,
    exclude: str | re.Pattern[str] | Sequence[str | re.Pattern[str]] | None = None,
) -> PathRules:
    """Tells which parameters of a Flax NNX model are matrices, and how, by module types.

    Kernels of Linear, LinearGeneral, MultiHeadAttention, Conv, ConvTranspose and Einsum, LoRA's two
    factors and recurrent cells are matrices; biases, embeddings, norms and output heads (by name,
    as in `orthax.explain`) go to the fallback. Side by side in one
    kernel, as `orthax.Packed`, are the groups of a convolution and the gates of `OptimizedLSTMCell`
    and `GRUCell`. A depthwise convolution with one output per channel has no matrix. A Param of a
    module that Flax does not define is left to the default rule.

    Args:
      model: The model, with arrays or `jax.ShapeDtypeStruct`s (`nnx.eval_shape`) inside.
      exclude: Regular expression, or several, of paths such as `blocks/0/mlp/up/kernel` that go to
        the fallback too (`re.search`).

    Returns:
      Rules with one exact path per parameter, as `nnx.state(model)` shows it, and the default rule
      for all others. Axes of stacked layers are batch axes: the first, unless sizes say otherwise.

    Raises:
      TypeError: For a model that is not an `nnx.Module`, or `exclude` of another type. ValueError:
        for a kernel whose shape is not that of its module with stacked axes, one that modules read
        differently, or `exclude` that is no regular expression.

    Example:
      >>> import orthax, orthax.nn
      >>> from flax import nnx
      >>> model = nnx.Dict(conv=nnx.Conv(3, 8, kernel_size=(5,), rngs=nnx.Rngs(0)))
      >>> rules = orthax.nn.dimension_numbers(model)
      >>> for row in orthax.explain(nnx.state(model), rules).rows:
      ...     print(row.path, row.shape, row.destination, row.view)
      conv/bias (8,) fallback
      conv/kernel (5, 3, 8) matrices (15, 8)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"{_CALL}: model must be a flax.nnx.Module, got {type(model).__name__}. Linen models "
            "and plain params are read by name, without this call; see orthax.explain(params)."
        )
    # A parameter can belong to several modules (tied weights), under one path: it is read once, and
    # as all of its owners do. Recurrent cells hold plain Linear layers, whose kernels have the
    # gates side by side; only the cell knows how many.
    excluded = _excluded_patterns(exclude)
    nodes = list(nnx.iter_graph(model))
    owners: dict[int, list[tuple[nnx.Module, str]]] = {}
    gates: dict[int, int] = {}
    for _, node in nodes:
        if isinstance(node, nnx.Module):
            for name, child in vars(node).items():
                if isinstance(child, nnx.Variable):
                    owners.setdefault(id(child), []).append((node, name))
        if isinstance(node, nnx.OptimizedLSTMCell | nnx.GRUCell):
            count = 4 if isinstance(node, nnx.OptimizedLSTMCell) else 3
            gates |= {id(node.dense_i): count, id(node.dense_h): count}

    # Exclusions come first, as the first rule decides. Paths are escaped: a rule per parameter.
    rules: list[tuple[str | re.Pattern[str], Any]] = [(pattern, None) for pattern in excluded]
    for keys, node in nodes:
        parts = tuple(map(str, keys))
        path = "/".join(parts)
        if id(node) not in owners or any(re.search(pattern, path) for pattern in excluded):
            continue
        head = output_head(parts) is not None
        dims = None if head else _read_shared(path, node, owners[id(node)], gates)
        if dims is not ...:
            rules.append((WrittenForModel(f"^{re.escape(path)}$"), dims))
    return PathRules(tuple(rules))


def _excluded_patterns(exclude: Any) -> tuple[str | re.Pattern[str], ...]:
    single = isinstance(exclude, str | re.Pattern)
    try:
        patterns = (exclude,) if single else () if exclude is None else tuple(exclude)
        for pattern in patterns:
            re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{_CALL}: exclude={exclude!r} is no regular expression: {error}."
        ) from None
    except TypeError:
        raise TypeError(
            f"{_CALL}: exclude must be a regular expression or a sequence of them, got {exclude!r}."
        ) from None
    return patterns


def _read_shared(
    path: str, parameter: Any, owners: list[tuple[nnx.Module, str]], gates: dict[int, int]
) -> Any:
    """Reads a parameter as its owners do: dimension numbers, None, or `...` if they are unknown."""
    for module, name in owners:
        if any(isinstance(module, types) and name in names for types, names in _NEVER):
            return None
    # Distinct readings of one parameter are keys of a dict: more than one is a contradiction.
    readings: dict[Any, str] = {}
    for module, name in owners:
        layout = _layout(path, module, name, gates.get(id(module), 1))
        if layout is not None:
            dims = _place(path, tuple(parameter.shape), module, layout)
            readings[dims] = type(module).__name__
    if len(readings) > 1:
        raise ValueError(
            f"{_CALL}: '{path}' has shape {tuple(parameter.shape)} and is shared by modules that "
            f"read it differently, {' and '.join(readings.values())}. {_advice(path)}"
        )
    return next(iter(readings), ...)


class _Layout(NamedTuple):
    """How one layer reads its kernel: shapes without stacked axes, and axes of `shape`.

    `sections` are matrices along the last output axis; depthwise kernels have no matrix.
    """

    shape: tuple[int, ...]
    reduction: tuple[int, ...]
    output: tuple[int, ...]
    sections: int = 1
    bias: tuple[int, ...] = ()
    has_matrix: bool = True


def _layout(path: str, module: nnx.Module, name: str, gates: int) -> _Layout | None:
    if isinstance(module, nnx.LoRA):
        if name == "lora_a":
            return _Layout((module.in_features, module.lora_b.shape[-2]), (0,), (1,))
        if name == "lora_b":
            return _Layout((module.lora_a.shape[-1], module.out_features), (0,), (1,))
    if name != "kernel":
        return None
    if isinstance(module, nnx.Linear):
        shape = (module.in_features, module.out_features)
        return _Layout(shape, (0,), (1,), gates, (module.out_features,))
    if isinstance(module, nnx.LinearGeneral):
        batch = tuple(module.batch_axis.values())
        start, end = len(batch), len(batch) + len(module.in_features)
        shape = (*batch, *module.in_features, *module.out_features)
        outputs = tuple(range(end, len(shape)))
        return _Layout(shape, tuple(range(start, end)), outputs, 1, batch + module.out_features)
    if isinstance(module, nnx.Conv | nnx.ConvTranspose):
        return _convolution(module)
    if isinstance(module, nnx.Einsum):
        return _einsum(path, module)
    return None


def _convolution(module: nnx.Conv | nnx.ConvTranspose) -> _Layout:
    groups = getattr(module, "feature_group_count", 1)
    window, bias = tuple(module.kernel_size), (module.out_features,)
    axes = tuple(range(len(window) + 2))
    # Every output reads a whole window: spatial axes are summed over, like the input channels.
    if getattr(module, "transpose_kernel", False):
        shape = (*window, module.out_features, module.in_features)
        return _Layout(shape, axes[:-2] + axes[-1:], axes[-2:-1], 1, bias)
    shape = (*window, module.in_features // groups, module.out_features)
    depthwise = groups > 1 and groups == module.out_features
    return _Layout(shape, axes[:-1], axes[-1:], groups, bias, not depthwise)


def _einsum(path: str, module: nnx.Einsum) -> _Layout:
    """Reads `inputs,kernel->result`: labels that inputs and result both have are batch axes."""
    operands, _, result = (module.einsum_str or "").partition("->")
    inputs, _, labels = operands.partition(",")
    if len(labels) != len(module.kernel_shape) or "." in labels:
        raise ValueError(
            f"{_CALL}: einsum string {module.einsum_str!r} does not name each axis of '{path}' "
            f"with shape {tuple(module.kernel_shape)}. {_advice(path)}"
        )
    # A label of the kernel that the result lacks is summed over; one that only kernel and result
    # have is an output. What all three have counts matrices.
    reduction = tuple(axis for axis, label in enumerate(labels) if label not in result)
    output = tuple(a for a, label in enumerate(labels) if label in result and label not in inputs)
    bias = tuple(module.bias_shape or ())
    return _Layout(tuple(module.kernel_shape), reduction, output, 1, bias)


def _place(
    path: str, shape: tuple[int, ...], module: nnx.Module, layout: _Layout
) -> DimensionNumbers | Packed | None:
    """Turns axes of one layer into axes of the parameter, which may hold a stack of layers."""
    if not (layout.has_matrix and layout.reduction and layout.output):
        return None
    # `kept` numbers the axes of the parameter as the layer alone would have them.
    stack = _stacked_axes(path, shape, module, layout)
    kept = [axis for axis in range(len(shape)) if axis not in stack]
    reduction = tuple(kept[axis] for axis in layout.reduction)
    output = tuple(kept[axis] for axis in layout.output)
    dims = DimensionNumbers(reduction, output)
    return dims if layout.sections == 1 else Packed(dims, output[-1], layout.sections)


def _stacked_axes(
    path: str, shape: tuple[int, ...], module: nnx.Module, layout: _Layout
) -> tuple[int, ...]:
    """Returns the axes without which the shape is that of a single layer."""
    rank, extra = len(shape), len(shape) - len(layout.shape)
    fits = [
        axes
        for axes in itertools.combinations(range(rank), max(extra, 0))
        if tuple(shape[axis] for axis in range(rank) if axis not in axes) == layout.shape
    ]
    # Several choices fit where the stack is as large as a feature axis. Stacks usually lead; the
    # bias, which has the same stacked axes, tells where they do not.
    if len(fits) == 1:
        return fits[0]
    bias = getattr(module, "bias", None)
    leading = tuple(range(extra))
    if leading in fits and (bias is None or tuple(bias.shape) == shape[:extra] + layout.bias):
        return leading
    elsewhere = [axes for axes in fits if axes != leading]
    if len(elsewhere) == 1:
        return elsewhere[0]
    raise ValueError(
        f"{_CALL}: '{path}' has shape {shape}, but one {type(module).__name__} has a kernel of "
        f"shape {layout.shape}; which axes are a stack cannot be told. {_advice(path)}"
    )


def _advice(path: str) -> str:
    return (
        f"Pass exclude=r'{re.escape(path)}' to send it to the fallback. To make it a matrix, put a "
        f"rule before the rules of that call: orthax.PathRules(((r'{re.escape(path)}', "
        "MuonDimensionNumbers(reduction_axis=..., output_axis=...)), *that_call.rules))."
    )
