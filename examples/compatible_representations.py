"""Adapt a new model's features to an old gallery: affine, orthogonal and λ-orthogonal maps.

An old classifier has embedded a gallery of digits that is not embedded again. A new, better one
brings the queries: with both frozen, a linear map with a bias is fitted from its features to the
old ones, on images of the classes 0-4 that the old model knows. Free, the map finds most in the
gallery and spoils the new features of the other classes; orthogonal, it leaves these as they were.

    python examples/compatible_representations.py            # table and picture; two minutes
    python examples/compatible_representations.py --smoke    # everything once, in seconds

What is chosen is chosen on images for selection; the table and the picture are of other images.
Reference: Ricci et al., λ-Orthogonality Regularization for Compatible Representation Learning,
2025, <https://arxiv.org/abs/2509.16664>.
"""

import dataclasses
import functools
import itertools
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from gpt_compare import COLOURS, markdown, spread
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import orthax
from orthax.diagnostics import of_both, of_params, orthogonality_error, update_to_weight_ratio
from orthax.penalties import lambda_orthogonality

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from record import origin  # noqa: E402

# ------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class Options:
    """Models, adapters, and how long to train them."""

    width: int = 32
    """Features of both models."""
    old_images: int = 20
    """Per known class, to train the old model; the new one gets all images for training."""
    old_hidden: int = 16
    """Hidden units of the old model."""
    new_hidden: int = 256
    """Hidden units of the new model."""
    model_steps: int = 300
    """Updates of each model, on all its images at once."""
    fit_images: int = 40
    """Per known class, to fit the adapters."""
    steps: int = 6000
    """Updates of each adapter, on all its images at once."""
    early_steps: tuple[int, ...] = (200, 400, 800, 1600)
    """Where the affine map is stopped as well: another way to keep it near where it starts."""
    learning_rate: float = 1e-3
    """Of Adam on the adapters: the paper's, for all of them."""
    contrastive: float = 1.0
    """Weight of the contrastive loss beside the distance to the old features."""
    temperature: float = 0.1
    """Of the cosines in the contrastive loss."""
    radii: tuple[float, ...] = (0.0, 3.0, 6.0, 12.0, 16.0, 22.0, 36.0)
    """λ: the paper's for 512 features, times sqrt(width / 512) here."""
    strengths: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Of the penalty: the least that holds every radius is taken."""
    seeds: int = 5
    """Pairs of models, and images to fit adapters on."""
    output: Path | None = None
    """Folder for compatible_representations.json and .png. None: benchmarks/results."""
    progress: bool = True
    """Show a progress bar."""
    smoke: bool = False
    """Tiny sizes; results go to a temporary folder unless --output names one."""


SMOKE = {
    "model_steps": 60,
    "steps": 600,
    "early_steps": (),
    "radii": (0.0, 6.0),
    "strengths": (0.1,),
    "seeds": 2,
}

KNOWN = 5  # classes of the old model and of the adapters' images: 0 to 4; the rest is held out
EXCESS = 0.1  # a radius holds if the distance exceeds it by less: Adam's steps make it tremble

# --------------------------------------------------------------------------------------- models


class Classifier(nnx.Module):
    """Two hidden layers; what comes out of the second are the features."""

    def __init__(self, hidden: int, width: int, rngs: nnx.Rngs):
        """Draw the weights."""
        self.hidden = nnx.Linear(64, hidden, rngs=rngs)
        self.embedding = nnx.Linear(hidden, width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def features(self, images: jax.Array) -> jax.Array:
        """What adapters map, once it is of unit length."""
        return nnx.relu(self.embedding(nnx.relu(self.hidden(images))))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits."""
        return self.head(self.features(images))


class World(NamedTuple):
    """Images, and what two frozen models make of them."""

    labels: np.ndarray
    old: np.ndarray  # features of unit length, (seeds, images, width)
    new: np.ndarray
    train: np.ndarray  # indices of the images that models and adapters are trained on
    select: np.ndarray  # for choices
    report: np.ndarray  # for the table and the picture
    fit: np.ndarray  # for the adapters, of `train`: (seeds, images)


def unit(x: Any, axis: int = -1) -> Any:
    """Vectors of length one, which cosines compare; zeros stay."""
    return x / (x * x).sum(axis=axis, keepdims=True).clip(1e-12) ** 0.5


def train_and_embed(
    models: list[Classifier], steps: int, images: Any, labels: Any, all_images: Any
) -> np.ndarray:
    """Train each classifier on its own images; features of all images."""
    graph = nnx.graphdef(models[0])
    params = [nnx.as_pure(nnx.state(model)) for model in models]
    optimizer = optax.adamw(3e-3)

    def loss_of(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def train(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        def step(carry: Any, _: None) -> Any:
            params, state = carry
            updates, state = optimizer.update(grad(params, images, labels), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        return unit(nnx.merge(graph, params).features(all_images))

    grad = jax.grad(loss_of)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    return np.asarray(jax.jit(jax.vmap(train))(stacked, images, labels))


def make_world(options: Options) -> World:
    """Train both models for every seed; the images are split once."""
    images, labels = load_digits(return_X_y=True)
    images = np.asarray(images / 16, np.float32)
    every = np.arange(len(labels))
    split = functools.partial(train_test_split, random_state=0)
    rest, report = map(np.asarray, split(every, test_size=600, stratify=labels))
    train, select = map(np.asarray, split(rest, test_size=400, stratify=labels[rest]))

    def draw(seed: int, count: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        classes = [train[labels[train] == label] for label in range(KNOWN)]
        return np.concatenate([generator.choice(own, count, replace=False) for own in classes])

    def embed(hidden: int, first_seed: int, chosen: np.ndarray) -> np.ndarray:
        rngs = [nnx.Rngs(first_seed + seed) for seed in range(options.seeds)]
        models = [Classifier(hidden, options.width, each) for each in rngs]
        return train_and_embed(models, options.model_steps, images[chosen], labels[chosen], images)

    seeds = range(options.seeds)
    old = embed(options.old_hidden, 0, np.stack([draw(seed, options.old_images) for seed in seeds]))
    new = embed(options.new_hidden, 1000, np.stack([train for _ in seeds]))
    fit = np.stack([draw(1000 + seed, options.fit_images) for seed in seeds])
    return World(labels, old, new, train, select, report, fit)


# ------------------------------------------------------------------------------------- adapters


def make_optimizer(kind: str, rate: float, radius: Any, strength: Any) -> Any:
    """Adam on kernel and bias; the kernel free, exactly orthogonal or λ-orthogonal."""
    optimizer = optax.adam(rate)
    if kind == "orthogonal":
        kernel = optax.chain(orthax.project_tangent(), optimizer, orthax.keep_orthogonal())
        optimizer = orthax.partition_matrices(kernel, rest=optimizer)
    elif kind == "λ":
        # Before Adam: what comes to rest is then the sum of loss and penalty, as in the paper.
        # After it, the penalty would stand against steps whose length no loss decides.
        penalty = functools.partial(lambda_orthogonality, radius=radius)
        rules = orthax.PathRules(((r"kernel$", penalty),))
        optimizer = optax.chain(orthax.add_penalty(rules, strength), optimizer)
    measures: dict[str, Any] = {
        "distance": of_params(orthogonality_error),
        "ratio": of_both(update_to_weight_ratio),
    }
    return optax.chain(optimizer, optax.monitor(measures))


class Fitted(NamedTuple):
    """An adapter for every seed; curves are (seeds, steps)."""

    adapter: dict[str, np.ndarray]  # kernel and bias
    distance: np.ndarray  # of the kernel from orthogonality, at the end
    losses: np.ndarray
    distances: np.ndarray
    ratios: np.ndarray  # of the kernel's update to the kernel, in length


def adapt(adapter: Any, features: Any) -> Any:
    """New features in the old space."""
    return features @ adapter["kernel"] + adapter["bias"][..., None, :]


def adapter_loss(adapter: Any, new: Any, old: Any, labels: Any, options: Options) -> jax.Array:
    """Distance to the old features, and a supervised contrastive loss against those of all."""
    adapted = adapt(adapter, new)
    alignment = jnp.mean(jnp.sum(jnp.square(adapted - old), axis=-1))
    same = labels[:, None] == labels[None, :]
    logits = unit(adapted) @ unit(old).T / options.temperature
    contrast = optax.softmax_cross_entropy(logits, same / same.sum(axis=1, keepdims=True))
    return alignment + options.contrastive * contrast.mean()


@functools.partial(jax.jit, static_argnames=("options", "kind"))
def fit_seeds(
    options: Options, kind: str, radius: Any, strength: Any, new: Any, old: Any, labels: Any
) -> Any:
    """Fit from the identity; radius and strength are traced, so that all λ compile once."""
    optimizer = make_optimizer(kind, options.learning_rate, radius, strength)

    def fit_one(new: jax.Array, old: jax.Array, labels: jax.Array) -> Any:
        def step(carry: Any, _: None = None) -> Any:
            adapter, state = carry
            loss, gradient = jax.value_and_grad(adapter_loss)(adapter, new, old, labels, options)
            updates, state = optimizer.update(gradient, state, adapter)
            watched = [optax.tree.get(state, name)["kernel"] for name in ("distance", "ratio")]
            return (optax.apply_updates(adapter, updates), state), (loss, *watched)

        adapter = {"kernel": jnp.eye(options.width), "bias": jnp.zeros(options.width)}
        # The state of optax.monitor has its structure from the first update on; scan needs that.
        carry, first = step((adapter, optimizer.init(adapter)))
        (adapter, _), rest = jax.lax.scan(step, carry, length=options.steps - 1)
        curves = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, rest)
        return adapter, orthogonality_error(adapter["kernel"]), *curves

    return jax.vmap(fit_one)(new, old, labels)


def fit(
    options: Options, world: World, kind: str, radius: float = 0.0, strength: float = 0.0
) -> Fitted:
    """Adapters of all seeds."""
    seeds = np.arange(options.seeds)[:, None]
    data = world.new[seeds, world.fit], world.old[seeds, world.fit], world.labels[world.fit]
    return Fitted(*jax.tree.map(np.asarray, fit_seeds(options, kind, radius, strength, *data)))


def choose_strength(distances: dict[float, dict[float, float]]) -> float:
    """The least strength with which no distance exceeds its radius, or the one nearest to that.

    Args:
      distances: From orthogonality in the end, by strength and then by radius.
    """
    excess = {s: max(x - radius for radius, x in found.items()) for s, found in distances.items()}
    holding = [s for s, most in excess.items() if most < EXCESS]
    return min(holding) if holding else min(excess, key=lambda s: excess[s])


# ----------------------------------------------------------------------------------- evaluation


def retrieval(
    queries: np.ndarray, gallery: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether the nearest item by cosine is of the query's class, and the average precision.

    Args:
      queries: Features (..., images, width).
      gallery: Features of the same images, of which a query does not find its own.
      labels: Of the images; each class has two images or more.

    Returns:
      Both in percent, shape (..., images). Their means are CMC top-1 and mAP.
    """
    cosines = unit(queries) @ unit(gallery).mT
    own = np.arange(len(labels))
    cosines[..., own, own] = -np.inf
    ranked = np.argsort(-cosines, axis=-1, stable=True)[..., :-1]
    hits = labels[ranked] == labels[:, None]
    precision = np.cumsum(hits, axis=-1) / np.arange(1, len(labels))
    return 100.0 * hits[..., 0], 100 * np.sum(precision * hits, axis=-1) / np.sum(hits, axis=-1)


def evaluate(world: World, features: np.ndarray, images: np.ndarray) -> dict[str, np.ndarray]:
    """Retrieval among images, embedded by the old model or like the queries; one per seed.

    Args:
      world: With the gallery, and with labels that tell known and held-out classes apart.
      features: Of all images, (seeds, images, width).
      images: Indices of those to search for and in.
    """
    labels, own = world.labels[images], features[:, images]
    known = labels < KNOWN
    found = {}
    for gallery, places in (
        (world.old[:, images], {"known_in_old": known, "all_in_old": np.full_like(known, True)}),
        (own, {"known_in_own": known, "held_out_in_own": ~known}),
    ):
        top1, precision = retrieval(own, gallery, labels)
        for name, queries in places.items():
            found[f"{name}_top1"] = top1[:, queries].mean(axis=-1)
            found[f"{name}_map"] = precision[:, queries].mean(axis=-1)
    # Accuracy of the nearest class mean, of the images for training.
    classes = [world.train[world.labels[world.train] == label] for label in range(10)]
    means = np.stack([unit(features[:, of]).mean(axis=1) for of in classes], axis=-1)
    right = np.argmax(own @ unit(means, axis=-2), axis=-1) == labels
    return found | {"class_mean": 100 * right.mean(axis=-1)}


class Line(NamedTuple):
    """One line of the table; arrays have one entry per seed."""

    name: str
    family: str  # old, new, orthogonal, λ, affine
    radius: float | None  # λ
    fitted: Fitted | None
    report: dict[str, np.ndarray]  # see `evaluate`
    select: dict[str, np.ndarray]


GAINED = "known_in_old_map"
KEPT = "held_out_in_own_map"
FRONT = ("orthogonal", "affine")  # adapters between which the others are expected


def best_of(lines: list[Line], family: str) -> Line:
    """The line of a family with the best mean of what is gained and kept, on `select`."""
    chosen = [line for line in lines if line.family == family]
    return max(chosen, key=lambda line: float(np.mean([line.select[GAINED], line.select[KEPT]])))


def above_front(line: Line, lines: list[Line]) -> np.ndarray:
    """How much more is gained than on the straight line from orthogonal to affine, as much kept."""
    first, last = (next(end.report for end in lines if end.name == name) for name in FRONT)
    share = (line.report[KEPT] - first[KEPT]) / (last[KEPT] - first[KEPT])
    return line.report[GAINED] - (first[GAINED] + share * (last[GAINED] - first[GAINED]))


def compare(options: Options, world: World) -> tuple[list[Line], dict[float, dict[float, float]]]:
    """Fit and evaluate everything: lines of the table, and distances of all λ and strengths."""
    bar = functools.partial(tqdm, disable=not options.progress)
    radii = [radius * math.sqrt(options.width / 512) for radius in options.radii]
    grid = itertools.product(options.strengths, radii)
    fits = {pair: fit(options, world, "λ", *reversed(pair)) for pair in bar(list(grid), desc="λ")}
    distances: dict[float, dict[float, float]] = {strength: {} for strength in options.strengths}
    for (strength, radius), fitted in fits.items():
        distances[strength][radius] = round(float(fitted.distance.mean()), 4)
    strength = choose_strength(distances)

    variants: list[tuple[str, str, float | None, Fitted | None]] = [
        ("old", "old", None, None),
        ("new", "new", None, None),
        ("orthogonal", "orthogonal", None, fit(options, world, "orthogonal")),
    ]
    variants += [(f"λ = {radius:g}", "λ", radius, fits[strength, radius]) for radius in radii]
    for steps in bar((*options.early_steps, options.steps), desc="affine"):
        name = "affine" if steps == options.steps else f"affine, {steps} steps"
        fitted = fit(dataclasses.replace(options, steps=steps), world, "affine")
        variants.append((name, "affine", None, fitted))

    lines = []
    for name, family, radius, fitted in variants:
        features = world.old if family == "old" else world.new
        features = features if fitted is None else adapt(fitted.adapter, features)
        both = [evaluate(world, features, images) for images in (world.report, world.select)]
        lines.append(Line(name, family, radius, fitted, both[0], both[1]))
    return lines, distances


# -------------------------------------------------------------------------------------- results

TITLES = {
    "known_in_old_top1": "0-4 in old: top-1",
    "known_in_old_map": "mAP",
    "all_in_old_map": "0-9 in old: mAP",
    "known_in_own_top1": "0-4 in own: top-1",
    "known_in_own_map": "mAP",
    "held_out_in_own_top1": "5-9 in own: top-1",
    "held_out_in_own_map": "mAP",
    "class_mean": "class mean",
}

NOTES = """
Percent, {seeds} seeds. Features of the old and the new model as they are, and of the new one behind
adapters, fitted on 0-4. Queries search among all images: embedded by the old model, or like them.
Class mean: accuracy of the nearest one. Distance: Frobenius norm of WᵀW - I. Above front: mAP of
0-4 in old, above the straight line from orthogonal to affine at the same mAP of 5-9 in own.
Chosen: of the λ, and of the affine maps, the best mean of these two mAPs on other images.
Strength of the penalty: {strength:g}. Data: {path}"""


def format_table(lines: list[Line]) -> str:
    """A Markdown table, aligned to be read as it is."""
    rows = [["features", *TITLES.values(), "distance", "above front"]]
    chosen = [best_of(lines, family).name for family in ("λ", "affine")]
    for line in lines:
        row = [f"{line.name} (chosen)" if line.name in chosen else line.name]
        row += [spread(line.report[name], 1) for name in TITLES]
        row.append("" if line.fitted is None else spread(line.fitted.distance, 2))
        between = line.fitted is not None and line.name not in FRONT
        rows.append([*row, spread(above_front(line, lines), 1) if between else ""])
    return markdown(rows)


def draw(lines: list[Line], options: Options, path: Path) -> None:
    """What is gained against what is kept, and distances from orthogonality in training."""
    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    named = {line.name: line for line in lines}
    x = {line.name: line.report[KEPT] - named["new"].report[KEPT] for line in lines}
    y = {line.name: line.report[GAINED] for line in lines}
    ddof = min(1, options.seeds - 1)
    looks = {"λ": ("o", COLOURS[1]), "affine": ("^", COLOURS[2]), "orthogonal": ("s", COLOURS[3])}
    labels = {"λ": "λ-orthogonal", "affine": "affine, and stopped early"}
    offsets = {"λ": (7, 6, "left"), "affine": (-7, -12, "right"), "orthogonal": (0, -16, "center")}
    for family, (marker, colour) in looks.items():
        names = [line.name for line in lines if line.family == family]
        style = {"fmt": f"{marker}-", "color": colour, "label": labels.get(family, family)}
        left.errorbar(
            x=[x[name].mean() for name in names],
            y=[y[name].mean() for name in names],
            xerr=[x[name].std(ddof=ddof) for name in names],
            # Of the difference: most of the deviation of y itself is of the models.
            yerr=[(y[name] - y["orthogonal"]).std(ddof=ddof) for name in names],
            elinewidth=0.7,
            **style,
        )
        *offset, side = offsets[family]
        place = {"xytext": offset, "textcoords": "offset points", "ha": side}
        for name in names:
            text, middle = name.removeprefix("affine, "), (x[name].mean(), y[name].mean())
            left.annotate(text, middle, **place, size=8, color=colour)
    line_between = [[values[name].mean() for name in FRONT] for values in (x, y)]
    left.plot(*line_between, ":k", linewidth=0.9, label="straight between the two")
    left.axhline(y["old"].mean(), color="0.3", linestyle="--", linewidth=0.9, label="old queries")
    left.margins(x=0.09)
    left.set(
        title="Gained against kept",
        xlabel="mAP of held-out classes among new features: change by the adapter",
        ylabel="mAP of known classes in the old gallery",
    )
    left.legend(
        title="bars: standard deviation, of y's\ndifference from orthogonal",
        title_fontsize="small",
        fontsize="small",
        loc="center left",
        bbox_to_anchor=(0.0, 0.3),
    )

    radii = [line for line in lines if line.radius is not None]
    for i, line in enumerate([*radii, named["affine"]]):
        colour = COLOURS[2] if line.radius is None else str(0.8 - 0.8 * i / len(radii))
        assert line.fitted is not None
        right.plot(line.fitted.distances.mean(axis=0), color=colour, label=line.name)
        if line.radius:
            right.axhline(line.radius, color=colour, linestyle="--", linewidth=0.8)
    exact = named["orthogonal"].fitted
    assert exact is not None
    right.plot([], [], color=COLOURS[3], label=f"orthogonal: {exact.distances.max():.0e}")
    right.set_yscale("log")
    right.set_ylim(bottom=0.03)
    right.set(
        title="Distance from orthogonality in training (dashed: λ)",
        xlabel="steps",
        ylabel="Frobenius norm of WᵀW - I",
    )
    right.legend(fontsize="small", ncols=3, loc="lower right", bbox_to_anchor=(1.0, 0.13))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(f"Linear maps from new to old features of digits, {options.seeds} seeds")
    figure.savefig(path, dpi=150)


def record_of(line: Line, points: int = 25) -> dict[str, Any]:
    """The numbers of a line for JSON; of curves, means over seeds at some steps."""
    found = {**line._asdict(), "fitted": None}
    for kind in ("report", "select"):
        found[kind] = {name: np.round(x, 3).tolist() for name, x in found[kind].items()}
    if line.fitted is not None:
        steps = np.linspace(0, line.fitted.losses.shape[1] - 1, points).astype(int)
        distance = [float(f"{x:.4g}") for x in line.fitted.distance]
        found["fitted"] = {"distance": distance, "steps": steps.tolist()}
        for name in ("losses", "distances", "ratios"):
            means = getattr(line.fitted, name).mean(axis=0)[steps]
            found["fitted"][name] = [float(f"{mean:.4g}") for mean in means]
    return found


# --------------------------------------------------------------------------------------- script


def main(options: Options) -> list[Line]:
    """Train models and adapters, print the table and write data and picture."""
    if options.smoke:
        options = dataclasses.replace(options, **SMOKE)
    lines, distances = compare(options, make_world(options))
    strength = choose_strength(distances)
    with tempfile.TemporaryDirectory() as temporary:
        usual = Path(temporary) if options.smoke else ROOT / "benchmarks" / "results"
        output = options.output or usual
        output.mkdir(parents=True, exist_ok=True)
        draw(lines, options, output / "compatible_representations.png")
        settings = dataclasses.asdict(options)
        record = {**origin(), "options": {k: v for k, v in settings.items() if k != "output"}}
        record |= {"strength": strength, "distances": distances}
        head = json.dumps(record, indent=1).removesuffix("\n}")
        rows = ",\n  ".join(json.dumps(record_of(line)) for line in lines)
        path = output / "compatible_representations.json"
        path.write_text(f'{head},\n "lines": [\n  {rows}\n ]\n}}\n')
    print(format_table(lines))
    print(NOTES.format(seeds=options.seeds, strength=strength, path=path))
    return lines


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
