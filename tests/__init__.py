"""The test suite, and what the benchmarks share with it (cases, naive)."""
