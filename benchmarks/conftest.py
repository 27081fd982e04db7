"""Puts the repository's root on the path, from which the benchmarks import each other."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
