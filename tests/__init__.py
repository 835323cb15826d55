"""Tests, one folder per package; `tests.reference` is shared with the benchmarks."""
