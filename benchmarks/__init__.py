"""Measurements behind the figures in the documentation; run them with ``python -m benchmarks.NAME``."""
