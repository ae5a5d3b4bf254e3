"""Exact dimension numbers of Flax NNX models, read from module types instead of names.

A layer's type and its feature counts say what its kernel is in one layer; axes beyond that are
stacked layers (`nnx.vmap`, `nnx.scan`) and count matrices.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from orthax.base import check
from orthax.base.warn import warn
from orthax.matrices.layer_layout import Layout, excluded_patterns, place
from orthax.matrices.names import output_head
from orthax.matrices.path_rules import PathRules, WrittenForModel
from orthax.nn.householder_linear import HouseholderLinear

_CALL = "orthax.nn.dimension_numbers"
_KERNELS = (nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose, nnx.Einsum)
_NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm)
if hasattr(nnx, "InstanceNorm"):
    _NORMS += (nnx.InstanceNorm,)
_HEADS_OF = ("query", "key", "value")
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
    *,
    per_head: bool = False,
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
      per_head: Whether each head of query, key and value is a matrix of its own, (features, size),
        as in Kimi's and torchtitan's Muon; the heads are a batch axis. That is so for
        MultiHeadAttention and for every LinearGeneral of two output features called `query`, `key`
        or `value`; it warns if there is none. Heads in a Linear kernel need a rule, such as
        `orthax.Packed(MuonDimensionNumbers(0, 1), axis=1, sections=heads)`.

    Returns:
      Rules with one exact path per parameter, as `nnx.state(model)` shows it, and the default rule
      for all others. Axes of stacked layers are batch axes: the first, unless sizes say otherwise.

    Raises:
      TypeError: For a model that is not an `nnx.Module`, or another argument of a wrong type.
      ValueError: For a kernel whose shape is not that of its module with stacked axes, one that
        modules read differently, or `exclude` that is no regular expression.

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
    excluded = excluded_patterns(_CALL, exclude)
    nodes = list(nnx.iter_graph(model))
    check.flag(f"{_CALL}: per_head", per_head)
    owners: dict[int, list[tuple[nnx.Module, str]]] = {}
    with_heads: set[int] = set()
    gates: dict[int, int] = {}
    for _, node in nodes:
        if isinstance(node, nnx.Module):
            for name, child in vars(node).items():
                if isinstance(child, nnx.Variable):
                    owners.setdefault(id(child), []).append((node, name))
                elif per_head and name in _HEADS_OF and _has_heads(child):
                    with_heads.add(id(child))
        if isinstance(node, nnx.OptimizedLSTMCell | nnx.GRUCell):
            count = 4 if isinstance(node, nnx.OptimizedLSTMCell) else 3
            gates |= {id(node.dense_i): count, id(node.dense_h): count}
    if per_head and not with_heads:
        warn(
            f"{_CALL}: per_head=True, but no LinearGeneral of two output features (heads, size) is "
            "called query, key or value. For other layers write a rule with orthax.Packed."
        )
    read = functools.partial(_layout, gates=gates, with_heads=with_heads)

    # Exclusions come first, as the first rule decides. Paths are escaped: a rule per parameter.
    rules: list[tuple[str | re.Pattern[str], Any]] = [(pattern, None) for pattern in excluded]
    for keys, node in nodes:
        parts = tuple(map(str, keys))
        path = "/".join(parts)
        if id(node) not in owners or any(re.search(pattern, path) for pattern in excluded):
            continue
        head = output_head(parts) is not None
        dims = None if head else _read_shared(path, node, owners[id(node)], read)
        if dims is not ...:
            rules.append((WrittenForModel(f"^{re.escape(path)}$"), dims))
    return PathRules(tuple(rules))


def _read_shared(
    path: str,
    parameter: Any,
    owners: list[tuple[nnx.Module, str]],
    read: Callable[[str, nnx.Module, str], Layout | None],
) -> Any:
    """Reads a parameter as its owners do: dimension numbers, None, or `...` if they are unknown."""
    for module, name in owners:
        if any(isinstance(module, types) and name in names for types, names in _NEVER):
            return None
    # Distinct readings of one parameter are keys of a dict: more than one is a contradiction.
    readings: dict[Any, str] = {}
    for module, name in owners:
        layout = read(path, module, name)
        if layout is not None:
            bias = getattr(module, "bias", None)
            bias = None if bias is None else tuple(bias.shape)
            shape, kind = tuple(parameter.shape), type(module).__name__
            dims = place(f"{_CALL}: '{path}'", shape, bias, kind, layout, _advice(path))
            readings[dims] = kind
    if len(readings) > 1:
        raise ValueError(
            f"{_CALL}: '{path}' has shape {tuple(parameter.shape)} and is shared by modules that "
            f"read it differently, {' and '.join(readings.values())}. {_advice(path)}"
        )
    return next(iter(readings), ...)


def _has_heads(child: Any) -> bool:
    return isinstance(child, nnx.LinearGeneral) and len(child.out_features) == 2


def _layout(
    path: str, module: nnx.Module, name: str, gates: dict[int, int], with_heads: set[int]
) -> Layout | None:
    if isinstance(module, nnx.LoRA):
        if name == "lora_a":
            return Layout((module.in_features, module.lora_b.shape[-2]), (0,), (1,))
        if name == "lora_b":
            return Layout((module.lora_a.shape[-1], module.out_features), (0,), (1,))
    if name != "kernel":
        return None
    if isinstance(module, nnx.Linear):
        shape = (module.in_features, module.out_features)
        return Layout(shape, (0,), (1,), gates.get(id(module), 1), (module.out_features,))
    if isinstance(module, nnx.LinearGeneral):
        batch = tuple(module.batch_axis.values())
        start, end = len(batch), len(batch) + len(module.in_features)
        shape = (*batch, *module.in_features, *module.out_features)
        outputs = tuple(range(end + (id(module) in with_heads), len(shape)))
        return Layout(shape, tuple(range(start, end)), outputs, 1, batch + module.out_features)
    if isinstance(module, nnx.Conv | nnx.ConvTranspose):
        return _convolution(module)
    if isinstance(module, nnx.Einsum):
        return _einsum(path, module)
    return None


def _convolution(module: nnx.Conv | nnx.ConvTranspose) -> Layout:
    groups = getattr(module, "feature_group_count", 1)
    window, bias = tuple(module.kernel_size), (module.out_features,)
    axes = tuple(range(len(window) + 2))
    # Every output reads a whole window: spatial axes are summed over, like the input channels.
    if getattr(module, "transpose_kernel", False):
        shape = (*window, module.out_features, module.in_features)
        return Layout(shape, axes[:-2] + axes[-1:], axes[-2:-1], 1, bias)
    shape = (*window, module.in_features // groups, module.out_features)
    depthwise = groups > 1 and groups == module.out_features
    return Layout(shape, axes[:-1], axes[-1:], groups, bias, not depthwise)


def _einsum(path: str, module: nnx.Einsum) -> Layout:
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
    return Layout(tuple(module.kernel_shape), reduction, output, 1, bias)


def _advice(path: str) -> str:
    return (
        f"Pass exclude=r'{re.escape(path)}' to send it to the fallback. To make it a matrix, put a "
        f"rule before the rules of that call: orthax.PathRules(((r'{re.escape(path)}', "
        "MuonDimensionNumbers(reduction_axis=..., output_axis=...)), *that_call.rules))."
    )
