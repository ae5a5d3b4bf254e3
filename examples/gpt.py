"""Train a byte-level GPT on the source of Python's own standard library, with any optimizer.

Nothing is downloaded: the corpus is the folder of the running interpreter. Read top to bottom:
settings, corpus, model, optimizers, one training step, log and checkpoints, the loop. What is only
for several devices or processes is in gpt_mesh.py.

    python examples/gpt.py                                   # Muon, about a minute on two cores
    python examples/gpt.py --optimizer adamw --plot loss.png
    python examples/gpt.py --data ~/some/texts --width 256 --layers 6 --steps 3000
    python examples/gpt.py --checkpoint-dir run1             # stop it, start it again: it goes on
    python examples/gpt.py --tensorboard events              # then: tensorboard --logdir events
    python examples/gpt.py --mesh fsdp=4,tp=2                # on eight devices, docs/scale.md
    python examples/gpt.py --smoke                           # everything once, in seconds
"""

import csv
import dataclasses
import functools
import hashlib
import importlib.util
import io
import itertools
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO

import gpt_mesh
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh
from matplotlib.figure import Figure
from tqdm import tqdm

import orthax
from orthax import diagnostics
from orthax.linalg import coefficients, newton_schulz, zolotarev

if TYPE_CHECKING:
    import grain

# ------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. Two runs with equal settings give equal losses."""

    # Corpus
    data: Path | None = None
    """Text file, or folder of text files. None: Python's standard library."""

    # Model
    width: int = 128
    """Features of the residual stream."""
    layers: int = 3
    """Transformer blocks."""
    heads: int = 4
    """Attention heads per block; they divide the width."""
    context: int = 128
    """Bytes the model sees at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matrix products. Parameters and losses are float32 always."""

    # Low rank
    rank: int = 32
    """[trion, dct_adamw] Dimensions in which a kernel is updated."""
    basis: str = "dct"
    """[trion, dct_adamw] Of the projection: dct, dct3, random, hadamard, columns, svd, subspace."""
    ranking: str = "l2"
    """[trion, dct_adamw] Norm by which the dimensions are chosen, l1 or l2."""

    # Training
    start_from: Path | None = None
    """Checkpoint folder of a run with the same model, whose parameters to start from."""
    optimizer: str = "muon"
    """A name in OPTIMIZERS, such as adamw, muon, root."""
    learning_rate: float | None = None
    """Peak learning rate. None: the stored best one, LEARNING_RATES."""
    weight_decay: float = 0.1
    """Decoupled, times the learning rate; on kernels only."""
    steps: int = 600
    """Parameter updates."""
    warmup_steps: int = 30
    """Updates of linear rise from zero to the peak rate; a linear fall to zero follows."""
    batch: int = 16
    """Windows of `context` bytes per update."""
    seed: int = 0
    """Of the initial parameters, of the order of the batches and of the outliers."""
    outliers: float = 0.0
    """Share of the gradient's entries that get heavy noise, 100 standard deviations of their leaf:
    a stress test for optimizers. 1e-3 is much."""

    # Evaluation
    eval_every: int = 25
    """Updates between evaluations. The start and the end are evaluated too."""
    eval_windows: int = 128
    """Held-out windows of `context` bytes, of each held-out split."""

    # Files
    log: Path | None = None
    """CSV file of losses. None: log.csv beside the checkpoints, or none without them."""
    plot: Path | None = None
    """Picture of loss against steps."""
    tensorboard: Path | None = None
    """Folder for TensorBoard: losses of every step; where evaluated, what an optimizer with
    `optax.snapshot` or `optax.monitor` in it measures. Needs tensorboardX."""
    checkpoint_dir: Path | None = None
    """Folder to save the run in, and to resume it from if it holds a checkpoint."""
    checkpoint_every: int = 100
    """Updates between checkpoints. The end is saved too."""

    # Devices
    mesh: str | None = None
    """Axes over all devices of all processes, such as fsdp=4,tp=2: dp cuts the batch, fsdp the
    batch and the parameters, tp heads and hidden features. None: one device."""

    # Manner
    progress: bool = True
    """Show a progress bar."""
    smoke: bool = False
    """Overrides the sizes by tiny ones and writes every file, to a temporary folder by default."""


# Peak learning rates, a factor 2 apart, best on the `select` split for the settings above.
LEARNING_RATES = {
    "adamw": 4e-3,
    "muon": 16e-3,
    "muon_int8": 16e-3,
    "normuon": 16e-3,
    "muon_original_table": 16e-3,
    "muon_eight_steps": 16e-3,
    "sgd": 0.1,
    "muon_three_steps": 8e-3,
    "muon_polynomial": 16e-3,
    "muon_rational": 16e-3,
    "muon_exact": 16e-3,
    "root": 16e-3,
    "auon_paper": 2e-3,
    "auon_code": 25e-3,
    "auon_rms": 16e-3,
    "hybrid_auon": 1e-3,
    "trion": 16e-3,
    "dct_adamw": 8e-3,
}

SMOKE = {
    "width": 32,
    "layers": 2,
    "context": 32,
    "batch": 8,
    "steps": 12,
    "warmup_steps": 2,
    "eval_every": 4,
    "eval_windows": 16,
    "checkpoint_every": 5,
}

# Settings that may differ when a run is resumed: they change what is written, not what is computed.
FREE_ON_RESUME = {
    *("data", "log", "plot", "tensorboard", "checkpoint_dir", "checkpoint_every"),
    *("mesh", "progress", "smoke"),
}


def settings_that_matter(config: Config) -> dict[str, Any]:
    """The settings that losses depend on, besides the corpus."""
    settings = dataclasses.asdict(config)
    settings["start_from"] = None if config.start_from is None else str(config.start_from)
    return {name: value for name, value in settings.items() if name not in FREE_ON_RESUME}


# --------------------------------------------------------------------------------------- corpus

# Of the standard library: tests, tables, and the build settings of this machine are left out.
SKIPPED_FOLDERS = ("site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data")
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "__pycache__")
BLOCK = 4096  # bytes per document when the corpus is a single file


class Corpus(NamedTuple):
    """Bytes of the three splits, which share no document."""

    train: np.ndarray
    select: np.ndarray  # for choosing settings such as the learning rate
    report: np.ndarray  # for reporting the loss, never for choosing
    digest: str  # of all the bytes: two corpora with the same digest are the same


def read_documents(data: Path | None) -> dict[str, bytes]:
    """Text files by relative path, in order; a single file is cut into blocks of 4096 bytes."""
    if data is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        return read_folder(library, ".py", SKIPPED_FOLDERS, SKIPPED_PREFIXES)
    if data.is_file():
        text = data.read_bytes()
        return {str(at): text[at : at + BLOCK] for at in range(0, len(text), BLOCK)}
    return read_folder(data, "", (), (".",))


def read_folder(
    root: Path, suffix: str, skipped: tuple[str, ...], skipped_prefixes: tuple[str, ...]
) -> dict[str, bytes]:
    """Text files below a folder by relative path, without the names that are to be skipped."""

    def wanted(name: str) -> bool:
        return name not in skipped and not name.startswith(skipped_prefixes)

    documents = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = filter(wanted, subfolders)
        for name in names:
            path = Path(folder, name)
            if wanted(name) and name.endswith(suffix):
                text = path.read_bytes()
                if b"\0" not in text[:1024]:  # not a text otherwise
                    documents[path.relative_to(root).as_posix()] = text
    return dict(sorted(documents.items()))


def split_of(name: str) -> str:
    """The split a document belongs to, by a hash of its name: 90 % train, 5 % each held out."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 20
    return {0: "select", 1: "report"}.get(bucket, "train")


def read_corpus(data: Path | None) -> Corpus:
    """Read and split the corpus; documents end with a zero byte."""
    parts: dict[str, list[bytes]] = {"train": [], "select": [], "report": []}
    for name, text in read_documents(data).items():
        parts[split_of(name)].append(text + b"\0")
    joined = {name: b"".join(texts) for name, texts in parts.items()}
    digest = hashlib.sha256(b"\0".join(joined.values())).hexdigest()[:16]
    return Corpus(
        **{name: np.frombuffer(text, np.uint8) for name, text in joined.items()}, digest=digest
    )


class Windows:
    """Random-access source of all windows of context + 1 bytes: inputs and, one later, targets."""

    def __init__(self, text: np.ndarray, context: int):
        """Cut `text` into windows whose inputs do not overlap."""
        self._text, self._context = text, context

    def __len__(self) -> int:
        """Number of whole windows."""
        return max(0, len(self._text) - 1) // self._context

    def __getitem__(self, index: int) -> np.ndarray:
        """Window `index`, uint8 (context + 1,)."""
        start = index * self._context
        return self._text[start : start + self._context + 1]


def shuffled_windows(corpus: Corpus, config: Config) -> "grain.MapDataset":
    """All windows of the training split in random order, again and again in another one."""
    windows = Windows(corpus.train, config.context)
    if len(windows) < config.batch:
        msg = f"data={config.data} has {len(windows)} windows to train on, fewer than a batch."
        raise ValueError(msg)
    import grain  # here and not at the top: the model can be used without it

    return grain.MapDataset.source(windows).seed(config.seed).shuffle().repeat()


def make_batches(corpus: Corpus, config: Config) -> "grain.MapDataset":
    """Training batches, uint8 (batch, context + 1): `batches[t]` depends on seed and t only."""
    return shuffled_windows(corpus, config).batch(config.batch)


def held_out_windows(text: np.ndarray, config: Config) -> np.ndarray:
    """A fixed set of windows spread evenly over a held-out split, (windows, context + 1)."""
    windows = Windows(text, config.context)
    if len(windows) < config.eval_windows:
        msg = (
            f"data={config.data} has {len(windows)} windows of {config.context} bytes in a "
            f"held-out split, fewer than eval_windows={config.eval_windows}."
        )
        raise ValueError(msg)
    indices = np.linspace(0, len(windows) - 1, config.eval_windows).astype(int)
    return np.stack([windows[index] for index in indices])


# ---------------------------------------------------------------------------------------- model


class Block(nnx.Module):
    """Pre-norm transformer block: causal attention, then an MLP four times as wide."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        """Draw the parameters; only kernels and norm scales, no biases."""
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.attention_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            config.heads,
            width,
            use_bias=False,
            decode=False,
            deterministic=True,
            dtype=dtype,
            keep_rngs=False,
            rngs=rngs,
        )
        self.mlp_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Activations (batch, time, width) to the same."""
        x = x + self.attention(self.attention_norm(x), is_causal=True)
        # All positions as rows of one matrix: a third off the time of XLA's gradients on CPU.
        rows = self.mlp_norm(x).reshape(-1, x.shape[-1])
        return x + self.down(jax.nn.gelu(self.up(rows))).reshape(x.shape)


class GPT(nnx.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        """Draw the parameters."""
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.token_embedding = nnx.Embed(256, width, dtype=dtype, rngs=rngs)
        self.position_embedding = nnx.Embed(config.context, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.lm_head = nnx.Linear(width, 256, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens (batch, time), integers below 256, to logits (batch, time, 256)."""
        positions = jnp.arange(tokens.shape[1])
        x = self.token_embedding(tokens) + self.position_embedding(positions)[None]
        for block in self.blocks:
            x = block(x)
        rows = self.norm(x).reshape(-1, x.shape[-1])
        return self.lm_head(rows).reshape(*tokens.shape, -1)


# ----------------------------------------------------------------------------------- optimizers

# Each is called as optax.adamw is: (learning_rate, weight_decay=..., mask=...).
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "muon": orthax.muon,
    "muon_int8": functools.partial(orthax.muon, mu_dtype="int8"),
    "normuon": orthax.normuon,
    "muon_original_table": functools.partial(
        orthax.muon,
        orthogonalizer=orthax.orthogonalize(newton_schulz, coefficients=coefficients.MUON),
    ),
    "muon_eight_steps": functools.partial(
        orthax.muon,
        orthogonalizer=orthax.orthogonalize(
            newton_schulz, coefficients=coefficients.minimax(8, 1e-4)
        ),
    ),
    "muon_three_steps": functools.partial(
        orthax.muon,
        orthogonalizer=orthax.orthogonalize(
            newton_schulz, coefficients=coefficients.minimax(3, 1e-3, cushion=0.02, safety=1.02)
        ),
    ),
    "muon_polynomial": functools.partial(
        orthax.muon, orthogonalizer=orthax.orthogonalize(newton_schulz)
    ),
    "muon_rational": functools.partial(orthax.muon, orthogonalizer=orthax.orthogonalize(zolotarev)),
    "muon_exact": functools.partial(
        orthax.muon, orthogonalizer=orthax.orthogonalize(zolotarev, degree=3, passes=2)
    ),
    "root": orthax.root,
    "auon_paper": orthax.auon,
    "auon_code": functools.partial(
        orthax.auon, gamma=1.5, mode="code", shape_scale=optax.identity()
    ),
    "auon_rms": functools.partial(orthax.auon, mode="rms"),
    "hybrid_auon": orthax.hybrid_auon,
    "trion": orthax.trion,
    "dct_adamw": orthax.dct_adamw,
    "sgd": lambda learning_rate, weight_decay, mask: optax.chain(
        optax.trace(decay=0.95, nesterov=True),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    ),
}


# These take a rank, a basis and a ranking, too.
LOW_RANK = ("trion", "dct_adamw")


def peak_rate(config: Config) -> float:
    """The learning rate given, or the stored one."""
    given = config.learning_rate
    return LEARNING_RATES[config.optimizer] if given is None else given


def learning_rate_schedule(config: Config) -> optax.Schedule:
    """Linear warm-up to the peak rate, then linear decay to zero just after the last update."""
    peak, warmup = peak_rate(config), config.warmup_steps
    rise = optax.linear_schedule(0.0, peak, warmup)
    fall = optax.linear_schedule(peak, 0.0, config.steps + 1 - warmup)
    rate_of_update = optax.join_schedules([rise, fall], [warmup])
    return lambda count: rate_of_update(count + 1)  # from update 1: no update has rate zero


def decayed(params: Any) -> Any:
    """Weight decay mask: kernels are decayed; embeddings and norm scales are not."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimizer that the settings name, with the schedule and mask all of them share."""
    options: dict[str, Any] = {"weight_decay": config.weight_decay, "mask": decayed}
    if config.optimizer in LOW_RANK:
        options |= {"rank": config.rank, "basis": config.basis, "ranking": config.ranking}
    optimizer = OPTIMIZERS[config.optimizer](learning_rate_schedule(config), **options)
    if config.outliers:
        optimizer = optax.chain(add_outliers(config.outliers, config.seed), optimizer)
    return optimizer


class OutlierState(NamedTuple):
    """Counts updates: the noise of each is drawn from the seed and its number."""

    count: jax.Array


def add_outliers(share: float, seed: int) -> optax.GradientTransformation:
    """Add normal noise of 100 standard deviations of its leaf to a random share of the entries."""

    def init(params: Any) -> OutlierState:
        del params
        return OutlierState(jnp.zeros([], jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, OutlierState]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        keys = jax.random.split(
            jax.random.fold_in(jax.random.key(seed), state.count), (len(leaves), 2)
        )

        def noisy(leaf: jax.Array, key: jax.Array) -> jax.Array:
            hit = jax.random.bernoulli(key[0], share, leaf.shape)
            noise = 100 * jnp.std(leaf) * jax.random.normal(key[1], leaf.shape)
            return leaf + jnp.where(hit, noise, 0)

        noisy_leaves = [noisy(leaf, key) for leaf, key in zip(leaves, keys, strict=True)]
        return structure.unflatten(noisy_leaves), OutlierState(state.count + 1)

    return optax.GradientTransformation(init, update)


def settle(config: Config) -> Config:
    """Fill in what the settings leave open, and check them.

    Raises:
        ValueError: If they are not possible; the message names the setting.
    """
    if config.optimizer not in OPTIMIZERS:
        msg = f"optimizer={config.optimizer!r} is not one of {', '.join(OPTIMIZERS)}."
        raise ValueError(msg)
    if config.learning_rate is None:
        if config.optimizer not in LEARNING_RATES:
            msg = f"No stored learning rate for {config.optimizer!r}: give learning_rate."
            raise ValueError(msg)
        config = dataclasses.replace(config, learning_rate=LEARNING_RATES[config.optimizer])
    if not 0 <= config.outliers < 1:
        msg = f"outliers={config.outliers} is not a share in [0, 1)."
        raise ValueError(msg)
    if config.width % config.heads:
        msg = f"heads={config.heads} does not divide width={config.width}."
        raise ValueError(msg)
    if not 0 < config.warmup_steps < config.steps:
        msg = f"warmup_steps={config.warmup_steps} is not between 0 and steps={config.steps}."
        raise ValueError(msg)
    if config.tensorboard is not None and importlib.util.find_spec("tensorboardX") is None:
        msg = f"tensorboard={config.tensorboard} needs tensorboardX: pip install tensorboardX"
        raise ValueError(msg)
    if config.log is None and config.checkpoint_dir is not None:
        config = dataclasses.replace(config, log=config.checkpoint_dir / "log.csv")
    return config


# ---------------------------------------------------------------------------- one training step


class State(NamedTuple):
    """All that a step changes, and all that a checkpoint holds."""

    params: Any
    opt_state: optax.OptState


def init_state(config: Config, mesh: Mesh | None = None) -> tuple[nnx.GraphDef, State]:
    """The model's static part, and the initial state drawn from the seed.

    On a mesh each device gets its parts of the same state, which no device ever has whole.
    """

    def draw() -> Any:
        params = nnx.state(GPT(config, nnx.Rngs(config.seed)))
        return nnx.as_pure(params)  # plain arrays at paths such as blocks, 0, up, kernel

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: GPT(config, nnx.Rngs(config.seed))))
    if mesh is not None:
        params = jax.jit(draw, out_shardings=gpt_mesh.layout(jax.eval_shape(draw), mesh))()
    else:
        params = draw()
    if config.start_from is not None:
        params = trained_params(config.start_from, params, mesh)
    optimizer = make_optimizer(config)
    opt_state = with_room_for_measures(optimizer, params, optimizer.init(params))
    if mesh is not None:
        opt_state = gpt_mesh.everywhere(opt_state, mesh)
    return graphdef, State(params, opt_state)


def with_room_for_measures(
    optimizer: optax.GradientTransformation, params: Any, state: optax.OptState
) -> optax.OptState:
    """The state with zeros for what it holds only after an update, as `optax.monitor` does.

    A compiled step and a checkpoint take states of one structure.
    """
    if not optax.tree.get_all_with_path(state, "measurements"):
        return state
    later = jax.eval_shape(optimizer.update, params, state, params)[1]
    known = dict(jax.tree.leaves_with_path(state))
    return jax.tree.map_with_path(
        lambda path, leaf: known[path] if path in known else jnp.zeros(leaf.shape, leaf.dtype),
        later,
    )


def loss_of(params: Any, graphdef: nnx.GraphDef, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy, in nats per byte, of predicting each byte from those before it."""
    tokens = tokens.astype(jnp.int32)
    logits = nnx.merge(graphdef, params)(tokens[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def make_train_step(
    config: Config,
    graphdef: nnx.GraphDef,
    state: State,
    tokens: Any,
    loss_of: Callable[..., jax.Array] = loss_of,
) -> jax.stages.Compiled:
    """Compile the step (state, tokens) -> (state, loss); it reuses the memory of its state.

    The new state lies where the old one does.
    """
    optimizer = make_optimizer(config)

    def train_step(state: State, tokens: jax.Array) -> tuple[State, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(state.params, graphdef, tokens)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), opt_state), loss

    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(train_step, donate_argnums=0, out_shardings=(layout, None))
    return step.lower(state, tokens).compile()


# --------------------------------------------------------------------------- log and checkpoints


class Row(NamedTuple):
    """One line of the loss log: after `step` updates. Losses in nats per byte."""

    step: int
    seconds: float  # spent in training steps so far: no compilation, evaluation or saving
    train_loss: float | None  # of the batch of this step, before its update
    select_loss: float | None  # None where not evaluated
    report_loss: float | None


class Result(NamedTuple):
    """What a run leaves: its settings, with the learning rate filled in, and its losses."""

    config: Config
    train_loss: np.ndarray  # (steps,)
    eval_steps: np.ndarray  # (evaluations,) updates made before each; the first is 0
    eval_seconds: np.ndarray  # (evaluations,) of training before each
    select_loss: np.ndarray  # (evaluations,)
    report_loss: np.ndarray  # (evaluations,)


def result_of(config: Config, rows: list[Row]) -> Result:
    """Arrange the rows of a finished log."""
    evaluated = [row for row in rows if row.select_loss is not None]
    return Result(
        config,
        np.array([row.train_loss for row in rows[1:]]),
        np.array([row.step for row in evaluated]),
        np.array([row.seconds for row in evaluated]),
        np.array([row.select_loss for row in evaluated]),
        np.array([row.report_loss for row in evaluated]),
    )


def read_log(path: Path, steps: int) -> list[Row]:
    """The rows of an earlier run up to step `steps`, all of which must be there."""
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    rows = []
    for line in itertools.islice(csv.reader(lines), steps + 1):
        step, seconds, *losses = line
        known = [float(loss) if loss else None for loss in losses]
        rows.append(Row(int(step), float(seconds), *known))
    if [row.step for row in rows] != list(range(steps + 1)):
        msg = f"{path} is not the loss log of the checkpoint at step {steps}: rows are missing."
        raise ValueError(msg)
    return rows


def open_log(path: Path | None, rows: list[Row]) -> TextIO:
    """Start the log with `rows`, then leave it open for more; None: a log in memory."""
    if path is None:
        return io.StringIO()
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_name(path.name + ".new")
    with begun.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Row._fields, *rows])
    begun.replace(path)  # in one move: a kill leaves the old log or the new one
    return path.open("a", newline="")


class TensorBoard:
    """Writes rows of the log, and the measures in the optimizer's state, as TensorBoard events."""

    def __init__(self, folder: Path | None, first: int):
        """Open the folder, if one is given; what it has of steps after `first` is replaced."""
        self._writer = None
        if folder is not None:
            from tensorboardX import SummaryWriter  # only who asks for it needs it

            self._writer = SummaryWriter(str(folder), purge_step=first + 1 if first else None)

    def __enter__(self) -> "TensorBoard":
        """Nothing more to open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()

    def write(self, row: Row, opt_state: optax.OptState) -> None:
        """Write the losses; where the row has evaluated ones, the optimizer's measures too."""
        if self._writer is None:
            return
        values = {"train": row.train_loss, "select": row.select_loss, "report": row.report_loss}
        scalars = {f"loss/{name}": value for name, value in values.items() if value is not None}
        if row.select_loss is not None:
            scalars |= diagnostics.scalars(opt_state)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, row.step)


def trained_params(folder: Path, like: Any, mesh: Mesh | None = None) -> Any:
    """The parameters in the last checkpoint of another run.

    Raises:
        ValueError: If there is none, or its model has other shapes.
    """
    with ocp.CheckpointManager(folder.absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            msg = f"start_from={folder} holds no checkpoint."
            raise ValueError(msg)
        arguments = ocp.args.Composite(settings=ocp.args.JsonRestore())
        settings: Any = manager.restore(step, args=arguments).settings
        known = {field.name for field in dataclasses.fields(Config)}
        settings = {name: value for name, value in settings.items() if name in known}
        config = dataclasses.replace(Config(**settings), start_from=None)
        abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, init_state(config, mesh)[1])
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        params = manager.restore(step, args=arguments).state.params
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (params, like)]
    if shapes[0] != shapes[1]:
        msg = f"start_from={folder} holds another model: give its width, layers and context."
        raise ValueError(msg)
    return params


class Checkpoints:
    """Saves the state with its settings, and refuses to restore under other settings."""

    def __init__(self, config: Config, digest: str):
        """Open the folder that the settings name, if any."""
        self._settings = settings_that_matter(config) | {"corpus": digest}
        self._manager = None
        if config.checkpoint_dir is not None:
            # Synchronous, because the next step overwrites the memory that is being saved.
            options = ocp.CheckpointManagerOptions(
                max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
            )
            self._directory = config.checkpoint_dir.absolute()
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        """Nothing more to open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the folder."""
        if self._manager is not None:
            self._manager.close()

    def restore(self, state: State) -> tuple[int, State]:
        """The last saved step and its state, or 0 and the state given."""
        step = None if self._manager is None else self._manager.latest_step()
        if self._manager is None or step is None:
            return 0, state
        arguments = ocp.args.Composite(settings=ocp.args.JsonRestore())
        saved: Any = self._manager.restore(step, args=arguments)
        self._check_settings(saved.settings)
        abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, state)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        saved = self._manager.restore(step, args=arguments)
        return step, saved.state

    def _check_settings(self, saved: dict[str, Any]) -> None:
        for name, value in self._settings.items():
            if name not in saved or saved[name] != value:
                msg = (
                    f"The checkpoint in {self._directory} was written with "
                    f"{name}={saved.get(name)!r}, but this run has {name}={value!r}: "
                    "give the same setting, or another --checkpoint-dir."
                )
                raise ValueError(msg)

    def save(self, step: int, state: State) -> None:
        """Save the state after `step` updates; the two latest checkpoints are kept."""
        if self._manager is not None:
            arguments = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                settings=ocp.args.JsonSave(self._settings),
            )
            self._manager.save(step, args=arguments)


# ------------------------------------------------------------------------------------- the loop


def train(config: Config) -> Result:
    """Train one model; resume if the checkpoint folder holds a run with the same settings.

    Args:
        config: The settings.

    Returns:
        The losses.

    Raises:
        ValueError: If a setting is not possible, the corpus is too small, or the checkpoint folder
            belongs to another run; the message names the setting.
    """
    config = settle(config)
    mesh = None if config.mesh is None else gpt_mesh.make_mesh(config)
    corpus = read_corpus(config.data)
    batches = make_batches(corpus, config)
    held_out = [held_out_windows(text, config) for text in (corpus.select, corpus.report)]
    if mesh is not None:
        gpt_mesh.check_agreement((settings_that_matter(config), corpus.digest))
        batches = gpt_mesh.Batches(shuffled_windows(corpus, config), config.batch, mesh)
        held_out = [gpt_mesh.cut_rows(tokens, mesh) for tokens in held_out]
    graphdef, state = init_state(config, mesh)
    loss_here = loss_of if mesh is None else gpt_mesh.on_whole_params(loss_of, mesh)
    held_out_loss = jax.jit(loss_here, static_argnums=1)

    def evaluate(params: Any) -> list[float]:
        return [float(held_out_loss(params, graphdef, tokens)) for tokens in held_out]

    with Checkpoints(config, corpus.digest) as checkpoints:
        first, state = checkpoints.restore(state)
        if first and config.log is not None:  # a checkpoint folder implies a log
            rows = read_log(config.log, first)
        else:
            rows = [Row(0, 0.0, None, *evaluate(state.params))]
        train_step = make_train_step(config, graphdef, state, batches[0], loss_here)
        seconds = rows[-1].seconds
        # Of several processes the first one writes; all take part in evaluations and checkpoints.
        writes = gpt_mesh.is_first()
        bar = tqdm(
            total=config.steps,
            initial=first,
            desc=f"{config.optimizer} {config.learning_rate:g}",
            unit="step",
            disable=not (config.progress and writes),
            mininterval=0.1 if jax.process_count() == 1 else 10,  # there each is a line of a log
        )
        log = open_log(config.log if writes else None, rows)
        with bar, log, TensorBoard(config.tensorboard if writes else None, first) as board:
            for step in range(first + 1, config.steps + 1):
                started = time.perf_counter()
                state, loss = train_step(state, batches[step - 1])
                loss = float(loss)  # waits for the step to end
                seconds = round(seconds + time.perf_counter() - started, 6)

                last = step == config.steps
                evaluated = last or step % config.eval_every == 0
                losses = evaluate(state.params) if evaluated else [None, None]
                rows.append(Row(step, seconds, loss, *losses))
                csv.writer(log, lineterminator="\n").writerow(rows[-1])
                log.flush()  # before the checkpoint, which counts on its rows
                board.write(rows[-1], state.opt_state)
                if last or step % config.checkpoint_every == 0:
                    checkpoints.save(step, state)
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                bar.update()

    result = result_of(config, rows)
    if config.plot is not None and writes:
        plot_losses(result, config.plot)
    return result


# -------------------------------------------------------------------------------------- script


def plot_losses(result: Result, path: Path) -> None:
    """Draw the losses of one run against steps."""
    config = result.config
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(result.train_loss) + 1)
    axes.plot(steps, result.train_loss, color="0.75", linewidth=0.8, label="train, one batch")
    axes.plot(result.eval_steps, result.select_loss, color="#0072B2", label="held out: select")
    axes.plot(
        result.eval_steps, result.report_loss, "--", color="#D55E00", label="held out: report"
    )
    axes.set(
        title=f"Byte-level GPT, {config.optimizer}, learning rate {config.learning_rate:g}",
        xlabel="step",
        ylabel="loss (nats per byte)",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def smoke_settings(config: Config, folder: Path) -> Config:
    """The same settings with tiny sizes, and every file written, to `folder` unless named."""
    config = dataclasses.replace(config, **SMOKE)
    if jax.process_count() > 1:  # each has another temporary folder
        return config
    return dataclasses.replace(
        config,
        checkpoint_dir=config.checkpoint_dir or folder / "checkpoints",
        plot=config.plot or folder / "loss.png",
    )


def main(config: Config) -> Result:
    """Train as the settings say and print the final held-out loss."""
    if config.mesh is not None:
        gpt_mesh.join_processes()
    with tempfile.TemporaryDirectory() as folder, gpt_mesh.failures_end_the_job():
        result = train(smoke_settings(config, Path(folder)) if config.smoke else config)
    if gpt_mesh.is_first():
        print(
            f"{result.config.optimizer}, learning rate {result.config.learning_rate:g}: held-out "
            f"loss {result.select_loss[-1]:.4f} (select), {result.report_loss[-1]:.4f} (report) "
            f"nats per byte after {result.eval_steps[-1]} steps and "
            f"{result.eval_seconds[-1]:.1f} s of training."
        )
    return result


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
