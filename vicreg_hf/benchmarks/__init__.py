"""Measurements of speed and memory for `scripts/benchmark.py`, side by side with others."""
