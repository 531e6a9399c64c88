"""Where the benchmarks of this checkout lie and put their results."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
