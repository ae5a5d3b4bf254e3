"""Which tests run where only a part of them is to: `pytest --part=8` runs about an eighth.

A test is met if its hash falls in that part of all hashes. Of every function one set of parameters
is met at least, and of every row of the contract one clause, so no function and no row is left
out. The hash depends on the commit, so that other pairs are met at the next; `--turn` repeats one.
"""

import hashlib
import subprocess
from pathlib import Path


def rank(name, turn):
    """A number in [0, 1) that depends on nothing but the two."""
    digest = hashlib.blake2b(f"{turn}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def choose(tests, part, turn):
    """The names of the tests to run.

    Args:
      tests: The groups of each test, by its name.
      part: How many parts there are.
      turn: Which of them, any text.
    """
    chosen = {name for name in tests if rank(name, turn) < 1 / part}
    groups = {}
    for name in sorted(tests, key=lambda name: rank(name, turn)):
        for group in tests[name]:
            groups.setdefault(group, []).append(name)
    for members in groups.values():
        if chosen.isdisjoint(members):
            chosen.add(members[0])
    return chosen


def groups_of(item):
    """Its function, the row of the contract if it is of one, itself if it is never left out."""
    groups = [item.nodeid.partition("[")[0]]
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    row = getattr(parameters.get("case"), "name", None)
    if row is not None:
        groups.append(f"row {row}")
    if item.get_closest_marker("in_every_part"):
        groups.append(item.nodeid)
    return groups


def commit():
    """Of the repository, or nothing outside of one."""
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return run.stdout.strip()


# --- what pytest calls


def pytest_addoption(parser):
    parser.addoption("--part", type=int, default=1, metavar="N", help="run about one test in N")
    parser.addoption("--turn", default=None, help="which part; by default the commit says so")


def pytest_configure(config):
    if config.option.turn is None:
        config.option.turn = commit()  # so that the processes of pytest-xdist agree


def pytest_report_header(config):
    if config.option.part != 1:
        return f"about one test in {config.option.part}: --turn={config.option.turn}"


LONG = ("test_sharding.py", "test_as_users_compile.py")
"""Files whose single tests take minutes: first, or the other worker waits for them at the end."""


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONG)
    if config.option.part == 1:
        return
    tests = {item.nodeid: groups_of(item) for item in items}
    chosen = choose(tests, config.option.part, config.option.turn)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
    items[:] = [item for item in items if item.nodeid in chosen]
