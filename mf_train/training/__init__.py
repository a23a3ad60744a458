"""The training run: loop, state, schedule, metrics, guards, signals."""
