"""Memory and time of a run from its configuration alone: no torch, no GPU, no process group."""
