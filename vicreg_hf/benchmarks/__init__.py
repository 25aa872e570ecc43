"""What `scripts/benchmark.py` measures: ratios, side by side in one run."""
