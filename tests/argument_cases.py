"""The table of bad arguments: for every public call, what each of its arguments refuses.

An `Argument` is what is tried in one place, bad values and good ones. `number`, `integer`,
`choice`, ... make one from what is accepted, so that a call takes a few lines of `CALLS`. What the
result of a call refuses later, such as leaves of a tree at `init` or `update`, is in `LATER`.
"""

import dataclasses
import functools
import importlib.util
import inspect
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from helpers import OPTIMIZERS
from optax.contrib import MuonDimensionNumbers

import orthax
import orthax.nn
from orthax import conv_penalties, diagnostics, linalg, penalties
from orthax.linalg import coefficients
from orthax.matrices.default_rule import Undecided


def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An array without values: as an argument it is traced, as a leaf it stays what it is."""
    return jax.ShapeDtypeStruct(shape, dtype)


class Bad(NamedTuple):
    """A refused value.

    Attributes:
      value: What is passed.
      kind: Type of the error.
      words: What the message says besides the call and the argument.
      named: What it names instead of the argument, such as the path of a leaf.
    """

    value: Any
    kind: type[Exception]
    words: tuple[str, ...]
    named: str = ""


@dataclasses.dataclass(frozen=True)
class Argument:
    """What an argument refuses and accepts.

    Attributes:
      bad: What is refused.
      good: What is accepted, first something ordinary.
      traced: Whether it is a number whose value may be unknown.
      static: Whether it is a number whose value must be known.
      then: Called with the result, where only that refuses.
    """

    bad: tuple[Bad, ...]
    good: tuple[Any, ...] = ()
    traced: bool = False
    static: bool = False
    then: Callable[[Any], Any] = lambda result: result

    def but(self, *, bad: Any = (), good: Any = (), none: bool = False, then: Any = None):
        """The same with more values; with `none`, None is accepted."""
        kept = tuple(b for b in self.bad if not (none and b.value is None))
        more = ((None,) if none else ()) + tuple(good)
        return dataclasses.replace(
            self, bad=(*kept, *bad), good=self.good + more, then=then or self.then
        )


class Call(NamedTuple):
    """A public call.

    Attributes:
      name: As its messages have it.
      function: The call, or a short form of it with the same arguments.
      good: Arguments that are accepted.
      arguments: What each refuses.
    """

    name: str
    function: Callable[..., Any]
    good: dict[str, Any]
    arguments: dict[str, Argument]


class Row(NamedTuple):
    """One bad value in one place.

    Attributes:
      call: As messages have it.
      argument: Its name, or the path of a leaf, as messages have it.
      run: Function of the value.
      bad: The value and what is said of it.
      when: It is refused, where not at once.
    """

    call: str
    argument: str
    run: Callable[[Any], Any]
    bad: Bad
    when: str = ""

    @property
    def label(self) -> str:
        label = f"{self.call}-{self.argument}-{label_of(self.bad.value)}"
        return f"{label} {self.when}" if self.when else label


def label_of(value: Any) -> str:
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"{value.dtype}{list(value.shape)}"
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    if callable(value) and hasattr(value, "__name__"):
        text = value.__name__
    return " ".join(text.split())[:60]


def wrong(*values: Any, says: tuple[str, ...] = ()) -> tuple[Bad, ...]:
    """Values of the wrong kind."""
    return tuple(Bad(value, TypeError, (f"got {value!r}", *says)) for value in values)


def outside(*values: Any, says: tuple[str, ...] = ()) -> tuple[Bad, ...]:
    """Values of the right kind that are not accepted."""
    return tuple(Bad(value, ValueError, (f"got {value!r}", *says)) for value in values)


# --- kinds of arguments

NAN, INF = float("nan"), float("inf")
VECTOR = np.ones(2, np.float32)


def half_way(count: Any) -> float:
    """A function that is no function of matrices."""
    return 0.5


def number(interval: str, also: str = "", *, none: bool = False, static: bool = False) -> Argument:
    """A number, whose value must be known if it is `static`."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = low + 0.5 if math.isfinite(low) and not math.isfinite(high) else 0.5
    inside = (low + high) / 2 if math.isfinite(low + high) else inside
    says = (f"must be a number in {interval}{also}, got",)
    kinds = ("0.5", True, 1j, (0.5,), VECTOR, None)
    if "schedule" not in also:
        kinds += (half_way,)
    bad = wrong(*kinds, says=says)
    if static:
        bad += (Bad(struct(), TypeError, says),)
    beyond: list[Any] = [NAN]
    good = [inside, np.float32(inside), np.asarray(inside)]
    good += [] if static else [jnp.float32(inside)]
    for end, included, step in (low, interval[0] == "[", -1), (high, interval[-1] == "]", 1):
        if included:
            good += [end, np.float32(end)]
        else:
            beyond.append(end)  # infinity too, where only finite numbers are accepted
        if math.isfinite(end):
            beyond += [end + step, (jnp if step > 0 else np).float32(end + step)]
            good += [int(end)] if included else []
    bad += outside(*beyond, says=says)
    return Argument(bad, tuple(good), traced=not static, static=static).but(none=none)


def schedule(interval: str) -> Argument:
    """A number or a function of the count."""
    argument = number(interval, " or a schedule")
    return argument.but(good=[half_way, optax.constant_schedule(0.5)])


def integer(interval: str = "[1, inf)", *, none: bool = False) -> Argument:
    low, high = (float(end) for end in interval[1:-1].split(","))
    says = (f"must be an integer in {interval}, got",)
    bad = wrong(2.0, 1.5, "2", None, True, (2,), NAN, says=says)
    bad += wrong(jnp.int32(2), says=(*says, "static_args"))
    beyond = [int(low) - 1, np.int64(low - 1)] + ([int(high) + 1] if math.isfinite(high) else [])
    good = [int(low), np.int64(low), np.uint8(low)] + ([int(high)] if math.isfinite(high) else [])
    return Argument(bad + outside(*beyond, says=says), tuple(good)).but(none=none)


def choice(*words: str) -> Argument:
    says = ("must be one of " + ", ".join(map(repr, words)),)
    bad = wrong(None, 2, (words[0],), says=says)
    return Argument(bad + outside(words[0].capitalize(), says=says), words)


def flag() -> Argument:
    bad = wrong(1, 0.0, "True", None, says=("True or False",))
    return Argument(bad, (True, False, np.True_))


def transformation(*, none: bool = False, or_function: bool = False) -> Argument:
    accepted = "an optax transformation" + (" or a function to one" if or_function else "")
    bad = wrong(0.9, "adam", None, (optax.identity(),), says=(f"must be {accepted}",))
    if not or_function:
        bad += wrong(optax.adamw, orthax.orthogonalize, half_way, says=("optax.identity()",))
    return Argument(bad, (optax.identity(),)).but(none=none)


def function(accepted: str = "must be a function of matrices") -> Argument:
    return Argument(wrong("polar", 3, None, VECTOR, says=(accepted,)))


def dtype(*names: str, none: bool = True) -> Argument:
    accepted = ", ".join(["floating dtype", *map(repr, names)])
    bad = wrong(8, "half a byte", 1.5, True, says=(accepted,))
    known = [x for x in (jnp.int32, "uint8", bool, np.dtype("int64")) if x not in names]
    good = ("float32", jnp.bfloat16, np.dtype("float16"), *names)
    argument = Argument(bad + wrong(None) + outside(*known, says=(accepted,)), good)
    return argument.but(none=none)


def arrays(good: Any, says: str = "floating") -> Argument:
    """A floating array."""
    integers = [struct(*good.shape, dtype=d) for d in (jnp.int32, jnp.bool_)]
    bad = [Bad(x, TypeError, (f"dtype {x.dtype}", says)) for x in integers]
    others = ([[1.0, 2.0]], 2.0, np.float32(2), None, "matrix")
    bad += [Bad(x, TypeError, ("must be an array", f"got {type(x).__name__}")) for x in others]
    return Argument(tuple(bad), (good,))


def matrices(*shape: int, tall: bool = False, real: bool = False) -> Argument:
    """Matrices (..., m, n)."""
    shape = shape or (4, 3)
    argument = arrays(struct(*shape), "must be real floating" if real else "floating")
    bad = [Bad(struct(*s), ValueError, (f"shape {s}", "two axes")) for s in ((), (3,))]
    bad.append(Bad(struct(3, dtype=jnp.int32), TypeError, ("dtype int32", "floating")))
    good = [struct(2, *shape), struct(*shape, dtype=jnp.bfloat16)]
    waves = struct(*shape, dtype=jnp.complex64)
    if real:
        bad.append(Bad(waves, TypeError, ("dtype complex64", "must be real floating")))
    else:
        good.append(waves)
    if tall:
        bad.append(Bad(struct(2, 3), ValueError, ("shape (2, 3)", "more columns than rows")))
    return argument.but(bad=bad, good=good)


def table() -> Argument:
    """The coefficients of Newton-Schulz steps."""
    says = ("three finite numbers (a, b, c)",)
    letters, truths = (("1", "2", "3"),), ((True, False, True),)
    bad = wrong("muon", None, letters, truths, ((1j, 1.0, 2.0),), says=says)
    ragged = ((3.4, -4.7, 2.0), (1.5, -0.5))
    bad += outside((), (3.4, -4.7, 2.0), ((1.5, -0.5),), ragged, ((1.0, NAN, 0.0),), says=says)
    return Argument(bad, (coefficients.MUON, [[1, 2, 3]], np.ones((1, 3)), [np.ones(3)]))


def sizes(axes: int = 2) -> Argument:
    """One integer, or one for each spatial axis."""
    accepted = ("must be an integer",)
    bad = wrong(1.5, 2.0, None, True, says=accepted)
    bad += tuple(
        Bad(value, TypeError, (f"got {value!r}",)) for value in ("2", np.asarray(2.0), jnp.ones(()))
    )
    ones = (1,) * (axes - 1)
    for entry in (2.0, "2", None, True):
        bad += (Bad((entry, *ones), TypeError, (*accepted, f"got {entry!r}")),)
    for value in (0, -1, np.int64(0)):
        bad += outside(value, says=(*accepted, "[1, inf)"))
        bad += (Bad((value, *ones), ValueError, (f"got {value!r}", *accepted)),)
    bad += outside((1,) * (axes + 1), (), says=())
    return Argument(bad, (4, np.int64(4), (4,) * axes, [4] * axes, np.full(axes, 4)))


def padding(axes: int = 2) -> Argument:
    says = ('"CIRCULAR", "SAME", "VALID", "CAUSAL"', "integer")
    bad = wrong(None, 1.5, 2.0, True, [1.0] * axes, [None] * axes, [(0, 1.5)] * axes, says=says)
    values = ["same", "REFLECT", "", -1, (1,) * (axes + 1), [(1,)] * axes, [(0, -1)] * axes]
    good = ["CIRCULAR", "SAME", "VALID", 0, np.int64(1), [1] * axes, ((1, 0),) * axes]
    (values if axes > 1 else good).append("CAUSAL")
    return Argument(bad + outside(*values, says=says), tuple(good))


def rank(*, injectable: bool = True) -> Argument:
    """The rank of `low_rank`; a number that is no integer is a fraction."""
    says = ("must be an integer", "a fraction in (0, 1]", "function")
    bad = wrong("8", None, True, (8,), 1j, says=says)
    bad += wrong(jnp.int32(8), jnp.ones(2), says=(*says, "static_args") if injectable else says)
    beyond = (0, -1, 0.0, -0.5, 1.5, NAN, INF, np.float32(2), np.int64(0))
    good = (2, np.int64(2), 1, 0.5, np.float32(0.5), 1.0, lambda m, n: 2)
    return Argument(bad + outside(*beyond, says=says), good)


# --- trees

KERNELS = {"dense": [struct(4, 6)]}
ZEROS = {"dense": [jnp.zeros((4, 6))]}
LEAF = "'dense/0'"
ALL = MuonDimensionNumbers(0, 1)


def tree_of(leaf: Any) -> Any:
    return {"dense": [leaf]}


def starting(result: Any) -> Any:
    """`init` of the transformation that came."""
    return result.init(KERNELS)


def updating(result: Any) -> Any:
    """A measure of updates, or a transformation's `update`, with params."""
    return result.update(KERNELS, result.init(KERNELS), KERNELS)


def measuring(result: Any) -> Any:
    return result(KERNELS)


def dimension_numbers(then: Callable[[Any], Any], *, every: bool = False) -> Argument:
    """Dimension numbers for the leaf of `KERNELS`, which are looked at when it comes.

    What is wrong with them is found in one place for all calls: `every` shows it all, for one.
    """

    def of_leaf(dims: Any, kind: type[Exception], *words: str) -> Bad:
        return Bad(dims, kind, words, LEAF)

    def of_axes(reduction: Any, output: Any, kind: type[Exception], *words: str) -> Bad:
        shown = f"(reduction_axis={reduction}, output_axis={output})"
        return of_leaf(MuonDimensionNumbers(reduction, output), kind, "shape (4, 6)", shown, *words)

    def of_sections(axis: Any, sections: Any, kind: type[Exception], *words: str) -> Bad:
        packed = orthax.Packed(ALL, axis, sections)
        return of_leaf(packed, kind, "shape (4, 6)", str(packed), *words)

    bad = [
        of_axes(0, 2, ValueError, "name axis 2"),
        of_axes(-3, 1, ValueError, "name axis -3"),
        of_axes((0, 1), 1, ValueError, "name an axis twice"),
        of_axes(1, -1, ValueError, "name an axis twice"),
        of_axes((), 1, ValueError, "name no axis"),
        of_axes(0.5, 1, TypeError, "name axis 0.5", "an axis is an int"),
        of_axes("in", 1, TypeError, "name axis 'i"),
        of_axes(True, 0, TypeError, "name axis True"),
        of_axes(None, 1, TypeError, "name axis None"),
        of_sections(1, 4, ValueError, "4 equal sections of 6 entries"),
        of_sections(1, 0, ValueError, "0 equal sections"),
        of_sections(1, (4, 3), ValueError, "7 entries in all, not 6"),
        of_sections(1, (6, 0), ValueError),
        of_sections(1, (1.5, 4.5), TypeError, "sections are an int"),
        of_sections(1, "66", TypeError, "sections are an int"),
        of_sections(2, 2, ValueError, "name axis 2"),
        of_sections((0, 1), 2, TypeError, "name axis (0, 1)"),
        of_leaf(orthax.Packed(None, 1, 2), TypeError, "are None", "accepted are"),
        of_leaf(3, TypeError, "are 3", "accepted are MuonDimensionNumbers"),
        of_leaf("spectral", TypeError, "are 'spectral'", "accepted are"),
        of_leaf(orthax.PathRules((("d", "x"),)), TypeError, "are 'x'", "accepted are"),
    ]
    if not every:
        bad = bad[::9]
    trees = ({"b": ALL}, {"dense": [ALL, None]}, {"dense": {"0": ALL}}, {"dense": (0, 1)})
    trees = trees if every else trees[:1]
    bad += [Bad(tree, ValueError, ("must have the tree structure",)) for tree in trees]
    return Argument(tuple(bad), then=then)


def rules(accepted: Argument, name: str) -> Argument:
    """What is accepted alone or as the value of a rule, `None` too."""
    in_rules = [
        Bad(orthax.PathRules(((r"kernel", half_way), (name, "soft"))), TypeError, ("got 'soft'",)),
        Bad(orthax.PathRules(((name, None),), default=3), TypeError, ("got 3",)),
    ]
    good = [half_way, orthax.PathRules(((name, None), ("b", half_way))), orthax.PathRules(())]
    return accepted.but(bad=in_rules, good=good)


PENALTY = rules(
    Argument(wrong(3.0, None, "soft", VECTOR, says=("function of an array", "WithMemory"))), "a"
)
MEASURE = rules(function("must be a function"), "a")
MEMORY = penalties.warm_spectral_restricted_isometry()
NO_FUNCTIONS = penalties.WithMemory(3, None)


def shardings() -> Argument:
    """How leaves lie on a mesh; what a tree of them holds is looked at when leaves come."""
    bad = wrong(True, 3, 1.0, "x", says=("must be None, False, a tree of shardings", "function"))
    return Argument(bad, (None, False, lambda params: None))


# --- the calls


def call(name: str, function: Any, good: dict[str, Any] | None = None, **arguments: Any) -> Call:
    return Call(name, function, good or {}, arguments)


def optimizer(function: Any, **own: Argument) -> Call:
    """An optimizer; arguments that many share are given by their names."""
    given = {
        "learning_rate": schedule("(-inf, inf)"),
        "momentum": number("[0, 1)", " or a transformation").but(good=[optax.trace(0.9)]),
        "weight_decay": schedule("[0, inf)").but(good=[optax.identity()]),
        "nesterov": flag(),
        "orthogonalizer": transformation(),
        "shape_scale": transformation(),
        "fallback": transformation(none=True),
        "dimension_numbers": dimension_numbers(starting),
        "mu_dtype": dtype("int8"),
        "rank": rank().but(none=True),
        "basis": choice(*BASES),
        "ranking": choice("l1", "l2"),
        "update_every": integer(),
        "sharding": shardings(),
        "whole_every": integer().but(none=True),
        **own,
    }
    names = inspect.signature(function).parameters
    return Call(
        function.__name__,
        function,
        {"learning_rate": 0.1},
        {name: given[name] for name in names if name in given},
    )


def orthogonalize(options: Any = None, **rest: Any) -> Any:
    """`orthax.orthogonalize`, whose options are one argument here."""
    return orthax.orthogonalize(**{"method": linalg.newton_schulz, **rest}, **(options or {}))


def layer(**arguments: Any) -> Any:
    """`HouseholderLinear`, without values."""
    return nnx.eval_shape(lambda: orthax.nn.HouseholderLinear(**arguments, rngs=nnx.Rngs(0)))


def from_kernel(**arguments: Any) -> Any:
    return orthax.nn.HouseholderLinear.from_kernel(**arguments).kernel


def attention() -> Any:
    return nnx.eval_shape(lambda: nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0)))


def exclude() -> Argument:
    """Regular expressions."""
    return Argument(
        wrong(3, [3], (None,), 1.5, says=("must be a regular expression",))
        + tuple(
            Bad(value, ValueError, (repr(value), "is no regular expression"))
            for value in ("(", ["a", "["])
        ),
        (None, "a", re.compile("a"), ["a", re.compile("b")]),
    )


HAS_EQUINOX = importlib.util.find_spec("equinox") is not None
"""Not where the oldest versions are tested."""


def of_equinox() -> tuple[Call, ...]:
    if not HAS_EQUINOX:
        return ()
    import equinox as eqx

    import orthax.eqx

    key = jax.eval_shape(lambda: jax.random.key(0))
    model = eqx.filter_eval_shape(lambda key: eqx.nn.MultiheadAttention(2, 4, key=key), key)
    bad = (
        Bad(value, TypeError, ("must be an equinox.Module", f"got {type(value).__name__}"))
        for value in (None, 3, {"kernel": struct(2, 3)}, eqx.nn.Linear)
    )
    return (
        call(
            "orthax.eqx.dimension_numbers",
            orthax.eqx.dimension_numbers,
            {"model": model},
            model=Argument(tuple(bad)),
            exclude=exclude(),
            per_head=flag(),
        ),
    )


BASES = ("dct", "dct3", "random", "hadamard", "columns", "svd", "subspace")
X = {"x": struct(4, 6)}
W = {"w": struct(4, 6)}
TALL = struct(4, 3)
EPS = number("[0, inf)", static=True)
KERNEL = {"kernel": struct(3, 3, 2, 4)}
OTHER_RANK = "(height, width, in / groups, out)"
kernel = arrays(struct(3, 3, 2, 4)).but(
    bad=[
        Bad(struct(*shape), ValueError, (f"shape {shape}", "(width, in / groups", OTHER_RANK))
        for shape in ((), (3,), (3, 3), (3,) * 5)
    ],
    good=[struct(3, 2, 4)],
)
groups = integer().but(bad=[Bad(3, ValueError, ("divide", "3 groups", "out_channels = 4"))])
convolution = {
    "kernel": kernel,
    "input_size": sizes(),
    "strides": sizes(),
    "padding": padding(),
    "dilation": sizes(),
    "groups": groups,
}
SPECTRUM = ("1-D array of finite numbers",)
spectra = Argument(
    wrong(3, "ab", says=("spectra",))
    + outside((), [], says=("at least one",))
    + tuple(
        Bad([np.ones(3), one], kind, ("spectra[1]", *SPECTRUM, f"got {one!r}"), "spectra")
        for kind, ones in {
            TypeError: ("ab", None, np.array([1 + 1j]), ["a"], [True]),
            ValueError: ([], [0.0, 0.0], [1.0, -0.1], [1.0, NAN], [INF], [[1.0]], 1.0),
        }.items()
        for one in ones
    ),
    (None, [[1, 2]], (np.ones(3), jnp.ones(2))),
)
OF_LOW_RANK = {
    "rank": rank(),
    "basis": choice(*BASES),
    "ranking": choice("l1", "l2"),
    "update_every": integer(),
    "buffer_dtype": dtype("int8", "int4"),
}
unchecked_vector = Argument(
    tuple(
        Bad(struct(*shape), ValueError, ("must have shape (6,)", f"got {shape}"))
        for shape in ((), (4,), (2, 6))
    ),
    (None, struct(6)),
).but(bad=arrays(struct(6)).but(none=True).bad)

CALLS = (
    # orthax: transformations
    call(
        "orthogonalize",
        orthogonalize,
        method=function(),
        stack=flag(),
        sharding=shardings(),
        options=Argument(
            (
                Bad(
                    {"steps": 5}, TypeError, ("newton_schulz", "coefficients, prescale"), "'steps'"
                ),
                Bad({"x": 5}, TypeError, ("newton_schulz", "no option"), "'x'"),
            ),
            ({}, {"eps": 0.1}),
        ),
    ),
    call("clip_by_quantile", orthax.clip_by_quantile, quantile=number("[0, 1]")),
    call(
        "scale_by_cosh_rms",
        orthax.scale_by_cosh_rms,
        gamma=number("[0, inf)"),
        mode=choice("paper", "code", "rms"),
    ),
    call(
        "normalize_neurons",
        orthax.normalize_neurons,
        decay=number("[0, 1)"),
        eps=number("[0, inf)"),
        axis=choice("output", "long"),
    ),
    call(
        "scale_by_adam_per_index",
        orthax.scale_by_adam_per_index,
        b1=number("[0, 1)"),
        b2=number("[0, 1)"),
        eps=number("[0, inf)"),
        eps_root=number("[0, inf)"),
        mu_dtype=dtype(),
    ),
    call(
        "scale_by_adam_rms",
        orthax.scale_by_adam_rms,
        rms=number("[0, inf)"),
        direction=choice("orthogonal", "unit_norm"),
    ),
    call("scale_to_rms", orthax.scale_to_rms, rms=number("[0, inf)")),
    call("scale_by_width", orthax.scale_by_width),
    call("scale_by_unit_rms", orthax.scale_by_unit_rms),
    call("project_tangent", orthax.project_tangent),
    call("keep_orthogonal", orthax.keep_orthogonal, method=function()),
    call(
        "keep_unit_neurons",
        orthax.keep_unit_neurons,
        radius=number("(0, inf)"),
        axis=choice("output", "input"),
    ),
    call("keep_norm", orthax.keep_norm, radius=number("(0, inf)", none=True)),
    call(
        "low_rank",
        orthax.low_rank,
        {"inner": optax.identity(), "rank": 2},
        **OF_LOW_RANK,
        inner=transformation(),
        retain=number("[0, 1)", none=True),
        rounding=choice("nearest", "stochastic"),
        seed=integer("[0, inf)"),
    ),
    call(
        "add_penalty",
        orthax.add_penalty,
        {"penalty": penalties.soft_orthogonality, "strength": 0.1},
        penalty=PENALTY.but(
            bad=wrong(NO_FUNCTIONS, says=("must be a function of an array",)), good=[MEMORY]
        ),
        strength=schedule("[0, inf)"),
    ),
    call(
        "as_matrices",
        orthax.as_matrices,
        {"inner": optax.identity()},
        inner=transformation(),
        dimension_numbers=dimension_numbers(starting, every=True),
        sharding=shardings(),
    ),
    call(
        "partition_matrices",
        orthax.partition_matrices,
        {"matrices": optax.identity(), "rest": optax.identity()},
        matrices=transformation(or_function=True).but(good=[lambda leaves: optax.identity()]),
        rest=transformation(or_function=True).but(good=[lambda leaves: optax.identity()]),
        dimension_numbers=dimension_numbers(starting),
        sharding=shardings(),
    ),
    call(
        "explain",
        orthax.explain,
        {"params": KERNELS},
        dimension_numbers=dimension_numbers(lambda result: result),
        rank=rank(injectable=False).but(none=True),
    ),
    call(
        "PathRules",
        orthax.PathRules,
        {"rules": ()},
        rules=Argument(
            wrong(3, None, "ab", ("ab", "c"), ((1, None),), (3,), says=("must be pairs",))
            + outside((("(", None),), (("a", 1, 2),), (("a",),), says=("must be pairs",)),
            ((), ((re.compile("a"), 1),), [("a", None)]),
        ),
        strict=flag(),
    ),
    call(
        "PathRules.lookup",
        orthax.PathRules((("a", 1),)).lookup,
        path=Argument(wrong(3, None, ("a",)), ("a", "")),
    ),
    # orthax: optimizers
    optimizer(orthax.muon),
    optimizer(orthax.normuon, decay=number("[0, 1)")),
    optimizer(orthax.root, quantile=number("[0, 1]")),
    optimizer(orthax.auon, gamma=number("[0, inf)"), mode=choice("paper", "code", "rms")),
    optimizer(orthax.hybrid_auon, gamma=number("[0, inf)"), steps=integer()),
    optimizer(orthax.trion, momentum=number("[0, 1)"), mu_dtype=dtype("int8", "int4")),
    optimizer(
        orthax.dct_adamw,
        b1=number("[0, 1)"),
        b2=number("[0, 1)"),
        eps=number("[0, inf)"),
        eps_root=number("[0, inf)"),
        error_feedback=flag(),
        bias_correction=choice("per_index", "global"),
        buffer_dtype=dtype("int8", "int4"),
    ),
    Call("by_name", orthax.by_name, {}, {"name": choice(*orthax.OPTIMIZERS)}),
    call(
        "from_optax_muon",
        orthax.from_optax_muon,
        {
            "state": optax.contrib.muon(0.1).init(ZEROS),
            "optimizer": orthax.muon(0.1, dimension_numbers=MuonDimensionNumbers(-2, -1)),
            "params": ZEROS,
        },
        optimizer=Argument(transformation().bad, ()),
        momentum=number("[0, 1)", static=True),
    ),
    Call("coefficients.by_name", coefficients.by_name, {}, {"name": choice(*coefficients.TABLES)}),
    # orthax.linalg
    call("frobenius_norm", linalg.frobenius_norm, x=matrices()),
    call("normalize", linalg.normalize, X, x=matrices(), eps=EPS),
    call(
        "top_columns",
        linalg.top_columns,
        {**X, "rank": 2},
        x=matrices(),
        rank=integer("[1, 6]"),
        order=choice("l1", "l2"),
    ),
    call(
        "newton_schulz",
        linalg.newton_schulz,
        X,
        x=matrices(),
        coefficients=table().but(good=[lambda m, n: coefficients.MUON]),
        prescale=choice("frobenius", "schatten", "aol"),
        dtype=dtype(),
        eps=EPS,
    ),
    call(
        "gram_newton_schulz",
        linalg.gram_newton_schulz,
        X,
        x=matrices(),
        coefficients=table(),
        restarts=Argument(
            wrong(3, "ab", (1.5,), (2.0,), (True,), (None,), says=("from 1 to 4",))
            + outside((0,), (5,), (-1,), (2, 2), (3, 1), (1, 2, 3, 4, 5), says=("from 1 to 4",)),
            (None, (), (1,), [1, 2, 3, 4], (np.int64(4),)),
        ),
        dtype=dtype(),
        eps=EPS,
    ),
    call(
        "zolotarev",
        linalg.zolotarev,
        X,
        x=matrices(),
        degree=integer(),
        passes=integer("[1, 2]"),
        lower=number("(0, 1)", none=True, static=True).but(
            bad=[Bad(1e-5, ValueError, ("[0.00", ", 1)", "degree 2", "(4, 6)", "float32"))]
        ),
    ),
    call("polar", linalg.polar, X, x=matrices(), accuracy=choice("fast", "exact")),
    call("polar_svd", linalg.polar_svd, X, x=matrices(), rtol=number("[0, inf]", none=True)),
    call("nearest_orthogonal", linalg.nearest_orthogonal, x=matrices()),
    call(
        "spectral_norm",
        linalg.spectral_norm,
        X,
        x=matrices(),
        vector=unchecked_vector,
        steps=integer(),
    ),
    call("dct", linalg.dct, X, x=matrices(), method=choice("auto", "matrix", "fft")),
    call("idct", linalg.idct, X, x=matrices(), method=choice("auto", "matrix", "fft")),
    call(
        "dct_matrix",
        linalg.dct_matrix,
        {"n": 2},
        n=integer("[1, 32768]"),
        dtype=dtype(none=False).but(bad=outside(jnp.complex64)),
    ),
    call(
        "householder_product",
        linalg.householder_product,
        {"v": TALL},
        v=matrices(tall=True, real=True),
        columns=integer("[1, 4]", none=True),
    ),
    call("householder_vectors", linalg.householder_vectors, q=matrices(tall=True, real=True)),
    call(
        "householder_projector",
        linalg.householder_projector,
        {"u": TALL, "v": TALL},
        u=Argument(matrices(tall=True, real=True).bad, (TALL,)).but(
            bad=[
                Bad(struct(*shape), ValueError, (f"got shapes {shape} and (4, 3)",), "u and v")
                for shape in ((4, 2), (2, 4, 3))
            ]
        ),
        v=Argument(matrices(tall=True, real=True).bad, (TALL, struct(5, 3))),
    ),
    call(
        "householder_factors",
        linalg.householder_factors,
        W,
        w=matrices(real=True),
        rank=integer("[1, 4]", none=True),
    ),
    call(
        "convolution_matrix",
        linalg.convolution_matrix,
        {**KERNEL, "input_size": 4},
        **convolution,
    ),
    call(
        "convolution_singular_values",
        linalg.convolution_singular_values,
        {**KERNEL, "input_size": 4},
        **convolution,
    ),
    # orthax.linalg.coefficients
    call(
        "for_shape",
        coefficients.for_shape,
        {"m": 4, "n": 5, "steps": 2},
        m=integer(),
        n=integer(),
        steps=integer(),
        shared=flag(),
        spectra=spectra,
    ),
    call(
        "minimax",
        coefficients.minimax,
        {"steps": 2, "lower": 0.1},
        steps=integer(),
        lower=number("(0, 1)", static=True),
        cushion=number("[0, 1)", static=True),
        safety=number("[1, inf)", static=True),
    ),
    call(
        "scalar_map",
        coefficients.scalar_map,
        {"coefficients": coefficients.MUON, "singular_values": 0.5},
        coefficients=table(),
        singular_values=Argument(
            wrong("a", None, 1j, ["0.5"], True), (0.5, 1, [0.1, 0.2], np.ones((2, 2)), jnp.ones(2))
        ),
    ),
    # orthax.penalties
    call("soft_orthogonality", penalties.soft_orthogonality, w=matrices()),
    call("double_soft_orthogonality", penalties.double_soft_orthogonality, w=matrices()),
    call("mutual_coherence", penalties.mutual_coherence, w=matrices()),
    call(
        "lambda_orthogonality",
        penalties.lambda_orthogonality,
        {**W, "radius": 1.0},
        w=matrices(),
        radius=number("[0, inf]"),
        sharpness=number("[0, inf)"),
    ),
    call(
        "spectral_restricted_isometry",
        penalties.spectral_restricted_isometry,
        W,
        w=matrices(),
        steps=integer(),
        squared=flag(),
    ),
    call(
        "warm_spectral_restricted_isometry",
        penalties.warm_spectral_restricted_isometry,
        steps=integer(),
        squared=flag(),
    ),
    # orthax.conv_penalties
    call(
        "convolution_orthogonality",
        conv_penalties.convolution_orthogonality,
        KERNEL,
        kernel=kernel,
        strides=sizes(),
        dilation=sizes(),
        groups=groups,
        transposed=flag(),
        self_padding=integer("[0, inf)", none=True),
    ),
    call(
        "orthogonal_convolution_exists",
        conv_penalties.orthogonal_convolution_exists,
        {"kernel_size": (3, 3), "strides": 1, "in_channels": 2, "out_channels": 4},
        kernel_size=Argument(
            wrong(2.0, None, "3", True)
            + outside(0, (1, 2, 3), (), says=())
            + (
                Bad(np.asarray(3.0), TypeError, ("got array(3.)",)),
                Bad((2.0, 2), TypeError, ("must be an integer", "got 2.0")),
                Bad((2, 0), ValueError, ("must be an integer in [1, inf)", "got 0")),
            ),
            (3, (3,), (3, 3), np.full(2, 3)),
        ),
        strides=sizes(),
        in_channels=integer(),
        out_channels=integer(),
        padding=padding(),
        dilation=sizes(),
        groups=integer().but(
            bad=[
                Bad(4, ValueError, ("divide", "4 groups", "in_channels = 2")),
                Bad(3, ValueError, ("divide", "3 groups", "in_channels = 2")),
            ]
        ),
        input_size=sizes().but(none=True),
    ),
    # orthax.diagnostics
    call(
        "orthogonality_error",
        diagnostics.orthogonality_error,
        W,
        w=matrices(),
        norm=choice("frobenius", "spectral"),
    ),
    call("singular_values", diagnostics.singular_values, w=matrices()),
    call("stable_rank", diagnostics.stable_rank, W, w=matrices(), steps=integer()),
    call("effective_rank", diagnostics.effective_rank, w=matrices()),
    call("neuron_norm_spread", diagnostics.neuron_norm_spread, w=matrices()),
    call(
        "update_to_weight_ratio",
        diagnostics.update_to_weight_ratio,
        {"update": TALL, "weight": TALL},
        update=Argument(matrices().bad, (TALL,)),
        weight=Argument(matrices().bad, (TALL,)).but(
            bad=[Bad(struct(3, 4), ValueError, ("one shape", "got (4, 3) and (3, 4)"))]
        ),
    ),
    call("warm_spectral_norm", diagnostics.warm_spectral_norm, steps=integer()),
    call(
        "of_updates",
        diagnostics.of_updates,
        {"measure": diagnostics.stable_rank},
        measure=MEASURE.but(bad=wrong(NO_FUNCTIONS), good=[MEMORY]),
        dimension_numbers=dimension_numbers(measuring),
    ),
    call(
        "of_params",
        diagnostics.of_params,
        {"measure": diagnostics.stable_rank},
        measure=MEASURE.but(bad=wrong(NO_FUNCTIONS), good=[MEMORY]),
        dimension_numbers=dimension_numbers(updating),
    ),
    call(
        "of_both",
        diagnostics.of_both,
        {"measure": diagnostics.update_to_weight_ratio},
        measure=MEASURE.but(bad=wrong(MEMORY)),
        dimension_numbers=dimension_numbers(updating),
    ),
    # orthax.nn
    call(
        "orthax.nn.HouseholderLinear",
        layer,
        {"in_features": 3, "out_features": 4},
        in_features=integer(),
        out_features=integer(),
        rank=integer("[1, 3]", none=True),
        use_bias=flag(),
        dtype=dtype(),
        param_dtype=dtype(none=False),
        reflector_init=function("must be a"),
        bias_init=function("must be a"),
    ),
    call(
        "orthax.nn.HouseholderLinear.from_kernel",
        from_kernel,
        {"kernel": TALL},
        kernel=arrays(TALL, "must be real floating").but(
            bad=[
                Bad(struct(4, 3, dtype=jnp.complex64), TypeError, ("dtype complex64", "real")),
                *(
                    Bad(struct(*shape), ValueError, ("must have two axes", f"shape {shape}"))
                    for shape in ((), (3,), (2, 4, 3))
                ),
            ]
        ),
        bias=arrays(struct(3)).but(
            bad=[
                Bad(struct(*shape), ValueError, ("must have shape (3,)", f"got {shape}"))
                for shape in ((), (2,), (1, 3))
            ],
            none=True,
        ),
        rank=integer("[1, 3]", none=True),
    ),
    *of_equinox(),
    call(
        "orthax.nn.dimension_numbers",
        orthax.nn.dimension_numbers,
        {"model": attention()},
        model=Argument(
            tuple(
                Bad(value, TypeError, ("must be a flax.nnx.Module", f"got {type(value).__name__}"))
                for value in (None, 3, {"kernel": struct(2, 3)}, nnx.Linear)
            )
        ),
        exclude=exclude(),
        per_head=flag(),
    ),
)


# --- what comes later: leaves, and arguments that only go with others

TRANSFORMATIONS = {
    "orthogonalize": orthax.orthogonalize(),
    "clip_by_quantile": orthax.clip_by_quantile(),
    "scale_by_cosh_rms": orthax.scale_by_cosh_rms(),
    "normalize_neurons": orthax.normalize_neurons(),
    "scale_by_adam_per_index": orthax.scale_by_adam_per_index(),
    "scale_by_width": orthax.scale_by_width(),
    "scale_by_unit_rms": orthax.scale_by_unit_rms(),
    "scale_by_adam_rms": orthax.scale_by_adam_rms(),
    "scale_to_rms": orthax.scale_to_rms(),
    "low_rank": orthax.low_rank(optax.identity(), 2),
    "keep_orthogonal": orthax.keep_orthogonal(),
    "project_tangent": orthax.project_tangent(),
    "keep_unit_neurons": orthax.keep_unit_neurons(),
    "keep_norm": orthax.keep_norm(),
}
WITH_STATE = ("normalize_neurons", "scale_by_adam_per_index", "low_rank")
OF_PARAMS = ("keep_orthogonal", "project_tangent", "keep_unit_neurons", "keep_norm")
WITH_RANK = {
    "low_rank": functools.partial(orthax.low_rank, optax.trace(0.9)),
    "trion": functools.partial(orthax.trion, 0.1),
    "dct_adamw": functools.partial(orthax.dct_adamw, 0.1),
}
FILTER = "eqx.filter(model, eqx.is_inexact_array)"
FUNCTIONS = (
    Bad(jax.nn.relu, TypeError, ("is a function", FILTER)),  # what an Equinox MLP holds
    Bad(jnp.tanh, TypeError, ("is a function", FILTER)),
    Bad("relu", TypeError, ("is of type str", FILTER)),
    Bad(False, TypeError, ("is of type bool", FILTER)),
    Bad(jax.random.key(0), TypeError, ("key<fry>", FILTER)),
)
LEAVES = (
    Bad(struct(4), ValueError, ("shape (4,)", "two axes", "as_matrices")),
    Bad(struct(), ValueError, ("shape ()", "two axes", "as_matrices")),
    Bad(struct(3, 4, dtype=jnp.int32), TypeError, ("dtype int32", "floating")),
    Bad(struct(3, 4, dtype=jnp.bool_), TypeError, ("dtype bool", "floating")),
    Bad(struct(4, dtype=jnp.int32), TypeError, ("dtype int32", "floating")),
    Bad(1.0, TypeError, ("must be an array", "got float")),
    Bad("kernel", TypeError, ("must be an array", "got str")),
    Bad(jax.nn.relu, TypeError, ("must be an array", FILTER)),
)
INTEGERS = (
    Bad(struct(3, 4, dtype=jnp.int32), TypeError, ("dtype int32", "floating")),
    Bad(struct(3, 4, dtype=jnp.bool_), TypeError, ("dtype bool", "floating")),
)
UNDECIDED = Bad(struct(3, 4, 5), Undecided, ("shape (3, 4, 5)", "neither names nor shapes"))
MATRIX = {"dense": [jnp.ones((3, 4))]}
WITHOUT = (Bad(None, ValueError, ("update needs params",)),)
FACTORED = optax.scale_by_factored_rms(min_dim_size_to_factor=2)


def without_values(run: Callable[[Any], Any], when: str) -> Callable[[Any], None]:
    """The function run without compiling anything; a struct is traced, but stays one at `init`."""

    def traced(value: Any) -> None:
        if isinstance(value, jax.ShapeDtypeStruct) and when != "at init":
            jax.eval_shape(lambda value: (run(value), ())[1], value)
        else:
            jax.eval_shape(lambda: (run(value), ())[1])

    return traced


def at_update(transformation: Any) -> Callable[[Any], Any]:
    """Function of a leaf of updates and params; the state knows of no leaf yet."""
    state = transformation.init({})
    return lambda leaf: transformation.update(tree_of(leaf), state, tree_of(leaf))


def after_init(transformation: Any) -> Callable[[Any], Any]:
    """Function of a leaf of updates and params, that the state knows."""

    def run(leaf: Any) -> Any:
        tree = tree_of(leaf)
        return transformation.update(tree, transformation.init(tree), tree)

    return run


def at_init(transformation: Any) -> Callable[[Any], Any]:
    return lambda leaf: transformation.init(tree_of(leaf))


def at_update_of_params(transformation: Any) -> Callable[[Any], Any]:
    """Function of a leaf of params."""
    return lambda leaf: transformation.update(MATRIX, optax.EmptyState(), tree_of(leaf))


def with_params(transformation: Any) -> Callable[[Any], Any]:
    """Function of the params at `update`, where there are no leaves."""
    return lambda params: transformation.update({}, transformation.init({}), params)


def with_penalty(penalty: Any) -> Any:
    """Updates a matrix with a penalty that gives no scalar."""
    tx = orthax.add_penalty(penalty, 1.0)
    return tx.update(MATRIX, tx.init(MATRIX), MATRIX)


def transposed(groups: Any) -> Any:
    return conv_penalties.convolution_orthogonality(
        jnp.ones((1, 1, 2, 4)), transposed=True, groups=groups
    )


def later() -> list[Row]:
    found: list[Row] = []

    def add(call: str, argument: str, run: Callable[[Any], Any], *bad: Bad, when: str = "") -> None:
        found.extend(Row(call, argument, without_values(run, when), one, when) for one in bad)

    for name, tx in TRANSFORMATIONS.items():
        add(name, LEAF, at_update(tx), *LEAVES)
    for name in WITH_STATE:
        add(name, LEAF, at_init(TRANSFORMATIONS[name]), *LEAVES, when="at init")
    for name in OF_PARAMS:
        add(name, "params", with_params(TRANSFORMATIONS[name]), *WITHOUT)
        of_params = at_update_of_params(TRANSFORMATIONS[name])
        add(name, LEAF, of_params, INTEGERS[0], when="of the params")

    for name, make in OPTIMIZERS.items():
        decayed = make(0.1, weight_decay=0.25)
        words = ("weight_decay=0.25", "update needs params")
        add(name, "params", with_params(decayed), Bad(None, ValueError, words))
        add(name, LEAF, at_init(make(0.1)), *INTEGERS, UNDECIDED, FUNCTIONS[0], when="at init")
    both = orthax.partition_matrices(optax.identity(), optax.identity())
    alone = orthax.as_matrices(optax.identity())
    vector = Bad(struct(4), ValueError, ("with shape (4,)", "not a matrix", "fewer than two axes"))
    bad = *INTEGERS, *FUNCTIONS, UNDECIDED
    add("partition_matrices", LEAF, at_init(both), *bad, when="at init")
    for when, run in {"at init": at_init(alone), "at update": at_update(alone)}.items():
        add("as_matrices", LEAF, run, *INTEGERS, FUNCTIONS[0], UNDECIDED, vector, when=when)
    sent = orthax.as_matrices(optax.identity(), orthax.PathRules((("dense", None),)))
    add("as_matrices", LEAF, at_update(sent), Bad(TALL, ValueError, ("not a matrix", "'dense'")))
    for name in ("partition_matrices: matrices", "partition_matrices: rest"):
        call, _, part = name.partition(": ")
        parts = {"matrices": optax.identity(), "rest": optax.identity()}

        def building(found: Any, part: str = part, parts: Any = parts) -> Any:
            return orthax.partition_matrices(**{**parts, part: lambda leaves: found}).init(KERNELS)

        add(call, part, building, *wrong(3, None, says=("transformation",)), when="made")
    add("explain", LEAF, lambda leaf: orthax.explain(tree_of(leaf)), *INTEGERS, *FUNCTIONS)

    measures = (diagnostics.of_updates, diagnostics.of_params, diagnostics.of_both)
    for make in measures[1:]:
        add(make.__name__, "params", with_params(make(half_way)), *WITHOUT)
    for make in measures:
        add(
            make.__name__,
            LEAF,
            after_init(optax.monitor({"x": make(half_way)})),
            *INTEGERS,
            FUNCTIONS[0],
            UNDECIDED,
        )

    def explained(found: Any) -> Any:
        return orthax.explain(KERNELS, rank=lambda m, n: found)

    says = ("rank(4, 6)", LEAF, "must be an integer in [1, inf)")
    add("explain", "rank", explained, *wrong(2.5, says=says), *outside(0, says=says))
    for name, make in WITH_RANK.items():

        def ranked(found: Any, make: Any = make) -> Any:
            return make(rank=lambda m, n: found).init(KERNELS)

        add(name, "rank", ranked, *wrong(2.5, True, None, "2", says=says))
        add(name, "rank", ranked, *outside(0, -3, says=says))
        odd = Bad(struct(6, 16), ValueError, ("Hadamard matrix of size 6", "12, 20, 24"))
        add(name, LEAF, at_init(make(rank=2, basis="hadamard")), odd, when="at init")

    def ranked_at_update(found: Any) -> Any:
        state = orthax.low_rank(optax.trace(0.9), 2).init(MATRIX)
        return orthax.low_rank(optax.trace(0.9), lambda m, n: found).update(MATRIX, state)

    says = ("rank(3, 4)", LEAF, "must be an integer in [1, inf)")
    add("low_rank", "rank", ranked_at_update, *wrong(2.5, says=says), *outside(0, says=says))
    for buffer in ("int8", "int4", jnp.bfloat16):
        keeping = orthax.low_rank(optax.identity(), 2, retain=0.5, buffer_dtype=buffer)
        waves = struct(3, 4, dtype=jnp.complex64)
        words = ("complex", f"buffer_dtype={buffer!r}")
        add("low_rank", LEAF, at_init(keeping), Bad(waves, TypeError, words), when="at init")

    def inside(inner: Any) -> Any:
        return orthax.low_rank(inner, 2).init(MATRIX)

    follow = ("state of inner", "cannot follow a change of subspace")
    for inner in (FACTORED, optax.chain(optax.trace(0.9), FACTORED)):
        words = ("v_row", "state of inner", LEAF, "can follow a change of subspace")
        add("low_rank", "inner", inside, Bad(inner, ValueError, words))
    add("low_rank", "inner", inside, Bad(optax.flatten(optax.trace(0.9)), ValueError, follow))

    polar = Bad({"coefficients": ()}, TypeError, ("polar has no option", "it has accuracy"))
    none = Bad({"eps": 1e-7}, TypeError, ("half_way has no option", "it has none"))
    add("orthogonalize", "coefficients", lambda o: orthax.orthogonalize(**o), polar)
    add("orthogonalize", "'eps'", lambda o: orthax.orthogonalize(half_way, **o), none)

    soft, warm = (
        orthax.add_penalty(penalties.soft_orthogonality, 1.0),
        orthax.add_penalty(MEMORY, 1),
    )
    by_rule = orthax.PathRules(((".", penalties.soft_orthogonality),))
    way_out = ("mask", "orthax.PathRules")
    two_axes = ("soft_orthogonality: w has shape (2,)", *way_out)
    integers = ("int32", *way_out)
    flat, whole = jnp.ones(2), jnp.ones((2, 2), jnp.int32)
    for tx in (soft, orthax.add_penalty(by_rule, 1.0)):
        add("add_penalty", LEAF, after_init(tx), Bad(flat, ValueError, two_axes))
    add("add_penalty", LEAF, after_init(soft), Bad(whole, TypeError, integers))
    for tx in (soft, orthax.add_penalty(orthax.PathRules(()), 1.0)):
        add("add_penalty", LEAF, at_init(tx), FUNCTIONS[0], when="at init")
    add(
        "add_penalty",
        LEAF,
        at_init(warm),
        Bad(struct(2), ValueError, ("shape (2,)", *way_out)),
        when="at init",
    )
    add("add_penalty", "params", with_params(soft), *WITHOUT)
    no_scalars = (
        lambda w: w,
        lambda w: jnp.sum(w)[None],
        lambda w: jnp.sum(w) * 1j,
        lambda w: (jnp.sum(w), w),
        lambda w: None,
        lambda w: jnp.sum(w).astype(jnp.int32),
        penalties.WithMemory(lambda w: jnp.zeros(()), lambda w, m: (w, m)),
    )
    for penalty in no_scalars:
        add("add_penalty", LEAF, with_penalty, Bad(penalty, TypeError, ()))
    for penalty in (lambda w: float(w.sum()), lambda w: np.asarray(w).sum()):
        add("add_penalty", LEAF, with_penalty, Bad(penalty, TypeError, ("racer",)))

    memories = {
        "warm_spectral_restricted_isometry": (MEMORY, 4),
        "warm_spectral_norm": (diagnostics.warm_spectral_norm(), 6),
    }
    for name, (memory, size) in memories.items():
        add(name, "w", memory.init, *matrices().bad, when="at init")
        add(name, "w", functools.partial(apply_to, memory, size), *matrices().bad)
        shapes = [
            Bad(struct(*shape), ValueError, (f"must have shape ({size},)", f"got {shape}"))
            for shape in ((), (5,), (2, size))
        ]
        kinds = [bad for bad in arrays(struct(size)).bad if bad.value is not None]
        add(name, "vector", functools.partial(memory.apply, jnp.ones((4, 6))), *shapes, *kinds)

    two = Bad(2, ValueError, ("transposed layer has one group", "groups=2"))
    bad = two, *wrong("2", 2.0, None)
    add("convolution_orthogonality", "groups", transposed, *bad, when="transposed")

    for function in (linalg.top_columns, linalg.householder_factors):
        of_empty = functools.partial(function, jnp.ones((3, 0)))
        add(function.__name__, "rank", of_empty, *outside(1, says=("[1, 0]",)), when="empty")

    exists = conv_penalties.orthogonal_convolution_exists
    one_axis = padding(1)
    add(
        "orthogonal_convolution_exists",
        "padding",
        lambda pads: exists(3, 1, 2, 2, padding=pads),
        *one_axis.bad,
    )
    add(
        "orthogonal_convolution_exists",
        "groups",
        lambda n: exists((3, 3), 1, 4, 3, groups=n),
        Bad(2, ValueError, ("divide", "2 groups", "out_channels = 3")),
    )
    circle = Bad((4, 5), ValueError, ("circular padding", "multiple", "(2, 2)", "got (4, 5)"))
    add(
        "orthogonal_convolution_exists",
        "input_size",
        lambda size: exists((3, 3), 2, 2, 2, input_size=size),
        circle,
    )
    add(
        "convolution_singular_values",
        "input_size",
        lambda size: linalg.convolution_singular_values(jnp.ones((3, 3, 2, 4)), size, 2),
        circle,
    )
    for name, words in {"dct": ("matrix", "fft"), "idct": ("matrix", "fft")}.items():
        of_empty = functools.partial(getattr(linalg, name), jnp.ones((0, 4)))
        bad = outside("FFT", says=words)
        add(name, "method", lambda method, f=of_empty: f(method=method), *bad, when="empty")
    of_row = functools.partial(linalg.polar, jnp.ones((1, 3)))
    add("polar", "accuracy", of_row, *outside("best", says=("fast", "exact")), when="of a row")

    def by_table(table: Any) -> Any:
        tx = orthax.orthogonalize(linalg.newton_schulz, coefficients=table)
        return tx.update(MATRIX, optax.EmptyState())

    add("newton_schulz", "coefficients", by_table, *outside((), says=("three finite numbers",)))
    # One call stands for all that check a number or a dtype.
    add("clip_by_quantile", "quantile", orthax.clip_by_quantile, *wrong(np.asarray("0.5")))
    add("muon", "mu_dtype", lambda d: orthax.muon(0.1, mu_dtype=d), *wrong(jnp.ones(2)))
    return found


def apply_to(memory: Any, size: int, w: Any) -> Any:
    return memory.apply(w, jnp.ones(size))


def run_of(call: Call, argument: str) -> Callable[[Any], Any]:
    """The call as a function of one argument; arrays without values among them are traced."""
    then = call.arguments[argument].then

    def run(value: Any) -> None:
        given = {**call.good, argument: value}
        abstract = {name: x for name, x in given.items() if isinstance(x, jax.ShapeDtypeStruct)}

        def traced(abstract: dict[str, Any]) -> tuple[()]:
            then(call.function(**{**given, **abstract}))
            return ()

        jax.eval_shape(traced, abstract)

    return run


ROWS = [
    Row(one.name, name, run_of(one, name), bad)
    for one in CALLS
    for name, argument in one.arguments.items()
    for bad in argument.bad
] + later()
