"""The table of the contract tests: every transform and optimizer, one row each, and their trees."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

import orthax
from orthax.linalg import coefficients, gram_newton_schulz, newton_schulz, polar_svd, zolotarev
from orthax.penalties import (
    lambda_orthogonality,
    mutual_coherence,
    soft_orthogonality,
    warm_spectral_restricted_isometry,
)


class Case(NamedTuple):
    """One row.

    Attributes:
      name: What the tests call it.
      factory: Function that returns the transformation.
      kwargs: Its arguments.
      any_tree: Whether it takes leaves of any rank (an optimizer) or only matrices.
      needs_params: Whether `update` needs the params.
      numbers: The arguments that are numbers, which `optax.inject_hyperparams` may inject.
    """

    name: str
    factory: Callable[..., optax.GradientTransformation]
    kwargs: dict[str, Any]
    any_tree: bool = False
    needs_params: bool = False
    numbers: tuple[str, ...] = ()

    def build(self, **overrides: Any) -> optax.GradientTransformation:
        return self.factory(**{**self.kwargs, **overrides})

    def values(self) -> dict[str, float]:
        """The numbers of this row, given or by default."""
        parameters = inspect.signature(self.factory).parameters
        return {name: self.kwargs.get(name, parameters[name].default) for name in self.numbers}

    def injected(self, **overrides: Any) -> optax.GradientTransformationExtraArgs:
        """The transformation with every number injected and every other argument static."""
        static = set(inspect.signature(self.factory).parameters) - set(self.numbers)
        factory = optax.inject_hyperparams(self.factory, static_args=static)
        return factory(**{**self.kwargs, **overrides})


def orthogonalize(method=newton_schulz, stack=True):
    """Without `**options`: `optax.inject_hyperparams` cannot pass these on."""
    return orthax.orthogonalize(method, stack=stack)


def low_rank(**options: Any) -> dict[str, Any]:
    """Arguments of `orthax.low_rank`; all that are no numbers to inject are given."""
    return {"rank": 3, "update_every": 1, "seed": 0, "inner": optax.scale_by_adam(), **options}


two_passes = functools.partial(zolotarev, passes=2)


def is_matrix(tree: Any) -> Any:
    """A mask of the leaves with two axes or more."""
    return jax.tree.map(lambda leaf: np.ndim(leaf) > 1, tree)


def optimizer(name: str, factory: Callable[..., Any], *numbers: str, **kwargs: Any) -> Case:
    parameters = inspect.signature(factory).parameters
    shared = [n for n in ("learning_rate", "momentum", "weight_decay") if n in parameters]
    numbers = (*shared, *numbers)
    kwargs = {"learning_rate": 0.1, **kwargs}
    needs_params = kwargs.get("weight_decay", 0) != 0
    return Case(name, factory, kwargs, True, needs_params, numbers)


views = orthax.PathRules(
    (
        ("packed", orthax.Packed(MuonDimensionNumbers(0, 1), axis=1, sections=(8, 4))),
        ("heads", MuonDimensionNumbers((0, 1), 2)),
        ("Dense_1", MuonDimensionNumbers(1, 0)),
        ("scanned/Dense_0/kernel", MuonDimensionNumbers(-2, -1)),
    )
)
penalties = orthax.PathRules(
    (
        ("Dense_0/kernel", warm_spectral_restricted_isometry()),
        ("Dense_1/kernel", functools.partial(lambda_orthogonality, radius=1.0)),
        ("scanned/.*kernel", mutual_coherence),
    )
)
options = {
    "weight_decay": 0.1,
    "mask": is_matrix,
    "dimension_numbers": views,
    "mu_dtype": jnp.float32,
    # Two steps instead of five compile in half the time.
    "orthogonalizer": orthax.orthogonalize(newton_schulz, coefficients=coefficients.MUON[:2]),
}
# Its orthogonalizer is a number of steps, or nothing.
options_of_auon = {name: value for name, value in options.items() if name != "orthogonalizer"}
repository = {"mode": "code", "gamma": 1.5, "shape_scale": optax.identity()}

CASES = (
    Case("orthogonalize", orthogonalize, {}),
    Case("orthogonalize(polar_svd)", orthogonalize, {"method": polar_svd}),
    Case("orthogonalize(gram_newton_schulz)", orthogonalize, {"method": gram_newton_schulz}),
    Case("orthogonalize(zolotarev)", orthogonalize, {"method": two_passes}),
    Case("orthogonalize(stack=False)", orthogonalize, {"stack": False}),
    Case("clip_by_quantile", orthax.clip_by_quantile, {}, numbers=("quantile",)),
    Case("scale_by_cosh_rms", orthax.scale_by_cosh_rms, {}, numbers=("gamma",)),
    Case(
        "scale_by_cosh_rms(code)",
        orthax.scale_by_cosh_rms,
        {"gamma": 1.5, "mode": "code"},
        numbers=("gamma",),
    ),
    Case("scale_by_cosh_rms(rms)", orthax.scale_by_cosh_rms, {"mode": "rms"}, numbers=("gamma",)),
    Case(
        "scale_by_adam_per_index",
        orthax.scale_by_adam_per_index,
        {"b2": 0.99},  # 0.999 is 1 in bfloat16
        numbers=("b1", "b2", "eps", "eps_root"),
    ),
    Case("low_rank", orthax.low_rank, low_rank()),
    Case(
        "low_rank(identity, error feedback)",
        orthax.low_rank,
        low_rank(inner=optax.identity(), retain=0.0, rank=0.5),
        numbers=("retain",),
    ),
    Case(
        "low_rank(int8)",
        orthax.low_rank,
        low_rank(inner=optax.trace(0.9), retain=0.5, buffer_dtype="int8", basis="dct3"),
        numbers=("retain",),
    ),
    Case(
        "low_rank(int4)",
        orthax.low_rank,
        low_rank(retain=0.5, buffer_dtype="int4", rounding="stochastic", basis="columns"),
        numbers=("retain",),
    ),
    Case(
        "low_rank(random, every second)",
        orthax.low_rank,
        low_rank(inner=orthax.scale_by_adam_per_index(), basis="random", update_every=2),
    ),
    Case("low_rank(svd)", orthax.low_rank, low_rank(basis="svd", update_every=2)),
    Case("low_rank(subspace)", orthax.low_rank, low_rank(basis="subspace", retain=0.9)),
    Case("normalize_neurons", orthax.normalize_neurons, {}, numbers=("decay", "eps")),
    Case(
        "normalize_neurons(long)",
        orthax.normalize_neurons,
        {"decay": 0.8, "axis": "long"},
        numbers=("decay", "eps"),
    ),
    Case("scale_by_width", orthax.scale_by_width, {}),
    Case("scale_by_unit_rms", orthax.scale_by_unit_rms, {}),
    Case("scale_by_adam_rms", orthax.scale_by_adam_rms, {}, numbers=("rms",)),
    Case(
        "scale_by_adam_rms(unit_norm)",
        orthax.scale_by_adam_rms,
        {"direction": "unit_norm"},
        numbers=("rms",),
    ),
    Case("scale_to_rms", orthax.scale_to_rms, {}, numbers=("rms",)),
    Case(
        "as_matrices",
        orthax.as_matrices,
        {"inner": orthax.orthogonalize(), "dimension_numbers": views},
    ),
    Case(
        "add_penalty",
        orthax.add_penalty,
        {"penalty": soft_orthogonality, "strength": 0.1, "mask": None},
        needs_params=True,
        numbers=("strength",),
    ),
    Case(
        "add_penalty(rules)",
        orthax.add_penalty,
        {"penalty": penalties, "strength": 0.1, "mask": None},
        any_tree=True,
        needs_params=True,
        numbers=("strength",),
    ),
    Case("keep_orthogonal", orthax.keep_orthogonal, {}, needs_params=True),
    Case("project_tangent", orthax.project_tangent, {}, needs_params=True),
    Case(
        "keep_unit_neurons",
        orthax.keep_unit_neurons,
        {"axis": "output"},
        needs_params=True,
        numbers=("radius",),
    ),
    Case("keep_norm", orthax.keep_norm, {}, needs_params=True),
    optimizer("muon", orthax.muon),
    optimizer("muon(options)", orthax.muon, **options),
    optimizer("muon(int8)", orthax.muon, mu_dtype="int8", nesterov=False),
    optimizer("normuon", orthax.normuon, "decay"),
    optimizer("normuon(options)", orthax.normuon, "decay", **options),
    optimizer("root", orthax.root, "quantile"),
    optimizer("root(options)", orthax.root, "quantile", **options),
    optimizer("auon", orthax.auon, "gamma"),
    optimizer("auon(code)", orthax.auon, "gamma", **repository),
    optimizer("auon(rms, options)", orthax.auon, "gamma", mode="rms", **options_of_auon),
    optimizer("trion", orthax.trion, rank=3, update_every=1),
    optimizer("trion(options)", orthax.trion, rank=4, ranking="l1", update_every=2, **options),
    optimizer("dct_adamw", orthax.dct_adamw, "b1", "b2", "eps", b2=0.99, rank=3, update_every=1),
    optimizer(
        "dct_adamw(options)",
        orthax.dct_adamw,
        "b1",
        "b2",
        "eps",
        b2=0.99,
        rank=0.5,
        update_every=2,
        error_feedback=True,
        buffer_dtype="int8",
        bias_correction="global",
        **{
            name: options[name]
            for name in ("weight_decay", "mask", "dimension_numbers", "mu_dtype")
        },
    ),
    optimizer(
        "dct_adamw(int8)",
        orthax.dct_adamw,
        *("b1", "b2", "eps"),
        rank=3,
        mu_dtype="int8",
        update_every=1,
    ),
    optimizer("hybrid_auon", orthax.hybrid_auon, "gamma", steps=1),
    optimizer("hybrid_auon(options)", orthax.hybrid_auon, "gamma", steps=2, **options_of_auon),
)

# All of one shape, up to transposition: it compiles faster than many.
MATRICES = {
    "Dense_0": {"kernel": (6, 8)},
    "Dense_1": {"kernel": (8, 6)},
    "scanned": {"Dense_0": {"kernel": (2, 8, 6)}},
}
OTHERS = {
    "Dense_0": {"kernel": (6, 8), "bias": (8,)},
    "scanned": {"Dense_0": {"kernel": (2, 8, 6), "bias": (2, 6)}},
    "Embed_0": {"embedding": (7, 4)},
    "temperature": (),
}
VIEWED = {"packed": (6, 12), "heads": (2, 3, 8)}


def shapes_of(case: Case) -> dict[str, Any]:
    """Shapes of a tree that the case takes; 1-D leaves among them where it takes them."""
    viewed = VIEWED if case.kwargs.get("dimension_numbers") is views else {}
    others = OTHERS if case.any_tree else {}
    return {**MATRICES, **others, **viewed}


def normal_tree(shapes: Any, seed: int = 0, dtype: Any = jnp.float32, scale: float = 1.0) -> Any:
    """A tree of normal numbers."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.standard_normal(shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def params_of(case: Case, dtype: Any = jnp.float32) -> Any:
    """Params that the case takes."""
    return normal_tree(shapes_of(case), 0, dtype)


def grads_of(case: Case, steps: int = 1, dtype: Any = jnp.float32, scale: float = 1.0) -> list[Any]:
    """Gradients for them."""
    return [normal_tree(shapes_of(case), 1 + step, dtype, scale) for step in range(steps)]
