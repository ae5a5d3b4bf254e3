"""The README's Python blocks run as printed, in order, in one namespace."""

import re
import subprocess
import sys
from pathlib import Path

import compilation

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_python_blocks_run_as_users_compile_and_explain_prints_the_table_shown():
    environment = {**compilation.users_environment(), "JAX_NUMPY_RANK_PROMOTION": "raise"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(blocks("python"))],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (table,) = blocks("text")
    assert run.stdout.strip() == table.strip()


def test_every_script_and_picture_that_the_readme_names_exists():
    text = README.read_text()
    named = re.findall(r"`((?:examples|benchmarks)/[\w/]+\.\w+)`", text)
    named += re.findall(r"\]\(([\w/]+\.\w+)\)", text)
    assert len(named) > 5
    assert [path for path in named if not (README.parent / path).exists()] == []
