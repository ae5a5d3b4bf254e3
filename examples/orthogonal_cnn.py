"""Train a small CNN with and without L_orth: singular values, Lipschitz constants, robustness.

Three convolutions and a linear layer on scikit-learn's 8x8 digits, with nothing that normalises, so
that the product of the layers' largest singular values bounds the network's Lipschitz constant.
`orthax.add_penalty` pulls every layer towards orthogonality, from not at all to harder than the
task. Every strength is shown at its own best learning rate, over several seeds.

    python examples/orthogonal_cnn.py            # tables and picture; minutes on two cores
    python examples/orthogonal_cnn.py --smoke    # everything once, in seconds
    python examples/orthogonal_cnn.py --strengths 0 0.1 --seeds 3
"""

import dataclasses
import functools
import itertools
import json
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
from gpt_compare import best_rate, markdown, rates_to_add, spread
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import orthax
from orthax import diagnostics
from orthax.conv_penalties import convolution_orthogonality, orthogonal_convolution_exists
from orthax.linalg import convolution_singular_values
from orthax.nn import dimension_numbers
from orthax.penalties import soft_orthogonality

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from record import origin  # noqa: E402

# ------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class Options:
    """How to train, and what to measure."""

    strengths: tuple[float, ...] = (0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    """Of the penalty, beside a loss in nats."""
    seeds: int = 5
    """Runs of each setting; a seed decides initial weights and batches."""
    steps: int = 600
    """Updates of a run."""
    batch: int = 64
    """Images per update."""
    start_rate: float = 2e-3
    """Middle of the first grid of learning rates; they fall to 0 along a cosine."""
    rates: int = 3
    """Learning rates per strength, a factor 2 apart..."""
    more_rates: int = 4
    """... and at most so many more, as long as the best one lies at an end of them."""
    noise: tuple[float, ...] = (0.2, 0.4)
    """Standard deviations of Gaussian noise on the test images, whose pixels lie in [0, 1]."""
    budgets: tuple[float, ...] = (0.25, 0.5)
    """Euclidean lengths of attacks; half of the images lie 2 from the nearest of another class."""
    attack_steps: int = 20
    """Steps of projected gradient descent on the margin."""
    monitor_every: int = 25
    """Updates between two readings of the diagnostics."""
    output: Path | None = None
    """Folder for orthogonal_cnn.json and .png. None: benchmarks/results."""
    progress: bool = True
    """Show a progress bar."""
    smoke: bool = False
    """Tiny sizes; results go to a temporary folder unless --output names one."""


SMOKE = {
    "strengths": (0.0, 1.0),
    "seeds": 2,
    "steps": 20,
    "rates": 1,
    "more_rates": 0,
    "noise": (0.2,),
    "budgets": (0.25,),
    "attack_steps": 3,
    "monitor_every": 5,
}


class Layer(NamedTuple):
    """A 3x3 convolution with circular padding: outputs M, inputs C, stride S."""

    inputs: int
    outputs: int
    stride: int
    size: int  # of its square input


# Both M <= C S^2 (orthonormal rows) and M > C S^2 (columns), but no M = C S^2: with a stride of 2,
# such kernels stick in local minima of L_orth.
LAYERS = (Layer(1, 16, 1, 8), Layer(16, 32, 2, 8), Layer(32, 48, 1, 4))
FEATURES, CLASSES = 48 * 4 * 4, 10
NAMES = ("convolution 1", "convolution 2", "convolution 3", "linear")
PATHS = (*(f"convolutions/{i}/kernel" for i in range(len(LAYERS))), "linear/kernel")
# Logits of a 1-Lipschitz network move by no more than images do, which lie 1 to 4 apart: too little
# for cross-entropy. So the loss sees them times this, at every strength.
LOGIT_SCALE = 10.0

# ---------------------------------------------------------------------------------------- model


class Split(NamedTuple):
    """Images (n, 8, 8, 1) with pixels in [0, 1], and labels."""

    images: Any
    labels: Any


def load_splits() -> list[Split]:
    """For training, for choosing learning rates, and for the report: 997, 300 and 500 images."""
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    halve = functools.partial(train_test_split, random_state=0)
    rest, report = halve(np.arange(len(labels)), test_size=500, stratify=labels)
    train, select = halve(rest, test_size=300, stratify=labels[rest])
    return [Split(images[i], labels[i]) for i in (train, select, report)]


class CNN(nnx.Module):
    """The layers, with ReLU between them."""

    def __init__(self, rngs: nnx.Rngs):
        circular = functools.partial(nnx.Conv, kernel_size=(3, 3), padding="CIRCULAR", rngs=rngs)
        self.convolutions = nnx.List(
            circular(inputs, outputs, strides=stride) for inputs, outputs, stride, _ in LAYERS
        )
        self.linear = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (n, CLASSES) of images (n, 8, 8, 1)."""
        x = images
        for convolution in self.convolutions:
            x = nnx.relu(convolution(x))
        return self.linear(x.reshape(len(x), FEATURES))


ABSTRACT = nnx.eval_shape(lambda: CNN(nnx.Rngs(0)))  # shapes in the place of arrays


def init_params(seed: int) -> Any:
    """Plain arrays at paths such as convolutions, 0, kernel."""
    return nnx.as_pure(nnx.split(CNN(nnx.Rngs(seed)))[1])


def kernels_of(params: Any) -> list[jax.Array]:
    """In the order of PATHS."""
    convolutions = [params["convolutions"][i]["kernel"] for i in range(len(LAYERS))]
    return [*convolutions, params["linear"]["kernel"]]


@jax.jit
def logits_of(params: Any, images: jax.Array) -> jax.Array:
    """Of the network itself, without LOGIT_SCALE."""
    return nnx.merge(nnx.graphdef(ABSTRACT), params)(images)


@jax.jit
def loss_of(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats."""
    logits = LOGIT_SCALE * logits_of(params, images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


gradient_of = jax.jit(jax.grad(loss_of))

# ------------------------------------------------------------------------------------- training


def penalty_rules() -> orthax.PathRules:
    """L_orth with each convolution's own stride, and soft orthogonality of the linear layer."""
    strides = [layer.stride for layer in LAYERS]
    penalties = [functools.partial(convolution_orthogonality, strides=s) for s in strides]
    return orthax.PathRules(tuple(zip(PATHS, (*penalties, soft_orthogonality), strict=True)))


def make_optimizer(strength: Any, learning_rate: Any) -> Any:
    """Adam with a penalty, and with two diagnostics of every kernel as a matrix.

    The penalty is coupled, a term of the loss, as in the papers: then Adam's steps keep their
    length at any strength. Decoupled, plain gradient descent on a quartic diverges where learning
    rate times strength times curvature exceeds 2; that is 12 s^2 - 4 at a singular value s.
    """
    matrices = dimension_numbers(ABSTRACT)
    measures: dict[str, Any] = {
        "matrix_error": diagnostics.of_params(diagnostics.orthogonality_error, matrices),
        "update_ratio": diagnostics.of_both(diagnostics.update_to_weight_ratio, matrices),
    }
    return optax.chain(
        orthax.add_penalty(penalty_rules(), strength),
        optax.adam(learning_rate),
        optax.monitor(measures),
    )


@jax.jit
def update(gradient: Any, params: Any, state: Any, strength: Any, learning_rate: Any) -> Any:
    """Next params and state. As the last two are traced, all runs share what is compiled."""
    optimizer = make_optimizer(strength, learning_rate)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def train(options: Options, data: Split, strength: float, learning_rate: float, seed: int) -> Any:
    """Trained params, and readings of each diagnostic: a list with one entry per layer."""
    params = init_params(seed)
    state = make_optimizer(strength, learning_rate).init(params)
    generator = np.random.default_rng(seed)
    schedule = (
        learning_rate * (1 + np.cos(np.linspace(0, np.pi, options.steps, endpoint=False))) / 2
    )
    readings: dict[str, Any] = {"matrix_error": [], "update_ratio": []}
    for step, rate in enumerate(schedule):
        batch = generator.choice(len(data.labels), options.batch, replace=False)
        gradient = gradient_of(params, data.images[batch], data.labels[batch])
        params, state = update(gradient, params, state, strength, rate)
        if step % options.monitor_every == 0:
            for name, taken in readings.items():
                by_path = optax.tree.get(state, name)
                taken.append([float(by_path[path]) for path in PATHS])
    return params, readings


# ---------------------------------------------------------------------------------- measurement


@jax.jit
def margins_of(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Logit of the label less the largest other one; positive where the network is right."""
    logits = logits_of(params, images)
    own = jax.nn.one_hot(labels, CLASSES, dtype=bool)
    return jnp.sum(logits, 1, where=own) - jnp.max(logits, 1, where=~own, initial=-jnp.inf)


@functools.partial(jax.jit, static_argnames="steps")
def attack(params: Any, data: Split, budget: Any, steps: int) -> jax.Array:
    """Images moved by at most `budget` in Euclidean length, within [0, 1], to shrink margins.

    Projected gradient descent in steps of 2.5 budget / steps, on margins: their gradients do not
    vanish where a network is sure, as those of its loss do.
    """

    def unit(x: jax.Array, least: Any) -> jax.Array:
        """Of each image, whose length counts as `least` if it is less."""
        length = jnp.linalg.norm(x.reshape(len(x), -1), axis=1)
        return x / jnp.maximum(length, least)[:, None, None, None]

    def step(_: Any, moved: jax.Array) -> jax.Array:
        slope = jax.grad(lambda x: jnp.sum(margins_of(params, x, data.labels)))(moved)
        moved = moved - 2.5 * budget / steps * unit(slope, 1e-12)
        return jnp.clip(data.images + budget * unit(moved - data.images, budget), 0, 1)

    return jax.lax.fori_loop(0, steps, step, data.images)


@jax.jit
def spectra_of(params: Any) -> list[jax.Array]:
    """Singular values of each layer as an operator on its input, decreasing."""
    *kernels, linear = kernels_of(params)
    spectra = [
        convolution_singular_values(kernel, layer.size, layer.stride)
        for kernel, layer in zip(kernels, LAYERS, strict=True)
    ]
    return [*spectra, diagnostics.singular_values(linear)]


@jax.jit
def penalties_of(params: Any) -> list[jax.Array]:
    """What `add_penalty` differentiates, for each layer."""
    pairs = zip(penalty_rules().rules, kernels_of(params), strict=True)
    return [penalty(kernel) for (_, penalty), kernel in pairs]


@jax.jit
def largest_slope(params: Any, images: jax.Array) -> jax.Array:
    """Largest singular value of the network's Jacobian at an image: its constant is no less."""
    jacobians = jax.vmap(jax.jacrev(lambda image: logits_of(params, image[None])[0]))(images)
    return jnp.max(jnp.linalg.norm(jacobians.reshape(len(images), CLASSES, -1), 2, axis=(1, 2)))


def measure(params: Any, data: Split, options: Options) -> dict[str, Any]:
    """Accuracies as shares of the images, and the layers as operators.

    An image is certified if no perturbation of that length can change the answer: the difference of
    two logits moves by at most sqrt(2) times the Lipschitz bound times its length.
    """

    def accuracy(images: Any) -> float:
        return float(jnp.mean(margins_of(params, images, data.labels) > 0))

    spectra = [np.asarray(values) for values in spectra_of(params)]
    bound = float(np.prod([values[0] for values in spectra]))
    radii = margins_of(params, *data) / (np.sqrt(2) * bound)
    normal = np.random.default_rng(0).standard_normal(data.images.shape, np.float32)
    found: dict[str, Any] = {"clean": accuracy(data.images)}
    for deviation in options.noise:
        found[f"noise {deviation:g}"] = accuracy(data.images + deviation * normal)
    for budget in options.budgets:
        found[f"attack {budget:g}"] = accuracy(attack(params, data, budget, options.attack_steps))
    for budget in options.budgets:
        found[f"certified {budget:g}"] = float(jnp.mean(radii > budget))
    return found | {
        "lipschitz_bound": bound,
        "largest_slope": float(largest_slope(params, data.images)),
        "largest": [float(values[0]) for values in spectra],
        "smallest": [float(values[-1]) for values in spectra],
        "penalties": [float(value) for value in penalties_of(params)],
    }


class Tuned(NamedTuple):
    """One strength at its best learning rate."""

    strength: float
    learning_rate: float
    select_by_rate: dict[float, float]  # mean loss on the validation split
    report: list[dict[str, Any]]  # what `measure` finds on the test split, for each seed
    readings: dict[str, Any]  # of each diagnostic, mean over seeds: a list of one entry per layer

    def values(self, name: str) -> np.ndarray:
        """A measurement; seeds along the first axis."""
        return np.array([found[name] for found in self.report])


def tune(options: Options, splits: list[Split], strength: float) -> Tuned:
    """Train at several learning rates until the best one lies inside the grid."""
    data, select, report = splits
    runs: dict[float, list[tuple[Any, Any]]] = {}
    losses: dict[float, float] = {}

    def run(rate: float) -> None:
        runs[rate] = [train(options, data, strength, rate, seed) for seed in range(options.seeds)]
        losses[rate] = float(np.mean([loss_of(params, *select) for params, _ in runs[rate]]))

    for i in range(options.rates):
        run(options.start_rate * 2.0 ** (i - options.rates // 2))
    most = options.rates + options.more_rates
    while added := rates_to_add(losses, most - len(losses)):
        run(added[0])
    best = best_rate(losses)
    measured = [measure(params, report, options) for params, _ in runs[best]]
    _, readings = zip(*runs[best], strict=True)
    means = {name: np.mean([r[name] for r in readings], 0).tolist() for name in readings[0]}
    return Tuned(strength, best, dict(sorted(losses.items())), measured, means)


# -------------------------------------------------------------------------------------- results


def format_layers() -> str:
    """Whether the layers can be orthogonal, and on which side: a Markdown table."""
    rows = [["layer", "kernel", "stride", "orthonormal", "exists"]]
    for name, (inputs, outputs, stride, _) in zip(NAMES, LAYERS, strict=False):
        side = "rows" if outputs <= inputs * stride**2 else "columns"
        exists = orthogonal_convolution_exists((3, 3), stride, inputs, outputs)
        rows.append([name, f"3x3, {inputs} to {outputs}", str(stride), side, str(exists)])
    return markdown(rows)


def accuracy_names(line: Tuned) -> list[str]:
    """Of the measurements that are shares of the test images."""
    return [name for name in line.report[0] if name.split()[0] in MARKERS]


def format_accuracies(lines: list[Tuned]) -> str:
    """Test accuracies in percent, mean and standard deviation over seeds: a Markdown table."""
    names = accuracy_names(lines[0])
    rows = [["strength", "learning rate", *names]]
    for line in lines:
        cells = [spread(100 * line.values(name), 1) for name in names]
        rows.append([f"{line.strength:g}", f"{line.learning_rate:g}", *cells])
    return markdown(rows)


def format_operators(lines: list[Tuned]) -> str:
    """The layers as operators, L_orth summed over convolutions: a Markdown table of means."""
    rows = [["strength", "L_orth", *NAMES, "Lipschitz bound", "largest slope", "update / weight"]]
    for line in lines:
        ends = zip(line.values("smallest").mean(0), line.values("largest").mean(0), strict=True)
        row = [f"{line.strength:g}", f"{line.values('penalties')[:, :-1].sum(1).mean():.2g}"]
        row += [f"{low:.2f} to {high:.2f}" for low, high in ends]
        row += [spread(line.values(name), 2) for name in ("lipschitz_bound", "largest_slope")]
        rows.append([*row, f"{np.median(line.readings['update_ratio']):.4f}"])
    return markdown(rows)


MARKERS = {"clean": "o", "noise": "s", "attack": "v", "certified": "D"}
COLOURS = ("#000000", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#88CCAA")


def draw(lines: list[Tuned], options: Options, path: Path) -> None:
    """Accuracies and singular values against strength, and a diagnostic against steps."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    spare = min(1, options.seeds - 1)
    places, strengths = np.arange(len(lines)), [f"{line.strength:g}" for line in lines]
    for name, colour in zip(accuracy_names(lines[0]), itertools.cycle(COLOURS), strict=False):
        values = np.array([100 * line.values(name) for line in lines])
        style = {"fmt": MARKERS[name.split()[0]] + "-", "color": colour, "capsize": 3}
        left.errorbar(places, values.mean(1), values.std(1, ddof=spare), label=name, **style)
    left.set(title="Accuracy on test images", ylabel="percent", ylim=(-3, 103))
    for i, name in enumerate(NAMES):
        lows = [line.values("smallest")[:, i].mean() for line in lines]
        highs = [line.values("largest")[:, i].mean() for line in lines]
        middle.vlines(places + 0.16 * (i - 1.5), lows, highs, COLOURS[i], lw=5, label=name)
    middle.axhline(1, color="#999999", lw=1, zorder=0)
    middle.set(title="Singular values, smallest to largest", yscale="log")
    middle.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    middle.minorticks_off()
    for line, colour, strength in zip(lines, itertools.cycle(COLOURS), strengths, strict=False):
        course = [by_layer[1] for by_layer in line.readings["matrix_error"]]
        steps = options.monitor_every * np.arange(len(course))
        right.plot(steps, course, color=colour, label=f"strength {strength}")
    right.set(title="Orthogonality error of kernel 2 as a matrix", xlabel="steps", yscale="log")
    right.margins(y=0.2)  # for the legend
    left.legend(fontsize="small", loc=(0.03, 0.07))
    middle.legend(fontsize="small")
    right.legend(fontsize="small", loc="lower left", ncols=3)
    for axes in (left, middle):
        axes.set_xticks(places, strengths)
        axes.set_xlabel("strength of the penalty")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.suptitle(f"CNN on 8x8 digits, Adam with L_orth; {options.seeds} seeds per strength")
    figure.savefig(path, dpi=150)


# --------------------------------------------------------------------------------------- script


def main(options: Options) -> list[Tuned]:
    """Train at every strength, print the tables and write data and picture."""
    if options.smoke:
        options = dataclasses.replace(options, **SMOKE)
    print(format_layers())
    splits = load_splits()
    bar = tqdm(options.strengths, "strengths", disable=not options.progress)
    lines = [tune(options, splits, strength) for strength in bar]
    with tempfile.TemporaryDirectory() as temporary:
        usual = Path(temporary) if options.smoke else ROOT / "benchmarks" / "results"
        output = options.output or usual
        output.mkdir(parents=True, exist_ok=True)
        draw(lines, options, output / "orthogonal_cnn.png")
        settings = dataclasses.asdict(options) | {"layers": LAYERS, "logit_scale": LOGIT_SCALE}
        settings = {k: v for k, v in settings.items() if k not in ("output", "progress")}
        record = {**origin(), "options": settings, "runs": [line._asdict() for line in lines]}
        path = output / "orthogonal_cnn.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\n{format_accuracies(lines)}\n\n{format_operators(lines)}")
        print(f"\nAccuracies in percent of {len(splits[-1].labels)} test images. Data: {path}")
    return lines


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
