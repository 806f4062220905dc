"""Benchmarks against named peers in the same run. ``python -m benchmarks adapter``, ``python -m benchmarks report``."""
