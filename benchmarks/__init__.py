"""Measurements of the library; each `python -m benchmarks.bench_X` writes a page into benchmarks/results."""
