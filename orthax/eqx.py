"""What orthax knows about Equinox. Needs the extra `orthax[equinox]`; `import orthax` loads none.

Dimension numbers of Equinox models, read from module types instead of names: a `weight` of Equinox
is (out, in), the other way round than a `kernel` of Flax.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, KeyPath, keystr

from orthax.base import check
from orthax.base.leaves import path_of, path_text
from orthax.base.warn import warn
from orthax.matrices.layer_layout import Layout, excluded_patterns
from orthax.matrices.layer_layout import place as stacked
from orthax.matrices.names import output_head
from orthax.matrices.view import DimensionNumbers, Packed

__all__ = ["dimension_numbers"]


def __dir__() -> list[str]:
    return __all__


_CALL = "orthax.eqx.dimension_numbers"
_NORMS = (eqx.nn.LayerNorm, eqx.nn.RMSNorm, eqx.nn.GroupNorm, eqx.nn.BatchNorm)
_CELLS = (eqx.nn.GRUCell, eqx.nn.LSTMCell)
_NEVER = (
    ((eqx.nn.Linear, eqx.nn.Conv, eqx.nn.ConvTranspose, eqx.nn.LSTMCell), ("bias",)),
    ((eqx.nn.GRUCell,), ("bias", "bias_n")),
    (_NORMS, ("weight", "bias")),
    ((eqx.nn.Embedding,), ("weight",)),
    ((eqx.nn.PReLU,), ("negative_slope",)),
    ((eqx.nn.WeightNorm,), ("g",)),
)
_HEADS_OF = ("query_proj", "key_proj", "value_proj")
_LINEAR = (eqx.nn.Linear, eqx.nn.WeightNorm, eqx.nn.SpectralNorm)  # or around one


def dimension_numbers(
    model: Any,
    exclude: str | re.Pattern[str] | Sequence[str | re.Pattern[str]] | None = None,
    *,
    per_head: bool = False,
) -> Any:
    """Tells which parameters of an Equinox model are matrices, and how, by module types.

    Weights of Linear, Conv and ConvTranspose, MultiheadAttention and recurrent cells are matrices
    with the outputs first; biases, embeddings, norms and output heads (by their name, as in
    `orthax.explain`) go to the fallback. Side by side in one weight, as `orthax.Packed`, are the
    groups of a convolution and the gates of GRUCell and LSTMCell. A depthwise convolution with one
    output per channel has no matrix. In WeightNorm and SpectralNorm a weight is what its layer says
    it is, and with Shared an embedding if either of its uses is one.

    Args:
      model: An `equinox.Module` or a tree of such, with arrays or `jax.ShapeDtypeStruct`s
        (`eqx.filter_eval_shape`) inside; a whole model or a filtered one.
      exclude: Regular expression, or several, of paths such as `layers/0/weight` that go to the
        fallback too (`re.search`).
      per_head: Whether each head of query, key and value in MultiheadAttention is a matrix of its
        own, (size, features), as in Kimi's and torchtitan's Muon. It warns if there is none.

    Returns:
      A tree in the form of the model, of `MuonDimensionNumbers`, `orthax.Packed` and None
      (fallback), for params such as `eqx.filter(model, eqx.is_inexact_array)`; change single ones
      with `eqx.tree_at`. Axes of stacked layers (`eqx.filter_vmap`) are batch axes: the first,
      unless sizes say otherwise. In `optax.inject_hyperparams`, list it in `static_args`.

    Raises:
      TypeError: For a model without an `equinox.Module`, or another argument of a wrong type.
      ValueError: For an array of two or more axes that no layer of Equinox holds, a weight whose
        shape is not that of its layer with stacked axes, or `exclude` that is no regular
        expression. It names the path.

    Example:
      >>> import equinox as eqx, jax, orthax, orthax.eqx
      >>> model = eqx.nn.MLP(4, 3, width_size=8, depth=1, key=jax.random.key(0))
      >>> params = eqx.filter(model, eqx.is_inexact_array)
      >>> print(orthax.explain(params, orthax.eqx.dimension_numbers(model)))
      path             shape   view    batch  fan_in  fan_out  destination  reason
      layers/0/weight  (8, 4)  (4, 8)  1      4       8        matrices     the given value
      layers/0/bias    (8,)                                    fallback     the given value
      layers/1/weight  (3, 8)  (8, 3)  1      8       3        matrices     the given value
      layers/1/bias    (3,)                                    fallback     the given value
    """
    if not any(map(_is_module, jax.tree.leaves(model, is_leaf=_is_module))):
        raise TypeError(
            f"{_CALL}: model must be an equinox.Module or a tree of such, got "
            f"{type(model).__name__}. Plain params are read by name; see orthax.explain(params)."
        )
    check.flag(f"{_CALL}: per_head", per_head)
    if per_head and not any(map(_is_attention, jax.tree.leaves(model, is_leaf=_is_attention))):
        warn(f"{_CALL}: per_head=True, but the model has no equinox.nn.MultiheadAttention.")
    read = _Reader(excluded_patterns(_CALL, exclude), per_head)
    return jax.tree.structure(model).unflatten(read(model, _Place()))


def _is_module(x: object) -> bool:
    return isinstance(x, eqx.Module)


def _is_attention(x: object) -> bool:
    return isinstance(x, eqx.nn.MultiheadAttention)


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape")


class _Place(NamedTuple):
    """Where a part of a model stands: its path and the module around it.

    Attributes:
      keys: The path.
      owner: The innermost module that holds it, or None; `field`: the module's field that it is.
      heads: Number of heads that a Linear is for.
    """

    keys: KeyPath = ()
    owner: Any = None
    field: str = ""
    heads: int = 1

    def below(self, keys: KeyPath, node: Any, *, per_head: bool) -> "_Place":
        """The place of a child of `node`, which stands here."""
        keys = self.keys + keys
        if not _is_module(node):
            return _Place(keys, self.owner)
        field = getattr(keys[-1], "name", "")
        if per_head and _is_attention(node) and field in _HEADS_OF:
            return _Place(keys, node, field, node.num_heads)
        return _Place(keys, node, field, self.heads if isinstance(node, _LINEAR) else 1)


class _Reader(NamedTuple):
    """Reads a model, or a part of it, leaf by leaf in the order of `jax.tree.leaves`."""

    excluded: tuple[Any, ...]
    per_head: bool

    def __call__(self, node: Any, place: _Place) -> list[Any]:
        children = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
        if len(children) == 1 and not children[0][0]:
            return [self.leaf(node, place)]
        if isinstance(node, eqx.nn.StateIndex):  # statistics, until `make_with_state`
            return [None] * len(jax.tree.leaves(node))
        below = [
            dims
            for keys, child in children
            if child is not None
            for dims in self(child, place.below(keys, node, per_head=self.per_head))
        ]
        return self.shared(node, place, below) if isinstance(node, eqx.nn.Shared) else below

    def leaf(self, leaf: Any, place: _Place) -> DimensionNumbers | Packed | None:
        """Decides one leaf."""
        path = path_text(place.keys)
        if not (_is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.ndim > 1):
            return None
        if output_head(path_of(place.keys)) or any(re.search(p, path) for p in self.excluded):
            return None
        owner, field = place.owner, place.field
        if any(isinstance(owner, types) and field in names for types, names in _NEVER):
            return None
        where, shape, layout = f"{_CALL}: '{path}'", tuple(leaf.shape), _layout(place)
        if layout is None:
            holder = "no module" if owner is None else type(owner).__name__
            raise ValueError(
                f"{where} has shape {shape} and is held by {holder}, not by a layer of Equinox, "
                f"which would say what axes are its matrix. {_advice(place.keys)}"
            )
        bias: Any = getattr(owner, "bias", None)
        bias = tuple(bias.shape) if _is_array(bias) else None
        return stacked(where, shape, bias, type(owner).__name__, layout, _advice(place.keys))

    def shared(self, node: eqx.nn.Shared, place: _Place, own: list[Any]) -> list[Any]:
        """Sends parameters that also stand where there is no matrix to the fallback.

        `own` is the reading of the kept parameters where they are kept: in the embedding or in the
        head that is tied to it, as the user chose. Here they are read in the other place too.
        """
        if not (callable(node.where) and callable(node.get)):  # filtered away
            return own
        whole, sources = _expanded(node)
        keys = (*place.keys, GetAttrKey("pytree"))
        readings = self(whole, place._replace(keys=keys, owner=node, field="pytree"))
        never: set[int] = set()
        for leaf, dims in zip(jax.tree.leaves(whole), readings, strict=True):
            if _is_array(leaf):
                used = next(sources)
                never |= used if dims is None else set()
        return [None if at in never else dims for at, dims in enumerate(own)]


def _expanded(node: eqx.nn.Shared) -> tuple[Any, Iterator[set[int]]]:
    """A Shared's pytree with all uses of shared arrays in place, as shapes.

    With it, for each of its arrays, the positions of the leaves of `node` that it is made of: `get`
    may transpose what it takes.
    """
    leaves, structure = jax.tree.flatten(node)
    arrays = [at for at, leaf in enumerate(leaves) if _is_array(leaf)]
    whole: Any = None

    def expand(*values: Any) -> list[Any]:
        nonlocal whole
        filled = dict(zip(arrays, values, strict=True))
        whole = structure.unflatten([filled.get(at, leaf) for at, leaf in enumerate(leaves)])()
        return [leaf for leaf in jax.tree.leaves(whole) if _is_array(leaf)]

    program = jax.make_jaxpr(expand)(*(leaves[at] for at in arrays)).jaxpr
    made_of = {id(v): {at} for v, at in zip(program.invars, arrays, strict=True)}
    for step in program.eqns:
        of_inputs = set().union(*(made_of.get(id(v), set()) for v in step.invars))
        made_of |= {id(v): of_inputs for v in step.outvars}
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_array(x) else x, whole
    )
    return shapes, (made_of.get(id(v), set()) for v in program.outvars)


def _layout(place: _Place) -> Layout | None:
    """How a layer of Equinox reads the array in one of its fields; None if it is none."""
    layer = place.owner
    if isinstance(layer, eqx.nn.Linear) and place.field == "weight":
        sizes = (layer.out_features, layer.in_features)
        outputs, inputs = (1 if size == "scalar" else size for size in sizes)
        return Layout((outputs, inputs), (1,), (0,), place.heads, (outputs,))
    if isinstance(layer, eqx.nn.Conv | eqx.nn.ConvTranspose) and place.field == "weight":
        # Every output reads a whole window: spatial axes are summed over, like the input channels.
        window, outputs, groups = tuple(layer.kernel_size), layer.out_channels, layer.groups
        shape = (outputs, layer.in_channels // groups, *window)
        bias = (outputs, *(1 for _ in window))
        depthwise = groups > 1 and groups == outputs
        return Layout(shape, tuple(range(1, len(shape))), (0,), groups, bias, not depthwise)
    if isinstance(layer, _CELLS) and place.field in ("weight_ih", "weight_hh"):
        gates = 4 if isinstance(layer, eqx.nn.LSTMCell) else 3
        inputs = layer.input_size if place.field == "weight_ih" else layer.hidden_size
        outputs = gates * layer.hidden_size
        return Layout((outputs, inputs), (1,), (0,), gates, (outputs,))
    return None


def _advice(keys: KeyPath) -> str:
    return (
        f"Pass exclude=r'{re.escape(path_text(keys))}' to send it to the fallback. To make it a "
        f"matrix, replace that: eqx.tree_at(lambda model: model{keystr(keys)}, dims, "
        "MuonDimensionNumbers(reduction_axis=..., output_axis=...), is_leaf=lambda x: x is None)."
    )
