"""Makes the example scripts importable, as running them from the command line does."""

import os
import sys
from pathlib import Path

import compilation

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import gpt

# Its blocks are all alike, and one compiles in half the time of two; `make smoke` runs two.
gpt.SMOKE["layers"] = 1

if os.environ.get(compilation.AS_USERS) != "1":
    collect_ignore = ["test_orthogonal_cnn.py"]  # test_as_users_compile.py runs it
