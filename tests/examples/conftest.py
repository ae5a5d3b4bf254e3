"""Makes the example scripts importable, as running them from the command line does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
