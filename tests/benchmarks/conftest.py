"""Makes the packages of benchmarks/ importable, as `python -m <package>` there does."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
