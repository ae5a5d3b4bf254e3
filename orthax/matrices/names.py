"""What the names in a leaf's path say: the words of a component, heads, embeddings, norms, layers.

A component is split into words at `_`, `-`, digits and camel case (`LMHead_0`: lm, head), and one
that holds `/` or `.`, as Haiku's and Keras's keys do, into components first.
"""

import itertools
import re
from collections.abc import Iterable, Iterator

from orthax.base.leaves import Path

_HEADS_ANYWHERE = frozenset("logit logits classifier unembed unembedder unembedding lmhead".split())
_HEADS = frozenset({"head", "heads"})
_AFTER_A_HEAD = frozenset({"dense", "linear", "proj", "projection"})
_HEADS_OF_ATTENTION = frozenset({"multi", "attention", "attn", "mha", "num"})
_EMBEDDINGS = frozenset("emb embed embedder embedding embeddings posemb posembed wte wpe".split())
_POSITIONS = frozenset({"pos", "position", "positions", "positional"})
_OF_POSITIONS = _POSITIONS | frozenset({"enc", "encoding", "encodings", "ids", "table"})
_NORMS = frozenset({"bn", "gn", "ln", "normalization", "normalisation"})  # and "...norm"
_CONVOLUTIONS = frozenset({"conv", "convs", "convolution", "deconv", "convtranspose"})
_DEPTHWISE = frozenset({"depthwise", "dwconv", "dw"})
_LAYERS = frozenset({"dense", "fc", "linear", "proj", "projection"})
_WEIGHTS = frozenset({"kernel", "kernels", "w", "weight", "weights"})
_VECTORS = frozenset({"b", "bias", "beta", "gain", "gamma", "offset", "scale", "shift"})


def split_path(path: Path) -> Path:
    """The path as names are read: keys that hold `/` or `.` as several components.

    The `array` that a haliax `NamedArray` adds at the end is left out.
    """
    parts = [part for key in path for part in _split_key(key)]
    if len(parts) > 1 and parts[-1] == "array" and isinstance(parts[-2], str):
        parts.pop()
    return tuple(parts)


def _split_key(key: str | int) -> Iterator[str | int]:
    if isinstance(key, int) or not re.search(r"[/.]", key):
        yield key
        return
    named = [part for part in re.split(r"[/.]", key) if part] or [key]
    has_names = any(map(words, named))
    for part in named:
        yield int(part) if has_names and part.isdecimal() else part


def words(name: str) -> list[str]:
    """The words of a component, in lower case, without its digits."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def last_words(path: str) -> set[str]:
    """The words of a leaf's name and of its module's, of a path as it is shown."""
    parts = split_path((path,))
    return {word for part in parts[-2:] if isinstance(part, str) for word in words(part)}


def leaf_and_parent(path: Path) -> tuple[str, str]:
    """The last name in a path and the one before it; positions in lists are no names."""
    names = [part for part in path if isinstance(part, str)]
    return names[-1], names[-2] if len(names) > 1 else ""


def output_head(path: Iterable[str | int]) -> str | None:
    """The word of a path that names an output head, and the component where it stands, or None.

    `logits`, `classifier` and `unembed` count anywhere. `head` and `heads` count as the last word,
    in `lm_head`, and before `dense`, `linear` or `proj(ection)`; where the same component says
    `multi`, `attention`, `attn`, `mha` or `num`, they are the heads of attention.
    """
    for part in split_path(tuple(path)):
        word = _head_word(words(part)) if isinstance(part, str) else None
        if word is not None:
            return f"'{part}'" if part == word else f"'{word}' in '{part}'"
    return None


def _head_word(parts: list[str]) -> str | None:
    for word in parts:
        if word in _HEADS_ANYWHERE:
            return word
    for before, word in itertools.pairwise(parts):
        if (before, word) == ("lm", "head"):
            return "lm_head"
        if (before, word) == ("qa", "outputs"):
            return "qa_outputs"
    if not _HEADS_OF_ATTENTION & set(parts):
        for at, word in enumerate(parts):
            if word in _HEADS and (at == len(parts) - 1 or parts[at + 1] in _AFTER_A_HEAD):
                return word
    return None


def is_embedding(leaf: str, parent: str) -> bool:
    """Whether a leaf is a table of embeddings: its own name says so, or that of its module.

    Not the layers of a module of embeddings: `patch_embed/proj` and `time_embedding/linear_1` are
    linear, and so are leaves called so.
    """
    names = [leaf] if _LAYERS & set(words(leaf)) else [leaf, parent]
    return any(_EMBEDDINGS & set(words(name)) or _says_positions(words(name)) for name in names)


def _says_positions(parts: list[str]) -> bool:
    return bool(_POSITIONS & set(parts)) and _OF_POSITIONS.issuperset(parts)


def is_norm(name: str) -> bool:
    """Whether a module or leaf is called like a normalisation."""
    return any(word in _NORMS or word.endswith("norm") for word in words(name))


def is_convolution(name: str) -> bool:
    """Whether a module is called like a convolution."""
    return not _CONVOLUTIONS.isdisjoint(words(name)) or is_depthwise(name)


def is_depthwise(name: str) -> bool:
    """Whether a module or leaf is called like a convolution of each channel by itself."""
    return not _DEPTHWISE.isdisjoint(words(name))


def is_transposed_of_keras_or_haiku(name: str) -> bool:
    """Whether a module is called as Keras and Haiku call transposed convolutions.

    They hold `(*window, outputs, inputs)`, and Flax, unless told otherwise, the inputs first.
    """
    return re.match(r"conv_?[123]_?d_transpose", name) is not None


def is_weight(leaf: str) -> bool:
    """Whether `kernel`, `w` or `weight` is among the words of a leaf's name."""
    return not _WEIGHTS.isdisjoint(words(leaf))


def is_torch_weight(leaf: str) -> bool:
    """Whether a leaf is called `weight`, `weight_ih`, `in_proj_weight`: outputs may come first."""
    parts = words(leaf)
    return bool(parts) and "weight" in (parts[0], parts[-1])


def is_kernel(leaf: str) -> bool:
    """Whether a leaf is called `kernel` or ends with that word: outputs last, as in Flax."""
    return words(leaf)[-1:] == ["kernel"]


def is_vector_of_a_layer(leaf: str) -> bool:
    """Whether a leaf is called like something that one layer has a vector of: `b_up`, `A_log`.

    A capital `B` is a matrix of a state space model.
    """
    parts = words(leaf)
    is_matrix_of_a_state = leaf.startswith("B") and parts[0] == "b"
    called_so = parts[:1] and parts[0] in _VECTORS and not is_matrix_of_a_state
    return bool(called_so) or parts[:2] == ["a", "log"]


def bias_names(leaf: str) -> list[str]:
    """What the bias of a weight of this name may be called beside it, the likeliest first."""
    if re.match(r"[wW](?![a-zA-Z])", leaf):  # w, w1, w_up
        same = ["b" + leaf[1:]]
        return [*same, "bias"] if leaf in ("w", "W") else same
    renamed = re.sub(r"kernels?|weights?", "bias", leaf)
    return list(dict.fromkeys([renamed, "bias"])) if renamed != leaf else []
