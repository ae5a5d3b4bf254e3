"""Everything that is to be known of an accelerator, in one command of at most eight minutes.

    python benchmarks/accelerator.py          # on a GPU or TPU
    python benchmarks/accelerator.py --smoke  # everything once and tiny, on any machine; no record

It needs no installation (`PYTHONPATH=. python ...`), only jax, optax and flax, and reads only files
of this repository. Sections, each of which can run alone (`--only updates choices`):

  laws      is it right here? Laws of orthogonalisation and published codes, in every precision;
  matrices  each method on one matrix or a stack: time, rate, distance to the polar factor;
  updates   whole optimizer steps beside optax's and PyTorch's: time, memory;
  choices   stacks, chunks, the Gram form, Hermitian products, the cosine transform, quantisation;
  training  a step of examples/gpt.py as large as GPT-2, and the optimizer's share of it.

Rows are printed and written as they come, so a run that is cut off leaves what it has: to
benchmarks/results/accelerator-DEVICE.json, with a picture beside it. Ends with status 1 if a law
failed or something raised.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

# JAX reads them when it is imported: PyTorch shares the card, and a rehearsal mostly compiles.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if "--smoke" in sys.argv:
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import record
from device import choices, laws, matrices, training, updates
from device.session import Session

SECTIONS = {
    "laws": laws.run,
    "updates": updates.run,
    "matrices": matrices.run,
    "choices": choices.run,
    "training": training.run,
}
SHARES = {"laws": 1.0, "updates": 2.5, "matrices": 2.5, "choices": 2.0, "training": 1.0}
"""Of the time; what a section leaves over goes to those after it."""


def main(arguments: argparse.Namespace) -> int:
    """Run the sections; how many things failed that should not have."""
    if jax.default_backend() == "cpu" and not arguments.smoke:
        print("There is no accelerator here: --smoke runs everything once, tiny.")
        return 2
    name = re.sub(r"\W+", "-", record.device_name().lower())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if arguments.smoke else arguments.out
        path = folder / f"accelerator-{name}.json"
        seconds = 60.0 * arguments.minutes
        session = Session(path, seconds=seconds, smoke=arguments.smoke, commit=arguments.commit)
        chosen = [section for section in SECTIONS if section in arguments.only]
        for i, section in enumerate(chosen):
            share = SHARES[section] / sum(SHARES[other] for other in chosen[i:])
            with session.section(section, share):
                SECTIONS[section](session)
        try:
            from device import picture  # last: without Matplotlib all else is done
        except ImportError as error:
            print(f"No picture: {error}")
        else:
            figure = picture.draw(session.rows, f"{record.device_name()}, {jax.__version__}")
            figure.savefig(path.with_suffix(".png"), dpi=150)
        print(f"\n{'Not recorded' if arguments.smoke else path}; {len(session.failed)} failed:")
        for failure in session.failed:
            print(f"  {failure}")
        return 1 if session.failed else 0


def parsed() -> argparse.Namespace:
    """The command line, by argparse: machines with accelerators need not have tyro."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="everything once, tiny; no record")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing is begun after these")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the results")
    parser.add_argument("--commit", help="where the checkout came without its history")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parsed()))
