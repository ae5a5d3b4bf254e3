"""The default rule: which leaves of a Flax model are matrices, read off names and shapes alone.

It promises only what these decide. Where they do not, it raises `Undecided` and never guesses.
"""

import re
from collections.abc import Mapping

from orthax.base.leaves import Path, joined
from orthax.matrices.view import DimensionNumbers

Shapes = Mapping[Path, tuple[int, ...]]

_HEADS = frozenset({"lm_head", "head", "logits", "classifier"})
_ATTENTION = ("query", "key", "value", "out")
_EMBEDDINGS = frozenset({"emb", "embed", "embedding", "embeddings", "embedder", "wte", "wpe"})
_NORMS = frozenset({"bn", "gn", "ln"})  # and all words that end with "norm"
_CONVOLUTIONS = frozenset({"conv", "convs", "convolution", "deconv", "convtranspose"})
# Linen's automatic names; nn.scan and nn.vmap put a prefix before them, nn.remat and nn.jit too.
_LINEN_NAME = re.compile(
    r"(?:Scan|Vmap|Checkpoint|Jit)*(Dense|DenseGeneral|Conv|ConvTranspose|ConvLocal|Einsum)_\d+"
)
_WITH_VECTOR_BIAS = ("Dense", "Conv", "ConvTranspose")
_LIFTED = re.compile(r"(?:Checkpoint|Jit)*(?:Scan|Vmap)[A-Z]")  # may stack layers, or share one


class Undecided(ValueError):
    """Names and shapes do not say which axes of a leaf are the matrix."""


def default_rule(path: Path, shapes: Shapes) -> tuple[DimensionNumbers | None, str]:
    """Decides one leaf, from the shapes of all: dimension numbers (None: fallback) and the reason.

    Raises `Undecided` if names and shapes leave more than one reading.
    """
    shape = shapes[path]
    if len(shape) < 2:
        return None, "fewer than two axes"
    if not any(isinstance(part, str) for part in path):
        return DimensionNumbers(-2, -1), "no name: the last two axes"
    leaf, parent = str(path[-1]), next((p for p in path[-2::-1] if isinstance(p, str)), "")
    if excluded := _never_a_matrix(path, leaf, parent):
        return None, excluded
    if leaf == "kernel" and len(shape) > 2:
        known = _known_module(path, parent, shape, shapes)
        if known is not None:
            return known
    if len(shape) == 2 and (leaf == "kernel" or not _is_lifted(path)):
        return DimensionNumbers(0, 1), "two axes: (rows, cols)"
    raise Undecided(_advice(path, shape))


def _never_a_matrix(path: Path, leaf: str, parent: str) -> str | None:
    if leaf in ("bias", "scale") or leaf.endswith(("_bias", "_reflectors")):
        return f"named '{leaf}'"
    if leaf != "kernel" and (_is_norm(parent) or _is_norm(leaf)):
        return "normalisation"
    if (_words(parent) | _words(leaf)) & _EMBEDDINGS:
        return "embedding"
    head = output_head(path)
    return f"output head '{head}'" if head else None


def output_head(path: Path) -> str | None:
    """Returns the component of a path that names an output head, or None."""
    return next((str(part) for part in path if part in _HEADS), None)


def _known_module(
    path: Path, parent: str, shape: tuple[int, ...], shapes: Shapes
) -> tuple[DimensionNumbers, str] | None:
    """Reads a kernel of three or more axes whose module type its name tells."""
    rank = len(shape)
    bias = shapes.get((*path[:-1], "bias"))
    if len(path) > 1 and path[-2] in _ATTENTION and _is_attention(path, shapes):
        if parent == "out":
            return DimensionNumbers((rank - 3, rank - 2), rank - 1), "attention 'out'"
        return DimensionNumbers(rank - 3, (rank - 2, rank - 1)), f"attention '{parent}'"
    linen = _LINEN_NAME.fullmatch(parent)
    module = linen.group(1) if linen else "Conv" if _words(parent) & _CONVOLUTIONS else None
    if module == "Dense":
        return DimensionNumbers(rank - 2, rank - 1), "stack of Dense kernels"
    if module == "DenseGeneral" and (split := _split_by_bias(path, shape, bias, shapes)):
        stack, outputs = split
        dims = DimensionNumbers(
            tuple(range(stack, rank - outputs)), tuple(range(rank - outputs, rank))
        )
        return dims, "DenseGeneral: outputs as in its bias"
    if module in ("Conv", "ConvTranspose"):
        stack = _stack_of_convolution(path, rank, bias, shapes)
        if stack is None or rank - 2 - stack < 1:
            return None
        if bias is not None and bias != shape[:stack] + shape[-1:]:
            return None
        kind = f"{rank - 2 - stack}-D convolution"
        dims = DimensionNumbers(tuple(range(stack, rank - 1)), rank - 1)
        return dims, f"stack of {kind}s" if stack else kind
    return None


def _is_attention(path: Path, shapes: Shapes) -> bool:
    """Whether the four projections fit together as multi-head attention and in no other way.

    Attention has query, key, value (*stack, features, heads, head_dim) and out (*stack, heads,
    head_dim, features). Square linear layers do not fit, unless a stack is as long as they are.
    """
    kernels = [shapes.get((*path[:-2], name, "kernel"), ()) for name in _ATTENTION]
    query, key, value, out = kernels
    if len(query) < 3 or len(set(map(len, kernels))) > 1:
        return False
    stack = len(query) - 3
    heads_fit = query[-2:] == out[-3:-1] and key[-1] == query[-1] and value[-2] == key[-2]
    stacks_fit = len({query[:stack], key[:stack], value[:stack], out[:stack]}) == 1
    a_stack_of_linear_layers_fits = stack == 0 and query[0] == key[0] == value[0] == out[0]
    return heads_fit and stacks_fit and not a_stack_of_linear_layers_fits


def _split_by_bias(
    path: Path, shape: tuple[int, ...], bias: tuple[int, ...] | None, shapes: Shapes
) -> tuple[int, int] | None:
    """Returns (stacked axes, output axes) of a DenseGeneral kernel, if its bias has one reading.

    A kernel is (*stack, *inputs, *outputs) and its bias (*stack, *outputs).
    """
    if bias is None or len(bias) >= len(shape):
        return None
    fits = [
        stack
        for stack in range(len(bias))
        if shape[:stack] + shape[len(shape) - len(bias) + stack :] == bias
    ]
    if len(fits) > 1:
        fits = [stack for stack in fits if _stacks_of_siblings(path, shapes) == {stack}]
    return (fits[0], len(bias) - fits[0]) if len(fits) == 1 else None


def _stack_of_convolution(
    path: Path, rank: int, bias: tuple[int, ...] | None, shapes: Shapes
) -> int | None:
    """Returns the number of stacked axes of a convolution, which its bias or its siblings tell.

    Without either, a kernel of three or four axes outside nn.scan and nn.vmap is a plain one.
    """
    if bias is not None:
        return len(bias) - 1
    stacks = _stacks_of_siblings(path, shapes)
    if not stacks and rank <= 4 and not _is_lifted(path):
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
        linen = _LINEN_NAME.fullmatch(layer)
        has_vectors = _is_norm(layer) or (linen and linen.group(1) in _WITH_VECTOR_BIAS)
        if has_vectors and shape[:-1] == kernel[: len(shape) - 1]:
            stacks.add(len(shape) - 1)
    return stacks


def _is_lifted(path: Path) -> bool:
    return any(isinstance(part, str) and _LIFTED.match(part) for part in path)


def _is_norm(name: str) -> bool:
    words = _words(name)
    return bool(words & _NORMS) or any(word.endswith("norm") for word in words)


def _words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def _advice(path: Path, shape: tuple[int, ...]) -> str:
    name = joined(path)
    return (
        f"'{name}' has shape {shape}, and neither names nor shapes decide which axes "
        "are its matrix. Pass dimension_numbers=orthax.nn.dimension_numbers(model) for a Flax NNX "
        f"model, or a rule such as orthax.PathRules(((r'{re.escape(name)}', "
        "MuonDimensionNumbers(reduction_axis=..., output_axis=...)),)), or None in its place to "
        "send it to the fallback. Axes that are neither count matrices."
    )
