"""Benchmarks: `python -m benchmarks.cpu` and its like; each prints a short table of medians and ratios."""
