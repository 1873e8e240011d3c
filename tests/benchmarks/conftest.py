"""The modules of benchmarks/ are imported by their bare names, as its programs do."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
