"""The README's Python blocks run as printed, in order, in one namespace."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_python_blocks_run_and_explain_prints_the_table_shown(capsys):
    namespace = {}
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), namespace)
    (table,) = blocks("text")
    assert capsys.readouterr().out.strip() == table.strip()


def test_every_script_and_picture_that_the_readme_names_exists():
    text = README.read_text()
    named = re.findall(r"`((?:examples|benchmarks)/[\w/]+\.\w+)`", text)
    named += re.findall(r"\]\(([\w/]+\.\w+)\)", text)
    assert len(named) > 5
    assert [path for path in named if not (README.parent / path).exists()] == []
